"""Record formats (JSON lines), their validation, and the batches that the stages train on.

    demonstration  {"prompt": P, "completion": A}   or   {"messages": [turn, ...]}
    pair           {"prompt": P, "chosen": A, "rejected": A}
    ranking        {"prompt": P, "completions": [A, ...], "ranks": [int, ...]}   1 best, ties =
                   (label.py adds "world", "noise" and "policy", see `embedded`)
    answer         {"prompt": P, "answer": text or number}   checked as a number, see verifier.py
                   {"prompt": P, "constraints": [{"kind": K, ...}, ...]}   what it has to fulfil
    label          {"prompt": P, "completion": A, "label": true | false}   wanted or not
    evaluation     {"prompt": P, "expect": "refuse" | "comply" | "unsure"}   what it calls for
                   {"prompt": P, "choices": [text, ...], "answer": index}   of which one is right
    prompt         {"prompt": P}   (other fields are ignored, so any of the above will do)

P is a string or a list of {"role": "system" | "user" | "assistant", "content": text} turns that
does not end with the assistant. A is a string or a list of one assistant turn; the turns of P may
stand before it again, and where they do, "prompt" may be left out. A pair is read as a ranking of
two. docs/data.md has an example of each, and what else a record may say: its side of the split, a
system prompt, what is not to be learnt. Null is the same as absent.
"""

import hashlib
import contextlib
import json
import re
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from cli import UserError, first_process, note, to_json
from data.files import append, each_row, is_data, json_rows, parse_json, whole_file
from data.synthetic.world import all_prompts, lookup
from data.verifier import broken_constraints, is_gold

ROLES = ("system", "user", "assistant")
WEIGHTS = {"weight", "loss_weight", "train", "trainable", "training"}
# what belongs into a prompt, and would be left out of it
BESIDE = ("input", "context", "query", "instruction", "history", "system_prompt", "tools", "images")
# the fields that a check looks at; what every record may say, and label.py adds, is no news
LABELED = {"second", "scores", "sources", "before", "first", "differ", "family", "world", "noise",
           "policy"}
COMMON = {"prompt", "system", *BESIDE, "held_out", "split", *WEIGHTS, *LABELED}
FIELDS = dict(check_demonstration={"completion", "messages", "label"},
              check_ranking={"chosen", "rejected", "completions", "ranks", "gold"},
              check_ranking_or_label={"chosen", "rejected", "completions", "ranks", "gold",
                                      "completion", "label"},
              check_answers={"chosen", "rejected", "completions", "ranks", "gold"},
              check_answer={"answer", "constraints"},
              check_evaluation={"expect", "choices", "answer", "behaviour", "with_opinion",
                                "opinion", "set", "kind"})
TURN_FIELDS = {"role", "content", "loss", *WEIGHTS}
EXPECT = ("refuse", "comply", "unsure")
SIDES = dict(train=False, training=False, test=True, validation=True, valid=True, val=True,
             dev=True, eval=True, held_out=True)  # of a field "split"
# a dialogue of HH-RLHF's kind up to the answer
DIALOGUE = re.compile(r"^\s*Human: .*\n\s*Assistant:\s*$", re.DOTALL)
# how other templates end an answer, and how they begin a turn
STOP = re.compile(r"<[|｜](?:endoftext|im_end|eot_id|eot|end_of_text|end_of_turn|end|return|"
                  r"end▁of▁sentence)[|｜]>|</s>|<eos>|<end_of_turn>|\[EOS\]", re.IGNORECASE)
ENDS = re.compile(rf"(?:\s*(?:{STOP.pattern}))+\s*$", re.IGNORECASE)
MARKER = re.compile(r"<[|｜][\w▁ ]{1,30}[|｜]>|</s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|"
                    r"\[/?INST\]|\[EOS\]", re.IGNORECASE)


def _fail(where, why):
    raise UserError(f"{where}: {why}")


def _present(record):
    """The record without its nulls; what may stand beside a prompt and is empty is absent too."""
    return {k: v for k, v in record.items() if v is not None
            and not (k in ("system", *BESIDE) and (not v or not str(v).strip()))}


def _alone(record, where):
    """UserError for what belongs into the prompt and would be left out."""
    for key in BESIDE:
        if key in record:
            _fail(where, f"{key!r} beside the prompt would not be read: put it into the prompt "
                  "(`python -m data.convert` appends an input or a context)")


def _need(record, key, where):
    if key not in record:
        found = ", ".join(map(str, list(record)[:8])) or "nothing"
        _fail(where, f"the field {key!r} is missing; here are: {found}. docs/data.md has the "
              "formats, `python -m data.convert` reads others")
    return record[key]


def _text(record, key, where):
    value = _need(record, key, where)
    if not isinstance(value, str):
        _fail(where, f"{key!r} is {type(value).__name__}, expected text")
    if not value.strip():
        _fail(where, f"{key!r} is empty")
    return value


def _counts(record, where):
    """Whether the loss counts what the record, or the turn, says. No stage weights its loss, and
    none reads masks of tokens."""
    for key in ("mask", "masked", "loss_mask", "weights"):
        if key in record:
            _fail(where, f"{key!r} cannot be honoured; \"weight\": 0 says what is not to be learnt")
    # "loss" may be a measurement, unless it is a truth value
    values = {k: v for k, v in record.items() if k in WEIGHTS or k == "loss" and type(v) is bool}
    for key, value in values.items():
        if value not in (0, 1):
            _fail(where, f"{key!r} is {str(value)[:40]}: only 0 or 1, false or true, can be "
                  "honoured")
    return all(values.values())


def _checked(record, where, **result):
    """The result with the side that the record says; "dropped" where it is not to be learnt."""
    if not _counts(record, where):
        result["dropped"] = "of weight 0"
    return result | _side(record, where)


def _bare(turns):
    return [(t["role"], t["content"]) for t in turns]


def _turns(value, key, where):
    """[{"role", "content"}, ...], "weight": 0 on those that are not to be learnt."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        _fail(where, f"{key!r} is {found}, expected text or a list of turns")
    turns = []
    for i, turn in enumerate(value):
        at = f"{where}, {key}[{i}]"
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            found = f", not {turn['role']!r}" if isinstance(turn, dict) and "role" in turn else ""
            _fail(where, f"{key}[{i}] needs a role: system, user or assistant{found}")
        turn = _present(turn)
        if turn["role"] == "system" and not str(turn.get("content", "")).strip():
            continue  # the same as none
        for field in ("tool_calls", "function_call", "tool_call_id"):
            if turn.get(field):
                _fail(at, f"holds {field!r}, which no stage can read")
        parts = turn.get("content")
        if isinstance(parts, list):  # as the APIs write it
            if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
                _fail(at, "'content' holds more than text")
            turn["content"] = "".join(p["text"] for p in parts)
        learnt = {} if _counts(turn, at) else dict(weight=0)
        turns.append(dict(role=turn["role"], content=_text(turn, "content", at), **learnt))
    if not turns:
        _fail(where, f"{key!r} holds an empty system prompt and nothing else")
    return turns


def _prompt(record, where):
    """Text, or turns that do not end with the assistant's; a field "system" comes first."""
    prompt = _need(record, "prompt", where)
    _alone(record, where)
    prompt = _text(record, "prompt", where) if isinstance(prompt, str) else \
        _turns(prompt, "prompt", where)
    if isinstance(prompt, str) and DIALOGUE.search(prompt):
        _fail(where, "'prompt' is a dialogue in one text (Human: ... Assistant:): write it as "
              "turns")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        _fail(where, "'prompt' ends with an assistant turn")
    if "system" not in record:
        return prompt
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    if turns[0]["role"] == "system":
        _fail(where, "'system' beside a prompt that has a system turn")
    return [dict(role="system", content=_text(record, "system", where)), *turns]


def _answer(record, key, prompt, where):
    """The text of an answer: a string, or a list of turns, one more than those of the prompt, which
    may be left out."""
    if isinstance(_need(record, key, where), str):
        return _text(record, key, where)
    turns = _turns(record[key], key, where)
    before = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    if _bare(turns[:len(before)]) == _bare(before):
        turns = turns[len(before):]
    elif before[0]["role"] == "system" and _bare(turns[:len(before) - 1]) == _bare(before[1:]):
        turns = turns[len(before) - 1:]  # the system prompt has a field of its own
    if [t["role"] for t in turns] != ["assistant"]:
        _fail(where, f"{key!r} must be text or one assistant turn behind the turns of the prompt")
    if "weight" in turns[0]:
        _fail(where, f"{key!r} is marked as not to be learnt")
    return turns[0]["content"]


def _with_prompt(record, keys, where):
    """The record with the prompt that its answers have in common, where it has none of its own."""
    lists = [record.get(k) for k in keys]
    if "prompt" in record or not all(isinstance(turns, list) for turns in lists):
        return record
    first, *others = (_turns(record[k], k, where) for k in keys)
    n = 0
    while n < len(first) - 1 and all(
            len(o) > n + 1 and _bare(o[n:n + 1]) == _bare(first[n:n + 1]) for o in others):
        n += 1
    if n == 0:
        _fail(where, f"{' and '.join(map(repr, keys))} have no first turn in common")
    return dict(record, prompt=first[:n])


def _side(record, where):
    """{"held_out": bool} where the record says itself on which side of the split it is."""
    said = set()
    if "held_out" in record:
        if not isinstance(record["held_out"], bool):
            _fail(where, "'held_out' must be true or false")
        said.add(record["held_out"])
    if "split" in record:
        name = re.match("held_out|[a-z]*", str(record["split"]).lower())[0]  # also of train_sft
        if name not in SIDES:
            _fail(where, f"'split' is {str(record['split'])[:40]!r}, expected one of "
                  f"{', '.join(SIDES)}; rename the field if it says something else")
        said.add(SIDES[name])
    if len(said) == 2:
        _fail(where, "'held_out' and 'split' contradict each other")
    return dict(held_out=said.pop()) if said else {}


def _label(record, where):
    if record["label"] not in (0, 1):
        _fail(where, "'label' must be true or false")
    return bool(record["label"])


def check_demonstration(record, where="record"):
    """{"messages": [...]}, last turn the assistant's. UserError if it is not one."""
    record = _present(record)
    if "messages" in record:
        _alone(record, where)
        turns = _turns(record["messages"], "messages", where)
        if "system" in record:
            turns = [dict(role="system", content=_text(record, "system", where)), *turns]
        if turns[-1]["role"] != "assistant":
            _fail(where, "'messages' does not end with an assistant turn")
    else:
        record = _with_prompt(record, ["completion"], where)
        prompt = _prompt(record, where)
        answer = _answer(record, "completion", prompt, where)
        turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        # the completion is what is learnt, and not what the assistant said before
        turns = [t | dict(weight=0) if t["role"] == "assistant" else t for t in turns]
        turns = [*turns, dict(role="assistant", content=answer)]
    checked = _checked(record, where, messages=turns)
    if all(t.get("weight") == 0 for t in turns if t["role"] == "assistant"):
        checked["dropped"] = "of weight 0"
    if "label" in record and not _label(record, where):
        checked["dropped"] = "marked as wrong (\"label\": false)"
    return checked


def check_ranking(record, where="record"):
    """{"prompt", "completions", "ranks"}, "gold" if given; a pair becomes a ranking of two."""
    record = _present(record)
    if "completions" not in record:
        if "completion" in record and "chosen" not in record:
            _fail(where, "one answer is no pair: " + (
                "`python dpo.py --loss=kto` learns from answers with a label" if "label" in record
                else "`python sft.py` learns from demonstrations"))
        record = _with_prompt(record, ["chosen", "rejected"], where)
        prompt = _prompt(record, where)
        completions = [_answer(record, k, prompt, where) for k in ("chosen", "rejected")]
        return _checked(record, where, prompt=prompt, completions=completions, ranks=[1, 2])
    prompt, completions, ranks = _prompt(record, where), record["completions"], record.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        _fail(where, "'completions' must be a list of at least two texts")
    completions = [_answer({"prompt": prompt, f"completions[{i}]": c}, f"completions[{i}]", prompt,
                           where) for i, c in enumerate(completions)]
    if isinstance(ranks, list):  # whole numbers that a table wrote as 1.0
        ranks = [int(r) if type(r) is float and r.is_integer() else r for r in ranks]
    if not isinstance(ranks, list) or len(ranks) != len(completions) or \
            not all(type(r) is int and r >= 1 for r in ranks):
        _fail(where, f"'ranks' must be {len(completions)} whole numbers from 1 (best)")
    gold = {}
    if "gold" in record:
        gold = dict(gold=record["gold"])
        if not isinstance(gold["gold"], list) or len(gold["gold"]) != len(completions) or \
                not all(type(g) in (int, float) and abs(g) < 1e9 for g in gold["gold"]):
            _fail(where, f"'gold' must be {len(completions)} numbers")
    return _checked(record, where, prompt=prompt, completions=completions, ranks=ranks, **gold)


def check_answers(record, where="record"):
    """As check_ranking, for answers to rank again: "ranks" only where the record has them, and
    what label.py says of its own answers."""
    record = _present(record)
    answers, unranked = record.get("completions"), "ranks" not in record and "chosen" not in record
    if unranked and isinstance(answers, list):
        if len(answers) < 2:
            return _checked(record, where, prompt=_prompt(record, where)) | dict(
                dropped="with fewer than two answers")
        record["ranks"] = [1] * len(answers)
    checked = check_ranking(record, where)
    sources, n = record.get("sources", []), len(checked["completions"])
    if "sources" in record and (not isinstance(sources, list) or len(sources) != n
                                or not all(type(s) is int and s >= 0 for s in sources)):
        _fail(where, f"'sources' must be {n} numbers from 0: which writer each answer is from")
    known = {k: record[k] for k in ("world", "policy", "sources") if k in record}
    return {k: v for k, v in checked.items() if k != "gold" and not (k == "ranks" and unranked)} \
        | known


def check_answer(record, where="record"):
    """{"prompt", "answer"}, the answer a number, which responses have to end on: as a number, as
    text, or as a worked solution that has it behind "####"; or a list of constraints, which they
    have to fulfil. UserError where it is neither, or both."""
    record = _present(record)
    if "choices" in record:
        _fail(where, "'answer' is one of 'choices': such records are for evaluate.py, "
              "which compares the choices")
    if "constraints" in record:
        if "answer" in record:
            _fail(where, "'answer' beside 'constraints': a response is checked by one of them")
        constraints = record["constraints"]
        if isinstance(constraints, list):
            constraints = [_present(c) if isinstance(c, dict) else c for c in constraints]
        if why := broken_constraints(constraints):
            _fail(where, why)
        return _checked(record, where, prompt=_prompt(record, where), answer=constraints)
    answer = record.get("answer")
    if type(answer) in (int, float):
        # written out: str(1e20) is 1e+20, whose exponent would be read as the number
        record = dict(record, answer=format(Decimal(str(answer)), "f"))
    answer = _text(record, "answer", where)
    if not is_gold(answer):
        _fail(where, f"'answer' is {answer[-40:]!r}, which is not one number that can be checked "
              "(such as 72, -3.5 or $1,200), nor a solution that ends on \"#### 72\"")
    return _checked(record, where, prompt=_prompt(record, where), answer=answer)


def check_evaluation(record, where="record"):
    """{"prompt", "set", "kind"} and "expect", or "choices" and "answer", a list of indices; with
    "behaviour", "with_opinion" and "opinion" if given. UserError if it is neither, or both."""
    record = _present(record)
    if ("expect" in record) == ("choices" in record):
        _fail(where, "an evaluation needs 'expect' or 'choices', and not both")
    checked = dict(prompt=_prompt(record, where), set="", kind="") | {
        key: _text(record, key, where) for key in ("set", "kind") if key in record}
    if "expect" in record:
        if record["expect"] not in EXPECT:
            _fail(where, f"'expect' is {str(record['expect'])[:40]!r}, expected one of "
                  + ", ".join(EXPECT))
        if given := {"answer", "with_opinion", "opinion"} & set(record):
            _fail(where, f"{min(given)!r} needs 'choices'")
        return _checked(record, where, **checked, expect=record["expect"])
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(
            isinstance(c, str) and c.strip() for c in choices):
        _fail(where, "'choices' must be a list of at least two texts")
    if len(set(choices)) < len(choices):
        _fail(where, "'choices' holds the same text twice")
    answer = answer if isinstance(answer, list) else [answer]
    valid = lambda i: type(i) is int and 0 <= i < len(choices)
    if not answer or not all(map(valid, answer)) or len(set(answer)) < len(answer):
        _fail(where, f"'answer' must be an index of 'choices', 0 to {len(choices) - 1}, or a list "
              "of such")
    if len(answer) == len(choices):
        _fail(where, "'answer' names all choices: none would be wrong")
    checked |= dict(choices=choices, answer=answer)
    if "behaviour" in record:
        if not isinstance(record["behaviour"], bool):
            _fail(where, "'behaviour' must be true or false")
        checked["behaviour"] = record["behaviour"]
    if ("with_opinion" in record) != ("opinion" in record):
        _fail(where, "'with_opinion' and 'opinion' belong together")
    if "opinion" in record:
        if not valid(record["opinion"]) or record["opinion"] in answer:
            _fail(where, "'opinion' must be the index of a wrong choice")
        checked |= dict(opinion=record["opinion"], with_opinion=_prompt(
            {k: v for k, v in record.items() if k == "system"} | dict(
                prompt=record["with_opinion"]), where))
    return _checked(record, where, **checked)


def check_ranking_or_label(record, where="record"):
    """{"prompt", "completion", "label"} where the record has a label, else as check_ranking."""
    record = _present(record)
    if "label" not in record:
        return check_ranking(record, where)
    record = _with_prompt(record, ["completion"], where)
    prompt = _prompt(record, where)
    return _checked(record, where, prompt=prompt,
                    completion=_answer(record, "completion", prompt, where),
                    label=_label(record, where))


def check_prompt(record, where="record"):
    """{"prompt"}; a demonstration with messages gives everything before its last turn."""
    record = _present(record)
    if "messages" in record:  # first, as in check_demonstration: the split goes by it
        turns = _turns(record["messages"], "messages", where)
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not turns:
            _fail(where, "'messages' has no turn before the last")
        return _checked(record, where, prompt=turns)
    for keys in (["chosen", "rejected"], ["completion"]):
        if all(k in record for k in keys):
            record = _with_prompt(record, keys, where)
    return _checked(record, where, prompt=_prompt(record, where))


def write_jsonl(path, records):
    if not first_process():
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its JSON escape
    with whole_file(path, "w", encoding="utf-8", errors="backslashreplace") as f:
        for record in records:
            f.write(to_json(record, ensure_ascii=False) + "\n")


def append_jsonl(path, records):
    """More lines, as write_jsonl writes them."""
    if first_process():
        append(path, "".join(to_json(record, ensure_ascii=False) + "\n" for record in records))


def whole_lines(path, unit=1, total=0):
    """The records of a file that append_jsonl may have been stopped in: those up to the last whole
    `unit` of lines, or all if there are `total`. What is behind them is cut off."""
    lines = Path(path).read_bytes().split(b"\n")[:-1] if is_data(path) else []
    if len(lines) != total:
        lines = lines[:len(lines) // unit * unit]
        if Path(path).exists():
            with open(path, "r+b") as f:
                f.truncate(sum(len(line) + 1 for line in lines))
    records = []
    for n, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError):
            records.append(parse_json(line))
        if len(records) < n or not isinstance(records[-1], dict | None):
            raise UserError(f"{path}:{n}: no record, so the file is damaged: --overwrite=true "
                            "starts again")
    return records


def _history(record):
    """The turns before the (last) response."""
    turns = record["messages"][:-1] if "messages" in record else record["prompt"]
    return [dict(role="user", content=turns)] if isinstance(turns, str) else turns


def prompt_key(record):
    """All that stands before the (last) response, as text: what makes two prompts the same."""
    return json.dumps([[t["role"], t["content"]] for t in _history(record)])


def digest(text):
    """64 bits of the text's hash. Of 10 million texts two have the same in one case of 400,000."""
    # half a surrogate pair, which JSON can hold, is no UTF-8
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def split_key(record):
    """What the split goes by: the first user turn, as it reads.

    A system prompt, a later turn of the same dialogue, other white space, upper case, characters
    without width or another spelling of the same ones (Unicode NFKC) do not make another question.
    """
    turns = _history(record)
    first = next((t for t in turns if t["role"] == "user"), turns[0] if turns else {})
    text = first.get("content", "")
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c != "\ufe0f")
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Split:
    """The two sides of the data. They are taken by name and cannot be unpacked, so that no stage
    can be handed training rows for its validation by a slip of the order."""
    train: list
    held_out: list
    summary: str = ""  # a line about what the file holds

    def each(self, change):
        """Both sides through change(name of the side, rows)."""
        return Split(change("training", self.train), change("held-out", self.held_out))


def chunks(items, size, limit=10**6):
    """Lists of items that come next to each other, each of at most 1,000 or of `limit` in size."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if len(chunk) == 1000 or total >= limit:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


class Sides:
    """Decides the side of each prompt, by its `split_key`. By a hash, unless one of its records
    says itself where it belongs ("held_out", as the embedded data do, or "split")."""

    def __init__(self, fraction=0.1):
        self.limit = fraction * 2**64
        self.keys, self.said, self.both = array("Q"), {}, {}

    def add(self, record):
        text = split_key(record)
        key = digest(text)
        self.keys.append(key)
        if "held_out" in record and self.said.setdefault(key, record["held_out"]) \
                != record["held_out"]:
            self.both[key] = text[:60]

    def held_out(self):
        """A boolean array, a value for each record. UserError where two records of one prompt
        contradict each other."""
        if self.both:
            raise UserError(f"{len(self.both)} prompts are marked as held out in one record and "
                            f"not in another, such as {next(iter(self.both.values()))!r}: a prompt "
                            "is on one side, with all its answers and dialogues")
        return np.array([self.said.get(key, key < self.limit) for key in self.keys], bool)


def split(records, fraction=0.1):
    """A Split by `split_key`, never by record: a question is on the same side in every file and
    every stage, so nothing that a stage is tested on was seen by one before it."""
    sides = Sides(fraction)
    for record in records:
        sides.add(record)
    return _split(records, sides.held_out())


def _split(rows, held_out, summary=""):
    return Split(*([row for row, h in zip(rows, held_out) if h == side] for side in (False, True)),
                 summary)


def read_sides(path, check, needed=("training", "held-out"), skip_bad=False, keep=list):
    """A Split of the records of a file, and a line about what it holds. UserError if a needed side
    has none. keep(records): what to keep of these records, one item each."""
    fields, sides, kept, dropped = set(), Sides(), [], Counter()
    used, all_of, markers = array("b"), array("q"), Counter()
    # prompts are taken from records of any format, and texts from what is in them
    known = COMMON | FIELDS.get(check.__name__, set().union({"text"}, *FIELDS.values()))

    def noted(row, where):
        checked = check(row, where)
        for key, value in row.items():
            if value is not None and key not in known:
                fields.add(key)
            # a turn; a constraint has been checked to its last field
            for turn in value if isinstance(value, list) and key in known - {"constraints"} else ():
                if isinstance(turn, dict):
                    fields.update(f"{key}[].{k}" for k, v in turn.items()
                                  if v is not None and k not in TURN_FIELDS)
        return checked

    for chunk in chunks(each_row(path, noted, skip_bad), lambda r: len(str(r))):
        for record in chunk:
            markers.update(clean_markers(record))
            sides.add(record)  # what is left out says on which side its prompt is, too
            dropped.update([record["dropped"]] if "dropped" in record else [])
            used.append("dropped" not in record)
        chunk = [r for r in chunk if "dropped" not in r]
        all_of.extend(hash(json.dumps(r)) for r in chunk)
        kept += keep(chunk) if chunk else []
    held_out, used = sides.held_out(), np.array(used, bool)
    if markers["cut"]:
        note(f"{path}: cut off a stop marker behind {markers['cut']} answers; they end with our "
             "own EOS")
    if markers["inside"]:
        note(f"warning: {path}: {markers['inside']} texts hold markers of a chat template, such as "
             "<|im_start|>, and are read as they stand: the model may learn to write them out")
    for reason, n in dropped.items():
        note(f"{path}: left out {n} of {len(used)} records, {reason}")
    if fields:
        note(f"{path}: fields that are not used: {', '.join(sorted(fields)[:12])}"
             + ", ..." * (len(fields) > 12))
    keys, held_out = np.array(sides.keys, np.uint64)[used], held_out[used]
    need_sides(path, held_out, needed)
    twice = len(all_of) - len(np.unique(all_of))
    summary = (f"{path}: {len(keys):,} records; {len(np.unique(keys[~held_out])):,} prompts to "
               f"train on, {len(np.unique(keys[held_out])):,} held out")
    if twice:
        summary += f"; {twice:,} records stand there again ({twice / len(keys):.1%})"
    print(summary)
    return _split(kept, held_out, summary)


def need_sides(path, held_out, needed):
    """UserError if none of the records, each held out or not, is on a needed side."""
    for name, n in (("training", np.sum(~held_out)), ("held-out", np.sum(held_out))):
        if name in needed and not n:
            raise UserError(f"{path}: none of the {len(held_out)} records to use is on the {name} "
                            "side. About a tenth of the prompts is held out, by a hash of the "
                            "prompt; a field \"held_out\": true or false decides for its prompt")


def clean_markers(record):
    """Cut off stop markers of other templates at the end of an answer: every answer gets our own
    EOS, and a model must not learn to spell another. Markers inside a text stay, as text. Returns
    {"cut": answers, "inside": texts}, how many."""
    found = dict(cut=0, inside=0)

    def clean(text, answer):
        whole, text = text, ENDS.sub("", text) if answer else text
        found["cut"] += text != whole
        found["inside"] += MARKER.search(text) is not None
        return text

    for turn in record.get("messages") or _history(record):
        turn["content"] = clean(turn["content"], turn["role"] == "assistant")
    if "completion" in record:
        record["completion"] = clean(record["completion"], True)
    if "completions" in record:
        record["completions"] = [clean(text, True) for text in record["completions"]]
    answers = record.get("completions") or [record.get("completion") or "-"]
    if not all(text.strip() for text in [*answers, *(t["content"] for t in record.get(
            "messages", ()))]):
        record["dropped"] = "of which an answer is a stop marker and nothing else"
    return found


def question(prompt, synthetic=True):
    """The cluster that a prompt belongs to: what an embedded one asks, whatever its wording; of
    other data the prompt itself."""
    if not synthetic:
        return prompt_key(dict(prompt=prompt))
    return f"{lookup(prompt).relation.name} {lookup(prompt).x}"


def embedded(path):
    """{"noise", "policy"} where every ranking of the file is one of the embedded world, else None.

    noise: of the labeler, in gold units; policy: hash of the model whose answers are ranked. The
    records say so themselves ("world": "synthetic"): a file name, or a file beside, can lie.
    """
    record = None
    for _, record, _ in json_rows(path):
        if not isinstance(record, dict) or record.get("world") != "synthetic":
            return None
    if record is None:  # no records at all: their reader says so
        return None
    try:
        return dict(noise=float(record["noise"]), policy=str(record["policy"]))
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{path}: rankings of the embedded world need \"noise\" and \"policy\", as "
                        "label.py writes them") from None


def ranking_pairs(ranks):
    """(i, j) for every pair that the ranking orders, i preferred: 1 best, a tie makes no pair."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


# --- to token ids: pieces are ids and texts, so that many texts can be tokenised in one call ------


def prompt_digest(record):
    return digest(repr(prompt_key(record)))


def demonstration_rows(tokenizer, record):
    """[(pieces, facts)], as data/tokens.py takes them."""
    return [(tokenizer.message_pieces(record["messages"]), dict(key=prompt_digest(record)))]


def ranking_rows(tokenizer, record):
    """[(pieces, facts), ...], one for each answer; EOS ends every answer, and is scored."""
    head, key = tokenizer.prompt_pieces(record["prompt"]), prompt_digest(record)
    answers = record.get("completions") or [record["completion"]]  # one, of a label
    label = dict(label=1 if record["label"] else -1) if "label" in record else {}
    prompt, golds = record["prompt"], record.get("gold", [np.nan] * len(answers))
    ranks = record.get("ranks", [0])
    ranks = [sorted(ranks).index(rank) for rank in ranks]  # may be larger than an array can hold
    asked = digest(question(prompt)) if isinstance(prompt, str) and prompt in all_prompts() else key
    return [([*head, (text, 1), (tokenizer.eos, 1)], dict(
                label, key=key, asked=asked, answer=digest(text), chars=len(text), rank=rank,
                gold=gold))
            for text, rank, gold in zip(answers, ranks, golds)]


def collate(rows, masks, pad):
    """Lists of ids and masks to tokens (B, T) int64 and mask (B, T) float, right-padded."""
    T = max(len(r) for r in rows)
    tokens = torch.full((len(rows), T), pad)
    mask = torch.zeros(len(rows), T)
    for i, (row, m) in enumerate(zip(rows, masks)):
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, :len(m)] = torch.tensor(m, dtype=torch.float)
    return tokens, mask


def fits(name, lengths, limit):
    """The numbers of the rows of at most `limit` tokens; those over it are dropped, counted aloud,
    never cut. Says how long the rows are."""
    lengths = np.asarray(lengths, dtype=int)
    kept = np.flatnonzero(lengths <= limit)
    if len(kept) < len(lengths):
        note(f"{name}: dropped {len(lengths) - len(kept)} of {len(lengths)}, over {limit} tokens "
             "long")
    if len(kept):
        middle, most, longest = np.quantile(lengths[kept], (0.5, 0.95, 1))
        print(f"{name}: {len(kept):,}; tokens: median {middle:.0f}, 95% up to {most:.0f}, longest "
              f"{longest:.0f}")
    return kept
