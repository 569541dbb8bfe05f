"""Readers of data files under broken input: they read it or refuse it in one line.

Valid files of every format are changed at random: bytes flipped, cut, doubled, pieces of one file
put into another, JSON values replaced. Each is then read by every reader that could be given it.

    python studies/fuzz.py --n=100000                     # minutes on one core

What makes a reader fail in another way is written to --out and named; the exit status is then 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive


@dataclass
class Config:
    n: Positive[int] = 100000  # inputs
    seed: int = 1
    out: str = "out/fuzz"  # folder for the inputs that break a reader


CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import contextlib
import gzip
import io
import json
import random
from collections import Counter

from cli import NOTES, UserError, progress
from data import alpaca, alpaca_eval, convert, dolly, gsm8k, hh_rlhf, instructions
from data.records import (check_answer, check_demonstration, check_prompt, check_ranking,
                          check_ranking_or_label, demonstration_rows, embedded, ranking_rows,
                          read_sides)
from data.text import read_texts
from data.tokenizer import load_tokenizer, read_ranks
from data.tokens import flatten

TURNS = [dict(role="system", content="Be brief."), dict(role="user", content="Hi?"),
         dict(role="assistant", content="Yes.</s>", weight=1)]
ROWS = [
    dict(prompt="Name é.", completion="A pear.", held_out=True, label=False, system=None),
    dict(messages=TURNS, split="train"),
    dict(prompt=TURNS[:2], chosen=TURNS[2:], rejected="No.", weight=1.0),
    dict(chosen=TURNS, rejected=[*TURNS[:2], dict(role="assistant", content="No.")]),
    dict(prompt="P", completions=["a", "b", "b"], ranks=[1, 2, 2], gold=[1, 0.5, 0]),
    dict(prompt="P", completions=["a", "b"], ranks=[2, 1], world="synthetic", noise=1, policy="x"),
    dict(prompt="2 + 2?", answer="#### 4"), dict(prompt="2 + 2?", answer=4.5),
    dict(prompt="P", constraints=[dict(kind="words", at_least=2, at_most=9), dict(
        kind="include", word="pear"), dict(kind="ends", text="!"), dict(kind="lower_case")]),
    dict(text="Story.\n\n<|endoftext|>Another.", id=3),
    dict(instruction="Do", input="this", output="done", context=""),
    dict(instruction="Do", output_1="a", output_2="b", generator_1="x", generator_2="y",
         preference=1.0),
    dict(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: a\n\nAssistant: c"),
    dict(question="How many?", answer="2 + 2 = <<2+2=4>>4\n#### 4"),
    dict(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]),
    dict(prompt="a", completion="b", label=1), dict(instruction="a", completions=[
        dict(response="b", overall_score=3), dict(response="c", overall_score=1)])]
VALUES = [None, True, 0, -1, 1e999, 10**30, "", " ", "\ud800", "\x00", [], {}, [[]], [None],
          [{"role": "user"}], {"role": "user", "content": "a"}, [{"type": "text", "text": 3}]]


def sides_of(check):
    encode = {check_demonstration: demonstration_rows, check_ranking: ranking_rows,
              check_ranking_or_label: ranking_rows}.get(check)
    tokenizer = load_tokenizer("synthetic")

    def keep(records):
        if encode:
            flatten(tokenizer, [encode(tokenizer, r) for r in records])
        return records

    return lambda path: read_sides(path, check, needed=(), keep=keep)


def converted(path):
    convert.main(convert.Config(file=str(path), out=f"{path}.out", overwrite=True))


READERS = {check.__name__: sides_of(check) for check in (
    check_demonstration, check_ranking, check_ranking_or_label, check_answer, check_prompt)}
READERS |= dict(text=lambda path: list(read_texts(str(path), 0, 0)), embedded=embedded,
                alpaca=alpaca.records, alpaca_eval=alpaca_eval.records, gsm8k=gsm8k.records,
                hh_rlhf=hh_rlhf.records, dolly=dolly.records, instructions=instructions.records,
                convert=converted, ranks=read_ranks)


def change_value(rng, value):
    """A copy of a JSON value in which one part is another."""
    if rng.random() < 0.3 or not value or not isinstance(value, (dict, list)):
        return rng.choice(VALUES)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return [*value[:i], change_value(rng, value[i]), *value[i + 1:]]
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {k: v for k, v in value.items() if k != key}
    return {**value, key: change_value(rng, value[key])}


def change_bytes(rng, content):
    for _ in range(rng.randint(0, 4)):
        i, n = rng.randrange(len(content) + 1), rng.randint(1, 9)
        piece = rng.choice([b"", rng.randbytes(n), content[i:i + n] * 2, b"[" * 3000,
                            b"\xef\xbb\xbf", b"\r\n", b"{", b"]", b'"', b"\\u", b"9" * 5000])
        content = content[:i] + piece + content[i + rng.choice((0, n)):]
    return content


def reads(name, path):
    """Whether the reader reads the file; False where it refuses it in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            READERS[name](path)
        return True
    except UserError as error:
        assert str(error).strip()
        return False
    finally:
        NOTES.clear()


def make(rng, row):
    """The bytes of a file that holds the row, and perhaps others, changed."""
    rows = [row] * rng.randint(1, 3) + rng.choices(ROWS, k=rng.randint(0, 2) * (rng.random() < 0.2))
    rows = [change_value(rng, row) if rng.random() < 0.6 else row for row in rows]
    text = json.dumps(rows) if rng.random() < 0.3 else "\n".join(map(json.dumps, rows))
    content = text.encode()
    if rng.random() < 0.3:
        content = change_bytes(rng, content)
    if rng.random() < 0.1:
        content = gzip.compress(content)
        content = change_bytes(rng, content) if rng.random() < 0.5 else content
    return content


def main(config):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path, found, broken = out / "input", Counter(), 0
    right = []  # the readers that each row is meant for
    for row in ROWS:
        path.write_text(json.dumps(row))
        right.append([name for name in READERS if reads(name, path)])
    for i in progress(range(config.n), "inputs"):
        rng = random.Random(f"{config.seed} {i}")
        row = rng.randrange(len(ROWS))
        name = rng.choice(right[row] if rng.random() < 0.8 else list(READERS))
        path.write_bytes(make(rng, ROWS[row]))
        try:
            found[reads(name, path)] += 1
        except Exception as error:
            broken += 1
            path.rename(out / f"{name}-{i}")
            print(f"{name} on {out}/{name}-{i}: {type(error).__name__}: {error}"[:200])
    print(f"{config.n:,} inputs: {found[True]:,} read, {found[False]:,} refused in one line, "
          f"{broken} broke a reader")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
