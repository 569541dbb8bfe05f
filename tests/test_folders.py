"""A run folder belongs to one process at a time, and the same command always works: locks, signals,
kills, what may change when a run goes on, and chains of stages."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import common
import dpo
from cli import UserError
from conftest import run_process, run_script
from data.files import file_hash

CPU = torch.device("cpu")
PRETRAIN = ["--steps=40", "--documents=200", "--block_size=64", "--batch_size=4", "--n_layer=1",
            "--n_head=1", "--n_embd=16"]


@dataclasses.dataclass
class Config(cli.Config):
    data: str = "synthetic"
    init: str = "sft"
    lr: float = 1.0
    micro_batch: int = 0
    log_every: int = 10
    save_every: int = 4


def start(folder, **settings):
    return common.Run("x", Config(out=str(folder), **settings), CPU, dict(sft="abc"))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def launch(code, cwd):
    """A process that runs `code` as a script in cwd, which says when it is ready; forked, so that
    it need not import torch. What it prints is in cwd/printed and cwd/errors."""
    def run():
        os.chdir(cwd)
        sys.stdout, sys.stderr = open("printed", "w"), open("errors", "w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        exec(textwrap.dedent(code), dict(__name__="script", ready=lambda: Path("ready").touch()))

    (cwd / "ready").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    wait_for((cwd / "ready").exists)
    return process


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


HOLD = """
    import cli, time
    def main(config):
        ready()
        time.sleep(60)
    cli.run_main(main, cli.Config(), "run")
"""


# --- locks ---------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path):
    # catches two runs in one folder, a lock that outlives its process, one that is never given back
    first = launch(HOLD, tmp_path)
    try:
        with pytest.raises(UserError, match=f"in use by process {first.pid} since .*: wait for it"):
            with cli.locked(tmp_path / "run"):
                pass
        with cli.locked(tmp_path / "other"):
            pass
    finally:
        first.kill()
        first.join()
    assert (tmp_path / "run" / "lock").exists()  # of a dead process: it locks nothing
    with cli.locked(tmp_path / "run"):
        (tmp_path / "run" / "log.jsonl").write_text("")
    assert not (tmp_path / "other").exists()  # nothing was written to it
    assert os.listdir(tmp_path / "run") == ["log.jsonl"]


def test_a_lock_file_that_was_deleted_locks_nothing(tmp_path, monkeypatch):
    # catches two holders: one of the file that is there, one of the file that was
    flock, deleted = cli.fcntl.flock, []

    def too_late(file, how):
        flock(file, how)
        if not deleted:
            deleted.append(file)
            (tmp_path / "lock").unlink()  # by the process that held it

    monkeypatch.setattr(cli.fcntl, "flock", too_late)
    with cli.locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(str(os.getpid()))
        with pytest.raises(UserError, match="in use by process"):
            with cli.locked(tmp_path):
                pass


def test_every_stage_locks_its_folder(tmp_path):
    # catches a script that ends with run_main(main, CONFIG) alone
    for script in ("pretrain", "sft", "label", "reward", "ppo", "dpo", "grpo", "evaluate"):
        with cli.locked(tmp_path):
            done = run_script(f"{script}.py", f"--out={tmp_path}", *["--init=nothing"] * (
                script not in ("pretrain", "evaluate")), cwd=tmp_path)
        assert done.returncode == 2 and "is in use by process" in done.stderr, script


# --- what a folder holds -------------------------------------------------------------------------


@pytest.mark.parametrize("log", [
    "", "5\n", "[1]\n", '{"kind": "con', "hello\n", '{"kind": "step"}\n', "[" * 100_000 + "\n",
    '{"stage": "x", "config": 3, "parents": {}}\n', "\x00\x00", '{"stage": "x", "config": {}}\n'])
def test_a_log_that_is_no_runs_is_left_alone(tmp_path, log):
    # catches tracebacks, and rows appended to what somebody else wrote
    (tmp_path / "log.jsonl").write_text(log)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="log.jsonl is not the log of a run: choose another"):
            start(tmp_path, overwrite=overwrite)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_results_without_a_log_are_left_alone(tmp_path):
    # catches a checkpoint of convert.py, or of a run whose log is lost, that a start deletes
    for name in ("model.pt", "state.pt", "answers.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is there without the log of a run that made"):
            start(tmp_path, overwrite=True)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_finished_is_a_final_row_a_result_and_no_state(tmp_path, capsys):
    # catches a run that counts as finished between model.pt and its last row, or an evaluation that
    # was interrupted
    run = start(tmp_path)
    run.load_state()
    run.save_state(3, 3)
    (tmp_path / "model.pt").write_text("result")
    assert not common.finished(tmp_path) and start(tmp_path).resuming
    run._write(dict(kind="final", loss=1.0))  # and the state is still there
    assert not common.finished(tmp_path)
    again = start(tmp_path)
    assert again.load_state()["step"] == 3 and len(rows(tmp_path / "log.jsonl")) == 1
    again.finish(dict(loss=1.0))
    assert common.finished(tmp_path) and not common.finished(tmp_path, "card.json")
    with pytest.raises(SystemExit):
        start(tmp_path)
    assert "holds this run, finished" in capsys.readouterr().out
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:-9])  # the last row in part, the state lost
    assert not start(tmp_path).resuming  # starts again
    assert [r["kind"] for r in rows(tmp_path / "log.jsonl")] == ["config"]
    assert not (tmp_path / "model.pt").exists()


def test_a_start_that_is_cut_leaves_no_result_of_another_run(tmp_path, monkeypatch):
    # catches a stale model.pt below the log of a new run, and a state that goes on with it
    run = start(tmp_path)
    run.save_state(0, 3)
    (tmp_path / "model.pt").write_text("old")
    log = (tmp_path / "log.jsonl").read_bytes()
    monkeypatch.setattr(common.os, "replace", lambda *_: 1 / 0)  # killed before the log is there
    with pytest.raises(ZeroDivisionError):
        start(tmp_path, overwrite=True, lr=2.0)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert not (tmp_path / "model.pt").exists() and not (tmp_path / "state.pt").exists()


def test_a_note_at_the_end_does_not_unmake_it(tmp_path):
    # catches a finished report that is made again, with other flags too: its last row was a note
    run = start(tmp_path)
    (tmp_path / "model.pt").write_text("result")
    cli.note("no picture: matplotlib is missing")
    run.finish({})
    assert [r["kind"] for r in rows(tmp_path / "log.jsonl")] == ["config", "note", "final"]
    assert common.finished(tmp_path)


def test_epochs_of_another_run_are_left_alone(tmp_path):
    # catches checkpoints that go with a start: without a log, or with that of other flags
    (tmp_path / "model-epoch7.pt").write_text("mine")
    with pytest.raises(UserError, match="model-epoch7.pt is there without the log"):
        start(tmp_path)
    (tmp_path / "model-epoch7.pt").unlink()
    start(tmp_path).finish({})
    (tmp_path / "model-epoch7.pt").write_text("its last epoch; model.pt was moved away")
    with pytest.raises(UserError, match="a finished run with --lr=1.0, not as here"):
        start(tmp_path, lr=2.0)
    assert (tmp_path / "model-epoch7.pt").exists()


def test_a_folder_that_was_removed_stops_its_run(tmp_path):
    # catches a run that writes into the folder of another one, and gives up the lock of that one
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="run was removed while this run went on"):
        with cli.locked(folder):
            run = start(folder)
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "lock").write_text("of another process")
            with pytest.raises(UserError, match="was removed"):
                run.save_state(1, 2)
            run.log(step=1)
    assert (folder / "lock").read_text() == "of another process" and not cli.HELD
    assert os.listdir(folder) == ["lock"]


def test_a_link_stays(tmp_path):
    # catches a folder of the user's, empty so far, that goes when a command is refused
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to("disk")
    for name in ("disk", "linked"):
        with cli.locked(tmp_path / name):
            pass
        assert (tmp_path / name).is_dir() and not os.listdir(tmp_path / name)


def test_a_finished_run_without_its_parent_says_so(tmp_path, monkeypatch):
    # catches a chain that trains the parent again before it says that nothing is to be done
    from sft import Config as Sft
    monkeypatch.chdir(tmp_path)
    common.Run("sft", Config(out="out/sft"), CPU).finish({})
    monkeypatch.setattr(common.subprocess, "Popen", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="finished run, but --init=out/pretrain is not there any"):
        common.ensure_input(Sft(), "init", "pretrain")


def test_the_command_that_goes_on(monkeypatch):
    # catches one that starts again, in any spelling, and one that finds no script
    monkeypatch.setattr(sys, "argv", ["../ppo.py", "--lr=1", "--overwrite=True", "--resume=FALSE"])
    assert cli.command_line() == "python ../ppo.py --lr=1"


# --- going on ------------------------------------------------------------------------------------


def test_what_may_change_where_a_run_goes_on(tmp_path, capsys):
    # catches a run that is out of memory and cannot be rescued, one that cannot move, and one that
    # goes on with other numbers
    data, moved = tmp_path / "data.jsonl", tmp_path / "moved.jsonl"
    for path in (data, moved):
        path.write_text("one")
    run = start(tmp_path / "run", data=str(data))
    run.save_state(2, 5)
    free = dict(log_every=1, save_every=7, save_minutes=9, device="cpu", init="elsewhere/sft")
    assert start(tmp_path / "run", data=str(moved), **free).resuming
    assert "warning" not in capsys.readouterr().err
    assert start(tmp_path / "run", data=str(data), micro_batch=2).resuming
    assert "started with micro_batch 0, here is 2: it goes on, but not to the last digit" in \
        capsys.readouterr().err
    for other, why in ((dict(data=str(data), lr=2.0), "an interrupted run with --lr=1.0, not as"),
                       (dict(data=str(data), seed=2), "--seed=1, not as here"),
                       (dict(data="synthetic"), f"--data={data}, not as here")):
        with pytest.raises(UserError, match=why):
            start(tmp_path / "run", **other)
    moved.write_text("two")
    with pytest.raises(UserError, match=f"made from .* are now .*{file_hash(moved)[:16]}"):
        start(tmp_path / "run", data=str(moved))
    assert (tmp_path / "run" / "state.pt").exists()


def test_states_are_saved_by_time(tmp_path, monkeypatch):
    # catches a run of 91 steps that saves every 100 and keeps nothing
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    run = start(tmp_path, save_minutes=2)
    saved = []
    for step in range(20):
        if run.due(step, 8):
            run.save_state(step, 20)
            saved.append(step)
        now[0] += 31
    assert saved == [0, 4, 8, 12, 16]
    again = start(tmp_path, save_minutes=2)
    again.load_state()
    assert not again.due(16, 8)  # it is on disk: on a full one it goes on with what is there
    now[0] += 121
    assert again.due(17, 8) and not again.due(16, 8)


def test_a_state_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    # catches a resume that needs more room than there was
    start(tmp_path).save_state(3, 3)
    run = start(tmp_path)
    run.load_state()
    monkeypatch.setattr(common, "save_file", lambda *_: 1 / 0)
    run.save_state(3, 3)
    with pytest.raises(ZeroDivisionError):
        run.save_state(2, 3)


# --- signals -------------------------------------------------------------------------------------

LOOP = """
    import cli, common, sys, time, torch
    def main(config):
        run = common.Run("x", config, torch.device("cpu"))
        first = run.load_state().get("step", 0)
        for step in range(first, 200):
            if run.due(step, 1000):
                run.save_state(step, 200)
            if step == first + 3:
                ready()
            time.sleep(0.05)
            run.log(step=step)
        run.save_state(200, 200)
        run.finish({})
    sys.argv = ["x.py", "--lr=1 2", "--overwrite=true"]
    cli.run_main(main, cli.Config(out="run"), "run")
"""


def test_a_signal_saves_before_it_stops(tmp_path):
    # catches work that is lost by Ctrl-C, and a resumed log with rows twice or none
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = launch(LOOP, tmp_path)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 128 + number
        err = (tmp_path / "errors").read_text()
        assert "saves after this step and stops" in err and "Traceback" not in err
        assert "the same command goes on:\n    python x.py '--lr=1 2'\n" in err
        step = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
        logged = [r["step"] for r in rows(tmp_path / "run" / "log.jsonl")[1:]]
        assert logged == list(range(step)) and reached + 4 <= step < 200
        assert not (tmp_path / "run" / "lock").exists()
        reached = step
    process = launch(LOOP, tmp_path)
    process.kill()
    process.join()
    common.Run("x", cli.Config(out=str(tmp_path / "run")), CPU).load_state()
    assert [r["step"] for r in rows(tmp_path / "run" / "log.jsonl")[1:]] == logged


def test_a_second_signal_stops_at_once(tmp_path):
    # catches a run that cannot be stopped while a step takes long
    process = launch(LOOP.replace("sleep(0.05)", "sleep(0.05 if step < first + 3 else 60)"),
                     tmp_path)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(20)
    assert process.exitcode == 130


def test_what_follows_the_loop_stops_at_once(tmp_path):
    # catches an evaluation of minutes that waits for a step which never ends
    handler = signal.getsignal(signal.SIGTERM)
    run = start(tmp_path)
    run.load_state()
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.stop == signal.SIGTERM and run.due(1, 1000)
    with pytest.raises(cli.Interrupted):
        run.save_state(1, 2)
    run = start(tmp_path)
    run.load_state()
    run.save_state(2, 2)
    with pytest.raises(cli.Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="a child hears of its parent's death on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_stage_before_ends_with_its_parent(tmp_path, number):
    # catches a stage that goes on alone in a folder in which the next command starts it again
    code = """
        import cli, common, sft
        common.ROOT = common.Path("scripts")
        def main(config):
            ready()
            common.ensure_input(config, "init", "pretrain")
        cli.run_main(main, sft.Config(), "out/sft")
    """
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pretrain.py").write_text(textwrap.dedent(f"""
        import os, sys, time
        sys.path.insert(0, {str(common.ROOT)!r})
        import cli
        def main(config):
            open("child", "w").write(str(os.getpid()))
            time.sleep(60)
        cli.run_main(main, cli.Config(), "out/pretrain")
    """))
    process, child = launch(code, tmp_path), tmp_path / "child"
    wait_for(lambda: child.exists() and child.read_text())
    os.kill(process.pid, number)
    process.join(30)
    gone = Path("/proc") / child.read_text()
    wait_for(lambda: not gone.exists() or "zombie" in (gone / "status").read_text(), 15)
    with cli.locked(tmp_path / "out" / "pretrain"):  # it is free again
        pass


def test_the_chain_goes_on_with_an_interrupted_stage(tmp_path, monkeypatch):
    # catches a stage before that is left half done, or taken for done at model.pt; and its command
    from sft import Config as Sft
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.subprocess, "Popen", lambda command, **_: commands.append(command)
                        or SimpleNamespace(wait=lambda: 0))
    for folder in ("out/pretrain", "mine"):
        run = common.Run("pretrain", Config(out=folder), CPU)
        run.save_state(1, 2)
        (run.folder / "model.pt").write_text("not the last word")
    common.ensure_input(Sft(), "init", "pretrain")
    assert len(commands) == 1
    with pytest.raises(UserError, match="mine holds a run that is not finished: this goes on"):
        common.ensure_input(Sft(init="mine"), "init", "pretrain")
    run.finish({})
    common.ensure_input(Sft(init="mine"), "init", "pretrain")
    assert len(commands) == 1


# --- the real scripts ----------------------------------------------------------------------------


def test_the_same_command_under_kills(tmp_path):
    # catches whatever a SIGKILL at a random moment can lose: the short form of studies/kills.py
    whole = run_process("pretrain.py", *PRETRAIN, "--out=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(common.ROOT / "pretrain.py"), *PRETRAIN, "--out=parts",
               "--save_minutes=0"]  # a state at each step
    log = tmp_path / "parts" / "log.jsonl"
    for killed in (True, False):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        if killed:
            wait_for(lambda: log.exists() and '"step": 10' in log.read_text(), 150)
            process.kill()
        error = process.communicate()[1]
        assert process.returncode == (-signal.SIGKILL if killed else 0), error
    one, other = (torch.load(tmp_path / name / "model.pt", weights_only=True)["hash"]
                  for name in ("whole", "parts"))
    assert one == other
    timed = lambda r: {k: v for k, v in r.items() if k not in ("tok_per_s", "seconds")}
    assert [timed(r) for r in rows(log)[1:]] == \
        [timed(r) for r in rows(tmp_path / "whole" / "log.jsonl")[1:]]


def test_the_reference_pass_goes_on(tmp_path, monkeypatch):
    # catches hours of a reference pass that are computed again, and answers in another order
    from data.tokens import Flat
    import numpy as np
    n = 2500
    flat = lambda values: Flat(np.array(values), np.arange(n), np.arange(n) + 1)
    monkeypatch.setattr(dpo, "all_rows", lambda _: (flat(range(n)), flat([1] * n)))
    monkeypatch.setattr(dpo, "set_reference", lambda _, logps: found.append(logps))
    calls, found = [], []

    def count(model, rows, masks, pad):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.tensor([rows[i][0] for i in range(len(rows))], dtype=torch.float64)

    monkeypatch.setattr(dpo, "sequence_logprobs", count)
    config = dpo.Config(reference_cache=str(tmp_path), save_minutes=60)
    tokenizer = SimpleNamespace(hash="x", pad=0)
    pass_over = lambda: dpo.reference_logprobs(torch.nn.Linear(1, 1), [], tokenizer, config, CPU)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        pass_over()
    torch.manual_seed(0)
    pass_over()
    torch.manual_seed(0)
    pass_over()
    assert calls == [1024, 1024, 1024, 452]
    assert all(f.tolist() == list(range(n)) for f in found) and len(found) == 2
