"""Stages 2 and 3 in one: preferences straight into the policy, without reward model or sampling.

    P(y_w > y_l | x) = sigmoid(r(y_w) - r(y_l)),   pi* ~ pi_ref exp(r / beta)
    =>  r(y) = beta log pi*(y) / pi_ref(y) + a constant of the prompt, which cancels in the pair
    L_DPO = - log sigmoid( beta log pi(y_w)/pi_ref(y_w) - beta log pi(y_l)/pi_ref(y_l) )

(Rafailov et al. 2023, eq. 7): the loss of reward.py, with the policy's own log-ratio as the reward.
Its relatives are a few lines each, see "the losses". Log-probabilities are sums over the tokens of
a response, EOS included; those of the reference are computed once and kept on disk.

    python dpo.py                                  # the rankings of label.py
    python dpo.py --loss=simpo                     # or cdpo, ipo, ipo_mean, dpo_norm, kto
    python dpo.py --data=out/data/hh_rlhf.jsonl --init=...      # any file of pairs or rankings

    {"prompt": P, "chosen": text, "rejected": text}          # P is text or a list of turns
    {"prompt": P, "completions": [text, text, ...], "ranks": [1, 2, ...]}        # 1 is best
    {"prompt": P, "completion": text, "label": true}         # with --loss=kto
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "out/label/rankings.jsonl"  # file of rankings, pairs or (kto) labels
    out: str = "out/dpo"  # output folder
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    init: str = "out/sft"  # policy to start from
    reference: str | None = None  # policy that the KL is measured to; auto: --init
    # --- the loss
    loss: str = "dpo"  # dpo, cdpo, ipo, ipo_mean, dpo_norm, simpo, kto
    beta: Positive[float] | None = None  # its unit depends on the loss, see LOSSES
    lr: Positive[float] | None = None  # peak; warm-up, then cosine to 0
    label_smoothing: NotNegative[float] = 0.1  # cdpo: share of labels taken to be flipped
    simpo_margin: float = 0.5  # simpo: gamma / beta, nats per token between chosen and rejected
    desirable: NotNegative[float] = 1.0  # kto: weight of the desirable answers
    undesirable: NotNegative[float] = 1.0  # kto: weight of the undesirable ones
    nll: NotNegative[float] = 0.0  # weight of an SFT loss on the best answers, in any loss
    # --- training
    epochs: Positive[int] = 1
    batch_size: Positive[int] = 8  # prompts a step, each with all its answers
    micro_batch: NotNegative[int] | None = None  # answers a forward pass; 0: no bound
    warmup: NotNegative[int] | None = None  # steps
    weight_decay: NotNegative[float] = 0.0
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    reference_cache: str = "out/reference_logps"  # folder for the reference's log-probabilities
    # --- looking and saving
    temperature: Positive[float] = 1.0  # of the samples in the comparison at the end
    max_new_tokens: Positive[int] | None = None  # of these samples
    eval_prompts: Positive[int] = 512  # held-out prompts of the comparison
    save_every: Positive[int] = 100  # steps between saved states


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
from cli import progress, say
from data import batches
from data.load import (all_rows, batch_rows, choose_elements, load_prompts, load_rankings,
                       pair_indices)
from data.records import check_ranking, check_ranking_or_label, embedded
from evaluate import check_start, compare, load_networks, sequence_logprobs
from model import autocast, token_logprobs

# beta and learning rate of each where the flags leave them open: common.AUTO. The units of beta
# differ: it multiplies nats per sequence in dpo, cdpo and kto, nats per token in dpo_norm and
# simpo, and the two ipo aim at a margin of 1 / (2 beta).
LOSSES = ("dpo", "cdpo", "ipo", "ipo_mean", "dpo_norm", "simpo", "kto")

NOT_LEARNT = ("the training pairs are not learnt: a coin orders them as well. Do the labels "
              "contradict each other? Is --lr or --beta too low?")


# --- the losses: one value a pair (kto: an answer), no reduction ----------------------------------
#
# chosen, rejected (pairs,): log pi(y | x) - log pi_ref(y | x), the log-ratio of a whole response in
# nats; "per token" means divided by its tokens, EOS included.
# A new loss is a function here, a line in `pair_loss`, one in `implicit_reward` if its ratios are
# others, its name in LOSSES and its values in common.AUTO.


def dpo_loss(chosen, rejected, beta):
    """Rafailov et al. 2023, eq. 7: -log sigmoid(beta (chosen - rejected)). ln 2 at the start.

    Its gradient in the margin m = chosen - rejected is -beta sigmoid(-beta m): pairs that the
    policy already orders well by its log-ratios hardly count.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def cdpo_loss(chosen, rejected, beta, smoothing):
    """Mitchell 2023: labels are taken to be flipped with probability e = smoothing.

        - (1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),   m = chosen - rejected

    Least at sigmoid(beta m) = 1 - e instead of at infinity. ln 2 at the start.
    """
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen, rejected, beta):
    """Azar et al. 2023, eq. 17: (chosen - rejected - 1 / (2 beta))^2, beta being their tau.

    A regression to a finite margin: pairs that everybody orders alike do not drive the policy to
    0 and 1. The paper sums over tokens (`--loss=ipo`); its authors later asked TRL for a mean per
    token (`--loss=ipo_mean`): then chosen and rejected come per token.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen, rejected, beta, margin):
    """Meng et al. 2024, eq. 6: -log sigmoid(beta (chosen - rejected) - gamma), without reference.

    chosen, rejected are log pi(y | x) per token here, not ratios; gamma = beta margin.
    """
    return -F.logsigmoid(beta * (chosen - rejected - margin))


def kto_loss(log_ratio, label, baseline, config):
    """Ethayarajh et al. 2024, eq. 8, for single answers: lambda_y - v(x, y), with

        v = lambda_D sigmoid(beta (log_ratio - z0))   where label is 1 (desirable)
        v = lambda_U sigmoid(beta (z0 - log_ratio))   where it is -1

    log_ratio, label (n,). z0 = baseline: `kl_baseline`, a constant. lambda / 2 at the start; an
    answer whose label is 0 costs nothing.
    """
    weight = torch.where(label > 0, config.desirable, config.undesirable) * label.abs()
    return weight * (1 - torch.sigmoid(label * config.beta * (log_ratio - baseline)))


def implicit_reward(seq_logp, ref_seq_logp, length, loss, beta):
    """The reward that a loss reads off the policy, (n,): beta log pi / pi_ref for most.

    Per token for ipo_mean and dpo_norm (Lambert et al. 2024, Tulu 3); simpo has no reference.
    Chosen and rejected go into a loss in these units, divided by beta.
    """
    if loss == "simpo":
        return beta * seq_logp / length
    reward = beta * (seq_logp - ref_seq_logp)
    return reward / length if loss in ("ipo_mean", "dpo_norm") else reward


def pair_loss(config, seq_logp, ref_seq_logp, length, winners, losers):
    """The loss that config names, (pairs,), from what each answer has, (answers,) each.

    seq_logp, ref_seq_logp in nats per sequence; length in tokens. winners, losers: indices.
    """
    ratio = implicit_reward(seq_logp, ref_seq_logp, length, config.loss, 1.0)
    chosen, rejected = ratio[winners], ratio[losers]
    if config.loss == "cdpo":
        return cdpo_loss(chosen, rejected, config.beta, config.label_smoothing)
    if config.loss in ("ipo", "ipo_mean"):
        return ipo_loss(chosen, rejected, config.beta)
    if config.loss == "simpo":
        return simpo_loss(chosen, rejected, config.beta, config.simpo_margin)
    if config.loss in ("dpo", "dpo_norm"):  # the second with ratios per token
        return dpo_loss(chosen, rejected, config.beta)
    raise ValueError(f"pair_loss has no line for {config.loss}")


def ordered(margin):
    """1 where the margin is positive, 0 where negative, 1/2 for a tie: closer than rounding."""
    return torch.sign(margin * (margin.abs() > 1e-5)) / 2 + 0.5


def kl_baseline(seq_logp, ref_seq_logp):
    """KTO's z0: KL(pi || pi_ref) estimated from answers to OTHER prompts, at least 0, no gradient.

    seq_logp, ref_seq_logp (n,) of answer y_{i+1} behind prompt x_i: one step of rotation. A
    reversal would leave the middle one in place, and matched answers are not what z0 is about.
    """
    return (seq_logp - ref_seq_logp).detach().mean().clamp(min=0)


# --- data -----------------------------------------------------------------------------------------


def load_data(config, tokenizer, block_size):
    """A Split of Elements, as data/load.py makes them."""
    check = check_ranking_or_label if config.loss == "kto" else check_ranking

    def labelled(name, elements):
        if config.loss == "kto" and not any(any(e.labels) for e in elements):
            raise UserError(f"--data={config.data}: every {name} answer wins as often as it loses, "
                            "so kto has no labels")
        if config.loss == "kto" and len({n for e in elements for n in e.labels} - {0}) == 1:
            raise UserError(f"--data={config.data}: all {name} answers are labelled alike; kto "
                            "learns from the difference of wanted and unwanted ones")
        return elements

    return load_rankings(config.data, tokenizer, block_size, check,
                         config.skip_bad).each(labelled)


def answer_tensors(elements, device):
    """(ref_seq_logp, length, label (n,), winners, losers, best).

    n answers of all elements, one after the other; the last three are lists of indices into them.
    """
    starts = np.cumsum([0] + [len(e.numbers) for e in elements]).tolist()
    best = [start + n for start, e in zip(starts, elements) for n in e.best]
    flat = lambda parts: torch.tensor([x for part in parts for x in part],
                                      dtype=torch.get_default_dtype(), device=device)
    return (flat(e.ref for e in elements), flat(e.facts("response").tolist() for e in elements),
            flat(e.labels for e in elements), *pair_indices(elements), best)


def batch_tensors(elements, pad, device):
    """(tokens (n, T), mask (n, T), and what `answer_tensors` returns) of a batch."""
    return *batch_rows(elements, pad, device), *answer_tensors(elements, device)


def mismatch(first, second, n):
    """(ids, mask): the prompt of the one Element with the nth answer to the other, for z0. They
    take turns (n modulo their number): of a pair the first one is always the chosen one, and
    training raises just these."""
    row, mask = second.source[second.numbers[n % len(second.numbers)]]
    answer = [t for t, m in zip(row, mask) if m]
    return first.prompt + answer, [0] * len(first.prompt) + [1] * len(answer)


def set_reference(elements, logps):
    """Set `ref` of every Element; logps (answers,), as `all_rows` has them."""
    rest = iter(logps.tolist())
    for e in elements:
        e.ref = [next(rest) for _ in e.numbers]


def reference_logprobs(reference, elements, tokenizer, config, device):
    """Set `ref` of every Element: from the cache if it holds exactly these, else computed.

    The key is a hash of everything the numbers depend on: the reference's weights, every token and
    mask of the data, the tokenizer, and the device's precision. The file is called by its key and
    repeats it inside; one that says something else is refused, not used. It is written every
    --save_minutes as well, and when the run is stopped: then it holds those of the first answers.
    """
    rows, masks = all_rows(elements)
    key = common.text_hash(json.dumps([
        common.weights_hash(reference.state_dict()), rows.hash(), masks.hash(), tokenizer.hash,
        device.type]))
    path = Path(config.reference_cache) / f"{key}.pt"
    logps, size = torch.zeros(0, dtype=torch.float64), 1024  # answers between two looks at the time
    try:
        cached = common.by_the_first(lambda: common.load_file(path) if path.exists() else None)
    except UserError as error:  # damaged, or of an earlier version
        raise UserError(f"{error}. Delete it and it is computed again") from None
    if cached is not None:
        if cached.get("key") != key or not isinstance(cached.get("logps"), torch.Tensor) \
                or cached["logps"].dim() != 1 or len(cached["logps"]) > len(rows):
            raise UserError(f"{path} does not hold what its name says: stale or mixed up. Delete it"
                            " and it is computed again")
        logps = cached["logps"]
        say(f"reference log-probabilities of {len(logps):,} of {len(rows):,} answers from {path}")
    common.make_folder("reference_cache", path.parent)  # before the work, in case it cannot be
    saved, clock = len(logps), time.monotonic()
    bar = progress(range(saved, len(rows), size), "reference", initial=saved // size,
                   total=-(-len(rows) // size))
    try:
        for start in bar:
            part = np.arange(start, min(start + size, len(rows)))
            logps = torch.cat([logps, sequence_logprobs(reference, rows.select(part),
                                                        masks.select(part), tokenizer.pad)])
            if time.monotonic() - clock > 60 * config.save_minutes:
                common.save_file(dict(key=key, logps=logps), path)
                saved, clock = len(logps), time.monotonic()
    finally:
        if len(logps) > saved:
            common.save_file(dict(key=key, logps=logps), path)
    set_reference(elements, logps)


# --- the stage ------------------------------------------------------------------------------------


@torch.no_grad()
def pair_metrics(policy, elements, config, pad):
    """What the loss has done to the answers, means over pairs (of single answers: over answers).

    loss, for kto with z0 = 0; accuracy: share of the pairs whose implicit rewards are ordered as
    labelled, ties half; chosen_reward, rejected_reward, margin; chosen_logp, rejected_logp in nats
    per sequence. Both of them may fall while the margin grows: docs/dpo.md says when to worry.
    """
    ref, length, label, winners, losers, _ = answer_tensors(elements, "cpu")
    seq_logp = sequence_logprobs(policy, *all_rows(elements), pad)
    reward = implicit_reward(seq_logp, ref, length, config.loss, config.beta)
    if config.loss == "kto":
        loss = kto_loss(seq_logp - ref, label, 0.0, config)[label != 0]
    else:
        loss = pair_loss(config, seq_logp, ref, length, winners, losers)
    if winners:
        right = ordered(reward[winners] - reward[losers])
    else:  # single answers: without pairs, a reward is right by its sign
        right = ordered(reward * label)[label != 0]
        winners, losers = label > 0, label < 0
    chosen, rejected = reward[winners].mean().item(), reward[losers].mean().item()
    return dict(loss=loss.mean().item(), accuracy=right.mean().item(), chosen_reward=chosen,
                rejected_reward=rejected, margin=chosen - rejected,
                chosen_logp=seq_logp[winners].mean().item(),
                rejected_logp=seq_logp[losers].mean().item())


def epoch_order(train, epoch, config):
    """The prompts of an epoch as indices, those of a batch with answers of like length."""
    return batches.like_length([e.longest for e in train], config.batch_size,
                               common.stream(config.seed, "dpo", "order", epoch))


def other_prompt(train, order, n):
    """The Element behind the nth in the order that has another prompt: labelled answers of one
    prompt are Elements of their own, and being of like length they often stand together."""
    key = train[order[n]].facts("key")[0]
    for i in range(n + 1, n + len(order)):
        if train[order[i % len(order)]].facts("key")[0] != key:
            return train[order[i % len(order)]]
    return train[order[(n + 1) % len(order)]]  # there is one prompt only


def batch_of(train, order, i, config):
    """(elements, others) of the ith step of an epoch. elements: those of its prompts; others, for
    kto and else empty: each of these prompts with an answer to the next one, (ids, mask), for z0.
    """
    chosen = range(i * config.batch_size, min((i + 1) * config.batch_size, len(train)))
    others = []
    if config.loss == "kto":
        others = [mismatch(train[order[n]], other_prompt(train, order, n), n) for n in chosen]
    return [train[order[n]] for n in chosen], others


def per_step(train, config):
    """(pairs, or kto's labelled answers; tokens of the best answers) of an average step."""
    steps = -(-len(train) // config.batch_size)
    count = sum(sum(map(abs, e.labels)) if config.loss == "kto" else len(e.pairs) for e in train)
    best = sum(int(e.facts("response")[n]) for e in train for n in e.best)
    return count / steps, best / steps


def update(policy, reference, optimizer, batch, others, average, config, pad, step=None):
    """Train the policy on what `batch_of` returned: one optimiser step, its learning rate set.

    The loss is its sum over pairs (kto: labelled answers) divided by their number in an average
    step; average: what `per_step` returns. step: its number; in step 0 assert that every log-ratio
    is 0, unless there is a --reference. UserError, before the optimiser's step, where the loss or
    the gradient is not finite. Returns tensors or floats: loss and accuracy, means over the pairs
    or answers of this step; baseline, kto's z0; grad_norm, before clipping.
    """
    device, baseline = policy.wte.weight.device, 0.0
    if config.loss == "kto":
        # a long prompt and a long answer that fit apart may not fit together
        others = [o for o in others if len(o[0]) <= policy.config.block_size]
        if others:  # z0, of the whole step
            baseline = kl_baseline(*(sequence_logprobs(m, *zip(*others), pad)
                                     for m in (policy, reference)))
        count = max(1, sum(sum(map(abs, e.labels)) for e in batch))  # labelled answers of the step
    else:
        count = sum(len(e.pairs) for e in batch)  # pairs of the step
    sums = torch.zeros(2, device=device)  # of this process's share: loss, right pairs or answers
    if mine := batches.share(batch):
        tokens, mask, ref, length, label, winners, losers, best = batch_tensors(mine, pad, device)
        with autocast(device):  # every answer once; micro_batch bounds memory, not what is compared
            seq_logp = batches.in_pieces(
                lambda p: token_logprobs(policy, tokens[p], mask[p]).sum(1),
                batches.ends_together(tokens, mask), config.micro_batch)
        if config.loss == "kto":
            loss = kto_loss(seq_logp - ref, label, baseline, config).sum()
            right = ordered((seq_logp.detach() - ref - baseline) * label)[label != 0]
        else:
            loss = pair_loss(config, seq_logp, ref, length, winners, losers).sum()
            reward = implicit_reward(seq_logp.detach(), ref, length, config.loss, config.beta)
            right = ordered(reward[winners] - reward[losers])
        if step == 0 and not config.reference and loss.isfinite():  # else the line below
            check_start(seq_logp - ref, limit=1e-3 + 1e-6 * ref.abs().max())
        sums += torch.stack([loss.detach(), right.sum()])
        total = loss / average[0]
        if config.nll > 0 and best:  # SFT on the best answers, nats per token
            total = total - config.nll * seq_logp[best].sum() / average[1]
        total.backward()
    common.sum_gradients(policy)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
    common.check_finite(config, step, loss=sums[0], grad_norm=norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, right = common.total(sums)
    return dict(loss=loss / count, accuracy=right / count, baseline=baseline, grad_norm=norm)


def check_config(config):
    """UserError for a loss that is none, or labels that say nothing."""
    if config.loss not in LOSSES:
        raise UserError(f"--loss={config.loss}: expected one of {', '.join(LOSSES)}")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing={config.label_smoothing}: expected 0 to below 0.5")


def main(config):
    device = common.set_up(config, "dpo")
    check_config(config)

    # --- two networks, and the data ------------------------------------------
    policy, reference, _, tokenizer, parents, block_size = load_networks(config, device, False)
    config = common.sized(config, config.loss, policy)
    common.prepare_blocks(config, policy)
    common.ensure_input(config, "data", "label")
    origin = embedded(config.data)
    if origin:
        stage, parent = next(iter(parents.items()))
        common.check_lineage(stage, parent, {stage: origin["policy"]}, config.data)
    data = load_data(config, tokenizer, block_size)
    train, held_out = data.train, data.held_out
    [prompts] = load_prompts("synthetic" if origin else config.data,
                             {"held-out": config.eval_prompts}, tokenizer,
                             block_size - config.max_new_tokens, skip_bad=config.skip_bad)
    if config.loss == "kto" and len(train) < 2:
        raise UserError(f"--data={config.data}: kto needs at least two prompts, to measure z0")
    steps_per_epoch = -(-len(train) // config.batch_size)
    steps, average = config.epochs * steps_per_epoch, per_step(train, config)
    common.say_warmup(steps, config.warmup)
    run = common.Run("dpo", config, device, parents)
    pairs = sum(len(e.pairs) for e in train)
    print(f"{policy.num_params():,} parameters\n{config.data}"
          f"{' of the embedded world' if origin else ''}: {len(train):,} prompts with {pairs:,} "
          f"pairs, {len(held_out)} prompts held out")
    if config.loss == "kto":
        n = [sum(e.labels.count(x) for e in train) for x in (1, -1)]
        print(f"{n[0]} desirable and {n[1]} undesirable answers, weighted {config.desirable} : "
              f"{config.undesirable} (the paper's advice: weight times number in 1 : 1 to 3 : 2)")
    reference_logprobs(reference, train + held_out, tokenizer, config, device)
    # as many training prompts as held-out ones: DPO fits its own pairs better and better
    watched = choose_elements(train, len(held_out))

    def validate(epoch):
        """Held-out pairs beside training pairs, in one row of the log."""
        policy.eval()
        metrics = pair_metrics(policy, held_out, config, tokenizer.pad)
        common.check_finite(config, f"after epoch {epoch}", held_out_loss=metrics["loss"])
        trained = pair_metrics(policy, watched, config, tokenizer.pad)
        metrics |= dict(epoch=epoch, train_loss=trained["loss"], train_accuracy=trained["accuracy"])
        run.log("validation", **metrics)
        say(f"epoch {epoch}: " + ", ".join(
            f"{name} {metrics[name]:.3f}" for name in (
                "loss", "train_loss", "accuracy", "margin", "chosen_reward", "rejected_reward")))
        return metrics

    # --- training loop -------------------------------------------------------
    optimizer = common.adamw([policy], config.lr, config.weight_decay)
    state = run.load_state(policy=policy, optimizer=optimizer)

    def save(step):
        run.save_state(step, steps, policy=policy, optimizer=optimizer, metrics=metrics)

    first, metrics = state.get("step", 0), state.get("metrics") or validate(0)
    bar = progress(range(first, steps), "dpo", initial=first, total=steps)
    for step in bar:
        start = time.perf_counter()
        if run.due(step, config.save_every):
            save(step)
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == first:
            order = epoch_order(train, epoch, config)
        batch, others = batch_of(train, order, i, config)
        common.set_lr(optimizer, config.lr * common.cosine(step, steps, config.warmup))
        trained = update(policy, reference, optimizer, batch, others, average, config,
                         tokenizer.pad, step)
        # --- log: nothing from here on changes the weights -------------------
        if step % 10 == 0:
            row = {name: float(value) for name, value in trained.items()}
            answers, seconds = sum(len(e.numbers) for e in batch), time.perf_counter() - start
            run.log(step=step, lr=optimizer.param_groups[0]["lr"], **row,
                    answers_per_s=answers / seconds)
            run.watch(NOT_LEARNT, row["accuracy"] <= 0.5, 10)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.3f}")
        if i + 1 == steps_per_epoch:
            before, metrics = metrics, validate(epoch + 1)
            run.watch(NOT_LEARNT, metrics["train_accuracy"] < 0.52, 1)
            run.watch("the loss of the training pairs has risen over an epoch: lower --lr",
                      metrics["train_loss"] > before["train_loss"], 1)
            run.save_model(policy, tokenizer, metrics, f"model-epoch{epoch + 1}.pt")
    save(steps)

    metrics |= compare(policy, reference, tokenizer, prompts, config, run, bool(origin))[0]
    run.save_model(policy, tokenizer, metrics)
    run.finish(metrics, f"python evaluate.py --policy={config.out} --reference="
               + (config.reference or config.init)
               + ("" if origin else f" --data={config.data}"))


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
