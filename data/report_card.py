"""The report card of a reward model: what its scores of held-out answers say about it.

Pure functions of scores and of what is known of the answers; reward.py has the model. Errors and
intervals are clustered by question: the pairs of a question depend on each other.
"""

from functools import cache

import numpy as np

import cli
from data.instruments import clustered_rate, clustered_se, rank_correlation
from data.records import prompt_digest
from data.synthetic.world import FAMILIES, all_prompts

EQUAL = 0.1  # two answers are about equally long if they differ by at most this share of the longer
GAPS = (0.0, 0.5, 1.0, 2.0, np.inf)  # of the gold reward


@cache
def world():
    """{digest of the prompt: Prompt} of the embedded world: how Elements without a text are known.
    """
    return {prompt_digest(dict(prompt=text)): p for text, p in all_prompts().items()}


def rate(x, clusters, **known):
    """A line of a table: pairs, the mean of x (n,), and its 95% interval (low, high)."""
    mean, low, high = clustered_rate(x, clusters)
    return known | dict(pairs=len(x), accuracy=mean, low=low, high=high)


def rates(x, clusters, groups, names):
    """`rate` of each group that has pairs: groups (n,), indices of names, dicts."""
    return [rate(x[groups == n], clusters[groups == n], **name)
            for n, name in enumerate(names) if (groups == n).any()]


def calibration(margins, right):
    """Ten equal bins of the confidence in a pair's winner, sigmoid(|margin|): of each that is not
    empty its mean confidence, the share of its pairs that are right, and their number."""
    p = 1 / (1 + np.exp(-np.abs(margins)))  # >= 0.5
    bins = np.minimum((p - 0.5) * 20, 9).astype(int)
    return [dict(confidence=float(p[bins == b].mean()), accuracy=float(right[bins == b].mean()),
                 pairs=int((bins == b).sum())) for b in range(10) if (bins == b).any()]


def report_card(scores, elements, noise=None, each=None):
    """The metrics of a reward model on held-out rankings, Elements of data/load.py.

    scores (answers,), in log-odds: raw, before shift and scale; in the order of `load.all_rows`.
    noise: of the embedded world's labeler, in gold units, else None. each (answers, N): of an
    ensemble the scores of every member, in units of their spread over SFT samples.

    accuracy: share of labelled pairs ordered as the label says, ties half; beside it the baselines
    "longer wins" and "shorter wins" (characters), and the accuracy by which of the two is longer.
    calibration_error: mean gap between sigmoid(|margin|) and the share of pairs that are right,
    over ten equal bins; overconfidence: the same gap with its sign. length_correlation: Spearman's,
    within prompts (ranks, because one very long answer would decide Pearson's). With gold scores
    in the records: accuracy of gold itself on the labels. In the embedded world: accuracy by the
    gap in gold and by family, and the model against gold.
    """
    starts = np.cumsum([0] + [len(e.numbers) for e in elements])
    facts = {name: np.concatenate([e.facts(name) for e in elements]) for name in
             ("chars", "gold", "key", "asked")}
    winner, loser = np.array([(starts[n] + i, starts[n] + j) for n, e in enumerate(elements)
                              for i, j in e.pairs]).T
    asked = facts["key" if noise is None else "asked"][winner]
    half = lambda x: np.sign(x) / 2 + 0.5  # 1, 0.5 for a tie, 0
    margins = scores[winner] - scores[loser]
    right = half(margins)
    chars = facts["chars"].astype(float)
    difference = chars[winner] - chars[loser]
    longer = half(difference)
    near = np.abs(difference) <= EQUAL * np.maximum(chars[winner], chars[loser])
    table, total = calibration(margins, right), len(margins)
    whole = rate(right, asked)
    metrics = dict(
        loss=float(np.logaddexp(0, -margins).mean()), accuracy=whole["accuracy"],
        accuracy_se=clustered_se(right, asked), accuracy_low=whole["low"],
        accuracy_high=whole["high"], pairs=total, margin=float(margins.mean()),
        longer_wins=float(longer.mean()), longer_wins_se=clustered_se(longer, asked),
        shorter_wins=float(1 - longer.mean()),
        by_length=rates(right, asked, np.where(near, 1, np.where(difference > 0, 0, 2)), [
            dict(preferred=name) for name in ("longer", "about equal", "shorter")]),
        length_correlation=rank_correlation(scores, chars, facts["key"]),
        calibration_error=sum(abs(t["confidence"] - t["accuracy"]) * t["pairs"]
                              for t in table) / total,
        overconfidence=sum((t["confidence"] - t["accuracy"]) * t["pairs"] for t in table) / total,
        calibration=table)
    gap = facts["gold"][winner] - facts["gold"][loser]
    known = ~np.isnan(gap)
    if known.any():
        metrics["gold_accuracy"] = float(half(gap[known]).mean())
    if noise is not None and known.all():
        gold_right = half(margins) == half(gap)
        differ, wide = gap != 0, np.abs(gap) > noise
        if wide.any():
            metrics["accuracy_on_wide_gold"] = float(gold_right[wide].mean())
        if differ.any():
            metrics["gold_agreement"] = float(gold_right[differ].mean())
        metrics["gold_correlation"] = rank_correlation(scores, facts["gold"], facts["key"])
        metrics["by_gold_gap"] = rates(right, asked, np.digitize(np.abs(gap), GAPS) - 1, [
            {"from": low} for low in GAPS[:-1]])
        prompts = map(world().get, facts["key"].tolist())  # None: of another version of the world
        family = np.array([FAMILIES.index(p.family) if p else -1 for p in prompts])
        metrics["by_family"] = rates(right, asked, family[winner], [
            dict(family=name) for name in FAMILIES])
        for line in metrics["by_family"]:
            of = family == FAMILIES.index(line["family"])
            found = rank_correlation(scores[of], facts["gold"][of], facts["key"][of])
            line["gold_correlation"] = None if np.isnan(found) else found  # JSON knows no nan
    if each is not None:
        metrics["members"] = [float(half(x[winner] - x[loser]).mean()) for x in each.T]
        metrics["spread"] = float(each.std(1).mean())
    return metrics


def verdicts(metrics):
    """What the figures mean, in the words of the theory texts: a list of sentences."""
    m, words = metrics, []
    at = f"accuracy {m['accuracy']:.1%} ({m['accuracy_low']:.1%} to {m['accuracy_high']:.1%})"
    if m["accuracy"] < 0.6:
        words.append(f"{at}: below 60% it is hardly better than chance; train no policy on it")
    elif m["accuracy"] <= 0.65:
        words.append(f"{at}: usable, but below the usual range, which begins above 65%")
    elif m["accuracy"] <= 0.8:
        words.append(f"{at}: in the usual range, above 65%; good ones reach 70 to 80%")
    else:
        words.append(f"{at}: above the usual 70 to 80%; labels of people are seldom that clear: do "
                     "the sides share answers? (--preflight=true)")
    by_length = max(m["longer_wins"], m["shorter_wins"])
    if abs(m["length_correlation"]) > 0.3 and by_length > m["accuracy"] - 0.05:
        words.append(f"length bias: score and length correlate by {m['length_correlation']:+.2f}, "
                     f"and length alone orders {by_length:.1%} right; PPO will learn the length")
    if m["overconfidence"] > 0.05:
        words.append(f"overconfident: by {m['overconfidence']:.1%}; it says more than it knows, "
                     "most of all far from its data: take a larger beta")
    return words


def show(metrics):
    """The report card as text: one table, then the verdicts."""
    m, rows = metrics, []
    add = lambda name, pairs="", x="", low=None, high=None: rows.append((
        f"{pairs:,}" if pairs != "" else "", x if isinstance(x, str) else f"{x:.3f}",
        "" if low is None else f"{low:.3f} to {high:.3f}", name))
    line = lambda name, t: add(name, t["pairs"], t["accuracy"], t["low"], t["high"])
    add("held-out pairs ordered as the label says", m["pairs"], m["accuracy"], m["accuracy_low"],
        m["accuracy_high"])
    add("  by \"the longer one wins\"", "", m["longer_wins"])
    add("  by \"the shorter one wins\"", "", m["shorter_wins"])
    if "gold_accuracy" in m:
        add("  by the true reward", "", m["gold_accuracy"])
    for t in m["by_length"]:
        line(f"the preferred one is {t['preferred']}", t)
    for t in m.get("by_gold_gap", ()):
        line(f"true rewards differ by {t['from']:g} or more, up to the next line", t)
    for t in m.get("by_family", ()):
        gold = t["gold_correlation"]
        line(f"family {t['family']}" + (f" (score and true reward: {gold:+.2f})"
                                        if gold is not None else ""), t)
    for n, accuracy in enumerate(m.get("members", ())):
        add(f"member {n}", "", accuracy)
    if "spread" in m:
        add("standard deviation of the members' scores, mean over answers", "", m["spread"])
    add("score and length, rank correlation within prompts", "", f"{m['length_correlation']:+.3f}")
    if "gold_correlation" in m:
        add("score and true reward, the same", "", f"{m['gold_correlation']:+.3f}")
    add("confidence is off by", "", m["calibration_error"])
    columns = dict(zip(("pairs", "share", "95% interval", "report card"), zip(*rows)))
    return cli.table(columns) + "".join(f"\n{words[0].upper()}{words[1:]}."
                                        for words in verdicts(m))
