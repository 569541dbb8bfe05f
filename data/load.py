"""What the stages after SFT read, as token ids: prompts, and rankings with all their answers."""

from dataclasses import dataclass

import numpy as np

from cli import UserError, note, progress
from data.records import (check_prompt, check_ranking, choose, collate, distinct, encode_ranking,
                          fits, merge_rankings, prompt_key, ranking_pairs, read_sides)
from data.synthetic.world import FAMILIES, sample_prompts


def load_prompts(data, counts, tokenizer, room, seed=0, families=FAMILIES, check=check_prompt,
                 skip_bad=False):
    """For every side of `counts` a list of (text or turns, ids, answer or None).

    data: "synthetic" or a file. counts: {side: n}, sides "training", "held-out" or "all"; n of a
    file's prompts, None for all, each once however often it stands there. The embedded held-out
    ones are the same in every stage. Those over `room` tokens are dropped.
    """
    sides = None if data == "synthetic" else read_sides(
        data, check, [side for side in counts if side != "all"], skip_bad)
    lists = []
    for side, n in counts.items():
        if sides is None:
            records = [dict(prompt=p.text, answer=p.answer) for h in (False, True)
                       if side in ("all", "held-out" if h else "training")
                       for p in sample_prompts(n, h, 0 if h else seed, families)]
        else:
            records = distinct({"training": sides.train, "held-out": sides.held_out,
                                "all": sides.held_out + sides.train}[side])
            print(f"{min(n or len(records), len(records)):,} of {len(records):,} prompts, "
                  f"side: {side}")
            records, seen = choose(records, n), {prompt_key(r) for r in sides.train}
            if side == "all" and (n := sum(prompt_key(r) in seen for r in records)):
                note(f"{n} of them are on the training side, by the hash or by their own word: a "
                     "model that was trained on their answers repeats them")
        encoded = [(r["prompt"], tokenizer.encode_prompt(r["prompt"]), r.get("answer"))
                   for r in progress(records, "tokens")]
        lists.append(fits(f"{side} prompts", encoded, room, lambda e: len(e[1])))
        if not lists[-1]:
            raise UserError(f"--data={data}: no {side} prompt of at most {room} tokens")
    return lists


@dataclass
class Element:
    """One prompt with all its answers: each passes through the network once, however many pairs."""

    rows: list  # ids of prompt + answer, for each answer
    masks: list  # 1 on the answer's tokens, EOS included
    pairs: list  # (i, j), answer i preferred to j
    labels: list  # 1 desirable, -1 undesirable, 0 neither, for each answer (kto)
    best: list  # desirable answers that no other beats
    record: dict = None  # what it was made from: "prompt", "completions", "pairs", "gold"
    ref: list = None  # log pi_ref of each answer, nats per sequence (dpo.py)


def make_element(tokenizer, record):
    """An Element from what `merge_rankings` returns, or from a single labelled answer.

    In a ranking an answer is desirable where it wins more pairs than it loses.
    """
    rows, masks = encode_ranking(tokenizer, record)
    pairs = record["pairs"]
    wins = [sum((n == i) - (n == j) for i, j in pairs) for n in range(len(rows))]
    labels = record.get("labels") or [int(np.sign(w)) for w in wins]
    lost = {j for _, j in pairs}
    return Element(rows, masks, pairs, labels,
                   [n for n in range(len(rows)) if n not in lost and labels[n] > 0], record)


def load_rankings(path, tokenizer, block_size, check=check_ranking, skip_bad=False):
    """A Split of Elements, those of single labelled answers first.

    A ranking with an answer over block_size tokens is dropped whole: cut, it would have no EOS.
    Only then do those of one prompt come together, so that a long answer costs its own ranking and
    not the others of its prompt.
    """
    def encode(name, records):
        records = [r if "completions" in r else dict(
            prompt=r["prompt"], completions=[r["completion"]], pairs=[],
            labels=[1 if r["label"] else -1]) for r in records]
        records = fits(f"{name} rankings", records, block_size,
                       lambda r: max(map(len, encode_ranking(tokenizer, r)[0])))
        ranked = [r for r in records if "labels" not in r]
        merged = merge_rankings(ranked)
        same = sum(r["completions"][i] == r["completions"][j]
                   for r in ranked for i, j in ranking_pairs(r["ranks"]))
        if same:
            note(f"{name} rankings: left out {same} pairs, the same answer twice")
        unranked = len(distinct(ranked)) - len(merged)
        if unranked:
            note(f"{name} rankings: left out {unranked} prompts, no answer beats another")
        singles = [r for r in records if "labels" in r]
        if not singles + merged:
            raise UserError(f"--data={path}: no {name} ranking is left to use")
        print(f"{name}: {len(distinct(singles + merged)):,} prompts, "
              f"{sum(len(r['pairs']) for r in merged):,} pairs"
              + f", {len(singles):,} labelled answers" * (len(singles) > 0))
        return [make_element(tokenizer, r) for r in progress(singles + merged, "tokens")]

    return read_sides(path, check, skip_bad=skip_bad).each(encode)


def all_rows(elements):
    """(rows, masks) of every answer of every Element, in order."""
    return [[x for e in elements for x in getattr(e, name)] for name in ("rows", "masks")]


def batch_pairs(elements, pad, device):
    """(tokens (n, T), mask (n, T), winners, losers): the n answers of all Elements, one after the
    other, and for every pair the indices of its two."""
    tokens, mask = (t.to(device) for t in collate(*all_rows(elements), pad))
    winners, losers, offset = [], [], 0
    for e in elements:
        winners += [offset + i for i, _ in e.pairs]
        losers += [offset + j for _, j in e.pairs]
        offset += len(e.rows)
    return tokens, mask, winners, losers
