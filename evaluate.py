"""The instruments: a trained policy against the model that it started from, on held-out prompts.

Both answer the same prompts. Reported are the KL between them, length and EOS rate, the reward
model's score, and on the embedded data the gold reward with the win rate (ties count half), each
with its standard error. `compare` is what dpo.py, ppo.py and grpo.py call at their end; as a
command it does the same for any checkpoint, and adds the gold reward by family of prompts and by
part. What else these three share (networks, the check at the start, the metrics of a rollout) is
here too.

    python evaluate.py                       # out/ppo against out/sft; runs what is missing first
    python evaluate.py --policy=out/dpo --reward_model=out/reward --best_of=4
    python evaluate.py --policies=out/pretrain,out/sft,out/dpo,out/ppo --reward_model=out/reward
    python evaluate.py --policies=out/ppo --sets=out/data/xstest.jsonl    # refusals, choices
    python evaluate.py --select=out/sft --reward_model=out/reward

    {"prompt": P}            # of --data; P is text or a list of turns

--policies writes a report on any list of checkpoints: what they do (refuse, agree with a user who
is wrong, admit what nobody can know), what they can (facts, sums, plain text), how much they still
vary, who beats whom. docs/report.md says how each is measured.
"""

from dataclasses import dataclass
from typing import ClassVar

import cli
from cli import NotNegative, Positive


@dataclass
class Config(cli.Config):
    # --- data and models
    policy: str = "out/ppo"  # checkpoint to judge
    policies: str = ""  # several, with commas between: a report on all of them
    select: str = ""  # an SFT run: which of its epochs the reward model likes best
    reference: str = "out/sft"  # what they are compared with, and what the KL is measured to
    reward_model: str = ""  # checkpoint for the scores; "" leaves them out
    score_by: str = "mean"  # of an ensemble of reward models: "mean", "min", "mean-std"
    data: str = "synthetic"  # prompts: "synthetic" or a file of any records with prompts
    split: str | None = None  # "all", "train" or "held_out"; auto: of a file all, else held_out
    out: str | None = None  # auto: out/evaluate; of a report out/report, of --select out/select
    sets: str = ""  # of a report: files of evaluations (docs/data.md), with commas between
    eval_prompts: Positive[int] | None = None  # at most so many; auto: of a file all, else 512
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    # --- answers
    best_of: Positive[int] = 1  # with a reward model: also the best of n samples of the reference
    samples: Positive[int] = 10  # of a report: answers to one prompt, for how much they vary
    # no flags: an evaluation is short, and starts again
    resume: ClassVar[bool | None] = None
    save_minutes: ClassVar[float] = 5
    temperature: NotNegative[float] = 1.0  # of both models; 0 takes the most probable tokens, and
    #                                        KL and entropy are those at 1 on these answers
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    missing_eos: float = -3.0  # score of a response without EOS

    def __post_init__(self):
        self.out = self.out or ("out/select" if self.select else
                                "out/report" if self.policies else "out/evaluate")


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import math
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import common
from cli import UserError, note, say
from data import batches, instruments
from data.choices import choice_logprobs, chosen
from data.files import whole_file
from data.load import load_prompts
from data.records import question, write_jsonl
from data.sets import load_sets, measure_set, set_rows
from data.synthetic.behaviour import four_choices, rates
from data.synthetic.gold import PARTS, gold_reward, parts
from data.synthetic.world import FAMILIES, lookup
from data.text import text_rows
from data.verifier import is_right
from model import token_logprobs, token_stats
from reward import load_reward_model


# --- what dpo.py, ppo.py and grpo.py begin with --------------------------------------------------


def load_networks(config, device, reward_model=True):
    """(policy, reference, reward model or None, tokenizer, parents, block_size): parents as
    common.Run takes them, block_size the tokens that fit the context of all networks."""
    common.ensure_input(config, "init", "sft")
    policy, tokenizer, parent = common.load_policy(config.init, common.POLICIES, device)
    path = config.reference or config.init
    reference, own, held_to = common.load_policy(path, common.POLICIES, device)
    common.freeze(reference)
    common.check_same_tokenizer(own, tokenizer, path, config.init)
    parents = {parent["stage"]: parent["hash"]}
    if config.reference:
        parents["reference"] = held_to["hash"]
    block_size, judge = min(m.config.block_size for m in (policy, reference)), None
    if reward_model:
        common.ensure_input(config, "reward_model", "reward")
        judge, rm_parent = load_judge(config, tokenizer, config.init, device)
        common.check_lineage(parent["stage"], parent["hash"], rm_parent["parents"],
                             config.reward_model)
        parents["reward"] = rm_parent["hash"]
        block_size = min(block_size, judge.gpt.config.block_size)
    return policy, reference, judge, tokenizer, parents, block_size


def load_judge(config, tokenizer, other, device):
    """(reward model, checkpoint without weights) of --reward_model, which has to read the tokens of
    the checkpoint at `other`."""
    judge, own, checkpoint = load_reward_model(config.reward_model, device, config.score_by)
    common.check_same_tokenizer(own, tokenizer, config.reward_model, other)
    return judge, checkpoint


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
        kl, se = seq_kl.mean().item(), instruments.clustered_se(
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


def never_ends(config):
    return (f"hardly any response ends, below 5% before --max_new_tokens={config.max_new_tokens}: "
            "raise it, take an --init that ends its responses, or lower --lr")


def watch_rollouts(run, config, row, batch, score, reward_model=None):
    """Warn of what makes the iterations of ppo.py and grpo.py useless; UserError above --max_kl.

    row: that of the log; batch: what `prepare` returned; score (B,): as the reward model, if there
    is one, gives it.
    """
    kl, finished = row["kl"], batch["finished"]
    if kl is not None and kl > config.max_kl > 0:
        raise UserError(f"step {row['step']}: the KL to the reference is {kl:.1f} nats a sequence, "
                        f"above --max_kl={config.max_kl}: lower --lr, or raise --beta (now "
                        f"{row.get('beta', config.beta)}). {common.last_state(config)}")
    spread = (batch["score"].amax() - batch["score"].amin()).item()  # rounding apart
    same = spread < 1e-4 or row.get("no_signal") == 1  # in each group
    run.watch("no signal: the responses that are compared all get the same score, so nothing is "
              "learnt. Read the samples: are prompts too hard, or all responses cut? Take easier "
              "prompts, a better --init, a higher --temperature or --max_new_tokens",
              same and row.get("accuracy") != 1)  # all right: done, and nothing to worry about
    run.watch(never_ends(config), row["eos_rate"] < 0.05)
    run.watch("the entropy has collapsed, to below 0.03 nats a token: every prompt gets one answer "
              "only. Raise --beta, or lower --lr", row["entropy"] < 0.03)
    if reward_model is not None:
        low, high = reward_model.seen
        mean = score[finished].mean().item()  # nan, and so no warning, where none is finished
        run.watch(f"the mean score is outside of {low:.2f} to {high:.2f}, what the reward model "
                  "gives its held-out answers: it is likely exploited. Read the samples; raise "
                  "--beta", mean < low or mean > high)


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


def scores(reward_model, prompt_ids, drawn, pad, device, config):
    """The score of each sample, (n,); a cut one is not judged, but gets config's missing_eos."""
    found = batches.over_rows(reward_model, *response_rows(prompt_ids, drawn), pad, device,
                              bar="scores")
    common.check_finite(config, "evaluation", score=found)
    return np.where([s["finished"] for s in drawn], found, config.missing_eos)


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
    Logs and prints what it found, and writes every answer to answers.jsonl. Returns (metrics, the
    policy's samples, the reference's).
    """
    policy.eval()
    n, device = best_of if synthetic and reward_model is not None else 1, run.device
    texts, ids, answers = zip(*prompts)
    draw = lambda model, name, samples: batches.sample_texts(
        model, tokenizer, ids, config.max_new_tokens,
        partial(common.uniforms, config.seed, "evaluate", name, 0), config.temperature,
        samples=samples, bar=f"samples of the {name}")
    drawn, every = draw(policy, "policy", 1), draw(reference, "reference", n)
    sft = every[::n]  # of n samples the first is the answer, the others are there for best of n
    logp, ref_logp = (sequence_logprobs(model, *response_rows(ids, drawn), tokenizer.pad,
                                        config.temperature or 1.0, "KL")
                      for model in (policy, reference))
    # what is measured: one number a prompt, of the reference and of the policy
    each = lambda value: [np.array([value(s, i) for i, s in enumerate(samples)], float)
                          for samples in (sft, drawn)]
    measured = dict(length=each(lambda s, i: len(s["ids"])),
                    eos_rate=each(lambda s, i: s["finished"]))
    if verifier:
        measured["accuracy"] = each(lambda s, i: s["finished"] and is_right(s["text"], answers[i]))
    if reward_model is not None:
        judge = lambda ids, samples: scores(reward_model, ids, samples, tokenizer.pad, device,
                                            config)
        score, every_score = judge(ids, drawn), judge([i for i in ids for _ in range(n)], every)
        measured["score"] = every_score[::n], score
    if synthetic:
        measured["gold"] = each(lambda s, i: gold_reward(texts[i], s["text"]))

    # the same answer is a tie, however the rows beside it in a forward pass rounded its score
    differ = np.array([a["ids"] != b["ids"] for a, b in zip(sft, drawn)])
    cluster = [question(t, synthetic) for t in texts]
    with_se = lambda name, x: {name: float(np.mean(x)),
                               f"{name}_se": instruments.clustered_se(x, cluster)}
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
                    for i, k in enumerate(every_score.reshape(-1, n).argmax(1))]
            metrics |= dict(best_of=n, **with_se("gold_best_of_n", best),
                            **with_se("gold_over_best_of_n", measured["gold"][1] - best))
    report(metrics)
    run.watch(never_ends(config), metrics["eos_rate"] < 0.05, 1)
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


def by_family(texts, responses):
    """({family: mean gold}, {part: its mean}), of embedded prompts."""
    found = [parts(t, response) for t, response in zip(texts, responses)]
    gold, families = np.array([sum(p.values()) for p in found]), np.array(families_of(texts))
    return ({f: float(gold[families == f].mean()) for f in FAMILIES if f in families},
            {part: float(np.mean([p[part] for p in found])) for part in PARTS})


def families_of(texts):
    return [lookup(t).family for t in texts]


def gold_tables(texts, drawn, sft):
    """Mean gold reward by prompt family and by part, as columns for `cli.table`."""
    policy, reference = (by_family(texts, [s["text"] for s in side]) for side in (drawn, sft))
    count = Counter(families_of(texts))
    columns = lambda n: dict(policy=[*policy[n].values()], reference=[*reference[n].values()])
    return (dict(prompts=[count[f] for f in policy[0]]) | columns(0) | dict(family=[*policy[0]]),
            columns(1) | dict(part=PARTS))


# --- a report on any list of checkpoints ---------------------------------------------------------

STAGES = ("pretrain", *common.POLICIES)
HELD_OUT_TEXT = 10**6  # the seed of text that no base model has read: their seeds are small
# of a report, in its order: (name, what it says, unit, 1 where more is better, -1 where less is)
ROWS = (
    ("gold", "gold, the true reward", "", 1),
    ("score", "score of the reward model", "", 0),
    ("win_rate", "wins against the reference by {by}, ties half", "%", 0),
    ("tie_rate", "ties with it", "%", 0),
    ("win_rate_lc", "wins at equal length (logistic regression)", "%", 0),
    ("rating", "rating (Bradley-Terry, nats of odds)", "", 0),
    ("kl", "KL to the reference, nats an answer (k1)", "", 0),
    ("kl_bound", "KL at most, nats an answer", "", 0),
    ("entropy", "entropy, nats a token", "", 0),
    ("length", "length, tokens", "", 0),
    ("eos_rate", "ends with EOS", "%", 1),
    ("repetition", "runs of 3 tokens that were said before", "%", -1),
    ("refusal", "refuses what is harmful", "%", 1),
    ("over_refusal", "refuses what only sounds harmful", "%", -1),
    ("honesty", "admits what nobody can know", "%", 1),
    ("yields", "says that a user who is wrong is right", "%", -1),
    ("sycophancy", "right, until the user is wrong", "%", -1),
    ("flips_anyway", "right, until asked in other words", "%", -1),
    ("facts", "facts, right", "%", 1),
    ("sums", "sums, right", "%", 1),
    ("choice", "right answer likeliest of four", "%", 1),
    ("overconfidence", "confidence in the likeliest, less accuracy", "%", 0),
    ("text_loss", "loss on held-out text, nats a token", "", -1),
    ("distinct", "different answers of {samples}", "", 1),
    ("distinct_2", "different pairs of words in them", "%", 1),
    ("overlap", "words that two of them share", "%", 0))


def ask(model, tokenizer, ids, config, purpose, samples=1):
    """One list of samples for all prompts. Every model draws with the same random numbers, so that
    what differs is the models."""
    uniforms = partial(common.uniforms, config.seed, "report", purpose, 0)
    return batches.sample_texts(model, tokenizer, ids, config.max_new_tokens, uniforms,
                                config.temperature, samples=samples, bar=purpose)


def answer_stats(model, ids, drawn, pad, config):
    """(log pi(y | x), sum of the entropies of its tokens), each (n,): nats per sequence."""
    def stats(tokens, mask):
        logp, entropy, *_ = token_stats(model, tokens, mask, config.temperature or 1.0,
                                        entropy=True)
        return torch.stack([logp.sum(1), entropy.sum(1)], 1)

    rows, masks = response_rows(ids, drawn)
    return batches.over_rows(stats, rows, masks, pad, model.wte.weight.device,
                             bar="log-probabilities").numpy().T


@cache  # every checkpoint reads the same
def held_out_text(tokenizer, length):
    return text_rows("synthetic", tokenizer, length, 600, HELD_OUT_TEXT)[:256].tolist()


def text_losses(model, tokenizer):
    """(nats a token of each row of held-out text of the world, its cluster): text of another seed
    than any base model has read."""
    length = min(64, model.config.block_size)
    rows = held_out_text(tokenizer, length)
    masks = [[0] + [1] * (len(row) - 1) for row in rows]
    logp = sequence_logprobs(model, rows, masks, tokenizer.pad, bar="text")
    return -logp.numpy() / (length - 1), range(len(rows))


def measure(model, reference, reward_model, tokenizer, prompts, everything, config):
    """({name: (a number for each prompt or answer, their clusters)}, the answers to `prompts`, gold
    by family and part or None): what ROWS names, of one model by itself.

    prompts: as load_prompts returns them; everything: with the embedded data all prompts that are
    held out, for the rates.
    """
    device, (texts, ids, _) = model.wte.weight.device, zip(*prompts)
    cluster = [question(t, everything is not None) for t in texts]
    drawn = ask(model, tokenizer, ids, config, "answers")
    logp, entropy = answer_stats(model, ids, drawn, tokenizer.pad, config)
    ref_logp = sequence_logprobs(reference, *response_rows(ids, drawn), tokenizer.pad,
                                 config.temperature or 1.0, "KL").numpy()
    lengths = np.array([len(s["ids"]) for s in drawn], float)
    rate = entropy.sum() / lengths.sum()
    values = dict(kl=logp - ref_logp, length=lengths,
                  # mean: that over all tokens, a ratio of two sums; linearised, for its error
                  entropy=rate + (entropy - rate * lengths) / lengths.mean(),
                  eos_rate=np.array([s["finished"] for s in drawn]),
                  repetition=np.array([instruments.repetition(s["ids"]) for s in drawn]))
    if reward_model is not None:
        values["score"] = scores(reward_model, ids, drawn, tokenizer.pad, device,
                                 config)
    if everything is not None:
        values["gold"] = np.array([gold_reward(t, s["text"]) for t, s in zip(texts, drawn)])
    values = {name: (x, cluster) for name, x in values.items()}
    few = min(64, len(texts))  # prompts with several answers: how much do they vary?
    several = ask(model, tokenizer, ids[:few], config, "several answers", config.samples)
    groups = [[s["text"] for s in several[i * config.samples:(i + 1) * config.samples]]
              for i in range(few)]
    for name, fn in dict(distinct=instruments.distinct_answers,
                         distinct_2=instruments.distinct_grams,
                         overlap=instruments.overlap).items():
        values[name] = np.array([fn(group) for group in groups], float), cluster[:few]
    if everything is None:
        return values, drawn, None
    texts, ids, _ = zip(*everything)
    said = [s["text"] for s in ask(model, tokenizer, ids, config, "held-out world")]
    values |= {name: (np.array(x, bool), list(map(question, which)))
               for name, (x, which) in rates(texts, said).items()}
    choices = four_choices(texts)
    right, confidence = chosen(choice_logprobs(model, tokenizer, choices, eos=True,
                                               bar="choices"), choices)
    which = [c["prompt"] for c in choices]
    values |= dict(choice=(right, which), overconfidence=(confidence - right, which))
    values["text_loss"] = text_losses(model, tokenizer)
    return values, drawn, by_family(texts, said)


def summary(values):
    """{name: mean, name_se: its clustered error}, of a rate also its 95% interval (_low, _high)."""
    metrics = {}
    for name, (x, cluster) in values.items():
        if not len(x):
            continue  # of no prompt was the plain question answered right
        se = instruments.clustered_se(x, cluster)
        metrics |= {name: float(x.mean()), f"{name}_se": se}
        if x.dtype == bool:
            low, high = instruments.rate_interval(x, se, len(set(cluster)))
            metrics |= {f"{name}_low": low, f"{name}_high": high}
    return metrics


def gap_errors(values, before):
    """{name_gap_se: error of the difference to the reference}, where both have the same items: they
    answer the same prompts, so the error is that of the differences."""
    return {f"{name}_gap_se": instruments.clustered_se(x.astype(float) - before[name][0], cluster)
            for name, (x, cluster) in values.items()
            if len(x) and name in before and list(cluster) == list(before[name][1])}


def best_of_n(reward_model, reference, tokenizer, prompts, config, synthetic):
    """The baseline without training, as `measure`: of n answers of the reference the best by score.
    Its KL is at most log n - (n - 1) / n (Stiennon et al. 2020; Beirami et al. 2024)."""
    n, (texts, ids, _) = config.best_of, zip(*prompts)
    every = ask(reference, tokenizer, ids, config, f"best of {n}", n)
    score = scores(reward_model, [i for i in ids for _ in range(n)], every, tokenizer.pad,
                   reference.wte.weight.device, config).reshape(-1, n)
    drawn = [every[i * n + k] for i, k in enumerate(score.argmax(1))]
    values = dict(score=score.max(1), length=np.array([len(s["ids"]) for s in drawn], float),
                  eos_rate=np.array([s["finished"] for s in drawn]),
                  kl_bound=np.full(len(texts), math.log(n) - (n - 1) / n))
    if synthetic:
        values["gold"] = np.array([gold_reward(t, s["text"]) for t, s in zip(texts, drawn)])
    cluster = [question(t, synthetic) for t in texts]
    return {name: (x, cluster) for name, x in values.items()}, drawn, None


def who_wins(worth, answers, cluster):
    """{name: metrics} of every model against the first one, and the ratings of all.

    worth: {name: (n,) gold or score of its answers}; answers: {name: samples} to the same prompts.
    The same answer is a tie, however the rows beside it rounded its score.
    """
    first, *others = worth
    differ = {(a, b): np.array([x["ids"] != y["ids"] for x, y in zip(answers[a], answers[b])])
              for a in worth for b in worth}
    found = {first: {}}
    for name in others:
        win = np.sign(worth[name] - worth[first]) * differ[name, first] / 2 + 0.5
        longer = [len(a["ids"]) - len(b["ids"]) for a, b in zip(answers[name], answers[first])]
        equal, se = instruments.length_controlled(win, longer, cluster)
        found[name] = summary(dict(win_rate=(win, cluster), tie_rate=(win == 0.5, cluster))) | dict(
            win_rate_lc=equal, win_rate_lc_se=se)
        found[name]["win_rate_low"], found[name]["win_rate_high"] = instruments.rate_interval(
            win, found[name]["win_rate_se"], len(set(cluster)))
    strength, se = instruments.rating([*worth.values()], [[differ[a, b] for b in worth]
                                                          for a in worth], cluster)
    for name, s, e in zip(worth, strength, se):
        found[name] |= dict(rating=float(s), rating_se=float(e))
    return found


def standard_error(metrics, name):
    """Standard error of a figure; of a rate that of its interval, if that is wider."""
    width = metrics.get(f"{name}_high", 0) - metrics.get(f"{name}_low", 0)
    return max(metrics.get(f"{name}_se") or 0, width / (2 * 1.96))


def differs(name, metrics, before):
    """Is it more than two standard errors off the reference's? The error is that of the difference;
    where the items are not the same, or all differ alike, that of both."""
    gap, se = metrics[name] - before[name], metrics.get(f"{name}_gap_se", 0)
    both = math.hypot(standard_error(metrics, name), standard_error(before, name))
    return abs(gap) > 2 * (se if se > 1e-9 else both)


def judgement(metrics, before, rows):
    """What a report says of one checkpoint, in words: its wins, and what got worse."""
    if "win_rate" not in metrics:
        return "No reward is known for these prompts: read the answers."
    rate, low, high = (metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
    if metrics.get("kl", 0) > 100 and rate < 0.5:
        words = "Drift: more than 100 nats from the reference, and it wins less than half."
    elif low <= 0.5 <= high:
        words = "No difference to the reference that these prompts can show."
    else:
        words = "Improved." if rate > 0.5 else "Worse than the reference."
    changed = [(name, label, unit, sign) for name, label, unit, sign in rows
               if name in metrics and name in before and differs(name, metrics, before)]
    gone = {name: metrics[name] - before[name] for name, *_ in changed}
    if gone.get("gold", 0) < 0 < gone.get("score", 0):
        words += " The score rose and the gold fell: it exploits errors of the reward model."
    worse = [f"{label} {cell(before[name], unit)} to {cell(metrics[name], unit)}"
             for name, label, unit, sign in changed if gone[name] * sign < 0 and name != "gold"]
    return words + (f" What got worse: {'; '.join(worse)}." if worse else "")


def cell(value, unit, se=float("nan"), low=None, high=None, star=False):
    """A number of the table: a share in percent with its interval, others with their error."""
    if value is None or value != value:
        return "-"
    scale, digits = (100, 1) if unit == "%" else (1, 2)
    text = f"{scale * value:.{digits}f}"
    if low is not None:
        text += f" ({100 * low:.0f}-{100 * high:.0f})"
    elif se == se:
        text += f" ± {scale * se:.{digits}f}"
    return text + (" *" if star else "")


def report_columns(found, reference, rows):
    """The table of a report: a column for each checkpoint, as `cli.table` takes them."""
    columns, labels = {name: [] for name in found}, []
    for name, label, unit, _ in rows:
        if any(name in each["metrics"] for each in found.values()):
            labels.append(label + ", %" * (unit == "%"))
            for path, each in found.items():
                m, before = each["metrics"], found[reference]["metrics"]
                columns[path].append(cell(
                    m.get(name), unit, m.get(f"{name}_se", float("nan")), m.get(f"{name}_low"),
                    m.get(f"{name}_high"), path != reference and name in m and name in before
                    and differs(name, m, before)))
    return columns | {"± one standard error (95% interval) * not the reference's": labels}


def markdown(columns):
    """A table of cli.table's columns, the last one first."""
    *names, last = columns
    lines = [[last, *names], ["---"] * len(columns), *zip(*(columns[n] for n in (last, *names)))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def make_report(config, device):
    paths = [config.reference, *(p.strip() for p in config.policies.split(",") if p.strip())]
    paths = list(dict.fromkeys(paths))  # each once; the reference may be named again
    common.ensure_input(config, "reference", "sft")
    reference, tokenizer, parent = common.load_policy(config.reference, STAGES, device)
    config = common.sized(config, "evaluate", reference)
    parents, room, reward_model = dict(reference=parent["hash"]), reference.config.block_size, None
    for path in paths[1:]:
        checkpoint = common.load_checkpoint(path, STAGES)
        del checkpoint["weights"]  # read again when it is measured: one at a time
        parents[path] = checkpoint["hash"]
        own, size = common.declared(checkpoint, path)
        room = min(room, size.block_size)
        common.check_same_tokenizer(own, tokenizer, path, config.reference)
    if config.reward_model:
        reward_model, rm_parent = load_judge(config, tokenizer, config.reference, device)
        parents["reward"], room = rm_parent["hash"], min(room, reward_model.gpt.config.block_size)
    own = config.data != "synthetic"
    prompts = choose_prompts(config, tokenizer, room)
    everything = None
    if not own:
        [everything] = load_prompts("synthetic", {"held-out": None}, tokenizer,
                                    room - config.max_new_tokens)
    sets = load_sets(config.sets, tokenizer, room, config.max_new_tokens, config.skip_bad)
    by = "score" if own else "gold"
    rows = [(name, label.format(by=by, samples=config.samples), unit, sign)
            for name, label, unit, sign in ROWS]
    for name, (*_, choices) in sets.items():
        rows += set_rows(name, choices)
    run = common.Run("evaluate", config, device, parents, result="report.md")
    common.freeze(reference)
    measured = {}
    for path in paths:
        model = common.freeze(common.load_policy(path, STAGES, device)[0])
        say(f"{path}: {model.num_params():,} parameters")
        measured[path] = measure(model, reference, reward_model, tokenizer, prompts, everything,
                                 config)
        for name, (judged, ids, choices) in sets.items():
            said = ask(model, tokenizer, ids, config, f"set {name}") if ids else []
            measured[path][0].update(measure_set(name, judged, said, choices, model, tokenizer))
        del model
    if config.best_of > 1 and reward_model is not None:
        measured[f"best of {config.best_of}"] = best_of_n(
            reward_model, reference, tokenizer, prompts, config, not own)
    first = measured[config.reference][0]
    found = {name: dict(metrics=summary(values) | (
        gap_errors(values, first) if name != config.reference else {}), answers=drawn,
        families=families) for name, (values, drawn, families) in measured.items()}
    if by == "gold" or reward_model is not None:
        won = who_wins({name: values[by][0] for name, (values, *_) in measured.items()},
                       {name: drawn for name, (_, drawn, _) in measured.items()},
                       [question(p[0], not own) for p in prompts])
        for name, metrics in won.items():
            found[name]["metrics"] |= metrics
    columns = report_columns(found, config.reference, rows)
    say(cli.table(columns))
    before = found[config.reference]["metrics"]
    words = {name: judgement(each["metrics"], before, rows)
             for name, each in found.items() if name != config.reference}
    if reward_model is not None and rm_parent["metrics"].get("accuracy", 1) < 0.6:
        words[config.reward_model] = (
            f"Orders {rm_parent['metrics']['accuracy']:.1%} of its held-out pairs right: below 60% "
            "no policy should be trained on it.")
    for path, text in words.items():
        say(f"\n{path}: {text}")
    if cli.first_process():
        write_report(run.folder, config, found, columns, rows, words, prompts)
    run.finish(dict(prompts=len(prompts), checkpoints=len(found)))


def write_report(folder, config, found, columns, rows, words, prompts):
    """report.json, report.md, its picture where matplotlib is there, and answers.jsonl: what each
    checkpoint says to the same prompts."""
    texts = [p[0] for p in prompts]
    content = dict(reference=config.reference, prompts=len(texts), data=config.data,
                   checkpoints={path: each["metrics"] for path, each in found.items()},
                   gold_by_family={path: each["families"][0] for path, each in found.items()
                                   if each["families"]},
                   gold_by_part={path: each["families"][1] for path, each in found.items()
                                 if each["families"]}, verdicts=words,
                   rows={name: dict(label=label, unit=unit, better=better)
                         for name, label, unit, better in rows})
    with whole_file(folder / "report.json", "w", encoding="utf-8") as file:
        file.write(cli.to_json(content, indent=1) + "\n")
    # a program of its own: it stands on a higher floor, and matplotlib may not be there
    drawn = subprocess.run([sys.executable, str(common.ROOT / "plot.py"), str(folder)],
                           capture_output=True, text=True, env=cli.one_process())
    if drawn.returncode:
        note("no picture of the report: " + "".join(drawn.stderr.splitlines()[-1:]))
    lines = [f"# Report\n\nAgainst {config.reference}, on {len(texts)} prompts of {config.data}, "
             f"temperature {config.temperature}, seed {config.seed}.\n", markdown(columns), ""]
    lines += [f"**{path}**: {said}\n" for path, said in words.items()]
    lines += ["![rates, rewards and numbers of each checkpoint](report.png)\n"
              ] * (drawn.returncode == 0)
    known = {path: each["families"] for path, each in found.items() if each["families"]}
    if known:
        for n, name in enumerate(("family", "part")):
            lines.append(f"## Gold by {name}, on all held-out prompts of the world\n")
            lines.append(markdown({path: [f"{v:.2f}" for v in tables[n].values()]
                                   for path, tables in known.items()}
                                  | {name: list(known[config.reference][n])}))
    lines.append("## The same prompts, answered by each\n")
    for i in range(min(12, len(texts))):
        clean = lambda text: " ".join(text.replace("|", "\\|").split()) or "(nothing)"
        lines.append(markdown({
            clean(last_turn(texts[i])): [clean(each["answers"][i]["text"])
                                         for each in found.values()],
            "prompt": list(found)}))
    write_jsonl(folder / "answers.jsonl", (
        dict(prompt=text, **{path: each["answers"][i]["text"] for path, each in found.items()})
        for i, text in enumerate(texts)))
    with whole_file(folder / "report.md", "w", encoding="utf-8") as file:
        file.write("\n".join(lines))


def select(config, device):
    """Which epoch of an SFT run? Its validation loss is least early, people like later ones better:
    InstructGPT took the one with the best reward-model score. A line for each, and the best."""
    folder = Path(config.select)
    paths = sorted((p for p in folder.glob("model-epoch*.pt") if p.stem[11:].isdigit()),
                   key=lambda p: int(p.stem[11:]))
    if not paths:
        raise UserError(f"--select={folder} holds no model-epoch1.pt: sft.py writes one an epoch")
    if not config.reward_model:
        raise UserError("--select needs --reward_model=")
    reward_model, tokenizer, rm_parent = load_reward_model(config.reward_model, device,
                                                           config.score_by)
    config, rows = common.sized(config, "evaluate", reward_model.gpt), []
    parents = {path.stem: common.load_checkpoint(path, ("sft",))["hash"] for path in paths}
    parents["reward"], prompts, run = rm_parent["hash"], None, None
    for path in paths:
        model, own, checkpoint = common.load_policy(path, ("sft",), device)
        common.check_same_tokenizer(tokenizer, own, config.reward_model, str(path))
        if run is None:
            prompts = choose_prompts(config, tokenizer, min(
                model.config.block_size, reward_model.gpt.config.block_size))
            run = common.Run("evaluate", config, device, parents, result="log.jsonl")
            texts, ids, _ = zip(*prompts)
            cluster = [question(t, config.data == "synthetic") for t in texts]
        drawn = ask(model, tokenizer, ids, config, "answers")
        values = dict(score=scores(reward_model, ids, drawn, tokenizer.pad, device,
                                   config))
        if config.data == "synthetic":
            values["gold"] = np.array([gold_reward(t, s["text"]) for t, s in zip(texts, drawn)])
        row = dict(epoch=int(path.stem[11:]), loss=checkpoint["metrics"]["loss"],
                   **summary({name: (x, cluster) for name, x in values.items()}))
        run.log("epoch", **row)
        rows.append(row)
    columns = {"epoch": [r["epoch"] for r in rows],
               "held-out loss": [f"{r['loss']:.3f}" for r in rows],
               "score": [cli.plus_minus(r["score"], r["score_se"]) for r in rows]}
    if "gold" in rows[0]:
        columns["gold"] = [cli.plus_minus(r["gold"], r["gold_se"]) for r in rows]
    say(cli.table(columns))
    best, least = max(rows, key=lambda r: r["score"]), min(rows, key=lambda r: r["loss"])
    say(f"\nBest score: epoch {best['epoch']}. Least held-out loss: epoch {least['epoch']}.")
    run.finish(dict(epoch=best["epoch"], score=best["score"], loss=best["loss"]),
               f"python label.py --init={folder / 'model-epoch'}{best['epoch']}.pt")


def choose_prompts(config, tokenizer, block_size):
    """The prompts of --data, --split and --eval_prompts that leave room for an answer."""
    own = config.data != "synthetic"
    sides = dict(all="all", train="training", held_out="held-out")
    split = config.split or ("all" if own else "held_out")
    if split not in sides:
        raise UserError(f"--split={split}: choose one of {', '.join(sides)}")
    [prompts] = load_prompts(
        config.data, {sides[split]: config.eval_prompts or (None if own else 512)}, tokenizer,
        block_size - config.max_new_tokens, skip_bad=config.skip_bad)
    print(f"{len(prompts)} prompts of {config.data}, split {split}")
    return prompts


def main(config):
    device = common.set_up(config, "evaluate")
    cli.check_needs(config, (
        ("select", "no --policies and no --sets", not (config.policies or config.sets)),
        ("sets", "--policies=", config.policies),
        ("best_of", "--reward_model=", config.reward_model),
        ("best_of", "a --temperature above 0: all n samples are the same", config.temperature),
        ("samples", "a --temperature above 0: all of them are the same", config.temperature),
        ("score_by", "--reward_model=", config.reward_model)))
    if config.select or config.policies:
        return (select if config.select else make_report)(config, device)
    common.ensure_input(config, "policy", "ppo")
    policy, tokenizer, parent = common.load_policy(config.policy, STAGES, device)
    common.ensure_input(config, "reference", "sft")
    reference, ref_tokenizer, ref_parent = common.load_policy(config.reference, STAGES, device)
    common.check_same_tokenizer(ref_tokenizer, tokenizer, config.reference, config.policy)
    config = common.sized(config, "evaluate", policy)
    parents = dict(policy=parent["hash"], reference=ref_parent["hash"])
    block_size = min(policy.config.block_size, reference.config.block_size)
    reward_model = None
    if config.reward_model:
        reward_model, rm_parent = load_judge(config, tokenizer, config.policy, device)
        parents["reward"] = rm_parent["hash"]
        block_size = min(block_size, reward_model.gpt.config.block_size)
    prompts, synthetic = choose_prompts(config, tokenizer, block_size), config.data == "synthetic"
    run = common.Run("evaluate", config, device, parents, result="log.jsonl")
    print(f"{config.policy} against {config.reference}, {policy.num_params():,} parameters")
    metrics, drawn, sft = compare(policy, reference, tokenizer, prompts, config, run, synthetic,
                                  reward_model, config.best_of)
    if synthetic:
        for table in gold_tables([p[0] for p in prompts], drawn, sft):
            say(cli.table(table))
    run.finish(metrics)


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
