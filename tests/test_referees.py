"""Our numbers against independent libraries; each test skips where its library is missing.

The logits of GPT-2 are in test_model.py.
"""

import collections
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rows_from
from data.load import Element
from data.records import collate
from dpo import (
    Config,
    implicit_reward,
    kl_baseline,
    kto_loss,
    mismatch,
    pair_loss,
)
from model import GPT, GPTConfig, generate, token_logprobs, token_stats
from ppo import gae, policy_loss, token_rewards, whiten
from reward import reward_loss


def library(name):
    return pytest.importorskip(name, reason=f"needs {name} (requirements-dev.txt)")


def make_twins(seed):
    """Our GPT and transformers' GPT-2 with the same weights; every bias and norm is random too."""
    transformers = library("transformers")
    torch.manual_seed(seed)
    ours = GPT(GPTConfig(vocab_size=64, n_tokens=61, block_size=48, n_layer=3, n_head=4,
                         n_embd=32)).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1 or "wpe" in name:
                p.add_(torch.randn_like(p) * 0.1)
            if "c_" in name and p.dim() == 2:  # so that greedy text depends on what was read
                p.mul_(3)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4, eos_token_id=None,
        bos_token_id=None)).eval()
    weights = {}
    for name, value in ours.state_dict().items():
        # GPT-2's Conv1D stores (in, out), nn.Linear (out, in)
        turned = name.startswith("h.") and value.dim() == 2
        weights[f"transformer.{name}"] = value.T if turned else value
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = ours.wte.weight[:61]
    theirs.load_state_dict(weights)
    return ours, theirs


@pytest.fixture
def twins():
    return make_twins(0)


@torch.no_grad()
def test_log_probabilities_match_transformers(twins):
    # catches a shift by one, padding that is seen, a temperature in the wrong place: 1e-5
    ours, theirs = twins
    generator = torch.Generator().manual_seed(0)
    lengths, starts = [20, 7, 13], [5, 3, 1]
    tokens, mask = torch.full((3, 20), 61), torch.zeros(3, 20)
    for b, (n, s) in enumerate(zip(lengths, starts)):
        tokens[b, :n] = torch.randint(0, 61, (n,), generator=generator)
        mask[b, s:n] = 1
    logp = token_logprobs(ours, tokens, mask, temperature=0.7)
    for b, (n, s) in enumerate(zip(lengths, starts)):
        row = tokens[b:b + 1, :n]
        expected = F.log_softmax(theirs(row).logits[0] / 0.7, -1)
        expected = expected[:-1].gather(1, row[0, 1:, None])[:, 0]
        torch.testing.assert_close(logp[b, s:n], expected[s - 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sft_loss_matches_transformers(twins):
    # catches a loss over prompt tokens or another normalisation: theirs is the mean over labels
    from sft import sft_loss
    ours, theirs = twins
    tokens = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) >= torch.tensor([3, 5, 7, 9])[:, None]).float()
    loss = sft_loss(token_logprobs(ours, tokens, mask), mask) / mask.sum()
    labels = tokens.masked_fill(mask == 0, -100)
    torch.testing.assert_close(loss, theirs(tokens, labels=labels).loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_greedy_generation_matches_transformers(twins):
    # catches a cache, a position or a stop that is off by one: token for token
    ours, theirs = twins
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, n).tolist() for n in (1, 4, 9, 2, 15, 6)]
    tokens, mask, _ = generate(ours, prompts, 20, -1, temperature=0)
    eos = tokens[1, 12].item()  # so that EOS is said
    tokens, mask, done = generate(ours, prompts, 20, eos, temperature=0)
    assert done.any()
    said = set()
    for b, prompt in enumerate(prompts):
        row = torch.tensor([prompt])
        expected = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=20,
                                   do_sample=False, eos_token_id=eos, pad_token_id=0)[0]
        found = tokens[b, :len(prompt) + int(mask[b].sum())].tolist()
        assert found == expected.tolist()
        assert done[b].item() == (found[-1] == eos)
        said |= set(found[len(prompt):])
    assert len(said) > 3


@torch.no_grad()
def test_entropy_and_kl_match_torch_distributions(twins):
    # catches KL in the wrong direction and a sum over the wrong axis
    ours, _ = twins
    torch.manual_seed(1)
    reference = GPT(ours.config)
    tokens, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0., 1, 1, 1]])
    _, entropy, kl, _ = token_stats(ours, tokens, mask, 0.7, True, reference)
    p, q = (torch.distributions.Categorical(logits=m.logits(m(tokens))[0, :-1] / 0.7)
            for m in (ours, reference))
    torch.testing.assert_close(entropy[0, 1:], p.entropy(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kl[0, 1:], torch.distributions.kl_divergence(p, q), atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_matches_torchrl(gamma, lam):
    # catches a recursion over prompt or padding, and a bootstrap behind the last action
    library("torchrl")
    from torchrl.objectives.value.functional import generalized_advantage_estimate
    torch.manual_seed(0)
    starts, ends, T = [1, 3, 2, 5], [9, 4, 7, 6], 9
    t = torch.arange(T)
    mask = ((t >= torch.tensor(starts)[:, None]) & (t < torch.tensor(ends)[:, None])).double()
    logp, ref_logp, value = (torch.randn(4, T).double() for _ in range(3))
    reward = token_rewards(torch.randn(4).double(), logp, ref_logp, mask, 0.2)
    advantage, returns = gae(reward, value * mask, mask, gamma, lam)
    for b, (s, e) in enumerate(zip(starts, ends)):  # theirs: one episode, (time, 1), no padding
        v = value[b, s:e, None]
        done = torch.zeros(e - s, 1, dtype=torch.bool)
        done[-1] = True
        expected, target = generalized_advantage_estimate(
            gamma, lam, v, torch.cat([v[1:], torch.full((1, 1), 99.).double()]),
            reward[b, s:e, None], done)
        torch.testing.assert_close(advantage[b, s:e], expected[:, 0])
        torch.testing.assert_close(returns[b, s:e], target[:, 0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_policy_loss_matches_torchrl(sign):
    # catches max for min, a clip of the wrong thing, and a lost sign: value and gradient
    library("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
    from tensordict.nn import TensorDictModule as Module
    from torchrl.objectives import ClipPPOLoss
    torch.manual_seed(0)
    N, V = 40, 5
    table = torch.nn.Embedding(N, V)  # a state's logits: the policy of N states
    actor = ProbabilisticTensorDictSequential(
        Module(table, in_keys=["state"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], out_keys=["action"],
                                      distribution_class=torch.distributions.Categorical,
                                      return_log_prob=True, log_prob_key="logp"))
    action, advantage = torch.randint(0, V, (N,)), sign * torch.rand(N)
    logp = torch.distributions.Categorical(logits=table.weight).log_prob(action)
    old_logp = (logp + 0.5 * torch.randn(N)).detach()
    loss, info = policy_loss(logp[:, None], old_logp[:, None], advantage[:, None],
                             torch.ones(N, 1), 0.2)
    gradient = torch.autograd.grad(loss, table.weight)[0]

    theirs = ClipPPOLoss(actor, clip_epsilon=0.2, entropy_bonus=False, reduction="sum")
    theirs.set_keys(action="action", sample_log_prob="old_logp", advantage="advantage")
    out = theirs(TensorDict(dict(state=torch.arange(N), action=action, old_logp=old_logp,
                                 advantage=advantage[:, None]), batch_size=[N]))
    expected = out["loss_objective"]
    expected_gradient = torch.autograd.grad(expected, list(theirs.actor_network_params.values(
        include_nested=True, leaves_only=True)))[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    # their clip fraction counts every ratio outside the range, ours those where the clip acts
    outside = ((logp - old_logp).exp() - 1).abs() > 0.2
    assert out["clip_fraction"].item() == pytest.approx(outside.float().mean().item())
    assert info["clip_fraction"] <= outside.sum()


def test_whitening_matches_scipy():
    # catches a mean or variance over padding, and n - 1 for n
    stats = library("scipy.stats")
    torch.manual_seed(0)
    x, mask = torch.randn(5, 9).double() * 3 + 1, (torch.rand(5, 9) > 0.4).double()
    expected = stats.mstats.zscore(np.ma.masked_array(x.numpy(), mask.numpy() == 0), axis=None)
    kept = mask.bool()
    torch.testing.assert_close(whiten(x, mask)[kept], torch.from_numpy(expected.data)[kept])


def test_bradley_terry_matches_choix():
    # catches a reversed pair and a mean over pairs: value, gradient and the optimum
    choix = library("choix")
    from choix.opt import PairwiseFcts
    strength = np.linspace(-1, 1, 6)
    rng = np.random.default_rng(0)
    pairs = [(i, j) if rng.random() < 1 / (1 + math.exp(strength[j] - strength[i])) else (j, i)
             for i, j in rng.integers(0, 6, (80, 2)).tolist() if i != j]
    winners, losers = map(list, zip(*pairs))
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    reward_loss(scores[winners], scores[losers]).backward()
    functions, at = PairwiseFcts(pairs, penalty=0.0), scores.detach().numpy()
    loss = reward_loss(scores[winners], scores[losers])
    assert loss.item() == pytest.approx(functions.objective(at))
    np.testing.assert_allclose(scores.grad.numpy(), functions.gradient(at), rtol=1e-9)

    optimizer = torch.optim.LBFGS([scores], lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = reward_loss(scores[winners], scores[losers])
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = scores.detach().numpy()
    np.testing.assert_allclose(fitted - fitted.mean(), choix.opt_pairwise(6, pairs), atol=1e-4)


# --- the DPO family against TRL ------------------------------------------------------------------


class Answers:
    """Four prompts, each with a chosen and a rejected answer, as our rows and as TRL's inputs."""

    def __init__(self):
        library("trl")
        (self.policy, self.their_policy), (self.reference, self.their_reference) = (
            make_twins(seed) for seed in (0, 1))
        for p in (*self.reference.parameters(), *self.their_reference.parameters()):
            p.requires_grad_(False)
        rng = np.random.default_rng(0)
        draw = lambda n: rng.integers(1, 61, n).tolist()
        rows = []
        for start, *lengths in ((3, 5, 2), (1, 4, 9), (6, 3, 3), (2, 7, 4)):
            prompt = draw(start)
            answers = [draw(n) + [0] for n in lengths]  # 0 stands for EOS
            rows += [(prompt + a, [0] * start + [1] * len(a)) for a in answers]
        source = rows_from(rows)
        self.elements = [Element(source, (n, n + 1), [(0, 1)], [1, -1], [0])
                         for n in range(0, len(rows), 2)]
        order = [(e, n) for n in (0, 1) for e in self.elements]  # theirs: all chosen, all rejected
        self.tokens, self.mask = collate([e.rows[n] for e, n in order],
                                         [e.masks[n] for e, n in order], 61)
        others = [mismatch(e, f, 0) for e, f in zip(self.elements, self.elements[1:]
                                                 + self.elements[:1])]
        self.kl_tokens, self.kl_mask = collate(*zip(*others), 61)

    def ours(self, tokens, mask):
        """(seq_logp, ref_seq_logp, length), (rows,)."""
        return (token_logprobs(self.policy, tokens, mask).sum(1),
                token_logprobs(self.reference, tokens, mask).sum(1), mask.sum(1))

    def inputs(self, tokens, mask, prefix=""):
        """What TRL's collators hand to its losses; PAD (61) becomes an id that their model has."""
        real = tokens != 61
        return {f"{prefix}input_ids": tokens * real, f"{prefix}attention_mask": real.long(),
                f"{prefix}completion_mask": mask.long()}

    def trainer(self, kind, **settings):
        """A TRL trainer with the fields that its losses read, and no training around them."""
        trainer, same = object.__new__(kind), lambda x: x
        vars(trainer).update(
            model=self.their_policy, ref_model=self.their_reference, aux_loss_enabled=False,
            accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same,
                                        gather_for_metrics=same),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None), precompute_ref_logps=False,
            use_liger_kernel=False, _total_train_tokens=0, **settings,
            _metrics=collections.defaultdict(lambda: collections.defaultdict(list)))
        return trainer

    def compare(self, loss, expected):
        """Value, and the gradient of the last norm and of the (tied) embedding, to 1e-5."""
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gpt = self.their_policy.transformer
        found = torch.autograd.grad(loss, [self.policy.ln_f.weight, self.policy.wte.weight])
        expected = torch.autograd.grad(expected, [gpt.ln_f.weight, gpt.wte.weight])
        for mine, theirs in zip((found[0], found[1][:61]), expected):
            assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("loss, name, beta", [
    ("dpo", "sigmoid", 0.1), ("dpo", "sigmoid", 0.5), ("ipo_mean", "ipo", 0.1),
    ("dpo_norm", "sigmoid_norm", 2.0)])
def test_dpo_matches_trl(loss, name, beta):
    # catches a sum without EOS, another length, a reversed pair, beta or reference misplaced: from
    # the same weights and tokens, each side with its own log-probabilities
    a = Answers()
    from trl import DPOTrainer
    trainer = a.trainer(DPOTrainer, loss_types=[name], loss_weights=[1.0], beta=beta, ld_alpha=None,
                        f_divergence_type="reverse_kl", use_weighting=False)
    expected = trainer._compute_loss(a.their_policy, a.inputs(a.tokens, a.mask), False)
    seq_logp, ref, length = a.ours(a.tokens, a.mask)
    config, winners, losers = Config(loss=loss, beta=beta), list(range(4)), list(range(4, 8))
    a.compare(pair_loss(config, seq_logp, ref, length, winners, losers).mean(), expected)
    said = {k: v[-1] for k, v in trainer._metrics["eval"].items()}
    assert seq_logp[winners].mean().item() == pytest.approx(said["logps/chosen"], rel=1e-5)
    assert seq_logp[losers].mean().item() == pytest.approx(said["logps/rejected"], rel=1e-5)
    if loss == "dpo":  # theirs are sums for every loss
        reward = implicit_reward(seq_logp, ref, length, loss, beta)
        assert reward[winners].mean().item() == pytest.approx(said["rewards/chosen"], rel=1e-4)
        margin = (reward[winners] - reward[losers]).mean().item()
        assert margin == pytest.approx(said["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("loss, name", [("cdpo", "sigmoid"), ("ipo", "ipo"), ("simpo", "simpo")])
def test_cpo_trainer_has_the_other_pair_losses(monkeypatch, loss, name):
    # catches smoothing on the wrong side, gamma for gamma / beta, simpo with sums
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    a = Answers()
    from trl.experimental.cpo import CPOTrainer
    config = Config(loss=loss, beta=2.0 if loss == "simpo" else 0.3, label_smoothing=0.2,
                    simpo_margin=0.4)
    # CPO has no reference: for the two that need one, it gets log-ratios in the place of
    # log-probabilities. Its simpo_gamma is beta times our margin.
    trainer = a.trainer(CPOTrainer, loss_type=name, beta=config.beta, alpha=0.0,
                        label_smoothing=0.2 if loss == "cdpo" else 0.0, simpo_gamma=0.8)
    inputs = a.inputs(a.tokens, a.mask)
    labels = inputs["input_ids"].masked_fill(a.mask == 0, -100)
    average = loss == "simpo"
    logps = [CPOTrainer.get_batch_logps(m(inputs["input_ids"]).logits, labels, average)
             for m in (a.their_policy, a.their_reference)]
    given = logps[0] if average else logps[0] - logps[1]
    expected = trainer.cpo_loss(given[:4], given[4:])[0]
    found = pair_loss(config, *a.ours(a.tokens, a.mask), list(range(4)), list(range(4, 8)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    a.compare(found.mean(), expected.mean())


def test_kto_matches_trl():
    # catches flipped labels, swapped weights, z0 from other answers, unclamped or with a gradient
    a = Answers()
    from trl import KTOTrainer
    config = Config(loss="kto", beta=0.2, desirable=1.5, undesirable=0.7)
    ratio = lambda tokens, mask: a.ours(tokens, mask)[:2]
    z0 = []
    for swap in (False, True):  # one way round the KL estimate is below zero
        if swap:
            for pair in (("policy", "reference"), ("their_policy", "their_reference")):
                vars(a).update(zip(pair, [getattr(a, name) for name in pair[::-1]]))
            for p in (*a.policy.parameters(), *a.their_policy.parameters()):
                p.requires_grad_(True)
        trainer = a.trainer(KTOTrainer, loss_type="kto", calculate_KL=True, beta=config.beta,
                            desirable_weight=1.5, undesirable_weight=0.7)
        label = torch.arange(8) < 4
        expected = trainer._compute_loss(a.their_policy, dict(
            a.inputs(a.tokens, a.mask), **a.inputs(a.kl_tokens, a.kl_mask, "KL_"), label=label),
            False)
        seq_logp, ref = ratio(a.tokens, a.mask)
        z0.append(kl_baseline(*ratio(a.kl_tokens, a.kl_mask)))
        assert z0[-1].item() == pytest.approx(trainer._metrics["eval"]["kl"][-1], rel=1e-4)
        a.compare(kto_loss(seq_logp - ref, label.float() * 2 - 1, z0[-1], config).mean(), expected)
    assert min(z0) == 0 and max(z0) > 0.1
