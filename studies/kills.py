"""What is lost when a run is killed at a random moment: nothing, if all is as it should be.

Each stage runs once undisturbed. Then the same command is started again and again and killed (by
SIGKILL, every third time by SIGTERM or Ctrl-C), until it ends by itself, as in

    until python ppo.py; do :; done

At its end the weights must be those of the undisturbed run by their hash, a file of rankings or
answers the same to the byte, and the log must have the same rows, but for what is measured in time.

    python studies/kills.py                            # every stage, tiny
    python studies/kills.py --stages=chain             # python ppo.py from nothing, tiny as well

A chain runs each stage with its defaults: that of a copy of the scripts, with tiny ones.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive, UserError

# enough steps for a kill in each phase; states are saved in between
TINY = dict(
    pretrain=["--steps=150", "--n_layer=1", "--n_embd=64", "--n_head=2", "--documents=500",
              "--block_size=128", "--batch_size=8", "--eval_every=40"],
    sft=["--demos=1500", "--epochs=2", "--batch_size=16", "--samples=64", "--save_every=40"],
    label=["--prompts=300", "--held_out=40", "--k=3", "--oversample=1", "--chunk=32"],
    reward=["--batch_size=4", "--samples=64", "--save_every=15", "--ensemble=2"],
    dpo=["--batch_size=4", "--eval_prompts=32", "--save_every=15"],
    ppo=["--iterations=8", "--batch_size=16", "--eval_prompts=32", "--best_of=2", "--save_every=3"],
    grpo=["--iterations=8", "--batch_size=16", "--k=4", "--eval_prompts=32", "--save_every=3"],
    evaluate=["--policy=out/ppo", "--eval_prompts=64"])
CHAIN = ("pretrain", "sft", "label", "reward", "ppo")  # python ppo.py runs what is not there
RESULTS = dict(label="rankings.jsonl", evaluate="answers.jsonl")  # others: model.pt
TIMED = ("seconds", "tok_per_s", "answers_per_s", "pairs_per_s", "clock")


@dataclass
class Config:
    stages: str = ",".join(TINY)  # with commas between; "chain": python ppo.py with all before it
    kills: Positive[int] = 10  # of each, at least; of ppo and sft three times as many
    seed: int = 1  # of the moments
    out: str = "out/kills"  # a folder for every run


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import torch

from common import ROOT
from studies.runs import copy_scripts


def with_tiny_defaults(folder):
    """The path of a copy of the scripts, in which the flags of TINY are the defaults."""
    copy_scripts(folder)
    for stage in CHAIN:
        path = folder / f"{stage}.py"
        text = path.read_text()
        for flag in TINY[stage]:
            name, value = flag[2:].split("=")
            text, n = re.subn(rf"(?m)^(    {name}: .*? = )\S+", rf"\g<1>{value}", text)
            assert n == 1, (stage, name, n)
        path.write_text(text)
    return folder


def start(stage, flags, cwd, scripts=ROOT):
    return subprocess.Popen([sys.executable, str(scripts / f"{stage}.py"), *flags], cwd=cwd,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def undisturbed(stage, flags, cwd, scripts=ROOT):
    """Run it to its end; the seconds that it took."""
    begin, process = time.time(), start(stage, flags, cwd, scripts)
    error = process.communicate()[1].decode()
    if process.returncode:
        raise UserError(f"{stage}.py {' '.join(flags)} failed: {error[-500:]}")
    return time.time() - begin


def under_kills(stage, flags, cwd, seconds, rng, scripts=ROOT):
    """The same command until it ends by itself; how often it was killed."""
    kills = 0
    while True:
        process = start(stage, flags, cwd, scripts)
        try:
            error = process.communicate(timeout=rng.uniform(0, seconds))[1].decode()
        except subprocess.TimeoutExpired:
            number = signal.SIGKILL if rng.random() < 2 / 3 else rng.choice(
                [signal.SIGTERM, signal.SIGINT])
            process.send_signal(number)
            error = process.communicate()[1].decode()
            kills += 1
        if process.returncode == 0:
            return kills
        # a signal may come before Python has a handler: then it is that of the system
        stops = (signal.SIGTERM, signal.SIGINT)
        if process.returncode not in (-signal.SIGKILL, *(x for s in stops for x in (-s, 128 + s))):
            raise UserError(f"{stage}.py ended with {process.returncode}: {error[-500:]}")


def rows(folder):
    """The log without its first row and without times; "seconds" of a resumed run are others."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMED)}
            for line in lines[1:]]


def same(stage, one, other):
    """(are the results the same, are the rows of the logs)."""
    name = RESULTS.get(stage, "model.pt")
    if name == "model.pt":
        results = [torch.load(f / name, weights_only=True)["hash"] for f in (one, other)]
    else:
        results = [(f / name).read_bytes() for f in (one, other)]
    return results[0] == results[1], rows(one) == rows(other)


def main(config):
    stages = config.stages.split(",")
    if set(stages) - {*TINY, "chain"}:
        raise UserError(f"--stages={config.stages}: choose among {', '.join((*TINY, 'chain'))}")
    rng, cwd, found = random.Random(config.seed), Path(config.out).resolve(), {}
    cwd.mkdir(parents=True, exist_ok=True)
    if set(stages) - {"chain"}:
        for stage, flags in TINY.items():  # what the stages start from
            undisturbed(stage, flags, cwd)
    for stage in stages:
        chain = stage == "chain"
        wanted = config.kills * (3 if stage in ("ppo", "sft") else 1)
        last, kills, runs, good = "ppo" if chain else stage, 0, 0, [0, 0]
        whole = cwd / "whole" if chain else cwd
        whole.mkdir(exist_ok=True)
        flags = [] if chain else [*TINY[stage], f"--out=whole-{stage}"]
        scripts = with_tiny_defaults(cwd / "scripts") if chain else ROOT
        seconds = undisturbed(last, flags, whole, scripts)
        while kills < wanted:
            parts = cwd / f"parts-{stage}-{runs}"
            if chain:
                parts.mkdir()
            flags = [] if chain else [*TINY[stage], f"--out={parts.name}"]
            kills += under_kills(last, flags, parts if chain else cwd, seconds, rng, scripts)
            runs += 1
            pairs = [(s, whole / "out" / s, parts / "out" / s) for s in CHAIN
                     ] if chain else [(stage, cwd / f"whole-{stage}", parts)]
            each = [same(*pair) for pair in pairs]
            good = [n + all(ok) for n, ok in zip(good, zip(*each))]
        found[stage] = kills, runs, *good
        print(f"{stage}: {kills} kills in {runs} runs; {good[0]} with the same result, "
              f"{good[1]} with the same log", flush=True)
    print("\n| stage | kills | runs | same result | same log |\n|---|---|---|---|---|")
    for stage, numbers in found.items():
        print(f"| {stage} | " + " | ".join(map(str, numbers)) + " |")
    if any(good < runs for _, runs, *both in found.values() for good in both):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
