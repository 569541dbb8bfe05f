"""Numbers that go wrong: what stops a run, what is said of a run that learns nothing."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import cli
import common
import destroy
import grpo
import label
import ppo
import pytest
import torch
from cli import UserError
from data.tokenizer import load_tokenizer
from evaluate import scores, watch_rollouts
from model import generate

CPU = torch.device("cpu")


@dataclass
class Config(cli.Config):
    out: str = "out/x"  # output folder
    lr: float | None = None
    beta: float = 0.1
    missing_eos: float = -3.0
    temperature: float = 1.0
    max_new_tokens: int = 5
    max_kl: float = 100.0


def start(folder, **flags):
    return common.Run("x", Config(out=str(folder), **flags), CPU)


def log_rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the stages: a selection of tests/destroy.py -------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return destroy.make_folder(tmp_path_factory.mktemp("destroy"))


def select(cases, *wanted):
    """The cases whose command holds one of these words, as pytest shows them."""
    found = [case for case in cases if " ".join([case[0], *case[1]]) in wanted]
    assert len(found) == len(wanted)
    return found


@pytest.mark.parametrize("stage, flags, expected", select(
    destroy.DESTROYED, "pretrain --lr=1e3", "pretrain --muon_lr=1e38", "sft --lr=1e38",
    "sft --pretrain_mix=1e38", "reward --lr=1e3", "dpo --lr=1e10", "dpo --loss=kto --beta=1e38",
    "dpo --loss=ipo --beta=1e-38", "dpo --nll=1e38", "ppo --lr=1e3", "ppo --critic_lr=1e38",
    "ppo --beta=1e38", "ppo --temperature=1e-38", "ppo --missing_eos=-1e38",
    "ppo --max_kl=0.05 --lr=0.03", "ppo --reward_model=rm_scale", "grpo --lr=1e38",
    "grpo --beta=1e38 --kl_in=loss --kl_estimator=k3", "grpo --reward_model=rm_nan",
    "label --reward_model=rm_shift", "label --init=sft_large", "sft --init=sft_nan",
    "dpo --init=sft_large", "evaluate --policy=sft_large", "sample --models=sft_large"),
    ids=lambda x: " ".join(x) if isinstance(x, list) else x if x in destroy.FLAGS else "")
def test_a_destroyed_run_stops_with_one_line(folder, stage, flags, expected):
    # catches "done." of a dead model, a bad state or log row, a traceback, a line that names
    # another flag than the one to change
    destroy.check(folder, stage, flags, expected)


@pytest.mark.parametrize("stage, flags, expected", select(
    destroy.USELESS, "grpo --reward=verifier --data=never.jsonl --iterations=8",
    "ppo --reward_model=rm_flat --missing_eos=-0.235294 --iterations=8",
    "ppo --temperature=1e-5 --iterations=8", "grpo --reward_model=rm_narrow --iterations=8",
    "ppo --critic_lr=1e-12 --iterations=12 --reward_model=rm_far",
    "dpo --data=contradictory.jsonl --epochs=16", "dpo --loss=ipo --data=contradictory.jsonl",
    "reward --data=contradictory.jsonl --epochs=16", "sft --lr=3",
    "sft --max_new_tokens=1 --lr=1e-12 --init=sft_endless"),
    ids=lambda x: " ".join(x) if isinstance(x, list) else x if x in destroy.FLAGS else "")
def test_a_useless_run_says_so(folder, stage, flags, expected):
    # catches a run without a signal that ends "done." and says nothing, one that says it twice
    destroy.check(folder, stage, flags, (expected,))


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "grpo"])
def test_a_usual_run_says_nothing(folder, stage):
    # catches warnings that everybody learns to ignore
    # seed 2: the critic of a random network may well be worse than a constant
    more = dict(ppo=["--iterations=12", "--seed=2"], grpo=["--iterations=12"])
    status, _, notes, _ = destroy.run(folder, stage, more.get(stage, []))
    assert status == 0 and not [n for n in notes if n.startswith("warning: ") and "KL" not in n]


# --- check_finite --------------------------------------------------------------------------------


def test_what_is_finite_passes_and_what_is_not_is_named(tmp_path):
    config = Config(out=str(tmp_path), lr=0.5)
    good, bad = torch.ones(2, 3), torch.ones(2, 3)
    bad[1, 2] = math.inf
    common.check_finite(config, 3, loss=torch.tensor(1e38), norm=-good, model=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"step 3: norm is inf\. .*lower --lr \(now 0\.5\)"):
        common.check_finite(config, 3, loss=good, norm=bad)
    with pytest.raises(UserError, match="epoch 2: loss is -inf"):
        common.check_finite(config, "after epoch 2", loss=torch.tensor(-math.inf), norm=bad)
    with pytest.raises(UserError, match="step 0: score is nan. The reward model is destroyed"):
        common.check_finite(config, 0, score=torch.tensor([1.0, math.nan, math.inf]))


@pytest.mark.parametrize("value, ok", [(1e18, True), (1e20, False), (math.nan, False)])
def test_weights_without_a_norm_are_destroyed(tmp_path, value, ok):
    # catches a weight that is finite and whose square is not, and a buffer that is not looked at
    model = torch.nn.BatchNorm1d(3)
    for tensor in (model.weight.data, model.running_mean):
        before, tensor[1] = tensor[1].item(), value
        if ok:
            common.check_finite(Config(), 1, policy=model)
        else:
            with pytest.raises(UserError, match="the weights of the policy are no longer finite"):
                common.check_finite(Config(), 1, policy=model)
        tensor[1] = before


def test_the_flags_to_change_are_those_out_of_range():
    # catches the wrong direction, a flag at its default beside the one that is to blame
    advice = lambda **flags: common.advice(Config(**flags)).partition(": ")[2]
    assert advice(lr=1e-3) == "lower --lr (now 0.001), or take another --init"
    assert advice(lr=5e-7) == "lower --lr (now 5e-07), or take another --init"  # never to be raised
    assert advice(lr=1e-3, beta=1e38) == \
        "lower --beta (now 1e+38), or lower --lr (now 0.001), or take another --init"
    assert advice(lr=3.0, missing_eos=-1e38, temperature=0.7) == \
        "raise --missing_eos (now -1e+38), or lower --lr (now 3.0), or take another --init"
    assert advice(temperature=1e-38).startswith("raise --temperature (now 1e-38), or lower --lr")
    assert common.advice(cli.Config()) == ("The checkpoint it comes from is destroyed: make it "
                                           "again, with a lower --lr")


def test_the_last_good_state_is_named_and_stays(tmp_path):
    # catches a bad state that is written over a good one
    model = torch.nn.Linear(2, 2)
    config = Config(out=str(tmp_path))
    assert common.last_state(config) == "Nothing is saved"
    run = start(tmp_path)
    run.save_state(4, 9, model=model)
    good = (tmp_path / "state.pt").read_bytes()
    model.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="step 5: the weights of the model .*/state.pt is still "
                                        "that of step 4; --overwrite=true starts again"):
        run.save_state(5, 9, model=model)
    assert (tmp_path / "state.pt").read_bytes() == good
    (tmp_path / "state.pt").write_text("broken")
    assert "is still that of an earlier step" in common.last_state(config)


def test_a_destroyed_model_is_not_written(tmp_path, tiny):
    tiny.wpe.weight.data[3, 0] = math.inf
    with pytest.raises(UserError, match="model.pt is not written: the weights of the model"):
        common.save_checkpoint(tmp_path / "model.pt", tiny, "sft", None, Config(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_no_token_is_sampled_from_nan(tiny, temperature):
    # catches an id that does not exist: an IndexError, or on a GPU a read beyond the table
    tiny.ln_f.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        generate(tiny, [[1, 2]], 3, 0, temperature, torch.full((1, 3), 0.5))


class Broken:
    """A judge whose scores are no numbers."""
    gpt = SimpleNamespace(config=SimpleNamespace(block_size=64))

    def __call__(self, tokens, mask):
        return torch.full((len(tokens),), math.nan)


def test_scores_that_are_no_numbers_stop_an_evaluation(monkeypatch, tmp_path):
    # catches a ranking, a win rate or a mean of nan
    config = label.Config(labeler="model", out=str(tmp_path))
    with pytest.raises(UserError, match="evaluation: score is nan. The reward model is destroyed"):
        scores(Broken(), [[1]], [dict(ids=[2, 3], finished=True)], 9, CPU, config)
    tokenizer = load_tokenizer("synthetic")
    monkeypatch.setattr(label, "load_reward_model", lambda *_: (
        Broken(), tokenizer, dict(metrics={}, hash="h")))
    monkeypatch.setattr(common, "ensure_input", lambda *_: None)
    rank, *_ = label.by_model(config, CPU)
    with pytest.raises(UserError, match="score is nan"):
        rank([(7, dict(prompt="Say.", completions=["a", "b"]))])


@pytest.mark.parametrize("stage", [ppo, grpo])
def test_scores_that_are_no_numbers_stop_a_run(folder, monkeypatch, stage):
    # catches an update by advantages of nan
    name = stage.__name__
    monkeypatch.chdir(folder)
    monkeypatch.setattr(stage, "score_batch", lambda model, tokens, *_: Broken()(tokens, None))
    config = cli.read_flags(stage.Config, [*destroy.FLAGS[name], f"--out={name}"])
    with pytest.raises(UserError, match=f"step 0: score is nan.*{name}/state.pt is still that of"):
        stage.main(config)


# --- warnings ------------------------------------------------------------------------------------


def warnings(folder):
    return [row["text"] for row in log_rows(folder) if row["kind"] == "note"]


def test_a_warning_comes_once_after_as_many_in_a_row(tmp_path, capsys):
    # catches a count that goes on after a good row, a warning that is said again and again
    run = start(tmp_path)
    for bad in (1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1):
        run.log(step=1)
        run.watch("odd", bad, 3)
        run.watch("never", False, 1)
    assert warnings(tmp_path) == ["warning: odd"]
    assert [r["kind"] for r in log_rows(tmp_path)].index("note") == 7  # behind its row
    assert capsys.readouterr().err == "warning: odd\n"
    run.finish({})
    end = capsys.readouterr().out
    assert end.count("warning: odd") == 1 and end.index("done after") < end.index("warning: odd")


@pytest.mark.parametrize("stop", range(1, 7))
def test_counts_survive_a_resume(tmp_path, capsys, stop):
    # catches a warning that a resumed run forgets, or says twice
    bad = [True, True, True, False, True, True]

    def go(run, steps):
        for step in steps:
            run.log(step=step)
            run.watch("odd", bad[step], 3)
            run.watch("late", step > 3, 2)

    go(start(tmp_path / "whole"), range(6))
    run = start(tmp_path / "parts")
    go(run, range(stop))
    run.save_state(stop, 6)
    go(run, range(stop, 6))  # is lost
    run = start(tmp_path / "parts")
    assert run.load_state()["step"] == stop
    go(run, range(stop, 6))
    assert log_rows(tmp_path / "parts")[1:] == log_rows(tmp_path / "whole")[1:]
    capsys.readouterr()
    run.finish({})
    assert capsys.readouterr().out.count("\nwarning: ") == 2


class Judge:
    seen = -1.0, 2.0


def watched(folder, n=5, accuracy=None, score=(0.5, 1.0), finished=True, judge=Judge, **row):
    """The warnings of n iterations with such a row."""
    run = start(folder, temperature=1.0)
    row = dict(step=3, kl=1.0, eos_rate=0.9, entropy=0.5, accuracy=accuracy) | row
    batch = dict(score=torch.tensor(score), finished=torch.full((2,), finished))
    for _ in range(n):
        run.log(**row)
        watch_rollouts(run, run.config, row, batch, torch.tensor(score), judge)
    return [text[9:20] for text in warnings(folder)]


@pytest.mark.parametrize("found, case", [
    ([], dict()), ([], dict(kl=None, judge=None)), ([], dict(eos_rate=0.05, entropy=0.03)),
    (["hardly any "], dict(eos_rate=0.04)), ([], dict(eos_rate=0.0, n=4)),
    (["the entropy"], dict(entropy=0.02)), (["no signal: "], dict(score=(0.5, 0.5))),
    (["no signal: "], dict(score=(0.5, 0.50001))), ([], dict(score=(0.5, 0.501))),
    (["no signal: "], dict(no_signal=1.0, accuracy=0.5)), ([], dict(no_signal=0.99)),
    ([], dict(no_signal=1.0, accuracy=1.0, score=(1.0, 1.0))),  # all right
    (["the mean sc"], dict(score=(2.0, 2.1))), (["the mean sc"], dict(score=(-3.0, 0.9))),
    ([], dict(score=(3.0, 0.9))), ([], dict(score=(2.0, 2.1), judge=None)),
    ([], dict(score=(2.0, 2.1), finished=False)), ([], dict(kl=100.0))])
def test_what_is_said_of_rollouts(tmp_path, found, case):
    # catches a threshold that moves, a warning of a run that is healthy
    assert watched(tmp_path, **case) == found


def test_a_kl_that_is_too_high_stops_the_run(tmp_path):
    # catches a limit that is not read, and 0 that is taken for one
    with pytest.raises(UserError, match=r"step 3: the KL to the reference is 100\.1 nats a sequence"
                                        r", above --max_kl=100.*raise --beta \(now 0\.1\)"):
        watched(tmp_path, kl=100.1)
    assert log_rows(tmp_path)[-1]["kl"] == 100.1
    run = start(tmp_path / "free", max_kl=0.0)
    watch_rollouts(run, run.config, dict(step=0, kl=1e9, eos_rate=1, entropy=1), dict(
        score=torch.tensor([0.0, 1.0]), finished=torch.ones(2).bool()), None)
    assert ppo.Config().max_kl == grpo.Config().max_kl == 100


# --- JSON ----------------------------------------------------------------------------------------


def test_json_without_nan(tmp_path):
    # catches NaN and Infinity, which only Python reads, also deep inside; numbers that change
    bad = dict(a=math.nan, b=[1, (math.inf, -math.inf, 0.1)], c=dict(d=torch.tensor(math.nan)),
               e=None, f=True, g="NaN", h=2**60)
    good = dict(a=None, b=[1, [None, None, 0.1]], c=dict(d=None), e=None, f=True, g="NaN", h=2**60)
    assert json.loads(cli.to_json(bad), parse_constant=destroy.refuse) == good
    assert cli.to_json(dict(x=0.1, y=[torch.tensor(0.5)])) == '{"x": 0.1, "y": [0.5]}'
    assert cli.to_json("é", ensure_ascii=False) == '"é"'
    start(tmp_path).log(**bad)
    assert log_rows(tmp_path)[-1] == dict(kind="step", **good)
