"""True reward against KL: PPO, DPO and GRPO at several beta, and best-of-n, in one picture.

PPO, GRPO and DPO aim at the same optimum, pi* ~ pi_ref exp(r / beta): the first two for the reward
model's r, DPO for the r that its own log-ratios stand for. So do they reach the same frontier? All
start from one SFT model and one set of rankings, answer the same held-out prompts and are judged by
the same gold reward, which none of them sees. KL is that of their samples to the SFT model; that of
best-of-n is the bound log n - (n - 1) / n (Stiennon et al. 2020; exact where no two samples tie).

    python studies/frontier.py                 # trains what is missing in out/frontier, then plots
    python studies/frontier.py --workers=2     # two runs side by side, one thread each
    python studies/frontier.py --table=docs/results.md --out=docs    # only draws an earlier table
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config:
    init: str = "out/sft"  # policy that all methods start from
    data: str = "out/label/rankings.jsonl"  # rankings for DPO
    reward_model: str = "out/reward"  # for PPO, GRPO and best-of-n
    out: str = "out/frontier"  # a folder for every run, frontier.json, frontier.md, frontier.png
    seeds: Positive[int] = 3  # runs of every method at every beta
    eval_prompts: Positive[int] = 512  # held-out prompts
    temperature: Positive[float] = 1.0
    max_new_tokens: Positive[int] = 48
    missing_eos: float = -3.0  # score of a response without EOS
    workers: Positive[int] = 1  # runs side by side; above 1 with one thread each
    table: str = ""  # draw the table in this file, as in frontier.md, and train nothing
    seed: NotNegative[int] = 1  # of the best-of-n samples
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
import dpo
import grpo
import ppo
from data import batches
from data.load import load_prompts
from data.files import file_hash
from data.instruments import clustered_se
from data.records import embedded, question
from data.synthetic.gold import gold_reward
from evaluate import response_rows
from reward import load_reward_model
from studies import runs

# name: (stage, its settings, beta). In PPO and GRPO beta is in units of the score, in DPO in units
# of the log-odds of a label: the reward model's output before its stored scale divides it, which is
# 2.2 for the default run. So these are four times the same objective, up to rounding
METHODS = {
    "PPO": ("ppo", ppo.Config(), (0.02, 0.05, 0.15, 0.5)),
    "GRPO": ("grpo", grpo.resolve(grpo.Config(reward="model")), (0.02, 0.05, 0.15, 0.5)),
    "DPO": ("dpo", dpo.Config(), (0.05, 0.1, 0.3, 1.0)),
}
MOST = 16  # SFT samples a prompt, for best-of-n with n = 1, 2, 4, 8, 16


def train(job, config, hashes):
    """The final metrics of one run, trained now unless its folder holds it already.

    hashes: of the inputs, {"sft", "reward", "data"}. UserError if the folder holds a run with other
    flags or from other inputs: other prompts, another judge, an SFT model that is gone.
    """
    name, beta, seed = job
    stage, settings, _ = METHODS[name]
    folder = Path(config.out) / f"{name}-beta{beta}-seed{seed}"
    shared = ("init", "eval_prompts", "temperature", "max_new_tokens", "device")
    shared += ("data",) if name == "DPO" else ("reward_model", "missing_eos")
    flags = asdict(settings) | {field: getattr(config, field) for field in shared}
    flags |= dict(beta=beta, seed=seed)
    for field in ("out", "overwrite", "resume", "reference_cache"):
        flags.pop(field, None)
    more = dict(reference_cache=f"{config.out}/reference_logps") if name == "DPO" else {}
    made_from = {role: hashes[role] for role in ("sft", "data" if name == "DPO" else "reward")}
    last = runs.run(stage, folder, config, flags, made_from, **more)
    print(f"{name} beta={beta} seed={seed}: KL {last['kl']:.2f}, gold {last['gold']:.2f}, "
          f"win rate {last['gold_win_rate']:.1%}", flush=True)
    return last


def best_of_n(score, value, n):
    """Mean of `value` at the best of n samples by `score`, (prompts,); both (prompts, N).

    Exact over all subsets of size n: the k-th best of N samples is the best of C(N - k, n - 1) of
    the C(N, n) subsets. Equal scores share their places in the order given.
    """
    N = score.shape[1]
    order = np.argsort(-score, axis=1, kind="stable")
    weight = np.array([math.comb(N - k, n - 1) for k in range(1, N + 1)]) / math.comb(N, n)
    return np.take_along_axis(value, order, 1) @ weight


def best_of_n_rows(config, device):
    """A row of figures for every n, from MOST + 1 SFT samples a prompt: the last one is the
    opponent in the win rate."""
    policy, tokenizer, _ = common.load_policy(config.init, ("sft",), device)
    reward_model, _, _ = load_reward_model(config.reward_model, device)
    block_size = min(policy.config.block_size, reward_model.gpt.config.block_size)
    texts, ids, _ = zip(*load_prompts("synthetic", {"held-out": config.eval_prompts}, tokenizer,
                                      block_size - config.max_new_tokens)[0])
    drawn = batches.sample_texts(policy, tokenizer, ids, config.max_new_tokens,
                                 partial(common.uniforms, config.seed, "frontier", "best of n", 0),
                                 config.temperature, samples=MOST + 1)
    ids = [i for i in ids for _ in range(MOST + 1)]
    shape = (len(texts), MOST + 1)
    finished = np.array([s["finished"] for s in drawn]).reshape(shape)
    score = batches.over_rows(reward_model, *response_rows(ids, drawn), tokenizer.pad, device)
    score = np.where(finished, score.numpy().reshape(shape), config.missing_eos)
    gold = np.array([gold_reward(texts[i // shape[1]], s["text"])
                     for i, s in enumerate(drawn)]).reshape(shape)
    length = np.array([len(s["ids"]) for s in drawn]).reshape(shape)
    win = np.sign(gold[:, :-1] - gold[:, -1:]) / 2 + 0.5
    se = lambda x: clustered_se(x, [question(t) for t in texts])
    rows, n = [], 1
    while n <= MOST:
        pick = lambda value, n=n: best_of_n(score[:, :-1], value, n)
        rows.append(dict(
            method="best of n", beta=n, kl=math.log(n) - (n - 1) / n, kl_range=[0.0, 0.0],
            gold=pick(gold[:, :-1]).mean(), gold_se=se(pick(gold[:, :-1])), gold_range=[],
            win=pick(win).mean(), win_se=se(pick(win)), win_range=[],
            length=pick(length[:, :-1]).mean(), eos_rate=pick(finished[:, :-1]).mean()))
        n *= 2
    return rows


def summary(name, beta, finals):
    """One row of figures from the final metrics of all seeds: means, and the range over seeds.

    The standard errors are those of the prompts, which all seeds share: they do not shrink with
    more seeds. The spread over seeds comes on top.
    """
    mean = lambda key: float(np.mean([f[key] for f in finals]))
    span = lambda key: [min(f[key] for f in finals), max(f[key] for f in finals)]
    return dict(method=name, beta=beta, kl=mean("kl"), kl_range=span("kl"), gold=mean("gold"),
                gold_se=mean("gold_se"), gold_range=span("gold"), win=mean("gold_win_rate"),
                win_se=mean("gold_win_rate_se"), win_range=span("gold_win_rate"),
                length=mean("length"), eos_rate=mean("eos_rate"))


def table(rows):
    """Markdown; intervals are 95% over the prompts, ranges over the seeds."""
    lines = ["| method | beta or n | KL (nats) | gold reward | seeds | win rate | seeds | length | "
             "EOS rate |", "|" + "---|" * 9]
    span = lambda r, form: " to ".join(format(x, form) for x in r)
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['beta']} | {r['kl']:.2f} | {r['gold']:+.2f} ± "
            f"{1.96 * r['gold_se']:.2f} | {span(r['gold_range'], '+.2f')} | {r['win']:.1%} ± "
            f"{1.96 * r['win_se']:.1%} | {span(r['win_range'], '.1%')} | {r['length']:.1f} | "
            f"{r['eos_rate']:.1%} |")
    return "\n".join(lines)


def read_table(path):
    """The rows that `table` wrote into a file, as far as `plot` needs them."""
    head, rows = table([]).split("\n")[0], []
    try:
        text = Path(path).read_text()
    except OSError:
        raise UserError(f"--table={path}: no such file") from None
    if head not in text:
        raise UserError(f"--table={path}: there is no table in it as this study writes it")
    for line in text.split(head)[1].strip().split("\n\n")[0].split("\n")[1:]:
        method, beta, kl, gold, _, win, *_ = [cell.strip() for cell in line.strip("| ").split(" |")]
        (gold, gold_se), (win, win_se) = ([float(x.strip("%")) for x in cell.split(" ± ")]
                                          for cell in (gold, win))
        rows.append(dict(method=method, beta=beta, kl=float(kl), gold=gold, gold_se=gold_se / 1.96,
                         win=win / 100, win_se=win_se / 196))
    return rows


COLOURS = ("#0072B2", "#000000", "#009E73", "#D55E00")  # Okabe and Ito: also for the colour-blind


def plot(rows, path):
    """Gold reward and win rate against sqrt(KL), a line a method; bars are 95% intervals."""
    figure = runs.new_figure(9, 4.8)
    panels = list(zip(figure.subplots(1, 2), ("gold", "win"),
                      ("gold reward", "win rate against the SFT model")))
    colours = dict(zip(dict.fromkeys(r["method"] for r in rows), COLOURS))
    for axis, key, label in panels:
        for name, marker in zip(colours, "os^D"):
            part = sorted((r for r in rows if r["method"] == name), key=lambda r: r["kl"])
            axis.errorbar([max(r["kl"], 0) ** 0.5 for r in part], [r[key] for r in part],
                          [1.96 * r[f"{key}_se"] for r in part], marker=marker, ms=5, capsize=2,
                          lw=1.2, elinewidth=0.7, label=name, color=colours[name])
        axis.set_ylabel(label)
        axis.grid(alpha=0.25, lw=0.6)
        axis.margins(0.1)
    panels[1][0].axhline(0.5, color="grey", lw=0.8)
    figure.supxlabel("square root of the KL to the SFT model (KL in nats per sequence)",
                     fontsize="medium")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False, title="numbers: beta, or n; bars: 95% intervals over the prompts")
    figure.draw_without_rendering()  # the layout, which says where a point is in the picture
    for axis, key, _ in panels:
        place_labels(axis, [(max(r["kl"], 0) ** 0.5, r[key], str(r["beta"]), colours[r["method"]])
                            for r in rows])
    figure.savefig(path, dpi=150)


def place_labels(axis, labels, size=8):
    """Write the text of each label, (x, y, text, colour), beside its point: near, and where it
    covers least of the lines, bars and points, and no text before it."""
    from matplotlib.patheffects import withStroke
    scale = 72 / axis.figure.dpi  # pixels to points, the unit of fonts
    place = lambda xy: axis.transData.transform(xy) * scale
    drawn = [line.get_transform().transform(line.get_xydata()) * scale for line in axis.lines
             if line.get_linestyle() != "None"]
    drawn += [place(bar) for bars in axis.collections for bar in bars.get_segments()]
    ink = np.concatenate([start + (end - start) * np.linspace(0, 1, int(math.dist(start, end)) + 2)
                          [:, None] for path in drawn for start, end in zip(path, path[1:])])
    markers, boxes = place([label[:2] for label in labels]), []
    inside = lambda points, middle, half: (np.abs(points - middle) < half).all(-1).sum()
    for at, (x, y, text, colour) in zip(markers, labels):
        half = np.array([0.32 * size * len(text), 0.5 * size])  # half the width and height

        def cost(offset, at=at, half=half):
            return (math.hypot(*offset) + 2 * inside(ink, at + offset, half + 1)
                    + 50 * inside(markers, at + offset, half + 3)
                    + 500 * sum(inside(m, at + offset, half + h + 1) for m, h in boxes))

        angles = np.arange(0, 2 * math.pi, math.pi / 12)
        ways = np.stack([np.cos(angles), np.sin(angles)], 1)
        offset = min((way * (half + gap) for way in ways for gap in (4, 6, 8, 12)), key=cost)
        boxes.append((at + offset, half))
        axis.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=size,
                      color=colour, ha="center", va="center",
                      path_effects=[withStroke(linewidth=2, foreground="white")])


def main(config):
    if config.table:
        plot(read_table(config.table), f"{config.out}/frontier.png")
        print(f"written: {config.out}/frontier.png")
        return
    device = common.set_up(config, "frontier")  # refuses a device that is not there before the runs
    for field, stage in (("init", "sft"), ("data", "label"), ("reward_model", "reward")):
        common.ensure_input(config, field, stage)
    if embedded(config.data) is None:
        raise UserError(f"--data={config.data}: expected rankings of the embedded world, as "
                        "label.py writes them: of other data there is no gold reward")
    jobs = [(name, beta, seed) for name, (_, _, betas) in METHODS.items() for beta in betas
            for seed in range(1, config.seeds + 1)]
    hashes = dict(sft=common.load_checkpoint(config.init, ("sft",))["hash"],
                  reward=common.load_checkpoint(config.reward_model, ("reward",))["hash"],
                  data=file_hash(config.data)[:16])
    with ThreadPoolExecutor(config.workers) as pool:
        finals = dict(zip(jobs, pool.map(lambda job: train(job, config, hashes), jobs)))
    rows = best_of_n_rows(config, device)
    for name, (_, _, betas) in METHODS.items():
        for beta in betas:
            rows.append(summary(name, beta, [f for (n, b, _), f in finals.items()
                                             if (n, b) == (name, beta)]))
    out = Path(config.out)
    (out / "frontier.json").write_text(cli.to_json(rows, indent=1) + "\n")
    (out / "frontier.md").write_text(table(rows) + "\n")
    print(table(rows))
    plot(rows, out / "frontier.png")
    print(f"\nwritten: {out}/frontier.json, frontier.md, frontier.png")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
