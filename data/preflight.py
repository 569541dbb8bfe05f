"""A look at rankings before a reward model is trained on them: what is there, and what to do."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from cli import progress, say
from data import batches
from data.load import batch_rows, choose_elements, pair_indices
from data.records import check_ranking, ranking_pairs, ranking_rows
from data.tokens import read_tokens
from model import autocast


def preflight(config, model, loss, train, tokenizer, device):
    """Print a line for each thing that is looked at. model: a reward model, which is trained on 32
    pairs and of no use afterwards; loss: a sum over pairs; train: Elements; config: reward.py's."""
    source = read_tokens(config.data, check_ranking, ranking_rows, tokenizer,
                         skip_bad=config.skip_bad)
    lines = ranking_lines(source, tokenizer, model.gpt.config.block_size, config.max_new_tokens)
    lines.append(overfit_line(overfit(model, loss, train, config, tokenizer.pad, device)))
    say()
    for ok, text in lines:
        say(f"{'ok   ' if ok else 'look:'} {text}")


def overfit(model, loss, elements, config, pad, device, pairs=32, most=150):
    """The losses (nats/pair) of steps on the same few pairs at the peak learning rate: before the
    first one, and so on until a loss is below 0.05, at most `most` of them."""
    chosen = choose_elements(elements, pairs)
    chosen = [replace(e, pairs=e.pairs[:-(-pairs // len(chosen))]) for e in chosen]
    tokens, mask = batch_rows(chosen, pad, device)
    winners, losers = (side[:pairs] for side in pair_indices(chosen))
    optimizer, losses = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0), []
    for _ in progress(range(most + 1), "overfit"):
        with autocast(device):
            scores = batches.in_pieces(lambda p: model.raw(tokens[p], mask[p]),
                                       batches.ends_together(tokens, mask), config.micro_batch)
        mean = loss(scores[winners], scores[losers]) / len(winners)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean.item())
        if losses[-1] < 0.05:
            break
    return losses


def overfit_line(losses):
    learnt = losses[-1] < 0.1
    return learnt, (f"up to 32 pairs alone: loss {losses[0]:.2f} at the start (a coin toss: "
                    f"{math.log(2):.2f}), {losses[-1]:.2f} after {len(losses) - 1} steps") + (
        "" if learnt else ": it cannot learn them by heart; do they contradict each other? Else "
        "try another --lr")


def ranking_lines(source, tokenizer, block_size, max_new_tokens):
    """[(ok, text), ...]. source: Rows of a file of rankings or pairs, each as it stands there,
    before those of a prompt come together; lengths in tokens."""
    facts = source.facts
    records = np.split(np.arange(len(source)), np.flatnonzero(np.diff(facts["record"])) + 1)
    lines, count = [], len(records)

    def line(bad, what, todo, fine=None):
        lines.append((not bad, f"{what}: {todo}" if bad else fine or what))

    # --- baselines, ties ------------------------------------------------------
    pairs, longer, first, ties = [], [], [], 0  # pairs: (key, winner's answer, loser's)
    for rows in records:
        ranks, chars = facts["rank"][rows].tolist(), facts["chars"][rows].tolist()
        ordered = ranking_pairs(ranks)
        ties += len(rows) * (len(rows) - 1) // 2 - len(ordered)
        answer, key = facts["answer"][rows].tolist(), int(facts["key"][rows[0]])
        for i, j in ordered:
            pairs.append((key, answer[i], answer[j]))
            longer.append(np.sign(chars[i] - chars[j]) / 2 + 0.5)
            first.append(i < j)
    longer, first = float(np.mean(longer)), float(np.mean(first))
    by_length = max(longer, 1 - longer)
    line(by_length > 0.65, f"{'longer' if longer >= 0.5 else 'shorter'} wins {by_length:.1%} of "
         "the pairs", "length alone is nearly as good as a reward model; compare its accuracy with "
         "this, or add pairs of equal length",
         f"longer wins {longer:.1%}, shorter wins {1 - longer:.1%} of the pairs")
    line(0.6 < first < 1 or first < 0.4, f"the first listed answer wins {first:.1%} of the pairs",
         "were the answers in random order when they were judged? A bias for the first is in the "
         "labels", f"the first listed answer wins {first:.1%} of the pairs"
         + " (chosen and rejected, or sorted: that says nothing)" * (first == 1))
    line(ties > len(pairs), f"{ties:,} ties, {len(pairs):,} pairs", "most answers are not told "
         "apart; ties make no pair", f"{ties:,} ties, {len(pairs):,} pairs")

    # --- the same again, and its opposite -------------------------------------
    same = sum(len(rows) - len(set(facts["answer"][rows].tolist())) for rows in records)
    line(same, f"{same:,} answers stand twice in their ranking", "they make no pair with each "
         "other; drop them", "no answer stands twice in a ranking")
    seen = Counter((int(facts["key"][rows[0]]), tuple(facts["answer"][rows].tolist()),
                    tuple(facts["rank"][rows].tolist())) for rows in records)
    again = count - len(seen)
    line(again, f"{again:,} of {count:,} records are copies of another", "their pairs count twice; "
         "drop them", f"no record of {count:,} is a copy of another")
    ordered = set(pairs)
    both = sum((key, b, a) in ordered and a < b for key, a, b in ordered)
    line(both, f"{both:,} pairs of answers are ordered both ways", "people disagree, or a record "
         "is wrong: no model gets both right", "no pair of answers is ordered both ways")

    # --- the two sides --------------------------------------------------------
    starts = np.array([rows[0] for rows in records])
    held_out = facts["held_out"][starts]
    letters = {}  # of a prompt: what is left without case, punctuation and space
    for n in starts.tolist():
        ids, mask = source[n]
        text = tokenizer.decode(ids[:mask.index(1)])
        letters[n] = "".join(c for c in text.casefold() if c.isalnum())
    train = {letters[n] for n in starts[~held_out].tolist()}
    shared = len({letters[n] for n in starts[held_out].tolist()} & train)
    line(shared, f"{shared:,} held-out prompts are training prompts too, but for case, spaces and "
         "punctuation", "the accuracy will be too high; give them one side by \"held_out\"",
         "no held-out prompt is a training prompt in other letters")
    answers = [set(facts["answer"][facts["held_out"] == side].tolist()) for side in (False, True)]
    known = len(answers[1] & answers[0]) / max(1, len(answers[1]))
    line(known > 0.5, f"{known:.1%} of the held-out answers stand on the training side, letter for "
         "letter", "the accuracy says little about new answers",
         f"{known:.1%} of the held-out answers stand on the training side as well")

    # --- what does not fit ----------------------------------------------------
    long = np.array([source.lengths[rows].max() > block_size for rows in records])
    line(long.any(), f"{long.sum():,} of {count:,} rankings have an answer over {block_size} "
         "tokens with its prompt", "they are dropped whole; take a model with a longer context",
         f"every answer fits the context of {block_size} tokens")
    cut = int((facts["response"] > max_new_tokens).sum())
    line(cut, f"{cut:,} of {len(source):,} answers are longer than --max_new_tokens="
         f"{max_new_tokens}", "PPO would cut answers like them, and score them by --missing_eos; "
         "raise it", f"every answer is at most --max_new_tokens={max_new_tokens} long")
    return lines
