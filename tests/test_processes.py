"""Several processes compute what one does: the real stages, tiny, in 1, 2 and 3 processes on gloo.

In float64, where the order of a sum changes no digit that is compared. The last batches are uneven,
rankings have 2 to 4 answers, and in some steps a process has no row at all.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import traceback

import cli
import common
import numpy as np
import pytest
import torch
from data import batches
from data.records import write_jsonl
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
    reward=["--data=pairs.jsonl", "--init=sft", "--batch_size=3", "--lr=0.01", "--samples=7",
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


def work(rank, count, port, folder, runs):
    """The runs {name: flags} in process `rank` of `count`, one after the other."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                       LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.chdir(folder)
    said = open(f"said{count}-{rank}.txt", "w", errors="backslashreplace")  # noqa: SIM115
    sys.stdout = sys.stderr = said
    torch.cuda.is_available = lambda: False
    try:
        for name, flags in runs.items():
            cli.NOTES.clear()
            stage = MODULES[STAGE.get(name, name)]
            out = [f"--out=out{count}/{name}"] + [f"--reference_cache=out{count}/cache"
                                                  ] * (stage.__name__ == "dpo")
            stage.main(cli.read_flags(stage.Config, [*flags, *out]))
            said.flush()
    except BaseException:
        traceback.print_exc()
        said.flush()
        os._exit(1)


def run_in(count, folder, runs):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [FORKS.Process(target=work, args=(rank, count, port, folder, runs))
               for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    said = [(folder / f"said{count}-{rank}.txt").read_text() for rank in range(count)]
    assert [p.exitcode for p in started] == [0] * count, "\n".join(said)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and under out1, out2, out3 what the runs wrote in so many processes."""
    folder = make_inputs(tmp_path_factory.mktemp("processes"))
    other = torch.load(folder / "sft" / "model.pt", weights_only=True)
    torch.manual_seed(1)
    for w in other["weights"].values():
        w += 0.05 * torch.randn_like(w)
    other["hash"] = common.weights_hash(other["weights"])
    (folder / "other").mkdir()
    torch.save(other, folder / "other" / "model.pt")
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(["Al", "Bo", "likes", "rain", "no", "42"], 1 + rng.integers(6)))
    write_jsonl(folder / "pairs.jsonl", [
        dict(prompt=f"Tell {say()} {i}.", completions=[f"{say()} {k}" for k in range(2 + i % 3)],
             ranks=[1 + (k + i) % (2 + i % 3) for k in range(2 + i % 3)], held_out=i >= 10)
        for i in range(15)])
    said = {n: run_in(n, folder, RUNS) for n in (1, 2, 3)}
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def rows(path):
    """The rows of a JSON lines file without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("per_s", "seconds")) and k not in (
        "config", "command", "processes")} for row in lines]


def same(a, b):
    if isinstance(b, float):
        return a == pytest.approx(b, rel=1e-6, abs=1e-9)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
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
