"""Record formats (JSON lines), their validation, and the batches that the stages train on.

    demonstration  {"prompt": P, "completion": text}   or   {"messages": [turn, ...]}
    pair           {"prompt": P, "chosen": text, "rejected": text}
    ranking        {"prompt": P, "completions": [text, ...], "ranks": [int, ...]}   1 best, ties =
                   (label.py adds "world", "noise" and "policy", see `embedded`)
    answer         {"prompt": P, "answer": text or number}   checked as a number, see verifier.py
    label          {"prompt": P, "completion": text, "label": true | false}   wanted or not
    prompt         {"prompt": P}   (other fields are ignored, so any of the above will do)

P is a string or a list of {"role": "system" | "user" | "assistant", "content": text} turns that
does not end with the assistant. A pair is read as a ranking of two.
"""

import hashlib
import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch

from cli import UserError, note
from data.synthetic.world import lookup
from data.verifier import final_answer


def _fail(where, why):
    raise UserError(f"{where}: {why}")


def _text(record, key, where):
    if key not in record:
        _fail(where, f"the field {key!r} is missing")
    value = record[key]
    if not isinstance(value, str):
        _fail(where, f"{key!r} is {type(value).__name__}, expected text")
    if not value.strip():
        _fail(where, f"{key!r} is empty")
    return value


def _turns(value, key, where):
    if not isinstance(value, list) or not value:
        _fail(where, f"{key!r} must be text or a list of turns")
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            _fail(where, f"{key}[{i}] needs a role: system, user or assistant")
        _text(turn, "content", f"{where}, {key}[{i}]")
    return value


def _prompt(record, where):
    if "prompt" not in record:
        _fail(where, "the field 'prompt' is missing")
    if isinstance(record["prompt"], str):
        return _text(record, "prompt", where)
    turns = _turns(record["prompt"], "prompt", where)
    if turns[-1]["role"] == "assistant":
        _fail(where, "'prompt' ends with an assistant turn")
    return turns


def _side(record, where):
    """{"held_out": bool} where the record says itself on which side of the split it is."""
    if "held_out" not in record:
        return {}
    if not isinstance(record["held_out"], bool):
        _fail(where, "'held_out' must be true or false")
    return dict(held_out=record["held_out"])


def check_demonstration(record, where="record"):
    """{"messages": [...]}, last turn the assistant's. UserError if it is not one."""
    if "messages" in record:
        turns = _turns(record["messages"], "messages", where)
        if turns[-1]["role"] != "assistant":
            _fail(where, "'messages' does not end with an assistant turn")
        return dict(messages=turns, **_side(record, where))
    prompt, completion = _prompt(record, where), _text(record, "completion", where)
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    return dict(messages=[*turns, dict(role="assistant", content=completion)],
                **_side(record, where))


def check_ranking(record, where="record"):
    """{"prompt", "completions", "ranks"}, "gold" if given; a pair becomes a ranking of two."""
    prompt = _prompt(record, where)
    side = _side(record, where)
    if "completions" not in record:
        return dict(prompt=prompt, ranks=[1, 2], completions=[
            _text(record, "chosen", where), _text(record, "rejected", where)], **side)
    completions, ranks = record["completions"], record.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        _fail(where, "'completions' must be a list of at least two texts")
    for i, text in enumerate(completions):
        _text({f"completions[{i}]": text}, f"completions[{i}]", where)
    if not isinstance(ranks, list) or len(ranks) != len(completions) or \
            not all(type(r) is int and r >= 1 for r in ranks):
        _fail(where, f"'ranks' must be {len(completions)} whole numbers from 1 (best)")
    gold = {}
    if "gold" in record:
        gold = dict(gold=record["gold"])
        if not isinstance(gold["gold"], list) or len(gold["gold"]) != len(completions) or \
                not all(type(g) in (int, float) for g in gold["gold"]):
            _fail(where, f"'gold' must be {len(completions)} numbers")
    return dict(prompt=prompt, completions=completions, ranks=ranks, **gold, **side)


def check_answer(record, where="record"):
    """{"prompt", "answer"}, the answer a text that holds a number, which responses have to end on.

    A whole worked solution will do: what stands behind its last "####", or its last number.
    """
    answer = record.get("answer")
    if type(answer) in (int, float):
        # written out: str(1e20) is 1e+20, whose exponent would be read as the number
        record = dict(record, answer=format(Decimal(str(answer)), "f"))
    answer = _text(record, "answer", where)
    if final_answer(answer) is None:
        _fail(where, "'answer' holds no number")
    return dict(prompt=_prompt(record, where), answer=answer, **_side(record, where))


def check_ranking_or_label(record, where="record"):
    """{"prompt", "completion", "label"} where the record has a label, else as check_ranking."""
    if "label" not in record:
        return check_ranking(record, where)
    if not isinstance(record["label"], bool):
        _fail(where, "'label' must be true or false")
    return dict(prompt=_prompt(record, where), completion=_text(record, "completion", where),
                label=record["label"], **_side(record, where))


def check_prompt(record, where="record"):
    """{"prompt"}; a demonstration with messages gives everything before its last turn."""
    if "messages" in record:  # first, as in check_demonstration: the split goes by it
        turns = check_demonstration(record, where)["messages"][:-1]
        if not turns:
            _fail(where, "'messages' has no turn before the last")
        return dict(prompt=turns, **_side(record, where))
    return dict(prompt=_prompt(record, where), **_side(record, where))


def read_jsonl(path, check):
    """Every record of the file, validated. UserError names file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no data file at {path}")
    records = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
                why = getattr(error, "msg", error)
                raise UserError(f"{where}: not JSON ({why})") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: a record must be a JSON object")
            records.append(check(record, where))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if not records:
        raise UserError(f"{path}: holds no records")
    return records


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_jsonl(path, records):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as its JSON escape
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    temporary.replace(path)


def prompt_key(record):
    """What the split goes by: the text of everything before the (last) response."""
    turns = record["messages"][:-1] if "messages" in record else record["prompt"]
    if isinstance(turns, str):
        turns = [dict(role="user", content=turns)]
    return json.dumps([[t["role"], t["content"]] for t in turns])


@dataclass(frozen=True)
class Split:
    """The two sides of the data. They are taken by name and cannot be unpacked, so that no stage
    can be handed training rows for its validation by a slip of the order."""
    train: list
    held_out: list

    def each(self, change):
        """Both sides through change(name of the side, rows)."""
        return Split(change("training", self.train), change("held-out", self.held_out))


def split(records, fraction=0.1):
    """A Split by a hash of the prompt, never by row: the same prompt is on the same side in every
    file and every stage, so nothing that a stage is tested on was seen by one before it. Records
    with a field "held_out" (the embedded data has its own split) say it themselves."""
    def is_held_out(record):
        if "held_out" in record:
            return record["held_out"]
        digest = hashlib.sha256(prompt_key(record).encode()).hexdigest()
        return int(digest[:8], 16) < fraction * 2**32

    return Split([r for r in records if not is_held_out(r)], [r for r in records if is_held_out(r)])


def read_sides(path, check, needed=("training", "held-out")):
    """A Split of the records of a file. UserError if a needed side has none."""
    sides = split(read_jsonl(path, check))

    def found(name, rows):
        if name in needed and not rows:
            raise UserError(f"{path}: none of its {len(sides.train + sides.held_out)} records is "
                            f"on the {name} side. About a tenth of the prompts is held out, by a "
                            "hash of the prompt; a field \"held_out\": true or false decides for "
                            "its record")
        return rows

    return sides.each(found)


def distinct(records):
    """The first record of each prompt: where a prompt is asked, not trained on, once is enough."""
    first = {}
    for record in records:
        first.setdefault(prompt_key(record), record)
    return list(first.values())


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
    record = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.strip():
            try:
                record = json.loads(line)
                if record["world"] != "synthetic":
                    return None
            except (ValueError, RecursionError, TypeError, KeyError):
                return None
    if not record:  # no records at all: their reader says so
        return None
    try:
        return dict(noise=float(record["noise"]), policy=str(record["policy"]))
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{path}: rankings of the embedded world need \"noise\" and \"policy\", as "
                        "label.py writes them") from None


def choose(records, n, key=prompt_key):
    """n of the records (all if there are fewer), by a hash of what `key` returns: never the first
    ones of a file, whose order may be that of its sources."""
    digest = lambda record: hashlib.sha256(repr(key(record)).encode()).hexdigest()
    return sorted(records, key=digest)[:n]


def ranking_pairs(ranks):
    """(i, j) for every pair that the ranking orders, i preferred: 1 best, a tie makes no pair."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def merge_rankings(records):
    """One element per prompt: {"prompt", "completions", "pairs"}, "gold" where it is known.

    pairs are (i, j), i preferred, over distinct completions: several rankings or pairs of the same
    prompt come together here, so that they share one batch element and each answer is read once.
    """
    merged = {}
    for record in records:
        element = merged.setdefault(prompt_key(record), dict(
            prompt=record["prompt"], completions=[], pairs=[], gold=[]))
        index = []
        for n, text in enumerate(record["completions"]):
            if text not in element["completions"]:
                element["completions"].append(text)
                if "gold" in record:
                    element["gold"].append(record["gold"][n])
            index.append(element["completions"].index(text))
        element["pairs"] += [(index[i], index[j]) for i, j in ranking_pairs(record["ranks"])
                             if index[i] != index[j]]
    for element in merged.values():
        if len(element["gold"]) != len(element["completions"]):
            del element["gold"]
    return [e for e in merged.values() if e["pairs"]]


# --- to token ids --------------------------------------------------------------------------------


def encode_messages(tokenizer, messages):
    """(ids, mask): mask is 1 on the tokens of every assistant turn, its EOS included."""
    ids, mask = [], []
    for i, turn in enumerate(messages):
        if turn["role"] == "assistant":
            # the prompt up to here ends with <|assistant|>; then the response, then EOS
            head = tokenizer.encode_prompt(messages[:i])
            response = tokenizer.encode_response(turn["content"])
            mask += [0] * (len(head) - len(ids)) + [1] * len(response)
            ids = head + response
    return ids, mask


def encode_ranking(tokenizer, record):
    """[ids of prompt + answer, ...] and [mask, ...], one for each answer; EOS ends every answer."""
    head = tokenizer.encode_prompt(record["prompt"])
    answers = [tokenizer.encode_response(c) for c in record["completions"]]
    return [head + a for a in answers], [[0] * len(head) + [1] * len(a) for a in answers]


def collate(rows, masks, pad):
    """Lists of ids and masks to tokens (B, T) int64 and mask (B, T) float, right-padded."""
    T = max(len(r) for r in rows)
    tokens = torch.full((len(rows), T), pad)
    mask = torch.zeros(len(rows), T)
    for i, (row, m) in enumerate(zip(rows, masks)):
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, :len(m)] = torch.tensor(m, dtype=torch.float)
    return tokens, mask


def fits(name, rows, length, size=lambda row: max(map(len, row))):
    """Drop the rows whose size is over `length` tokens; count them aloud, never cut.

    size: tokens of a row; by default rows are tuples of lists and the longest list counts.
    """
    kept = [row for row in rows if size(row) <= length]
    if len(kept) < len(rows):
        note(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)}, over {length} tokens long")
    return kept
