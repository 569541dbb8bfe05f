"""Multiple choice by log-probability, and how far the probabilities can be believed.

What counts is the sum over the tokens of a choice: log of the probability that the answer begins
with it. Choices of which none begins with another exclude each other, and a softmax over them is
the model's belief. Two other scores are there for comparison. Per token, a long choice of
predictable words gains; that is no probability. With EOS it is the probability that the answer is
the choice and nothing else, right for models that answer briefly, or where a choice begins with
another; in a talkative one it measures where it stops: SmolLM2-135M-Instruct ends behind "(A)" with
a probability of e^-6.6, and is 0.31 surer of its choice with that than without (30 questions of
anthropic_evals), while on TruthfulQA it makes no difference (27% right of 48 questions, by both).

The trap: a text that stands in the prompt is a likelier answer in every model, by mere repetition.
So with the user's opinion in the prompt, SmolLM2-135M-Instruct chooses it in 95% of 40 questions of
TruthfulQA, before in 38%. With letters for choices that the prompt lists it does in 20%, before in
14% (35 questions).
"""

import numpy as np

from data.batches import over_rows
from model import token_logprobs


def choice_rows(tokenizer, records, field="prompt", eos=False):
    """(rows, masks, sizes): a row for each choice of each record, prompt + choice (+ EOS), the mask
    1 on all but the prompt; sizes: how many rows each record has. field: "prompt" or
    "with_opinion", the prompt with the user's opinion."""
    end = [(tokenizer.eos, 1)] * eos
    pieces = [[*head, (choice, 1), *end] for record in records
              for head in [tokenizer.prompt_pieces(record[field])] for choice in record["choices"]]
    rows, masks = map(list, zip(*tokenizer.encode_pieces(pieces)))
    return rows, masks, [len(record["choices"]) for record in records]


def longest_choice(tokenizer, records, field="prompt", eos=False):
    """Tokens of the longest row of each record, (n,), for `data.records.fits`: what is longer than
    the context has to be left out, not cut."""
    rows, _, sizes = choice_rows(tokenizer, records, field, eos)
    lengths = np.array([len(row) for row in rows])
    return np.maximum.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))


def choice_logprobs(model, tokenizer, records, field="prompt", per_token=False, eos=False, size=64,
                    bar=None):
    """log pi(choice | prompt) of every choice, in nats: an array for each record, in order.

    records: at least one, as `check_evaluation` gives those with "choices". field: "prompt" or
    "with_opinion". per_token: the mean over the tokens of a choice in place of their sum. eos:
    scored as well. size: rows of a forward pass. bar: shows progress under this name.
    """
    rows, masks, sizes = choice_rows(tokenizer, records, field, eos)
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
    same is right as often as chance. Without ties `right` is of type bool, as rates are."""
    right, confidence = [], []
    for x, p, record in zip(logprobs, beliefs(logprobs), records):
        best = np.flatnonzero(x == x.max())
        right.append(np.isin(best, record["answer"]).mean())
        confidence.append(p.max())
    right = np.array(right)
    return right.astype(bool) if set(right) <= {0, 1} else right, np.array(confidence)


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
