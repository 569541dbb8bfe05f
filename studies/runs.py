"""What the studies share: stages as commands, and finished runs that are used again."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import cli
from cli import UserError
from common import ROOT, first_row, last_row
from data.files import file_hash


def command(stage, words, one_thread=False):
    """Run a stage with these flags, as they are typed. UserError with its last words if it fails.
    """
    threads = dict(os.environ, OMP_NUM_THREADS="1") if one_thread else None
    done = subprocess.run([sys.executable, str(ROOT / f"{stage}.py"), *words], env=threads,
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
    paths = [flags[name] for name in names if name in flags]
    return {path: torch.load(Path(path) / "model.pt", weights_only=True, mmap=True)["hash"]
            if Path(path).is_dir() else file_hash(path)[:16] for path in paths}


def run(stage, folder, config, flags, parents, **more):
    """The last row of the log of a run, which is made now unless the folder holds it already.

    flags: {name: value}, None for "auto"; parents: {what it is called: hash} of its inputs. config:
    the study's, with workers and device. more: flags that may be others in a run that is there.
    UserError if the stage fails, or if the folder holds a run with other flags or inputs.
    """
    folder = Path(folder)
    if final(folder) is None:
        words = [f"--{name}={cli.as_text(value)}" for name, value in (
            dict(device=config.device) | flags | more | dict(out=str(folder))).items()]
        command(stage, words, config.workers > 1)
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
