"""Readers of files under broken input: they read it or refuse it in one line.

Valid files of every format are changed at random: bytes flipped, cut, doubled, pieces of one file
put into another, JSON values replaced. Each is then read by every reader that could be given it.
Data files and adapters; what this program writes itself, checkpoints, states, caches, logs,
answers, choices, reports; ranks of a tokenizer and a folder of transformers.

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

import base64
import contextlib
import dataclasses
import gzip
import io
import json
import random
import shutil
from collections import Counter

import torch

import common
import convert as weights
import dpo
import label
import plot
import reward
from cli import NOTES, UserError, progress
from data import (alpaca, alpaca_eval, anthropic_evals, convert, dolly, fine_grained_rlhf, gsm8k,
                  harmbench, hh_rlhf, instructions, tldr, tokens, truthfulqa, ultrafeedback, xstest)
from data.chat import tokenizer_json
from data.download import convert_all
from data.files import json_rows
from data.load import load_rankings
from data.person import Session
from data.records import (check_answer, check_demonstration, check_prompt, check_ranking,
                          check_ranking_or_label, demonstration_rows, embedded, ranking_rows,
                          read_sides)
from data.text import read_texts
from data.tokenizer import TEMPLATES, _with_markers, load_tokenizer, read_ranks
from data.tokens import flatten, read_tokens
from model import GPT, GPTConfig
from reward import Ensemble, RewardModel

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
        dict(response="b", overall_score=3), dict(response="c", overall_score=1)]),
    {"question": "Q? Choices: (A) a (B) b", "answer_matching_behavior": "(A)", "preference":
        [0, 1, 2, 1, 1, 2], **{f"prediction {n}": "abcd"[n - 1] for n in (1, 2, 3, 4)}},
    dict(split="train", info=dict(subreddit="s", title="t", post="p"), choice=1,
         summaries=[dict(text="a"), dict(text="b")]),
    dict(prompt="a", chosen=TURNS[1:], rejected=[TURNS[1], dict(role="assistant", content="n")],
         score_chosen=3.5, score_rejected=1),
    {"Behavior": "b", "FunctionalCategory": "standard", "SemanticCategory": "k", "ContextString":
        "", "Question": "q?", "Category": "c", "Best Answer": "a", "Correct Answers": "a; b",
     "Incorrect Answers": "c", "prompt": "p", "type": "t", "label": "safe"}]
VALUES = [None, True, 0, -1, 1e999, 10**30, 10**400, "", " ", "\ud800", "\x00", [], {}, [[]],
          [None], [{"role": "user"}], {"role": "user", "content": "a"},
          [{"type": "text", "text": 3}]]


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
                convert=converted, harmbench=harmbench.records, truthfulqa=truthfulqa.records,
                xstest=xstest.records, anthropic_evals=anthropic_evals.records)
READERS |= {module.__name__: lambda path, module=module: convert_all(json_rows(path),
                                                                     module.convert)
            for module in (tldr, ultrafeedback)}
TABLES = ("harmbench", "truthfulqa", "xstest")
READERS["fine_grained_rlhf"] = lambda path: [
    fine_grained_rlhf.convert(row, where) for where, row, why in json_rows(path) if not why]
TENSORS = [torch.zeros(3), torch.zeros(8, dtype=torch.long), torch.zeros(1).expand(10**10),
           torch.zeros(2, 8).T, torch.zeros(2).to_sparse(), torch.zeros(0), float("nan"), (), (1,)]


def change_value(rng, value, values=VALUES):
    """A copy of a JSON value in which one part is another."""
    if rng.random() < 0.3 or not isinstance(value, (dict, list, tuple)) or not value:
        return rng.choice(values)
    if isinstance(value, (list, tuple)):
        i = rng.randrange(len(value))
        return type(value)([*value[:i], change_value(rng, value[i], values), *value[i + 1:]])
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {k: v for k, v in value.items() if k != key}
    return {**value, key: change_value(rng, value[key], values)}


def change_bytes(rng, content):
    for _ in range(rng.randint(0, 4)):
        i, n = rng.randrange(len(content) + 1), rng.randint(1, 9)
        piece = rng.choice([b"", rng.randbytes(n), content[i:i + n] * 2, b"[" * 3000,
                            b"\xef\xbb\xbf", b"\r\n", b"{", b"]", b'"', b"\\u", b"9" * 5000])
        content = content[:i] + piece + content[i + rng.choice((0, n)):]
    return content


def reads(reader, path):
    """Whether the reader reads the file; False where it refuses it in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reader(path)
        return True
    except UserError as error:
        assert str(error).strip()
        return False
    finally:
        NOTES.clear()


def make(rng, row, table):
    """The bytes of a file that holds the row, and perhaps others, changed."""
    rows = [row] * rng.randint(1, 3) + rng.choices(ROWS, k=rng.randint(0, 2) * (rng.random() < 0.2))
    rows = [change_value(rng, row) if rng.random() < 0.6 else row for row in rows]
    text = json.dumps(rows) if rng.random() < 0.3 else "\n".join(map(json.dumps, rows))
    if table:
        columns = [dict(row) for row in rows if isinstance(row, dict)]
        text = "\n".join(",".join(map(str, line)) for line in [*map(dict.keys, columns), *map(
            dict.values, columns)][len(columns) - 1:])
    content = text.encode(errors="replace")
    if rng.random() < 0.3:
        content = change_bytes(rng, content)
    if rng.random() < 0.1:
        content = gzip.compress(content)
        content = change_bytes(rng, content) if rng.random() < 0.5 else content
    return content


# --- what this program writes itself, and files of a tokenizer and a model -----------------------


def change_file(rng, path, whole):
    """Write a changed copy of a file, whose bytes are `whole`, to its path."""
    if path.suffix == ".pt" and rng.random() < 0.7:
        content = torch.load(io.BytesIO(whole), weights_only=True)
        stale = content.pop("digest", None)
        for _ in range(rng.randint(1, 2)):
            content = change_value(rng, content, VALUES + TENSORS)
        if not isinstance(content, dict):
            return torch.save(content, path)
        if rng.random() < 0.3 and "format" in content:
            content["format"] = "rlhf-1"  # has no digest
        with contextlib.suppress(ValueError, TypeError, RuntimeError):  # a tensor without bytes
            if rng.random() < 0.7:
                return common.save_file(content, path)
        return torch.save(content | dict(digest=stale), path)
    if path.suffix == ".json" and rng.random() < 0.8:
        whole = json.dumps(change_value(rng, json.loads(whole))).encode()
    elif path.suffix in (".jsonl", ".part") and rng.random() < 0.8:
        rows = [json.loads(line) for line in whole.splitlines()]
        i = rng.randrange(len(rows))
        rows[i:i + 1] = [change_value(rng, rows[i])] * rng.choice((0, 1, 1, 1, 1, 2))
        whole = "\n".join(map(json.dumps, rows)).encode() + b"\n"
    elif path.suffix == ".tiktoken" and rng.random() < 0.8:
        lines = whole.splitlines()
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i:i + 1] = rng.choice([[], [lines[j]], [lines[i]] * 2, [lines[i].split()[0] + b" 9"],
                                     [b"====  3"], [lines[i] + b" 7"]])
        whole = b"\n".join(lines)
    path.write_bytes(change_bytes(rng, whole) if rng.random() < 0.5 else whole)


def own_files(out):
    """{name: (path of a file, what reads it)}: each file is written, and whole."""
    cpu, config = torch.device("cpu"), cli.Config(out=str(out / "run"), overwrite=True)
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257, b"an": 258}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (out / "x.tiktoken").write_text("\n".join(lines))
    small = _with_markers("gpt2", ranks)
    small.state = {"name": "small", "tokenizer.json": tokenizer_json(small), "template":
                   TEMPLATES["markers"], "tokenizer_config.json": {}, "chat_template.jinja": None}
    size = GPTConfig(small.vocab_size, small.n_tokens, 16, 1, 2, 8)
    policy, reward_model = GPT(size), RewardModel(size)
    llama = GPT(dataclasses.replace(size, rope_theta=1e4, norm="rms", mlp="swiglu", bias="none",
                                    rope_scaling=(8.0, 1.0, 4.0, 8.0)))
    for name, network in dict(sft=policy, convert=llama, reward=reward_model,
                              ensemble=Ensemble([reward_model] * 2)).items():
        (out / name).mkdir(exist_ok=True)
        common.save_checkpoint(
            out / name / "model.pt", network, name.replace("ensemble", "reward"), small,
            reward.Config(ensemble=1 + (name == "ensemble")), dict(loss=1.0), dict(sft="abc"))
    weights.write_folder(weights.Config(source=str(out / "sft")), out / "hub")

    kept = GPT(size)
    optimizer = common.adamw([kept], 0.1)
    kept(torch.ones(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    run = common.Run("x", config, cpu)
    run.log(step=1, loss=0.5, lr=0.1)
    run.log("validation", step=2, loss=0.3)
    run.save_state(1, 9, policy=kept, optimizer=optimizer, metrics=dict(loss=1.0))
    run.resuming = True
    run._stop_soon = cli.interrupt  # a study that nobody resumes stops at once

    prompts = [dict(prompt=p, held_out=p > "b") for p in "abcd"]
    pairs = out / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(p | dict(chosen="yes", rejected="no")) for p in prompts))
    tokens.CACHE = out / "cache"
    shutil.rmtree(tokens.CACHE, ignore_errors=True)
    cache = lambda: read_tokens(pairs, check_ranking, ranking_rows, small)
    cache()
    [flat] = tokens.CACHE.iterdir()
    others = shutil.copy(pairs, out / "others.jsonl")  # elements are mapped from the other cache
    others.write_text(others.read_text() + "\n")
    elements = load_rankings(str(others), small, 16).train
    logps = dpo.Config(reference_cache=str(out / "logps"))
    cached = lambda: dpo.reference_logprobs(policy, elements, small, logps, cpu)
    cached()

    answers = [p | dict(completions=["x", "y"]) for p in prompts]
    for name, rows in (("run/answers.jsonl", answers), ("run/rankings.jsonl.part", [
            dict(ranks=[1, 2])] * 3)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(out / "person", ignore_errors=True)
    person = lambda: Session(answers, out / "person")
    with contextlib.closing(person()) as session:
        for _ in range(3):
            session.rank(session.question()["id"], [1, 2])
        session.undo(session.id)
    report = dict(checkpoints=dict(a=dict(gold=1.0, kl=2.0, refusal=0.5, refusal_low=0.4)),
                  rows=dict(refusal=dict(label="refuses", unit="%", better=1)))
    (out / "report").mkdir(exist_ok=True)
    (out / "report/report.json").write_text(json.dumps(report))

    def policy_of(path):
        tokenizer = common.load_policy(path, ("sft", "convert"), cpu)[1]
        tokenizer.decode(tokenizer.encode_prompt("thé"))

    reward_of = lambda path: reward.load_reward_model(path, cpu, "min")
    hub = lambda _: weights.read_model(weights.Config(source=str(out / "hub")))
    found = {name: (out / name / "model.pt", reader) for name, reader in dict(
        sft=policy_of, convert=policy_of, reward=reward_of, ensemble=reward_of).items()}
    found |= {path.name: (path, hub) for path in (out / "hub").iterdir()}
    found |= dict(
        ranks=(out / "x.tiktoken",
               lambda path: _with_markers("gpt2", read_ranks(path)).encode("é")),
        state=(out / "run/state.pt",
               lambda _: run.load_state(policy=kept, optimizer=optimizer)),
        log=(out / "run/log.jsonl",
             lambda _: plot.main(plot.Config(text=True, folders=(str(out / "run"),)))),
        report=(out / "report/report.json", lambda _: plot.read_report(out / "report")),
        answers=(out / "run/answers.jsonl", lambda path: label.drawn_before(path, 2, prompts)),
        ranked=(out / "run/rankings.jsonl.part", lambda _: label.rank_all(
            run, label.Config(labeler="model"), lambda part: [dict(ranks=[2, 1])] * len(part),
            [*enumerate(answers)])),
        choices=(out / "person/choices.jsonl", lambda _: person().close()),
        cache=(flat, lambda _: cache()),
        logps=(next((out / "logps").iterdir()), lambda _: cached()))
    return found


def main(config):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path, found, broken = out / "input", {}, 0
    right = []  # the readers that each row is meant for
    for row in ROWS:
        path.write_text(json.dumps(row))
        right.append([name for name in READERS if reads(READERS[name], path)])
    with contextlib.redirect_stdout(io.StringIO()):
        own = own_files(out)
    whole = {name: place.read_bytes() for name, (place, _) in own.items()}
    for place, reader in own.values():
        if not reads(reader, place):
            raise UserError(f"{place} is not read as it is")
    for i in progress(range(config.n), "inputs"):
        rng = random.Random(f"{config.seed} {i}")
        if rng.random() < 0.6:
            row, kind = rng.randrange(len(ROWS)), "data files"
            name = rng.choice(right[row] if rng.random() < 0.8 else list(READERS))
            place, reader = path, READERS[name]
            place.write_bytes(make(rng, ROWS[row], name in TABLES and rng.random() < 0.8))
        else:
            kind = name = rng.choice(list(own))
            place, reader = own[name]
            change_file(rng, place, whole[name])
        counts = found.setdefault(kind, Counter())
        try:
            counts[reads(reader, place)] += 1
        except BaseException as error:  # a Rust library stops with one of its own
            if isinstance(error, KeyboardInterrupt):
                raise
            broken += 1
            shutil.copy(place, out / f"{name}-{i}")
            print(f"{name} on {out}/{name}-{i}: {type(error).__name__}: {error}"[:200])
        if place != path:
            place.write_bytes(whole[name])
    print(cli.table({"read": [c[True] for c in found.values()],
                     "refused in one line": [c[False] for c in found.values()],
                     "": list(found)}))
    print(f"{config.n:,} inputs: {sum(c[True] for c in found.values()):,} read, "
          f"{sum(c[False] for c in found.values()):,} refused in one line, {broken} broke a reader")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
