"""PPO's mathematics, each function against numbers worked out by hand or by a plain loop."""

import copy
import json
import math

import cli
import common
import evaluate
import numpy as np
import ppo
import pytest
import torch
import torch.nn.functional as F
from data import batches
from data.synthetic.gold import gold_reward
from data.synthetic.world import all_prompts
from data.tokenizer import load_tokenizer
from evaluate import check_start
from model import GPT, GPTConfig
from ppo import (
    Config,
    RunningStd,
    ValueModel,
    adapt_beta,
    gae,
    masked_mean,
    policy_loss,
    prepare,
    token_rewards,
    update,
    value_loss,
    whiten,
)
from reward import RewardModel
from tiny_runs import FLAGS, make_inputs, spy_temperatures

MASK = torch.tensor([[0., 1, 1, 1, 0], [0., 0, 1, 1, 1]]).double()


def test_score_lands_on_the_last_action_and_kl_on_every_one():
    # catches the score one slot behind EOS, a wrong KL sign, and KL on prompt or padding
    logp = torch.full((2, 5), -1.0).double()
    ref_logp = torch.full((2, 5), -1.5).double()  # the policy is 0.5 nats above the reference
    reward = token_rewards(torch.tensor([2.0, -3.0]).double(), logp, ref_logp, MASK, beta=0.1)
    expected = [[0, -0.05, -0.05, 1.95, 0], [0, 0, -0.05, -0.05, -3.05]]
    torch.testing.assert_close(reward, torch.tensor(expected).double())


def test_gae_by_hand():
    # catches a wrong recursion: two actions, gamma 0.9, lambda 0.5
    reward = torch.tensor([[0., 1., 2., 8.]]).double()
    value = torch.tensor([[7., 0.5, 0.25, 9.]]).double()
    mask = torch.tensor([[0., 1., 1., 0.]]).double()
    advantage, returns = gae(reward, value, mask, 0.9, 0.5)
    last = 2 - 0.25  # nothing follows the last action, whatever stands in the padding
    first = 1 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * last
    torch.testing.assert_close(advantage, torch.tensor([[0, first, last, 0]]).double())
    torch.testing.assert_close(returns, torch.tensor([[0, first + 0.5, last + 0.25, 0]]).double())


def test_gae_is_the_recursion_of_each_row():
    # catches a column that is shifted, or taken from the wrong end
    torch.manual_seed(0)
    reward, value = torch.randn(2, 6, 40).double()
    starts, ends = [1, 5, 9, 0, 20, 39], [40, 6, 30, 40, 35, 40]
    columns = torch.arange(40)
    mask = torch.stack([(columns >= a) & (columns < b) for a, b in zip(starts, ends)]).double()
    advantage, returns = gae(reward, value, mask, 0.97, 0.9)
    expected = torch.zeros(6, 40).double()
    for b, (start, end) in enumerate(zip(starts, ends)):
        later = later_value = 0.0
        for t in reversed(range(start, end)):
            later = reward[b, t] + 0.97 * later_value - value[b, t] + 0.97 * 0.9 * later
            expected[b, t], later_value = later, value[b, t]
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, (expected + value) * mask, rtol=0, atol=1e-12)


def test_gae_limits():
    # catches lambda in the wrong place: lambda 1 is return minus value, lambda 0 one-step TD error
    torch.manual_seed(0)
    reward, value = torch.randn(2, 5).double() * MASK, torch.randn(2, 5).double() * MASK
    advantage, returns = gae(reward, value, MASK, 1.0, 1.0)
    to_go = reward.flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantage, (to_go - value) * MASK)
    advantage, _ = gae(reward, value, MASK, 0.9, 0.0)
    following = torch.cat([value[:, 1:] * MASK[:, 1:], torch.zeros(2, 1).double()], 1)
    torch.testing.assert_close(advantage, (reward + 0.9 * following - value) * MASK)


def test_whiten_ignores_padding():
    # catches whitening over padding and an inverted mean flag
    x = torch.tensor([[99., 1, 2, 3, 99], [99, 99, 4, 5, 6]]).double()
    white = whiten(x, MASK)
    kept = white[MASK.bool()]
    assert abs(kept.mean()) < 1e-9 and abs(kept.pow(2).mean() - 1) < 1e-6
    assert (white[~MASK.bool()] == 0).all()
    assert masked_mean(x, MASK) == 3.5


@pytest.mark.parametrize("advantage, ratio, gradient", [
    (1.0, 1.5, 0.0),  # good action, already up by more than the clip: no further push
    (1.0, 0.5, -0.5),  # good action that went down: full gradient, -A ratio
    (-1.0, 0.5, 0.0),  # bad action, already down: no further push
    (-1.0, 1.5, 1.5),  # bad action that went up: full gradient
])
def test_clipped_surrogate_gradient(advantage, ratio, gradient):
    # catches max for min, a clip on the wrong side, a lost sign
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1).double()
    loss, info = policy_loss(logp, torch.zeros(1, 1).double(), one * advantage, one, clip=0.2)
    loss.backward()
    assert abs(logp.grad.item() - gradient) < 1e-9
    assert info["clip_fraction"].item() == float(gradient == 0)


def test_policy_loss_and_metrics_ignore_what_is_masked():
    # catches padding in the sums, the denominators' metrics and the largest ratio
    torch.manual_seed(0)
    logp, old = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    advantage = torch.randn(2, 5).double()
    junk = torch.full((2, 5), 50.0).double() * (1 - MASK)
    loss, info = policy_loss(logp, old, advantage, MASK, 0.2)
    loss2, info2 = policy_loss(logp + junk, old - junk, advantage + junk, MASK, 0.2)
    torch.testing.assert_close((loss, info), (loss2, info2))


def test_value_loss_is_pessimistic():
    # catches min for max and a clip around the wrong value
    one = torch.ones(1, 1).double()
    loss = lambda v: value_loss(one * v, one * 0.0, one * 1.0, one, clip=0.2).item()
    assert abs(loss(0.1) - 0.5 * 0.9**2) < 1e-9  # inside the clip
    assert abs(loss(0.9) - 0.5 * 0.8**2) < 1e-9  # moved too fast towards the return
    assert abs(loss(-0.5) - 0.5 * 1.5**2) < 1e-9  # moved away: the larger error counts


def test_adaptive_beta():
    # catches an unclipped error and a wrong direction: Ziegler's numbers, 512 / 10,000
    assert adapt_beta(0.15, 6.6, 6.0, 512, 10000) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    assert adapt_beta(0.15, 60., 6.0, 512, 10000) == pytest.approx(0.15 * (1 + 0.2 * 0.0512))
    assert adapt_beta(0.15, 0.0, 6.0, 512, 10000) == pytest.approx(0.15 * (1 - 0.2 * 0.0512))


def test_running_std():
    # catches a std of the last batch only
    torch.manual_seed(0)
    parts, running = [torch.randn(n) * 3 + 1 for n in (5, 17, 40)], RunningStd()
    for part in parts:
        std = running.update(part)
    assert std == pytest.approx(torch.cat(parts).std(correction=0).item(), rel=1e-5)


def test_scaling_reward_and_beta_together_changes_nothing():
    # catches a term of the objective that does not scale: advantages are whitened, so equal
    torch.manual_seed(0)
    logp, ref = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    score, value = torch.randn(2).double(), torch.randn(2, 5).double() * MASK

    def advantage(factor):
        reward = token_rewards(factor * score, logp, ref, MASK, 0.1 * factor)
        return whiten(gae(reward, factor * value, MASK, 1.0, 0.95)[0], MASK)

    torch.testing.assert_close(advantage(1.0), advantage(7.0))


def test_critic_starts_as_the_reward_model(tiny):
    # catches a critic in other units, or one that sees the token whose action it values
    model = RewardModel(tiny.config).double().eval()
    model.shift.fill_(0.7)
    model.scale.fill_(2.5)
    critic = ValueModel(model).double().eval()
    tokens = torch.tensor([[1, 2, 3, 4, 0]])
    value = critic(tokens, torch.ones(1, 5))
    mask = torch.tensor([[0., 0, 1, 1, 0]])  # a response that ends at position 3
    torch.testing.assert_close(value[0, 4], model(tokens, mask)[0].detach(), rtol=1e-5, atol=1e-6)
    changed = tokens.clone()
    changed[0, 3] = 9
    torch.testing.assert_close(critic(changed, torch.ones(1, 5))[0, :4], value[0, :4])
    assert not torch.allclose(critic(changed, torch.ones(1, 5))[0, 4], value[0, 4])


def test_kl_term_keeps_its_sign():
    # catches a penalty clamped at 0 or made absolute: its mean would no longer be the KL
    logp = torch.tensor([[0.0, -2.0, -1.0, -0.5, 0.0]]).double()
    ref_logp = torch.tensor([[0.0, -1.0, -1.0, -2.5, 0.0]]).double()
    reward = token_rewards(torch.zeros(1).double(), logp, ref_logp, MASK[:1], beta=0.1)
    torch.testing.assert_close(reward, torch.tensor([[0, 0.1, 0, -0.2, 0]]).double())


def test_approx_kl_by_hand():
    # catches k3 the wrong way round: samples come from the OLD policy, so KL(old || new) is the
    # mean of ratio - 1 - log ratio; for ratios 2 and 1/2, together 0.5, the reverse gives 0.5 too,
    # for 2 alone 0.307 against 0.193
    log_ratio = torch.tensor([[math.log(2.0)]], dtype=torch.float64)
    one = torch.ones(1, 1).double()
    _, info = policy_loss(log_ratio, one * 0, one, one, clip=0.2)
    assert info["approx_kl"].item() == pytest.approx(2 - 1 - math.log(2))


# --- a whole iteration ---------------------------------------------------------------------------

TOKENS = torch.tensor([[1, 2, 3, 4, 0, 13], [5, 6, 7, 8, 9, 10], [8, 9, 0, 13, 13, 13]])
ROW_MASK = torch.tensor([[0., 0, 1, 1, 1, 0], [0., 1, 1, 1, 1, 1], [0., 1, 1, 0, 0, 0]]).double()
FINISHED, SCORES = torch.tensor([True, False, True]), torch.tensor([2.0, 50.0, -1.0]).double()


@pytest.fixture
def networks(tiny):
    """(policy, critic, reference), three different networks."""
    torch.manual_seed(1)
    reference = GPT(tiny.config).double().eval().requires_grad_(False)
    reward_model = RewardModel(tiny.config).double()
    reward_model.shift.fill_(0.3)
    return tiny, ValueModel(reward_model).double().eval(), reference


def settings(**change):
    return Config(**dict(batch_size=3, minibatches=1, epochs=1, temperature=0.7, gamma=0.9, lam=0.8,
                         beta=0.3, missing_eos=-4.0, grad_clip=1e9) | change)


def distributions(model, temperature):
    """log p(. | tokens[:, :t]) of every position t of TOKENS but the first, (B, T - 1, V)."""
    return F.log_softmax(model.logits(model(TOKENS))[:, :-1].double() / temperature, -1)


def of_tokens(logp_all):
    """Those of the tokens that stand there, (B, T); what PAD would get is never looked at."""
    targets = TOKENS[:, 1:, None].clamp(max=12)
    return F.pad(logp_all.gather(2, targets)[..., 0], (1, 0)) * ROW_MASK


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("whitened", [True, False])
def test_prepare(networks, whitened):
    # catches old log-probabilities of another model or temperature, a reference without either, a
    # cut response that keeps its score, values that are not the critic's, whitening that is
    # skipped or that reaches the critic's target
    policy, critic, reference = networks
    batch = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES, 0.3, settings(whiten=whitened))
    p, q = distributions(policy, 0.7), distributions(reference, 0.7)
    close(batch["old_logp"], of_tokens(p))
    close(batch["ref_logp"], of_tokens(q))
    close(batch["entropy"], F.pad(-(p.exp() * p).sum(-1), (1, 0)) * ROW_MASK)
    close(batch["exact_kl"], F.pad((p.exp() * (p - q)).sum(-1), (1, 0)) * ROW_MASK)
    close(batch["old_value"], critic(TOKENS, ROW_MASK))
    assert batch["score"].tolist() == [2.0, -4.0, -1.0]
    reward = -0.3 * (of_tokens(p) - of_tokens(q))
    reward[[0, 1, 2], [4, 5, 2]] += torch.tensor([2.0, -4.0, -1.0]).double()
    close(batch["reward"], reward)
    raw, returns = gae(reward, critic(TOKENS, ROW_MASK), ROW_MASK, 0.9, 0.8)
    close(batch["returns"], returns)
    kept = raw[ROW_MASK.bool()]
    expected = (raw - kept.mean()) / kept.std(correction=0) * ROW_MASK if whitened else raw
    close(batch["advantage"], expected)
    assert float(batch["scale"]) == pytest.approx(kept.std(correction=0).item() if whitened else 1,
                                                  rel=1e-4)


@torch.no_grad()
def test_prepare_with_kl_in_the_loss(networks):
    # catches a KL that is greedy (an action does not pay for the states it leads to), that counts
    # an action's own state twice, or that is in the reward a second time as k1
    batch = prepare(*networks, TOKENS, ROW_MASK, FINISHED, SCORES, 0.3, settings(kl_in="loss"))
    kl = batch["exact_kl"]
    expected = torch.zeros(3, 6).double()
    for b, (first, last, score) in enumerate([(2, 4, 2.0), (1, 5, -4.0), (1, 2, -1.0)]):
        for t in range(first, last):
            expected[b, t] = -0.3 * kl[b, t + 1]
        expected[b, last] = score
    close(batch["reward"], expected)


def made_up_batch(policy, reference):
    """A batch as prepare returns it, of random numbers: ratios, values and scale are not 1 or 0."""
    torch.manual_seed(2)
    draw = lambda: torch.randn(3, 6).double() * ROW_MASK
    with torch.no_grad():
        logp = of_tokens(distributions(policy, 0.7))
        ref_logp = of_tokens(distributions(reference, 0.7))
    return dict(tokens=TOKENS, mask=ROW_MASK, old_logp=logp + 0.1 * draw(), ref_logp=ref_logp,
                advantage=draw(), old_value=draw(), returns=draw(), scale=torch.tensor(2.5))


def step(networks, config, batch, text=None):
    """One call of update with plain gradient descent, lr 1: (gradients, critic's gradients)."""
    policy, critic, reference = networks
    policy, critic = copy.deepcopy(policy), copy.deepcopy(critic)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (policy, critic)]
    update(policy, critic, reference, optimizers, batch, 0.3, config, np.random.default_rng(0),
           text)
    return [torch.cat([(a - b).flatten() for a, b in zip(old.parameters(), new.parameters())])
            .detach() for old, new in zip(networks, (policy, critic))]


@pytest.mark.parametrize("option", [
    {}, dict(kl_in="loss"), dict(entropy_coef=0.2), dict(ptx_coef=0.5, ptx_batch=2)])
def test_update_is_the_gradient_of_the_written_loss(networks, option):
    # catches a term that is dropped or has the wrong sign, unit, temperature or denominator, k1 as
    # a loss, and a ratio to anything but the rollout: the loss is written out from whole
    # distributions, without the clips (they are wide here, and have their own tests)
    policy, critic, reference = networks
    batch, text = made_up_batch(policy, reference), torch.tensor([[1, 2, 3, 4, 5, 6]] * 4)
    found, found_critic = step(networks, settings(clip=1e6, value_clip=1e6, **option), batch, text)
    p, q = distributions(policy, 0.7), distributions(reference, 0.7)
    state_mask = ROW_MASK[:, 1:]
    ratio = (of_tokens(p) - batch["old_logp"]).exp()
    loss = -(ratio * batch["advantage"] * ROW_MASK).sum()
    if option.get("kl_in") == "loss":
        loss = loss + 0.3 / 2.5 * ((p.exp() * (p - q)).sum(-1) * state_mask).sum()
    if "entropy_coef" in option:
        loss = loss + 0.2 * ((p.exp() * p).sum(-1) * state_mask).sum()
    loss = loss / 10  # response tokens
    if "ptx_coef" in option:
        everywhere = F.log_softmax(policy.logits(policy(text[:1]))[0, :-1], -1)
        loss = loss - 0.5 * everywhere[range(5), [2, 3, 4, 5, 6]].mean()
    value = (0.5 * (critic(TOKENS, ROW_MASK) - batch["returns"]) ** 2 * ROW_MASK).sum() / 10
    for model, objective, moved in ((policy, loss, found), (critic, value, found_critic)):
        gradients = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
        expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                              for p, g in zip(model.parameters(), gradients)])
        assert (moved - expected).norm() < 1e-4 * expected.norm()


def test_gradients_are_clipped_before_the_step(networks):
    # catches a clip before backward or after the step, and one norm for both networks
    batch = made_up_batch(networks[0], networks[2])
    free = step(networks, settings(), batch)
    for moved, whole in zip(step(networks, settings(grad_clip=0.01), batch), free):
        assert whole.norm() > 0.05
        torch.testing.assert_close(moved, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)


# --- whole runs on tiny inputs -------------------------------------------------------------------


def run(folder, monkeypatch, out, *flags):
    """ppo.main in this process; returns the rows of its log, by kind."""
    monkeypatch.chdir(folder)
    given = {f.split("=")[0]: f for f in (*FLAGS["ppo"], *flags, f"--out={out}")}
    ppo.main(cli.read_flags(Config, given.values()))
    rows = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] == "step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("ppo"))


def test_settings_reach_every_function(folder, monkeypatch):
    # catches a temperature that one caller forgets, a model with dropout left on, an eps that
    # stays in the config, a critic or reference that shares weights with what is trained
    optimizers, roles = [], []
    temperatures = spy_temperatures(monkeypatch, ppo)
    sample = batches.sample_texts

    def spy_sample(model, tokenizer, ids, length, uniforms, temperature=1.0, *rest, **options):
        temperatures.setdefault("sample", set()).add(temperature)
        return sample(model, tokenizer, ids, length, uniforms, temperature, *rest, **options)

    def spy_adamw(modules, lr, *args, real=common.adamw, **options):
        optimizers.append((lr, options.get("eps")))
        return real(modules, lr, *args, **options)

    def spy_prepare(policy, critic, reference, *rest, real=prepare):
        roles.append((policy, critic, reference))
        return real(policy, critic, reference, *rest)

    monkeypatch.setattr(batches, "sample_texts", spy_sample)
    monkeypatch.setattr(common, "adamw", spy_adamw)
    monkeypatch.setattr(ppo, "prepare", spy_prepare)
    run(folder, monkeypatch, "settings", "--temperature=0.6", "--adam_eps=1e-4", "--lr=0.01",
        "--iterations=2")
    assert temperatures == dict.fromkeys(("generate", "token_stats", "sample"), {0.6})
    assert optimizers == [(0.01, 1e-4), (0.05, 1e-4)]
    policy, critic, reference = roles[-1]
    owned = [{p.data_ptr() for p in m.parameters()} for m in (policy, critic, reference)]
    assert not owned[0] & owned[1] and not owned[0] & owned[2] and not owned[1] & owned[2]
    start = torch.load(folder / "sft" / "model.pt", weights_only=True)["weights"]
    for name, p in reference.named_parameters():
        assert torch.equal(p, start[name]) and not p.requires_grad
    assert any(not torch.equal(p, start[name]) for name, p in policy.named_parameters())


def test_beta_follows_the_kl_of_a_sequence(folder, monkeypatch):
    # catches a controller that is fed the mean per token: the target lies between the two
    flags = ("--iterations=3", "--lr=0.02", "--beta=0.1")
    second = run(folder, monkeypatch, "probe", *flags)[1]
    target = (second["kl"] * second["kl_per_token"]) ** 0.5
    assert second["kl"] > 1.5 * target
    rows = run(folder, monkeypatch, "adapts", *flags, f"--kl_target={target}", "--kl_horizon=40")
    # the first KL is 0 and lowers beta by 0.2 of 8 / 40, the second is too high and raises it
    assert [r["beta"] for r in rows[:2]] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 8 / 40)])
    assert rows[1]["kl"] > 1.2 * target
    assert rows[2]["beta"] == pytest.approx(rows[1]["beta"] * (1 + 0.2 * 8 / 40))


class Stop(Exception):
    pass


def test_resume_is_exact(folder, monkeypatch):
    # catches anything that resume forgets: either optimiser, beta, the running deviation, the step
    flags = ("--iterations=4", "--lr=0.01", "--save_every=1", "--kl_target=1", "--kl_horizon=20",
             "--score_scaling=true")
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
    parts = run(folder, monkeypatch, "parts", *flags)
    same = lambda rows: [{k: v for k, v in r.items() if not k.endswith("per_s")} for r in rows]
    assert str(same(parts)) == str(same(whole))  # as text: a nan equals itself
    hashes = {torch.load(folder / o / "model.pt", weights_only=True)["hash"]
              for o in ("whole", "parts")}
    assert len(hashes) == 1


def test_comparison_with_the_reference(monkeypatch, tiny, tmp_path):
    # catches ties that count as wins, an answer that wins over itself by a rounding, a best of n
    # taken over other prompts' samples, a cut answer that keeps its score
    prompts = [p for p in all_prompts().values() if p.family == "factual"][::200][:2]
    tokenizer, bad = load_tokenizer("synthetic"), "I cannot help with that."
    good = [p.relation.state(p.x, p.answer) + "." for p in prompts]
    sft = [bad, good[0], good[1], bad]  # two samples a prompt; the policy answers badly
    drawn = iter(([bad, bad], sft))
    # equal to the first SFT sample's: to a rounding for the same answer, exactly for another one
    scores = iter(([3.0 + 1e-6, 9.0], [3.0, 2.0, 9.0, 50.0]))
    monkeypatch.setattr(batches, "sample_texts", lambda *_, **__: [
        dict(text=t, ids=[len(t), tokenizer.eos], finished=i < 3)
        for i, t in enumerate(next(drawn))])
    monkeypatch.setattr(evaluate, "sequence_logprobs", lambda *_: torch.zeros(2))
    monkeypatch.setattr(batches, "over_rows", lambda *_, **__: torch.tensor(next(scores)))

    class Log:
        log = watch = staticmethod(lambda *_, **__: None)
        device, stage = torch.device("cpu"), "ppo"
        folder = tmp_path

    metrics = evaluate.compare(tiny, tiny, tokenizer, [(p.text, [1], None) for p in prompts],
                               settings(max_new_tokens=8), Log, True, "a reward model", 2)[0]
    gold = [[gold_reward(p.text, t) for t in texts]
            for p, texts in zip(prompts, (sft[:2], sft[2:]))]
    assert gold[0][0] == gold[1][1] < gold[0][1] == gold[1][0]
    assert metrics["score_win_rate"] == 0.5 and metrics["tie_rate"] == 0.5
    assert metrics["gold_win_rate"] == 0.25  # a tie and a loss
    assert metrics["score_sft"] == (3 + 9) / 2  # of the first samples
    assert metrics["eos_rate_sft"] == 1 and metrics["gold_sft"] == np.mean([gold[0][0], gold[1][0]])
    # the last sample was cut: its score is -4, not 50, and so it is not the best
    assert metrics["gold_best_of_n"] == np.mean([gold[0][0], gold[1][0]])
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    assert [a["policy"] for a in answers] == [bad, bad] and answers[1]["reference"] == good[1]
    assert [a["score_policy"] for a in answers] == [pytest.approx(3), 9]
    assert [a["gold_reference"] for a in answers] == [gold[0][0], gold[1][0]]


@pytest.mark.parametrize("error, passes", [(0.0, True), (2e-5, True), (-2e-3, False),
                                           (2e-3, False)])
def test_the_start_is_checked_in_both_directions(error, passes):
    # catches a ratio below 1, or a KL below 0, that goes unnoticed
    logp = torch.full((2, 5), -1.0).double()
    check = lambda new, old, ref: check_start((new - old) * MASK,
                                              ((old - ref) * MASK).sum(1).mean())
    for shifted in ((logp + error, logp, logp), (logp, logp, logp + error)):
        if passes:
            check(*shifted)
        else:
            with pytest.raises(AssertionError, match="the"):
                check(*shifted)


def test_one_graph_at_a_time(folder, monkeypatch):
    # catches activations of policy and critic that are in memory together: with a large model
    # nearly twice as much
    events = []

    def spy_stats(*args, real=ppo.token_stats, **options):
        stats = real(*args, **options)
        if stats[0].requires_grad:
            stats[0].register_hook(lambda grad: events.append("policy backward"))
        return stats

    def spy_forward(critic, *args, real=ValueModel.forward):
        if torch.is_grad_enabled():
            events.append("critic forward")
        return real(critic, *args)

    monkeypatch.setattr(ppo, "token_stats", spy_stats)
    monkeypatch.setattr(ValueModel, "forward", spy_forward)
    run(folder, monkeypatch, "graphs", "--iterations=1")
    assert events == ["policy backward", "critic forward"] * (len(events) // 2) and events


@torch.no_grad()
def test_scores_and_values_are_exact_under_autocast():
    # catches a head whose product is rounded to bf16: three digits of a score
    torch.manual_seed(0)
    size = GPTConfig(vocab_size=64, n_tokens=60, block_size=16, n_layer=1, n_head=2, n_embd=32)
    model = RewardModel(size)
    model.head.weight.mul_(100)
    critic = ValueModel(model)
    tokens, mask = torch.randint(60, (3, 9)), torch.ones(3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        score, value, hidden = model.raw(tokens, mask), critic(tokens, mask), model.gpt(tokens)
    exact = (hidden.double() @ model.head.weight[0].double() + model.head.bias.double())
    assert score.dtype == value.dtype == torch.float32
    torch.testing.assert_close(score.double(), exact[:, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(value[:, 1:].double(), exact[:, :-1], atol=1e-4, rtol=0)


def test_the_critic_is_made_where_the_reward_model_is():
    # catches a head on the CPU and a shift on the GPU, which only a GPU would show
    size = GPTConfig(vocab_size=64, n_tokens=60, block_size=16, n_layer=1, n_head=2, n_embd=32)
    critic = ValueModel(RewardModel(size).to("meta"))  # a device that is not the CPU
    assert {p.device.type for p in critic.parameters()} == {"meta"}
