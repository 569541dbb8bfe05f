"""Exact numbers: examples worked by hand, and gradients with every response enumerated.

A gradient over samples is noisy enough to hide a wrong sign or a term that is off by one. Here
every response stands in with its probability as weight, so the stage's gradient has to EQUAL the
one that autograd finds for the exact objective.
"""

import copy
import dataclasses
import math

import dpo
import numpy as np
import ppo
import pytest
import torch
from conftest import ROOT
from model import GPT, token_logprobs
from reward import RewardModel, reward_loss
from sft import sft_loss
from studies.closed_form import (
    LENGTH,
    MISSING_EOS,
    PROMPTS,
    Problem,
    draw_problems,
    kl_estimates,
    optimum,
    preferences,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- worked numbers ------------------------------------------------------------------------------


def test_sft_loss_of_four_probabilities():
    # catches a wrong sign, a log to another base, and prompt or padding in the mean
    logp = torch.tensor([[0.2, 0.7, 0.6, 0.9, 0.8, 0.1]], dtype=torch.float64).log()
    mask = torch.tensor([[0.0, 1, 1, 1, 1, 0]])
    assert sft_loss(logp, mask).item() / mask.sum().item() == pytest.approx(0.299, abs=5e-4)


@pytest.mark.parametrize("gap, probability, loss, weight", [
    (2.1 - 0.4, 0.8455, 0.1678, 0.1545), (0.0, 0.5, math.log(2), 0.5),
    (3.0, 0.9526, 0.0486, 0.0474)])
def test_bradley_terry(gap, probability, loss, weight):
    # catches a reversed pair, a missing sigmoid, and a gradient that does not fade with the gap
    chosen = torch.tensor([0.4 + gap], dtype=torch.float64, requires_grad=True)
    value = reward_loss(chosen, torch.tensor([0.4], dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(loss, abs=5e-4)
    assert math.exp(-value.item()) == pytest.approx(probability, abs=5e-4)
    assert chosen.grad.item() == pytest.approx(-weight, abs=5e-4)  # -sigmoid(-gap)


def test_bradley_terry_is_blind_to_a_shift_per_prompt():
    # catches a loss that pulls absolute scores, or pairs that mix prompts
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    shift = torch.tensor([5.0, 5, -3, -3, -3, 100])  # one number a prompt, pairs of three prompts
    torch.testing.assert_close(reward_loss(chosen + shift, rejected + shift),
                               reward_loss(chosen, rejected))


REF, SCORE = torch.tensor([0.6, 0.4]).double().log(), torch.tensor([1.0, 0.0]).double()


def test_two_response_optimum():
    # catches r * beta for r / beta and a missing normalisation: 4.434 and 0.400 of 4.834
    best = optimum(REF, SCORE, 0.5).exp()
    # exp(2) 0.6 is 4.4334: with 4.434 as the text has it, the fourth digit is one too large
    torch.testing.assert_close(best, torch.tensor([0.9173, 0.0827]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(optimum(REF, SCORE, 0.01).exp(), torch.tensor([1.0, 0.0]).double(),
                               atol=1e-8, rtol=0)
    torch.testing.assert_close(optimum(REF, SCORE, 1e9).exp(), REF.exp(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("ratio, advantage, gradient", [
    (1.2, 1.0, -0.6), (0.8, -1.0, 0.4), (1.2 + 1e-9, 1.0, 0.0), (1.2 - 1e-9, 1.0, -1.2),
    (0.8 - 1e-9, -1.0, 0.0), (0.8 + 1e-9, -1.0, 0.8)])
def test_clipped_surrogate_at_the_boundary(ratio, advantage, gradient):
    # catches a clip at another place than 1 +- 0.2; on the edge itself torch halves the gradient
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    if gradient in (-0.6, 0.4):  # the log misses the edge by rounding: any subgradient is right
        low, high = sorted((0.0, -advantage * ratio))
    else:
        low = high = gradient
    one = torch.ones(1, 1).double()
    ppo.policy_loss(logp, one * 0, one * advantage, one, clip=0.2)[0].backward()
    assert low - 1e-6 <= logp.grad.item() <= high + 1e-6


# --- exact gradients -----------------------------------------------------------------------------


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads])


def close(found, expected, bound=1e-4):
    """Relative error of a gradient vector."""
    assert (found - expected).norm() / expected.norm() <= bound, (
        ((found - expected).norm() / expected.norm()).item(),
        torch.cosine_similarity(found, expected, 0).item())


class Recorder:
    """In the optimiser's place: keeps the gradient that `update` hands over, changes no weight."""

    def __init__(self, model):
        self.params = list(model.parameters())

    def step(self):
        self.gradient = flat(p.grad if p.grad is not None else torch.zeros_like(p)
                             for p in self.params)

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None


def moved(problem):
    """A policy that has left the reference, so that no term of the gradient is zero."""
    torch.manual_seed(1)
    policy = copy.deepcopy(problem.reference).requires_grad_(True)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return policy


def gradient(problem, kl_in, lam, priced=True, critic=None):
    """The policy gradient of `ppo.update` with every response weighted by its probability.

    `prepare` sees all responses at once; `update` then gets one at a time. It is the gradient of
    the loss that is minimised, so of -J. priced False: no action pays for the KL of later states.
    """
    policy = moved(problem)
    critic = critic or ppo.ValueModel(RewardModel(policy.config)).double()
    config = ppo.Config(batch_size=len(problem.tokens), minibatches=1, epochs=1, lam=lam,
                        whiten=False, kl_in=kl_in, grad_clip=1e9, temperature=problem.temperature,
                        missing_eos=MISSING_EOS)
    beta = problem.beta
    batch = ppo.prepare(policy, critic, problem.reference, problem.tokens, problem.mask,
                        problem.finished, problem.score, beta if priced else 0.0, config)
    weights = batch["old_logp"].sum(1).exp()
    config = dataclasses.replace(config, batch_size=1)
    total, recorder = 0.0, Recorder(policy)
    for i, weight in enumerate(weights):
        one = {k: v[i:i + 1] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}
        ppo.update(policy, critic, problem.reference, (recorder, Recorder(critic)), one, beta,
                   config, np.random.default_rng(0))
        total = total + weight * recorder.gradient * problem.mask[i].sum()  # undo: per token
    return total / len(PROMPTS)


def exact_gradient(problem):
    """Of -J, by autograd through the enumerated sum."""
    policy = moved(problem)
    (-problem.objective(problem.logp(policy).sum(1))).backward()
    return flat(p.grad for p in policy.parameters())


class ExactCritic(torch.nn.Module):
    """Gives the enumerated values."""

    def __init__(self, problem, kl_in):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()).double())
        self.problem = problem
        with torch.no_grad():
            self.table = problem.values(problem.logp(moved(problem)), kl_in)

    def forward(self, tokens, response_mask):
        return (self.table[self.problem.rows(tokens)] + self.nothing) * response_mask


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_ppo_gradient_is_the_gradient_of_the_objective(kl_in):
    # catches KL with the wrong sign or place, a lost temperature, a score off by one
    problem = Problem(0, temperature=0.7, dtype=torch.float64)
    # lambda 1: a critic, however wrong, does not bend the gradient
    close(gradient(problem, kl_in, lam=1.0), exact_gradient(problem))


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_ppo_gradient_with_bootstrapped_advantages(kl_in):
    # catches a biased GAE and values of another quantity: with lambda below 1 exact values are due
    problem = Problem(0, dtype=torch.float64)
    critic = ExactCritic(problem, kl_in)
    close(gradient(problem, kl_in, lam=0.7, critic=critic), exact_gradient(problem))


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_scaling_reward_and_beta_together_changes_nothing(kl_in):
    # catches a term that does not scale: the KL in the loss beside whitened advantages
    torch.testing.assert_close(optimum(REF, 7 * SCORE, 7 * 0.5), optimum(REF, SCORE, 0.5))
    problem, found = Problem(0, dtype=torch.float64), []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        policy = moved(problem)
        critic = ppo.ValueModel(RewardModel(policy.config)).double()
        with torch.no_grad():  # scaled along, as a trained critic would be
            critic.head.weight.mul_(factor)
            critic.head.bias.mul_(factor)
        config = ppo.Config(batch_size=len(problem.tokens), minibatches=1, epochs=1, kl_in=kl_in,
                            grad_clip=1e9, missing_eos=factor * MISSING_EOS)
        recorder, beta = Recorder(policy), factor * problem.beta
        batch = ppo.prepare(policy, critic, problem.reference, problem.tokens, problem.mask,
                            problem.finished, factor * problem.score, beta, config)
        ppo.update(policy, critic, problem.reference, (recorder, Recorder(critic)), batch, beta,
                   config, np.random.default_rng(0))
        found.append(recorder.gradient)
    close(found[1], found[0])


def test_kl_in_the_loss_without_the_kl_of_later_states_is_another_gradient():
    # catches a test that cannot tell the two apart: the term that the reward adds is not small
    problem = Problem(0, dtype=torch.float64)
    greedy, expected = gradient(problem, "loss", lam=1.0, priced=False), exact_gradient(problem)
    assert (greedy - expected).norm() / expected.norm() > 0.05


def test_critic_gradient_is_that_of_the_squared_distance_to_the_values():
    # catches returns that are whitened, shifted by one, or taken off another policy
    problem = Problem(0, dtype=torch.float64)
    policy, critic = moved(problem), ppo.ValueModel(RewardModel(problem.reference.config)).double()
    with torch.no_grad():
        logp = problem.logp(policy)
    weight = logp.sum(1).exp()
    config = ppo.Config(batch_size=len(weight), minibatches=1, lam=1.0, missing_eos=MISSING_EOS)
    batch = ppo.prepare(policy, critic, problem.reference, problem.tokens, problem.mask,
                        problem.finished, problem.score, problem.beta, config)
    found = 0.0
    for i, w in enumerate(weight):
        value = critic(problem.tokens[i:i + 1], problem.mask[i:i + 1])
        found = found + w * ppo.value_loss(value, batch["old_value"][i:i + 1],
                                           batch["returns"][i:i + 1], problem.mask[i:i + 1], 0.2)
    exact = problem.values(logp, "reward")
    error = (critic(problem.tokens, problem.mask) - exact) ** 2 / 2 * problem.mask * weight[:, None]
    close(*(flat(torch.autograd.grad(x, list(critic.parameters()), materialize_grads=True))
            for x in (found, error.sum())))


def test_reward_model_gradient_over_all_pairs():
    # catches a reversed pair, a mean over pairs, and a score read off the wrong token
    problem = Problem(0, dtype=torch.float64)
    torch.manual_seed(0)
    model = RewardModel(problem.reference.config).double()
    rows = problem.finished.nonzero()[:12, 0]
    true = problem.score[rows]
    scores = model.raw(problem.tokens[rows], problem.mask[rows])
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    wins = [1 / (1 + math.exp(true[j] - true[i])) for i, j in pairs]  # Bradley-Terry labels
    found = sum(w * reward_loss(scores[[i]], scores[[j]]) for w, (i, j) in zip(wins, pairs))
    # the exact objective: cross-entropy of the model's preferences, scores from plain hidden states
    hidden = [model.gpt(problem.tokens[[r], :t])[0, -1] for r, t in zip(rows, (
        problem.mask[rows].cumsum(1).argmax(1) + 1))]
    plain = torch.stack([h @ model.head.weight[0] + model.head.bias[0] for h in hidden])
    exact = -sum(w * (1 / (1 + (plain[j] - plain[i]).exp())).log() for w, (i, j) in
                 zip(wins, pairs))
    close(*(flat(torch.autograd.grad(x, list(model.parameters()), materialize_grads=True))
            for x in (found, exact)))


def test_sft_gradient_is_that_of_the_cross_entropy_to_the_data():
    # catches a shifted target and EOS left out of the loss: data distributed as pi*, enumerated
    problem = Problem(0, dtype=torch.float64)
    policy, data = moved(problem), problem.best.exp()
    logp = token_logprobs(policy, problem.tokens, problem.mask)
    found = sum(w * sft_loss(logp[i:i + 1], problem.mask[i:i + 1]) for i, w in enumerate(data))
    # token by token from the plain forward
    log_p = torch.log_softmax(policy.logits(policy(problem.tokens)).double(), -1)
    exact = 0.0
    for i, t in problem.mask.nonzero().tolist():
        exact = exact - data[i] * log_p[i, t - 1, problem.tokens[i, t]]
    close(*(flat(torch.autograd.grad(x, list(policy.parameters()))) for x in (found, exact)))


# --- DPO: every pair of responses, by its probability -------------------------------------------


def dpo_population_loss(problem, seq_logp, beta):
    """The real loss, weighted by both responses' probability and by Bradley-Terry."""
    winners, losers, weight = preferences(problem)
    loss = dpo.pair_loss(dpo.Config(loss="dpo", beta=beta), seq_logp, problem.ref_logp.sum(1),
                         problem.mask.sum(1), winners, losers)
    return (weight * loss).sum()


@pytest.mark.parametrize("temperature, beta", [(1.0, 1.0), (1.0, 0.1), (0.7, 1.0)])
def test_dpo_gradient_over_all_pairs(temperature, beta):
    # catches a reversed pair, a lost reference, EOS or beta, and a temperature left out
    problem = Problem(0, temperature, dtype=torch.float64)
    policy = moved(problem)
    params = list(policy.parameters())
    found = dpo_population_loss(problem, problem.logp(policy).sum(1), beta)
    # the exact objective: cross-entropy of the preferences sigmoid(beta (h_i - h_j)), each pair
    # once in either order, log-probabilities from the plain forward, token by token
    h, mu = [], []
    for row, mask in zip(problem.tokens, problem.mask):
        at = mask.nonzero()[:, 0].tolist()
        both = [torch.log_softmax(m.logits(m(row[None]))[0].double() / temperature, -1)
                for m in (policy, problem.reference)]
        logp, ref_logp = (sum(table[t - 1, row[t]] for t in at) for table in both)
        h.append(logp - ref_logp)
        mu.append(ref_logp.exp().item())
    gap = beta * (torch.stack(h)[:, None] - torch.stack(h))
    wins = 1 / (1 + (problem.score - problem.score[:, None]).exp())
    entropy = -wins * (1 / (1 + (-gap).exp())).log() - (1 - wins) * (1 / (1 + gap.exp())).log()
    each = torch.tensor(mu)[:, None] * torch.tensor(mu) * entropy
    exact = torch.triu(each, diagonal=1).sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    close(*(flat(torch.autograd.grad(x, params)) for x in (found, exact)))


def test_dpo_gradient_vanishes_at_the_optimum_and_only_there():
    # catches another fixed point: beta twice, a mean for the sum, the KL the other way round
    problem = Problem(0, dtype=torch.float64)
    beta = problem.beta
    log_ratio = problem.best - problem.ref_logp.sum(1)
    for shift in (0.0, 3.0):  # a constant of the prompt cancels
        assert (log_ratio - problem.score / beta).std() < 1e-6
        at = (problem.best + shift).requires_grad_()
        gradient = torch.autograd.grad(dpo_population_loss(problem, at, beta), at)[0]
        assert gradient.abs().max() < 1e-9
    for other in (problem.ref_logp.sum(1), problem.ref_logp.sum(1) + 2 * log_ratio):
        other = other.clone().requires_grad_()
        gradient = torch.autograd.grad(dpo_population_loss(problem, other, beta), other)[0]
        assert gradient.abs().max() > 1e-3


def test_both_log_probabilities_fall_at_the_optimum():
    # catches a table in the docs that is not what the formulas give, and a KL the other way round
    text = (ROOT / "docs" / "dpo.md").read_text().split("| problem |")[1]
    for problem in draw_problems(5):
        ref, score = problem.ref_logp.sum(1), problem.score
        log_ratio, mu = problem.best - ref, ref.exp()
        weight = 2 * mu[:, None] * mu * torch.sigmoid(score[:, None] - score)  # row beats column
        kl = (mu * (ref - problem.best)).sum()
        chosen, rejected = (weight * log_ratio[:, None]).sum(), (weight * log_ratio).sum()
        assert rejected < chosen < 0
        assert (chosen + rejected).item() / 2 == pytest.approx(-kl.item(), rel=1e-4)
        row = next(r for r in text.splitlines() if r.startswith(f"| {problem.seed} |"))
        figures = [x.item() for x in (chosen, rejected, kl)]
        assert [float(x) for x in row.split("|")[2:5]] == pytest.approx(figures, abs=2e-3)
    small = optimum(torch.tensor([0.1, 0.1, 0.8]).log(), torch.tensor([1.0, 0.0, 2.0]), 1.0).exp()
    assert small.tolist() == pytest.approx([0.043, 0.016, 0.941], abs=5e-4)


def test_dpo_gradient_vanishes_in_the_network_that_is_the_optimum():
    # catches a log-probability of other tokens than the response's: scores for which the policy is
    # pi*, so that the gradient of every weight has to be zero
    problem = Problem(0, dtype=torch.float64)
    policy = moved(problem)
    seq_logp, params, sizes = problem.logp(policy).sum(1), list(policy.parameters()), []
    for score in (problem.score, problem.beta * (seq_logp - problem.ref_logp.sum(1)).detach() + 5):
        problem.score = score
        loss = dpo_population_loss(problem, seq_logp, problem.beta)
        sizes.append(flat(torch.autograd.grad(loss, params, retain_graph=True)).norm().item())
    assert sizes[1] < 1e-6 * sizes[0]


# --- KL estimators -------------------------------------------------------------------------------


def kl_table(problem):
    """{name: (value / KL, gradient's relative error as a loss, and as a reward)}, of k1, k2, k3 and
    of k3 times the ratio to the sampler, which is 1 here but has a gradient.

    Of whole sequences (sum over tokens first) and "per token" (estimated at each token, then
    summed), at samples from the policy, exact by enumeration. As a loss: autograd through the
    estimator, samples fixed. As a reward: sum_y pi(y) k(y) dlog pi(y).
    """
    policy = moved(problem)
    params = list(policy.parameters())
    logp, ref_logp = problem.logp(policy), problem.ref_logp
    weight = logp.sum(1).exp().detach()
    grad = lambda x: flat(torch.autograd.grad(x, params, retain_graph=True))
    kl = (logp.sum(1).exp() * (logp - ref_logp).sum(1)).sum()
    exact, table = grad(kl), {}
    off = lambda g: ((g - exact).norm() / exact.norm()).item()
    summed = [x.sum(1, keepdim=True) for x in (logp, ref_logp)]
    for unit, (new, ref) in dict(sequence=summed, token=(logp, ref_logp)).items():
        estimates = kl_estimates(new, ref)
        estimates += (estimates[2] * (new - new.detach()).exp(),)
        for name, k in zip(("k1", "k2", "k3", "k3 x ratio"), estimates):
            k = k.sum(1)  # off the mask both log-probabilities are 0, and so is each estimate
            table[f"{name} per {unit}"] = (
                ((weight * k).sum() / kl).item(), off(grad((weight * k).sum())),
                off(grad((weight * k.detach() * logp.sum(1)).sum())))
    return table


def test_kl_estimators():
    # catches a reversed sign (k3 of the other direction) and an estimator in the wrong place
    problem = Problem(0, dtype=torch.float64)
    table = kl_table(problem)
    for unit in ("sequence", "token"):
        assert table[f"k1 per {unit}"][0] == pytest.approx(1)  # k1 and k3: the value is right
        assert table[f"k3 per {unit}"][0] == pytest.approx(1)
        assert abs(table[f"k2 per {unit}"][0] - 1) > 0.02  # k2: it is not
        assert table[f"k1 per {unit}"][2] <= 1e-4  # in the reward k1 is right
        assert table[f"k2 per {unit}"][2] > 0.05 and table[f"k3 per {unit}"][2] > 0.05
        assert table[f"k1 per {unit}"][1] == pytest.approx(1, abs=1e-4)  # in the loss: no gradient
        assert table[f"k3 per {unit}"][1] > 0.05
    assert table["k2 per sequence"][1] <= 1e-4  # in the loss k2 of the whole sequence is right
    assert table["k3 x ratio per sequence"][1] <= 1e-4  # and so is k3 with its ratio
    assert table["k3 x ratio per token"][1] == pytest.approx(table["k2 per token"][1], rel=1e-4)
    assert table["k2 per token"][1] > 0.05  # of single tokens it is greedy, see ppo.next_state_kl


def test_table_in_the_docs():
    # catches a table that no longer shows what the code does
    text = (ROOT / "docs" / "kl.md").read_text()
    for name, figures in kl_table(Problem(0, dtype=torch.float64)).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert [float(x) for x in row.split("|")[2:5]] == pytest.approx(figures, abs=2e-3)


def test_k1_and_k3_of_ppo_are_these():
    # catches a reward that pays for drift, and approx_kl in the wrong direction
    problem = Problem(0, dtype=torch.float64)
    with torch.no_grad():
        logp, mask = problem.logp(moved(problem)), problem.mask
    k1, _, k3 = kl_estimates(problem.ref_logp, logp)
    reward = ppo.token_rewards(problem.score * 0, logp, problem.ref_logp, mask, 1.0)
    torch.testing.assert_close(reward, k1 * mask)
    # old -> new: sampled from the reference, moved to the policy
    info = ppo.policy_loss(logp, problem.ref_logp, mask, mask, 0.2)[1]
    torch.testing.assert_close(info["approx_kl"], (k3 * mask).sum())


def test_enumeration_is_complete():
    # catches a response that is missing or counted twice, and PAD or EOS with leaking probability
    for temperature in (1.0, 0.7):
        problem = Problem(3, temperature, dtype=torch.float64)
        policy = moved(problem)
        assert isinstance(policy, GPT) and problem.mask.sum(1).max() == LENGTH
        for i in range(int(problem.prompt.max()) + 1):
            total = problem.logp(policy).sum(1).exp()[problem.prompt == i].sum().item()
            assert total == pytest.approx(1, abs=1e-5)
            assert problem.best.exp()[problem.prompt == i].sum().item() == pytest.approx(1)
