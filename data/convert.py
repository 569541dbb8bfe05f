"""Nearly any file of examples to our record formats: JSON, CSV, TSV or parquet.

    python -m data.convert FILE --out=out/data/mine.jsonl      # what it holds is told by its fields
    python -m data.convert FILE --prompt=Question --completion="Best Answer"    # or by you
    python -m data.convert FILE --prompt=q --chosen=good --rejected=bad
    python -m data.convert FILE --kind=rankings                # OpenAssistant: rankings of replies
    python -m data.convert FILE --min_margin=1                 # scored answers: clear pairs only

What a file is is decided by its bytes; what its rows are, by the fields that are not empty:

    conversations or messages of {from, value} or {role, content}    demonstrations (ShareGPT)
    instruction, input, output                                       demonstrations (Alpaca)
    instruction, instances of {input, output}                        demonstrations (Self-Instruct)
    instruction, context, response                                   demonstrations (Dolly)
    question, answer that ends on "#### 72"                          demonstrations, answers (GSM8K)
    prompt of {text, role, replies}; or message_id, text, role       OpenAssistant, see `oasst`
    instruction, completions of {response, overall_score ...}        UltraFeedback, see `scored`
    chosen, rejected: dialogues of "\\n\\nHuman: ..."                  pairs (HH-RLHF)
    others by the names in ROLES, our own among them                 the first of KINDS that fits

An input or a context goes behind the prompt, after a blank line. The side of the split (held_out or
split), a system prompt and a weight are kept. Fields that are not used are named.
"""

import json
import math
import reprlib
import sys
from collections import Counter
from dataclasses import dataclass

import cli
from cli import NotNegative, UserError, note, shorten
from data import alpaca, dolly, gsm8k, hh_rlhf
from data.download import check_out, write
from data.files import any_rows
from data.records import (LABELED, check_answer, check_demonstration, check_prompt,
                          check_ranking_or_label)
from data.verifier import is_gold

# role: the names that it goes by, in upper or lower case; the first that is there counts
ROLES = dict(
    prompt=("prompt", "instruction", "question", "query", "problem", "input"),
    input=("input", "context"), system=("system", "system_prompt"),
    completion=("completion", "response", "output", "solution", "target", "answer"),
    chosen=("chosen", "preferred", "better"), rejected=("rejected", "worse"),
    messages=("messages", "conversations"), completions=("completions",), ranks=("ranks",),
    gold=("gold",), label=("label",), answer=("answer",))
# (what the rows are, the roles that this takes, those that may come with it)
KINDS = (("pairs", "chosen rejected", "prompt input system"),
         ("rankings", "prompt completions ranks", "input system gold"),
         ("labels", "messages label", "system"),
         ("demonstrations", "messages", "system"),
         ("labels", "prompt completion label", "input system"),
         ("answers", "prompt answer", "completion input system"),
         ("demonstrations", "prompt completion", "input system"),
         ("prompts", "prompt", "input system"))
FLAGS = {"label", "held_out", "weight", "loss_weight", "train"}  # a table has them as text
COLUMNS = ("prompt", "completion", "chosen", "rejected", "label", "answer", "system")  # as flags
# kept whatever the rows are; the last is what label.py says of its rankings
BESIDE = ("system", "held_out", "split", "weight", "loss_weight", "train", *sorted(LABELED))
SPEAKERS = dict(human="user", user="user", prompter="user", gpt="assistant", chatgpt="assistant",
                bard="assistant", assistant="assistant", system="system")
FIRST = 20  # rows whose answers tell whether all are numbers


@dataclass
class Config:
    file: str = ""  # what to read; "--file=" may be left out
    out: str = "out/data/convert.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists
    skip_bad: bool = False  # leave out the rows that cannot be read, and count them
    # --- columns to take, where their names do not tell; the others are left out then
    prompt: str = ""  # a question, or a list of turns
    completion: str = ""  # an answer to learn, or the one that --label judges
    chosen: str = ""  # the better answer
    rejected: str = ""  # the worse answer
    label: str = ""  # whether the completion is wanted: true or false, 1 or 0
    answer: str = ""  # the number to end on
    system: str = ""  # a system prompt
    # --- what is made of ranked and scored answers
    kind: str = "demonstrations"  # of OpenAssistant's: demonstrations or rankings
    min_margin: NotNegative[float] = 0.0  # least gap of the scores in a pair


def trees(rows):
    """(rows {"prompt": message with its "replies"}, how many messages hang on none of these) of
    OpenAssistant's single messages."""
    replies, seen, whole = {}, set(), []  # replies: {message_id: [message, ...]}
    for where, row, why in rows:
        row = row if isinstance(row, dict) else {}
        key, parent = row.get("message_id"), row.get("parent_id") or None
        if why or not isinstance(key, str) or key in seen or not isinstance(parent, str | None):
            whole.append((where, None, why or "a message needs a 'message_id' of its own"))
            continue
        seen.add(key)
        row = dict(row, replies=replies.setdefault(key, []))
        if parent:
            replies.setdefault(parent, []).append(row)
        else:
            whole.append((where, dict(prompt=row), None))
    reached = [row["prompt"] for _, row, _ in whole if row]
    for message in reached:  # the list grows while it is read
        reached += message["replies"]
    return whole, len(seen) - len(reached)


def unfold(rows):
    """A row for each of Self-Instruct's "instances"; all other rows as they are."""
    for where, row, why in rows:
        parts = row.get("instances") if isinstance(row, dict) else None
        if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
            yield from ((where, dict(row, instances=None) | part, why) for part in parts)
        else:
            yield where, row, why


# --- what the rows are ---------------------------------------------------------------------------


def find_fields(rows):
    """{name: the first value that is not empty}, over all rows."""
    return {name: value for _, row, _ in reversed(rows) if isinstance(row, dict)
            for name, value in row.items() if value not in (None, "", [], {})}


def find_roles(fields, rows):
    """{role: field} by the names; "answer" only where those of the first rows are numbers."""
    lower = {name.strip().lower(): name for name in reversed(fields)}
    roles = {role: next((lower[name] for name in names if name in lower), None)
             for role, names in ROLES.items()}
    if roles["prompt"] is None and roles["chosen"]:
        roles["prompt"] = roles["messages"]  # the turns before both answers
    if roles["input"] == roles["prompt"]:
        roles["input"] = lower.get("context")
    answers = [row.get(roles["answer"]) for _, row, _ in rows[:FIRST] if isinstance(row, dict)]
    if not all(type(a) in (int, float) or is_gold(str(a)) for a in answers if a not in (None, "")):
        roles["answer"] = None
    elif roles["answer"] == roles["completion"]:
        roles["completion"] = None
    return {role: name for role, name in roles.items() if name}


def recognise(fields, rows):
    """(what the rows are, {role: field} that is read, function(row, where, roles, config) that
    yields (record, why there is none)), or None where the fields do not tell."""
    same = lambda *names: {name: name for name in names}
    if isinstance(fields.get("prompt"), dict):
        return "OpenAssistant's messages", same("prompt"), oasst
    answers = fields.get("completions")
    if "instruction" in fields and isinstance(answers, list) and isinstance(answers[0], dict):
        return "UltraFeedback", same("instruction", "completions"), scored
    roles = find_roles(fields, rows)
    judged = fields.keys() & {"chosen", "rejected", "label"}
    dialogue = "prompt" not in roles and isinstance(fields.get("chosen"), str) and \
        hh_rlhf.parse(fields["chosen"])
    for what, names, adapter, fits in (
            ("Alpaca", ("instruction", "input", "output"), alpaca, not judged),
            ("Dolly", ("instruction", "context", "response"), dolly, not judged),
            ("GSM8K", ("question", "answer"), gsm8k, "####" in str(fields.get("answer"))),
            ("HH-RLHF", ("chosen", "rejected"), hh_rlhf, dialogue)):
        if fits and fields.keys() >= set(names):
            return what, same(*names), lambda row, where, roles, _, adapter=adapter: [
                adapter.convert({name: "" if row.get(name) is None else row[name]
                                 for name in roles}, where)]
    for what, needs, also in KINDS:
        if set(needs.split()) <= roles.keys() and (
                what != "pairs" or "prompt" in roles or isinstance(fields[roles["chosen"]], list)):
            return what, {role: name for role, name in roles.items()
                          if role in f"{needs} {also}".split()}, by_roles
    return None


# --- rows to records -----------------------------------------------------------------------------


def by_roles(row, where, roles, config):
    """Yields (record, None): the fields by the names of their roles."""
    for role, name in roles.items():
        if row.get(name) is None and role not in ("prompt", "input", "system", "gold"):
            raise UserError(f"{where}: the field {name!r} is missing")
    record = {role: as_turns(row[name]) for role, name in roles.items()
              if row.get(name) is not None}
    extra = record.pop("input", None)
    if extra:
        if not isinstance(extra, str) or not isinstance(record.get("prompt"), str):
            raise UserError(f"{where}: {roles['input']!r} can only go behind the prompt where both "
                            "are text")
        if extra.strip() and not alpaca.PLACEHOLDER.fullmatch(extra):
            record["prompt"] += f"\n\n{extra}"
    if "label" in record and isinstance(record.get("messages"), list):
        *record["prompt"], last = record.pop("messages") or [None]
        record["completion"] = [last]
    yield record, None


def as_turns(value):
    """Turns as [{"role", "content"}, ...], whatever their fields and roles are called. A turn of
    the assistant that stands alone gives its text; all else is left as it is."""
    if isinstance(value, list):
        return [as_turn(turn) for turn in value]
    turn = as_turn(value)
    return turn["content"] if isinstance(turn, dict) and turn["role"] == "assistant" else turn


def as_turn(turn):
    """One turn with our names; what is no turn as it is."""
    if not isinstance(turn, dict):
        return turn
    role, content = (turn.get(a) or turn.get(b) for a, b in (("role", "from"),
                                                             ("content", "value")))
    return {k: v for k, v in turn.items() if k not in ("from", "value")} | dict(
        role=SPEAKERS.get(str(role).lower(), role), content=content)


def is_number(value):
    """Whether it is a finite one."""
    return type(value) in (int, float) and -math.inf < value < math.inf


def ranks(scores):
    """1 for the highest score; equal scores tie."""
    return [1 + sum(other > score for other in scores) for score in scores]


def scored(row, where, roles, config):
    """Yields (record, why there is none) for UltraFeedback's answers to one instruction.

    By "fine-grained_score", the mean of four aspects, where two answers have it, else by
    "overall_score", which in the first release has some 10s that stand for 1. One ranking, or with
    --min_margin pairs of the best with each that is so much lower.
    """
    answers = row.get("completions")
    answers = [a for a in answers if isinstance(a, dict)] if isinstance(answers, list) else []
    for key in ("fine-grained_score", "overall_score"):
        known = [(a[key], a["response"]) for a in answers
                 if is_number(a.get(key)) and a.get("response")]
        if len(known) > 1:
            break
    yield from [(None, "answers without text or score")] * (len(answers) - len(known))
    best, text = max(known, key=lambda pair: pair[0], default=(0, None))
    worse = [other for score, other in known if best > score <= best - config.min_margin]
    if not worse:
        yield None, "instructions without a better and a worse answer"
    elif config.min_margin:
        for other in worse:
            yield dict(prompt=row.get("instruction"), chosen=text, rejected=other), None
    else:
        yield dict(prompt=row.get("instruction"), completions=[text for _, text in known],
                   ranks=ranks([score for score, _ in known])), None


def oasst(row, where, roles, config):
    """Yields (record, why there is none) for every user turn in a tree of OpenAssistant's messages.

    A demonstration ends on the best ranked reply. The assistant turns before it have weight 0: each
    that is a best reply is learnt in a record of its own, and the others are not to be learnt.
    A ranking (--kind=rankings) has all ranked replies, where there are two or more.
    """
    stack = [([row.get("prompt")], [])]  # (messages side by side, the turns before them)
    while stack:
        messages, turns = stack.pop()
        for m in messages:
            if not isinstance(m, dict) or not isinstance(m.get("text"), str) or \
                    m.get("role") not in ("prompter", "assistant") or \
                    not isinstance(m.get("replies"), list | None):
                raise UserError(f"{where}: a message needs a text, a role (prompter or assistant) "
                                "and a list of replies")
        kept = [m for m in messages if not m.get("deleted") and m.get("review_result") is not False]
        yield from [(None, "messages deleted or refused in review, each with its replies")] * (
            len(messages) - len(kept))
        stack += [(m.get("replies") or [],
                   [*turns, dict(role=SPEAKERS[m["role"]], content=m["text"])])
                  for m in reversed(kept)]
        if not turns or turns[-1]["role"] != "user":
            continue
        answers = [m for m in kept if m["role"] == "assistant"]
        ranked = [m for m in answers if is_number(m.get("rank"))]
        places = ranks([-m["rank"] for m in ranked])  # rank 0 is the best
        if config.kind == "rankings" and len(ranked) > 1:
            yield from [(None, "replies without a rank")] * (len(answers) - len(ranked))
            yield dict(prompt=turns, completions=[m["text"] for m in ranked], ranks=places), None
        elif config.kind == "rankings" or not answers:
            yield None, "user turns with too few replies"
        else:
            best = ranked[places.index(1)] if ranked else answers[0]
            before = [t if t["role"] == "user" else dict(t, weight=0) for t in turns]
            yield dict(messages=[*before, dict(role="assistant", content=best["text"])]), None


def checked(record, where):
    """(the record, None) where a stage can read it, or (None, why the stage would leave it out).
    UserError where it is in none of our formats."""
    for key in FLAGS & record.keys():
        text = str(record[key]).strip().lower()
        record[key] = {"true": True, "1": True, "false": False, "0": False}.get(text, record[key])
    has = record.keys()
    checks = [check_ranking_or_label] * bool(has & {"chosen", "rejected", "completions", "label"}) \
        + [check_answer] * ("answer" in has) \
        + [check_demonstration] * (bool(has & {"messages", "completion"}) and "label" not in has)
    for check in checks or [check_prompt]:
        result = check(record, where)
        if "dropped" in result:
            return None, result["dropped"]
    if not has & {"prompt", "messages"}:  # it stands only in the turns of the answers
        record["prompt"] = result.get("prompt") or result["messages"][:-1]
        record.pop("system", None)  # is the first turn now
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise UserError(f"{where}: holds a broken character, or what JSON cannot hold") from None
    return record, None


def convert_rows(rows, function, roles, config):
    """([(row, record), ...], {reason: dropped}, [what is wrong with a bad row, ...])."""
    pairs, dropped, bad = [], Counter(), []
    for where, row, why in rows:
        try:
            if why or not isinstance(row, dict):
                raise UserError(f"{where}: {why or 'a row must be a JSON object'}")
            beside = {key: row[key] for key in BESIDE if row.get(key) not in (None, "")}
            made = [(None, reason) if reason else checked(record | beside | record, where)
                    for record, reason in function(row, where, roles, config)]
        except UserError as error:
            bad.append(str(error))
            continue
        pairs += [(row, record) for record, _ in made if record]
        dropped.update(reason for _, reason in made if reason)
    return pairs, dropped, bad


def name_file(argv):
    """The arguments with the first that is no flag as --file=ARGUMENT."""
    n = next((n for n, word in enumerate(argv) if not word.startswith("-")), None)
    return argv if n is None else [*argv[:n], f"--file={argv[n]}", *argv[n + 1:]]


def main(config):
    path = config.file
    if not path:
        raise UserError("name a file: python -m data.convert FILE --out=FILE.jsonl")
    if config.kind not in ("demonstrations", "rankings"):
        raise UserError(f"--kind={config.kind}: expected demonstrations or rankings")
    check_out(config)
    named = {role: name for role in COLUMNS if (name := getattr(config, role))}
    rows, lost = list(unfold(any_rows(path))), 0
    if not named and {"message_id", "text", "role"} <= find_fields(rows).keys():
        rows, lost = trees(rows)
    fields = find_fields(rows)
    if not fields:
        raise UserError(next((f"{where}: {why}" for where, _, why in rows if why),
                             f"{path}: holds no rows with fields"))

    for role, name in named.items():
        if name not in fields:
            raise UserError(f"--{role}={name}: no such column, or nothing in it; there are "
                            + shorten(", ".join(fields), 300))
    found = ("the columns named", named, by_roles) if named else recognise(fields, rows)
    if not found:
        raise UserError(f"{path}: what its rows are is not clear from their fields, "
                        f"{shorten(', '.join(fields), 300)}: name those to take, as in "
                        + " ".join(f"--{role}=NAME" for role in COLUMNS))
    what, roles, function = found
    if config.kind == "rankings" and function is not oasst:
        raise UserError(f"--kind=rankings is for OpenAssistant's messages; {path} holds {what}")
    if config.min_margin and function is not scored:
        raise UserError(f"--min_margin is for UltraFeedback's scores; {path} holds {what}")
    print(f"{path}: {len(rows):,} rows, read as {what}: "
          + ", ".join(role if role == name else f"{role} = {name}" for role, name in roles.items())
          + "; a row gives several records, counted below" * (function in (oasst, scored)))
    unused = [name for name in fields if name not in (*roles.values(), *BESIDE)]
    if unused:
        print(f"fields that are not used: {shorten(', '.join(unused), 300)}")

    pairs, dropped, bad = convert_rows(rows, function, roles, config)
    listed = "\n  ".join(bad[:10]) + "\n  ..." * (len(bad) > 10)
    if bad and not (pairs and config.skip_bad):
        raise UserError(listed if len(bad) == 1 else f"{path}: {len(bad)} bad rows of {len(rows)}; "
                        f"--skip_bad=true goes on without them:\n  {listed}")
    if bad:
        note(f"{path}: {len(bad)} bad rows of {len(rows)} are left out:\n  {listed}")
    dropped.update({"bad": len(bad), "messages below one that is not in the file": lost})
    if pairs:
        for name, shown in zip(("from", "to"), pairs[0]):
            shown = [f"{key}: {reprlib.repr(value)}" for key, value in shown.items()]
            print(f"  {name:4} {shorten(', '.join(shown), 150)}")
    write("convert", config, [record for _, record in pairs], +dropped)


if __name__ == "__main__":
    sys.argv[1:] = name_file(sys.argv[1:])
    cli.run_main(main, cli.parse(Config))
