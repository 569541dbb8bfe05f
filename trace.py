"""One real example of a stage, token by token, with every number from the mask to the loss.

    python trace.py sft             # the first dialogue of the first batch, before any step
    python trace.py reward          # the first prompt of the first batch, before any step
    python trace.py ppo             # a response of the second iteration, after the updates on it
    python trace.py dpo             # the first pair of the data, after 19 steps
    python trace.py grpo            # a group of the second iteration, after the updates on it
    python trace.py ppo --help      # the flags, which are those of the stage

The numbers are those of the run with the same flags. Where there is a reference, the policy is
trained a little first: at the start every log-ratio would be 0. Nothing but out/cache is written,
so --out, --resume and --overwrite mean nothing here.
"""

import sys

import cli
from cli import UserError, progress

STAGES = ("sft", "reward", "ppo", "dpo", "grpo")


def read_stage():
    """The stage that the command line begins with, taken off it. --help shows how, and stops."""
    with cli.one_line_errors():
        stage = sys.argv.pop(1) if len(sys.argv) > 1 else ""
        if stage in ("--help", "-h"):
            print(__doc__)
            sys.exit(0)
        if stage not in STAGES:
            raise UserError(f"the first argument is the stage, one of {', '.join(STAGES)}")
        return stage


# answered before torch is imported
STAGE = read_stage() if __name__ == "__main__" else None

import torch

import common
import dpo
import grpo
import ppo
import reward
import sft
from data import batches
from data.load import all_rows, load_prompts, load_rankings
from data.records import collate
from data.text import text_rows
from evaluate import load_networks, sequence_logprobs
from model import autocast, token_logprobs, token_stats


def print_table(columns):
    print(cli.table(columns))


def token_texts(tokenizer, ids):
    """What each id stands for, in quotes; EOS by its name."""
    return ["EOS" if i == tokenizer.eos else repr(tokenizer.decode([i])) for i in ids]


def print_tokens(tokenizer, tokens, mask, columns, row=0):
    """Print a row of a batch token by token, to the end of its response: padding follows.

    tokens, mask and the columns (B, T); a column shows its numbers where the mask is 1, no nan.
    """
    end = int(mask[row].nonzero().max()) + 1
    kept = mask[row, :end].int().tolist()
    cells = {name: [v if m and v == v else None for v, m in zip(x[row].tolist(), kept)]
             for name, x in columns.items()}
    print_table(dict(position=range(end), mask=kept) | cells
                       | dict(text=token_texts(tokenizer, tokens[row, :end].tolist())))


def trace_sft(config):
    device = common.set_up(config, "sft")
    common.ensure_input(config, "init", "pretrain")
    model, tokenizer, _ = common.load_policy(config.init, common.STARTS, device)
    config = common.sized(config, "sft", model)
    train = sft.load_data(config, tokenizer, model.config.block_size).train
    first = sft.epoch_order(train, 0, config)[0]
    tokens, mask = (x.to(device) for x in collate(*zip(train[int(first)]), tokenizer.pad))

    with torch.no_grad():
        logp = token_logprobs(model, tokens, mask)
    print_tokens(tokenizer, tokens, mask, dict(logp=logp))
    loss, count = sft.sft_loss(logp, mask).item(), int(mask.sum())
    print(f"\nloss = - sum(mask logp) / sum(mask) = {loss:.6f} / {count} = {loss / count:.6f} nats "
          "per token\n(a training step sums over its batch, and divides by the tokens of an "
          "average one)")


def trace_reward(config):
    device = common.set_up(config, "reward")
    common.ensure_input(config, "init", "sft")
    common.ensure_input(config, "data", "label")
    policy, tokenizer, _ = common.load_policy(config.init, common.STARTS, device)
    model = reward.RewardModel(policy.config).to(device)
    model.gpt.load_state_dict(policy.state_dict())
    train = load_rankings(config.data, tokenizer, policy.config.block_size,
                          skip_bad=config.skip_bad).train
    first = reward.epoch_order(train, 0, config)[0]
    rows, masks, pairs = train[first].rows, train[first].masks, train[first].pairs

    scores = batches.over_rows(model.raw, rows, masks, tokenizer.pad, device).tolist()
    table = [(n, t, m, scores[n] if t == len(row) - 1 else None, text)
             for n, (row, mask) in enumerate(zip(rows, masks))
             for t, (m, text) in enumerate(zip(mask, token_texts(tokenizer, row)))]
    print_table(dict(zip(("answer", "position", "mask", "score", "text"), zip(*table))))
    print("\nloss of a pair = -log sigmoid(margin), margin = score(chosen) - score(rejected)")
    chosen, rejected = (torch.tensor([scores[p[side]] for p in pairs]) for side in (0, 1))
    losses = [reward.reward_loss(c[None], r[None]).item() for c, r in zip(chosen, rejected)]
    print_table(dict(chosen=[w for w, _ in pairs], rejected=[l for _, l in pairs],
                            margin=(chosen - rejected).tolist(),
                            sigmoid=(chosen - rejected).sigmoid().tolist(), loss=losses))
    total = reward.reward_loss(chosen, rejected).item()
    print(f"\nloss = sum over pairs / pairs = {total:.6f} / {len(pairs)} = "
          f"{total / len(pairs):.6f} nats\n"
          "(a training step sums over its batch, and divides by the pairs of an average one)")


def ptx_text(config, tokenizer, block_size):
    """Rows of pretraining text for ppo and grpo, or None."""
    if config.ptx_coef > 0:
        return text_rows(config.ptx_data, tokenizer, min(config.text_length, block_size), 3000,
                         config.seed, config.skip_bad)


def trace_ppo(config):
    device = common.set_up(config, "ppo")
    ppo.check_config(config)
    policy, reference, reward_model, tokenizer, _, block_size = load_networks(config, device)
    config = common.sized(common.sized(config, "ppo", policy), "critic", reward_model.gpt)
    critic = ppo.ValueModel(reward_model.members[0])
    counts = {"training": 2000 if config.data == "synthetic" else None}
    [train] = load_prompts(config.data, counts, tokenizer,
                           block_size - config.max_new_tokens, config.seed,
                           skip_bad=config.skip_bad)
    text = ptx_text(config, tokenizer, block_size)
    optimizers = (common.adamw([policy], config.lr, eps=config.adam_eps),
                  common.adamw([critic], config.critic_lr, eps=config.adam_eps))
    beta, running = config.beta, ppo.RunningStd()
    for step in progress(range(min(2, config.iterations)), "ppo"):
        if step == 1 and config.kl_target > 0:  # by the KL of the first iteration, which is 0
            beta = ppo.adapt_beta(beta, 0, config.kl_target, config.batch_size, config.kl_horizon)
        _, tokens, mask, finished = ppo.rollout(policy, train, tokenizer, config, step)
        score = reward.score_batch(reward_model, tokens, mask, config.micro_batch)
        if config.score_scaling and finished.any():
            score = score / running.update(score[finished])
        batch = ppo.prepare(policy, critic, reference, tokens, mask, finished, score, beta, config)
        factor = common.linear(step, config.iterations, config.warmup)
        common.set_lr(optimizers[0], config.lr * factor)
        common.set_lr(optimizers[1], config.critic_lr * factor)
        ppo.update(policy, critic, reference, optimizers, batch, beta, config,
                   common.stream(config.seed, "ppo", "minibatches", step), text)

    # logp, ratio and new_value are what one more minibatch would see
    first = {k: v[:1] for k, v in batch.items() if k != "scale"}
    tokens, mask, white = first["tokens"], first["mask"], first["advantage"]
    old_logp, ref_logp = first["old_logp"], first["ref_logp"]
    old_value, returns = first["old_value"], first["returns"]
    with torch.no_grad(), autocast(device):
        logp, entropy, kl, _ = token_stats(policy, tokens, mask, config.temperature, entropy=True,
                                           ref_model=reference)
        value = critic(tokens, mask)
    score = torch.full_like(logp, torch.nan)
    score[0, mask[0].nonzero().max()] = batch["score"][0]
    kl_term = ppo.token_rewards(torch.zeros(1, device=device), old_logp, ref_logp, mask, beta)
    kl_formula = f"-beta (old_logp - ref_logp), beta = {beta:.6f}"
    if config.kl_in == "loss":
        kl_term = -beta * ppo.next_state_kl(first["exact_kl"], mask)
        kl_formula = f"-beta exact_kl(next), beta = {beta:.6f}; see next_state_kl"
    table = dict(
        old_logp=old_logp, ref_logp=ref_logp, kl_term=kl_term, score=score, reward=first["reward"],
        value=old_value, advantage=returns - old_value, returns=returns, white=white, logp=logp,
        ratio=(logp - old_logp).exp(), new_value=value)
    terms, formula = [], "policy"
    if config.kl_in == "loss":
        table |= dict(exact_kl=first["exact_kl"], kl=kl)
        formula += " + beta / std sum(kl)" if config.whiten else " + beta sum(kl)"
        terms.append((beta / batch["scale"] * (kl * mask).sum()).item())
    if config.entropy_coef > 0:
        table["entropy"], formula = entropy, formula + " - entropy_coef sum(entropy)"
        terms.append(-config.entropy_coef * (entropy * mask).sum().item())
    print_tokens(tokenizer, tokens, mask, table)
    policy_sum = ppo.policy_loss(logp, old_logp, white, mask, config.clip)[0].item()
    value_sum = ppo.value_loss(value, old_value, returns, mask, config.value_clip).item()
    advantage, count = batch["returns"] - batch["old_value"], int(mask.sum())
    mean = ppo.masked_mean(advantage, batch["mask"])
    std = ppo.masked_variance(advantage, batch["mask"]).sqrt()
    total = policy_sum + value_sum + sum(terms)
    print(f"""
score      {"of the reward model" if finished[0] else "missing_eos: the response has no EOS"}
kl_term  = {kl_formula}
reward   = kl_term + score on the last action
advantage: delta + gamma lam advantage(next), delta = reward + gamma value(next) - value,
           gamma = {config.gamma}, lam = {config.lam}; behind the last action both are 0
returns  = advantage + value
white    = {"(advantage - mean) / std" if config.whiten else "advantage"},
           over the whole batch: mean {mean:.6f}, std {std:.6f}
ratio    = exp(logp - old_logp)
policy   = - sum min(ratio white, clip(ratio, 1 - {config.clip}, 1 + {config.clip}) white) \
= {policy_sum:.6f}
critic   = 0.5 sum max((new_value - returns)^2, (clipped - returns)^2) = {value_sum:.6f},
           clipped = value + clip(new_value - value, -{config.value_clip}, {config.value_clip})
loss     = ({formula} + critic) / sum(mask)
         = ({" + ".join(f"{x:.6f}" for x in (policy_sum, *terms, value_sum))}) / {count} \
= {total / count:.6f}
(a training step takes all sums over its minibatch; beta = {beta:.6f})""")


def trace_dpo(config):
    device = common.set_up(config, "dpo")
    dpo.check_config(config)
    policy, reference, _, tokenizer, _, block_size = load_networks(config, device, False)
    config = common.sized(config, config.loss, policy)
    common.ensure_input(config, "data", "label")
    train = dpo.load_data(config, tokenizer, block_size).train
    pair = next((e for e in train if e.pairs), None)
    if pair is None:
        raise UserError("trace.py shows a pair, and the data has single answers only")
    optimizer = common.adamw([policy], config.lr, config.weight_decay)
    steps_per_epoch = -(-len(train) // config.batch_size)
    steps, average = config.epochs * steps_per_epoch, dpo.per_step(train, config)
    for step in progress(range(min(19, steps)), "dpo"):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0:
            order = dpo.epoch_order(train, epoch, config)
        batch, others = dpo.batch_of(train, order, i, config)
        dpo.set_reference(batch, sequence_logprobs(reference, *all_rows(batch), tokenizer.pad))
        common.set_lr(optimizer, config.lr * common.cosine(step, steps, config.warmup))
        dpo.update(policy, reference, optimizer, batch, others, average, config, tokenizer.pad)

    both = [(pair.rows[n], pair.masks[n]) for n in pair.pairs[0]]
    tokens, mask = (x.to(device) for x in collate(*zip(*both), tokenizer.pad))
    with torch.no_grad(), autocast(device):
        logp, ref_logp = (token_logprobs(m, tokens, mask) for m in (policy, reference))
    for row, name in enumerate(("chosen", "rejected")):
        print(f"\n{name}: ")
        print_tokens(tokenizer, tokens, mask, dict(
            logp=logp, ref_logp=ref_logp, log_ratio=logp - ref_logp), row)
    seq_logp, ref, length = (x.sum(1).cpu() for x in (logp, ref_logp, mask))
    rewards = dpo.implicit_reward(seq_logp, ref, length, config.loss, config.beta)
    print_table(dict(
        sum_logp=seq_logp.tolist(), sum_ref_logp=ref.tolist(), tokens=length.int().tolist(),
        reward=rewards.tolist(), answer=["chosen", "rejected"]))
    print("\nreward = " + {
        "simpo": "beta sum_logp / tokens", "dpo_norm": "beta (sum_logp - sum_ref_logp) / tokens",
        "ipo_mean": "beta (sum_logp - sum_ref_logp) / tokens",
    }.get(config.loss, "beta (sum_logp - sum_ref_logp)") + f", beta = {config.beta}")
    if config.loss == "kto":
        labels = torch.tensor([1.0, -1.0])
        loss = dpo.kto_loss(seq_logp - ref, labels, 0.0, config).mean().item()
        print(f"with z0 = 0:\nloss = ({config.desirable} (1 - sigmoid(reward of chosen)) + "
              f"{config.undesirable} (1 - sigmoid(-reward of rejected))) / 2 = {loss:.6f}")
        return
    loss = dpo.pair_loss(config, seq_logp, ref, length, [0], [1]).item()
    e = config.label_smoothing
    formula = {
        "cdpo": f"-{1 - e} log sigmoid(margin) - {e} log sigmoid(-margin)",
        "ipo": "((margin - 1/2) / beta)^2", "ipo_mean": "((margin - 1/2) / beta)^2",
        "simpo": f"-log sigmoid(margin - {config.beta * config.simpo_margin})",
    }.get(config.loss, "-log sigmoid(margin)")
    margin = (rewards[0] - rewards[1]).item()
    print(f"margin = reward of chosen - reward of rejected = {margin:.6f}\n"
          f"loss = {formula} = {loss:.6f}\n"
          "(a training step sums over its batch, and divides by the pairs of an average one)")


def trace_grpo(config):
    device = common.set_up(config, "grpo")
    config = grpo.resolve(config)
    policy, reference, reward_model, tokenizer, _, block_size = load_networks(
        config, device, config.reward == "model")
    config = common.sized(config, "grpo", policy)
    train = grpo.load_sides(config, tokenizer, block_size - config.max_new_tokens)[0]
    text = ptx_text(config, tokenizer, block_size)
    optimizer = common.adamw([policy], config.lr, eps=config.adam_eps)
    for step in progress(range(min(2, config.iterations)), "grpo"):
        prompts, texts, tokens, mask, finished = grpo.rollout(
            policy, train, tokenizer, config, step)
        score = grpo.judge(reward_model, prompts, texts, tokens, mask, finished, config)
        batch = grpo.prepare(policy, reference, tokens, mask, finished, score, config)
        common.set_lr(optimizer, config.lr * common.linear(step, config.iterations, config.warmup))
        grpo.update(policy, optimizer, batch, config,
                    common.stream(config.seed, "grpo", "minibatches", step), text)

    # logp, ratio and the losses are what one more step would see, if this group were all of it
    K = config.k
    signal = grpo.has_signal(batch["score"], K)
    if not signal.any():
        raise UserError("every group's scores are all equal, so there is nothing to show; another "
                        "--seed or a larger --batch_size may have one that differs")
    first = int(signal.float().argmax()) * K
    p = slice(first, first + K)
    tokens, mask, old_logp = batch["tokens"][p], batch["mask"][p], batch["old_logp"][p]
    with torch.no_grad(), autocast(device):
        logp = token_logprobs(policy, tokens, mask, config.temperature)
    policy_sum, kl, _ = grpo.losses(logp, batch, p, config)
    rewards, advantage, kept = (batch[name][p] for name in ("reward", "advantage", "kept"))
    weight = grpo.row_weights(mask.sum(1), kept, config.aggregate, config.max_new_tokens)
    group = dict(response=torch.arange(K), finished=batch["finished"][p].int(),
                 score=batch["score"][p])
    columns = dict(old_logp=old_logp)
    if config.beta > 0:
        columns["ref_logp"] = batch["ref_logp"][p]
        group["seq_kl"] = ((old_logp - columns["ref_logp"]) * mask).sum(1)
    group |= dict(reward=rewards, advantage=advantage, tokens=mask.sum(1).int(), kept=kept.int(),
                  weight=weight, policy=policy_sum)
    if config.beta > 0 and config.kl_in == "loss":
        group["kl"] = kl
    print_table({name: x.tolist() for name, x in group.items()}
                       | dict(text=[repr(t) for t in texts[p]]))
    shown, ratio = int(advantage.abs().argmax()), (logp - old_logp).exp()
    columns |= dict(logp=logp, ratio=ratio,
                    clipped=ratio.clamp(1 - config.clip, 1 + config.clip_high))
    print_tokens(tokenizer, tokens, mask, columns, shown)
    reward_of = "score" + (f" - beta seq_kl, beta = {config.beta:.6f}; seq_kl = sum(old_logp - "
                           "ref_logp)" if config.beta > 0 and config.kl_in == "reward" else "")
    advantage_of = dict(
        grpo="(reward - mean) / (std + 0.0001)", dr_grpo="reward - mean",
        rloo="reward - mean of the others = K / (K - 1) (reward - mean)")[config.advantage]
    weight_of = dict(
        sequence="kept / (n tokens)", constant=f"kept / (n {config.max_new_tokens})",
        tokens="kept / sum(kept tokens)", sum="kept / n")[config.aggregate]
    kl_of = dict(k2="0.5 sum(logp - ref_logp)^2",
                 k3="sum(exp(ref_logp - logp) - 1 + logp - ref_logp)")[config.kl_estimator]
    total = (weight * (policy_sum + kl)).sum().item()
    on_top = "; the loss of pretraining text comes on top" if config.ptx_coef > 0 else ""
    print(f"""
the tokens are those of response {shown}; a response without EOS (finished 0) gets a fixed score
reward    = {reward_of}
advantage = {advantage_of}, K = {K},
            over the group: mean {rewards.mean():.6f}, std {rewards.std():.6f}
ratio     = exp(logp - old_logp), clipped to 1 - {config.clip} .. 1 + {config.clip_high}
policy    = - sum min(ratio advantage, clipped advantage) over the tokens
            of response {shown} = {policy_sum[shown]:.6f}""")
    if "kl" in group:
        print(f"kl        = beta {kl_of}, beta = {config.beta:.6f}")
    print(f"""weight    = {weight_of}, n = sum(kept)
loss      = sum weight {"(policy + kl)" if "kl" in group else "policy"} = {total:.6f}
(a training step takes the weights over its minibatch{on_top})""")


if __name__ == "__main__":
    module, trace = dict(sft=(sft, trace_sft), reward=(reward, trace_reward), ppo=(ppo, trace_ppo),
                         dpo=(dpo, trace_dpo), grpo=(grpo, trace_grpo))[STAGE]
    cli.run_main(trace, cli.parse(module.Config))
