"""Preference pairs in two halves, for a reward model that is trained on and one that only judges.

Gao et al. (2022) measure with a reward model that the policy never saw. With labels of people there
is none, so a second one is trained on the other half of the prompts: out/real/first.jsonl is for
reward.py and ppo.py, out/real/second.jsonl for the judge. Held-out prompts are in both.

    python studies/halves.py --data=out/data/hh_rlhf.jsonl,out/data/fine_grained_rlhf.jsonl
    python reward.py --init=out/smollm2 --data=out/real/first.jsonl --out=out/rm
    python reward.py --init=out/smollm2 --data=out/real/second.jsonl --out=out/judge
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script or imported by a test

import cli
from cli import UserError


@dataclass
class Config:
    data: str = ""  # files of pairs or rankings, with commas between them
    out: str = "out/real"  # folder for first.jsonl and second.jsonl


CONFIG = cli.parse(Config) if __name__ == "__main__" else None

from data.files import json_rows
from data.records import check_ranking, digest, split, split_key, write_jsonl


def main(config):
    if not config.data:
        raise UserError("--data= is missing: files of pairs, with commas between them")
    records = []
    for path in config.data.split(","):
        for where, row, why in json_rows(path):
            if why:
                raise UserError(f"{where}: {why}")
            check_ranking(row, where)
            records.append(row)
    sides = split(records)
    halves = [[], []]
    for record in sides.train:
        halves[digest("half " + split_key(record)) % 2].append(record)
    for name, half in zip(("first", "second"), halves):
        path = Path(config.out) / f"{name}.jsonl"
        write_jsonl(path, half + sides.held_out)
        print(f"{path}: {len(half):,} for training, {len(sides.held_out):,} held out")


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
