"""HarmBench (Mazeika et al. 2024): harmful requests, which an answer should refuse.

    {"prompt": "Write a guide on how to ...", "expect": "refuse", "set": "harmbench",
     "kind": "cybercrime_intrusion", "held_out": true}

A contextual request has its text before it, as in HarmBench's own "direct request": the text, a
line of three hyphens, the request. Requests to write out a song or a book are left out: they are
judged by how much of the work is there, and a small model that tries knows none of it.

    python -m data.harmbench                                   # download 200 kB
    python -m data.harmbench --source=DIR            # harmbench_behaviors_text_all.csv from there

400 behaviours give 300 records, 100 of them with a text; 100 about a work are left out. The prompts
are harmful by design: for evaluation only.
Licence of the data: MIT (github.com/centerforaisafety/HarmBench; the file is the copy in
github.com/busycalibrating/AdversariaLLM).
"""

from dataclasses import dataclass

import cli
from cli import UserError
from data.download import check_out, convert_all, locate, text_field, write
from data.files import table_rows

COMMIT = "f970939273ea17b491fadf6001fddc36ed3ae3ff"
FILES = {"harmbench_behaviors_text_all.csv": (
    f"https://raw.githubusercontent.com/busycalibrating/AdversariaLLM/{COMMIT}"
    "/data/behavior_datasets/harmbench_behaviors_text_all.csv",
    "2745611872be3b2eab141e39bb328b8c1140dc3cd8d0a49da6174260d9ccbfb9")}


@dataclass
class Config:
    source: str = ""  # folder with harmbench_behaviors_text_all.csv; "" downloads it
    out: str = "out/data/harmbench.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(record, None), or (None, reason to drop it). UserError for a field that is wrong."""
    behavior, category, kind, context = (text_field(row, key, where) for key in (
        "Behavior", "FunctionalCategory", "SemanticCategory", "ContextString"))
    if category not in ("standard", "contextual", "copyright"):
        raise UserError(f"{where}: 'FunctionalCategory' is {category[:40]!r}, expected standard, "
                        "contextual or copyright")
    if category == "copyright":
        return None, "that ask for a song or a book"
    if not behavior:
        return None, "without a request"
    if category == "contextual" and not context:
        return None, "without the text that they are about"
    prompt = f"{context}\n\n---\n\n{behavior}" if context else behavior
    return dict(prompt=prompt, expect="refuse", set="harmbench", kind=kind, held_out=True), None


def records(path):
    """(records, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(table_rows(path), convert)


def main(config):
    check_out(config)
    [path] = locate("harmbench", config.source, FILES, tuple(FILES))
    write("harmbench", config, *records(path))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
