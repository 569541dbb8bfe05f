"""What a step costs against the length, the vocabulary, the size of the model and that of a file.

    python studies/costs.py                  # docs/costs.md and docs/costs.png; 3 minutes

Beside each time stands its bound: of a training step the operations that it needs over the rate of
a matrix product, of decoding the bytes that it has to read over the bandwidth, or its operations
where they take longer; both are measured in the same process. Of memory the bound is the formula
of studies/memory.py, which counts tensors; measured is what a process has above its imports. Of a
file it is json.loads of every line and the tokenizer on every text, and for memory its own size.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive


@dataclass
class Config:
    out: str = "docs"  # folder of costs.md and costs.png
    steps: Positive[int] = 3  # measured for each point
    points: Positive[int] = 9  # of an axis, at most: the first ones
    device: str = "auto"  # "auto" (a GPU where there is one), "cpu", "cuda"
    child: str = ""  # for the study itself: one point, in JSON


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import common
from data import tokens
from data.load import load_rankings
from data.tokenizer import load_tokenizer
from model import GPTConfig
from studies import bench, memory, runs

MODEL = dict(vocab_size=4160, n_tokens=4096, block_size=2112, n_layer=6, n_head=4, n_embd=256)
WIDTHS = ((128, 2), (256, 4), (384, 6), (512, 8), (768, 12))  # with so many layers
# {axis: (label, {value: (changes of MODEL, P and R of a training step, P and R of decoding)})}
AXES = {
    "length": ("tokens of a row", {
        n: ({}, (n // 2, n // 2), (n - 32, 32)) for n in (64, 128, 256, 512, 1024, 2048)}),
    "vocabulary": ("tokens of the vocabulary", {
        n: (dict(vocab_size=n + 64, n_tokens=n), (64, 64), (32, 32))
        for n in (512, 2048, 8192, 32768, 131072)}),
    "model": ("parameters of the blocks", {
        12 * layers * width**2: (dict(n_layer=layers, n_embd=width, n_head=width // 64),
                                 (64, 64), (32, 32)) for width, layers in WIDTHS})}
FILES = (1, 4, 16, 64)  # MB
STAGES = dict(sft="training step", generate="decoding", file="reading a file of pairs")
ROWS = 4  # of a step


def point(stage, changes, P, R, config):
    """One child: {seconds, bound, mib, mib_bound}; seconds of training or decoding per token."""
    if stage == "file":
        return file_point(P, config)
    size = GPTConfig(**MODEL | changes)
    bench.SIZES["tiny"] = size
    before = resident()
    row = bench.measure(bench.Config(stage=stage, batch_size=ROWS, prompt=P, new=R,
                                     steps=config.steps, device=config.device))
    case = memory.Case("sft" if stage == "sft" else "grpo", size, ROWS, P, R, ROWS,
                       gpu=row["device"] != "cpu", pieces=False, drops=False)
    _, formula = memory.peak(case, memory.TRAINING if stage == "sft" else memory.ROLLOUT)
    if stage == "generate":  # a network alone, that is not trained
        formula += memory.parameters(size) - sum(memory.held(case).values())
    second = 1 / row["tok_per_s"]
    return dict(seconds=second, bound=second * max(row["mfu"], row.get("bandwidth_share", 0)),
                mib=row["peak_mib"] - (before if row["device"] == "cpu" else 0),
                mib_bound=formula / memory.MIB)


def resident():
    """The largest resident size so far, MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def file_point(megabytes, config):
    """Seconds and memory of load_rankings, for a file of so many MB of made up pairs."""
    path, rng = Path(config.out) / "costs.jsonl", common.stream(1, "costs", "words")
    words = [f"word{n}" for n in range(1000)]
    text = lambda n: " ".join(words[i] for i in rng.integers(0, len(words), n))
    n = int(megabytes * 10**6 / 1500)  # pairs of some 1,500 bytes
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            file.write(json.dumps(dict(prompt=f"{i} {text(60)}", chosen=text(60),
                                       rejected=text(60))) + "\n")
    tokens.CACHE = Path(config.out) / "costs-cache"
    try:
        start, tokenizer = time.perf_counter(), load_tokenizer("synthetic")
        with open(path, encoding="utf-8") as file:
            for line in file:
                for value in json.loads(line).values():
                    tokenizer.encode(value)
        bound, before, start = time.perf_counter() - start, resident(), time.perf_counter()
        load_rankings(str(path), tokenizer, 4096)
        return dict(seconds=time.perf_counter() - start, bound=bound, mib=resident() - before,
                    mib_bound=path.stat().st_size / 2**20)
    finally:
        path.unlink()
        for file in tokens.CACHE.glob("*"):
            file.unlink()
        tokens.CACHE.rmdir()


def child(config, *task):
    line = subprocess.run(
        [sys.executable, __file__, f"--child={json.dumps(task)}", f"--out={config.out}",
         f"--steps={config.steps}", f"--device={config.device}"],
        check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
    return json.loads(line)


def table(rows):
    """One line a point, in Markdown."""
    head = ("axis", "value", "what", "time", "bound", "times the bound", "memory, MiB", "bound")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        unit, factor = ("s", 1) if row["stage"] == "file" else ("us/token", 1e6)
        lines.append(
            f"| {row['axis']} | {row['value']:,} | {STAGES[row['stage']]} "
            f"| {row['seconds'] * factor:.4g} {unit} | {row['bound'] * factor:.4g} {unit} "
            f"| {row['seconds'] / row['bound']:.2f} "
            f"| {row['mib']:,.0f} | {row['mib_bound']:,.0f} |")
    return "\n".join(lines)


def plot(rows, path):
    """Time above, memory below, a column for each axis; bounds are dashed."""
    figure = runs.new_figure(12, 6)
    from matplotlib.ticker import NullLocator
    labels = {axis: label for axis, (label, _) in AXES.items()} | dict(file="MB of the file")
    panels = figure.subplots(2, len(labels), sharex="col")
    colours = dict(sft="#0072B2", generate="#D55E00", file="#009E73")
    for name, label, (time_axis, memory_axis) in zip(labels, labels.values(), panels.T):
        for stage, colour in colours.items():
            part = [r for r in rows if (r["axis"], r["stage"]) == (name, stage)]
            x, factor = [r["value"] for r in part], 1 if stage == "file" else 1e6
            for axis, key, bound, scale in ((time_axis, "seconds", "bound", factor),
                                            (memory_axis, "mib", "mib_bound", 1)):
                axis.plot(x, [r[key] * scale for r in part], "o-", ms=4, lw=1.3, color=colour,
                          label=STAGES[stage])
                axis.plot(x, [r[bound] * scale for r in part], "--", lw=1.1, color=colour,
                          label=f"{STAGES[stage]}, bound")
        for axis in (time_axis, memory_axis):
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.25, lw=0.6)
        x = sorted({r["value"] for r in rows if r["axis"] == name})
        memory_axis.set_xticks(x, [short(value) for value in x])
        memory_axis.xaxis.set_minor_locator(NullLocator())
        memory_axis.set(xlabel=label, ylabel="memory, MiB")
        time_axis.set_ylabel("seconds" if name == "file" else "microseconds a token")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6,
                  frameon=False)
    figure.savefig(path, dpi=120)


def short(number):
    """12,345,678 as 12M, 131,072 as 128k."""
    if number >= 2**18:
        return f"{number / 1e6:.2g}M"
    return f"{number // 1024}k" if number >= 1024 else str(number)


def main(config):
    if config.child:
        stage, changes, P, R = json.loads(config.child)
        print(json.dumps(point(stage, changes, P, R, config)))
        return
    tasks = [(axis, value, stage, changes, *work)
             for axis, (_, points) in AXES.items()
             for value, (changes, *both) in list(points.items())[:config.points]
             for stage, work in zip(("sft", "generate"), both)]
    tasks += [("file", size, "file", {}, size, 0) for size in FILES[:config.points]]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [dict(axis=axis, value=value, stage=task[0], **child(config, *task))
            for axis, value, *task in cli.progress(tasks, "costs")]
    (out / "costs.md").write_text(
        "# What a step costs\n\n`python studies/costs.py`; docs/speed.md says what is what.\n\n"
        + table(rows) + "\n")
    plot(rows, out / "costs.png")
    print(table(rows), f"\nwritten: {out}/costs.md, costs.png")


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
