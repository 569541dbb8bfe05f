"""The report card's numbers, by hand, and what it says of them."""

import json
import math

import numpy as np
import pytest
from conftest import rows_from
from data.instruments import rank_correlation, rate_interval
from data.load import Element
from data.records import digest, prompt_digest, question
from data.report_card import report_card, show, verdicts
from data.synthetic.world import all_prompts

PROMPTS = [next(p for p in all_prompts().values() if p.family == family)
           for family in ("harmful", "advice", "advice")]
OTHER = [p for p in all_prompts().values() if p.family == "advice"][7]
PROMPTS[2] = OTHER


def elements_of(chars, gold, pairs):
    """One Element for each list of lengths, of the prompts above; ids do not matter."""
    facts, elements = [], []
    for p, c, g in zip(PROMPTS, chars, gold):
        facts += [dict(key=prompt_digest(dict(prompt=p.text)), asked=digest(question(p.text)),
                       chars=x, gold=y) for x, y in zip(c, g)]
    source, start = rows_from([([1, 2], [0, 1])] * len(facts), facts), 0
    for c, found in zip(chars, pairs):
        elements.append(Element(source, tuple(range(start, start + len(c))), found, (), ()))
        start += len(c)
    return elements


CHARS = [[10, 11, 30], [20, 10], [10, 10]]
GOLD = [[1.0, 0.75, -2.0], [1.5, 0.0], [1.0, 1.0]]
PAIRS = [((0, 1), (0, 2), (1, 2)), ((1, 0),), ((0, 1),)]
SCORES = np.array([2.0, 1.0, 1.5, 0.5, 0.0, 3.0, 1.0])
# margins: 1, 0.5, -0.5 | -0.5 | 2;  right: 1 1 0 | 0 | 1;  gold's gaps: 0.25, 3, 2.75 | -1.5 | 0


def test_numbers_by_hand():
    # catches pairs in the wrong table, a table by another quantity, answers mixed up
    card = report_card(SCORES, elements_of(CHARS, GOLD, PAIRS), noise=1.0)
    margins = np.array([1, 0.5, -0.5, -0.5, 2])
    assert card["accuracy"] == pytest.approx(3 / 5) and card["pairs"] == 5
    assert card["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert card["margin"] == pytest.approx(0.5)
    # questions: 3 pairs, 1, 1: sums of deviations 2 - 3 * 0.6, 0 - 0.6, 1 - 0.6
    se = math.sqrt(0.2**2 + 0.6**2 + 0.4**2) / 5
    assert card["accuracy_se"] == pytest.approx(se)
    assert (card["accuracy_low"], card["accuracy_high"]) == pytest.approx(
        rate_interval([1, 1, 0, 0, 1], se, 3))
    # characters of the pairs: 10 11, 10 30, 11 30, 10 20, 10 10
    assert card["longer_wins"] == pytest.approx(0.1) and card["shorter_wins"] == pytest.approx(0.9)
    equal, shorter = card["by_length"]
    assert (equal["preferred"], equal["pairs"], equal["accuracy"]) == ("about equal", 2, 1.0)
    assert (shorter["preferred"], shorter["pairs"]) == ("shorter", 3)
    assert shorter["accuracy"] == pytest.approx(1 / 3)
    # all right, of two questions: as two trials; one question: as one trial
    assert (equal["low"], equal["high"]) == pytest.approx(rate_interval([1, 1], 0.0, 2))
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    assert card["overconfidence"] == pytest.approx(sure.mean() - 0.6)
    # bins of sigmoid: 0.62 three times (right 1, 0, 0), 0.73, 0.88
    assert [(t["pairs"], t["accuracy"]) for t in card["calibration"]] == [
        (3, pytest.approx(1 / 3)), (1, 1.0), (1, 1.0)]
    assert card["calibration_error"] == pytest.approx(
        (3 * (sure[1] - 1 / 3) + (1 - sure[0]) + (1 - sure[4])) / 5)
    assert card["gold_accuracy"] == pytest.approx((1 + 1 + 1 + 0 + 0.5) / 5)
    assert card["gold_agreement"] == pytest.approx(3 / 4)
    assert card["accuracy_on_wide_gold"] == pytest.approx(2 / 3)
    # ranks less their mean: scores 1 -1 0 | 0.5 -0.5 | 0.5 -0.5; characters -1 0 1 | 0.5 -0.5 | 0 0
    assert card["length_correlation"] == pytest.approx((-1 + 0.5) / math.sqrt(3 * 2.5))
    # gold 1 0 -1 | 0.5 -0.5 | 0 0
    assert card["gold_correlation"] == pytest.approx((1 + 0.5) / math.sqrt(3 * 2.5))
    assert [(t["from"], t["pairs"], t["accuracy"]) for t in card["by_gold_gap"]] == [
        (0, 2, 1.0), (1, 1, 0.0), (2, 2, 0.5)]
    harmful, advice = card["by_family"]
    assert (harmful["family"], harmful["pairs"]) == ("harmful", 3)
    assert harmful["accuracy"] == pytest.approx(2 / 3)
    assert harmful["gold_correlation"] == pytest.approx(1 / 2)
    assert (advice["family"], advice["pairs"], advice["accuracy"]) == ("advice", 2, 0.5)
    assert advice["gold_correlation"] == pytest.approx(0.5 / math.sqrt(0.5))
    json.dumps(card, allow_nan=False)


def test_gold_that_never_differs():
    # catches nan inside a table, which is no JSON
    card = report_card(SCORES, elements_of(CHARS, [[1, 1, 1], [0, 1.5], [1, 1]], PAIRS), noise=1.0)
    assert card["by_family"][0]["gold_correlation"] is None
    json.dumps(card, allow_nan=False)
    assert "family harmful" in show(card)


def test_a_prompt_that_the_world_does_not_have_is_of_no_family():
    # catches a crash, and pairs that are counted with another family
    elements = elements_of(CHARS, GOLD, PAIRS)
    elements[0].source.facts["key"][:3] = 5
    card = report_card(SCORES, elements, noise=1.0)
    assert [t["family"] for t in card["by_family"]] == ["advice"] and card["pairs"] == 5


def test_other_data_have_no_gold():
    # catches families of prompts that have none
    nan = [[math.nan] * len(c) for c in CHARS]
    card = report_card(SCORES, elements_of(CHARS, nan, PAIRS))
    assert not [name for name in card if "gold" in name or "family" in name]
    assert card["accuracy"] == pytest.approx(0.6)


def test_members_by_hand():
    # catches a spread over answers in place of members, accuracies of the wrong axis
    each = np.stack([SCORES, SCORES[::-1], SCORES + 3], 1)
    card = report_card(SCORES, elements_of(CHARS, GOLD, PAIRS), 1.0, each)
    # reversed scores: 1 3 0 | 0.5 1.5 | 1 2, right: 0 1 1 | 1 | 0
    assert card["members"] == pytest.approx([3 / 5, 3 / 5, 3 / 5])
    assert card["spread"] == pytest.approx(np.mean([np.std([a, b, a + 3]) for a, b in zip(
        SCORES, SCORES[::-1])]))
    other = report_card(SCORES, elements_of(CHARS, GOLD, PAIRS), 1.0, each[:, [0, 0, 0]] * [1, -1,
                                                                                           1])
    assert other["members"] == pytest.approx([3 / 5, 2 / 5, 3 / 5])
    assert "member 2" in show(card) and "member 0" in show(card)


@pytest.mark.parametrize("x, y, groups, expected", [
    ([1, 2, 3], [10, 100, 1000], [0, 0, 0], 1.0), ([1, 2, 3], [3, 2, 1], [5, 5, 5], -1.0),
    ([1, 2, 1, 2], [7, 9, 5, 6], [1, 1, 2, 2], 1.0),
    ([1, 2, 11, 12], [2, 1, 22, 21], [0, 0, 1, 1], -1.0),  # across groups it would be above 0
    ([1, 11, 2, 12], [2, 22, 1, 21], [0, 1, 0, 1], -1.0),  # groups need not stand together
    ([1, 1, 2], [1, 2, 3], [0, 0, 0], 1.5 / math.sqrt(1.5 * 2)), ([1, 1], [1, 2], [0, 0], None)])
def test_rank_correlation(x, y, groups, expected):
    found = rank_correlation(np.array(x), np.array(y), np.array(groups))
    assert math.isnan(found) if expected is None else found == pytest.approx(expected)


FINE = dict(accuracy=0.72, accuracy_low=0.7, accuracy_high=0.74, longer_wins=0.52,
            shorter_wins=0.48, length_correlation=0.5, overconfidence=0.01)


@pytest.mark.parametrize("change, words", [
    ({}, ["in the usual range, above 65%; good ones reach 70 to 80%"]),
    (dict(accuracy=0.59), ["below 60% it is hardly better than chance; train no policy on it"]),
    (dict(accuracy=0.62), ["usable, but below the usual range"]),
    (dict(accuracy=0.85), ["above the usual 70 to 80%"]),
    (dict(longer_wins=0.7), ["usual range", "length bias: score and length correlate by +0.50, and "
                             "length alone orders 70.0% right"]),
    (dict(longer_wins=0.3, shorter_wins=0.7, length_correlation=-0.4), ["usual", "by -0.40"]),
    (dict(longer_wins=0.7, length_correlation=0.2), ["usual range"]),
    (dict(overconfidence=0.06), ["usual range", "overconfident: by 6.0%"]),
    (dict(overconfidence=-0.3), ["usual range"])])
def test_verdicts(change, words):
    # catches a limit on the wrong side, a verdict that is always or never there
    said = verdicts(FINE | change)
    assert len(said) == len(words) and all(w in s for w, s in zip(words, said)), said
