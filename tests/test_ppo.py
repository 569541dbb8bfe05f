"""PPO's mathematics, each function against numbers worked out by hand or by a plain loop."""

import math

import pytest
import torch
from ppo import (
    RunningStd,
    ValueModel,
    adapt_beta,
    gae,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from reward import RewardModel

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
    reward = torch.tensor([[0., 1., 2., 9.]]).double()
    value = torch.tensor([[7., 0.5, 0.25, 9.]]).double()
    mask = torch.tensor([[0., 1., 1., 0.]]).double()
    advantage, returns = gae(reward, value, mask, 0.9, 0.5)
    last = 2 - 0.25  # nothing follows the last action, whatever stands in the padding
    first = 1 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * last
    torch.testing.assert_close(advantage, torch.tensor([[0, first, last, 0]]).double())
    torch.testing.assert_close(returns, torch.tensor([[0, first + 0.5, last + 0.25, 0]]).double())


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
    value = critic(tokens)
    mask = torch.tensor([[0., 0, 1, 1, 0]])  # a response that ends at position 3
    torch.testing.assert_close(value[0, 4], model(tokens, mask)[0].detach(), rtol=1e-5, atol=1e-6)
    changed = tokens.clone()
    changed[0, 3] = 9
    torch.testing.assert_close(critic(changed)[0, :4], value[0, :4])
    assert not torch.allclose(critic(changed)[0, 4], value[0, 4])
