"""The instruments: a trained policy against the model that it started from, on held-out prompts.

Both answer the same prompts. Reported are the KL between them, length and EOS rate, the reward
model's score, and on the embedded data the gold reward with the win rate (ties count half), each
with its standard error. `compare` is what every stage calls at its end; as a command it does the
same for any checkpoint, and adds the gold reward by family of prompts and by part.

    python evaluate.py                       # out/ppo against out/sft; runs what is missing first
    python evaluate.py --policy=out/dpo --reward_model=out/reward --best_of=4
"""

from dataclasses import dataclass

import cli
from cli import Positive, UserError


@dataclass
class Config(cli.Config):
    policy: str = "out/ppo"  # checkpoint to judge
    reference: str = "out/sft"  # what it is compared with, and what the KL is measured to
    reward_model: str = ""  # checkpoint for the scores; "" leaves them out
    data: str = "synthetic"  # prompts: "synthetic" or a .jsonl file of any records with prompts
    out: str = "out/evaluate"  # output folder: the log with the figures and samples
    eval_prompts: Positive[int] = 512  # held-out prompts
    best_of: Positive[int] = 1  # with a reward model: also the best of n samples of the reference
    temperature: Positive[float] = 1.0  # of both models
    max_new_tokens: Positive[int] = 48  # a response longer than this is cut, and gets no EOS
    missing_eos: float = -3.0  # score of a response without EOS


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np
import torch
from tqdm import tqdm

import common
from data.records import check_prompt, choose, collate, distinct, fits, read_jsonl, split
from data.synthetic.gold import PARTS, gold_reward, parts
from data.synthetic.world import FAMILIES, lookup, sample_prompts
from model import token_logprobs
from reward import load_reward_model, score_rows


def held_out_prompts(data, count, tokenizer, room):
    """[(text or turns, ids)] of `count` held-out prompts; those of over `room` tokens are dropped.

    data: "synthetic" or a .jsonl file. The embedded ones are the same in every stage.
    """
    if data == "synthetic":
        prompts = [p.text for p in sample_prompts(count, held_out=True, seed=0)]
    else:
        records = distinct(split(read_jsonl(data, check_prompt)).held_out)
        prompts = [r["prompt"] for r in choose(records, count)]
    encoded = [(p, tokenizer.encode_prompt(p)) for p in prompts]
    kept = fits("held-out prompts", encoded, room, lambda e: len(e[1]))
    if not kept:
        raise UserError(f"--data={data}: no held-out prompt of at most {room} tokens")
    return kept


def response_rows(prompt_ids, drawn):
    """Rows of ids and masks for samples of `common.sample_texts`, one a prompt."""
    rows = [p + s["ids"] for p, s in zip(prompt_ids, drawn)]
    return rows, [[0] * len(p) + [1] * len(s["ids"]) for p, s in zip(prompt_ids, drawn)]


@torch.no_grad()
def sequence_logprobs(model, rows, masks, pad, temperature=1.0, batch_size=64, bar=None):
    """log pi(y | x), (n,) on the CPU, nats per sequence: sums over response tokens, EOS included.

    rows, masks: lists of ids and masks; batched by length. bar: shows progress under this name.
    """
    device, out = model.wte.weight.device, torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in tqdm(range(0, len(order), batch_size), bar, disable=bar is None, mininterval=1):
        part = order[i:i + batch_size]
        tokens, mask = collate([rows[j] for j in part], [masks[j] for j in part], pad)
        with common.autocast(device):
            logp = token_logprobs(model, tokens.to(device), mask.to(device), temperature)
        out[part] = logp.sum(1).to(out.device, out.dtype)
    return out


def check_start(logp, old_logp, mask, ref_logp=None):
    """On the first minibatch of a rollout, before any update: ratio 1 and, where a reference is
    asked, KL 0, or something is wrong. All (B, T), nats per token; the mask is the response's."""
    ratio_error, kl = ((logp - old_logp) * mask).abs().max().item(), 0.0
    if ref_logp is not None:
        kl = ((old_logp - ref_logp) * mask).sum(1).mean().item()
    print(f"\nfirst minibatch: |log ratio| {ratio_error:.1e}, KL to the reference {kl:.1e}")
    if mask.device.type == "cpu":  # full precision; under autocast the two forwards may round apart
        assert ratio_error < 1e-4, "the ratio is not 1 before the first update"
        assert abs(kl) < 1e-4, "the policy does not start from the reference"


def warn_of_negative_kl(kl, se):
    """A mean of k1 may fall below 0 by chance, but not by three of its standard errors."""
    if kl < -3 * se - 1e-3:
        print(f"\nwarning: measured KL {kl:.3f} is below 0 by more than three standard errors: "
              "samples and log-probabilities disagree")


def compare(policy, reference, tokenizer, prompts, config, run, synthetic, reward_model=None,
            best_of=1):
    """Policy against reference (the SFT model), one response each to every prompt.

    prompts: [(text or turns, ids)]. config: any with temperature, max_new_tokens, seed and (with a
    reward model) missing_eos. KL in nats per sequence, from the policy's samples (k1). synthetic:
    the prompts are the embedded ones, so that there is a gold reward. With a reward model also the
    scores, and with best_of = n > 1 the best of n samples of the reference by that model.
    Logs and prints examples. Returns (metrics, the policy's samples, the reference's).
    """
    policy.eval()
    n, device = best_of, run.device
    texts, ids = zip(*prompts)
    repeated = [i for i in ids for _ in range(n)]
    drawn, sft = (common.sample_texts(model, tokenizer, rows, config.max_new_tokens,
                                      common.stream(config.seed, "evaluate", name, device=device),
                                      config.temperature)
                  for model, rows, name in ((policy, ids, "policy"),
                                            (reference, repeated, "reference")))
    rows, masks = response_rows(ids, drawn)
    seq_kl = (sequence_logprobs(policy, rows, masks, tokenizer.pad, config.temperature)
              - sequence_logprobs(reference, rows, masks, tokenizer.pad, config.temperature))
    cluster = [common.question(t, synthetic) for t in texts]
    se = lambda x: common.clustered_se(x, cluster)
    mean = lambda samples, value: float(np.mean([value(s) for s in samples]))
    metrics = dict(
        kl=seq_kl.mean().item(), kl_se=se(seq_kl.numpy()),
        length=mean(drawn, lambda s: len(s["ids"])), length_sft=mean(sft, lambda s: len(s["ids"])),
        eos_rate=mean(drawn, lambda s: s["finished"]),
        eos_rate_sft=mean(sft, lambda s: s["finished"]))
    if reward_model is not None:
        score, sft_score = (np.where(
            [s["finished"] for s in samples],  # a cut answer is not judged
            score_rows(reward_model, *response_rows(heads, samples), tokenizer.pad, device),
            config.missing_eos) for heads, samples in ((ids, drawn), (repeated, sft)))
        metrics |= dict(score=float(score.mean()), score_sft=float(sft_score.mean()),
                        score_win_rate=float((np.sign(score - sft_score[::n]) / 2 + 0.5).mean()))
    if synthetic:
        gold = np.array([gold_reward(t, s["text"]) for t, s in zip(texts, drawn)])
        gold_sft = np.array([[gold_reward(t, s["text"]) for s in sft[i * n:(i + 1) * n]]
                             for i, t in enumerate(texts)])  # (prompts, n); column 0 is "SFT"
        gap = gold - gold_sft[:, 0]
        metrics |= dict(
            gold=float(gold.mean()), gold_se=se(gold), gold_sft=float(gold_sft[:, 0].mean()),
            gold_gap=float(gap.mean()), gold_gap_se=se(gap),
            gold_win_rate=float((np.sign(gap) / 2 + 0.5).mean()),
            gold_win_rate_se=se(np.sign(gap) / 2), tie_rate=float((gap == 0).mean()))
        if reward_model is not None and n > 1:
            best = gold_sft[np.arange(len(texts)), sft_score.reshape(-1, n).argmax(1)]
            metrics |= dict(gold_best_of_n=float(best.mean()), best_of=n,
                            gold_over_best_of_n=float((gold - best).mean()),
                            gold_over_best_of_n_se=se(gold - best))
    for i in range(min(12, len(texts))):
        run.log("held_out_sample", prompt=texts[i], sft=sft[i * n]["text"],
                policy=drawn[i]["text"])
        if i < 6:
            shown = texts[i] if isinstance(texts[i], str) else texts[i][-1]["content"]
            print(f"\nprompt  {shown}\n   sft  {sft[i * n]['text']}\n{run.stage:>6}  "
                  f"{drawn[i]['text']}")
    return metrics, drawn, sft[::n]


def gold_tables(texts, drawn, sft):
    """Mean gold reward by prompt family and by part, as columns for `common.print_table`."""
    families = np.array([lookup(t).family for t in texts])
    scored = [[parts(t, s["text"]) for t, s in zip(texts, samples)] for samples in (drawn, sft)]
    total = [np.array([sum(p.values()) for p in side]) for side in scored]
    present = [f for f in FAMILIES if (families == f).any()]
    by_family = dict(prompts=[int((families == f).sum()) for f in present])
    by_part = {}
    for name, side, gold in zip(("policy", "reference"), scored, total):
        by_family[name] = [float(gold[families == f].mean()) for f in present]
        by_part[name] = [float(np.mean([p[part] for p in side])) for part in PARTS]
    return by_family | dict(family=present), by_part | dict(part=PARTS)


def main(config):
    device = common.set_up(config, "evaluate")
    stages = ("pretrain", *common.POLICIES)
    common.ensure_input(config, "policy", "ppo")
    policy, tokenizer, parent = common.load_policy(config.policy, stages, device)
    common.ensure_input(config, "reference", "sft")
    reference, ref_tokenizer, ref_parent = common.load_policy(config.reference, stages, device)
    common.check_same_tokenizer(ref_tokenizer, tokenizer, config.reference, config.policy)
    parents = dict(policy=parent["hash"], reference=ref_parent["hash"])
    block_size = min(policy.config.block_size, reference.config.block_size)
    reward_model = None
    if config.reward_model:
        reward_model, rm_tokenizer, rm_parent = load_reward_model(config.reward_model, device)
        common.check_same_tokenizer(rm_tokenizer, tokenizer, config.reward_model, config.policy)
        parents["reward"] = rm_parent["hash"]
        block_size = min(block_size, reward_model.gpt.config.block_size)
    room = block_size - config.max_new_tokens
    prompts = held_out_prompts(config.data, config.eval_prompts, tokenizer, room)
    run = common.Run("evaluate", config, device, parents, result="log.jsonl")
    metrics, drawn, sft = compare(policy, reference, tokenizer, prompts, config, run,
                                  config.data == "synthetic", reward_model, config.best_of)
    if config.data == "synthetic":
        for table in gold_tables([t for t, _ in prompts], drawn, sft):
            common.print_table(table)
    print()
    run.finish(**metrics)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
