"""Stage 3 without a critic, GRPO and its relatives: answers to a prompt are judged by each other.

    A_i = r_i - mean of the rewards of the other answers to the same prompt       (RLOO)
    L = - sum_i w_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - eps_low, 1 + eps_high) A_i)
    J(pi) = E_{y ~ pi} [ r(x, y) ] - beta KL(pi || pi_ref)                     as in ppo.py

One iteration: sample K responses to each prompt, reward them, compare within the group, then a few
minibatches. The reward is a verifier (the number that the response ends on is right or wrong, or
the response is or is not as the constraints say) or the trained reward model. Two networks with the
verifier, policy and reference; no critic ever.

    python grpo.py                               # embedded arithmetic; runs sft.py first if needed
    python grpo.py --reward=model                # all embedded prompts, scored by out/reward
    python grpo.py --method=grpo                 # or dr_grpo, dapo: the settings of their papers
    python grpo.py --data=out/data/gsm8k.jsonl --init=...
    python grpo.py --data=out/data/instructions.jsonl --init=...   # requests about the form

    {"prompt": P, "answer": "42"}       # for the verifier; P is text or a list of turns
    {"prompt": P, "constraints": [{"kind": "words", "at_most": 12}]}     # or this, see docs/data.md
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "synthetic"  # prompts: "synthetic" (for the verifier its arithmetic) or a file
    #                          of {"prompt", "answer"} or {"prompt", "constraints"}; for a reward
    #                          model any prompts
    out: str = "out/grpo"  # output folder
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    init: str = "out/sft"  # policy to start from
    reference: str | None = None  # policy that the KL is measured to; auto: --init
    reward: str = "verifier"  # "verifier": 1 for a right response, else 0; "model": reward_model
    reward_model: str = "out/reward"  # used with --reward=model
    score_by: str = "mean"  # of an ensemble of reward models: "mean", "min", "mean-std"
    # --- an iteration
    iterations: Positive[int] = 60
    batch_size: Positive[int] = 256  # responses an iteration
    k: Positive[int] = 8  # responses to a prompt: the group
    minibatches: Positive[int] = 2  # optimiser steps an epoch
    epochs: Positive[int] = 1  # passes over the responses of an iteration
    micro_batch: NotNegative[int] | None = None  # responses a forward pass; 0: no bound
    temperature: Positive[float] = 1.0  # of the policy: in sampling and in every log-probability
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    missing_eos: float = -3.0  # score of a response without EOS by a reward model; verifier: wrong
    # --- training
    lr: Positive[float] | None = None  # linear decay to a tenth
    warmup: NotNegative[int] | None = None  # iterations
    adam_eps: Positive[float] = 1e-5
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    # --- pretraining text
    ptx_coef: NotNegative[float] = 0.0  # weight of the pretraining loss, as in PPO-ptx
    ptx_data: str = "synthetic"  # its text: "synthetic", a text or a JSON file
    ptx_batch: Positive[int] = 32  # its sequences a minibatch
    text_length: Positive[int] | None = None  # tokens of a sequence
    # --- looking and saving
    max_kl: NotNegative[float] = 100.0  # nats a sequence: above it the run stops; 0: never
    eval_prompts: Positive[int] = 512  # held-out prompts of the final comparison
    log_every: Positive[int] = 10  # iterations between sample tables
    save_every: Positive[int] = 20  # iterations between saved states
    # --- the method
    method: str = "rloo"  # rloo, grpo, dr_grpo, dapo: its paper's settings for the flags below that
    #                       are auto. Sizes and learning rates are ours. Not implemented: DAPO's
    #                       refill of dropped groups and length penalty, GRPO's renewed reference
    advantage: str | None = None  # as grpo, dr_grpo or rloo: see group_advantage
    aggregate: str | None = None  # over tokens, as sequence, constant, tokens or sum: row_weights
    clip: Positive[float] = 0.2  # the ratio may fall to 1 - clip
    clip_high: Positive[float] | None = None  # and rise to 1 + clip_high
    drop: bool | None = None  # groups whose scores are all equal leave the loss
    beta: NotNegative[float] | None = None  # KL coefficient, in units of score per nat
    kl_in: str | None = None  # "reward": k1 of the sequence; "loss": kl_estimator
    kl_estimator: str | None = None  # in the loss: k2 (of the sequence) or k3 (per token)


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import dataclasses
import time

import torch

import common
from cli import progress, say
from data import batches
from data.load import load_prompts
from data.records import check_answer, check_prompt
from data.synthetic.world import FAMILIES
from data.text import text_rows
from data.verifier import is_right
from evaluate import (check_start, compare, load_networks, rollout_metrics, show_samples,
                      watch_rollouts)
from model import autocast, generate, token_logprobs, token_stats
from reward import SCORE_BY, score_batch


METHODS = {  # what --method stands for
    # Shao et al. 2024. Division by the std weighs a prompt more the surer the policy is about it,
    # division by the length makes a long wrong answer cheap. With the std the KL belongs into the
    # loss: in the reward it would be divided as well, and in a group of equal scores beta would
    # cancel, so that noise of the KL made advantages as large as those of right and wrong
    "grpo": dict(advantage="grpo", aggregate="sequence", drop=False, beta=0.04,
                 kl_in="loss", kl_estimator="k3"),
    # Liu et al. 2025: neither division, and no KL
    "dr_grpo": dict(advantage="dr_grpo", aggregate="constant", drop=False, beta=0.0,
                    kl_in="reward"),
    # Ahmadian et al. 2024: REINFORCE with the other answers as baseline; the gradient of J
    "rloo": dict(advantage="rloo", aggregate="sum", drop=False, beta=0.05, kl_in="reward"),
    # Yu et al. 2025: unlikely tokens may rise further, every token counts the same, no KL
    "dapo": dict(advantage="grpo", aggregate="tokens", clip_high=0.28, drop=True, beta=0.0,
                 kl_in="loss"),
}


# --- the mathematics -----------------------------------------------------------------------------


def has_signal(score, K):
    """Which groups tell good from bad, (B / K,) bool: not all scores equal.

    score (B,), the K responses to a prompt adjacent. All right or all wrong, a group says nothing
    about the task: its advantages are 0, or with the KL in the reward those of the KL alone.
    """
    group = score.view(-1, K)
    return group.amax(1) > group.amin(1)


def group_advantage(reward, K, kind):
    """Advantage of every response against its group, (B,); 0 where all K rewards are equal.

        grpo      A_i = (r_i - mean(r)) / std(r)                          (Shao et al. 2024, 4.1.2)
        dr_grpo   A_i = r_i - mean(r)                                     (Liu et al. 2025)
        rloo      A_i = r_i - mean of the other K - 1 = K / (K - 1) (r_i - mean(r))
                                                                          (Ahmadian et al. 2024)

    reward (B,), the K responses to a prompt adjacent; units of reward, for grpo none. Only rloo's
    baseline is independent of the response it is taken off: its gradient is exact on average, that
    of dr_grpo is (K - 1) / K of it. std is the unbiased one, + 1e-4 against rounding blown up.
    """
    group = reward.view(-1, K)
    centred = group - group.mean(1, keepdim=True)
    if kind == "grpo":
        centred = centred / (group.std(1, keepdim=True) + 1e-4)
    elif kind == "rloo":
        centred = centred * (K / (K - 1))
    # exactly 0: a mean of equal numbers is off by rounding, which a small std would magnify
    return (centred * has_signal(reward, K)[:, None]).flatten()


def policy_loss(logp, old_logp, advantage, response_mask, clip, clip_high):
    """Clipped surrogate, negated: (B,), a SUM over the tokens of each response.

        - sum_t min(ratio_t A, clip(ratio_t, 1 - clip, 1 + clip_high) A)

    logp, old_logp, response_mask (B, T); advantage (B,), one for all tokens of a response. With
    clip_high above clip (DAPO: 0.28) an unlikely token can gain more in one iteration: 0.01 may
    become 0.0128 where a likely one hits its ceiling anyway. Returns (loss, info) as in ppo.py.
    """
    log_ratio = (logp - old_logp) * response_mask
    ratio, advantage = log_ratio.exp(), advantage[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip_high) * advantage
    loss = -(torch.minimum(unclipped, clipped) * response_mask).sum(1)
    with torch.no_grad():
        info = dict(clip_fraction=((clipped < unclipped) * response_mask).sum(),
                    approx_kl=((ratio - 1 - log_ratio) * response_mask).sum(),
                    ratio_max=(ratio * response_mask).max())
    return loss, info


def kl_loss(logp, ref_logp, response_mask, estimator):
    """The KL term of --kl_in=loss, (B,), one number a response, by l = logp - ref_logp:

        k2   0.5 (sum_t l_t)^2              of the whole response
        k3   sum_t exp(-l_t) - 1 + l_t      token by token, GRPO's published choice

    logp, ref_logp (B, T) in nats per token. A loss is differentiated with the samples held fixed,
    and then it is not the value of an estimator that counts but its gradient:
    - k1, sum_t l_t, has gradient sum_t dlog pi(y_t), which is 0 on average: no penalty at all. It
      belongs into the reward, where it multiplies dlog pi: E[ l dlog pi ] = dKL(pi || ref).
    - k2 has gradient (sum_t l_t) sum_t dlog pi(y_t), the same thing. Token by token,
      sum_t l_t dlog pi(y_t), a token does not pay for the drift of what follows it (docs/kl.md).
    - k3 has gradient sum_t (1 - exp(-l_t)) dlog pi(y_t): that of KL(ref || pi) at each visited
      state. Bounded for tokens that the policy favours, explosive for those that it gave up.
    """
    log_ratio = (logp - ref_logp) * response_mask
    if estimator == "k2":
        return 0.5 * log_ratio.sum(1) ** 2
    return ((-log_ratio).exp() - 1 + log_ratio).sum(1)


def row_weights(lengths, kept, aggregate, max_length):
    """What the sum over a response's tokens is multiplied by, (B,), for a WHOLE optimiser step.

        sequence   1 / (n length_i)   mean over tokens, then over responses     (GRPO)
        constant   1 / (n max_length) the same for every token of every run     (Dr. GRPO)
        tokens     1 / sum_i length_i every token of this step counts the same  (DAPO)
        sum        1 / n              the log-probability of a response is a sum (RLOO)

    lengths (B,) in tokens; kept (B,), 1, or 0 for responses of dropped groups, which count neither
    above nor below the line; n = sum kept. Only sum and constant follow the gradient of J.
    """
    n = kept.sum()
    per = dict(sequence=n * lengths, constant=n * max_length, tokens=(kept * lengths).sum(), sum=n)
    return kept / per[aggregate]


# --- the parts of an iteration -------------------------------------------------------------------


def rollout(policy, train, tokenizer, config, step):
    """K plain samples from softmax(logits / T) of each of an iteration's batch_size / K prompts.

    train: as `load_prompts` returns it. Returns (prompts, texts, tokens, mask, finished): prompts,
    the row of train that each of the B responses answers; texts, the responses; the others as
    `generate` returns them.
    """
    n_prompts = config.batch_size // config.k
    chosen = common.stream(config.seed, "grpo", "prompts", step).choice(
        len(train), n_prompts, replace=len(train) < n_prompts)
    prompts, mine = [train[i] for i in chosen], batches.to_compute(n_prompts)
    with autocast(policy.wte.weight.device):
        answers = generate(
            policy, [prompts[i][1] for i in mine], config.max_new_tokens, tokenizer.eos,
            config.temperature, common.uniforms(config.seed, "grpo", "answers", step, mine,
                                                config.max_new_tokens, config.k),
            samples=config.k)
    tokens, mask, finished = batches.gather_answers(*answers, n_prompts, tokenizer.pad, config.k)
    texts = [tokenizer.decode(t[m].tolist()) for t, m in zip(tokens.cpu(), mask.bool().cpu())]
    return [p for p in prompts for _ in range(config.k)], texts, tokens, mask, finished


def verify(texts, finished, answers):
    """1.0 for every finished response that is right, else 0.0: a list. answers: of each a text that
    ends on a number, or a list of constraints."""
    return [float(f and is_right(t, a)) for t, f, a in zip(texts, finished, answers)]


def judge(reward_model, prompts, texts, tokens, mask, finished, config):
    """Score of every response, (B,), by the reward model or by the verifier; the arguments as
    `rollout` returns them."""
    if config.reward == "model":
        with torch.no_grad():
            return score_batch(reward_model, tokens, mask, config.micro_batch)
    return torch.tensor(verify(texts, finished.tolist(), [answer for _, _, answer in prompts]),
                        device=tokens.device)


def prepare(policy, reference, tokens, mask, finished, score, config):
    """Everything that stays fixed while we train on a batch of groups.

    tokens, mask (B, T) and finished (B,) as `generate` returns them, K rows a prompt; score (B,),
    used where finished. Returns a dict: tokens, mask, finished; score (B,), that of cut responses
    in place; reward (B,), KL included; advantage, kept (B,); old_logp, ref_logp, entropy (B, T),
    nats per token, 0 outside the mask. With beta 0 the reference is not asked: ref_logp is None.
    """
    def measure(p):
        # old log-probabilities from the training forward, not from the sampler, see ppo.py
        logp, entropy, _, _ = token_stats(policy, tokens[p], mask[p], config.temperature,
                                          entropy=True)
        ref_logp = [token_logprobs(reference, tokens[p], mask[p], config.temperature)
                    ] if config.beta > 0 else []
        return torch.stack([logp, entropy, *ref_logp], 1)  # (n, 2 or 3, T)

    with torch.no_grad(), autocast(tokens.device):
        old_logp, entropy, *ref_logp = batches.in_pieces(
            measure, batches.ends_together(tokens, mask), config.micro_batch).unbind(1)
    ref_logp = ref_logp[0] if ref_logp else None
    # a response cut by the length limit is not judged: for a verifier it is wrong
    missing = config.missing_eos if config.reward == "model" else 0.0
    reward = score = torch.where(finished, score, torch.full_like(score, missing))
    if config.beta > 0 and config.kl_in == "reward":
        # k1 of the sequence, before the baseline: the others pay theirs, so it is centred as well
        reward = score - config.beta * ((old_logp - ref_logp) * mask).sum(1)
    kept = torch.ones_like(score)
    if config.drop:  # by the score: the KL alone is no reason to keep a group
        kept = has_signal(score, config.k).repeat_interleave(config.k).to(score.dtype)
    return dict(tokens=tokens, mask=mask, finished=finished, score=score, reward=reward, kept=kept,
                advantage=group_advantage(reward, config.k, config.advantage), old_logp=old_logp,
                ref_logp=ref_logp, entropy=entropy)


def losses(logp, batch, p, config):
    """(policy's loss, KL's loss, info): the two terms (B,) of the responses p of a batch."""
    loss, info = policy_loss(logp, batch["old_logp"][p], batch["advantage"][p], batch["mask"][p],
                             config.clip, config.clip_high)
    kl = torch.zeros_like(loss)
    if config.beta > 0 and config.kl_in == "loss":
        kl = config.beta * kl_loss(logp, batch["ref_logp"][p], batch["mask"][p],
                                   config.kl_estimator)
    return loss, kl, info


def update(policy, optimizer, batch, config, rng, text=None, iteration=None):
    """Train the policy on the batch that `prepare` returned: epochs of minibatches.

    rng: numpy Generator, for the order of the responses: groups need not stay together, their
    advantages are fixed. text: rows (n, T) of pretraining text. iteration: its number; on the
    first minibatch of iteration 0 assert that ratios are 1 and the KL is 0. UserError, before an
    optimiser's step, where a loss or the gradient is not finite.
    Returns means per response token over all epochs (clip_fraction, approx_kl) and ratio_max, of
    the responses that are kept, and the means of the steps' policy_loss, kl_loss and gradient norm
    before clipping; the last ptx_loss or None.
    """
    tokens, mask, kept = batch["tokens"], batch["mask"], batch["kept"]
    device, steps, ptx = tokens.device, [], None
    lengths = batches.ends_together(tokens, mask)
    totals = dict.fromkeys(("clip_fraction", "approx_kl", "seen"), 0.0)  # seen: response tokens
    check = iteration == 0 and not config.reference
    ratio_max = torch.zeros((), device=device)
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(tokens))).to(device)
        for rows in order.split(config.batch_size // config.minibatches):
            rows = rows[kept[rows] > 0]  # a dropped group costs no forward pass either
            if len(rows) == 0 and config.ptx_coef == 0:
                continue  # every group was dropped: there is nothing to learn from
            weights = torch.zeros_like(kept)
            weights[rows] = row_weights(mask[rows].sum(1), kept[rows], config.aggregate,
                                        config.max_new_tokens)
            step = torch.zeros(2, device=device)
            mine = batches.share(rows)
            for p in batches.by_length(mine, lengths, config.micro_batch) if len(mine) else ():
                weight = weights[p]
                with autocast(device):
                    logp = token_logprobs(policy, tokens[p], mask[p], config.temperature)
                loss, kl, info = losses(logp, batch, p, config)
                (weight * (loss + kl)).sum().backward()
                step += torch.stack([(weight * x).sum().detach() for x in (loss, kl)])
                ratio_max = torch.maximum(ratio_max, info.pop("ratio_max"))
                for name, value in (info | dict(seen=mask[p].sum())).items():
                    totals[name] = totals[name] + value
                if check and not steps:
                    old_logp, ref_logp = batch["old_logp"][p], batch["ref_logp"]
                    check_start((logp - old_logp) * mask[p], None if ref_logp is None else
                                ((old_logp - ref_logp[p]) * mask[p]).sum(1).mean())
                    check = False
            if config.ptx_coef > 0:
                ptx = batches.text_share(policy, text[rng.integers(0, len(text), config.ptx_batch)])
                (config.ptx_coef * ptx).backward()
            common.sum_gradients(policy)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
            steps.append(torch.stack([*common.total(step), norm]))
            common.check_finite(config, iteration, policy_loss=step[0], kl_loss=step[1],
                                grad_norm=norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    mean = torch.stack(steps).mean(0).tolist() if steps else [0.0, 0.0, 0.0]
    *sums, seen = common.total(torch.tensor([float(v) for v in totals.values()],
                                            dtype=torch.double)).tolist()
    return dict(policy_loss=mean[0], kl_loss=mean[1], grad_norm=mean[2],
                ratio_max=common.total(ratio_max, most=True).item(),
                ptx_loss=common.total(ptx.detach()).item() if ptx is not None else None,
                **{k: v / max(seen, 1) for k, v in zip(totals, sums)})


# --- the stage -----------------------------------------------------------------------------------


def resolve(config):
    """The config with --method's choices where none was made; UserError for an unknown name."""
    names = dict(reward=("verifier", "model"), method=METHODS, kl_in=("reward", "loss"),
                 kl_estimator=("k2", "k3"), advantage=("grpo", "dr_grpo", "rloo"),
                 aggregate=("sequence", "constant", "tokens", "sum"), score_by=SCORE_BY)
    for name, allowed in names.items():
        if getattr(config, name) not in (None, *allowed):
            raise UserError(f"--{name}={getattr(config, name)}: expected one of "
                            + ", ".join(allowed))
    if config.k < 2 or config.batch_size % config.k or config.batch_size % config.minibatches:
        raise UserError(f"--batch_size={config.batch_size} must be a multiple of --k={config.k}, "
                        f"at least 2, and of --minibatches={config.minibatches}")
    asked = config.kl_estimator
    chosen = dict(clip_high=config.clip, kl_estimator="k2") | METHODS[config.method]
    if config.method == "rloo" and config.reward == "model":
        chosen["beta"] = 0.1  # its scores spread twice as far as those of right and wrong
    config = dataclasses.replace(config, **{name: value for name, value in chosen.items()
                                            if getattr(config, name) is None})
    if config.kl_in == "reward" and asked:
        raise UserError(f"--kl_estimator={asked} belongs to --kl_in=loss; in the reward the KL is "
                        "k1")
    return config


def load_sides(config, tokenizer, room):
    """(training prompts, held-out ones), as `load_prompts` returns them: with answers for the
    verifier, which of the embedded prompts knows those of arithmetic only."""
    options = dict(families=FAMILIES, check=check_prompt) if config.reward == "model" else \
        dict(families=("arithmetic",), check=check_answer)
    counts = {"training": 2000 if config.data == "synthetic" else None,
              "held-out": config.eval_prompts}
    return load_prompts(config.data, counts, tokenizer, room, config.seed,
                        skip_bad=config.skip_bad, **options)


def main(config):
    device = common.set_up(config, "grpo")
    config = resolve(config)

    # --- two networks, or three with a reward model, and the prompts ---------
    policy, reference, reward_model, tokenizer, parents, block_size = load_networks(
        config, device, config.reward == "model")
    config = common.sized(config, "grpo", policy)
    common.prepare_blocks(config, policy)
    if reward_model is not None:
        common.freeze(reward_model)
    synthetic = config.data == "synthetic"
    train, held_out = load_sides(config, tokenizer, block_size - config.max_new_tokens)
    text = None  # rows of pretraining text, or None
    if config.ptx_coef > 0:
        text = text_rows(config.ptx_data, tokenizer, min(config.text_length, block_size), 3000,
                         config.seed, config.skip_bad)
    common.say_warmup(config.iterations, config.warmup)
    run = common.Run("grpo", config, device, parents)
    print(f"policy {policy.num_params():,} parameters\n{len(train):,} prompts of {config.data}, "
          f"{len(held_out)} held out")

    optimizer = common.adamw([policy], config.lr, eps=config.adam_eps)
    first = run.load_state(policy=policy, optimizer=optimizer).get("step", 0)

    def save(step):
        run.save_state(step, config.iterations, policy=policy, optimizer=optimizer)

    bar = progress(range(first, config.iterations), "grpo", initial=first, total=config.iterations)
    for step in bar:
        if run.due(step, config.save_every):
            save(step)
        clock = [time.perf_counter()]

        # --- rollout: K answers to each prompt -------------------------------
        prompts, texts, tokens, mask, finished = rollout(policy, train, tokenizer, config, step)
        clock.append(time.perf_counter())

        # --- score: right or wrong, or what the reward model says ------------
        score = judge(reward_model, prompts, texts, tokens, mask, finished, config)

        # --- prepare: every answer against the others of its group -----------
        batch = prepare(policy, reference, tokens, mask, finished, score, config)
        common.check_finite(config, step, score=score, logp=batch["old_logp"])
        clock.append(time.perf_counter())

        # --- update: a few minibatches on the clipped loss -------------------
        factor = common.linear(step, config.iterations, config.warmup)
        common.set_lr(optimizer, config.lr * factor)
        trained = update(policy, optimizer, batch, config,
                         common.stream(config.seed, "grpo", "minibatches", step), text,
                         step)
        clock.append(time.perf_counter())

        # --- log: nothing from here on changes the weights -------------------
        asked = [prompt for prompt, *_ in prompts]
        row = dict(
            step=step, lr=config.lr * factor, score=batch["score"].mean().item(),
            accuracy=score.mean().item() if config.reward == "verifier" else None,
            no_signal=1 - has_signal(batch["score"], config.k).float().mean().item(),
            kept=batch["kept"].mean().item(), advantage_std=batch["advantage"].std().item(),
            **rollout_metrics(batch, asked, texts, config.beta, clock, synthetic), **trained)
        run.log(**row)
        watch_rollouts(run, config, row, batch, score, reward_model)
        if step % config.log_every == 0 or step + 1 == config.iterations:  # of one group
            show_samples(run, step, asked, texts[:min(config.k, 4)], score=batch["score"],
                         advantage=batch["advantage"])
        if step == 0:
            say(f"The policy loss starts at {trained['policy_loss']:.4f} and says little: at ratio "
                "1 it is a sum of\nadvantages, and those of a group sum to 0. Its gradient does "
                "not. Watch score and accuracy.")
        bar.set_postfix({name: f"{row[name] or 0:.2f}" for name in ("score", "kl", "no_signal")})
    save(config.iterations)

    metrics, _, _ = compare(policy, reference, tokenizer, held_out, config, run, synthetic,
                            reward_model, verifier=config.reward == "verifier")
    run.save_model(policy, tokenizer, metrics)
    run.finish(metrics, f"python evaluate.py --policy={config.out} --reference="
               + (config.reference or config.init)
               + ("" if synthetic else f" --data={config.data}"))


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
