"""Stanford Alpaca to demonstrations: answers that text-davinci-003 wrote to made-up instructions.

    {"prompt": "Put the words in order of size.\\n\\nmouse, whale, dog",
     "completion": "mouse, dog, whale"}

A row is {"instruction", "input", "output"}; an input is appended to the instruction after a blank
line, with no words around it: the chat template does the job of Alpaca's "Below is an instruction".

    python -m data.alpaca                                      # download the 5,000-row part
    python -m data.alpaca --source=DIR                         # alpaca_data.json (52k) from there
    python sft.py --data=out/data/alpaca.jsonl --init=...

The 5,000-row part gives 4,993 records, each with a prompt of its own.
Licence of the data: CC BY-NC 4.0, non-commercial (github.com/tatsu-lab/stanford_alpaca).
"""

import re
from dataclasses import dataclass

import cli
from data.download import check_out, convert_all, locate, text_field, write
from data.files import json_rows

COMMIT = "5e69c50054c48cd3b919c46d13bb2d92a62f4498"
FILES = {"alpaca_5000.json": (
    f"https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/{COMMIT}/data/alpaca_5000.json",
    "fc1add24c93c9fbbe585a64a6c9bf6165eb110225f4470efbff382a913558ec0")}
# both have the same format; the full set holds the part, so it is preferred where both exist
PATTERNS = ("alpaca_data.json", "alpaca_5000.json")

# The generating prompt asked for "<noinput>" where there is nothing to say, and the release only
# removed that spelling: "No input", "<no input>", "No input required." and "<nooutput>" are left.
PLACEHOLDER = re.compile(r"\W*no ?(in|out)put( needed| required)?\W*", re.IGNORECASE)


@dataclass
class Config:
    source: str = ""  # folder with alpaca_data.json or alpaca_5000.json; "" downloads the latter
    out: str = "out/data/alpaca.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(demonstration, None), or (None, reason to drop it). UserError for a field that is wrong."""
    instruction, text, output = (text_field(row, key, where)
                                 for key in ("instruction", "input", "output"))
    if not instruction:
        return None, "without an instruction"
    if not output:
        return None, "with an empty output"
    if PLACEHOLDER.fullmatch(output):
        return None, 'with "no output" for the output'
    # "No input" is not something that a user would write under a question
    has_input = text and not PLACEHOLDER.fullmatch(text)
    return dict(prompt=f"{instruction}\n\n{text}" if has_input else instruction,
                completion=output), None


def records(path):
    """(demonstrations, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(json_rows(path), convert)


def main(config):
    check_out(config)
    path = locate("alpaca", config.source, FILES, PATTERNS)[0]
    write("alpaca", config, *records(path))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
