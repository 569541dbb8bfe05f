"""UltraFeedback, binarized, to preference pairs: GPT-4 scored the answers of many models.

    {"prompt": "Why is the sea salty?", "chosen": "Rivers carry salt into it ...",
     "rejected": "Because of the fish.", "held_out": false}

A row is {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", ...}: two dialogues, one
question and one answer each, and their scores, 1 to 10. Equal scores prefer nothing: no pair.

    python -m data.ultrafeedback --source=DIR                  # a copy of upstream's data/
    python -m data.ultrafeedback --source=DIR --min_margin=2   # clear preferences only
    python dpo.py --data=out/data/ultrafeedback.jsonl --init=...

Only a local copy is read, since no published checksum is known for the training file. test_prefs is
the held-out side; training rows with one of its prompts are dropped. Needs pyarrow.
Licence of the data: MIT (huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized).
"""

from collections import Counter
from dataclasses import dataclass

import cli
from cli import NotNegative, UserError
from data.files import parquet_rows
from data.download import check_out, convert_all, locate, text_field, without_tested, write

SET = "HuggingFaceH4/ultrafeedback_binarized"
PATTERNS = ("train_prefs-*.parquet", "test_prefs-*.parquet")


@dataclass
class Config:
    source: str = ""  # folder with train_prefs-*.parquet, test_prefs-*.parquet or both
    min_margin: NotNegative[float] = 0.0  # least gap of the two scores
    out: str = "out/data/ultrafeedback.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row", min_margin=0.0):
    """(pair, None), or (None, reason to drop it). UserError for a field that is wrong."""
    text_field(row, "prompt", where)
    texts, scores = [], []
    for key in ("chosen", "rejected"):
        turns, score = row.get(key), row.get(f"score_{key}")
        if not isinstance(turns, list) or len(turns) != 2:
            raise UserError(f"{where}: {key!r} is not a question and an answer")
        if type(score) not in (int, float):
            raise UserError(f"{where}: 'score_{key}' is {score!r}, expected a number")
        texts.append([text_field(turn, "content", where) for turn in turns])
        scores.append(score)
    (prompt, chosen), (other, rejected) = texts
    if prompt != other:
        return None, "whose questions differ"
    if not prompt or not chosen or not rejected:
        return None, "with an empty turn"
    if not scores[0] > scores[1]:
        return None, "without a better score"
    if scores[0] - scores[1] < min_margin:
        return None, f"with a gap below {min_margin:g}"
    if chosen == rejected:
        return None, "with the same answer twice"
    return dict(prompt=prompt, chosen=chosen, rejected=rejected), None


def main(config):
    check_out(config)
    if not config.source:
        raise UserError(f"--source=DIR is missing: `hf download {SET} --repo-type=dataset "
                        "--include='data/*_prefs-*' --local-dir=.` gets a folder data/ to read")
    kept, dropped = [], Counter()
    for path in locate("ultrafeedback", config.source, {}, PATTERNS):
        pairs, reasons = convert_all(
            parquet_rows(path), lambda row, where: convert(row, where, config.min_margin))
        kept += [dict(pair, held_out=path.name.startswith("test")) for pair in pairs]
        dropped += reasons
    pairs = without_tested(kept, dropped, "prompt")
    write("ultrafeedback", config, pairs, +dropped)


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
