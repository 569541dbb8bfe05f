"""What do the famous bugs cost, and which of them does a log betray?

Twelve known bugs of tests/mutants.py are put back, one at a time, into a copy of the scripts. The
stage is trained with it, and without it from the same inputs and seed; then the right evaluate.py
judges both by gold. So the figures of the table are true, those of a run's own log may not be.

    python studies/bugs.py                     # all of them, 3 seeds; resumes where it stopped
    python studies/bugs.py --workers=2         # two runs side by side, one thread each
    python studies/bugs.py --case=3            # one again, tables and pictures below --out

Writes docs/bugs.md with its picture, and docs/exercises.md from the same runs: curves and samples
of every case without its name, the solution folded away.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config:
    case: NotNegative[int] = 0  # only this one of the exercises, from 1 on; 0: all
    runs: str = "out/seed{seed}"  # base model, SFT model, rankings, reward model; made if missing
    out: str = "out/bugs"  # a folder for every run
    pages: str = "docs"  # bugs.md, bugs.png, exercises.md and exercises/ go here
    seeds: Positive[int] = 3  # from 1 on; of every stage
    flags: str = ""  # of stages, with commas between: ppo.iterations=10,evaluate.eval_prompts=64
    workers: Positive[int] = 1  # runs side by side; above 1 with one thread each
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
from common import ROOT
from studies import runs


class Case(NamedTuple):
    bug: str  # its name in tests/mutants.py
    stages: tuple  # trained with it, the second from the first
    said: str  # what it is
    tell: str  # where to look
    flags: dict = {}  # of the last stage, in the right run as well


# the number of an exercise is the place in this list: no two of a kind beside each other
CASES = (
    Case("top_k_in_rollouts", ("ppo",), "rollouts take the 8 likeliest tokens only, and the "
         "log-probabilities know nothing of it", "only the first row: with the weights, prompts "
         "and random numbers of the right run other answers are drawn, of a lower entropy. The SFT "
         "model gives 0.8% of its probability to the tokens left out, one in six answers"),
    Case("eos_is_not_scored", ("sft",), "EOS is left out of the SFT loss", "the EOS rate falls, "
         "the length runs to its limit; the loss looks right"),
    Case("kl_sign_reversed", ("ppo",), "the KL is added to the reward: drift is paid for",
         "the KL runs away, answers no longer end, and the mean return lies far above the score"),
    Case("ranks_reversed", ("reward", "ppo"), "pairs are read the wrong way round: the worse "
         "answer counts as chosen", "only the samples, and that longer answers win: accuracy and "
         "calibration are measured on the same pairs, and look right"),
    Case("whitening_skipped", ("ppo",), "advantages are not whitened", "the policy loss starts "
         "away from 0, for it holds minus the mean advantage; gradient norms fall with it"),
    Case("no_temperature_in_rollouts", ("ppo",), "rollouts are drawn at temperature 1, all "
         "log-probabilities are those at 0.7", "score and length start as wild as at temperature "
         "1, and the KL by samples parts from the exact one, downwards", dict(temperature=0.7)),
    Case("prompt_is_scored", ("sft",), "the prompt is in the SFT loss", "the loss does not fall "
         "as low: what somebody will ask is not to be known"),
    Case("score_one_slot_behind_eos", ("ppo",), "the score is written one slot behind EOS, where "
         "the mask drops it", "the score stands still while beta KL goes to 0; the mean return "
         "has nothing of the score"),
    Case("dpo_mean_for_the_sum", ("dpo",), "log-ratios are means per token in place of sums",
         "margins are about as many times too small as an answer has tokens; the loss stays near "
         "0.69"),
    Case("eos_not_in_the_response_mask", ("ppo",), "EOS is missing from the responses, their sums "
         "and losses, and the score is read a token early", "the first length is one token less "
         "than that of the right run, whose samples are the same; the score and the critic start "
         "off their usual place; the KL by samples parts from the exact one, upwards"),
    Case("kl_dropped", ("ppo",), "the KL is computed and logged, but never part of the reward",
         "the KL rises to the last step, and the mean return is that of the score alone"),
    Case("loss_divided_by_padding_too", ("ppo",), "losses are divided by all positions, prompt and "
         "padding included", "gradient norms are smaller by the share of response tokens"))
RIGHT = "right"

# (title with its unit, field): what a log has to say, by kind of row
CURVES = dict(
    ppo=[("step", name, title) for name, title in (
        ("score", "score"), ("kl", "KL by samples\n(nats per sequence)"),
        ("kl_error", "KL by samples less exact,\nmean so far (nats per seq.)"),
        ("length", "length (tokens)"),
        ("eos_rate", "ends with EOS\n(share)"), ("entropy", "entropy\n(nats per token)"),
        ("returns_mean", "mean return (score)"), ("explained_variance", "explained\nvariance"),
        ("policy_loss", "policy loss"), ("ratio_max", "largest ratio"),
        ("clip_fraction", "clipped\n(share of tokens)"), ("grad_norm", "gradient norm"))],
    sft=[("step", "loss", "training loss\n(nats per token)"), ("step", "grad_norm",
         "gradient norm"), ("validation", "loss", "held-out loss\n(nats per token)"),
         ("validation", "eos_rate", "ends with EOS\n(share)"),
         ("validation", "length", "length (tokens)")],
    reward=[("step", "loss", "reward model: loss\n(nats per pair)"),
            ("step", "accuracy", "reward model:\naccuracy"),
            ("step", "grad_norm", "reward model:\ngradient norm")],
    dpo=[("step", "loss", "training loss\n(nats per pair)"), ("step", "accuracy",
         "training accuracy"), ("step", "grad_norm", "gradient norm"),
         ("validation", "loss", "held-out loss\n(nats per pair)"),
         ("validation", "margin", "held-out margin"),
         ("validation", "chosen_logp", "log p of chosen\n(nats per sequence)"),
         ("validation", "rejected_logp", "log p of rejected\n(nats per sequence)")])
# of a log's first row, and of its last: what the run says of itself
FIRST = ("score", "length", "entropy", "explained_variance", "policy_loss", "loss", "accuracy",
         "grad_norm")
SAYS = ("score", "kl", "kl_se", "length", "eos_rate", "loss", "accuracy", "longer_wins",
        "calibration_error", "margin", "chosen_logp", "rejected_logp")


# --- the runs ------------------------------------------------------------------------------------


def train(case, name, seed, config, scripts):
    """({stage: folder}, the judge's last row) of one run, with the bug or, as `right`, without."""
    base, out = Path(config.runs.format(seed=seed)), Path(config.out) / name / f"seed{seed}"
    more, folders = runs.stage_flags(config.flags), {}
    for stage in case.stages:
        flags = runs.starts_from(stage, base) | more.get(stage, {}) | dict(seed=seed)
        if stage == "ppo":
            flags |= dict(max_kl=0)  # a run whose KL runs away is what we want to see
        if stage == case.stages[-1]:
            flags |= case.flags
        if "reward" in folders:
            flags |= dict(reward_model=str(folders["reward"]))
        folder, cache = out / stage, {}
        if stage == "dpo":
            cache = dict(reference_cache=str(out / "reference_logps"))
        if name.startswith(RIGHT) and stage in ("sft", "reward"):
            folder = base / stage  # those of the pipeline
        runs.run(stage, folder, config, flags, runs.inputs(flags), scripts, **cache)
        folders[stage] = folder
    flags = dict(policy=str(folders[case.stages[-1]]), reference=str(base / "sft"),
                 reward_model=str(base / "reward")) | more.get("evaluate", {}) | case.flags
    return folders, runs.run("evaluate", out / "judged", config, flags, runs.inputs(flags))


def right_name(case):
    """The folder of the right run: the same for all cases of a stage and its flags."""
    words = [case.stages[-1], *(f"{k}{v}" for k, v in case.flags.items())]
    return "-".join([RIGHT, *words])


def both(number, seed, config):
    """{"bug" and "right": ({stage: folder}, the judge's last row)} of one case and seed."""
    case = CASES[number - 1]
    scripts = (Path(config.out) / case.bug / "scripts").resolve()
    return {"right": train(case, right_name(case), seed, config, ROOT),
            "bug": train(case, case.bug, seed, config, scripts)}


# --- what they say -------------------------------------------------------------------------------


def curve(folder, kind, field):
    """As runs.curve. kl_error: by how much the KL by samples is above the exact one, the mean of
    all iterations so far; away from 0, samples and log-probabilities are not of one model."""
    if field != "kl_error":
        return runs.curve(folder, kind, field)
    x, kl = runs.curve(folder, kind, "kl")
    error = np.subtract(kl, runs.curve(folder, kind, "kl_exact")[1])
    return x, list(error.cumsum() / np.arange(1, len(x) + 1))


def level(folder, kind, field):
    """The mean of a curve over its last third: what it came to."""
    y = curve(folder, kind, field)[1]
    return float(np.mean(y[-max(1, len(y) // 3):])) if y else None


def betrayed(stages, found, most=3):
    """What the logs show, as text: the curves whose last third differs from that of the right runs
    beyond its interval over seeds, and by over a tenth; those first that differ most."""
    shown = []
    for stage in stages:
        for kind, field, _ in CURVES[stage]:
            pairs = [(level(one["bug"][0][stage], kind, field),
                      level(one["right"][0].get(stage, ""), kind, field)
                      if stage in one["right"][0] else None) for one in found]
            if any(v is None for pair in pairs for v in pair):
                continue
            bug, right = np.array(pairs).T
            mean, half = runs.interval(bug - right)
            size = abs(mean) / (abs(right.mean()) + 1e-9)
            if size > 0.1 and not abs(mean) <= half:
                shown.append((size, f"{stage} {field} {right.mean():.3g} → {bug.mean():.3g}"))
    return "; ".join(text for _, text in sorted(shown, reverse=True)[:most]) or "nothing"


def summary(number, found):
    """One row of figures of a case, from `both` of every seed."""
    case, last = CASES[number - 1], [(one["bug"][1], one["right"][1]) for one in found]
    gaps = [bug["gold"] - right["gold"] for bug, right in last]
    own = [runs.log_rows(one["bug"][0][case.stages[-1]], "final")[0].get("kl") for one in found]
    return dict(number=number, gap=runs.interval(gaps), verdict=runs.verdict(gaps), cells=[
        case.said, "+".join(case.stages), runs.with_interval([bug["gold"] for bug, _ in last]),
        f"{runs.with_interval(gaps)}, {runs.verdict(gaps)}",
        runs.with_interval([100 * bug["gold_win_rate"] for bug, _ in last], ".0f"),
        runs.with_interval([bug["kl"] for bug, _ in last], ".2f"),
        runs.with_interval(own, ".2f"),
        runs.with_interval([bug["length"] for bug, _ in last], ".1f"),
        runs.with_interval([100 * bug["eos_rate"] for bug, _ in last], ".0f"),
        betrayed(case.stages, found)])


HEAD = ("bug", "trained", "gold", "against the right run", "wins against SFT, %", "KL, nats",
        "KL by its own log", "length", "EOS, %", "what its log shows")


def bugs_page(rows, right, config):
    """Markdown: a row for each case, the dearest first."""
    rows = sorted(rows, key=lambda row: row["gap"][0])
    lines = ["# What the famous bugs cost\n", f"    {runs.as_typed('bugs', config)}\n",
             "Each bug was seen in public code or in many a first draft. It is put back into "
             "a copy of these scripts; the stage is trained with it, the right evaluate.py judges. "
             f"Means of {config.seeds} seeds, ± half of their 95% interval (Student's t); the "
             "difference is taken seed by seed. `costs`: the interval lies below 0. The last "
             "column: curves of the run's own log whose last third differs, right → with the bug. "
             "A bug that costs and shows little there is a silent one.\n",
             "![gold lost by each bug](bugs.png)\n",
             "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row["cells"]) + " |" for row in rows]
    lines += ["", "The right runs:\n", "| run | gold | wins against SFT, % | KL, nats | length |",
              "|---|---|---|---|---|"]
    for name, last in right.items():
        get = lambda key, form, unit=1, last=last: runs.with_interval(
            [unit * row[key] for row in last], form)
        lines.append(f"| {name} | {get('gold', '+.2f')} | {get('gold_win_rate', '.0f', 100)} | "
                     f"{get('kl', '.2f')} | {get('length', '.1f')} |")
    return "\n".join(lines) + "\n"


def draw_costs(rows, path):
    """Gold against the right run, a line for each case, the dearest on top."""
    rows = sorted(rows, key=lambda row: -row["gap"][0])
    figure = runs.new_figure(8, 1.6 + 0.38 * len(rows))
    axis = figure.subplots()
    for y, row in enumerate(rows):
        mean, half = row["gap"]
        axis.errorbar(mean, y, xerr=None if half != half else half, fmt="o", capsize=3,
                      color="#D55E00" if row["verdict"] == "costs" else "#0072B2")
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(rows)), [CASES[row["number"] - 1].bug.replace("_", " ")
                                       for row in rows], fontsize=9)
    axis.set_xlabel("gold reward with the bug, less that of the right run\n"
                    "(means over seeds, bars: 95% intervals; orange: it costs)")
    axis.grid(alpha=0.25, lw=0.6)
    axis.margins(y=0.08)
    figure.savefig(path, dpi=120)


# --- the exercises -------------------------------------------------------------------------------


def draw_curves(case, one, path):
    """Every curve of the broken run's log (orange), over that of a right run (grey)."""
    panels = [(stage, *row) for stage in case.stages for row in CURVES[stage]]
    lines = -(-len(panels) // 4)
    figure = runs.new_figure(11, 0.5 + 2.1 * lines)
    axes = figure.subplots(lines, 4, squeeze=False).ravel()
    for axis, (stage, kind, field, title) in zip(axes, panels):
        for side, colour in (("right", "#999999"), ("bug", "#D55E00")):
            x, y = curve(one[side][0][stage], kind, field)
            axis.plot(x, y, color=colour, lw=1.3, marker="o" if len(x) < 8 else "", ms=3)
        if field in ("eos_rate", "accuracy"):
            axis.set_ylim(-0.05, 1.05)
        if field == "ratio_max":
            axis.set_yscale("log")
        if field == "explained_variance":  # the first iterations of a bad critic hide all others
            axis.set_ylim(bottom=max(-2.0, axis.get_ylim()[0]))
        largest = [max(map(abs, line.get_ydata()), default=0.0) for line in axis.lines]
        if field in ("kl", "kl_error", "returns_mean") and largest[-1] > 10 * largest[0]:
            axis.set_yscale("symlog")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch" if kind == "validation" else
                        "iteration" if stage == "ppo" else "step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.6)
    for axis in axes[len(panels):]:
        axis.axis("off")
    figure.legend(axes[0].lines, ["a right run", "this run"], loc="outside upper right", ncols=2,
                  frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def samples(folder, most=4):
    """Lines of the last samples in a run's log, as it printed them; none of gold."""
    rows = runs.log_rows(folder, "sample") or runs.log_rows(folder, "held_out_sample")
    key = next((k for k in ("step", "epoch") if k in rows[-1]), None) if rows else None
    if key:
        rows = [row for row in rows if row[key] == rows[-1][key]]
    lines = []
    for row in rows[:most]:
        numbers = "".join(f", {k} {row[k]:.2f}" for k in ("score", "kl") if k in row)
        answer = row["response"] if "response" in row else row["policy"]
        lines += [f"    {row['prompt']}", f"        {answer!r}{numbers}"]
    return lines


def exercises_page(found, folder, config):
    """Markdown of all cases, and their pictures; found: {number: `both` of the first seed}."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Exercises: name the bug\n",
             "Each run below has one known bug in it. Orange is its own log, grey that of a right "
             "run with the same inputs, seed and random numbers; the samples and figures are those "
             "that it logged itself. What is wrong, in which line? [log.md](log.md) defines every "
             "field; the third curve of PPO is the mean of `kl` - `kl_exact` so far, in which 0.05 "
             "is noise. Samples are the last that a run logged, on training prompts in PPO, on "
             "held-out ones elsewhere. [bugs.md](bugs.md) says what each bug costs (and names them "
             "all). `python studies/bugs.py --case=N` makes a case again.\n"]
    for number, one in found.items():
        case, bug = CASES[number - 1], runs.BUGS[CASES[number - 1].bug]
        draw_curves(case, one, folder / f"{number}.png")
        settings = "".join(f", `--{k}={v}`" for k, v in case.flags.items())
        trained = ", then ".join(f"`{stage}.py`" for stage in case.stages)
        lines += [f"## Exercise {number}\n", f"Trained: {trained}{settings}.\n",
                  f"![curves of exercise {number}](exercises/{number}.png)\n"]
        for stage in case.stages:
            last = runs.log_rows(one["bug"][0][stage], "final")[0]
            right = runs.log_rows(one["right"][0][stage], "final")[0]
            firsts = [runs.log_rows(one[side][0][stage], "step")[0] for side in ("bug", "right")]
            for words, a, b, names in (("First", *firsts, FIRST), ("Last", last, right, SAYS)):
                shown = [f"{k} {a[k]:.3g} ({b[k]:.3g})" for k in names
                         if a.get(k) is not None and b.get(k) is not None]
                lines.append(f"{words} row of `{stage}.py` (in brackets the right run's): "
                             + ", ".join(shown) + ".\n")
        lines += [*samples(one["bug"][0][case.stages[-1]]), ""]
        seen = "" if bug.seen == "-" else f" Seen: {bug.seen}."
        lines += ["<details><summary>Solution</summary>\n", f"`{case.bug}`: {case.said}.{seen} "
                  f"Where to look: {case.tell}.\n", f"`{bug.file}`:\n", "```diff",
                  *(f"- {line}" for line in bug.old.strip("\n").split("\n")),
                  *(f"+ {line}" for line in bug.new.strip("\n").split("\n")), "```\n",
                  "</details>\n"]
    return "\n".join(lines)


def main(config):
    common.find_device(config.device)  # refuses one that is not there before the runs
    if config.case > len(CASES):
        raise UserError(f"--case={config.case}: there are {len(CASES)}")
    numbers = [config.case] if config.case else range(1, len(CASES) + 1)
    seeds, out = range(1, config.seeds + 1), Path(config.out)
    pages = out / f"case{config.case}" if config.case else Path(config.pages)
    pages.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        runs.with_bug(CASES[number - 1].bug, out / CASES[number - 1].bug)
    # what several cases share is made first, so that no two of them make it at once
    shared = {right_name(CASES[n - 1]): CASES[n - 1] for n in numbers}
    with ThreadPoolExecutor(config.workers) as pool:
        list(pool.map(lambda seed: runs.pipeline(config, seed), seeds))
        jobs = [(name, seed) for name in shared for seed in seeds]
        made = list(pool.map(lambda job: train(shared[job[0]], *job, config, ROOT), jobs))
        right = {name: [last for (n, _), (_, last) in zip(jobs, made) if n == name]
                 for name in shared}
        jobs = [(number, seed) for number in numbers for seed in seeds]
        each = dict(zip(jobs, pool.map(lambda job: both(*job, config), jobs)))
    found = {n: [each[n, seed] for seed in seeds] for n in numbers}
    rows = [summary(n, found[n]) for n in numbers]
    draw_costs(rows, pages / "bugs.png")
    (pages / "bugs.md").write_text(bugs_page(rows, right, config), encoding="utf-8")
    text = exercises_page({n: found[n][0] for n in numbers}, pages / "exercises", config)
    (pages / "exercises.md").write_text(text, encoding="utf-8")
    for row in rows:
        print(f"{row['number']}: {CASES[row['number'] - 1].bug}: {row['cells'][3]}")
    print(f"written: {pages}/bugs.md, bugs.png, exercises.md, exercises/")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
