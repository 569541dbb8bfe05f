"""Databricks Dolly 15k to demonstrations: questions and answers that employees wrote, no model.

    {"prompt": "Who was the ship named after?\\n\\nThe Ada sailed from 1911 to 1950 ...",
     "completion": "It was named after Ada Lovelace."}

A row is {"instruction", "context", "response", "category"}; a context, a passage that is asked
about, is appended to the instruction after a blank line.

    python -m data.dolly                                       # download, 13 MB
    python -m data.dolly --source=DIR                          # the file from there
    python sft.py --data=out/data/dolly.jsonl --init=...

Upstream counts 15,011 rows. Contexts come from Wikipedia and keep its footnote marks, such as [1].
Licence of the data: CC BY-SA 3.0 (huggingface.co/datasets/databricks/databricks-dolly-15k).
"""

from dataclasses import dataclass

import cli
from data.download import check_out, convert_all, locate, text_field, write
from data.files import json_rows

COMMIT = "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
NAME = "databricks-dolly-15k.jsonl"
FILES = {NAME: (
    f"https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/{COMMIT}/{NAME}",
    "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec")}


@dataclass
class Config:
    source: str = ""  # folder with databricks-dolly-15k.jsonl; "" downloads it
    out: str = "out/data/dolly.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(demonstration, None), or (None, reason to drop it). UserError for a field that is wrong."""
    instruction, context, response = (text_field(row, key, where)
                                      for key in ("instruction", "context", "response"))
    if not instruction:
        return None, "without an instruction"
    if not response:
        return None, "with an empty response"
    return dict(prompt=f"{instruction}\n\n{context}" if context else instruction,
                completion=response), None


def records(path):
    """(demonstrations, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(json_rows(path), convert)


def main(config):
    check_out(config)
    path = locate("dolly", config.source, FILES, (NAME,))[0]
    write("dolly", config, *records(path))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
