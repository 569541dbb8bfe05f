"""Goodhart: how far can a reward model be optimised before the true reward falls?

As Gao et al. (2022) measured it: gold and proxy against d, the square root of the KL to the SFT
model, for best-of-n and along PPO at three betas; proxies from few and from many comparisons, one
network or an ensemble. They found gold ~ d (a - b d) for best-of-n and d (a - b ln d) for RL; both
forms are fitted to both here, with a constant c in front, for R at d = 0 is measured as well.

    python studies/overoptimization.py                   # 3 seeds; resumes where it stopped
    python studies/overoptimization.py --workers=2       # two runs side by side, one thread each

Does a smaller beta peak sooner and lower, as the texts say, or is the KL penalty like stopping
early (Gao et al., section 3.6), so that all betas lie on one curve? The page answers by figures.
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    window: Positive[int] = 5  # iterations of PPO that make a point
    bon_prompts: Positive[int] = 128  # held-out prompts of best-of-n
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
POLICIES = ("best of n", 0.0, 0.05, 0.2)  # the numbers are betas of PPO
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
    """dict of d, gold, proxy, each (points,), means of `window` iterations; and se, that of gold.

    Gold and score are those of the rollouts, d is the root of the mean exact KL. The error comes
    from how much gold jumps from one iteration to the next: half the mean square of the jumps is
    the variance of one, whatever the trend.
    """
    rows = [row for row in runs.log_rows(folder, "step") if row["score"] is not None]
    n = max(1, len(rows) // window)
    mean = lambda key: np.array([np.mean([r[key] for r in part])
                                 for part in np.array_split(np.array(rows, object), n)])
    jumps = np.diff([row["gold"] for row in rows])
    return dict(d=np.sqrt(np.maximum(mean("kl_exact"), 0)), gold=mean("gold"), proxy=mean("score"),
                se=float(np.sqrt(np.mean(jumps ** 2) / 2 / window)) if len(jumps) else 0.0)


def bon_curves(seed, config, device):
    """{proxy: dict of d, gold, proxy, each (n = 1, 2, 4, ...)} of best-of-n, from SFT samples."""
    base, out = Path(config.runs.format(seed=seed)), Path(config.out) / f"seed{seed}"
    folders = {name: proxy(name, seed, config) for name in PROXIES}
    key = [config.bon_prompts, config.bon_samples, config.max_new_tokens,
           runs.inputs(dict(init=str(base / "sft"))),
           *(runs.inputs(dict(reward_model=str(f))) for f in folders.values())]
    path = out / "best_of_n.json"
    if path.exists() and (saved := json.loads(path.read_text()))["key"] == key:
        return saved["curves"]
    policy, tokenizer, _ = common.load_policy(base / "sft", ("sft",), device)
    texts, ids, _ = zip(*load_prompts("synthetic", {"held-out": config.bon_prompts}, tokenizer,
                                      policy.config.block_size - config.max_new_tokens)[0])
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
    with whole_file(path, "w", encoding="utf-8") as file:
        file.write(cli.to_json(dict(key=key, curves=curves)) + "\n")
    return curves


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
    return dict(a=float(a), b=float(b), peak=float(peak),
                r2=float(1 - ((y - X @ [c, a, b]) ** 2).sum() / spread) if spread else math.nan)


def facts(curve):
    """What one curve of PPO shows: where gold peaks, and the checks of over-optimisation."""
    top, d, gold, score = int(np.argmax(curve["gold"])), curve["d"], curve["gold"], curve["proxy"]
    error = math.sqrt(2) * curve["se"]  # of a difference of two points
    return dict(d_peak=float(d[top]), gold_peak=float(gold[top]), point=top + 1.0,
                d_end=float(d[-1]), gold_end=float(gold[-1]),
                proxy_rises=bool(score[-1] > score[top]),
                gold_falls=bool(gold[top] - gold[-1] > 2 * error))


def matched(curve, other):
    """Gold at the end of one curve less that of another at the same d: 0 if both are one curve."""
    order = np.argsort(other["d"])
    return float(curve["gold"][-1] - np.interp(curve["d"][-1], np.asarray(other["d"])[order],
                                               np.asarray(other["gold"])[order]))


def page(curves, config):
    """Markdown; curves: {(proxy, beta or "best of n"): [the curve of each seed]}."""
    lines = ["# Over-optimisation\n", f"    {runs.as_typed('overoptimization', config)}\n",
             f"Means of {config.seeds} seeds ± half of their 95% interval (Student's t). d is the "
             "square root of the KL to the SFT model, in nats per sequence: along PPO the exact KL "
             f"of its rollouts, a point each {config.window} iterations; of best-of-n "
             f"log n - (n - 1) / n. Few: {config.few} prompts with rankings; many: all; an "
             f"ensemble: the mean of {config.members} networks.\n",
             "![gold and proxy against the square root of the KL](overoptimization.png)\n",
             "## The peak\n", "| proxy | beta | point of gold's peak | d there | gold there "
             "| d at the end | gold at the end | seeds: proxy above its value at the peak "
             "| seeds: gold fell by over 2 standard errors |", "|" + "---|" * 9]
    text = runs.with_interval
    known = {key: [facts(c) for c in each] for key, each in curves.items() if key[1] != "best of n"}
    for (name, beta), rows in known.items():
        get = lambda key, form, rows=rows: text([row[key] for row in rows], form)
        lines.append(f"| {name} | {beta:g} | {get('point', '.1f')} | {get('d_peak', '.2f')} | "
                     f"{get('gold_peak', '+.2f')} | {get('d_end', '.2f')} | "
                     f"{get('gold_end', '+.2f')} | "
                     f"{sum(r['proxy_rises'] for r in rows)} of {len(rows)} | "
                     f"{sum(r['gold_falls'] for r in rows)} of {len(rows)} |")
    lines += ["", "## Sooner and lower, or the same curve?\n", "Against beta 0 and the same proxy, "
              "seed by seed. If a smaller beta peaked sooner and lower, the first two would be "
              "above 0. If KL were early stopping, the last would be 0: gold at the end less that "
              "of beta 0 at the same d.\n", "| proxy | beta | points until the peak, more | gold "
              "at the peak, more | off the curve of beta 0 |", "|---|---|---|---|---|"]
    for (name, beta), rows in known.items():
        if beta:
            zero = known[name, 0.0]
            more = [text([r[k] - z[k] for r, z in zip(rows, zero)])
                    for k in ("point", "gold_peak")]
            off = [matched(c, o) for c, o in zip(curves[name, beta], curves[name, 0.0])]
            lines.append(f"| {name} | {beta:g} | {more[0]} | {more[1]} | {text(off)} |")
    lines += ["", "## The two forms\n", "Fitted to gold, all seeds together. The peak is that of "
              "the fit; - where it has none among the d that were reached.\n",
              "| proxy | policy | c + d (a - b d): a, b | R² | peak "
              "| c + d (a - b ln d): a, b | R² | peak |", "|" + "---|" * 8]
    for (name, beta), each in curves.items():
        d, gold = (np.concatenate([c[key] for c in each]) for key in ("d", "gold"))
        cells = []
        for form in ("square", "ln"):
            f = fit(d, gold, form)
            cells += [f"{f['a']:.2f}, {f['b']:.2f}", f"{f['r2']:.2f}",
                      "-" if math.isnan(f["peak"]) or f["peak"] > d.max() else f"{f['peak']:.2f}"]
        who = beta if beta == "best of n" else f"PPO, beta {beta:g}"
        lines.append(f"| {name} | {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(curves, path):
    """A column for each proxy: gold (solid) and proxy (dashed) against d, a colour a policy."""
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
    for axis in axes.ravel():
        axis.grid(alpha=0.25, lw=0.6)
    figure.supxlabel("square root of the KL to the SFT model (KL in nats per sequence); a line a "
                     "seed", fontsize="medium")
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
        list(pool.map(lambda job: proxy(*job, config), [(n, s) for n in PROXIES for s in seeds]))
        jobs = [(n, beta, s) for n in PROXIES for beta in BETAS[n] for s in seeds]
        folders = dict(zip(jobs, pool.map(lambda job: ppo(job, config), jobs)))
    best = [bon_curves(seed, config, device) for seed in seeds]
    curves = {}
    for name in PROXIES:
        curves[name, "best of n"] = [one[name] for one in best]
        for beta in BETAS[name]:
            curves[name, beta] = [ppo_curve(folders[name, beta, s], config.window) for s in seeds]
    text = page(curves, config)
    print(text)
    (Path(config.pages) / "overoptimization.md").write_text(text, encoding="utf-8")
    draw(curves, Path(config.pages) / "overoptimization.png")
    print(f"written: {config.pages}/overoptimization.md, overoptimization.png")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
