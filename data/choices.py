"""Multiple choice by log-probability, and how far the probabilities can be believed.

What counts is the sum over the tokens of a choice, EOS included: log pi(choice | prompt), so that
the choices exclude each other and a softmax over them is the model's belief. Per token instead, a
long choice of predictable words gains; that is no probability, and there for comparison. Without
EOS "Yes" can never be less probable than "Yes, but not always".

The trap: a text that stands in the prompt is a likelier answer in every model, by mere repetition.
So what an opinion in the prompt does ("with_opinion") is to be compared between models.
"""

import numpy as np

from data.batches import over_rows
from model import token_logprobs


def choice_rows(tokenizer, records, field="prompt"):
    """(rows, masks, sizes): a row for each choice of each record, prompt + choice + EOS, the mask 1
    on choice and EOS; sizes: how many rows each record has. field: or "with_opinion"."""
    pieces = [[*head, (choice, 1), (tokenizer.eos, 1)] for record in records
              for head in [tokenizer.prompt_pieces(record[field])] for choice in record["choices"]]
    rows, masks = map(list, zip(*tokenizer.encode_pieces(pieces)))
    return rows, masks, [len(record["choices"]) for record in records]


def longest_choice(tokenizer, records, field="prompt"):
    """Tokens of the longest row of each record, for `data.records.fits`: what is longer than the
    context has to be left out, not cut."""
    rows, _, sizes = choice_rows(tokenizer, records, field)
    lengths = np.array([len(row) for row in rows])
    return np.maximum.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))


def choice_logprobs(model, tokenizer, records, per_token=False, field="prompt", size=64, bar=None):
    """log pi(choice | prompt) of every choice, in nats: an array for each record, in order.

    records: as `check_evaluation` gives them, with "choices". per_token: the mean over the tokens
    of choice and EOS, in place of their sum. field: "prompt", or "with_opinion" for the prompt with
    the user's opinion. bar: shows progress under this name.
    """
    rows, masks, sizes = choice_rows(tokenizer, records, field)
    logp = over_rows(lambda tokens, mask: token_logprobs(model, tokens, mask).sum(1), rows, masks,
                     tokenizer.pad, model.wte.weight.device, size, bar).numpy()
    if per_token:
        logp = logp / [sum(mask) for mask in masks]
    return np.split(logp, np.cumsum(sizes)[:-1])


def beliefs(logprobs):
    """Softmax over the choices of each record: arrays that sum to 1."""
    shifted = [np.exp(x - x.max()) for x in logprobs]  # e^x alone is 0 for a choice of many tokens
    return [p / p.sum() for p in shifted]


def chosen(logprobs, records):
    """(right, confidence), arrays (n,): whether the choice of the highest log-probability is one of
    the answers, and its share of the softmax. Of equal ones each counts its part: who likes all the
    same is right as often as chance."""
    right, confidence = [], []
    for x, p, record in zip(logprobs, beliefs(logprobs), records):
        best = np.flatnonzero(x == x.max())
        right.append(np.isin(best, record["answer"]).mean())
        confidence.append(p.max())
    return np.array(right), np.array(confidence)


def chance(records):
    """What guessing gets: the mean share of the choices that are answers."""
    return float(np.mean([len(r["answer"]) / len(r["choices"]) for r in records]))


def calibration(confidence, right, bins=10):
    """(expected calibration error, table): the mean gap between how sure a model is and how often
    it is right, sum_b n_b |confidence_b - accuracy_b| / n, over bins of equal mass.

    confidence, right: (n,), as `chosen` gives them. table: {"confidence", "accuracy", "n"} of each
    bin, from the least sure. Equal values share a bin, or their order would decide; where many are
    equal there are fewer bins. A perfect model has no error of 0: a bin of 30 is off by some 0.07
    by chance alone. (`reward.py` has bins of equal width, of pairs.)
    """
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    first, last = (np.searchsorted(np.sort(confidence), confidence, side)
                   for side in ("left", "right"))
    numbers = (first + last) * bins // (2 * len(right))  # by the middle rank of equal ones
    table = [dict(confidence=float(confidence[numbers == b].mean()),
                  accuracy=float(right[numbers == b].mean()), n=int((numbers == b).sum()))
             for b in np.unique(numbers)]
    return sum(abs(t["confidence"] - t["accuracy"]) * t["n"] for t in table) / len(right), table
