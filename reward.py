"""Stage 2b, the reward model: Bradley-Terry on rankings of K answers per prompt.

    P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))
    L_RM = - sum over the pairs of log sigmoid(r(x, y_w) - r(x, y_l)) / pairs of an average batch

The network is the SFT model with a scalar head in place of the vocabulary, read at EOS. All
K(K-1)/2 pairs of a prompt sit in one batch element and each answer passes through the network
once (InstructGPT 3.1); spread over batches they would be seen K-1 times an epoch, and overfit.

The loss only fixes differences of r. So afterwards a shift and a scale are measured and stored with
the weights: demonstrations average 0, samples of the SFT model have standard deviation 1. Then
beta, the missing-EOS penalty and the critic mean the same in every run.

After the training it prints a report card, and edits answers by the gradient until they score high
(docs/reward.md). --ensemble=4 trains four networks from different seeds.

    python reward.py                                              # the rankings of label.py
    python reward.py --data=out/data/hh_rlhf.jsonl --init=...     # any file of pairs or rankings
    python reward.py --preflight=true                             # only looks at the rankings

    {"prompt": P, "chosen": text, "rejected": text}          # P is text or a list of turns
    {"prompt": P, "completions": [text, text, ...], "ranks": [1, 2, ...]}        # 1 is best
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "out/label/rankings.jsonl"  # file of rankings or pairs
    out: str = "out/reward"  # output folder
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    init: str = "out/sft"  # checkpoint to start from, and to sample from for the scale
    demos: str = "auto"  # demonstrations that average 0: a file; "auto": the embedded ones
    #                      for the embedded data, else training answers that won a pair
    pretrain_mix: NotNegative[float] = 0.5  # weight of the text's loss, as in sft.py; embedded data
    preflight: bool = False  # look at the data, overfit 32 pairs, and stop: no run
    # --- training
    ensemble: Positive[int] = 1  # networks from different seeds, trained one after the other
    epochs: Positive[int] = 1  # a second epoch overfits (InstructGPT, Gao et al.)
    batch_size: Positive[int] = 8  # prompts a step, each with all its answers
    micro_batch: NotNegative[int] | None = None  # answers a forward pass; 0: no bound
    lr: Positive[float] | None = None  # peak; warm-up, then cosine to 0
    warmup: NotNegative[int] | None = None  # steps
    weight_decay: NotNegative[float] = 0.0
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    # --- samples and saving
    max_new_tokens: Positive[int] | None = None  # SFT samples for the scale
    samples: Positive[int] = 512  # how many, and how many demonstrations
    probe: NotNegative[int] = 12  # edits of an answer by the gradient of the score; 0: no probe
    save_every: Positive[int] = 100  # steps between saved states


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from cli import note, progress, say
from data import batches
from data.load import all_rows, batch_rows, choose_elements, load_rankings, pair_indices
from data.preflight import preflight
from data.probe import probe
from data.records import check_demonstration, demonstration_rows, embedded, fits
from data.report_card import report_card, show
from data.synthetic.people import demonstrations
from data.synthetic.world import sample_prompts
from data.text import text_rows
from data.tokens import encode_rows, read_tokens
from model import GPT, GPTConfig, autocast, states, trim


class RewardModel(nn.Module):
    """A transformer and a scalar head, read at the last token of the response.

    forward returns the score, (B,): (raw - shift) / scale, in units of the spread of SFT samples.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        # small enough to start near zero, as summarize-from-feedback: std 1 / sqrt(d + 1), bias 0
        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def members(self):
        return [self]

    def raw(self, tokens, response_mask):
        """tokens (B, T), response_mask (B, T) -> (B,), the score before shift and scale, fp32.

        Read at the last position of the mask: the EOS of a complete response. Found by position,
        never by comparing ids, and never in the padding.
        """
        tokens, response_mask = trim(tokens, response_mask)
        last = batches.ends(response_mask).long()
        wanted = F.one_hot(last, tokens.shape[1]).bool()
        hidden = states(self.gpt, tokens, response_mask, wanted)  # (B, C)
        with torch.autocast(tokens.device.type, enabled=False):  # one number a row: keep it exact
            return self.head(hidden.to(self.head.weight.dtype))[:, 0]

    def forward(self, tokens, response_mask):
        return (self.raw(tokens, response_mask) - self.shift) / self.scale


def combine(scores, score_by):
    """(B,) of the scores (N, B) of N members: their mean; their minimum; or the mean less their
    standard deviation (divided by N): what all of them like, not what one of them likes (Coste et
    al. 2023). Of one member all three are its score. The result is not scaled again: over SFT
    samples it has standard deviation 0.97 (mean, of 4), 0.99 and 0.99, and by min and mean-std
    demonstrations fall below 0.
    """
    if score_by == "mean":
        return scores.mean(0)
    if score_by == "min":
        return scores.amin(0)
    return scores.mean(0) - scores.std(0, correction=0)


SCORE_BY = ("mean", "min", "mean-std")


class Ensemble(nn.Module):
    """Reward models of different seeds; forward combines their scores, each by its own shift and
    scale first, so that they are comparable.

    N networks, not N heads on one trunk: measured in the embedded world with N = 4, heads are one
    model four times (scores correlate by 0.999, spread 0.03), networks differ (0.88 to 0.95, 0.21)
    and their mean orders 93.5% of the pairs as gold does, each alone 92.5%. They cost N times as
    much to train. The spread does not tell where the mean is wrong: docs/reward.md.
    """

    def __init__(self, members, score_by="mean"):
        super().__init__()
        self.members, self.score_by = nn.ModuleList(members), score_by

    @property
    def gpt(self):
        return self.members[0].gpt

    def each(self, tokens, response_mask):
        """(B, N): the score of every member."""
        return torch.stack([member(tokens, response_mask) for member in self.members], 1)

    def forward(self, tokens, response_mask):
        return combine(self.each(tokens, response_mask).T, self.score_by)

    def raw(self, tokens, response_mask):
        """(B,): the score in log-odds, the unit of a member's `raw`."""
        return self.in_log_odds(self.each(tokens, response_mask))

    def in_log_odds(self, each):
        """(B,) of the members' scores (B, N): what they combine to, by their mean scale."""
        scale = sum(m.scale for m in self.members) / len(self.members)
        return combine(each.T, self.score_by) * scale


def reward_loss(chosen, rejected):
    """Bradley-Terry negative log-likelihood, -sum log sigmoid(r_w - r_l): InstructGPT eq. 1.

    chosen, rejected (pairs,): raw scores. Returns a scalar in nats, a SUM over pairs: the caller
    divides by the pairs of an average step, so a prompt with more pairs weighs more.
    """
    return -F.logsigmoid(chosen - rejected).sum()


def load_reward_model(path, device, score_by="mean"):
    """(reward model, tokenizer, checkpoint without weights), frozen, in eval mode: a RewardModel,
    or an Ensemble that scores by `score_by`, see `combine`. `seen` of it: (lowest, highest) score
    of its held-out answers, as far as the checkpoint says. UserError for a scale of 0."""
    if score_by not in SCORE_BY:
        raise UserError(f"--score_by={score_by}: choose one of {', '.join(SCORE_BY)}")
    checkpoint = common.load_checkpoint(path, ("reward",), device)
    n = checkpoint["config"].get("ensemble", 1)
    if type(n) is not int or not 1 <= n <= len(checkpoint["weights"]):
        raise common.damaged(path, f"an ensemble of {str(n)[:20]}")
    network = RewardModel if n == 1 else lambda size: Ensemble(
        [RewardModel(size) for _ in range(n)], score_by)
    model, tokenizer = common.build(network, checkpoint, path, device)
    if not all(member.scale > 0 for member in model.members):
        raise UserError(f"{path} is destroyed: its scale is 0, so every score is infinite. Make it "
                        "again")
    seen = checkpoint["metrics"]
    model.seen = seen.get("score_min", -np.inf), seen.get("score_max", np.inf)
    return model.requires_grad_(False), tokenizer, checkpoint


def score_batch(score, tokens, mask, size):
    """score(tokens, mask) of a batch of rows (B, T), (B,): a reward model, or its `raw`; `size`
    rows a forward pass at most, 0: no bound."""
    with autocast(tokens.device):
        return batches.in_pieces(lambda p: score(tokens[p], mask[p]),
                                 batches.ends_together(tokens, mask), size)


def evaluate(model, elements, pad, device, noise=None):
    """The reward model's report card on held-out rankings, see `report_card`; and score_min and
    score_max, of their answers."""
    score = lambda fn: batches.over_rows(fn, *all_rows(elements), pad, device,
                                         bar="held-out answers")
    if not isinstance(model, Ensemble):
        raw = score(model.raw)
        scores = (raw - model.shift.item()) / model.scale.item()
        metrics = report_card(raw.numpy(), elements, noise)
    else:
        each = score(model.each)
        scores = combine(each.T, model.score_by)
        metrics = report_card(model.in_log_odds(each.to(device)).cpu().numpy(), elements, noise,
                              each.numpy())
    return metrics | dict(score_min=scores.min().item(), score_max=scores.max().item())


def epoch_order(train, epoch, config):
    """The prompts of an epoch as indices, those of a batch with answers of like length."""
    return batches.like_length([e.longest for e in train], config.batch_size,
                               common.stream(config.seed, "reward", "order", epoch))


def main(config):
    device = common.set_up(config, "reward")
    common.ensure_input(config, "init", "sft")
    common.ensure_input(config, "data", "label")

    # --- model and data ------------------------------------------------------
    policy, tokenizer, parent = common.load_policy(config.init, common.STARTS, device)
    config = common.sized(config, "reward", policy)
    seeds = [config.seed + n for n in range(config.ensemble)]  # a member is a run of its seed
    members = [first_weights(policy, replace(config, seed=seed)) for seed in seeds]
    model = members[0] if len(members) == 1 else Ensemble(members)
    origin = embedded(config.data)
    noise = origin and origin["noise"]
    if origin:
        common.check_lineage(parent["stage"], parent["hash"],
                             {parent["stage"]: origin["policy"]}, config.data)
    data = load_rankings(config.data, tokenizer, policy.config.block_size,
                         skip_bad=config.skip_bad)
    train = data.train
    if config.preflight:
        preflight(config, members[0], reward_loss, train, tokenizer, device)
        return
    zero = read_demos(config, train, tokenizer, noise, parent["config"].get("quality", 0.5))
    zero = zero.select(fits("demonstrations", zero.lengths, policy.config.block_size))
    if not len(zero):
        raise UserError(f"--demos={config.demos}: no demonstration fits the context")
    # samples of the SFT model, for the scale; now, so that it fails before the training if it must
    asked = choose_elements(train, config.samples)
    room = policy.config.block_size - config.max_new_tokens
    asked = [asked[n] for n in fits("prompts to sample on", [len(e.prompt) for e in asked], room)]
    if not asked:
        raise UserError(f"--max_new_tokens={config.max_new_tokens}: no training prompt leaves that "
                        f"much room in the context of {policy.config.block_size}")
    samples = batches.sample_texts(
        policy, tokenizer, [e.prompt for e in asked], config.max_new_tokens,
        partial(common.uniforms, config.seed, "reward", "samples", 0), bar="samples")
    del policy
    complete = [(e, s["ids"]) for e, s in zip(asked, samples) if s["finished"]]
    if len(complete) < len(samples):
        note(f"samples for the scale: dropped {len(samples) - len(complete)} of {len(samples)}, "
             f"without EOS within {config.max_new_tokens} tokens")
    if len(complete) < 2:
        raise UserError(f"{config.init} ended {len(complete)} of {len(asked)} samples with EOS "
                        f"within {config.max_new_tokens} tokens: too few to measure the scale on")
    steps_per_epoch = -(-len(train) // config.batch_size)
    steps = config.epochs * steps_per_epoch  # of each member
    common.say_warmup(steps, config.warmup)
    run = common.Run("reward", config, device, {parent["stage"]: parent["hash"]})
    pairs = sum(len(e.pairs) for e in train)
    pairs_per_step = pairs / steps_per_epoch
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters\n{config.data}"
          f"{' of the embedded world' if origin else ''}: {len(train):,} prompts with {pairs:,} "
          f"pairs, {len(data.held_out)} prompts held out")

    # --- training loop -------------------------------------------------------
    # of all members, one after the other: who has no gradient in a step is left as it is
    optimizer = common.adamw(members, config.lr, config.weight_decay)
    first = run.load_state(model=model, optimizer=optimizer).get("step", 0)
    total = config.ensemble * steps

    def save(n):
        run.save_state(n, total, model=model, optimizer=optimizer)

    bar = progress(range(first, total), "reward", initial=first, total=total)
    for n in bar:
        start = time.perf_counter()
        if run.due(n, config.save_every):
            save(n)
        number, step = divmod(n, steps)
        epoch, i = divmod(step, steps_per_epoch)
        member, seed = members[number], seeds[number]
        if i == 0 or n == first:
            order = epoch_order(train, epoch, replace(config, seed=seed))
        if step == 0 or n == first:
            text = None  # rows of pretraining text, or None
            if config.pretrain_mix > 0 and noise is not None:
                text = text_rows("synthetic", tokenizer, min(40, model.gpt.config.block_size),
                                 20000, seed)
        batch = [train[j] for j in order[i * config.batch_size:(i + 1) * config.batch_size]]
        lr = config.lr * common.cosine(step, steps, config.warmup)
        common.set_lr(optimizer, lr)
        count = sum(len(e.pairs) for e in batch)  # pairs of the step
        sums = torch.zeros(2, device=device)
        if mine := batches.share(batch):
            tokens, mask = batch_rows(mine, tokenizer.pad, device)
            winners, losers = pair_indices(mine)
            scores = score_batch(member.raw, tokens, mask, config.micro_batch)  # each answer once
            loss = reward_loss(scores[winners], scores[losers])
            (loss / pairs_per_step).backward()
            right = torch.sign(scores[winners] - scores[losers]) / 2 + 0.5
            sums += torch.stack([loss, right.sum()]).detach()
        if text is not None:
            # the network still has to know the facts that it judges by; cf. the LM loss of
            # Zheng et al. 2023 on the chosen answer
            rows = common.stream(seed, "reward", "text", step).integers(0, len(text), 16)
            mix = batches.text_share(member.gpt, text[rows])
            (config.pretrain_mix * mix).backward()
        common.sum_gradients(member)
        norm = torch.nn.utils.clip_grad_norm_(member.parameters(), config.grad_clip)
        common.check_finite(config, n, loss=sums[0], grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # --- log: nothing from here on changes the weights -------------------
        if step % 5 == 0:
            value, accuracy = (common.total(sums) / count).tolist()
            run.log(step=n, loss=value, accuracy=accuracy, lr=lr, grad_norm=norm.item(),
                    pairs_per_s=count / (time.perf_counter() - start), member=number)
            run.watch("the training pairs are not learnt: a coin orders them as well. Do the "
                      "labels contradict each other? Is --lr too low?", accuracy <= 0.5, 10)
            bar.set_postfix(loss=f"{value:.3f}", accuracy=f"{accuracy:.3f}")
    save(total)

    # --- shift, scale, report card, probe ------------------------------------
    model.eval()
    score = lambda model, rows, masks: batches.over_rows(model, rows, masks, tokenizer.pad, device,
                                                         bar="scores")
    sample_rows = ([e.prompt + ids for e, ids in complete],
                   [[0] * len(e.prompt) + [1] * len(ids) for e, ids in complete])
    centred = []  # the mean score of the samples, by each member
    for member in members:  # each its own, on the same answers
        demo_scores = score(member, zero.ids, zero.masks)
        sample_scores = score(member, *sample_rows)
        common.check_finite(config, "after the training", raw_scores=sample_scores.sum()
                            + demo_scores.sum())
        member.shift.fill_(float(demo_scores.mean()))
        member.scale.fill_(max(float(sample_scores.std(correction=0)), 1e-6))
        centred.append(float((sample_scores.mean() - member.shift.item()) / member.scale.item()))
    metrics = evaluate(model, data.held_out, tokenizer.pad, device, noise)
    metrics |= dict(shift=float(np.mean([m.shift.item() for m in members])),
                    scale=float(np.mean([m.scale.item() for m in members])),
                    demo_score=float(score(model, zero.ids, zero.masks).mean()),
                    sft_score=float(np.mean(centred)))
    say(show(metrics))
    run.watch("the accuracy on held-out pairs is not above chance: train no policy on this model. "
              "More labels, or labels that agree?", not metrics["accuracy_low"] > 0.5, 1)
    run.watch("all samples get the same score: this model tells nothing apart",
              min(member.scale.item() for member in members) <= 1e-6, 1)
    if config.probe:
        metrics |= probe(model, tokenizer, complete[:8], config.probe,
                         common.stream(config.seed, "reward", "probe"), device,
                         lambda **row: run.log("probe", **row))
    run.save_model(model, tokenizer, metrics)
    run.finish(metrics, f"python ppo.py --reward_model={config.out} --init={config.init}"
               + ("" if origin else f" --data={config.data}"))


def first_weights(policy, config):
    """The policy's weights and a new head: those that a run with this config's seed begins with."""
    device = common.set_up(config, "reward")
    GPT(policy.config)  # loading a policy draws one first: without it a seed's head would differ
    model = RewardModel(policy.config).to(device)
    model.gpt.load_state_dict(policy.state_dict())
    common.prepare_blocks(config, model.gpt)
    return model


def read_demos(config, train, tokenizer, noise, quality):
    """Rows of the demonstrations whose mean score becomes 0: for the embedded data the embedded
    ones, of the quality that SFT saw; else an answer that won a pair, for each training prompt."""
    if config.demos != "auto":
        rows = read_tokens(config.demos, check_demonstration, demonstration_rows, tokenizer,
                           ("training",), config.skip_bad)
        return rows.side(False).choose(config.samples)
    if noise is not None:  # rankings of the embedded data
        prompts = sample_prompts(config.samples, held_out=False, seed=config.seed)
        records = map(check_demonstration, demonstrations(prompts, config.seed, quality))
        return encode_rows(tokenizer, records, demonstration_rows)
    return train[0].source.select([e.numbers[e.pairs[0][0]]
                                   for e in choose_elements(train, config.samples)])


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
