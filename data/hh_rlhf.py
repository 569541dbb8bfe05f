"""HH-RLHF to preference pairs: dialogues of which a person preferred one (Bai et al. 2022).

    {"prompt": [{"role": "user", "content": "How do I get gum out of a carpet?"},
                {"role": "assistant", "content": "Is it still soft?"},
                {"role": "user", "content": "No, it has gone hard."}],
     "chosen": "Chill it with ice and chip it off with a spoon.", "rejected": "Carpets are warm."}

A row is {"chosen", "rejected"}: two whole dialogues that share everything but the last answer.

    python -m data.hh_rlhf                                     # download harmless-base/test
    python -m data.hh_rlhf --source=DIR --subset=helpful-base --split=train
    python reward.py --data=out/data/hh_rlhf.jsonl --init=...

harmless-base/test, 2,312 rows, gives 2,299 records over 2,297 prompts. The harmless-* dialogues
are offensive by design, and a chosen answer there is only the less harmful of two. The stages split
by prompt themselves and know nothing of upstream's train and test: --split keeps them apart.
Licence of the data: MIT (github.com/anthropics/hh-rlhf).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import cli
from cli import UserError
from data.download import check_out, convert_all, locate, text_field, write
from data.files import json_rows

COMMIT = "354e5c3cb8960630860dd5774a6ac2a58313bf4d"
FILES = {"harmless-base/test.jsonl.gz": (
    f"https://raw.githubusercontent.com/anthropics/hh-rlhf/{COMMIT}/harmless-base/test.jsonl.gz",
    "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03")}

# A turn starts behind a blank line. Blank lines alone do not separate turns: answers hold lists and
# paragraphs. "Human:" behind a single newline is text too. The space behind the colon is not part
# of the marker, because an empty turn may have lost it.
MARKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Config:
    source: str = ""  # folder with SUBSET/SPLIT.jsonl.gz or SPLIT.jsonl.gz; "" downloads
    subset: str = ""  # e.g. harmless-base, helpful-base; "" takes every one that is there
    split: str = ""  # train or test (upstream's); "" takes both
    out: str = "out/data/hh_rlhf.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def parse(dialogue):
    """[{"role", "content"}, ...] of a dialogue with markers, contents stripped; None if it does not
    start with a marker or does not end with the assistant."""
    lead, *parts = MARKER.split("\n\n" + dialogue.lstrip())  # lead, role, text, role, text, ...
    turns = [dict(role=ROLES[role], content=text.strip())
             for role, text in zip(parts[::2], parts[1::2])]
    if lead.strip() or not turns or turns[-1]["role"] != "assistant":
        return None
    return turns


def convert(row, where="row"):
    """(pair, None), or (None, reason to drop it). UserError for a field that is wrong."""
    chosen, rejected = (parse(text_field(row, key, where)) for key in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None, "that do not parse"
    prompt, answers = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
    if prompt != rejected[:-1]:
        return None, "whose dialogues differ before the last turn"
    if not all(answers):
        return None, "with an empty last turn"
    if not all(turn["content"] for turn in prompt):
        return None, "with an empty turn before the last"
    # two turns of one side in a row: a line of the answer was taken for a new turn
    if [turn["role"] for turn in chosen] != ["user", "assistant"] * (len(chosen) // 2):
        return None, "whose turns do not alternate"
    if answers[0] == answers[1]:
        return None, "with the same answer twice"
    return dict(prompt=prompt, chosen=answers[0], rejected=answers[1]), None


def records(path):
    """(pairs, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(json_rows(path), convert)


def find(config):
    """Paths of the files of the subset and split asked for."""
    if not config.source:
        files = {path: pinned for path, pinned in FILES.items()
                 if config.subset in ("", path.split("/")[0])
                 and config.split in ("", Path(path).name.split(".")[0])}
        if not files:
            raise UserError(f"only {', '.join(FILES)} can be downloaded: get the others from "
                            "github.com/anthropics/hh-rlhf, --source=DIR reads them")
        return locate("hh_rlhf", "", files, ())
    name = f"{config.split or '*'}.jsonl.gz"
    patterns = [f"{config.subset or '*'}/{name}"]
    if config.subset in ("", Path(config.source).resolve().name):
        patterns.append(name)  # --source is the folder of the subset itself
    # a clone of upstream also holds red-team transcripts, which are no pairs
    return [path for path in locate("hh_rlhf", config.source, FILES, patterns)
            if path.name != "red_team_attempts.jsonl.gz"]


def main(config):
    check_out(config)
    rows = [row for path in find(config) for row in json_rows(path)]
    write("hh_rlhf", config, *convert_all(rows, convert))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
