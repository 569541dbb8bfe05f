"""Stage 2a, labels: sample K answers per prompt from the SFT model and have a labeler rank them.

    y_1 .. y_K ~ pi_SFT(. | x),   ranks by perceived value = gold + biases + logistic noise

Answers are drawn at temperature 0.7, distinct and complete (ended with EOS); a prompt with fewer
than two is skipped. The simulated labeler (data/synthetic/people.py) stands in for a person; what
it is like is written to card.json beside the rankings.

    python label.py                      # 5,500 training prompts and 500 held-out ones, K = 6
    python label.py --length=0.1         # a labeler with a strong taste for long answers
"""

from dataclasses import asdict, dataclass, fields

import cli
from cli import NotNegative, Positive, UserError
from data.synthetic.people import Labeler


@dataclass
class Config(cli.Config):
    out: str = "out/label"  # output folder: rankings.jsonl, card.json
    # --- data and models
    init: str = "out/sft"  # checkpoint to sample from
    prompts: Positive[int] = 5500  # training prompts
    held_out: Positive[int] = 500  # held-out prompts, ranked for testing only
    # --- answers
    k: Positive[int] = 6  # answers per prompt
    oversample: NotNegative[int] = 0  # draws per prompt beyond K, so that duplicates can be dropped
    temperature: Positive[float] = 0.7  # of the samples, as Stiennon et al. drew theirs; at 1 a
    #                                     small model slips often, and slips teach little
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    # --- the labeler
    noise: NotNegative[float] = Labeler.noise  # scale of the logistic noise, in units of gold
    length: float = Labeler.length  # bias: for each word
    flattery: float = Labeler.flattery  # bias: for each flattering sentence
    bullets: float = Labeler.bullets  # bias: for a bullet list
    confidence: float = Labeler.confidence  # bias: for a show of confidence
    caution: float = Labeler.caution  # bias: for "I do not know" and refusals
    chunk: Positive[int] = 64  # prompts sampled together


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import json

import numpy as np

import common
from cli import progress, say, table
from data import batches
from data.records import ranking_pairs, write_jsonl
from data.synthetic.gold import gold_reward
from data.synthetic.world import sample_prompts


def agreement(first, second):
    """Share of pairs, over all prompts, that two labelers put in the same order."""
    same = total = 0
    for a, b in zip(first, second):
        for i, j in ranking_pairs(a):
            same += b[i] < b[j]
            total += b[i] != b[j]
    return same / max(1, total)


def main(config):
    device = common.set_up(config, "label")
    if config.k < 2:
        raise UserError(f"--k={config.k}: a ranking needs at least two answers")

    common.ensure_input(config, "init", "sft")

    # --- model, prompts, labeler ---------------------------------------------
    model, tokenizer, parent = common.load_policy(config.init, common.POLICIES, device)
    config = common.sized(config, "label", model)
    labeler = Labeler(**{f.name: getattr(config, f.name) for f in fields(Labeler)})
    prompts = (sample_prompts(config.prompts, held_out=False, seed=config.seed)
               + sample_prompts(config.held_out, held_out=True, seed=config.seed))
    longest = max(len(tokenizer.encode_prompt(p.text)) for p in prompts)
    if longest + config.max_new_tokens > model.config.block_size:
        raise UserError(f"--max_new_tokens={config.max_new_tokens} and the longest prompt of "
                        f"{longest} do not fit the context of {model.config.block_size}")
    run = common.Run("label", config, device, {parent["stage"]: parent["hash"]},
                     result="rankings.jsonl")
    print(labeler.card())

    # --- sample and rank -----------------------------------------------------
    state = run.load_state()
    records, skipped = json.loads(state.get("records", "[]")), state.get("skipped", 0)
    draws = config.k + config.oversample
    starts, done = range(0, len(prompts), config.chunk), state.get("step", 0) // config.chunk
    for start in progress(starts[done:], "label", initial=done, total=len(starts)):
        if start % (config.chunk * 8) == 0:
            run.save_state(records=json.dumps(records), step=start, skipped=skipped)
        part = prompts[start:start + config.chunk]
        ids = [tokenizer.encode_prompt(p.text) for p in part]
        samples = batches.sample_texts(
            model, tokenizer, ids, config.max_new_tokens,
            common.stream(config.seed, "label", "answers", start, device), config.temperature,
            batch_size=len(ids) * draws, samples=draws)
        # two people rank the same answers; the second only measures how far they agree
        people = [common.stream(config.seed, "label", f"labeler {n}", start) for n in (1, 2)]
        for i, p in enumerate(part):
            drawn = samples[i * draws:(i + 1) * draws]
            # distinct and complete; white space alone is no answer to any later stage
            texts = list(dict.fromkeys(s["text"] for s in drawn
                                       if s["finished"] and s["text"].strip()))
            texts = texts[:config.k]
            if len(texts) < 2:
                skipped += 1
                continue
            gold = [gold_reward(p.text, t) for t in texts]
            ranks, second = (labeler.rank(p.text, texts, gold, rng) for rng in people)
            records.append(dict(prompt=p.text, completions=texts, ranks=ranks, second=second,
                                gold=[round(g, 3) for g in gold], family=p.family,
                                held_out=p.held_out, world="synthetic", noise=config.noise,
                                policy=parent["hash"]))

    if not records:
        raise UserError(f"no prompt got two complete answers: does {config.init} end its answers "
                        f"within {config.max_new_tokens} tokens?")

    # --- what the labels are like --------------------------------------------
    pairs = [(r, i, j) for r in records for i, j in ranking_pairs(r["ranks"])]
    unequal = [(r, i, j) for r, i, j in pairs if r["gold"][i] != r["gold"][j]]
    metrics = dict(
        prompts=len(records), skipped=skipped, pairs=len(pairs),
        agreement=agreement([r["ranks"] for r in records], [r["second"] for r in records]),
        # how far gold itself gets on these labels: the ceiling for an unbiased reward model
        gold_accuracy=float(np.mean([r["gold"][i] > r["gold"][j] for r, i, j in unequal]))
        if unequal else float("nan"),
        longer_preferred=float(np.mean([len(r["completions"][i]) > len(r["completions"][j])
                                        for r, i, j in pairs])),
        gold=float(np.mean([g for r in records for g in r["gold"]])),
        gold_std=float(np.std([g for r in records for g in r["gold"]])))
    for r in records[:6]:
        run.log("sample", **{k: r[k] for k in ("prompt", "completions", "ranks", "gold")})
    card = dict(card=labeler.card(), labeler=asdict(labeler),
                parents=run.parents, metrics=metrics)
    (run.folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    write_jsonl(run.folder / "rankings.jsonl", records)
    best_first = sorted(zip(*(records[0][k] for k in ("ranks", "gold", "completions"))))
    rank, gold, texts = zip(*best_first)
    say(table(dict(rank=rank, gold=[f"{g:.2f}" for g in gold])
              | {f"an answer to: {records[0]['prompt']}": texts}))
    say(f"\n{len(records):,} prompts ranked, {len(pairs):,} pairs; {skipped} prompts skipped: "
        f"fewer than two complete answers.\nTwo labelers agree on {metrics['agreement']:.1%} of "
        "the pairs, gold with the labels on "
        + (f"{metrics['gold_accuracy']:.1%}" if unequal else "none: all are equal")
        + f"; the longer answer wins {metrics['longer_preferred']:.1%}.")
    run.finish(metrics, f"python reward.py --data={config.out}/rankings.jsonl --init={config.init}")


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
