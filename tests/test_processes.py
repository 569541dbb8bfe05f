"""Several processes compute what one does: the real stages, tiny, in 1, 2 and 3 processes on gloo.

In float64, where the order of a sum changes no digit that is compared. The last batches are uneven,
rankings have 2 to 4 answers, and in some steps a process has no row at all.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import cli
import common
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from data import tokens
from data.records import check_demonstration, demonstration_rows, write_jsonl
from data.tokenizer import load_tokenizer
from tiny_runs import make_inputs

MODULES = {stage: __import__(stage) for stage in
           ("pretrain", "sft", "label", "reward", "dpo", "ppo", "grpo", "evaluate")}
# forked from one that has torch: half of the time of a process would be to import it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "test_processes"])
SHORT = ["--max_new_tokens=9", "--eval_prompts=5"]
PPO = ["--data=pairs.jsonl", "--init=sft", "--iterations=2", "--batch_size=8", *SHORT,
       "--minibatches=4", "--lr=0.01", "--warmup=1", "--log_every=1", "--ptx_coef=0.5",
       "--ptx_batch=5", "--ptx_data=text.txt"]
RUNS = dict(
    pretrain=["--data=text.txt", "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=24",
              "--steps=5", "--batch_size=5", "--micro_batch=2", "--eval_every=2",
              "--dialect=llama"],
    sft=["--data=demos.jsonl", "--init=sft", "--epochs=1", "--batch_size=7", "--micro_batch=2",
         "--samples=5", "--max_new_tokens=8", "--pretrain_data=text.txt", "--lr=0.01"],
    reward=["--data=pairs.jsonl", "--init=other", "--batch_size=2", "--lr=0.01", "--samples=7",
            "--max_new_tokens=9", "--ensemble=2", "--weight_decay=0.5", "--probe=1",
            "--micro_batch=4"],
    dpo=["--data=pairs.jsonl", "--init=sft", "--batch_size=3", "--lr=0.01", "--nll=0.3", *SHORT,
         "--micro_batch=4"],
    kto=["--data=pairs.jsonl", "--init=sft", "--batch_size=3", "--lr=0.01", "--loss=kto", *SHORT],
    ppo=[*PPO, "--reward_model=reward", "--critic_lr=0.02", "--score_scaling=true",
         "--kl_target=1", "--entropy_coef=0.1", "--micro_batch=1"],
    grpo=[*PPO, "--k=4", "--reward=model", "--reward_model=reward", "--method=dapo",
          "--beta=0.1", "--epochs=2"],
    label=["--data=pairs.jsonl", "--init=sft,other", "--labeler=model", "--reward_model=reward",
           "--prompts=9", "--held_out=3", "--k=3", "--chunk=5", "--max_new_tokens=9"],
    evaluate=["--policy=other", "--reference=sft", "--reward_model=reward", "--data=pairs.jsonl",
              *SHORT],
    report=["--policies=other", "--reference=sft", "--reward_model=reward", "--data=pairs.jsonl",
            "--best_of=2", "--samples=3", *SHORT])
STAGE = dict(kto="dpo", report="evaluate")  # of runs that are called otherwise


def work(rank, count, port, folder, said, runs, strike=None, dtype=torch.float64):
    """The runs {name: flags} in process `rank` of `count`, one after the other, as by command line.
    strike (process, step, signal): that process sends itself the signal in that optimiser step."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                       LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    os.chdir(folder)
    out, err = (open(f"{said}/{name}{rank}", "w", buffering=1) for name in ("out", "err"))
    sys.stderr, torch.cuda.is_available, steps = err, lambda: False, itertools.count()

    def struck(*modules, real=common.sum_gradients):
        if strike and strike[0] == rank and strike[1] == next(steps):
            os.kill(os.getpid(), strike[2])
        real(*modules)

    common.sum_gradients = struck
    try:
        for name, flags in runs.items():
            stage, sys.stdout = MODULES[STAGE.get(name, name)], out
            cache = [f"--reference_cache=out{count}/cache"] * (stage.__name__ == "dpo")
            to = [f"--out=out{count}/{name}"] * (not any(f.startswith("--out=") for f in flags))
            sys.argv = [f"{stage.__name__}.py", *to, *cache, *flags]
            config = cli.parse(stage.Config)
            cli.run_main(stage.main, config, config.out)
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_in(count, folder, runs, strike=None, status=0, dtype=torch.float64):
    """([what each process printed], [what it wrote to stderr]); all have to end with the status."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tempfile.mkdtemp(dir=folder)
    args = port, folder, said, runs, strike, dtype
    started = [FORKS.Process(target=work, args=(rank, count, *args))
               for rank in range(count)]
    for process in started:
        process.start()
    end = time.monotonic() + 200
    for process in started:
        process.join(max(0, end - time.monotonic()))
        process.kill()  # if it waits for another one
    said = [[Path(said, f"{name}{rank}").read_text() for rank in range(count)]
            for name in ("out", "err")]
    expected = [status] * count if isinstance(status, int) else status
    assert [p.exitcode for p in started] == expected, "\n".join(said[0] + said[1])
    return said


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Inputs, and under out1, out2, out3 what the runs wrote in so many processes: the runs of the
    tests that were chosen."""
    folder = make_inputs(tmp_path_factory.mktemp("processes"))
    other = torch.load(folder / "sft" / "model.pt", weights_only=True)
    other["model"]["tied"] = False  # a reward model then has weights without a gradient
    other["weights"]["lm_head.weight"] = other["weights"]["wte.weight"].clone()
    torch.manual_seed(1)
    for w in other["weights"].values():
        w += 0.05 * torch.randn_like(w)
    other["hash"] = common.weights_hash(other["weights"])
    (folder / "other").mkdir()
    common.save_file(other, folder / "other" / "model.pt")
    rng = np.random.default_rng(0)
    words = ["Al", "Bo", "likes", "rain", "no", "42"]
    say = lambda: " ".join(rng.choice(words, 1 + rng.integers(6)))
    write_jsonl(folder / "pairs.jsonl", [
        dict(prompt=f"Tell {say()} {i}.", completions=[f"{say()} {k}" for k in range(2 + i % 3)],
             ranks=[1 + (k + i) % (2 + i % 3) for k in range(2 + i % 3)], held_out=i >= 10)
        for i in range(15)])
    asked = {item.callspec.params["name"] for item in request.session.items
             if item.function is test_processes_change_nothing}
    chosen = {name: flags for name, flags in RUNS.items() if name in (asked or ["sft"])}
    for n in (1, 2, 3):
        (folder / f"said{n}.json").write_text(json.dumps(run_in(n, folder, chosen)[0]))
    return folder


def rows(path):
    """The rows of a JSON lines file without what differs from run to run; no notes."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("per_s", "seconds")) and k not in (
        "config", "command", "processes")} for row in lines if row.get("kind") != "note"]


def same(a, b, rel=1e-6, least=1e-9):
    if isinstance(b, float):
        return a == pytest.approx(b, rel=rel, abs=least)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], rel, least) for k in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, rel, least) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", [2, 3])
def test_processes_change_nothing(folder, name, count):
    # catches a loss that is divided by a process's own count, gradients that are not added up, a
    # term that every process adds, samples that depend on who draws them, a share that is lost
    one, some = folder / "out1" / name, folder / f"out{count}" / name
    assert sorted(p.name for p in some.iterdir()) == sorted(p.name for p in one.iterdir())
    for file in sorted(p.name for p in one.glob("*.jsonl")):
        found, expected = rows(some / file), rows(one / file)
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert same(a, b), (a, b)
    if (one / "model.pt").exists():
        found, expected = (torch.load(p / "model.pt", weights_only=True)["weights"]
                           for p in (some, one))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-7)


def test_in_fp32_processes_differ_by_rounding(folder):
    # catches a sum in float64 alone, a type that gloo or a gather does not take
    for n in (1, 2):
        run_in(n, folder, {name: [*RUNS[name], f"--out=single{n}/{name}"]
                           for name in ("sft", "ppo")}, dtype=torch.float32)
    for name in ("sft", "ppo"):
        one, two = (folder / f"single{n}" / name for n in (1, 2))
        for a, b in zip(rows(two / "log.jsonl"), rows(one / "log.jsonl"), strict=True):
            assert same(a, b, 1e-5, 1e-5), (a, b)
        found, expected = (torch.load(p / "model.pt", weights_only=True)["weights"]
                           for p in (two, one))
        for key, w in expected.items():
            assert w.dtype == torch.float32
            if key.endswith("c_attn.bias"):  # of keys: their gradient is rounding alone
                for weights in (found, expected):
                    weights[key].view(3, -1)[1] = 0
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_the_first_process_alone_prints(folder):
    # catches a table for every process, and a first one that is silent
    one, (first, *others) = (json.loads((folder / f"said{n}.json").read_text()) for n in (1, 3))
    assert others == ["", ""]
    # but for the time, the size of what rounding left, and where the reference's numbers are cached
    lines = [[re.sub(r"[\d.]+ s\b|out\d/|\|log ratio\|.*|cache/.*|-(?=0.000)", "", line)
              for line in text.splitlines()] for text in (one[0], first)]
    assert lines[0] == lines[1] and len(lines[0]) > 20


def test_a_killed_process_ends_the_run_which_others_finish(folder):
    # catches a process that waits for a dead one, a state that only as many processes can go on
    # from, a row that is missing or doubled
    flags = [*RUNS["sft"], "--batch_size=5", "--save_every=3", "--out=killed"]
    flags.remove("--batch_size=7")
    _, err = run_in(2, folder, dict(sft=flags), (1, 4, signal.SIGKILL), [2, -signal.SIGKILL])
    assert err[0].splitlines() == [
        "sft.py: error: another process of this run ended, and so this one does; the same command "
        "goes on from the last saved state"]
    assert (folder / "killed" / "state.pt").exists()
    _, err = run_in(3, folder, dict(sft=flags))
    assert err[0].count("was started with processes 2, here is 3") == 1 and err[1:] == ["", ""]
    run_in(1, folder, dict(sft=[*flags[:-1], "--out=unkilled"]))
    assert same(*(rows(folder / out / "log.jsonl") for out in ("killed", "unkilled")))


def test_processes_stop_together(folder):
    # catches a signal that ends one process, in the middle of a step, while others wait for it
    flags = [*RUNS["ppo"], "--save_every=9", "--out=stopped"]
    _, err = run_in(2, folder, dict(ppo=flags), (1, 2, signal.SIGTERM), 128 + signal.SIGTERM)
    assert err[0].startswith("\ninterrupted; the same command goes on:\n    torchrun "
                             "--nproc_per_node=2 ppo.py") and err[1] == ""
    assert torch.load(folder / "stopped" / "state.pt", weights_only=True)["step"] == 1
    for out in ("stopped", "whole"):
        run_in(1, folder, dict(ppo=[*flags[:-1], f"--out={out}"]))
    assert same(*(rows(folder / out / "log.jsonl") for out in ("stopped", "whole")))


@pytest.mark.parametrize("rank, waits", [(0, []), (1, [5])])
def test_an_error_of_all_is_said_once(monkeypatch, capsys, rank, waits):
    # catches a line for every process; torchrun ends those that wait
    slept, before = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--epoch=2"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", str(rank)), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        cli.parse(MODULES["sft"].Config)
    assert stop.value.code == 2 and slept == waits
    assert capsys.readouterr().err.startswith("sft.py: error: unknown flag --epoch")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


def test_the_stage_before_is_one_process(monkeypatch, tmp_path):
    # catches a child that waits for other processes, or believes that it is not the first one
    started = []
    monkeypatch.setattr(common.subprocess, "Popen", lambda command, env, **_: started.append(
        (command, env)) or SimpleNamespace(wait=lambda: 0))
    monkeypatch.chdir(tmp_path)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    common.make_input(MODULES["sft"].Config(device="cpu"), "init", "pretrain")
    [(command, env)] = started
    assert command[1:] == [str(ROOT / "pretrain.py"), "--device=cpu"]
    monkeypatch.delenv("WORLD_SIZE")
    assert env == dict(os.environ) and cli.processes() == (0, 1)


def test_a_process_that_waits_for_the_others_can_be_ended(folder):
    # catches one that sits in the rendezvous until torchrun kills it, after 30 seconds
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as first:
        port, said = first.getsockname()[1], tempfile.mkdtemp(dir=folder)
        process = FORKS.Process(target=work, args=(1, 2, port, folder, said, dict(
            sft=[*RUNS["sft"], "--out=alone"])))
        process.start()
        first.settimeout(60)
        connection, _ = first.accept()
        connection.recv(1)  # it is in the rendezvous, and gets no answer
        process.terminate()
        process.join(5)
        process.kill()
        connection.close()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def test_the_first_process_makes_the_cache(monkeypatch, tmp_path):
    # catches a file of tokens that all write at once, others that do not wait, or read too early
    order, real = [], tokens._write_cache
    monkeypatch.setattr(tokens, "_write_cache", lambda *a: real(*a) or order.append("made"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: order.append("wait"))
    monkeypatch.chdir(tmp_path)
    write_jsonl("demos.jsonl", [dict(prompt=f"{n}?", completion="yes") for n in range(30)])

    def read(rank):
        for name, value in (("WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        order.clear()
        rows = tokens.read_tokens("demos.jsonl", check_demonstration, demonstration_rows,
                                  load_tokenizer("synthetic"))
        return [rows[n] for n in range(len(rows))], [*order]

    with pytest.raises(cli.UserError, match="several machines need one file system"):
        read("1")
    assert order == ["wait"]
    rows, done = read("0")
    assert done == ["made", "wait"] and len(rows) == 30
    assert read("1") == read("0") == (rows, ["wait"])


@pytest.mark.parametrize("said, expected, start", [
    (("1", "1", "2", "2"), (1, 2), "torchrun --nproc_per_node=2"),
    (("9", "1", "16", "8"), (9, 16), "torchrun ..."),
    (("1", "1", "2", None), (1, 2), "torchrun ..."),
    ((None, "0", "2", "2"), (0, 1), "python"), (("1", None, "2", "2"), (0, 1), "python"),
    (("1", "1", "x", "2"), (0, 1), "python"), (("1", "1", "", "2"), (0, 1), "python"),
    (("-1", "0", "2", "2"), (0, 1), "python"), (("0", "0", "0", "1"), (0, 1), "python"),
    ((None, None, None, None), (0, 1), "python")])
def test_several_processes_are_those_of_torchrun(monkeypatch, said, expected, start):
    # catches a WORLD_SIZE that something else has set, a command that starts as many processes on
    # each machine as there are on all
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), said):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dir/sft.py", "--seed=2", "--overwrite=true"])
    assert cli.processes() == expected
    assert cli.command_line() == f"{start} dir/sft.py --seed=2"


def test_a_process_takes_its_own_gpu_first(monkeypatch):
    # catches a tensor on the first GPU in every process, which takes its memory
    order = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(common, "find_device", lambda name: order.append(name))
    monkeypatch.setattr(common, "join_processes", lambda device: order.append("join"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    common.set_up(MODULES["sft"].Config(device="cuda"), "sft")
    common.set_up(MODULES["sft"].Config(device="cpu"), "sft")
    monkeypatch.setenv("LOCAL_RANK", "2")  # there is none: `join_processes` says so
    common.set_up(MODULES["sft"].Config(device="auto"), "sft")
    assert order == [1, "cuda", "join", "cpu", "join", "auto", "join"]


def test_the_first_process_alone_hashes_the_weights(monkeypatch, tmp_path):
    # catches a copy of all weights in every process
    monkeypatch.setattr(common, "weights_hash", lambda _: pytest.fail("a hash"))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    common.save_checkpoint(tmp_path / "x", torch.nn.Linear(1, 1), "sft", None, None, {})
    assert not (tmp_path / "x").exists()


def test_scripts_of_one_process_say_so(monkeypatch, tmp_path):
    # catches two chats at once, two downloads of one file
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for script, flags in (("sample.py", ["--model=sft"]), ("plot.py", ["out/sft"]),
                          ("label.py", ["--labeler=page"])):
        result = run_script(script, *flags, cwd=tmp_path)
        assert result.returncode == 2 and "start it without torchrun" in result.stderr
        assert result.stderr.count("\n") == 1
