"""What labels are like, as figures and as text, from the records of rankings.jsonl alone."""

import numpy as np

from data.instruments import clustered_rate
from data.records import question, ranking_pairs


def mean(values):
    return float(np.mean(values)) if len(values) else float("nan")


def share(name, values, clusters):
    """{name: mean of the values, 1, 0 or 0.5 for a tie; name_low, name_high: its 95% interval},
    clustered: the pairs of a question depend on each other."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    return dict(zip((name, f"{name}_low", f"{name}_high"), clustered_rate(values, clusters)))


def agreement(first, second):
    """Share of pairs, over all prompts, that two labelers put in the same order."""
    same = total = 0
    for a, b in zip(first, second):
        for i, j in ranking_pairs(a):
            same += b[i] < b[j]
            total += b[i] != b[j]
    return same / max(1, total)


def against_file(records):
    """How often the labeler and the file that it ranked again ("before") agree on the pairs that
    both order; beside it how often the longer answer, in characters, wins them in the file."""
    same, longer, asked = [], [], []
    file_ties = here = 0
    for r in records:
        was, now, chars = r["before"], r["ranks"], [len(text) for text in r["completions"]]
        found = ranking_pairs(was)
        file_ties += len(was) * (len(was) - 1) // 2 - len(found)
        here += sum(now[i] == now[j] for i, j in found)
        for i, j in found:
            if now[i] != now[j]:
                same.append(float(now[i] < now[j]))
                longer.append(np.sign(chars[i] - chars[j]) / 2 + 0.5)
                asked.append(question(r["prompt"], "world" in r))
    return dict(file_pairs=len(same), file_ties=file_ties, tied_here=here,
                **share("file_agreement", same, asked), **share("file_longer", longer, asked))


def wins(records):
    """How often an answer of each writer but the first beats one of the first to the same prompt;
    ties half."""
    found, metrics = {}, {}
    for r in records:
        for i, a in enumerate(r.get("sources", ())):
            for j, b in enumerate(r["sources"]):
                if a > 0 == b:
                    found.setdefault(a, []).append((
                        np.sign(r["ranks"][j] - r["ranks"][i]) / 2 + 0.5,
                        question(r["prompt"], "world" in r)))
    for writer in sorted(found):
        values, asked = zip(*found[writer])
        metrics |= share(f"wins_{writer}", values, asked)
    return metrics


def describe(records):
    """The figures of the last row of label.py's log; docs/log.md defines them."""
    pairs = [(r, i, j) for r in records for i, j in ranking_pairs(r["ranks"])]
    possible = sum(len(r["ranks"]) * (len(r["ranks"]) - 1) // 2 for r in records)
    metrics = dict(pairs=len(pairs), ties=possible - len(pairs), longer_preferred=mean([
        len(r["completions"][i]) > len(r["completions"][j]) for r, i, j in pairs]))
    if all("second" in r for r in records):
        metrics["agreement"] = agreement(*([r[k] for r in records] for k in ("ranks", "second")))
    golds = [g for r in records for g in r.get("gold", ())]
    if golds:
        metrics |= dict(gold=mean(golds), gold_std=float(np.std(golds)), gold_accuracy=mean([
            # how far gold itself gets on these labels: the ceiling for an unbiased reward model
            r["gold"][i] > r["gold"][j] for r, i, j in pairs
            if "gold" in r and r["gold"][i] != r["gold"][j]]))
    if all("first" in r for r in records):
        metrics |= {k: mean([r[k] for r in records]) for k in ("first", "differ")}
    metrics |= wins(records)
    again = [r for r in records if "before" in r]
    return metrics | (against_file(again) if again else {})


def words(m, init):
    """The figures as text. init: the writers, with commas between."""
    percent = lambda x: "none" if x != x else f"{x:.1%}"
    rate = lambda name: (f"{percent(m[name])} (95%: {percent(m[f'{name}_low'])} to "
                         f"{percent(m[f'{name}_high'])})")
    first, *others = (path.strip() for path in init.split(","))
    lines = [f"{m['prompts']:,} prompts ranked, {m['pairs']:,} pairs, {m['ties']:,} ties; "
             f"{m['skipped']} prompts skipped: fewer than two complete answers."]
    if m.get("left_out"):
        lines.append(f"{m['left_out']} more left out: too long for the context of the judge, or "
                     "skipped by the person.")
    if "agreement" in m:
        lines.append(f"Two labelers agree on {percent(m['agreement'])} of the pairs.")
    if "gold_accuracy" in m:
        lines.append(f"Gold agrees with the labels on {percent(m['gold_accuracy'])} of the pairs "
                     "where it differs.")
    lines.append(f"The longer answer wins {percent(m['longer_preferred'])}.")
    if "first" in m:
        lines.append(f"The judge gives {percent(m['first'])} to the answer that it reads first, "
                     f"and changes its choice with the order in {percent(m['differ'])}.")
    lines += [f"{path}: its answers beat those of {first} in {rate(f'wins_{n}')}, ties half."
              for n, path in enumerate(others, 1) if f"wins_{n}" in m]
    if "file_pairs" in m:
        lines.append(
            f"Of {m['file_pairs']:,} pairs that both order it agrees with the file on "
            f"{rate('file_agreement')}; chance 50%, \"the longer one\" {rate('file_longer')}. "
            f"Ties: {m['file_ties']:,} in the file, {m['tied_here']:,} more here.")
    return "\n".join(lines)
