"""Does an ensemble of reward models help? One network against four, and PPO against each.

For every seed: a single reward model and an ensemble from the same SFT model and rankings, judged
on the held-out pairs (calibration, accuracy by the labels and by gold, each way to combine the
members); then PPO from each at a beta where the single one is over-optimised: at 0.02 PPO gets less
true reward than at 0.15, for more KL (docs/results.md). If the ensemble helps, gold is higher there
at the same score or KL.

    python studies/ensembles.py                               # SFT model and rankings of out/
    python studies/ensembles.py --runs=out/seed{seed}         # of each seed its own
    python studies/ensembles.py --seeds=1 --ppo_flags=iterations=10    # a quick look
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config:
    runs: str = "out"  # folder with sft and label; {seed} in it stands for 1, 2, ...
    out: str = "out/ensembles"  # a folder for every run
    table: str = "docs/ensembles.md"  # the tables go here
    seeds: Positive[int] = 3
    members: Positive[int] = 4
    beta: NotNegative[float] = 0.02  # of PPO
    reward_flags: str = ""  # further flags of reward.py, without dashes, with commas between them
    ppo_flags: str = ""  # the same of ppo.py
    workers: Positive[int] = 1  # runs side by side; above 1 with one thread each
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
from data.load import load_rankings
from data.records import embedded
from reward import SCORE_BY, evaluate, load_reward_model
from studies import runs

WAYS = ("single", *SCORE_BY)  # the columns: one network, then the ensemble by each way
PAIRS = (("accuracy", "held-out pairs ordered as labelled, %", 100),
         ("gold_agreement", "pairs ordered as gold does, %", 100),
         ("gold_correlation", "rank correlation with gold within prompts", 1),
         ("calibration_error", "confidence is off by, %", 100),
         ("overconfidence", "confidence less accuracy, %", 100))
PPO = (("score", "score of the policy", 1), ("gold", "gold, the true reward", 1),
       ("gold_sft", "gold of the SFT model", 1), ("gold_win_rate", "wins by gold, %", 100),
       ("kl", "KL, nats a sequence", 1), ("length", "length, tokens", 1))


def train(stage, folder, config, extra, **flags):
    """`runs.run` with further flags, "name=value" with commas between."""
    flags |= dict(flag.split("=", 1) for flag in extra.split(",") if flag)
    return runs.run(stage, folder, config, flags, runs.inputs(flags))


def one_seed(seed, config, device):
    """{way: (metrics on held-out pairs, PPO's last row)} of one seed."""
    folder, out = Path(config.runs.format(seed=seed)), Path(config.out)
    init, data = folder / "sft", folder / "label" / "rankings.jsonl"
    world = embedded(data)
    if world is None:
        raise UserError(f"{data}: expected rankings of the embedded world, as label.py writes "
                        "them: of other data there is no gold reward")
    # seeds of the members: those of two ensembles do not overlap
    shared = dict(init=str(init), data=str(data), seed=seed * 100)
    folders = {n: out / f"reward-{n}-seed{seed}" for n in (1, config.members)}
    for n, folder in folders.items():
        train("reward", folder, config, config.reward_flags, ensemble=n, **shared)
    single, tokenizer, _ = load_reward_model(folders[1], device)
    held_out = load_rankings(data, tokenizer, single.gpt.config.block_size).held_out
    found = {}
    for way in WAYS:
        folder = folders[1 if way == "single" else config.members]
        by = "mean" if way == "single" else way
        model = load_reward_model(folder, device, by)[0]
        card = evaluate(model, held_out, tokenizer.pad, device, world["noise"])
        last = train("ppo", out / f"ppo-{way}-beta{config.beta}-seed{seed}", config,
                     config.ppo_flags, init=str(init), reward_model=str(folder), score_by=by,
                     beta=config.beta, seed=seed)
        found[way] = card, last
    return found


def tables(found, config):
    """Markdown: means over the seeds, and the smallest and largest."""
    head = ["", "one network", *(f"{config.members}, {way}" for way in SCORE_BY)]
    lines = ["# Ensembles of reward models", "",
             f"{len(found)} seeds, {config.members} members; PPO at beta {config.beta:g}. A mean "
             "over the seeds, and the smallest and the largest of them. The first member of the "
             "ensemble is the one network. Members disagree, so their mean spreads less than each: "
             "the same beta then holds the policy tighter. Compare at the same KL.", "",
             f"    python studies/ensembles.py --seeds={config.seeds} --members={config.members} "
             f"--beta={config.beta:g}", ""]
    for part, (title, rows) in enumerate((("On held-out pairs", PAIRS), ("PPO", PPO))):
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, label, unit in rows:
            nan = float("nan")  # of a figure that a run does not have: gold was always the same
            cells = [[unit * one[way][part].get(name, nan) for one in found] for way in WAYS]
            lines.append(f"| {label} | " + " | ".join(
                f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(config):
    device = common.find_device(config.device)  # refuses one that is not there before the runs
    for flags in (config.reward_flags, config.ppo_flags):
        if not all("=" in flag for flag in flags.split(",") if flag):
            raise UserError(f"{flags}: further flags are name=value, with commas between them")
    common.make_folder("table", Path(config.table).parent)
    with ThreadPoolExecutor(config.workers) as pool:
        found = list(pool.map(lambda seed: one_seed(seed, config, device),
                              range(1, config.seeds + 1)))
    text = tables(found, config)
    print("\n" + text)
    Path(config.table).write_text(text, encoding="utf-8")
    print(f"written: {config.table}")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
