"""Do the instruments tell base, SFT, PPO, DPO and GRPO apart? Whole pipelines, three seeds.

Each seed trains everything from the base model on and writes evaluate.py's report. A row tells two
checkpoints apart if they differ by more than two standard errors, the same way in every seed.

    python studies/instruments.py                      # trains what is missing in out/instruments
    python studies/instruments.py --runs=out/s{seed}   # from folders out/s1/pretrain, ... on
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive, UserError


@dataclass
class Config:
    runs: str = "out/instruments/s{seed}"  # folder of a pipeline; {seed} stands for the seed
    seeds: Positive[int] = 3  # whole pipelines
    best_of: Positive[int] = 16  # the baseline without training
    eval_prompts: Positive[int] = 512  # held-out prompts
    out: str = "out/instruments"  # instruments.md, and the report of seed 1 for plot.py


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

from evaluate import standard_error
from studies import runs

# stage: (the file that its end writes, its flags)
STAGES = dict(
    pretrain=("model.pt", ()),
    sft=("model.pt", ("init=pretrain",)),
    label=("card.json", ("init=sft",)),
    reward=("model.pt", ("init=sft", "data=label/rankings.jsonl")),
    dpo=("model.pt", ("init=sft", "data=label/rankings.jsonl", "reference_cache=reference_logps")),
    ppo=("model.pt", ("init=sft", "reward_model=reward")),
    grpo=("model.pt", ("init=sft",)))
POLICIES = ("pretrain", "sft", "dpo", "ppo", "grpo")


def run(stage, *flags):
    print(f"python {stage}.py {' '.join(flags)}", flush=True)
    runs.command(stage, flags)


def pipeline(folder, seed, config):
    """The report of one seed; what its folders hold already is not made again."""
    for stage, (result, inputs) in STAGES.items():
        if not (folder / stage / result).exists():
            flags = (f"--{name}={folder / value}" for name, value in
                     (flag.split("=") for flag in inputs))
            run(stage, f"--seed={seed}", f"--out={folder / stage}", *flags)
    report = folder / "report"
    if not (report / "report.md").exists():
        run("evaluate", f"--policies={','.join(str(folder / p) for p in POLICIES if p != 'sft')}",
            f"--reference={folder / 'sft'}", f"--reward_model={folder / 'reward'}",
            f"--best_of={config.best_of}", f"--eval_prompts={config.eval_prompts}",
            f"--out={report}")
    report = json.loads((report / "report.json").read_text())
    best = f"best of {config.best_of}"
    if list(report["checkpoints"]) != [str(folder / p) for p in dict.fromkeys(("sft", *POLICIES))
                                       ] + [best]:
        raise UserError(f"{folder}/report is one of other checkpoints: delete it")
    report["checkpoints"] = {path.removeprefix(f"{folder}/"): metrics
                             for path, metrics in report["checkpoints"].items()}
    return report


def apart(first, second, name):
    """Do two checkpoints, (metrics of each seed), differ in a row, the same way in every seed?"""
    ways = set()
    for a, b in zip(first, second):
        if a.get(name) is None or b.get(name) is None:
            return False
        gap = a[name] - b[name]
        ways.add(math.copysign(1, gap) if abs(gap) > 2 * math.hypot(standard_error(a, name),
                                                          standard_error(b, name))
                 else 0)
    return len(ways) == 1 and 0 not in ways


def cell(seeds, name, unit):
    """Mean over the seeds, and the least and the most that their 95% intervals reach."""
    if any(m.get(name) is None for m in seeds):
        return "-"
    scale, digits = (100, 0) if unit == "%" else (1, 2)
    mean = sum(m[name] for m in seeds) / len(seeds)
    low = min(m.get(f"{name}_low", m[name] - 1.96 * standard_error(m, name)) for m in seeds)
    high = max(m.get(f"{name}_high", m[name] + 1.96 * standard_error(m, name)) for m in seeds)
    low, high = (f"{scale * x:.{digits}f}" for x in (low, high))
    return f"{scale * mean:.{digits}f}" + f" ({low} to {high})" * (low != high)


def tables(reports):
    """Markdown: what every checkpoint does, and which rows tell any two of them apart."""
    names = list(reports[0]["checkpoints"])
    found = {name: [report["checkpoints"][name] for report in reports] for name in names}
    rows = [(name, row["label"], row["unit"]) for name, row in reports[0]["rows"].items()
            if any(m.get(name) is not None for seeds in found.values() for m in seeds)]
    lines = [f"| mean of {len(reports)} seeds (their 95% intervals reach from, to) | "
             + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label}{', %' * (unit == '%')} | "
              + " | ".join(cell(found[n], name, unit) for n in names) + " |"
              for name, label, unit in rows]
    lines += ["", "| these two | are told apart, in every seed, by | and not by |", "|---|---|---|"]
    trained = [n for n in names if n in POLICIES]
    for i, a in enumerate(trained):
        for b in trained[i + 1:]:
            by = [name for name, *_ in rows if apart(found[a], found[b], name)]
            lines.append(f"| {a}, {b} | {', '.join(by)} | " + ", ".join(
                name for name, *_ in rows if name not in by and name in found[a][0]
                and name in found[b][0]) + " |")
    return "\n".join(lines) + "\n"


def main(config):
    if "{seed}" not in config.runs:
        raise UserError(f"--runs={config.runs}: write {{seed}} where the seed stands")
    reports = [pipeline(Path(config.runs.format(seed=seed)), seed, config)
               for seed in range(1, config.seeds + 1)]
    text = tables(reports)
    path = Path(config.out) / "instruments.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.with_name("report.json").write_text(json.dumps(reports[0]))
    print(f"{text}\nwritten: {path}; python plot.py {config.out} draws the report of seed 1")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
