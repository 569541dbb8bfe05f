"""Multiple choice by log-probability, and calibration, against numbers worked by hand."""

import numpy as np
import pytest
import torch
from data.choices import (
    beliefs,
    calibration,
    chance,
    choice_logprobs,
    choice_rows,
    chosen,
    longest_choice,
)
from data.records import check_evaluation
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

tok = load_tokenizer("synthetic")
RECORDS = [check_evaluation(r) for r in (
    dict(prompt="What is the opposite of hot?", choices=["cold", "very cold and wet", "hot"],
         answer=0, with_opinion="What is the opposite of hot? I think it is hot.", opinion=2),
    dict(prompt=[dict(role="system", content="Be brief."), dict(role="user", content="Say yes.")],
         choices=["Yes.", "No."], answer=[0],
         with_opinion="Say yes. I think no.", opinion=1))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=tok.vocab_size, n_tokens=tok.n_tokens, block_size=48, n_layer=1,
                       n_head=2, n_embd=16)
    model = GPT(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def by_hand(model, prompt, choice, eos):
    """log p of every token of the choice, and of EOS, from the softmax over all tokens."""
    head, answer = tok.encode_prompt(prompt), [*tok.encode(choice), tok.eos][:None if eos else -1]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([head + answer])))[0]
    logp = logits.double().log_softmax(-1)
    return [logp[len(head) + n - 1, token].item() for n, token in enumerate(answer)]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("field", ["prompt", "with_opinion"])
def test_choice_logprobs_by_hand(model, field, eos):
    # catches an EOS that is scored unasked, a score of the prompt's tokens, a system prompt that is
    # lost, choices in another order (they run sorted by length), a mean in place of the sum
    found = choice_logprobs(model, tok, RECORDS, field, eos=eos, size=2)
    mean = choice_logprobs(model, tok, RECORDS, field, per_token=True, eos=eos)
    assert [x.shape for x in found] == [(3,), (2,)]
    for record, x, m in zip(RECORDS, found, mean):
        hand = [by_hand(model, record[field], choice, eos) for choice in record["choices"]]
        np.testing.assert_allclose(x, [sum(h) for h in hand], atol=1e-4)
        np.testing.assert_allclose(m, [np.mean(h) for h in hand], atol=1e-4)


def test_rows_of_choices():
    # catches a choice that is tokenised together with the prompt, rows that are counted too short
    for eos in (False, True):
        rows, masks, sizes = choice_rows(tok, RECORDS, eos=eos)
        choices = [[*tok.encode(c), *[tok.eos] * eos] for r in RECORDS for c in r["choices"]]
        heads = [tok.encode_prompt(r["prompt"]) for r in RECORDS for _ in r["choices"]]
        assert rows == [head + choice for head, choice in zip(heads, choices)] and sizes == [3, 2]
        assert masks == [[0] * len(head) + [1] * len(choice)
                         for head, choice in zip(heads, choices)]
        assert longest_choice(tok, RECORDS, eos=eos).tolist() == [
            max(map(len, rows[:3])), max(map(len, rows[3:]))]
    [one] = choice_logprobs(GPT(GPTConfig(vocab_size=tok.vocab_size, n_tokens=tok.n_tokens,
                                          block_size=48, n_layer=1, n_head=1, n_embd=8)).eval(),
                            tok, RECORDS[:1])
    assert one.shape == (3,)


def test_chosen_by_hand():
    # catches the least probable chosen, a softmax that is 0 for long choices, a tie that is right
    # because the right one stands first, a second right choice that is not counted
    logprobs = [np.log([0.2, 0.1, 0.1]), np.array([-2000.0, -2001.0]), np.array([-5.0, -5.0]),
                np.array([-1.0, -3.0, -1.0])]
    records = [dict(choices="abc", answer=[0]), dict(choices="ab", answer=[1]),
               dict(choices="ab", answer=[0]), dict(choices="abc", answer=[0, 2])]
    p = beliefs(logprobs)
    np.testing.assert_allclose(p[0], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(p[1], [1 / (1 + np.exp(-1)), 1 / (1 + np.e)])
    right, confidence = chosen(logprobs, records)
    assert right.tolist() == [1, 0, 0.5, 1]
    np.testing.assert_allclose(confidence, [0.5, 1 / (1 + np.exp(-1)), 0.5, p[3][0]])
    assert chance(records) == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 2 / 3) / 4)


def test_calibration_by_hand():
    # catches bins of equal width, an unweighted mean over bins, gaps that cancel
    confidence = np.array([0.5, 0.5, 0.6, 0.6, 0.9, 0.9, 1.0, 1.0])
    right = np.array([1, 0, 0, 0, 1, 1, 1, 0])
    order = np.random.default_rng(0).permutation(8)
    error, table = calibration(confidence[order], right[order], bins=2)
    low, high = table
    assert (low["n"], high["n"]) == (4, 4)
    assert (low["confidence"], low["accuracy"]) == pytest.approx((0.55, 0.25))
    assert (high["confidence"], high["accuracy"]) == pytest.approx((0.95, 0.75))
    assert error == pytest.approx((0.30 + 0.20) / 2)
    error, table = calibration(confidence, right, bins=4)
    assert [t["n"] for t in table] == [2, 2, 2, 2]
    assert error == pytest.approx((0 + 0.6 + 0.1 + 0.5) / 4)
    # bins of unlike size: 3 of 4 are equally sure
    for sure in ([0.9, 0.9, 0.9, 0.2], [0.9, 0.2, 0.2, 0.2]):
        error, table = calibration(sure, [1, 0, 1, 1], bins=2)
        assert [t["n"] for t in table] == [sure.count(0.2), sure.count(0.9)]
        gaps = [abs(t["confidence"] - t["accuracy"]) for t in table]
        assert error == pytest.approx(np.dot(gaps, [t["n"] for t in table]) / 4) and \
            gaps[0] != pytest.approx(gaps[1])


def test_equal_confidence_is_one_bin():
    # catches a table that depends on the order of the records: half of those of 0.7 are right first
    right = np.arange(40) < 28
    for shuffled in (right, right[::-1]):
        error, table = calibration(np.full(40, 0.7), shuffled, bins=10)
        assert len(table) == 1 and table[0]["n"] == 40 and error == pytest.approx(0)


def test_calibration_of_a_perfect_model():
    # catches a gap where there is none, and a bin that says it is better than it is
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 20000)
    error, table = calibration(confidence, rng.random(20000) < confidence)
    assert len(table) == 10 and error < 0.02 and sum(t["n"] for t in table) == 20000
    error, _ = calibration(np.minimum(confidence + 0.2, 1), rng.random(20000) < confidence)
    assert 0.1 < error < 0.2
