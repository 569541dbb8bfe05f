"""What the studies share: stages as commands, and finished runs that are used again."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

import cli
from cli import UserError
from common import ROOT, first_row, last_row
from data.files import file_hash, parse_json

sys.path.append(str(ROOT / "tests"))
from mutants import MUTANTS, applied

BUGS = {bug.name: bug for bug in MUTANTS}

# t of 95% for 1, 2, ... degrees of freedom (any table of Student's distribution)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def command(stage, words, one_thread=False, scripts=ROOT):
    """Run a stage with these flags, as they are typed. UserError with its last words if it fails.

    scripts: the folder of a copy of the scripts, where they are not to be ours.
    """
    threads = dict(os.environ, OMP_NUM_THREADS="1") if one_thread else None
    done = subprocess.run([sys.executable, str(scripts / f"{stage}.py"), *words], env=threads,
                          capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{stage}.py {' '.join(words)} failed: {done.stderr[-500:]}")


def final(folder):
    """The last row of a finished run's log, else None."""
    last = last_row(folder)
    return last if last.get("kind") == "final" else None


def inputs(flags):
    """{path: hash} of the checkpoints and files that these flags name."""
    names = ("init", "reference", "reward_model", "policy", "data", "answers")
    paths = [flags[name] for name in names if flags.get(name, "synthetic") != "synthetic"]
    paths += filter(None, flags.get("policies", "").split(","))
    return {path: torch.load(Path(path) / "model.pt", weights_only=True, mmap=True)["hash"]
            if Path(path).is_dir() else file_hash(path)[:16] for path in paths}


def run(stage, folder, config, flags, parents, scripts=ROOT, **more):
    """The last row of the log of a run, which is made now unless the folder holds it already.

    flags: {name: value}, None for "auto"; parents: {what it is called: hash} of its inputs. config:
    the study's, with workers and device. more: flags that may be others in a run that is there.
    scripts: as `command` takes them. UserError if the stage fails, or if the folder holds a run
    with other flags or inputs.
    """
    folder = Path(folder)
    if final(folder) is None:
        words = [f"--{name}={cli.as_text(value)}" for name, value in (
            dict(device=config.device) | flags | more | dict(out=str(folder))).items()]
        command(stage, words, config.workers > 1, scripts)
    first = first_row(folder)
    for name, value in flags.items():
        made = first["config"].get(name)
        if value is not None and not same(made, value):
            raise UserError(f"{folder} holds a run with --{name}={made}, wanted: {value}. Delete "
                            "it, or choose another --out")
    for name, content in parents.items():
        if content not in first["parents"].values():
            raise UserError(f"{folder} was made from another {name} than there is now. Delete it, "
                            "or choose another --out")
    print(f"{folder}: done", flush=True)
    return final(folder)


def same(made, wanted):
    """Whether a flag's value is what was asked for: 1e-3 is 0.001."""
    try:
        return float(made) == float(wanted)
    except (TypeError, ValueError):
        return str(cli.as_text(made)) == str(cli.as_text(wanted))


# --- whole pipelines -----------------------------------------------------------------------------


def stage_flags(text):
    """{stage: {name: value}} of "ppo.iterations=2,sft.epochs=1". UserError if it is not that."""
    flags = {}
    for word in filter(None, text.split(",")):
        name, equals, value = word.partition("=")
        stage, dot, name = name.partition(".")
        if not (equals and dot):
            raise UserError(f"{word}: expected stage.name=value, with commas between")
        flags.setdefault(stage, {})[name] = value
    return flags


def starts_from(stage, base):
    """The flags that name what a stage starts from, in a folder of finished stages."""
    sft, rankings = f"{base}/sft", f"{base}/label/rankings.jsonl"
    return dict(pretrain={}, sft=dict(init=f"{base}/pretrain"), label=dict(init=sft),
                reward=dict(init=sft, data=rankings), dpo=dict(init=sft, data=rankings),
                ppo=dict(init=sft, reward_model=f"{base}/reward"))[stage]


def pipeline(config, seed):
    """The folder, made now where it is not there, of base model, SFT model, rankings and reward
    model of a seed. config: with runs, a folder that has {seed} in it, and flags, as stage_flags
    takes them."""
    base, more = Path(config.runs.format(seed=seed)), stage_flags(config.flags)
    for stage in ("pretrain", "sft", "label", "reward"):
        flags = starts_from(stage, base) | more.get(stage, {}) | dict(seed=seed)
        run(stage, base / stage, config, flags, inputs(flags))
    return base


def log_rows(folder, kind):
    """The rows of this kind in the log of a finished run."""
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(parse_json, lines) if row["kind"] == kind]


def as_typed(script, config):
    """The command that makes a study's page: with the flags that are not at their defaults, those
    left out that change no figure."""
    said = [f"--{f.name}={cli.as_text(getattr(config, f.name))}" for f in fields(config)
            if getattr(config, f.name) != f.default and f.name not in (
                "runs", "out", "pages", "workers", "device")]
    return " ".join([f"python studies/{script}.py", *said])


# --- a copy of the scripts -----------------------------------------------------------------------


def copy_scripts(folder):
    """The path of a fresh copy of the scripts, without tests, documents and results."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        "out", ".*", "tests", "docs", "__pycache__"))
    return Path(folder)


def with_bug(name, folder):
    """The absolute path of a copy of the scripts, folder/scripts, with a known bug of
    tests/mutants.py in it. UserError where the folder holds runs of another version of the bug."""
    bug, note = BUGS[name], Path(folder) / "bug.txt"
    note.parent.mkdir(parents=True, exist_ok=True)
    text = f"{bug.file}\n--- {bug.old}\n+++ {bug.new}\n"
    if note.exists() and note.read_text() != text:
        raise UserError(f"{folder} holds runs of another version of {name}: delete it")
    scripts = copy_scripts(Path(folder, "scripts").resolve())
    path = scripts / bug.file
    path.write_text(applied(bug, path.read_text()))
    note.write_text(text)
    return scripts


# --- figures over seeds --------------------------------------------------------------------------


def curve(folder, kind, field):
    """(x, y) of a field in the rows of a kind of a log, where it is there: x the step or epoch."""
    rows = [row for row in log_rows(folder, kind) if row.get(field) is not None]
    return ([row.get("step", row.get("epoch")) for row in rows], [row[field] for row in rows])


def verdict(gaps):
    """What differences over seeds say, as a word: is 0 in their interval?"""
    mean, half = interval(gaps)
    if not half == half:
        return "one seed"
    return "no difference" if abs(mean) <= half else "costs" if mean < 0 else "gains"


def interval(values):
    """(mean, half of its 95% interval) of a figure over seeds, by Student's t; nan of one seed."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    t = STUDENT[min(len(x) - 1, len(STUDENT)) - 1]
    return float(x.mean()), float(t * x.std(ddof=1) / len(x) ** 0.5)


def with_interval(values, form="+.2f"):
    """"mean ± half of the interval" as text; the mean alone of one seed, "-" without a value."""
    if any(v is None for v in values) or not len(values):
        return "-"
    mean, half = interval(values)
    return format(mean, form) + (f" ± {format(half, form.strip('+'))}" if half == half else "")


def new_figure(width, height):
    """An empty figure of matplotlib, in inches. UserError where that is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")
