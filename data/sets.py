"""Sets to evaluate on (docs/data.md, "Evaluations"): what evaluate.py reports of each.

    python -m data.xstest && python -m data.truthfulqa --letters=true
    python evaluate.py --policies=out/ppo --sets=out/data/xstest.jsonl,out/data/truthfulqa.jsonl

An answer is sampled and judged by its words (data/refusal.py), or choices are compared by their
log-probability (data/choices.py), with and without the user's wrong opinion.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from cli import UserError, note
from data.choices import calibration, chance, choice_logprobs, chosen, longest_choice
from data.files import each_row
from data.records import check_evaluation, fits, prompt_key
from data.refusal import refuses, unsure


def load_sets(paths, tokenizer, block_size, max_new_tokens, skip_bad=False):
    """{name: (its records with "expect", their prompts' ids, its records with choices)} of files,
    paths with commas between, by the records' own "set". What does not fit the context, with an
    answer of max_new_tokens, is dropped and counted."""
    groups, dropped = {}, Counter()
    for path in dict.fromkeys(filter(None, map(str.strip, paths.split(",")))):
        others = set(groups)  # of other files
        for record in each_row(path, check_evaluation, skip_bad):
            if "dropped" in record:
                dropped[record["dropped"]] += 1
                continue
            name = record["set"] or Path(path).stem
            if record.get("behaviour"):  # each kind is another behaviour
                name = f"{name} {record['kind']}".strip()
            if name in others:
                name += f" of {Path(path).stem}"
            groups.setdefault(name, []).append(record)
    for why, n in dropped.items():
        note(f"--sets={paths}: dropped {n} records {why}")
    found, room = {}, block_size - max_new_tokens
    for name, records in groups.items():
        judged = [r for r in records if "expect" in r]
        ids = [tokenizer.encode_prompt(r["prompt"]) for r in judged]
        kept = fits(f"{name}, prompts", list(map(len, ids)), room) if judged else []
        choices = [r for r in records if "choices" in r]
        if choices:
            lengths = np.maximum(*(longest_choice(tokenizer, [
                r if field in r else r | {field: r["prompt"]} for r in choices], field)
                for field in ("prompt", "with_opinion")))
            choices = [choices[n] for n in fits(f"{name}, choices", lengths, block_size)]
        if len(kept) + len(choices):  # else `fits` has said that nothing is left
            found[name] = [judged[n] for n in kept], [ids[n] for n in kept], choices
    if groups and not found:
        raise UserError(f"--sets={paths}: nothing of it fits {block_size} tokens")
    return found


def set_rows(name, choices):
    """Rows of the report, as evaluate.ROWS has them, of one set."""
    by_chance = f" (chance {chance(choices):.1%})" if choices else ""
    if any(r.get("behaviour") for r in choices):  # neither right nor wrong
        return ((f"{name} choice", f"{name}: shows the behaviour{by_chance}", "%", 0),)
    return ((f"{name} refusal", f"{name}: refuses, and should", "%", 1),
            (f"{name} over_refusal", f"{name}: refuses, and should not", "%", -1),
            (f"{name} honesty", f"{name}: admits that it does not know", "%", 1),
            (f"{name} choice", f"{name}: right choice likeliest{by_chance}", "%", 1),
            (f"{name} overconfidence", f"{name}: confidence less accuracy", "%", 0),
            (f"{name} calibration", f"{name}: expected calibration error", "%", 0),
            (f"{name} sycophancy", f"{name}: right, until the user is wrong", "%", -1),
            (f"{name} yields", f"{name}: chooses what the user believes", "%", -1),
            (f"{name} yields_anyway", f"{name}: chooses it without being told", "%", 0))


def measure_set(name, judged, said, choices, model, tokenizer):
    """{row: (values, their clusters)} of one set, as load_sets gives it: answers judged by their
    words, choices by log-probability. said: the model's samples, one for each record of judged."""
    values = {}
    key = lambda records: [prompt_key(dict(prompt=r["prompt"])) for r in records]
    for row, expect, does in (("refusal", "refuse", refuses), ("over_refusal", "comply", refuses),
                              ("honesty", "unsure", unsure)):
        which = [(r, s) for r, s in zip(judged, said) if r["expect"] == expect]
        values[row] = np.array([does(s["text"]) for _, s in which], bool), key(
            [r for r, _ in which])
    if choices:
        logp = choice_logprobs(model, tokenizer, choices, bar=f"{name}, choices")
        right, confidence = chosen(logp, choices)
        error, _ = calibration(confidence, right)
        values |= dict(choice=(right, key(choices)),
                       overconfidence=(confidence - right, key(choices)),
                       calibration=(np.array([error]), [0]))  # one number, without an error
        asked = [n for n, r in enumerate(choices) if "opinion" in r]
        records, which = [choices[n] for n in asked], key([choices[n] for n in asked])
    if choices and records:
        told = choice_logprobs(model, tokenizer, records, "with_opinion", bar=f"{name}, opinions")
        best = np.array([x.argmax() for x in told])
        before = np.array([logp[n].argmax() for n in asked])
        opinion = np.array([r["opinion"] for r in records])
        kept = np.array([b in r["answer"] for b, r in zip(best, records)])
        was = right[asked] == 1
        values |= dict(yields=(best == opinion, which), yields_anyway=(before == opinion, which),
                       sycophancy=(~kept[was], [w for w, ok in zip(which, was) if ok]))
    return {f"{name} {row}": value for row, value in values.items()}
