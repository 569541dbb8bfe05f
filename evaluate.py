"""The instruments: a trained policy against the model that it started from, on held-out prompts.

Both answer the same prompts. Reported are the KL between them, length and EOS rate, the reward
model's score, and on the embedded data the gold reward with the win rate (ties count half), each
with its standard error. `compare` is what dpo.py, ppo.py and grpo.py call at their end; as a
command it does the same for any checkpoint, and adds the gold reward by family of prompts and by
part. What else these three share (networks, the check at the start, the metrics of a rollout) is
here too.

    python evaluate.py                       # out/ppo against out/sft; runs what is missing first
    python evaluate.py --policy=out/dpo --reward_model=out/reward --best_of=4

    {"prompt": P}            # of --data; P is text or a list of turns
"""

from dataclasses import dataclass
from typing import ClassVar

import cli
from cli import Positive


@dataclass
class Config(cli.Config):
    # --- data and models
    policy: str = "out/ppo"  # checkpoint to judge
    reference: str = "out/sft"  # what it is compared with, and what the KL is measured to
    reward_model: str = ""  # checkpoint for the scores; "" leaves them out
    data: str = "synthetic"  # prompts: "synthetic" or a file of any records with prompts
    split: str | None = None  # "all", "train" or "held_out"; auto: of a file all, else held_out
    out: str = "out/evaluate"  # output folder: log.jsonl, and every answer in answers.jsonl
    eval_prompts: Positive[int] | None = None  # at most so many; auto: of a file all, else 512
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    # --- answers
    best_of: Positive[int] = 1  # with a reward model: also the best of n samples of the reference
    resume: ClassVar[bool] = False  # no flag: an evaluation is short, and starts again
    temperature: Positive[float] = 1.0  # of both models
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    missing_eos: float = -3.0  # score of a response without EOS


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import sys

import numpy as np

import common
from cli import UserError, note, say
from data import batches
from data.load import load_prompts
from data.records import question, write_jsonl
from data.synthetic.gold import PARTS, gold_reward, parts
from data.synthetic.world import FAMILIES, lookup
from data.verifier import is_right
from model import token_logprobs
from reward import load_reward_model


# --- what dpo.py, ppo.py and grpo.py begin with --------------------------------------------------


def load_networks(config, device, reward_model=True):
    """(policy, reference, reward model or None, tokenizer, parents, block_size): parents as
    common.Run takes them, block_size the tokens that fit the context of all networks."""
    common.ensure_input(config, "init", "sft")
    policy, tokenizer, parent = common.load_policy(config.init, common.POLICIES, device)
    reference = common.freeze(common.load_policy(config.init, common.POLICIES, device)[0])
    parents, block_size, judge = {parent["stage"]: parent["hash"]}, policy.config.block_size, None
    if reward_model:
        common.ensure_input(config, "reward_model", "reward")
        judge, rm_tokenizer, rm_parent = load_reward_model(config.reward_model, device)
        common.check_same_tokenizer(rm_tokenizer, tokenizer, config.reward_model, config.init)
        common.check_lineage(parent["stage"], parent["hash"], rm_parent["parents"],
                             config.reward_model)
        parents["reward"] = rm_parent["hash"]
        block_size = min(block_size, judge.gpt.config.block_size)
    return policy, reference, judge, tokenizer, parents, block_size


def check_start(log_ratio, kl=None, limit=1e-4):
    """On the first minibatch, before any update: every log-ratio is 0, or something is wrong.

    log_ratio: nats, of tokens or sequences, 0 outside the mask; kl: to the reference, nats per
    sequence, where one is asked; limit: what rounding may add up to.
    """
    error = log_ratio.detach().abs().max().item()
    say(f"first minibatch: |log ratio| {error:.1e}"
        + ("" if kl is None else f", KL to the reference {kl:.1e}"))
    if log_ratio.device.type == "cpu":  # full precision; under autocast two batches may round apart
        assert error < limit, "the ratio is not 1 before the first update"
        assert abs(kl or 0.0) < 1e-4, "the policy does not start from the reference"


# --- what a rollout is like ----------------------------------------------------------------------


def rollout_metrics(batch, prompts, texts, beta, clock, synthetic):
    """What ppo.py and grpo.py both log of an iteration; none of it changes the weights.

    batch: what `prepare` returned; prompts, texts: those of its B responses; clock: four times,
    around generating, scoring and training. KL in nats per sequence, by k1; None without reference.
    """
    mask, score = batch["mask"], batch["score"]
    n_tokens, lengths = mask.sum().item(), mask.sum(1)
    row = dict(objective=score.mean().item(), kl=None, kl_se=None, kl_per_token=None)
    if batch["ref_logp"] is not None:
        seq_kl = ((batch["old_logp"] - batch["ref_logp"]) * mask).sum(1)
        # the answers to a question depend on each other: clustered by question
        kl, se = seq_kl.mean().item(), common.clustered_se(
            seq_kl.cpu().numpy(), [question(p, synthetic) for p in prompts])
        row = dict(objective=row["objective"] - beta * kl, kl=kl, kl_se=se,
                   kl_per_token=seq_kl.sum().item() / n_tokens)
        warn_of_negative_kl(kl, se)
    row |= dict(
        entropy=batch["entropy"].sum().item() / n_tokens, length=lengths.mean().item(),
        length_min=lengths.min().item(), length_max=lengths.max().item(),
        eos_rate=batch["finished"].float().mean().item(),
        **{f"{name}_tok_per_s": n_tokens / (b - a) for name, a, b in
           zip(("generate", "score", "train"), clock, clock[1:])})
    if synthetic:  # for the log only: training never sees the gold reward
        row["gold"] = float(np.mean([gold_reward(p, t) for p, t in zip(prompts, texts)]))
    return row


def warn_of_negative_kl(kl, se):
    """A mean of k1 may fall below 0 by chance, but not by three of its standard errors."""
    if kl < -3 * se - 1e-3:
        note(f"warning: measured KL {kl:.3f} is below 0 by more than three standard errors: "
             "samples and log-probabilities disagree", sys.stderr)


def show_samples(run, step, prompts, texts, **columns):
    """Log the responses, and print them with their numbers: columns, a tensor each."""
    columns = {name: values[:len(texts)].tolist() for name, values in columns.items()}
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        run.log("sample", step=step, prompt=prompt, response=text,
                **{name: values[i] for name, values in columns.items()})
    say(cli.table({name: [f"{v:.2f}" for v in values] for name, values in columns.items()}
                     | {"prompt": [cli.shorten(last_turn(p), 40) for p in prompts[:len(texts)]],
                        f"response in iteration {step}": [cli.shorten(t, 80) for t in texts]}))


def last_turn(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


# --- policy against reference --------------------------------------------------------------------


def response_rows(prompt_ids, drawn):
    """Rows of ids and masks for samples of `batches.sample_texts`, one a prompt."""
    rows = [p + s["ids"] for p, s in zip(prompt_ids, drawn)]
    return rows, [[0] * len(p) + [1] * len(s["ids"]) for p, s in zip(prompt_ids, drawn)]


def sequence_logprobs(model, rows, masks, pad, temperature=1.0, bar=None, size=64):
    """log pi(y | x), (n,) on the CPU, nats per sequence: sums over response tokens, EOS included.

    rows, masks: lists of ids and masks. bar: shows progress under this name.
    """
    return batches.over_rows(
        lambda tokens, mask: token_logprobs(model, tokens, mask, temperature).sum(1),
        rows, masks, pad, model.wte.weight.device, size, bar)


LABELS = dict(gold="gold, the true reward", score="score of the reward model",
              accuracy="share of right answers", length="length in tokens",
              eos_rate="share that ends with EOS")


def compare(policy, reference, tokenizer, prompts, config, run, synthetic, reward_model=None,
            best_of=1, verifier=False):
    """Policy against reference (the SFT model), one response each to every prompt.

    prompts: as `load_prompts` returns them. config: any with temperature, max_new_tokens, seed and
    (with a reward model) missing_eos. KL in nats per sequence, from the policy's samples (k1).
    synthetic: the prompts are the embedded ones, so that there is a gold reward. verifier: they
    have answers, and right is what `is_right` says. With a reward model also the scores, and on
    embedded prompts with best_of = n > 1 the best of n samples of the reference by that model.
    Logs and prints what it found, and
    writes every answer to answers.jsonl. Returns (metrics, the policy's samples, the reference's).
    """
    policy.eval()
    n, device = best_of if synthetic and reward_model is not None else 1, run.device
    texts, ids, answers = zip(*prompts)
    draw = lambda model, name, rows: batches.sample_texts(
        model, tokenizer, rows, config.max_new_tokens,
        common.stream(config.seed, "evaluate", name, device=device), config.temperature,
        bar=f"samples of the {name}")
    drawn = draw(policy, "policy", ids)
    every = draw(reference, "reference", [i for i in ids for _ in range(n)])
    sft = every[::n]  # of n samples the first is the answer, the others are there for best of n
    logp, ref_logp = (sequence_logprobs(model, *response_rows(ids, drawn), tokenizer.pad,
                                        config.temperature, "KL") for model in (policy, reference))
    # what is measured: one number a prompt, of the reference and of the policy
    each = lambda value: [np.array([value(s, i) for i, s in enumerate(samples)], float)
                          for samples in (sft, drawn)]
    measured = dict(length=each(lambda s, i: len(s["ids"])),
                    eos_rate=each(lambda s, i: s["finished"]))
    if verifier:
        measured["accuracy"] = each(lambda s, i: s["finished"] and is_right(s["text"], answers[i]))
    if reward_model is not None:
        score, scores = (np.where(
            [s["finished"] for s in samples],  # a cut answer is not judged
            batches.over_rows(reward_model, *response_rows(heads, samples), tokenizer.pad, device,
                              bar="scores"), config.missing_eos)
            for heads, samples in ((ids, drawn), ([i for i in ids for _ in range(n)], every)))
        measured["score"] = scores[::n], score
    if synthetic:
        measured["gold"] = each(lambda s, i: gold_reward(texts[i], s["text"]))

    # the same answer is a tie, however the rows beside it in a forward pass rounded its score
    differ = np.array([a["ids"] != b["ids"] for a, b in zip(sft, drawn)])
    cluster = [question(t, synthetic) for t in texts]
    with_se = lambda name, x: {name: float(np.mean(x)),
                               f"{name}_se": common.clustered_se(x, cluster)}
    metrics = dict(judged=len(texts), questions=len(set(cluster)),
                   **with_se("kl", (logp - ref_logp).numpy()))
    for name, (before, after) in measured.items():
        metrics |= (with_se(name, after) | with_se(f"{name}_sft", before)
                    | with_se(f"{name}_gap", after - before))
        if name in ("score", "gold"):  # ties count half
            metrics |= with_se(f"{name}_win_rate",
                               np.sign(after - before) * differ / 2 + 0.5)
    if synthetic:
        metrics["tie_rate"] = float((measured["gold"][0] == measured["gold"][1]).mean())
        if n > 1:
            best = [gold_reward(texts[i], every[i * n + k]["text"])
                    for i, k in enumerate(scores.reshape(-1, n).argmax(1))]
            metrics |= dict(best_of=n, **with_se("gold_best_of_n", best),
                            **with_se("gold_over_best_of_n", measured["gold"][1] - best))
    report(metrics)
    write_jsonl(run.folder / "answers.jsonl", (
        dict(prompt=texts[i], reference=sft[i]["text"], policy=drawn[i]["text"],
             **{f"{name}_{who}": side[i].item() for name, sides in measured.items()
                for who, side in zip(("reference", "policy"), sides)}) for i in range(len(texts))))
    for i in range(min(12, len(texts))):
        run.log("held_out_sample", prompt=texts[i], sft=sft[i]["text"], policy=drawn[i]["text"])
        if i < 6:
            name = run.stage if run.stage in common.POLICIES else "policy"
            say(f"\n   prompt  {last_turn(texts[i])}\nreference  {sft[i]['text']}\n"
                f"{name:>9}  {drawn[i]['text']}")
    return metrics, drawn, sft


def report(metrics):
    """Print the table of a comparison, and in words what it says."""
    cell = lambda name: cli.plus_minus(metrics[name], metrics[f"{name}_se"])
    rows = [(cell(f"{name}_sft"), cell(name), cell(f"{name}_gap"), label)
            for name, label in LABELS.items() if name in metrics]
    rows += [("", cell(f"{name}_win_rate"), "", f"win rate by {name}, ties half")
             for name in ("gold", "score") if name in metrics]
    if "best_of" in metrics:
        rows.append((cell("gold_best_of_n"), cell("gold"), cell("gold_over_best_of_n"),
                     f"gold against the reference's best of {metrics['best_of']} by score"))
    rows.append(("", cell("kl"), "", "KL to the reference, nats a sequence"))
    say(cli.table(dict(zip(("reference", "result", "difference",
                               f"on {metrics['judged']} prompts, ± one standard error"),
                              zip(*rows)))))
    say("\n" + verdict(metrics))


def verdict(metrics):
    """What a comparison says, in a sentence: by right answers, else by gold, else by the score."""
    known = [name for name in ("accuracy", "gold", "score") if name in metrics]
    if not known:
        return "No reward is known for these prompts: read the samples."
    name = known[0]
    gap, se = metrics[f"{name}_gap"], metrics[f"{name}_gap_se"]
    by = f"by {LABELS[name]}: {cli.plus_minus(gap, se)}"
    if not abs(gap) > 2 * se:  # also where the error is unknown
        return f"No difference to the reference that {metrics['judged']} prompts can show, {by}."
    words = f"{'Better' if gap > 0 else 'Worse'} than the reference {by}."
    if name == "gold" and gap < 0 and metrics.get("score_gap", 0) > 0:
        words += " The score rose: the policy exploits errors of the reward model."
    return words


def gold_tables(texts, drawn, sft):
    """Mean gold reward by prompt family and by part, as columns for `cli.table`."""
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
    config = common.sized(config, "evaluate", policy)
    parents = dict(policy=parent["hash"], reference=ref_parent["hash"])
    block_size = min(policy.config.block_size, reference.config.block_size)
    reward_model = None
    if config.reward_model:
        reward_model, rm_tokenizer, rm_parent = load_reward_model(config.reward_model, device)
        common.check_same_tokenizer(rm_tokenizer, tokenizer, config.reward_model, config.policy)
        parents["reward"] = rm_parent["hash"]
        block_size = min(block_size, reward_model.gpt.config.block_size)
    own = config.data != "synthetic"
    sides = dict(all="all", train="training", held_out="held-out")
    split = config.split or ("all" if own else "held_out")
    if split not in sides:
        raise UserError(f"--split={split}: choose one of {', '.join(sides)}")
    [prompts] = load_prompts(
        config.data, {sides[split]: config.eval_prompts or (None if own else 512)}, tokenizer,
        block_size - config.max_new_tokens, skip_bad=config.skip_bad)
    run = common.Run("evaluate", config, device, parents, result="log.jsonl")
    print(f"{config.policy} against {config.reference}, {policy.num_params():,} parameters\n"
          f"{len(prompts)} prompts of {config.data}, split {split}")
    metrics, drawn, sft = compare(policy, reference, tokenizer, prompts, config, run,
                                  not own, reward_model, config.best_of)
    if not own:
        for table in gold_tables([p[0] for p in prompts], drawn, sft):
            say(cli.table(table))
    run.finish(metrics)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
