"""A disk that is full, at every write of a run: nothing that was saved is lost.

    python tests/full_disk.py                   # all stages, minutes on one core
    python tests/full_disk.py sft label         # only these

For n = 0, 1, 2, ... a run of a stage gets n writes through, half of the next one, and no more. It
has to end with exit status 2 and one line that names the file, and leave no part of a file. Then
the same command goes on, with the disk as full as before: that may need no more room than it had.
Then with room enough: the result and the rows of the log have to be those of a run that was never
disturbed. Prints a line for each stage; exit status 1 if one of these did not hold.
"""

import contextlib
import errno
import io
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cli
import data.files
import data.load
import data.tokens
import dpo
import evaluate
import grpo
import label
import ppo
import pretrain
import reward
import sft
import torch
from tiny_runs import FLAGS, make_inputs

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo, grpo=grpo, pretrain=pretrain, label=label,
               evaluate=evaluate, report=evaluate)
RESULTS = dict(label="rankings.jsonl", evaluate="answers.jsonl", report="report.md")
STEPS = ["--save_every=1"]
MORE = dict(
    sft=STEPS, reward=STEPS, dpo=STEPS, ppo=["--iterations=2", *STEPS],
    grpo=["--iterations=2", *STEPS],
    pretrain=["--data=text.txt", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=32",
              "--steps=3", "--eval_every=1"],
    label=["--init=sft", "--data=pairs.jsonl", "--labeler=model", "--reward_model=reward",
           "--chunk=4", "--max_new_tokens=12"],
    evaluate=["--policy=sft", "--reference=sft", "--data=pairs.jsonl", "--max_new_tokens=12"],
    report=["--policies=sft", "--reference=sft", "--data=pairs.jsonl", "--max_new_tokens=12"])


class Disk:
    """Files of `open` and `TemporaryFile` on a disk that takes so many writes more."""

    def __init__(self, writes):
        self.left, self.tried = writes, 0

    def open(self, path, mode="r", encoding=None, errors=None, **options):
        if set(mode) <= set("rbt"):
            return open(path, mode, encoding=encoding, errors=errors, **options)
        return self.file(path, mode.replace("b", ""), None if "b" in mode else encoding or "utf-8",
                         errors, **options)

    def temporary(self, dir=None):
        number, path = tempfile.mkstemp(dir=dir)
        os.close(number)
        file = self.file(path, "w+")
        os.unlink(path)
        return file

    def file(self, path, mode, encoding=None, errors=None, **options):
        class File(io.FileIO):
            def write(raw, content):
                self.tried += 1
                if self.left > 0:
                    self.left -= 1
                    return super().write(content)
                if self.left == 0:  # the last bytes that there are
                    self.left = -1
                    super().write(bytes(content)[:len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(
            File(path, mode, **options))
        return io.TextIOWrapper(file, encoding, errors) if encoding else file


def run(stage, writes):
    """(exit status, what it said on standard error, how many writes it tried) of a stage in the
    current folder, whose disk takes so many writes."""
    disk, said = Disk(writes), io.StringIO()
    script = SCRIPTS[stage]
    flags = [*FLAGS.get(stage, ()), *MORE[stage], f"--out=out/{stage}"]
    places = [(data.files, "open", disk.open)] + [
        (module.tempfile, "TemporaryFile", disk.temporary) for module in (data.tokens, data.load)]
    before = [getattr(module, name, None) for module, name, _ in places]
    try:
        for module, name, value in places:
            setattr(module, name, value)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.run_main(script.main, cli.read_flags(script.Config, {
                flag.split("=")[0]: flag for flag in flags}.values()))  # the last of a name counts
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        for (module, name, _), value in reversed([*zip(places, before)]):
            setattr(module, name, value) if value else delattr(module, name)
    return status, said.getvalue(), disk.tried


def result(stage):
    """What must not depend on the faults: the weights, or the file made, and the log's rows."""
    folder = Path("out") / stage
    made = (folder / RESULTS[stage]).read_text() if stage in RESULTS else torch.load(
        folder / "model.pt", weights_only=True)["hash"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return made, [(r["kind"], r.get("step"), r.get("epoch")) for r in rows if r["kind"] != "note"]


def check(stage, writes, expected):
    """What did not hold of a run whose disk takes so many writes."""
    status, said, _ = run(stage, writes)
    wrong = [f"exit status {status}, {said!r}"] * (
        status != 2 or said.count("error: ") != 1 or "Traceback" in said
        or "cannot write" not in said.splitlines()[-1])
    state = Path("out") / stage / "state.pt"
    kept = state.exists() and state.read_bytes()
    status, said, _ = run(stage, 0)
    wrong += [f"on the full disk: exit status {status}, {said!r}"] * (
        status != 2 or "Traceback" in said)
    wrong += ["the last good state has changed"] * (
        bool(kept) and (not state.exists() or state.read_bytes() != kept))
    wrong += [f"left behind: {path}" for path in Path("out").rglob("*.tmp")]
    status, said, _ = run(stage, 10**9)
    wrong += [f"with room: exit status {status}, {said!r}"] * (status != 0)
    return wrong or ["another result"] * (result(stage) != expected)


def main(stages):
    failed = 0
    for stage in stages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            make_inputs(Path())
            status, said, writes = run(stage, 10**9)
            if status:
                sys.exit(said)
            expected, tried = result(stage), 0
            for n in range(writes):
                os.system("rm -rf out")
                wrong = check(stage, n, expected)
                tried, failed = tried + 1, failed + bool(wrong)
                for text in wrong:
                    print(f"{stage}, full after {n} writes: {text[:300]}", flush=True)
            print(f"{stage}: {tried} full disks", flush=True)
    print(f"{failed} of them lost something" if failed else "nothing was lost")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SCRIPTS))
