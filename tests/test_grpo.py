"""GRPO's mathematics against numbers worked out by hand, its gradient against the exact one, its
verifier against real answers, and the real script run tiny."""

import copy
import dataclasses
import itertools
import json
import math
from decimal import Decimal
from pathlib import Path

import cli
import common
import grpo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli import UserError
from data.instruments import clustered_se
from conftest import read_rows
from data import gsm8k
from data.records import check_answer, check_demonstration, split
from data.synthetic.world import all_prompts
from data.tokenizer import load_tokenizer
from data.verifier import final_answer, fulfils, is_fulfilled, is_right, strip_calculator
from grpo import (
    METHODS,
    Config,
    group_advantage,
    has_signal,
    kl_loss,
    policy_loss,
    prepare,
    resolve,
    row_weights,
    update,
    verify,
)
from model import GPT
from studies.closed_form import MISSING_EOS, Problem
from test_exact import Recorder, close, exact_gradient, flat, moved
from tiny_runs import FLAGS, make_inputs, spy_temperatures

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
double = lambda *x: torch.tensor(x, dtype=torch.float64)
same = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

# --- advantages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected", [
    # group (1, 0, 0, 1): mean 0.5, std of a sample sqrt(1/3); group (2, 4, 4, 6): 4, sqrt(8/3)
    ("dr_grpo", [0.5, -0.5, -0.5, 0.5, -2, 0, 0, 2]),
    ("rloo", [2 / 3, -2 / 3, -2 / 3, 2 / 3, -8 / 3, 0, 0, 8 / 3]),
    ("grpo", [0.866025, -0.866025, -0.866025, 0.866025, -1.224745, 0, 0, 1.224745])])
def test_advantages_by_hand(kind, expected):
    # catches a baseline over the batch, groups read across (column by column), a biased std
    found = group_advantage(double(1, 0, 0, 1, 2, 4, 4, 6), 4, kind)
    torch.testing.assert_close(found, double(*expected), rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("K", [2, 3, 8])
def test_rloo_leaves_the_response_itself_out(K):
    # catches the factor K / (K - 1) missing or the other way up
    reward = torch.randn(5 * K, generator=torch.Generator().manual_seed(K)).double()
    expected = [r - sum(x for j, x in enumerate(group) if j != i) / (K - 1)
                for group in reward.view(-1, K).tolist() for i, r in enumerate(group)]
    torch.testing.assert_close(group_advantage(reward, K, "rloo"), double(*expected), rtol=0,
                               atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3])
def test_groups_without_signal_have_no_advantage(kind, value):
    # catches 0 / 0, and rounding of a mean of equal numbers that a tiny std blows up
    reward = torch.cat([torch.full((7,), value), torch.arange(7.0)])
    found = group_advantage(reward, 7, kind)
    assert (found[:7] == 0).all() and (found[7:] != 0).sum() == 6
    assert has_signal(reward, 7).tolist() == [False, True]


@pytest.mark.parametrize("kind, factor", [("grpo", 1), ("dr_grpo", 7), ("rloo", 7)])
def test_shift_and_scale_of_the_reward(kind, factor):
    # catches a baseline that is none, and a std that is taken of something else than the rewards
    reward = torch.randn(24, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(group_advantage(7 * reward + 100, 8, kind),
                               factor * group_advantage(reward, 8, kind), rtol=2e-3, atol=1e-9)


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, ratio, gradient", [
    (1.0, 1.27, -1.27),  # between the two clips: symmetric ones would stop it
    (1.0, 1.29, 0.0), (1.0, 0.5, -0.5), (-1.0, 0.81, 0.81), (-1.0, 0.79, 0.0),
    (-1.0, 0.73, 0.0),  # would go on if the lower clip were widened as well
    (-1.0, 1.5, 1.5)])
def test_asymmetric_clip(advantage, ratio, gradient):
    # catches clip_high ignored or used on both sides, max for min, a lost sign
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1).double()
    loss, info = policy_loss(logp, one * 0, double(advantage), one, clip=0.2, clip_high=0.28)
    loss.sum().backward()
    assert logp.grad.item() == pytest.approx(gradient)
    assert info["clip_fraction"].item() == float(gradient == 0)


MASK = double([0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0])


def test_policy_loss_is_a_sum_over_each_response():
    # catches a mean over tokens, padding in the sum or in a metric, k3 the wrong way round
    log_ratio = double([9, .1, -.3, .2, 9], [9, 9, 0, 0, 0], [9, -.5, 9, 9, 9])
    loss, info = policy_loss(log_ratio, log_ratio * 0, double(2, -1, -4), MASK, 0.2, 0.28)
    first = -2 * (math.exp(.1) + math.exp(-.3) + math.exp(.2))
    torch.testing.assert_close(loss, double(first, 3, 4 * 0.8))
    k3 = [math.exp(x) - 1 - x for x in (.1, -.3, .2, -.5)]
    assert info["approx_kl"].item() == pytest.approx(sum(k3))
    assert info["clip_fraction"].item() == 1
    assert info["ratio_max"].item() == pytest.approx(math.exp(.2))


def test_kl_losses_by_hand():
    # catches k2 token by token, k3 reversed, and what stands in the padding
    logp = double([9, -1, -2, -1.5, 9], [9, 9, -1, -1, -1], [9, -3, 9, 9, 9])
    ref_logp = double([0, -1.5, -1, -1, 0], [0, 0, -1, -1, -1], [0, -2, 0, 0, 0])
    l = [[.5, -1, -.5], [0, 0, 0], [-1]]
    same(kl_loss(logp, ref_logp, MASK, "k2"), double(*(0.5 * sum(x) ** 2 for x in l)))
    k3 = [sum(math.exp(-x) - 1 + x for x in row) for row in l]
    same(kl_loss(logp, ref_logp, MASK, "k3"), double(*k3))


def test_k3_has_the_mean_of_the_kl():
    # catches the other direction, which a test near 0 cannot tell: torch.distributions as referee
    p, q = (torch.distributions.Categorical(probs=double(*x))
            for x in ((.7, .2, .1), (.1, .1, .8)))
    k3 = kl_loss(p.logits[:, None], q.logits[:, None], torch.ones(3, 1), "k3")
    torch.testing.assert_close((p.probs * k3).sum(), torch.distributions.kl_divergence(p, q))
    assert abs((p.probs * kl_loss(q.logits[:, None], p.logits[:, None], torch.ones(3, 1), "k3"))
               .sum() - torch.distributions.kl_divergence(p, q)) > 0.05


@pytest.mark.parametrize("aggregate, all_kept, two_kept", [
    ("sequence", [1 / 12, 1 / 6, 1 / 3], [1 / 8, 0, 1 / 2]),
    ("constant", [1 / 30] * 3, [1 / 20, 0, 1 / 20]),
    ("tokens", [1 / 7] * 3, [1 / 5, 0, 1 / 5]),
    ("sum", [1 / 3] * 3, [1 / 2, 0, 1 / 2])])
def test_aggregations_by_hand(aggregate, all_kept, two_kept):
    # catches a mean of means, and dropped groups left in the denominator
    lengths = double(4, 2, 1)
    weights = lambda kept: row_weights(lengths, double(*kept), aggregate, 10)
    torch.testing.assert_close(weights([1, 1, 1]), double(*all_kept))
    torch.testing.assert_close(weights([1, 0, 1]), double(*two_kept))


def test_methods_are_those_of_the_papers():
    # catches a name that stands for another method, and a single choice that is overruled
    pick = lambda **flags: [getattr(resolve(Config(**flags)), n)
                            for n in ("advantage", "aggregate", "clip_high", "drop", "beta",
                                      "kl_in", "kl_estimator")]
    assert pick(method="grpo") == ["grpo", "sequence", 0.2, False, 0.04, "loss", "k3"]
    assert pick(method="dr_grpo") == ["dr_grpo", "constant", 0.2, False, 0.0, "reward", "k2"]
    assert pick(method="rloo") == ["rloo", "sum", 0.2, False, 0.05, "reward", "k2"]
    assert pick(method="rloo", reward="model")[4] == 0.1  # the unit of beta is that of the score
    assert pick(method="dapo") == ["grpo", "tokens", 0.28, True, 0.0, "loss", "k2"]
    for name in METHODS:
        for kl_in in ("reward", "loss"):
            assert pick(method=name, advantage="dr_grpo", aggregate="tokens", clip_high=0.3,
                        drop=False, beta=0.1, kl_in=kl_in) == [
                            "dr_grpo", "tokens", 0.3, False, 0.1, kl_in,
                            "k3" if name == "grpo" else "k2"]


@pytest.mark.parametrize("method, high", [("grpo", 0.1), ("dr_grpo", 0.1), ("rloo", 0.1),
                                          ("dapo", 0.28)])
def test_the_clip_is_symmetric_but_for_dapo(method, high):
    # catches --clip that moves the lower side only
    assert resolve(Config(method=method, clip=0.1)).clip_high == high
    assert resolve(Config(method=method, clip=0.1, clip_high=0.15)).clip_high == 0.15


# --- a whole iteration, on three networks' numbers written out ------------------------------------

TOKENS = torch.tensor([[1, 2, 3, 4, 0, 13], [1, 2, 7, 8, 9, 10], [8, 9, 0, 13, 13, 13],
                       [8, 4, 5, 0, 13, 13]])
ROW_MASK = double([0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0])
FINISHED, SCORES = torch.tensor([True, False, True, True]), double(2, 50, 1, 1)


@pytest.fixture
def networks(tiny):
    """(policy, reference), different ones."""
    torch.manual_seed(1)
    return tiny, GPT(tiny.config).double().eval().requires_grad_(False)


def settings(**change):
    return resolve(Config(**dict(batch_size=4, k=2, minibatches=1, temperature=0.7, beta=0.3,
                                 missing_eos=-4.0, reward="model", grad_clip=1e9,
                                 max_new_tokens=48) | change))


def of_tokens(model, temperature=0.7):
    """log p of the tokens that stand there, (B, T), 0 off the mask, from whole distributions."""
    logp_all = F.log_softmax(model.logits(model(TOKENS))[:, :-1].double() / temperature, -1)
    targets = TOKENS[:, 1:, None].clamp(max=12)  # what PAD would get is never looked at
    return F.pad(logp_all.gather(2, targets)[..., 0], (1, 0)) * ROW_MASK


@torch.no_grad()
def test_prepare_with_kl_in_the_reward(networks):
    # catches k1 with the wrong sign, per token or behind the baseline, old log-probabilities of
    # another model or temperature, a cut response that keeps its score
    batch = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES, settings())
    p, q = map(of_tokens, networks)
    same(batch["old_logp"].double(), p)
    same(batch["ref_logp"].double(), q)
    assert batch["score"].tolist() == [2, -4, 1, 1]
    reward = double(2, -4, 1, 1) - 0.3 * (p - q).sum(1)
    same(batch["reward"].double(), reward)
    same(batch["advantage"].double(), reward - reward[[1, 0, 3, 2]])  # of two: the other one
    assert batch["kept"].tolist() == [1, 1, 1, 1]
    pi = torch.distributions.Categorical(logits=networks[0].logits(networks[0](TOKENS)) / 0.7)
    same(batch["entropy"].double(), F.pad(pi.entropy()[:, :-1], (1, 0)).double() * ROW_MASK)


@torch.no_grad()
def test_prepare_with_kl_in_the_loss_or_without(networks):
    # catches a KL that is paid twice, a group kept for its KL alone, a reference pass for nothing,
    # and advantages of unit size that are made of the KL of equal scores
    batch = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES,
                    settings(kl_in="loss", drop=True))
    assert batch["reward"].tolist() == batch["score"].tolist() == [2, -4, 1, 1]
    same(batch["ref_logp"].double(), of_tokens(networks[1]))
    assert batch["kept"].tolist() == [1, 1, 0, 0] and batch["advantage"].tolist() == [6, -6, 0, 0]
    in_reward = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES, settings(drop=True))
    assert in_reward["kept"].tolist() == [1, 1, 0, 0]
    published = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES, settings(method="grpo"))
    same(published["advantage"], double(0.5**0.5, -0.5**0.5, 0, 0))
    free = prepare(networks[0], None, TOKENS, ROW_MASK, FINISHED, SCORES, settings(beta=0.0))
    assert free["ref_logp"] is None and free["reward"].tolist() == [2, -4, 1, 1]


@torch.no_grad()
def test_a_cut_response_is_wrong_for_a_verifier(networks):
    # catches a right number in a response that never ended, and the reward model's penalty of -3
    # among zeros and ones
    batch = prepare(*networks, TOKENS, ROW_MASK, FINISHED, double(1, 1, 1, 0),
                    settings(reward="verifier"))
    assert batch["score"].tolist() == [1, 0, 1, 0]


def made_up_batch(networks):
    """A batch as prepare returns it, of random numbers: ratios are not 1."""
    torch.manual_seed(2)
    with torch.no_grad():
        p, q = map(of_tokens, networks)
    return dict(tokens=TOKENS, mask=ROW_MASK, ref_logp=q, advantage=torch.randn(4).double(),
                old_logp=p + 0.1 * torch.randn(4, 6).double() * ROW_MASK, kept=double(1, 1, 1, 1))


TEXT = torch.tensor([[1, 2, 3, 4, 5, 6]] * 4)


def step(networks, config, batch):
    """(gradient, metrics) of one call of update, by plain gradient descent, lr 1."""
    policy = copy.deepcopy(networks[0])
    metrics = update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch, config,
                     np.random.default_rng(0), TEXT)
    return flat(a.detach() - b.detach() for a, b in zip(networks[0].parameters(),
                                                        policy.parameters())), metrics


def pretraining_loss(policy):
    """Of TEXT, whose rows are equal, from whole distributions."""
    return -F.log_softmax(policy.logits(policy(TEXT[:1]))[0, :-1], -1)[range(5), TEXT[0, 1:]].mean()


def gradient_of(loss, policy):
    return flat(torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True))


@pytest.mark.parametrize("options", [
    dict(method="grpo"), dict(method="dr_grpo"), dict(method="rloo"), dict(method="dapo"),
    dict(method="rloo", kl_in="loss"), dict(method="grpo", kl_in="loss", kl_estimator="k2"),
    dict(method="dapo", kl_in="loss", kl_estimator="k3"),
    dict(method="rloo", ptx_coef=0.5, ptx_batch=2)])
@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (0, 0, 1, 1)])
def test_update_is_the_gradient_of_the_written_loss(networks, options, kept):
    # catches a term that is dropped or has the wrong sign, weight, temperature or denominator, k2
    # per token, k1 as a loss, pretraining text that is logged only: written out from whole
    # distributions, without the clips
    batch = made_up_batch(networks) | dict(kept=double(*kept))
    config = settings(clip=0.999, clip_high=1e6, **options)
    found, metrics = step(networks, config, batch)
    logp, q, n = of_tokens(networks[0]), batch["ref_logp"], sum(kept)
    lengths, total = [3, 4, 2, 3], sum(k * t for k, t in zip(kept, (3, 4, 2, 3)))
    policy, kl = 0.0, torch.zeros(()).double()
    for i, k in enumerate(kept):
        share = k * dict(grpo=1 / (n * lengths[i]), dr_grpo=1 / (n * config.max_new_tokens),
                         rloo=1 / n, dapo=1 / total)[options["method"]]
        m = ROW_MASK[i].bool()
        ratio = (logp - batch["old_logp"])[i][m].exp()
        policy = policy - share * batch["advantage"][i] * ratio.sum()
        l = (logp - q)[i][m]
        if config.kl_in == "loss":
            kl = kl + 0.3 * share * (((-l).exp() - 1 + l).sum() if config.kl_estimator == "k3"
                                     else 0.5 * l.sum() ** 2)
    ptx = pretraining_loss(networks[0])
    expected = gradient_of(policy + kl + options.get("ptx_coef", 0.0) * ptx, networks[0])
    assert metrics["ptx_loss"] == (pytest.approx(ptx.item()) if "ptx_coef" in options else None)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert metrics["policy_loss"] == pytest.approx(policy.item(), rel=1e-4)
    assert metrics["kl_loss"] == pytest.approx(kl.item(), rel=1e-4)


def test_a_step_without_signal_changes_nothing(networks):
    # catches 0 / 0 where every group is dropped, and Adam's momentum moving on without a gradient
    batch = made_up_batch(networks) | dict(kept=double(0, 0, 0, 0))
    found, metrics = step(networks, settings(method="dapo"), batch)
    assert (found == 0).all() and metrics["grad_norm"] == 0


def test_a_step_without_signal_still_learns_from_text(networks):
    # catches pretraining text that is skipped together with the dropped groups
    batch = made_up_batch(networks) | dict(kept=double(0, 0, 0, 0))
    found, metrics = step(networks, settings(method="dapo", ptx_coef=0.5, ptx_batch=2), batch)
    ptx = pretraining_loss(networks[0])
    same(found, gradient_of(0.5 * ptx, networks[0]))
    assert metrics["ptx_loss"] == pytest.approx(ptx.item()) and metrics["policy_loss"] == 0


def test_metrics_are_those_of_the_kept_responses(networks):
    # catches dropped groups in the sums or in the number of tokens that they are divided by
    with torch.no_grad():
        logp = of_tokens(networks[0])
    batch = made_up_batch(networks) | dict(
        kept=double(1, 1, 0, 0), advantage=double(1, 1, 0, 0),
        old_logp=logp - ROW_MASK * double(0.3, 0.3, 0.9, 0.9)[:, None])
    metrics = step(networks, settings(method="dapo"), batch)[1]
    assert metrics["clip_fraction"] == pytest.approx(1)
    assert metrics["approx_kl"] == pytest.approx(math.exp(0.3) - 1 - 0.3, rel=1e-5)
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.3), rel=1e-5)


def test_gradients_are_clipped_before_the_step(networks):
    # catches a clip before backward or after the step
    batch = made_up_batch(networks)
    whole, metrics = step(networks, settings(), batch)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4) and \
        whole.norm() > 0.05
    found, metrics = step(networks, settings(grad_clip=0.01), batch)
    torch.testing.assert_close(found, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)


@pytest.mark.parametrize("method", list(METHODS))
def test_order_padding_and_micro_batches_change_nothing(networks, method):
    # catches a weight of the micro-batch in place of the step's, and a neighbour's advantage
    batch = made_up_batch(networks) | dict(kept=double(1, 1, 0, 0) if method == "dapo"
                                           else double(1, 1, 1, 1))
    ptx = dict(ptx_coef=0.5, ptx_batch=2)
    expected, metrics = step(networks, settings(method=method, **ptx), batch)
    wide = {k: F.pad(v, (0, 5), value=3) if v.dim() == 2 else v for k, v in batch.items()}
    wide["mask"] = F.pad(ROW_MASK, (0, 5))
    order = {k: v[[2, 0, 3, 1]] for k, v in batch.items()}
    for changed, micro in ((wide, 0), (order, 0), (batch, 1), (batch, 3)):
        found, found_metrics = step(networks, settings(method=method, micro_batch=micro, **ptx),
                                    changed)
        assert (found - expected).norm() < 1e-6 * expected.norm()
        assert found_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-9)


# --- the exact gradient --------------------------------------------------------------------------


def gradient(problem, **options):
    """The gradient of `update` with every response weighted by its probability; groups of two.

    `prepare` sees every pair (y, y'). At ratio 1 the policy's loss is linear in the advantage, so
    `update` gets each y once, with its advantage averaged over y'; its probability stands in
    `kept`, the factor of a row's weight.
    """
    policy, N = moved(problem), len(problem.tokens)
    pairs = torch.tensor(list(itertools.product(range(N), repeat=2))).flatten()
    config = resolve(Config(reward="model", k=2, batch_size=len(pairs), minibatches=1,
                            micro_batch=4096, beta=problem.beta, temperature=problem.temperature,
                            missing_eos=MISSING_EOS, grad_clip=1e9, max_new_tokens=48,
                            **options))
    batch = prepare(policy, problem.reference, problem.tokens[pairs], problem.mask[pairs],
                    problem.finished[pairs], problem.score[pairs], config)
    once = {k: v.view(N, N, 2, *v.shape[1:])[:, 0, 0] for k, v in batch.items()}  # y with any y'
    once["kept"] = once["old_logp"].double().sum(1).exp()
    once["advantage"] = batch["advantage"].view(N, N, 2)[..., 0].double() @ once["kept"]
    recorder = Recorder(policy)
    update(policy, recorder, once, dataclasses.replace(config, batch_size=N),
           np.random.default_rng(0))
    return recorder.gradient


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_rloo_gradient_is_the_gradient_of_the_objective(kl_in):
    # catches KL with the wrong sign or per token, a baseline that holds the response itself, a
    # lost temperature, EOS missing in a sum
    problem = Problem(0, temperature=0.7, dtype=torch.float64)
    close(gradient(problem, method="rloo", kl_in=kl_in), exact_gradient(problem))


@pytest.mark.usefixtures("one_thread")
def test_what_the_other_choices_do_to_the_gradient():
    # catches a table in the docstrings that says what is not so: the group's own mean shrinks the
    # gradient by (K - 1) / K and nothing else; std, length and k3 bend it
    problem = Problem(0, dtype=torch.float64)
    expected = exact_gradient(problem)
    close(gradient(problem, method="rloo", advantage="dr_grpo"), expected / 2)
    for options, most in ((dict(advantage="grpo"), 0.999), (dict(aggregate="sequence"), 0.995),
                          (dict(kl_in="loss", kl_estimator="k3"), 0.95)):
        bent = gradient(problem, method="rloo", **options)
        assert torch.cosine_similarity(bent, expected, 0).item() < most, options


# --- verifiers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, number", [
    ("The result of 7 plus 5 is 12.", "12"), ("12", "12"), ("12.00", "12"), ("12.50.", "12.5"),
    ("$1,234,567.89", "1234567.89"), ("It costs $18 a day", "18"), ("50%", "50"), ("18kg", "18"),
    ("-5", "-5"), ("is -$5.", "-5"), ("$-5", "-5"), ("−5", "-5"), ("20-5", "5"), ("20 - 5", "5"),
    ("20-25 = -5", "-5"), ("3–5", "5"), ("1, 2, 3", "3"), ("1,2345", "2345"), (".5 litres", "0.5"),
    ("3 * 6 = <<3*6=18>>18 eggs", "18"), ("he has <<3*6=18>>18 eggs <<7>>", "18"),
    ("#### 7\n... so 8\n#### 1,070 dollars. Or 3?", "3"), ("9 in all\n#### 18", "18"),
    ("£40", "40"), ("(7)-2", "2"), ("007", "7"),
    ("no number", None), ("", None), ("9 eggs\n#### none", None)])
def test_the_number_that_a_text_ends_on(text, number):
    # catches the first number for the last, strings compared, and what is written around numbers
    assert final_answer(text) == (None if number is None else Decimal(number))


def test_right_and_wrong():
    # catches comparison as text, the wrong side of ####, a missing number taken for a match
    assert is_right("That makes $1,200.00.", "1200")
    assert is_right("#### 12", "4 * 3 = 12\n#### 12.0")
    assert not is_right("12 or 13", "12") and not is_right("I do not know.", "12")
    assert not is_right("12", "-12") and not is_right("12 #### 1", "12")
    with pytest.raises(ValueError, match="holds no number"):
        is_right("12", "twelve")
    assert verify(["It is 12.", "It is 12.", "It is 13."], [True, False, True], ["12"] * 3) == \
        [1.0, 0.0, 0.0]
    assert strip_calculator("3 * 6 = <<3*6=18>>18") == "3 * 6 = 18"


def test_the_embedded_arithmetic_verifies():
    # catches a demonstration that its own verifier calls wrong
    prompts = [p for p in all_prompts().values() if p.family == "arithmetic"]
    assert len(prompts) == 600
    for p in prompts:
        assert is_right(f"I am sure. {p.relation.state(p.x, p.answer)}.", p.answer)
        assert not is_right(f"{p.relation.state(p.x, p.wrong_answers[0])}.", p.answer)
        assert not is_right("I do not know that.", p.answer)


@real
def test_every_real_answer_of_gsm8k_has_its_number():
    # catches an answer that is misread: each stands behind #### and, but for commas, is an integer
    count = 0
    for name in ("train.jsonl", "test.jsonl"):
        for line in (SHARED / name).read_text().splitlines():
            solution = json.loads(line)["answer"]
            expected = int(solution.split("####")[1].replace(",", ""))
            assert final_answer(solution) == expected
            # a model that was taught to end on "The answer is" instead gets the same verdict
            other = strip_calculator(solution).replace("####", "The answer is $")
            assert is_right(f"{other}.00.", solution)
            assert not is_right(f"#### {expected + 1}", solution)
            count += 1
    assert count == 8792


@real
def test_real_model_solutions_are_judged_as_published():
    # catches a verdict that differs from the authors' on any of 5,276 solutions, right and wrong
    verdicts = []
    for line in (SHARED / "example_model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            verdicts.append(is_right(row[model]["solution"], row["ground_truth"]))
            assert verdicts[-1] == row[model]["is_correct"], row[model]["solution"]
    assert len(verdicts) == 5276 and 0.2 < np.mean(verdicts) < 0.6


def test_answer_records():
    # catches an answer without a number that would make every response wrong, and one in
    # scientific notation, of which the exponent would be read
    assert check_answer(dict(prompt="2 + 2?", answer=4, held_out=True, completion="x")) == \
        dict(prompt="2 + 2?", answer="4", held_out=True)
    assert check_answer(dict(prompt="a", answer="#### -2.5"))["answer"] == "#### -2.5"
    for answer in ("72", "-3.5", " $1,200.00 ", "40%", "18 apples.", "−2", "-$5",
                   "4 * 3 = 12\n#### 12"):
        assert check_answer(dict(prompt="a", answer=answer))["answer"] == answer
    for number, text in ((1e20, "1" + 20 * "0"), (1e-7, "0.0000001"), (-2.5, "-2.5"),
                         (10**30, "1" + 30 * "0")):
        assert check_answer(dict(prompt="a", answer=number))["answer"] == text
    for answer, why in ((None, "is missing"), ("", "is empty"), ("four", "not one number"),
                        (True, "expected text"), (float("nan"), "not one number"),
                        (float("inf"), "not one number"), (r"\frac{1}{4}", "not one number"),
                        ("(2, 4)", "not one number"), ("12:30", "not one number"),
                        (r"\sqrt{2}", "not one number"), ("3/4", "not one number"),
                        ("2 + 2 = 4, so 4", "not one number"), ("thirty: 30", "not one number"),
                        ("2x", "not one number"), ("2 million", "not one number"),
                        ("3 dozen", "not one number"), ("7 or eight", "not one number"),
                        ("5 minus two", "not one number"), ("2 pi", "not one number"),
                        ("4 #### 3 or 4", "not one number")):
        with pytest.raises(UserError, match=why):
            check_answer(dict(prompt="a", answer=answer))
    with pytest.raises(UserError, match="'answer' is missing"):
        check_answer(dict(prompt="a"))


@pytest.mark.parametrize("constraint, right, wrong", [
    (dict(kind="words", at_most=3), ["One", "One two three.", "it's 3 o’clock", "- a\n- b — c ..."],
     ["one two three four", "one-two-three-four", "a/b/c/d", "1.5 or 2"]),
    (dict(kind="words", at_least=3), ["a b c", "a, b, c and d", "well-known cafe\u0301"],
     ["a b", "don't can’t", "- – _ ** a b", "e\u0301te\u0301 İs"]),
    (dict(kind="words", at_least=2, at_most=2), ["a b", "3.5"], ["a", "a b c"]),
    (dict(kind="sentences", at_most=1),
     ["Yes", "It is 3.5 m.", "Why?!", "(Yes.)", "So ... ", 'He said "Go!" '],
     ["Yes. No", "Yes! No!", "a\nb", "Dr. No", '"Yes." No', "- a\n- b", "“Yes.” No", "*Yes.* No"]),
    (dict(kind="sentences", at_least=2), ["A. B.", "A? B", "a\n\nb"],
     ["A.", "A. ...", "A.b", "A. "]),
    (dict(kind="items", at_least=2, at_most=2), ["- a\n- b", "- a\r\n\r\n- b", "Two:\n- a\n- b\n"],
     ["- a", "- a\n- b\n- c", "-a\n-b", "* a\n* b", "- a - b", "- a\n  - b", "- a\n- ..."]),
    (dict(kind="items", at_most=2), ["- a", "- a\n- b"], ["a", "-", "- a\n- b\n- c"]),
    (dict(kind="include", word="Pear"), ["a pear.", "PEAR", "pear-tree", "pear pear pear"],
     ["pears", "pear's", "a p ear", "spear", "pear’s"]),
    (dict(kind="include", word="don’t"), ["Don't!", "don’t"], ["do not", "dont"]),
    (dict(kind="exclude", word="the"), ["Other", "then", "lathe"], ["The end", "at the", "(the)"]),
    (dict(kind="begins", text="In short,"), ["In short, no.", " in short,yes"],
     ["In short no", "So in short, no"]),
    (dict(kind="begins", text="yes"), ["Yes", "YES, no", "yes-man"], ["Yesterday", "Oh yes"]),
    (dict(kind="ends", text="?"), ["Why?", "No. Why?\n", "Why ?"], ["Why? No", "Why."]),
    (dict(kind="ends", text="clear."), ["All clear.", "CLEAR. "], ["Unclear.", "clear"]),
    (dict(kind="ends", text="a+b"), ["is a+b"], ["aab", "ca+b"]),
    (dict(kind="lower_case"), ["all lower, 3!", "é"], ["I am", "a B", "3!", "not É"])])
def test_constraints_by_hand(constraint, right, wrong):
    # catches a bound that is off by one, a word found inside another, a definition that gives way
    for response in right:
        assert is_fulfilled(response, constraint), response
        assert is_right(response, [constraint]), response
    for response in wrong:
        assert not is_fulfilled(response, constraint), response
        assert not is_right(response, [constraint]), response


def test_all_constraints_and_no_empty_answer():
    # catches any for all, an empty answer that avoids a word, a cut answer that counts
    both = [dict(kind="exclude", word="the"), dict(kind="words", at_most=2)]
    assert fulfils("A pear", both)
    assert not fulfils("A pear tree", both) and not fulfils("the pear", both)
    for response in ("", " \n", "...", "- \n- ", "_"):
        assert not fulfils(response, both[:1])
        assert not fulfils(response, [dict(kind="ends", text=response.strip() or ".")])
    assert verify(["a", "a", "the", "a b c"], [True, False, True, True], [both] * 4) == \
        [1.0, 0.0, 0.0, 0.0]


def test_constraint_records():
    # catches what no response could fulfil and what would be ignored, null that is not absent
    good = [dict(kind="words", at_least=2, at_most=2), dict(kind="include", word="a"),
            dict(kind="include", word="b"), dict(kind="exclude", word="c"), dict(kind="lower_case"),
            dict(kind="items", at_least=2), dict(kind="sentences", at_most=2),
            dict(kind="begins", text="a"), dict(kind="ends", text="!")]
    assert check_answer(dict(prompt="P", constraints=good, held_out=True, answer=None)) == \
        dict(prompt="P", answer=good, held_out=True)
    assert check_answer(dict(prompt="P", constraints=[dict(good[0], at_least=None)]))["answer"] == \
        [dict(kind="words", at_most=2)]
    words = lambda **bounds: dict(kind="words", **bounds)
    for constraints, why in (
            ([], "must be a list of at least one"), ("short", "must be a list of at least one"),
            (good[0], "must be a list of at least one"), (["words"], r"constraints\[0\] needs a"),
            ([good[0], {}], r"constraints\[1\] needs a 'kind', one of .*words.*lower_case"),
            ([dict(kind="word")], "needs a 'kind'"), ([dict(kind=["words"])], "needs a 'kind'"),
            ([words()], "'words' needs 'at_least' or 'at_most'"),
            ([words(at_most=None)], "'words' needs 'at_least' or 'at_most'"),
            ([dict(kind="include")], "'include' needs 'word'"),
            ([words(at_most=2, most=3)], "'words' has no parameter 'most'"),
            ([words(word="a")], "'words' has no parameter 'word'"),
            ([dict(kind="lower_case", value=True)], "'lower_case' has no parameter 'value'"),
            ([words(at_most=0)], "'at_most' must be a whole number from 1"),
            ([words(at_most=2.0)], "a whole number"), ([words(at_least=True)], "a whole number"),
            ([words(at_least="2")], "'at_least' must be a whole number"),
            ([words(at_least=3, at_most=2)], "at least 3 words, and at most 2 words"),
            ([dict(kind="items", at_least=3), words(at_most=2)], "3 items, and at most 2 words"),
            ([dict(kind="items", at_least=2), dict(kind="sentences", at_most=1)], "1 sentences"),
            ([words(at_least=2), words(at_most=3)], r"s\[1\]: 'words' stands there twice"),
            ([dict(kind="include", word="two words")], "'two words' is not one word"),
            ([dict(kind="exclude", word="well-known")], "is not one word"),
            ([dict(kind="include", word="a.")], "is not one word"),
            ([dict(kind="include", word=3)], "'word' must be text"),
            ([dict(kind="begins", text=" ")], "'text' must be text"),
            ([dict(kind="include", word="A"), dict(kind="exclude", word="a")],
             "use and to avoid the word 'a'"),
            ([dict(kind="ends", text="So be it"), dict(kind="exclude", word="be")], "word 'be'")):
        with pytest.raises(UserError, match=why) as error:
            check_answer(dict(prompt="a", constraints=constraints))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'answer' beside 'constraints'"):
        check_answer(dict(prompt="a", answer="3", constraints=good))


SOLUTION = "She makes 9 * 2 = $<<9*2=18>>18.\n#### 1,018"


def test_gsm8k_adapter(tmp_path, monkeypatch):
    # catches a test problem that is trained on, marks left in what SFT learns, an answer in words
    assert gsm8k.convert(dict(question=" How many? ", answer=SOLUTION)) == (dict(
        prompt="How many?", completion="She makes 9 * 2 = $18.\n#### 1,018", answer="1018"), None)
    for row in (dict(question="", answer=SOLUTION), dict(question="a", answer="It is 18."),
                dict(question="a", answer="18\n#### many")):
        assert gsm8k.convert(row)[0] is None
    for name, n in (("train", 3), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps(dict(question=f"{name} {i}?", answer=SOLUTION)) + "\n" for i in range(n)))
    out = tmp_path / "out.jsonl"
    gsm8k.main(gsm8k.Config(source=str(tmp_path), out=str(out)))
    sides = split(read_rows(out, check_answer))
    train, test = sides.train, sides.held_out
    assert [r["prompt"] for r in train] == ["train 0?", "train 1?", "train 2?"]
    assert [r["prompt"] for r in test] == ["test 0?", "test 1?"]
    assert len(read_rows(out, check_demonstration)) == 5
    (tmp_path / "test.jsonl").write_text("{")
    with pytest.raises(common.UserError, match="test.jsonl:1: not JSON"):
        gsm8k.main(gsm8k.Config(source=str(tmp_path), out=str(tmp_path / "b.jsonl")))


@real
def test_gsm8k_files(tmp_path, capsys):
    # catches rows of the real files that are lost, and a warning about the pinned checksums
    gsm8k.main(gsm8k.Config(source=str(SHARED), out=str(tmp_path / "g.jsonl")))
    printed = capsys.readouterr()
    assert "8792 rows read, 8792 written" in printed.out and not printed.err
    sides = split(read_rows(tmp_path / "g.jsonl", check_answer))
    train, test = sides.train, sides.held_out
    assert (len(train), len(test)) == (7473, 1319)
    assert not any("<<" in json.dumps(r) for r in read_rows(tmp_path / "g.jsonl",
                                                            check_demonstration))


# --- whole runs on tiny inputs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("grpo"))
    lines = [dict(prompt=f"Say {i}.", answer=i, held_out=i >= 8) for i in range(14)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    for line in lines:
        line["constraints"] = [dict(kind="words", at_most=1 + line.pop("answer"))]
    (folder / "forms.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


VERIFIER = ("--reward=verifier", "--data=sums.jsonl")


def run(folder, monkeypatch, out, *flags):
    """grpo.main in this process; returns the rows of its log."""
    monkeypatch.chdir(folder)
    given = {f.split("=")[0]: f for f in (*FLAGS["grpo"], *flags, f"--out={out}")}
    grpo.main(cli.read_flags(Config, given.values()))
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


def of(rows, kind):
    return [r for r in rows if r["kind"] == kind]


@pytest.mark.parametrize("flags", [
    VERIFIER, ("--method=dapo", "--advantage=dr_grpo"), ("--method=grpo",),
    ("--method=dr_grpo", "--minibatches=2", "--micro_batch=3", "--kl_in=loss",
     "--kl_estimator=k3", "--beta=0.1")])
def test_runs_log_what_one_needs_to_see(folder, monkeypatch, capsys, flags):
    # catches an option that does not run, a metric that is missing, a KL that does not start at 0
    rows = run(folder, monkeypatch, flags[0].strip("-") + str(len(flags)), *flags, "--lr=0.02",
               "--iterations=2")
    first, final, printed = of(rows, "step")[0], of(rows, "final")[0], capsys.readouterr().out
    assert {"score", "accuracy", "kl", "kl_se", "no_signal", "kept", "eos_rate", "lr",
            "entropy", "length", "clip_fraction", "approx_kl", "ratio_max", "grad_norm",
            "policy_loss", "kl_loss"} <= set(first)
    assert {"kl", "kl_se", "length", "eos_rate", "eos_rate_sft", "seconds"} <= set(final)
    assert "The policy loss starts at" in printed and "first minibatch: |log ratio|" in printed
    assert first["kl"] is None if "--method=dapo" in flags else abs(first["kl"]) < 1e-4
    assert (first["accuracy"] is not None) == ("accuracy" in final) == (VERIFIER[0] in flags)
    if "accuracy" in final:
        assert final["judged"] == 4 and {"accuracy_se", "accuracy_sft"} <= set(final)
    content = torch.load(folder / (flags[0].strip("-") + str(len(flags))) / "model.pt",
                         weights_only=True)
    assert content["stage"] == "grpo" and "sft" in content["parents"]
    assert ("reward" in content["parents"]) == (VERIFIER[0] not in flags)


def test_answers_are_checked_against_their_own_prompt(folder, monkeypatch):
    # catches rows that are tiled where they should be adjacent: a prompt's answer for its neighbour
    asked, real_verify = [], grpo.verify

    def spy(texts, finished, answers):
        asked.append(list(answers))
        return real_verify(texts, finished, answers)

    chosen, real_generate = [], grpo.generate

    def spy_generate(model, prompts, *args, **options):
        chosen.append(prompts)
        return real_generate(model, prompts, *args, **options)

    monkeypatch.setattr(grpo, "verify", spy)
    monkeypatch.setattr(grpo, "generate", spy_generate)
    run(folder, monkeypatch, "asked", *VERIFIER)
    tokenizer = load_tokenizer("synthetic")
    said = [tokenizer.decode(p).split("Say ")[1].split(".")[0] for p in chosen[0]]
    assert asked[0] == [n for n in said for _ in range(4)] and len(set(said)) == 2


def test_a_run_on_constraints(folder, monkeypatch, capsys):
    # catches constraints that get lost on the way to the verifier, and those of another prompt
    seen, real_verify = [], grpo.verify

    def spy(texts, finished, answers):
        seen.append((texts, finished, answers, real_verify(texts, finished, answers)))
        return seen[-1][-1]

    monkeypatch.setattr(grpo, "verify", spy)
    rows = run(folder, monkeypatch, "forms", "--reward=verifier", "--data=forms.jsonl", "--lr=0.02",
               "--iterations=3")
    for row, (texts, finished, answers, score) in zip(of(rows, "step"), seen, strict=True):
        count = lambda text: len("".join(c if c.isalnum() else " " for c in text).split())
        expected = [float(f and 1 <= count(t.replace("'", "")) <= a[0]["at_most"])
                    for t, f, a in zip(texts, finished, answers)]
        assert score == expected and row["accuracy"] == np.mean(expected)
    assert 0 < np.mean([row["accuracy"] for row in of(rows, "step")]) < 1
    assert {"accuracy", "accuracy_sft", "accuracy_gap_se"} <= set(of(rows, "final")[0])
    assert "not used" not in capsys.readouterr().out


def test_the_loss_starts_at_zero_where_every_response_counts_once(folder, monkeypatch):
    # catches a printed explanation that is wrong: zero for a mean per response, and yet a gradient
    rows = run(folder, monkeypatch, "zero", "--method=grpo", "--iterations=1", "--epochs=1")
    first = of(rows, "step")[0]
    assert abs(first["policy_loss"]) < 1e-5 < 0.01 < first["grad_norm"]


def test_logged_numbers(folder, monkeypatch):
    # catches a share that is its complement, a KL with the wrong sign, a mean over padding
    right = [1, 0, 0, 1] + [0] * 4 + [1] * 4 + [0] * 4  # one of four groups has a signal
    cut = torch.tensor([0, 1, 0, 0] + [0] * 8 + [1, 1, 0, 0]).bool()
    lengths, each = [], []

    def spy_generate(*args, real=grpo.generate, **options):
        tokens, mask, _ = real(*args, **options)
        each.append(mask.sum(1).numpy())
        lengths.append(each[-1].mean())
        assert mask.mean() < 0.9  # there are other columns
        return tokens, mask, ~cut

    def spy_prepare(*args, real=prepare):
        batch = real(*args)  # half a nat a token off the reference
        return batch | dict(ref_logp=batch["old_logp"] - 0.5 * batch["mask"],
                            entropy=2.0 * batch["mask"])

    monkeypatch.setattr(grpo, "generate", spy_generate)
    monkeypatch.setattr(grpo, "prepare", spy_prepare)
    monkeypatch.setattr(grpo, "check_start", lambda *_, **__: None)
    monkeypatch.setattr(grpo, "verify", lambda texts, *_: [float(r) for r in right[:len(texts)]])
    row = of(run(folder, monkeypatch, "logged", *VERIFIER, "--method=dapo", "--beta=0.1",
                 "--batch_size=16"), "step")[0]
    expected = dict(
        score=6 / 16, accuracy=6 / 16, no_signal=0.75, kept=0.25,
        eos_rate=13 / 16, kl=0.5 * lengths[0], kl_per_token=0.5, length=lengths[0], entropy=2.0,
        objective=6 / 16 - 0.1 * 0.5 * lengths[0],
        # the four answers to a prompt are one observation
        kl_se=clustered_se(0.5 * each[0], np.repeat(range(4), 4)))
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_without_kl_no_reference_is_asked(folder, monkeypatch):
    # catches a reference pass that costs a third of the scoring and is thrown away
    asked, real_logprobs = [], grpo.token_logprobs

    def spy(model, *args):
        asked.append(next(model.parameters()).requires_grad)
        return real_logprobs(model, *args)

    monkeypatch.setattr(grpo, "token_logprobs", spy)
    run(folder, monkeypatch, "free", "--beta=0")
    assert asked and all(asked)  # the reference is frozen


def test_settings_reach_every_function(folder, monkeypatch):
    # catches a temperature that one caller forgets, dropout left on, a lost eps, a reference that
    # shares weights with what is trained, rows of a prompt that are not adjacent
    roles, adam = [], []
    temperatures = spy_temperatures(monkeypatch, grpo)

    def spy_adamw(modules, lr, *args, real=common.adamw, **options):
        adam.append((lr, options.get("eps")))
        return real(modules, lr, *args, **options)

    def spy_prepare(policy, reference, tokens, mask, *rest, real=prepare):
        roles.append((policy, reference))
        starts = mask.argmax(1)
        for group in range(0, len(tokens), 4):  # the four rows of a prompt start with it
            rows = tokens[group:group + 4, :int(starts[group])]
            assert (rows == rows[0]).all() and len(set(starts[group:group + 4].tolist())) == 1
        assert len({tuple(t[:int(s)].tolist()) for t, s in zip(tokens, starts)}) == 2
        return real(policy, reference, tokens, mask, *rest)

    monkeypatch.setattr(common, "adamw", spy_adamw)
    monkeypatch.setattr(grpo, "prepare", spy_prepare)
    run(folder, monkeypatch, "settings", "--temperature=0.6", "--adam_eps=1e-4", "--lr=0.01",
        "--iterations=2")
    assert temperatures == dict.fromkeys(("generate", "token_stats", "token_logprobs"), {0.6})
    assert adam == [(0.01, 1e-4)]
    policy, reference = roles[-1]
    start = torch.load(folder / "sft" / "model.pt", weights_only=True)["weights"]
    for name, p in reference.named_parameters():
        assert torch.equal(p, start[name]) and not p.requires_grad
    assert any(not torch.equal(p, start[name]) for name, p in policy.named_parameters())


class Stop(Exception):
    pass


def test_resume_is_exact(folder, monkeypatch):
    # catches an optimiser or a step that resume forgets
    flags = ("--iterations=4", "--lr=0.01", "--save_every=1")
    steps = lambda rows: str([{k: v for k, v in r.items() if not k.endswith("per_s")}
                              for r in of(rows, "step")])
    whole = run(folder, monkeypatch, "whole", *flags)
    save, calls = common.Run.save_state, []

    def save_and_stop(self, *args, **state):
        save(self, *args, **state)
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    monkeypatch.setattr(common.Run, "save_state", save_and_stop)
    with pytest.raises(Stop):
        run(folder, monkeypatch, "parts", *flags)
    monkeypatch.setattr(common.Run, "save_state", save)
    assert steps(run(folder, monkeypatch, "parts", *flags)) == steps(whole)
    assert len({torch.load(folder / o / "model.pt", weights_only=True)["hash"]
                for o in ("whole", "parts")}) == 1


@pytest.mark.parametrize("flags, message", [
    (["--method=ppo"], "--method=ppo: expected one of grpo, dr_grpo, rloo, dapo"),
    (["--reward=gold"], "--reward=gold: expected one of verifier, model"),
    (["--drop=yes"], "--drop=yes: expected true or false"),
    (["--kl_estimator=k3"], "--kl_estimator=k3 belongs to --kl_in=loss"),
    (["--k=3"], "must be a multiple of --k=3"),
    (["--k=1"], "must be a multiple of --k=1, at least 2"),
    (["--clip_high=-1"], "--clip_high=-1.0: must be above 0"),
    (["--beta=-1"], "--beta=-1.0: must not be negative"),
    (["--ptx_coef=-1"], "--ptx_coef=-1.0: must not be negative"),
    (["--reward=verifier"], "pairs.jsonl:1: the field 'answer' is missing"),
    (["--reward=verifier", "--data=broken.jsonl"], "broken.jsonl:1: constraints[0] needs a 'kind'"),
    (["--reward_model=sft"], "is a sft checkpoint; needed here: reward"),
    (["--reward_model=nowhere"], "--reward_model=nowhere does not exist: `python reward.py"),
    (["--init=nowhere"], "--init=nowhere does not exist: `python sft.py"),
    (["--max_new_tokens=63"], "no training prompt of at most 1 tokens"),
    ([*VERIFIER, "--init=reward"], "is a reward checkpoint; needed here: sft or convert")])
def test_bad_input_is_one_clear_line(folder, monkeypatch, flags, message):
    # catches tracebacks, and an output folder made by a run that cannot start
    (folder / "broken.jsonl").write_text('{"prompt": "a", "constraints": [{"kind": "short"}]}\n')
    with pytest.raises((common.UserError, UserError)) as error:
        run(folder, monkeypatch, "never", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "never").exists()
