"""The curves of runs, from their logs: rewards, KL, entropy, length, losses, of several at once.

    python plot.py out/ppo                           # writes out/ppo/curves.png
    python plot.py out/ppo out/grpo --out=both.png   # the same quantity of both in one panel
    python plot.py out/ppo --text=true               # characters in the terminal, no matplotlib
    python plot.py out/report                        # evaluate.py's report: out/report/report.png

Of a reward model also its calibration: how often it is right against how sure it is. A run may be
of any stage, and may still be going on. Where it has only a final figure and another
run has a curve, it is a level (label.py, evaluate.py). docs/log.md defines every quantity.
"""

from dataclasses import dataclass

import cli
from cli import UserError, Words, note
from data.files import parse_json, refusing, whole_file


@dataclass
class Config:
    # --- what to draw, and where
    folders: Words = ()  # of runs: out/ppo, or several
    out: str = ""  # picture to write; "" is curves.png in the first folder, of a report report.png
    text: bool = False  # characters in the terminal instead


CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import math
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

# (title with the unit; the fields in it, the first solid, the second dashed; a level that means
# something, or None). A panel is drawn where a run has a curve for it
PANELS = (
    ("loss (nats per token)", ("token_loss",), None),
    ("loss (nats per pair; 0.69: a coin toss)", ("pair_loss",), math.log(2)),
    ("loss of IPO (squared nats per pair)", ("ipo_loss",), None),
    ("loss of KTO", ("kto_loss",), None),
    ("accuracy (share of pairs)", ("accuracy",), 0.5),
    ("right answers (share)", ("right",), None),
    ("gold — and score - -", ("gold", "score"), None),
    ("KL to reference (nats per sequence)", ("kl",), 0),
    ("beta of the controller (score per nat)", ("beta",), None),
    ("entropy (nats per token)", ("entropy",), None),
    ("length (tokens)", ("length",), None),
    ("EOS rate (share of answers)", ("eos_rate",), None),
    ("groups without a signal (share)", ("no_signal",), None),
    ("clip fraction (share of tokens)", ("clip_fraction",), None),
    ("explained variance of the critic", ("explained_variance",), 0),
    ("policy loss", ("policy_loss",), None),
    ("value loss (score squared)", ("value_loss",), None),
    ("KL loss", ("kl_loss",), None),
    ("loss of the text (nats per token)", ("ptx_loss",), None),
    ("implicit reward: chosen —, rejected - -", ("chosen_reward", "rejected_reward"), None),
    ("log p: chosen —, rejected - - (nats)", ("chosen_logp", "rejected_logp"), None),
    ("gradient norm", ("grad_norm",), None))
FIELDS = {field for _, fields, _ in PANELS for field in fields}
LOG = {"token_loss", "value_loss", "grad_norm"}  # on a log scale where they change fivefold
# Okabe and Ito: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STEPS = dict(pretrain="texts a step", sft="dialogues a step", reward="prompts a step",
             dpo="prompts a step", ppo="answers an iteration", grpo="answers an iteration")


class Run(NamedTuple):
    stage: str
    label: str  # folder, stage, number of points and samples
    target: float  # of the KL controller, nats per sequence; 0 without one
    train: dict  # field: {step: value}, from the training batches
    held_out: dict  # the same of what is measured on held-out data
    calibration: list = []  # of a reward model: {confidence, accuracy, pairs} of each bin


# --- the log -------------------------------------------------------------------------------------


def read_rows(folder):
    """The rows of a folder's log, the last one left out while it is being written."""
    path, rows = Path(folder) / "log.jsonl", []
    if not path.is_file():
        raise UserError(f"{folder} holds no run: there is no log.jsonl in it")
    lines = path.read_text(errors="replace").rstrip("\n").split("\n")
    for n, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line))
        except ValueError:
            if n < len(lines) or n == 1:
                raise UserError(f"{path}:{n}: not JSON, so no log of this project") from None
            note(f"{path}: the last line is incomplete, so it is left out; is the run going on?")
    if not all(isinstance(row, dict) and "kind" in row for row in rows) or not (
            rows[0]["kind"] == "config" and isinstance(rows[0].get("config"), dict)
            and "stage" in rows[0]):
        raise UserError(f"{path} is no log of this project: its first row says no stage, or a "
                        "later one no kind")
    return rows


def by_unit(row, stage, flags):
    """The fields of a row under the names of PANELS, where a name has one unit and one meaning."""
    row = dict(row)
    if "loss" in row:
        kind = flags.get("loss", stage)  # dpo.py has several
        row[dict(pretrain="token_loss", sft="token_loss", ipo="ipo_loss", ipo_mean="ipo_loss",
                 kto="kto_loss").get(kind, "pair_loss")] = row["loss"]
    if stage not in ("reward", "dpo"):
        row["right"] = row.pop("accuracy", None)
    if stage == "grpo" and row["right"] is not None:  # the verifier's score is the same number
        row.pop("score", None)
    if not flags.get("kl_target") or row["kind"] == "final":  # a constant; that of the last step
        row.pop("beta", None)
    if flags.get("kl_in") == "reward":  # 0 throughout
        row.pop("kl_loss", None)
    return row


def read_run(folder):
    """The Run in a folder. A number stands at the steps that the weights it was measured on had
    made; sft.py and dpo.py do not say them for held-out data: after the last step with a row."""
    with refusing(f"{folder}/log.jsonl is no log of this project"):
        first, *rows = read_rows(folder)
        stage, flags = first["stage"], first["config"]
        train, held_out, made = {}, {}, 0
        prompts = f"up to {flags['samples']}" if "samples" in flags and stage == "sft" else None
        for row in rows:
            if row["kind"] not in ("step", "validation", "final"):
                continue
            curves, step = train if row["kind"] == "step" else held_out, row.get("step")
            step = made if step is None else step
            if type(step) is not int or abs(step) > 2**53:
                raise TypeError(f"step {step!r}")
            for field, value in by_unit(row, stage, flags).items():
                if field in FIELDS and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(field, {})[step] = value  # the last row of a step counts
            made = step + 1 if row["kind"] == "step" else made
            prompts = row.get("judged", prompts)
        label = [f"{folder}: {stage}"]
        if stage in STEPS:
            points = {step for curve in train.values() for step in curve}
            label += [f"{len(points)} points", f"{flags['batch_size']} {STEPS[stage]}"]
        label += [f"{prompts} prompts held out"] * bool(prompts)
        target = flags.get("kl_target") or 0
        label += [f"KL target {target:g}"] * bool(target)
        ordered = lambda curves: {field: dict(sorted(c.items())) for field, c in curves.items()}
        calibration = rows[-1].get("calibration", []) if rows else []
        return Run(stage, ", ".join(label), target, ordered(train), ordered(held_out), calibration)


def panels_of(runs):
    """The rows of PANELS in which a run has a curve: more than one point."""
    points = lambda run, field: len(run.train.get(field, ())) + len(run.held_out.get(field, ()))
    panels = [panel for panel in PANELS
              if any(points(run, field) > 1 for run in runs for field in panel[1])]
    if not panels:
        raise UserError("there is no curve to draw: no run has logged a second point yet (label.py "
                        "and evaluate.py log final figures only, levels beside another run)")
    return panels


def steps_of(runs):
    """What the axis of steps counts."""
    iterations = {run.stage in ("ppo", "grpo") for run in runs if run.stage in STEPS}
    return "step, of PPO and GRPO iteration" if len(iterations) > 1 else \
        "iteration" if True in iterations else "step"


def smooth(values):
    """Running mean over up to a twelfth of the values; towards the ends over fewer, so that it is
    centred everywhere."""
    n, most = len(values), len(values) // 24
    width = [min(i, n - 1 - i, most) for i in range(n)]
    return [math.fsum(values[i - w:i + w + 1]) / (2 * w + 1) for i, w in enumerate(width)]


# --- a picture -----------------------------------------------------------------------------------


def matplotlib():
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no state
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib; --text=true draws "
                        "without it") from None
    return Figure, Line2D


def picture(runs):
    """A matplotlib Figure: a panel for each quantity, a colour for each run."""
    Figure, Line2D = matplotlib()
    from matplotlib.ticker import LogLocator, NullLocator
    panels = panels_of(runs)
    calibrated = [(c, run.calibration) for c, run in zip(COLOURS, runs) if run.calibration]
    total = len(panels) + bool(calibrated)
    across = min(3, total)
    down = math.ceil(total / across)
    figure = Figure(figsize=(max(6.2, 3.1 * across), 0.7 + 0.18 * len(runs) + 2.0 * down),
                    layout="constrained")
    for n, (title, fields, level) in enumerate(panels):
        axis = figure.add_subplot(down, across, n + 1)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if level is not None:
            axis.axhline(level, color="grey", lw=0.8)
        for colour, run in zip(COLOURS, runs):
            for style, field in zip(("-", "--"), fields):
                draw(axis, run.train.get(field, {}), run.held_out.get(field, {}), colour, style)
            if fields == ("kl",) and run.target:
                axis.axhline(run.target, color=colour, lw=1, ls=":")
        if fields[0] in LOG and 0 < 5 * axis.dataLim.y0 < axis.dataLim.y1:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
        if n + across >= len(panels):
            axis.set_xlabel(steps_of(runs), fontsize=8)
    if calibrated:
        draw_calibration(figure.add_subplot(down, across, total), calibrated)
    handles = [Line2D([], [], color=colour, label=run.label) for colour, run in zip(COLOURS, runs)]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, title_fontsize=8,
                  frameon=False, alignment="left",
                  title="thin: as logged; thick: running mean; circles: held out"
                  + "; dotted: KL target" * any(run.target for run in runs))
    return figure


def draw_calibration(axis, runs):
    """Accuracy against confidence, [(colour, bins), ...]; of a single run with the pairs of each
    bin. Below the diagonal it claims more than it knows."""
    axis.set_title("calibration (share of held-out pairs)", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, lw=0.6)
    axis.plot([0.5, 1], [0.5, 1], color="grey", lw=0.8)
    for colour, bins in runs:
        x, y = ([b[name] for b in bins] for name in ("confidence", "accuracy"))
        axis.plot(x, y, color=colour, lw=1.2, marker="o", ms=4)
        for b in bins if len(runs) == 1 else ():
            axis.text(b["confidence"], 0.02, f"{b['pairs']:,}", fontsize=6, rotation=90,
                      ha="center", va="bottom", transform=axis.get_xaxis_transform())
    axis.margins(x=0.05, y=0.05)
    axis.set_ylim(axis.get_ylim()[0] - 0.12)  # room for the numbers
    axis.set_xlabel("confidence in the winner", fontsize=8)
    axis.set_ylabel("accuracy" + "; number: pairs" * (len(runs) == 1), fontsize=8)


def draw(axis, train, held_out, colour, style):
    """One quantity of one run: thin what was logged, thick its running mean, circles held out."""
    if len(train) + len(held_out) == 1:
        axis.axhline(*train.values(), *held_out.values(), color=colour, lw=1, ls=style)
        return
    steps, values = list(train), list(train.values())
    axis.plot(steps, values, color=colour, lw=0.7, alpha=0.45)
    axis.plot(steps, smooth(values), color=colour, lw=1.5, ls=style, marker="." * (len(steps) == 1))
    axis.plot(list(held_out), list(held_out.values()), color=colour, lw=0.6, ls=style, marker="o",
              ms=4, mfc="white" if style == "-" else colour)


# --- the picture of a report ---------------------------------------------------------------------

NUMBERS = ("distinct", "text_loss", "entropy", "length")  # not rates: each has its own axis


def read_report(folder):
    """The report.json that evaluate.py wrote into a folder, or None."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        return None
    try:
        report = parse_json(path.read_text())
        report["checkpoints"], report["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no report of evaluate.py") from None
    return report


def report_picture(report):
    """A matplotlib Figure of a report: reward against KL, what each checkpoint does, as rates with
    their intervals, and some numbers. Bars are 95% intervals."""
    Figure, Line2D = matplotlib()
    found = dict(zip(report["checkpoints"], COLOURS))
    metrics = report["checkpoints"]
    rates = [(name, textwrap.fill(row["label"], 38)) for name, row in report["rows"].items()
             if any(f"{name}_low" in m for m in metrics.values())]
    numbers = [(name, report["rows"][name]["label"]) for name in NUMBERS
               if any(m.get(name) is not None for m in metrics.values())]
    rewards = any(m.get(name) is not None for m in metrics.values() for name in ("gold", "score"))
    tall = ([4] if rewards else []) + [1] * len(numbers)  # the panels on the left, below nothing
    lines = max([label.count("\n") + 1 for _, label in rates], default=0)
    height = max(4.8, len(rates) * max(0.17 * lines, 0.24 + 0.048 * len(found)) + 0.6,
                 0.8 * sum(tall))
    figure = Figure(figsize=(9.6, height), layout="constrained")
    grid = figure.add_gridspec(len(tall) + 1, 2, width_ratios=(1, 1.15),
                               height_ratios=(*tall, max(0.01, height / 0.8 - sum(tall))))
    if rewards:
        against_kl(figure.add_subplot(grid[0, 0]), metrics, found)
    for n, (name, label) in enumerate(numbers, rewards):
        axis = figure.add_subplot(grid[n, 0])
        dots(axis, metrics, found, [(name, "")], 1)
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.set_yticks([])
    axis = figure.add_subplot(grid[:, 1])
    dots(axis, metrics, found, rates, 100)
    axis.set_xlabel("share in %", fontsize=8)
    axis.set_xlim(-3, 103)
    handles = [Line2D([], [], color=colour, marker="o", ls="", ms=5, label=name)
               for name, colour in found.items()]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, title_fontsize=8,
                  frameon=False, alignment="left", ncols=4, title="bars: 95% intervals")
    return figure


def against_kl(axis, metrics, colours):
    """Gold (full) and score (hollow) of each checkpoint against the root of its KL."""
    axis.set_xlabel("square root of the KL to the reference (of nats an answer)", fontsize=8)
    drawn = set()
    for path, m in metrics.items():
        kl = m.get("kl", m.get("kl_bound"))
        for name, face in (("gold", colours[path]), ("score", "white")):
            if m.get(name) is not None and kl is not None:
                axis.errorbar(max(kl, 0) ** 0.5, m[name], 1.96 * (m.get(f"{name}_se") or 0),
                              color=colours[path], marker="o", ms=6, mfc=face, capsize=2, lw=1)
                drawn.add(name)
    said = dict(gold="gold (full)", score="score (hollow)")
    axis.set_ylabel(",\n".join(said[n] for n in said if n in drawn), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, lw=0.6)


def dots(axis, metrics, colours, rows, scale):
    """A line for each row, (name, label), with a dot and an interval for each checkpoint."""
    for y, (name, _) in enumerate(rows):
        for n, (path, m) in enumerate(metrics.items()):
            if m.get(name) is None:
                continue
            se = 1.96 * (m.get(f"{name}_se") or 0)
            low, high = m.get(f"{name}_low", m[name] - se), m.get(f"{name}_high", m[name] + se)
            at = y + 0.7 * ((n + 0.5) / len(metrics) - 0.5)
            axis.plot([scale * low, scale * high], [at, at], color=colours[path], lw=1.2)
            axis.plot(scale * m[name], at, "o", color=colours[path], ms=4)
    axis.set_yticks(range(len(rows)), [label for _, label in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.25, lw=0.6)
    for y in range(1, len(rows)):
        axis.axhline(y - 0.5, color="grey", lw=0.3)


# --- characters ----------------------------------------------------------------------------------


def chart(curves, width, height=8):
    """Lines of text: curves, [(symbol, {step: value}, is it a level?)], on common axes. Where two
    meet, the first is seen."""
    steps = [step for _, curve, level in curves for step in curve if not level] or [0]
    values = [value for _, curve, _ in curves for value in curve.values()]
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    cells = [[" "] * width for _ in range(height)]
    for symbol, curve, level in reversed(curves):
        for step, value in curve.items():
            row = round((high - value) / ((high - low) or 1) * (height - 1))
            column = round((step - left) / ((right - left) or 1) * (width - 1))
            for c in range(0, width, 2) if level else [column]:
                cells[row][c] = symbol
    names = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    lines = [f"{name:>10} |{''.join(row)}".rstrip() for name, row in zip(names, cells)]
    ends = f"{left}" + f"{right}".rjust(width - len(f"{left}")) * (right > left)
    return [*lines, " " * 11 + "+" + "-" * width, " " * 12 + ends]


def as_characters(runs, width):
    """All panels as text: training in small letters, a for the first run, held out in capitals."""
    letters = "abcdefg"[:len(runs)]
    lines = [f"{letter}  {run.label}" for letter, run in zip(letters, runs)]
    lines.append(f"small letters: training, capitals: held out; across: {steps_of(runs)}")
    for title, fields, _ in panels_of(runs):
        for field in fields:
            curves = []
            for letter, run in zip(letters, runs):
                train, held_out = run.train.get(field, {}), run.held_out.get(field, {})
                level = len(train) + len(held_out) == 1
                curves += [(letter.upper(), held_out, level)] * bool(held_out)
                curves += [(letter, train, level)] * bool(train)
            if curves:
                lines += ["", title if len(fields) == 1 else field.replace("_", " "),
                          *chart(curves, max(20, min(60, width - 13)))]
            for symbol, curve, _ in curves:
                v = list(curve.values())
                v = dict(first=v[0], last=v[-1], min=min(v), max=max(v)) if v[1:] else dict(at=v[0])
                lines.append("  ".join([symbol, *(f"{name} {x:.4g}" for name, x in v.items())]))
    for letter, run in zip(letters, runs):
        if run.calibration:
            names = ("pairs", "confidence", "accuracy")
            lines.append(f"\ncalibration of {letter}" + cli.table(
                {name: [b[name] for b in run.calibration] for name in names}))
    return "\n".join(lines)


def main(config):
    if not config.folders:
        raise UserError("name the folder of a run: python plot.py out/ppo")
    if len(config.folders) > len(COLOURS):
        raise UserError(f"{len(config.folders)} runs: at most {len(COLOURS)} can be told apart")
    first = config.folders[0]
    if report := read_report(first):
        if config.text or len(config.folders) > 1:
            raise UserError(f"{first} holds a report, which is drawn alone; as text it is "
                            f"{first}/report.md")
        with refusing(f"{first}/report.json is no report of evaluate.py"):
            if len(report["checkpoints"]) > len(COLOURS):
                raise UserError(f"{first}: {len(report['checkpoints'])} checkpoints, of which at "
                                f"most {len(COLOURS)} can be told apart")
            figure, name = report_picture(report), "report.png"
    else:
        runs = [read_run(folder) for folder in config.folders]
        with refusing("there is a log that cannot be drawn"):
            if config.text:
                print(as_characters(runs, shutil.get_terminal_size().columns))
                return
            figure, name = picture(runs), "curves.png"
    path = Path(config.out or f"{first}/{name}")
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as error:  # a format that it does not know
        raise UserError(f"cannot write {path}: {error}") from None
    print(f"written: {path}")


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
