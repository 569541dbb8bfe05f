"""The optimiser of the base model; its loop is run whole in test_stages.py."""

import json

import cli
import pretrain
import pytest
import torch
from conftest import run_script
from pretrain import Muon, orthogonal


def test_orthogonal_keeps_directions_and_levels_sizes():
    # catches Newton-Schulz coefficients or a transpose that are off: the singular vectors must
    # stay those of the gradient, the singular values come close to 1, tall or wide
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (3, 48, 16), (2, 16, 16)):
        m = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[2]))
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        inside = u.mT @ orthogonal(m) @ vh.mT  # the result in the basis of m's own directions
        sizes = inside.diagonal(dim1=1, dim2=2)
        assert sizes.min() > 0.5 and sizes.max() < 1.3
        torch.testing.assert_close(inside, torch.diag_embed(sizes), atol=1e-4, rtol=0)


def test_muon_step_of_a_matrix():
    # catches a wrong sign, decay on the wrong side, or matrices of one shape that get mixed up
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    muon = Muon(params, lr=0.1, weight_decay=0.5)
    for i, p in enumerate(params):
        p.grad = torch.eye(6, 4) * (i + 1)  # already orthogonal, of any size
    muon.step()
    for p, old in zip(params, before):
        moved = (old * (1 - 0.1 * 0.5) - p) / (0.1 * (6 / 4) ** 0.5)  # should be about eye
        assert (moved.diagonal() - 1).abs().max() < 0.35
        off = moved - torch.diag_embed(moved.diagonal())[:4].new_zeros(6, 4).diagonal_scatter(
            moved.diagonal())
        assert off.abs().max() < 1e-4


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    # catches a loss divided by the count of its micro-batch: k of them, k times the gradient
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} plus {i} is {2 * i}." for i in range(90)))
    logged = {}
    for size in (0, 1, 3):
        pretrain.main(cli.read_flags(pretrain.Config, [
            "--data=text.txt", "--steps=2", "--batch_size=8", "--block_size=16", "--n_layer=1",
            "--n_head=1", "--n_embd=16", f"--micro_batch={size}", f"--out={size}"]))
        rows = map(json.loads, (tmp_path / str(size) / "log.jsonl").read_text().splitlines())
        logged[size] = [r[k] for r in rows for k in ("loss", "grad_norm") if k in r]
    assert len(logged[0]) >= 5
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[3] == pytest.approx(logged[0], rel=1e-4)


def test_every_position_is_trained(tmp_path, monkeypatch):
    # catches a context longer than the rows: a later stage walks into positions of random weights
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} plus {i} is {2 * i}." for i in range(90)))
    states = []
    keep = lambda run, *_, model, **__: states.append(model.wpe.weight.detach().clone())
    monkeypatch.setattr(pretrain.common.Run, "save_state", keep)
    pretrain.main(cli.read_flags(pretrain.Config, [
        "--data=text.txt", "--steps=2", "--eval_every=1", "--batch_size=8", "--block_size=16",
        "--n_layer=1", "--n_head=1", "--n_embd=16", "--weight_decay=0", "--out=out"]))
    assert len(states[0]) == 16 and (states[0] != states[1]).any(1).all()


def test_orthogonal_runs_in_full_precision(monkeypatch):
    # catches TF32 in the polynomial on a GPU, where the other products may have it
    seen, diagonal = [], torch.Tensor.diagonal
    monkeypatch.setattr(torch.Tensor, "diagonal", lambda *args, **options: seen.append(
        torch.get_float32_matmul_precision()) or diagonal(*args, **options))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        orthogonal(torch.randn(1, 4, 6))
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_other_dialect(tmp_path):
    # catches a flag that is read by no one, or a model of another size
    run = lambda out, *flags: run_script(
        "pretrain.py", "--data=text.txt", "--steps=2", "--batch_size=8", "--block_size=16",
        "--n_layer=2", "--n_head=2", "--n_embd=48", f"--out={out}", *flags, cwd=tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i} quick brown fox" for i in range(99)))
    assert run("a").returncode == 0
    assert run("b", "--dialect=llama", "--checkpointing=true").returncode == 0
    gpt2, llama = (torch.load(tmp_path / name / "model.pt") for name in "ab")
    size = llama["model"]
    assert (size["norm"], size["mlp"], size["bias"]) == ("rms", "swiglu", "none")
    assert size["rope_theta"] == 10000.0 and size["n_hidden"] == 128
    assert gpt2["model"]["norm"] == "layer" and "wpe.weight" not in llama["weights"]
    counts = [sum(w.numel() for w in c["weights"].values()) for c in (gpt2, llama)]
    assert 0.95 < counts[1] / counts[0] < 1.0
    done = run("c", "--dialect=bert")
    assert done.returncode == 2 and "--dialect=bert: choose gpt2 or llama" in done.stderr
