"""Goodhart: how far can a reward model be optimised before the true reward falls?

As Gao et al. (2022) measured it: gold and proxy against d, the square root of the KL to the SFT
model, for best-of-n and along PPO at three betas; proxies from few and from many comparisons, one
network or an ensemble. They found gold ~ d (a - b d) for best-of-n and d (a - b ln d) for RL; both
forms are fitted to both here, with a constant c in front: gold at d = 0 is measured as well. All
answers are to training prompts: PPO's rollouts are.

    python studies/overoptimization.py                   # 3 seeds; resumes where it stopped
    python studies/overoptimization.py --workers=2       # two runs side by side, one thread each

Does a smaller beta peak sooner and lower, as the texts say, or is the KL penalty like stopping
early (Gao et al., section 3.6), so that all betas lie on one curve? The page answers by figures.
"""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive


@dataclass
class Config:
    runs: str = "out/seed{seed}"  # base model, SFT model, rankings, reward model; made if missing
    out: str = "out/overoptimization"  # a folder for every run
    pages: str = "docs"  # overoptimization.md and .png go here
    seeds: Positive[int] = 3  # from 1 on; of every stage
    few: Positive[int] = 250  # prompts with rankings of the proxy from few comparisons
    members: Positive[int] = 4  # of an ensemble
    window: Positive[int] = 5  # iterations of PPO that make a point, but for the first alone
    bon_prompts: Positive[int] = 128  # training prompts of best-of-n
    bon_samples: Positive[int] = 128  # SFT samples a prompt: the largest n
    max_new_tokens: Positive[int] = 48
    flags: str = ""  # of stages, with commas between: ppo.iterations=10,reward.samples=64
    workers: Positive[int] = 1  # runs side by side; above 1 with one thread each
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
from data import batches
from data.files import whole_file
from data.load import load_prompts
from data.synthetic.gold import gold_reward
from evaluate import response_rows
from reward import load_reward_model
from studies import runs
from studies.frontier import COLOURS, best_of_n

PROXIES = ("few", "many", "few, ensemble", "many, ensemble")
POLICIES = ("best of n", 0.0, 0.02, 0.05)  # the numbers are betas of PPO
BETAS = {name: (0.0,) if "ensemble" in name else POLICIES[1:] for name in PROXIES}  # that take time
MISSING_EOS = -3.0


# --- the runs ------------------------------------------------------------------------------------


def fewer_rankings(base, path, few):
    """Write the rankings of the first `few` training prompts and of all held-out ones."""
    lines, kept, training = (base / "label" / "rankings.jsonl").read_text().splitlines(), [], 0
    for line in lines:
        held_out = json.loads(line)["held_out"]
        training += not held_out
        if held_out or training <= few:
            kept.append(line + "\n")
    with whole_file(path, "w", encoding="utf-8") as file:
        file.write("".join(kept))
    return path


def proxy(name, seed, config):
    """The folder of a reward model, trained now unless it is there."""
    base, out = Path(config.runs.format(seed=seed)), Path(config.out) / f"seed{seed}"
    if name == "many":
        return base / "reward"  # that of the pipeline
    flags = runs.starts_from("reward", base) | dict(seed=seed)
    flags |= runs.stage_flags(config.flags).get("reward", {})
    flags |= dict(ensemble=config.members if "ensemble" in name else 1)
    if name.startswith("few"):
        flags |= dict(data=str(out / f"few{config.few}.jsonl"))
    folder = out / f"reward-{name.replace(', ', '-')}"
    runs.run("reward", folder, config, flags, runs.inputs(flags))
    return folder


def ppo(job, config):
    """The folder of one run of PPO, trained now unless it is there."""
    name, beta, seed = job
    base = Path(config.runs.format(seed=seed))
    flags = runs.starts_from("ppo", base) | dict(
        reward_model=str(proxy(name, seed, config)), beta=beta, seed=seed, max_kl=0)
    flags |= runs.stage_flags(config.flags).get("ppo", {})
    folder = Path(config.out) / f"seed{seed}" / f"ppo-{name.replace(', ', '-')}-beta{beta:g}"
    runs.run("ppo", folder, config, flags, runs.inputs(flags))
    return folder


# --- the curves ----------------------------------------------------------------------------------


def ppo_curve(folder, window):
    """dict of step, d, gold, proxy, each (points,), means of `window` iterations; and se of gold.

    The first iteration, that of the SFT model, is a point of its own. Gold and score are those of
    the rollouts, d is the root of the mean exact KL. se, the standard error of a point, comes from
    how much gold jumps from one iteration to the next: half the mean square of the jumps is the
    variance of one, whatever the trend.
    """
    rows = [row for row in runs.log_rows(folder, "step") if row["score"] is not None]
    n = max(1, (len(rows) - 1) // window)
    parts = [rows[:1], *np.array_split(np.array(rows[1:], object), n)]
    mean = lambda key: np.array([np.mean([r[key] for r in part]) for part in parts])
    jumps = np.diff([row["gold"] for row in rows])
    return dict(step=mean("step"), d=np.sqrt(np.maximum(mean("kl_exact"), 0)), gold=mean("gold"),
                proxy=mean("score"), se=float(np.sqrt(np.mean(jumps ** 2) / 2 / window)))


def bon_curves(seed, config, device):
    """dict of curves, {proxy: dict of d, gold, proxy, each (n = 1, 2, 4, ...)} of best-of-n from
    SFT samples, and of the seconds that took. d is an upper bound: answers may be the same."""
    base, out = Path(config.runs.format(seed=seed)), Path(config.out) / f"seed{seed}"
    folders = {name: proxy(name, seed, config) for name in PROXIES}
    key = ["training", config.bon_prompts, config.bon_samples, config.max_new_tokens,
           runs.inputs(dict(init=str(base / "sft"))),
           *(runs.inputs(dict(reward_model=str(f))) for f in folders.values())]
    path, started = out / "best_of_n.json", time.monotonic()
    if path.exists() and (saved := json.loads(path.read_text()))["key"] == key:
        return saved
    policy, tokenizer, _ = common.load_policy(base / "sft", ("sft",), device)
    texts, ids, _ = zip(*load_prompts("synthetic", {"training": config.bon_prompts}, tokenizer,
                                      policy.config.block_size - config.max_new_tokens,
                                      seed)[0])
    drawn = batches.sample_texts(policy, tokenizer, ids, config.max_new_tokens,
                                 partial(common.uniforms, seed, "overoptimization", "n", 0), 1.0,
                                 samples=config.bon_samples)
    shape = (len(texts), config.bon_samples)
    rows = response_rows([i for i in ids for _ in range(config.bon_samples)], drawn)
    finished = np.array([s["finished"] for s in drawn])
    gold = np.array([gold_reward(texts[i // shape[1]], s["text"])
                     for i, s in enumerate(drawn)]).reshape(shape)
    sizes = [2 ** k for k in range(config.bon_samples.bit_length())]
    curves = {}
    for name, folder in folders.items():
        model = load_reward_model(folder, device)[0]
        score = batches.over_rows(model, *rows, tokenizer.pad, device).numpy()
        score = np.where(finished, score, MISSING_EOS).reshape(shape)
        each = lambda value, score=score: [float(best_of_n(score, value, n).mean())
                                           for n in sizes]
        curves[name] = dict(d=[math.sqrt(math.log(n) - (n - 1) / n) for n in sizes],
                            gold=each(gold), proxy=each(score))
    saved = dict(key=key, curves=curves, seconds=round(time.monotonic() - started, 1))
    with whole_file(path, "w", encoding="utf-8") as file:
        file.write(cli.to_json(saved) + "\n")
    return saved


# --- what they say -------------------------------------------------------------------------------


def fit(d, y, form):
    """Least squares of y = c + d (a - b d), or with form "ln" c + d (a - b ln d).

    Returns dict of a, b, r2 and peak: the d at which it is largest, nan where it has no maximum.
    """
    d, y = np.asarray(d, float), np.asarray(y, float)
    second = d * np.log(np.maximum(d, 1e-9)) if form == "ln" else d ** 2
    X = np.stack([np.ones_like(d), d, -second], 1)
    c, a, b = np.linalg.lstsq(X, y, rcond=None)[0]
    spread = ((y - y.mean()) ** 2).sum()
    peak = (math.exp(min(a / b - 1, 50)) if form == "ln" else a / (2 * b)) if b > 0 else math.nan
    peak = peak if peak > 0 else math.nan  # falls from the start
    return dict(a=float(a), b=float(b), peak=float(peak),
                r2=float(1 - ((y - X @ [c, a, b]) ** 2).sum() / spread) if spread else math.nan)


def facts(curve):
    """What one curve of PPO shows: where gold peaks, and the checks of over-optimisation."""
    top, d, gold, score = int(np.argmax(curve["gold"])), curve["d"], curve["gold"], curve["proxy"]
    error = math.sqrt(2) * curve["se"]  # of a difference of two points
    return dict(step=float(curve["step"][top]), d_peak=float(d[top]), gold_peak=float(gold[top]),
                d_end=float(d[-1]), gold_end=float(gold[-1]), lost=float(gold[top] - gold[-1]),
                proxy_gain=float(score[-1] - score[top]), reached=bool(top < len(gold) - 1),
                falls=bool(gold[top] - gold[-1] > 2 * error))


def off(curve, other):
    """How far a curve lies above another at the same d: 0 if both are one curve.

    The mean of gold over the second half of its points, less that of the other between its points.
    """
    d, gold = (np.asarray(curve[key])[len(curve["d"]) // 2:] for key in ("d", "gold"))
    order = np.argsort(other["d"])
    return float(np.mean(gold - np.interp(d, np.asarray(other["d"])[order],
                                          np.asarray(other["gold"])[order])))


def told(gaps):
    """A difference over seeds with its interval, and whether there is one."""
    return runs.with_interval(gaps) + (
        ", no difference" if runs.verdict(gaps) == "no difference" else "")


def page(curves, minutes, held_out, accuracy, config):
    """Markdown.

    curves: {(proxy, beta or "best of n"): [the curve of each seed]}; minutes: of each seed;
    held_out: {(proxy, beta): [gold of each seed]}, at the end of PPO, on held-out prompts;
    accuracy: {proxy: [of each seed]}.
    """
    text, table = runs.with_interval, lambda *heads: [
        "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines = ["# Over-optimisation\n", f"    {runs.as_typed('overoptimization', config)}\n",
             f"Means of {config.seeds} seeds ± half of their 95% interval (Student's t). d is the "
             "square root of the KL to the SFT model, in nats per sequence: along PPO the exact KL "
             f"of its rollouts, a point each {config.window} iterations; of best-of-n at most "
             "log n - (n - 1) / n. Gold and proxy are those of answers to training prompts. Few: "
             f"{config.few} prompts with rankings, and so fewer steps; many: all; an ensemble: the "
             f"mean of {config.members} networks. The runs behind this page, base model to labels "
             f"not counted, took {text(minutes, '.0f')} minutes a seed, one run at a time.\n",
             "![gold and proxy against the square root of the KL](overoptimization.png)\n",
             "## The peak\n", "The peak is the largest of noisy points, and so a little too high: "
             "a fall counts from two standard errors on. The counts are of seeds: in which gold "
             "was highest before the last point, fell by over two standard errors from there to "
             "the end, and the proxy rose meanwhile.\n",
             *table("proxy", "beta", "iteration of gold's peak", "d there", "gold there",
                    "d at the end", "gold at the end", "lost since the peak",
                    "proxy gained meanwhile", "peak before the end", "gold falls", "proxy rises",
                    "gold at the end, held-out prompts")]
    known = {key: [facts(c) for c in each] for key, each in curves.items() if key[1] != "best of n"}
    for (name, beta), rows in known.items():
        cells = [text([row[key] for row in rows], form) for key, form in (
            ("step", ".0f"), ("d_peak", ".2f"), ("gold_peak", "+.2f"), ("d_end", ".2f"),
            ("gold_end", "+.2f"), ("lost", ".2f"), ("proxy_gain", "+.2f"))]
        cells += [f"{sum(row[key] for row in rows)} of {len(rows)}" for key in (
            "reached", "falls")] + [f"{sum(r['proxy_gain'] > 0 for r in rows)} of {len(rows)}"]
        lines.append(f"| {name} | {beta:g} | {' | '.join(cells)} | "
                     f"{text(held_out[name, beta])} |")
    lines += ["", "## Sooner and lower, or the same curve?\n", "A larger beta less a smaller one "
              "with the same proxy, seed by seed. If the smaller one peaked sooner and lower, the "
              "first two would be above 0. If the KL penalty were early stopping, the last would "
              "be 0: gold over the second half of the run, less that of the smaller beta at the "
              "same d. Iterations, in steps of a point, where both peaks come before the end.\n",
              *table("proxy", "betas", "iterations until the peak", "gold at the peak",
                     "off the curve of the smaller beta")]
    tally = {"later": [], "higher": [], "off the curve": []}
    for name in PROXIES:
        for low, high in combinations(BETAS[name], 2):
            pairs = list(zip(known[name, high], known[name, low]))
            gaps = [[h["step"] - s["step"] for h, s in pairs],
                    [h["gold_peak"] - s["gold_peak"] for h, s in pairs],
                    [off(c, o) for c, o in zip(curves[name, high], curves[name, low])]]
            if not all(h["reached"] and s["reached"] for h, s in pairs):
                gaps[0] = None
            for word, gap in zip(tally, gaps):
                tally[word] += [] if gap is None else [runs.verdict(gap) == "gains"]
            lines.append(f"| {name} | {high:g} - {low:g} | " + " | ".join(
                "-" if gap is None else told(gap) for gap in gaps) + " |")
    lines += ["", "Of the larger beta, the interval above 0: " + ", ".join(
        f"{word} in {sum(each)} of {len(each)}" for word, each in tally.items()) + "."]
    lines += ["", "## Which proxy?\n", "Differences, seed by seed, of PPO at beta 0 and of the "
              f"best of {config.bon_samples}. Accuracy on held-out pairs, %: " + ", ".join(
                  f"{name} {text([100 * a for a in accuracy[name]], '.1f')}"
                  for name in PROXIES) + ".\n",
              *table("proxies", "gold at the peak", "d there", "gold at the end",
                     f"gold of the best of {config.bon_samples}")]
    for better, worse in (("many", "few"), ("few, ensemble", "few"), ("many, ensemble", "many")):
        if better in PROXIES and worse in PROXIES:
            pairs = list(zip(known[better, 0.0], known[worse, 0.0]))
            cells = [told([x[key] - y[key] for x, y in pairs])
                     for key in ("gold_peak", "d_peak", "gold_end")]
            best = zip(curves[better, "best of n"], curves[worse, "best of n"])
            cells.append(told([x["gold"][-1] - y["gold"][-1] for x, y in best]))
            lines.append(f"| {better} - {worse} | " + " | ".join(cells) + " |")
    lines += ["", "## The two forms\n", "Fitted to the gold of each seed. \"Peaks at\": the d of "
              "the fit's maximum, over the seeds where it lies among the d that were reached.\n",
              *table("proxy", "policy", "c + d (a - b d): a", "b", "R²", "peaks at",
                     "c + d (a - b ln d): a", "b", "R²", "peaks at")]
    for (name, beta), each in curves.items():
        cells = []
        for form in ("square", "ln"):
            fits = [fit(c["d"], c["gold"], form) for c in each]
            cells += [text([f[key] for f in fits], ".2f") for key in ("a", "b", "r2")]
            peaks = [f["peak"] for f, c in zip(fits, each) if f["peak"] <= max(c["d"])]
            cells.append(f"{np.mean(peaks):.2f} ({len(peaks)} of {len(fits)})" if peaks else "-")
        who = beta if beta == "best of n" else f"PPO, beta {beta:g}"
        lines.append(f"| {name} | {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(curves, path):
    """A column for each proxy: gold above, proxy below, against d; a colour a policy."""
    figure = runs.new_figure(12, 6.6)
    axes = figure.subplots(2, len(PROXIES), sharex=True, sharey="row", squeeze=False)
    for (name, beta), each in curves.items():
        who = beta if beta == "best of n" else f"PPO, beta {beta:g}"
        colour = COLOURS[POLICIES.index(beta)]
        for row, key in enumerate(("gold", "proxy")):
            axis = axes[row, list(PROXIES).index(name)]
            for i, c in enumerate(each):
                axis.plot(c["d"], c[key], color=colour, lw=1.1, marker="o", ms=2.5,
                          label=who if i == 0 else None)
    for i, name in enumerate(PROXIES):
        axes[0, i].set_title(f"proxy: {name}", fontsize=10)
    for axis, title in zip(axes[:, 0], ("gold reward", "proxy (standard deviations of\nSFT "
                                        "samples)")):
        axis.set_ylabel(title)
    reach = max(max(c["d"]) for each in curves.values() for c in each)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50) if tick <= reach]
    for axis in axes.ravel():
        # beta 0 goes five times as far as all others
        axis.set_xscale("symlog", linthresh=2, linscale=1.2)
        axis.set_xticks(ticks, ticks)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25, lw=0.6)
    figure.supxlabel("square root of the KL to the SFT model (KL in nats per sequence), "
                     "logarithmic from 2 on; a line a seed", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    figure.savefig(path, dpi=110)


def main(config):
    device = common.find_device(config.device)  # refuses one that is not there before the runs
    Path(config.pages).mkdir(parents=True, exist_ok=True)
    seeds = range(1, config.seeds + 1)
    with ThreadPoolExecutor(config.workers) as pool:
        for seed, base in zip(seeds, pool.map(lambda s: runs.pipeline(config, s), seeds)):
            path = Path(config.out) / f"seed{seed}" / f"few{config.few}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            fewer_rankings(base, path, config.few)
        jobs = [(n, s) for n in PROXIES for s in seeds]
        models = dict(zip(jobs, pool.map(lambda job: proxy(*job, config), jobs)))
        jobs = [(n, beta, s) for n in PROXIES for beta in BETAS[n] for s in seeds]
        folders = dict(zip(jobs, pool.map(lambda job: ppo(job, config), jobs)))
    best = [bon_curves(seed, config, device) for seed in seeds]
    curves, held_out = {}, {}
    for name in PROXIES:
        curves[name, "best of n"] = [one["curves"][name] for one in best]
        for beta in BETAS[name]:
            each = [folders[name, beta, s] for s in seeds]
            curves[name, beta] = [ppo_curve(folder, config.window) for folder in each]
            held_out[name, beta] = [runs.final(folder)["gold"] for folder in each]
    accuracy = {n: [runs.final(models[n, s])["accuracy"] for s in seeds] for n in PROXIES}
    minutes = [(one["seconds"] + sum(runs.final(folder)["seconds"] for job, folder in (
        models | folders).items() if job[-1] == s)) / 60 for s, one in zip(seeds, best)]
    text = page(curves, minutes, held_out, accuracy, config)
    print(text)
    (Path(config.pages) / "overoptimization.md").write_text(text, encoding="utf-8")
    draw(curves, Path(config.pages) / "overoptimization.png")
    print(f"written: {config.pages}/overoptimization.md, overoptimization.png")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
