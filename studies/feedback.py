"""Does it matter who labels, and does a second round help?

rounds: online DPO. The reward model of the pipeline labels what the policy says, DPO learns from
it, and again from the result, three times: each round with the policy that it starts from as its
reference, as `--init` alone does; with the SFT model (`--reference`); and with an SFT loss on the
best answers on top (`--nll`). Beside them one round that trains three epochs on its first labels:
as many steps, no new answers. All against the SFT model.

labelers: the answers of the pipeline's rankings are ranked once more, by principles (the judge by
rule of data/synthetic/principles.py). A reward model is trained on each, and PPO with each. How
often a reward model agrees with gold is measured on the same held-out answers, gold nowhere equal.

    python studies/feedback.py                         # both parts; makes what is missing
    python studies/feedback.py --part=rounds --workers=2 --runs=out/s{seed}

Runs that are there with the same settings and inputs are used again.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive, UserError


@dataclass
class Config:
    part: str = "both"  # "rounds", "labelers" or "both"
    runs: str = ""  # folders with sft, label, reward of each seed, such as out/s{seed}; "": made
    out: str = "out/feedback"  # a folder for every run, and a table of each part
    page: str = "docs/feedback.md"  # the tables of both parts
    seeds: Positive[int] = 3  # from 1 on; of every stage
    rounds: Positive[int] = 3  # of DPO
    prompts: Positive[int] = 5500  # training prompts that are labelled
    held_out: Positive[int] = 500  # held-out ones
    iterations: Positive[int] = 60  # of PPO
    eval_prompts: Positive[int] = 512  # held-out prompts
    max_new_tokens: Positive[int] = 48
    workers: Positive[int] = 1  # seeds side by side; above 1 with one thread each
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
from data import batches
from data.records import check_ranking, ranking_rows
from reward import load_reward_model
from studies import runs
from studies.runs import final


def run(stage, folder, config, **flags):
    return runs.run(stage, folder, config, flags, runs.inputs(flags))


def pipeline(config, seed):
    """The folder with sft, label and reward of a seed."""
    if config.runs:
        folder = Path(config.runs.format(seed=seed))
        for name in ("sft/model.pt", "label/rankings.jsonl", "reward/model.pt"):
            if not (folder / name).exists():
                raise UserError(f"--runs={config.runs}: there is no {folder / name}")
        return folder
    folder = Path(config.out) / f"s{seed}"
    run("pretrain", folder / "pretrain", config, seed=seed)
    run("sft", folder / "sft", config, seed=seed, init=str(folder / "pretrain"))
    run("label", folder / "label", config, seed=seed, init=str(folder / "sft"),
        prompts=config.prompts, held_out=config.held_out, max_new_tokens=config.max_new_tokens)
    run("reward", folder / "reward", config, seed=seed, init=str(folder / "sft"),
        data=str(folder / "label" / "rankings.jsonl"), max_new_tokens=config.max_new_tokens)
    return folder


def rounds(config, seed):
    """{row of the table: figures}, of each round against the SFT model."""
    base, folder, found = pipeline(config, seed), Path(config.out) / "rounds" / f"s{seed}", {}
    sizes = dict(max_new_tokens=config.max_new_tokens, seed=seed)

    def judged(name, policy):
        row = run("evaluate", folder / f"evaluate-{policy.name}", config, policy=str(policy),
                  reference=str(base / "sft"), eval_prompts=config.eval_prompts, **sizes)
        found[name] = {k: row[k] for k in (
            "gold", "gold_win_rate", "kl", "eos_rate", "length")}

    def one_round(policy, n, kind="", held_to="", **more):
        """Label what the policy says, and train it; the folder of the result."""
        labels, trained = folder / f"{kind}label{n}", folder / f"{kind}dpo{n}"
        labelled = run("label", labels, config, init=str(policy), labeler="model",
                       reward_model=str(base / "reward"), prompts=config.prompts,
                       held_out=config.held_out, **sizes)
        flags = dict(init=str(policy), data=str(labels / "rankings.jsonl"), epochs=1,
                     reference_cache=str(folder / "reference_logps"),
                     eval_prompts=config.eval_prompts, **sizes) | more
        run("dpo", trained, config, **flags)
        name = f"round {n}, {held_to or f'held to round {n - 1}'}"
        judged(name, trained)
        found[name] |= dict(pairs=labelled["pairs"])
        if n == 1:  # as many steps without new answers
            run("dpo", folder / "epochs", config, **flags | dict(epochs=config.rounds))
            judged(f"{config.rounds} epochs of round 1", folder / "epochs")
        return trained

    first = one_round(base / "sft", 1, held_to="from the SFT model")
    held = dict(reference=str(base / "sft"))
    for kind, flags in (("", {}), ("held-", dict(held_to="held to the SFT model") | held),
                        ("nll-", dict(held_to="the same, --nll=0.2", nll=0.2) | held)):
        policy = first
        for n in range(2, config.rounds + 1):
            policy = one_round(policy, n, kind, **flags)
    return found


def gold_accuracy(path, rankings, config):
    """The share of the pairs of held-out answers that a reward model orders as gold does, where
    gold differs; ties half."""
    model, tokenizer, _ = load_reward_model(path, common.find_device(config.device))
    lines = map(json.loads, Path(rankings).read_text(encoding="utf-8").splitlines())
    records = [check_ranking(r) for r in lines if r["held_out"]]
    rows, masks = zip(*tokenizer.encode_pieces(
        [pieces for r in records for pieces, _ in ranking_rows(tokenizer, r)]))
    scores = iter(batches.over_rows(model, rows, masks, tokenizer.pad,
                                    model.gpt.wte.weight.device).tolist())
    right = []
    for r in records:
        score, gold = [next(scores) for _ in r["gold"]], r["gold"]
        right += [np.sign(score[i] - score[j]) / 2 + 0.5 for i in range(len(gold))
                  for j in range(len(gold)) if gold[i] > gold[j]]
    return float(np.mean(right))


def labelers(config, seed):
    """{row of the table: figures}, of each labeler."""
    base, folder, found = pipeline(config, seed), Path(config.out) / "labelers" / f"s{seed}", {}
    init, rankings = str(base / "sft"), base / "label" / "rankings.jsonl"
    labels = dict(simulated=final(base / "label"))
    if labels["simulated"] is None:
        raise UserError(f"{base / 'label'} holds no finished run of label.py")
    labels["principles"] = run("label", folder / "label", config, answers=str(rankings),
                               labeler="principles", prompts=config.prompts,
                               held_out=config.held_out, seed=seed)
    run("reward", folder / "reward", config, init=init, seed=seed,
        data=str(folder / "label" / "rankings.jsonl"), max_new_tokens=config.max_new_tokens)
    for name, model in (("simulated", base / "reward"), ("principles", folder / "reward")):
        ppo = run("ppo", folder / f"ppo-{name}", config, init=init, reward_model=str(model),
                  seed=seed, iterations=config.iterations, eval_prompts=config.eval_prompts,
                  max_new_tokens=config.max_new_tokens)
        found[name] = dict(labels=labels[name]["gold_accuracy"],
                           accuracy=gold_accuracy(model, rankings, config),
                           **{k: ppo[k] for k in ("gold", "gold_win_rate", "kl", "length")})
    return found


# column of a table: (its head, how a number is written)
COLUMNS = dict(
    labels=("labels that gold agrees with", "{:.1%}"), pairs=("pairs", "{:,.0f}"),
    accuracy=("reward model agrees with gold", "{:.1%}"), gold=("gold", "{:+.2f}"),
    gold_win_rate=("wins against SFT", "{:.1%}"), kl=("KL (nats)", "{:.2f}"),
    eos_rate=("end with EOS", "{:.1%}"), length=("length", "{:.1f}"))


def table(name, each):
    """Markdown of {row: figures} of each seed: the mean, and the range over seeds in brackets."""
    names = [c for c in COLUMNS if any(c in row for row in each[0].values())]
    lines = [f"| {name} | " + " | ".join(COLUMNS[c][0] for c in names) + " |",
             "|" + "---|" * (len(names) + 1)]
    for row in each[0]:
        cells = []
        for c in names:
            values, write = [found[row].get(c) for found in each], COLUMNS[c][1].format
            cells.append("-" if None in values else f"{write(np.mean(values))} "
                         f"({write(min(values))} to {write(max(values))})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


PARTS = dict(rounds=(rounds, "after", "Online DPO: rounds with the reward model as the labeler"),
             labelers=(labelers, "labeler", "A reward model, and PPO, from each labeler"))


def main(config):
    wanted = PARTS if config.part == "both" else [config.part]
    if set(wanted) - set(PARTS):
        raise UserError(f"--part={config.part}: expected both, {' or '.join(PARTS)}")
    for name in wanted:
        work, column, _ = PARTS[name]
        with ThreadPoolExecutor(config.workers) as pool:
            each = list(pool.map(lambda seed, work=work: work(config, seed),
                                 range(1, config.seeds + 1)))
        text = table(column, each)
        flags = [f"--{f.name}={cli.as_text(getattr(config, f.name))}" for f in fields(config)
                 if getattr(config, f.name) != f.default and f.name not in (
                     "part", "runs", "out", "page", "workers", "device")]
        head = (f"`python studies/feedback.py {' '.join([f'--part={name}', *flags])}`: means of "
                f"{config.seeds} seeds, their range in brackets; {config.eval_prompts} held-out "
                "prompts.\n\n")
        (Path(config.out) / f"{name}.md").write_text(head + text)
        print(f"\n{text}")
    lines = ["# Who labels, and how often\n"]
    for name, (*_, title) in PARTS.items():
        path = Path(config.out) / f"{name}.md"
        if path.exists():
            lines += [f"## {title}\n", path.read_text()]
    Path(config.page).parent.mkdir(parents=True, exist_ok=True)
    Path(config.page).write_text("\n".join(lines))
    print(f"written: {config.page}")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
