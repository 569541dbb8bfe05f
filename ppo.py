"""Stage 3, PPO: reinforcement learning from the reward model, held near the SFT model by a KL term.

    J(pi) = E_{y ~ pi} [ r(x, y) ] - beta KL(pi || pi_ref)                     (InstructGPT eq. 2)
    reward_t = - beta (log pi(y_t) - log pi_ref(y_t))  [+ score, on the EOS action]
    L_policy = - sum_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) / response tokens

One iteration: sample responses, score them, compute advantages with the critic, then a few epochs
of minibatches. Four networks: policy, reference (frozen), reward model (frozen), critic (its own
network, started from the reward model). The optimum depends on beta: pi* ~ pi_ref exp(r / beta).

Where it differs from InstructGPT (section 3.4 and appendix C.4): an iteration's episodes are used
for two epochs, not one; no pretraining loss unless --ptx_coef asks for it; a response that the
length limit cuts gets a fixed low score; beta is 0.1, for scores of standard deviation 1.

    python ppo.py                          # embedded data; runs the stages before it where needed
    python ppo.py --kl_target=4            # adaptive beta that holds the KL at 4 nats a sequence
    python ppo.py --data=out/data/alpaca_eval.jsonl --init=... --reward_model=...

    {"prompt": P}            # P is text or a list of turns; other fields are not read
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "synthetic"  # prompts: "synthetic" or a file of any records with prompts
    out: str = "out/ppo"  # output folder
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    init: str = "out/sft"  # policy to start from
    reference: str | None = None  # policy that the KL is measured to; auto: --init
    reward_model: str = "out/reward"  # score, and start of the critic
    score_by: str = "mean"  # of an ensemble of reward models: "mean", "min", "mean-std"
    # --- an iteration
    iterations: Positive[int] = 60
    batch_size: Positive[int] = 128  # episodes (responses) an iteration
    minibatches: Positive[int] = 2  # optimiser steps an epoch
    epochs: Positive[int] = 2  # passes over the episodes of an iteration
    micro_batch: NotNegative[int] | None = None  # episodes a forward pass; 0: no bound
    temperature: Positive[float] = 1.0  # of the policy: in sampling and in every log-probability
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    # --- training
    lr: Positive[float] | None = None  # policy; linear decay to a tenth
    critic_lr: Positive[float] | None = None
    warmup: NotNegative[int] | None = None  # iterations
    adam_eps: Positive[float] = 1e-5
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    # --- the losses
    gamma: NotNegative[float] = 1.0
    lam: NotNegative[float] = 0.95  # GAE's lambda
    clip: Positive[float] = 0.2  # policy ratio
    value_clip: Positive[float] = 0.2
    beta: NotNegative[float] = 0.1  # KL coefficient, in units of score per nat
    kl_in: str = "reward"  # "reward": logp - ref_logp (k1) of every token; "loss": exact, per state
    kl_target: NotNegative[float] = 0.0  # nats a sequence; above 0 beta adapts to hold it (Ziegler)
    kl_horizon: Positive[float] = 1000.0  # episodes; how fast beta adapts
    missing_eos: float = -3.0  # score of a response without EOS
    entropy_coef: NotNegative[float] = 0.0  # bonus, 0.001 to 0.01 where used
    score_scaling: bool = False  # divide scores by their running standard deviation
    whiten: bool = True  # advantages: mean 0, variance 1 over the response tokens of the batch
    # --- pretraining text
    ptx_coef: NotNegative[float] = 0.0  # PPO-ptx: pretraining loss (InstructGPT's weight: 27.8)
    ptx_data: str = "synthetic"  # its text: "synthetic", a text or a JSON file
    ptx_batch: Positive[int] = 32  # its sequences a minibatch
    text_length: Positive[int] | None = None  # tokens of a sequence
    # --- looking and saving
    max_kl: NotNegative[float] = 100.0  # nats a sequence: above it the run stops; 0: never
    eval_prompts: Positive[int] = 512  # held-out prompts of the final comparison
    best_of: Positive[int] = 4  # embedded data: beside the best of n SFT samples by reward model
    log_every: Positive[int] = 10  # iterations between sample tables
    save_every: Positive[int] = 20  # iterations between saved states


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import time

import torch
import torch.nn as nn

import common
from cli import progress
from data import batches
from data.load import load_prompts
from data.text import text_rows
from evaluate import (check_start, compare, load_networks, rollout_metrics, show_samples,
                      watch_rollouts)
from model import GPT, autocast, generate, states, token_stats, trim
from reward import score_batch


class ValueModel(nn.Module):
    """The critic: a reward model that gives a value at every position instead of one at the end.

    forward(tokens, response_mask) -> (B, T), 0 outside the mask: value[:, t] is the expected return
    from the action at t on, read from the hidden state at t - 1, before token t is seen.
    """

    def __init__(self, reward_model):
        super().__init__()
        self.gpt = GPT(reward_model.gpt.config)
        self.head = nn.Linear(reward_model.head.in_features, 1)
        self.to(reward_model.shift.device)
        self.load_state_dict({k: v for k, v in reward_model.state_dict().items()
                              if k not in ("shift", "scale")})
        with torch.no_grad():  # fold (raw - shift) / scale into the head: same units as the score
            self.head.bias.copy_((self.head.bias - reward_model.shift) / reward_model.scale)
            self.head.weight.div_(reward_model.scale)

    def forward(self, tokens, response_mask):
        T = tokens.shape[1]
        tokens, response_mask = trim(tokens, response_mask)
        acts = response_mask[:, 1:].bool()  # the action at t is valued at the state at t - 1
        hidden = states(self.gpt, tokens[:, :-1], response_mask, acts)  # (N, C)
        with torch.autocast(tokens.device.type, enabled=False):
            value = self.head(hidden.to(self.head.weight.dtype))[:, 0]
        value = value.new_zeros(acts.shape).masked_scatter(acts, value)
        return nn.functional.pad(value, (1, T - tokens.shape[1]))


# --- the mathematics -----------------------------------------------------------------------------


def masked_mean(x, mask):
    """Mean over the positions where mask is 1; padding counts neither above nor below the line."""
    return (x * mask).sum() / mask.sum()


def masked_variance(x, mask):
    """Mean squared distance from the mean, over the masked positions."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """(x - mean) / std over the masked positions; 0 elsewhere."""
    return (x - masked_mean(x, mask)) * torch.rsqrt(masked_variance(x, mask) + 1e-8) * mask


def token_rewards(score, logp, ref_logp, response_mask, beta):
    """Reward of every action, (B, T): -beta (logp - ref_logp), plus the score on the last action.

    score (B,); logp, ref_logp (B, T) in nats per token. The last action is the EOS itself (of a cut
    response its last token), not the slot behind it: one later, the critic would have to learn a
    step that no action takes, and GAE would decay the score once more. beta 0 leaves the score
    alone.
    """
    last = batches.ends(response_mask).long()
    reward = -beta * (logp - ref_logp) * response_mask
    reward[torch.arange(len(score), device=score.device), last] += score
    return reward


def next_state_kl(exact_kl, response_mask):
    """KL(pi || ref) at the state that each action leads to, (B, T), nats; 0 for the last action.

    With the KL in the loss, beta times this is taken off the reward. Written out,

        d/dtheta E[sum_t KL_t] = E[ sum_t ( dKL_t + dlog pi(y_t) (KL_{t+1} + KL_{t+2} + ...) ) ]

    The loss holds the first term, KL_t in closed form at the visited states. Alone it is greedy: an
    action would not pay for the drift of the states that it leads to, and training would end at
    pi(a|s) ~ pi_ref(a|s) exp(Q(s, a) / beta) with Q the expected SCORE, which is not pi*: there Q
    is score less beta KL to come. The second term is a policy gradient, so it goes into the reward.
    """
    return nn.functional.pad(exact_kl[:, 1:], (0, 1)) * response_mask


def gae(reward, value, response_mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), from the last token back:

        delta_t = reward_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    All (B, T). Behind the last action value and advantage are 0. Returns (advantage, returns),
    returns = A + V as the critic's target, taken before any whitening; 0 outside the mask.
    """
    next_value = nn.functional.pad((value * response_mask)[:, 1:], (0, 1))
    delta = (reward + gamma * next_value - value) * response_mask  # 0 behind the last action
    advantages, advantage = [], torch.zeros_like(reward[:, 0])
    for delta_t in reversed(delta.unbind(1)):  # the only part that has to go token by token
        advantage = delta_t + gamma * lam * advantage
        advantages.append(advantage)
    advantage = torch.stack(advantages[::-1], 1) * response_mask
    return advantage, (advantage + value) * response_mask


def policy_loss(logp, old_logp, advantage, response_mask, clip):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), negated: a SUM over response tokens.

    All (B, T); ratio = exp(logp - old_logp). Returns (loss, info): info holds sums over tokens of
    the clip indicator and of k3's estimate of KL(old || new), and the largest ratio.
    The minimum keeps the pessimistic side: the clip only removes the gain from moving further, so
    a ratio that moved the wrong way still gets its full gradient back.
    """
    log_ratio = (logp - old_logp) * response_mask
    ratio = log_ratio.exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = -(torch.minimum(unclipped, clipped) * response_mask).sum()
    with torch.no_grad():
        info = dict(clip_fraction=((clipped < unclipped) * response_mask).sum(),
                    approx_kl=((ratio - 1 - log_ratio) * response_mask).sum(),
                    ratio_max=(ratio * response_mask).max())
    return loss, info


def value_loss(value, old_value, returns, response_mask, clip):
    """0.5 max((V - R)^2, (V_clip - R)^2), a SUM over response tokens; V_clip moves at most `clip`
    from the value at rollout time. The maximum again keeps the pessimistic side."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    error = torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * response_mask).sum()


def adapt_beta(beta, kl, target, episodes, horizon):
    """Ziegler et al. 2019, section 2.2: beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    kl and target in nats per SEQUENCE (sum over tokens, mean over sequences): a mean per token here
    is a well-known bug. n episodes since the last call; horizon in episodes, to fit the run.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


class RunningStd:
    """Standard deviation of all scores so far (Welford, in batches), for --score_scaling."""

    def __init__(self, count=0.0, mean=0.0, m2=0.0):
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, x):
        n, mean = len(x), float(x.mean())
        delta, total = mean - self.mean, self.count + n
        self.m2 += float(((x - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        return max((self.m2 / self.count) ** 0.5, 1e-4)

    def state(self):
        return [self.count, self.mean, self.m2]


# --- the parts of an iteration -------------------------------------------------------------------


def rollout(policy, train, tokenizer, config, step):
    """Plain samples from softmax(logits / T), one to each of batch_size prompts of an iteration.

    train: as `load_prompts` returns it. Returns (prompts, tokens, mask, finished): prompts, the
    rows of train that were asked; the others as `generate` returns them.
    """
    chosen = common.stream(config.seed, "ppo", "prompts", step).choice(
        len(train), config.batch_size, replace=len(train) < config.batch_size)
    prompts, mine = [train[i] for i in chosen], batches.to_compute(config.batch_size)
    with autocast(policy.wte.weight.device):
        answers = generate(
            policy, [prompts[i][1] for i in mine], config.max_new_tokens, tokenizer.eos,
            config.temperature, common.uniforms(config.seed, "ppo", "answers", step, mine,
                                                config.max_new_tokens))
    return prompts, *batches.gather_answers(*answers, len(prompts), tokenizer.pad)


def prepare(policy, critic, reference, tokens, mask, finished, score, beta, config):
    """Everything that stays fixed while we train on a batch of episodes.

    tokens (B, T), mask (B, T) and finished (B,) as `generate` returns them; score (B,), used where
    finished. Returns a dict: tokens, mask, finished; score (B,), the missing-EOS score in place;
    (B, T) each, 0 outside the mask: reward, old_logp, ref_logp, entropy, exact_kl (nats per token),
    old_value, advantage, returns; and scale, what whitening divided the advantages by (or 1).
    """
    def measure(p):
        # old log-probabilities from the training forward, not from the sampler: in low precision
        # the two differ, and ratios would not start at 1
        stats = token_stats(policy, tokens[p], mask[p], config.temperature, entropy=True,
                            ref_model=reference)
        return torch.stack([*stats, critic(tokens[p], mask[p])], 1)  # (n, 5, T)

    with torch.no_grad(), autocast(tokens.device):
        old_logp, entropy, exact_kl, ref_logp, old_value = batches.in_pieces(
            measure, batches.ends(mask), config.micro_batch).unbind(1)
    # a response cut by the length limit is not judged: it gets a fixed low score
    score = torch.where(finished, score, torch.full_like(score, config.missing_eos))
    if config.kl_in == "reward":
        reward = token_rewards(score, old_logp, ref_logp, mask, beta)
    else:
        reward = token_rewards(score, old_logp, ref_logp, mask, 0.0)
        reward = reward - beta * next_state_kl(exact_kl, mask)
    advantage, returns = gae(reward, old_value, mask, config.gamma, config.lam)
    scale = 1.0
    if config.whiten:
        scale = (masked_variance(advantage, mask) + 1e-8).sqrt()
        advantage = whiten(advantage, mask)
    return dict(tokens=tokens, mask=mask, finished=finished, score=score, reward=reward,
                old_logp=old_logp, ref_logp=ref_logp, entropy=entropy, exact_kl=exact_kl,
                old_value=old_value, advantage=advantage, returns=returns, scale=scale)


def update(policy, critic, reference, optimizers, batch, beta, config, rng, text=None,
           iteration=None):
    """Train policy and critic on the batch that `prepare` returned: epochs of minibatches.

    optimizers: (policy's, critic's), their learning rates set. rng: numpy Generator, for the order
    of the episodes. text: rows (n, T) of pretraining text for PPO-ptx. iteration: its number;
    on the first minibatch of iteration 0 assert that ratios are 1 and the KL is 0. UserError,
    before an optimiser's step, where a loss or a gradient is not finite.
    The loss of an optimiser step is its sum over response tokens divided by their number.
    Returns means per response token over all epochs (clip_fraction, approx_kl, policy_loss,
    value_loss), ratio_max, the mean gradient norms before clipping, and the last ptx_loss or None.
    """
    tokens, mask, old_logp = batch["tokens"], batch["mask"], batch["old_logp"]
    device, lengths, norms, ptx = tokens.device, batches.ends(mask), [], None
    totals = dict.fromkeys(("clip_fraction", "approx_kl", "policy_loss", "value_loss"), 0.0)
    ratio_max = torch.zeros((), device=device)
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(tokens))).to(device)
        for rows in order.split(config.batch_size // config.minibatches):
            count = mask[rows].sum()  # response tokens of the whole optimiser step
            mine = batches.share(rows)
            for p in batches.by_length(mine, lengths, config.micro_batch) if len(mine) else ():
                with autocast(device):
                    logp, ent, kl, _ = token_stats(
                        policy, tokens[p], mask[p], config.temperature,
                        entropy=config.entropy_coef > 0,
                        ref_model=reference if config.kl_in == "loss" else None)
                loss, info = policy_loss(logp, old_logp[p], batch["advantage"][p], mask[p],
                                         config.clip)
                info["policy_loss"] = loss.detach()
                if config.kl_in == "loss":
                    # sum over states of the exact KL(pi || ref) over the vocabulary. What it lacks
                    # is in the reward, see `next_state_kl`. Same gradient on average as k1 in the
                    # reward, but near the optimum more noise: there k1 cancels that of the score.
                    # Whitened advantages are in units of their scale, so beta must be as well
                    loss = loss + beta / batch["scale"] * (kl * mask[p]).sum()
                if config.entropy_coef > 0:
                    loss = loss - config.entropy_coef * (ent * mask[p]).sum()
                (loss / count).backward()  # now: then only one of the two graphs is in memory
                with autocast(device):
                    value = critic(tokens[p], mask[p])
                v_loss = value_loss(value, batch["old_value"][p], batch["returns"][p], mask[p],
                                    config.value_clip)
                info["value_loss"] = v_loss.detach()
                (v_loss / count).backward()  # another network: no weight between the two losses
                ratio_max = torch.maximum(ratio_max, info.pop("ratio_max"))
                for k, v in info.items():
                    totals[k] = totals[k] + v
            if config.ptx_coef > 0:
                ptx = batches.text_share(policy, text[rng.integers(0, len(text), config.ptx_batch)])
                (config.ptx_coef * ptx).backward()
            common.sum_gradients(policy, critic)
            if iteration == 0 and not norms and not config.reference and len(mine):
                check_start((logp - old_logp[p]) * mask[p],
                            ((old_logp - batch["ref_logp"]) * mask)[p].sum(1).mean())
            norms.append([torch.nn.utils.clip_grad_norm_(m.parameters(), config.grad_clip)
                          for m in (policy, critic)])
            common.check_finite(config, iteration, policy_loss=totals["policy_loss"],
                                value_loss=totals["value_loss"], grad_norm=norms[-1][0],
                                critic_grad_norm=norms[-1][1])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    n_tokens = mask.sum().item()
    sums = common.total(torch.tensor([float(v) for v in totals.values()],
                                     dtype=torch.double)).tolist()
    return dict(ratio_max=common.total(ratio_max, most=True).item(),
                grad_norm=torch.stack([n[0] for n in norms]).mean().item(),
                critic_grad_norm=torch.stack([n[1] for n in norms]).mean().item(),
                ptx_loss=common.total(ptx.detach()).item() if ptx is not None else None,
                **{k: v / (n_tokens * config.epochs) for k, v in zip(totals, sums)})


def critic_metrics(batch):
    """For the log: the returns, how well the critic knew them beforehand, and the exact KL."""
    mask, returns = batch["mask"], batch["returns"]
    spread = masked_variance(returns, mask)
    error = masked_mean((returns - batch["old_value"]) ** 2, mask)
    return dict(kl_exact=(batch["exact_kl"] * mask).sum(1).mean().item(),
                returns_mean=masked_mean(returns, mask).item(), returns_std=spread.sqrt().item(),
                explained_variance=(1 - error / spread.clamp(min=1e-8)).item())


# --- the stage -----------------------------------------------------------------------------------


def check_config(config):
    """UserError for settings that do not fit together."""
    if config.kl_in not in ("reward", "loss"):
        raise UserError(f"--kl_in={config.kl_in}: expected reward or loss")
    if config.batch_size % config.minibatches:
        raise UserError(f"--batch_size={config.batch_size} is not a multiple of "
                        f"--minibatches={config.minibatches}")
    if config.kl_target > 0 and config.beta == 0:
        raise UserError("--beta=0: the controller of --kl_target multiplies, and 0 stays 0")
    if config.kl_target > 0 and config.batch_size >= 5 * config.kl_horizon:
        # one step of the controller multiplies beta by 1 - 0.2 n / horizon: 0 or below
        raise UserError(f"--kl_horizon={config.kl_horizon}: beta would change its sign; with "
                        f"--batch_size={config.batch_size} take one above {config.batch_size / 5}")


def main(config):
    device = common.set_up(config, "ppo")
    check_config(config)

    # --- four networks, and the prompts --------------------------------------
    policy, reference, reward_model, tokenizer, parents, block_size = load_networks(config, device)
    config = common.sized(common.sized(config, "ppo", policy), "critic", reward_model.gpt)
    critic = ValueModel(reward_model.members[0])  # of an ensemble the first one
    common.freeze(reward_model)
    common.prepare_blocks(config, policy, critic.gpt)
    room, synthetic = block_size - config.max_new_tokens, config.data == "synthetic"
    train, held_out = load_prompts(
        config.data, {"training": 2000 if synthetic else None, "held-out": config.eval_prompts},
        tokenizer, room,
        config.seed, skip_bad=config.skip_bad)
    text = None  # rows of pretraining text for PPO-ptx, or None
    if config.ptx_coef > 0:
        text = text_rows(config.ptx_data, tokenizer, min(config.text_length, block_size), 3000,
                         config.seed, config.skip_bad)
    common.say_warmup(config.iterations, config.warmup)
    run = common.Run("ppo", config, device, parents)
    print(f"policy {policy.num_params():,} parameters, reward model and critic "
          f"{reward_model.gpt.num_params():,} each\n"
          f"{len(train):,} prompts of {config.data}, {len(held_out)} held out")

    optimizer = common.adamw([policy], config.lr, eps=config.adam_eps)
    critic_optimizer = common.adamw([critic], config.critic_lr, eps=config.adam_eps)
    kept = dict(policy=policy, critic=critic, optimizer=optimizer,
                critic_optimizer=critic_optimizer)
    state = run.load_state(**kept)  # {} unless it is resumed
    first, beta = state.get("step", 0), state.get("beta", config.beta)
    running = RunningStd(*state.get("running", ()))

    def save(step):
        run.save_state(step, config.iterations, beta=beta, running=running.state(), **kept)

    bar = progress(range(first, config.iterations), "ppo", initial=first, total=config.iterations)
    for step in bar:
        if run.due(step, config.save_every):
            save(step)
        clock = [time.perf_counter()]

        # --- rollout: the policy answers a batch of prompts ------------------
        prompts, tokens, mask, finished = rollout(policy, train, tokenizer, config, step)
        clock.append(time.perf_counter())

        # --- score: the reward model reads every answer at its EOS -----------
        with torch.no_grad():
            raw_score = score = score_batch(reward_model, tokens, mask, config.micro_batch)
        if config.score_scaling and finished.any():
            score = score / running.update(score[finished])

        # --- prepare: the KL goes into the reward, the critic gives advantages -
        batch = prepare(policy, critic, reference, tokens, mask, finished, score, beta, config)
        common.check_finite(config, step, score=raw_score, logp=batch["old_logp"])
        clock.append(time.perf_counter())

        # --- update: a few epochs of minibatches on the clipped loss ---------
        factor = common.linear(step, config.iterations, config.warmup)
        common.set_lr(optimizer, config.lr * factor)
        common.set_lr(critic_optimizer, config.critic_lr * factor)
        trained = update(policy, critic, reference, (optimizer, critic_optimizer), batch, beta,
                         config, common.stream(config.seed, "ppo", "minibatches", step), text,
                         step)
        clock.append(time.perf_counter())

        # --- log: nothing from here on changes the weights -------------------
        asked = [prompt for prompt, *_ in prompts]
        texts = [tokenizer.decode(t[m].tolist()) for t, m in zip(tokens.cpu(), mask.bool().cpu())]
        row = dict(step=step, beta=beta, lr=config.lr * factor,
                   score=raw_score[finished].mean().item(), **critic_metrics(batch), **trained,
                   **rollout_metrics(batch, asked, texts, beta, clock, synthetic))
        run.log(**row)
        watch_rollouts(run, config, row, batch, raw_score, reward_model)
        run.watch("the critic is worse than a constant: explained variance below 0. Raise "
                  "--critic_lr, or take more iterations", row["explained_variance"] < 0, 10)
        if step % config.log_every == 0 or step + 1 == config.iterations:
            seq_kl = ((batch["old_logp"] - batch["ref_logp"]) * mask).sum(1)
            show_samples(run, step, asked, texts[:4], score=batch["score"], kl=seq_kl)
        bar.set_postfix({name: f"{row[name]:.2f}" for name in ("score", "kl", "eos_rate")})

        if config.kl_target > 0 and step + 1 < config.iterations:
            beta = adapt_beta(beta, row["kl"], config.kl_target, config.batch_size,
                              config.kl_horizon)
    save(config.iterations)

    metrics, _, _ = compare(policy, reference, tokenizer, held_out, config, run, synthetic,
                            reward_model, config.best_of)
    metrics["beta"] = beta
    run.save_model(policy, tokenizer, metrics)
    run.finish(metrics, f"python evaluate.py --policy={config.out} --reference="
               + (config.reference or config.init)
               + ("" if synthetic else f" --data={config.data}"))


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
