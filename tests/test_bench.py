"""studies/bench.py: every stage runs, and its line says what was done."""

import json
import sys

import numpy as np
import pytest
from cli import UserError
from conftest import ROOT
from model import GPT, GPTConfig
from studies import bench

FIELDS = {"stage", "size", "lengths", "params", "B", "P", "R", "s_per_step", "tok_per_s",
          "peak_mib", "mfu", "sys", "matrix_gflops", "device", "threads"}
PARTS = {"generate", "score", "prepare", "train", "log"}
EACH = dict(pretrain=12, sft=12, reward=24, ranking=48, dpo=24, ppo=12, grpo=12, generate=7,
            label=42)  # tokens of an element at P = 5, R = 7
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quick(monkeypatch):
    """A small network, and a machine that is known."""
    monkeypatch.setitem(bench.SIZES, "tiny", GPTConfig(128, 100, 1024, 2, 2, 32))
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e9)
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e9)


@pytest.mark.parametrize("stage", EACH)
def test_every_stage(stage, quick, capsys):
    # catches a stage whose functions were renamed, tokens that are counted twice or not at all
    bench.main(bench.Config(stage=stage, batch_size=4, prompt=5, new=7, steps=2, device="cpu"))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    more = PARTS if stage in ("ppo", "grpo") else \
        {"bandwidth_share"} if stage == "generate" else set()
    assert set(row) == FIELDS | more
    assert (row["stage"], row["B"], row["P"], row["R"]) == (stage, 4, 5, 7)
    assert row["params"] == GPT(bench.SIZES["tiny"]).num_params()
    assert row["tok_per_s"] * row["s_per_step"] == pytest.approx(4 * EACH[stage], rel=2e-3)
    assert row["mfu"] > 0 and 0 <= row["sys"] <= 1 and row["peak_mib"] > 50
    if more == PARTS:
        assert sum(row[name] for name in PARTS) == pytest.approx(1, abs=0.1)
        assert row["train"] > row["log"]


def test_needed_operations(quick):
    # catches a formula that forgets a matrix, the causal half, or the head
    size = bench.SIZES["tiny"]
    model, C, L = GPT(size), size.n_embd, size.n_layer
    matrices = L * 12 * C * C  # of q, k, v and their projection 4, of the MLP 8
    attention = L * sum(2 * 2 * C * (t + 1) for t in range(10))
    every = 2 * matrices * 10 + attention
    assert bench.flops(model, [(4, [6])], 10, head=False) == every
    assert bench.flops(model, [(0, [10])] * 2, 20) == 2 * every + 2 * C * 100 * 20
    # of 7 positions the last block needs keys and values alone; a prompt once for three answers
    assert bench.flops(model, [(4, [6])], 3, head=False) == every - 7 * 2 * 10 * C * C
    prompt = bench.flops(model, [(4, [])], 4, head=False)
    assert bench.flops(model, [(4, [6, 6, 6])], 22, head=False) == 3 * every - 2 * prompt


def test_bytes_of_decoding(quick):
    # catches a cache that does not grow, a head that is not read
    size = bench.SIZES["tiny"]
    model, C, L = GPT(size), size.n_embd, size.n_layer
    block = 12 * C * C + 13 * C  # matrices; biases and norms
    work = bench.make_work(bench.Config(batch_size=3, prompt=5, new=2))
    assert bench.bytes_read(model, work, 4) == 4 * sum(
        L * block + 100 * C + 3 * 2 * L * C * t for t in (5, 6))


@pytest.mark.parametrize("stage, answers", [("sft", 1), ("reward", 2), ("ranking", 4)])
def test_real_lengths(stage, answers, quick):
    # catches lengths that are not those of the table
    config = bench.Config(stage=stage, lengths="real", batch_size=100, steps=9)
    lengths = bench.draw_lengths(config, bench.make_work(config))
    assert lengths.shape == (10000, 1 + answers)
    for found, table in zip((lengths[:, 0], lengths[:, 1:]),
                            bench.ALPACA if stage == "sft" else bench.HH):
        assert found.min() >= table[0] and found.max() <= table[-1]
        assert np.quantile(found, bench.SHARES[1:-1]) == pytest.approx(table[1:-1], rel=0.1, abs=1)
    config = bench.Config(stage=stage, lengths="real", batch_size=2, steps=1)
    rows, elements = bench.make_data(config, bench.make_work(config))
    assert len(elements[0].pairs) == answers * (answers - 1) // 2
    assert len(rows) == answers * len(elements)
    assert len(elements) == 200
    for (ids, mask), n in zip(rows, rows.facts["response"]):
        assert len(ids) == len(mask) and sum(mask) == n and mask[-1] == 1 and mask[0] == 0


def test_a_peer_in_turn(quick, monkeypatch, tmp_path, capsys):
    # catches a ratio that is turned round, a task that is not the one that ours does, a peer that
    # runs with what cli.py sets for us
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    (tmp_path / "peer.py").write_text(
        "import json, os, sys\ntask = json.loads(sys.argv[1])\n"
        "assert os.environ.get('GOMP_SPINCOUNT') != '1'\n"
        "assert task['lengths'] == [[5, 7]] * 8 and task['model']['n_embd'] == 32\n"
        "print(json.dumps(dict(peer='a', tok_per_s=50, peak_mib=400, seed=1)))\n")
    monkeypatch.setattr(bench, "PEER_SCRIPT", str(tmp_path / "peer.py"))
    ours = tmp_path / "ours.py"
    ours.write_text("import sys\nassert '--batch_size=4' in sys.argv and '--peer=false' in sys.argv"
                    "\nn = 100 * int(sys.argv[-1]) ** 2\n"
                    "print('{\"tok_per_s\": %d, \"peak_mib\": 100}' % n)\n")
    monkeypatch.setattr(bench, "__file__", str(ours))
    run = bench.subprocess.run

    def seeded(command, **options):  # what a round's seed is, as the last argument
        seed = [x.split("=")[1] for x in command if x.startswith("--seed=")]
        return run([*command, *seed], **options)
    monkeypatch.setattr(bench.subprocess, "run", seeded)
    bench.main(bench.Config(stage="sft", batch_size=4, prompt=5, new=7, steps=1, peer=True))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["speeds"], row["speed"], row["memory"]) == ([2, 8, 18], 8, 0.25)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_real_lengths_are_run(stage, quick, capsys):
    # catches a stage that runs the rows of full length, or counts the padding
    bench.main(bench.Config(stage=stage, lengths="real", batch_size=2, steps=1, device="cpu"))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["P"] not in (5, 32) and row["R"] != 32
    tokens, k = row["tok_per_s"] * row["s_per_step"], bench.ANSWERS[stage]
    assert 2 * k * 7 <= tokens < 2 * k * 1376 and 0 < row["mfu"] < 100


@pytest.mark.parametrize("flags, message", [
    (dict(stage="evaluate"), "--stage=evaluate"), (dict(size="large"), "--size=large"),
    (dict(lengths="long"), "--lengths=long"), (dict(stage="ppo", lengths="real"), "needs one of"),
    (dict(stage="label", peer=True), "--peer"), (dict(init="x", peer=True), "--peer"),
    (dict(prompt=1000, new=100), "over the context")])
def test_what_is_refused(flags, message, quick):
    with pytest.raises(UserError, match=message):
        bench.main(bench.Config(**flags, device="cpu"))


def test_the_machine():
    # catches a rate that is not per second
    cpu = bench.common.find_device("cpu")
    assert 1e9 < bench.matrix_rate(cpu) < 1e12


def test_peers_import_nothing_of_ours():
    # catches a setting of ours, of memory or threads, that the peer would take over
    names = {p.stem for p in ROOT.glob("*.py")} | {"data", "studies"}
    text = (ROOT / "studies" / "peers.py").read_text()
    found = {word for line in text.splitlines() if line.strip().startswith(("import", "from"))
             for word in line.replace(",", " ").split()}
    assert "transformers" in found and not found & names
    assert sys.modules[bench.__name__].PEER_SCRIPT == str(ROOT / "studies" / "peers.py")
