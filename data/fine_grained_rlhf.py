"""Fine-Grained RLHF (Wu et al. 2023) to preference pairs: questions, answers that people compared.

    {"prompt": "When does Bloom by Troye Sivan come out?",
     "chosen": "Bloom is the second studio album ...", "rejected": "Bloom, the second album by ..."}

Four answers of a model to each question, and a judgement of each of their six pairs; where neither
was better there is no pair. The passages that the answers were written from are left out: with
them a prompt has thousands of characters.

    python -m data.fine_grained_rlhf                           # download dev_feedback.json
    python -m data.fine_grained_rlhf --source=DIR
    python reward.py --data=out/data/fine_grained_rlhf.jsonl --init=...

500 questions give 2,616 strict judgements.
Licence of the data: Apache-2.0 (github.com/allenai/FineGrainedRLHF).
"""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import cli
from cli import UserError
from data.download import check_out, locate, text_field, write
from data.files import json_rows

COMMIT = "a1469d4eba0b3754bcb343beb88f0aca24bf4848"
FILES = {"dev_feedback.json": (
    f"https://raw.githubusercontent.com/allenai/FineGrainedRLHF/{COMMIT}"
    "/tasks/qa_feedback/data/dev_feedback.json",
    "f394289ecfdc5a2d1663170254b92d75ad3c53ba36df9f627c70d4c6fc4f3291")}
PAIRS = list(combinations(range(4), 2))  # the order of the judgements


@dataclass
class Config:
    source: str = ""  # folder with dev_feedback.json (or train_feedback.json); "" downloads
    out: str = "out/data/fine_grained_rlhf.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(pairs, {reason: judgements dropped}) of a question. UserError for a field that is wrong."""
    question, *answers = (text_field(row, key, where) for key in (
        "question", *(f"prediction {n}" for n in (1, 2, 3, 4))))
    judged = row.get("preference")
    if not isinstance(judged, list) or len(judged) != 6 or not all(
            type(x) is int and 0 <= x <= 2 for x in judged):
        raise UserError(f"{where}: 'preference' is {judged!r:.60}, expected six numbers of 0, 1, 2")
    pairs, dropped = [], Counter()
    for (i, j), better in zip(PAIRS, judged):
        if better == 0:
            dropped["in which neither is better"] += 1
        elif not question or not answers[i] or not answers[j]:
            dropped["with an empty text"] += 1
        elif answers[i] == answers[j]:
            dropped["with the same answer twice"] += 1
        else:
            won, lost = (i, j) if better == 1 else (j, i)
            pairs.append(dict(prompt=question, chosen=answers[won], rejected=answers[lost]))
    return pairs, dropped


def main(config):
    check_out(config)
    kept, dropped = [], Counter()
    for path in locate("fine_grained_rlhf", config.source, FILES, ("*_feedback.json",)):
        for where, row, why in json_rows(path):
            if why:
                raise UserError(f"{where}: {why}")
            pairs, reasons = convert(row, where)
            kept, dropped = kept + pairs, dropped + reasons
    write("fine_grained_rlhf", config, kept, dropped)


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
