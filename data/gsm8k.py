"""GSM8K (Cobbe et al. 2021): grade-school word problems with answers that a program can check.

    {"prompt": "Natalia sold clips to 48 of her friends ...", "answer": "72", "held_out": false,
     "completion": "Natalia sold 48/2 = 24 clips in May.\\n...\\n#### 72"}

One file serves both stages: grpo.py checks against "answer", sft.py learns from "completion", the
worked solution without its calculator marks. The published test set is the held-out side.

    python -m data.gsm8k                                       # download both parts
    python -m data.gsm8k --source=DIR                          # train.jsonl, test.jsonl from there
    python sft.py --data=out/data/gsm8k.jsonl --init=... --max_new_tokens=256
    python grpo.py --data=out/data/gsm8k.jsonl --init=... --max_new_tokens=256   # 48 would cut them

7,473 training and 1,319 test problems; every answer is a whole number.
Licence of the data: MIT (github.com/openai/grade-school-math).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cli
from data.download import check_out, convert_all, locate, text_field, write
from data.files import json_rows
from data.verifier import final_answer, strip_calculator

COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
URL = ("https://raw.githubusercontent.com/openai/grade-school-math/"
       f"{COMMIT}/grade_school_math/data/")
FILES = {name: (URL + name, sha256) for name, sha256 in (
    ("train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    ("test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"))}


@dataclass
class Config:
    source: str = ""  # folder with train.jsonl and test.jsonl; "" downloads them
    out: str = "out/data/gsm8k.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(record, None), or (None, reason to drop it). UserError for a field that is wrong."""
    question, solution = (text_field(row, key, where) for key in ("question", "answer"))
    if not question:
        return None, "without a question"
    _, mark, result = solution.rpartition("####")
    answer = final_answer(result)
    if not mark or answer is None:
        return None, 'without a number behind "####"'
    return dict(prompt=question, completion=strip_calculator(solution), answer=str(answer)), None


def records(path):
    """(records, {reason: rows dropped}) of one file; those of test.jsonl are held out."""
    kept, dropped = convert_all(json_rows(path), convert)
    return [dict(record, held_out=Path(path).name == "test.jsonl") for record in kept], dropped


def main(config):
    check_out(config)
    kept, dropped = [], Counter()
    for path in locate("gsm8k", config.source, FILES, tuple(FILES)):
        part, reasons = records(path)
        kept, dropped = kept + part, dropped + reasons
    write("gsm8k", config, kept, dropped)


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
