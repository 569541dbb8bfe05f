"""Curves: what is drawn is what was logged."""

import itertools
import json
import math
import sys

import numpy as np
import plot
import pytest
from cli import UserError
from conftest import run_process, run_script

FLAGS = dict(ppo=dict(batch_size=128), grpo=dict(batch_size=32, kl_in="reward"),
             sft=dict(batch_size=8, samples=16), dpo=dict(batch_size=4, loss="dpo"),
             pretrain=dict(batch_size=27))


def write_log(folder, stage, rows, **flags):
    """A folder with a log: a row of the configuration, then these."""
    folder.mkdir(parents=True, exist_ok=True)
    first = dict(kind="config", stage=stage, config=FLAGS.get(stage, {}) | flags)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [first, *rows]))
    return folder


def step(n, **fields):
    return dict(kind="step", step=n, **fields)


def panel(figure, title):
    """The axes with this title."""
    (axis,) = (a for a in figure.axes if a.get_title().startswith(title))
    return axis


def lines(axis, **style):
    """{x: y} of each line of the axes that has points, and this style."""
    same = lambda line: all(getattr(line, f"get_{k}")() == v for k, v in style.items())
    return [xy for line in axis.lines if same(line) and (xy := dict(line.get_xydata().tolist()))]


@pytest.fixture
def ppo_log(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((24, 3)).tolist()
    rows = [step(i, gold=g, score=s, kl=k, beta=0.1 + i, eos_rate=1.0)
            for i, (g, s, k) in enumerate(values)]
    rows.append(dict(kind="final", gold=1.5, score=0.5, kl=2.0, judged=512, beta=0.1))
    return write_log(tmp_path / "ppo", "ppo", rows, kl_target=4.0), values


def test_a_picture_shows_the_values_of_the_log(ppo_log):
    # catches a field drawn under another's name, a shifted mean, a lost final figure
    pytest.importorskip("matplotlib", reason="a picture needs it")
    folder, values = ppo_log
    figure = plot.picture([plot.read_run(folder)])
    titles = [a.get_title() for a in figure.axes]
    assert titles == ["gold — and score - -", "KL to reference (nats per sequence)",
                      "beta of the controller (score per nat)", "EOS rate (share of answers)"]
    gold, score, kl = (dict(enumerate(v)) for v in zip(*values))
    axis = panel(figure, "gold")
    assert lines(axis, linewidth=0.7) == [gold, score]
    assert lines(axis, marker="o") == [{24: 1.5}, {24: 0.5}]
    solid, dashed = (lines(axis, linewidth=1.5, linestyle=s)[0] for s in ("-", "--"))
    for smooth, raw in ((solid, gold), (dashed, score)):  # the mean of three, none at the ends
        assert smooth[0] == raw[0] and smooth[23] == raw[23]
        assert smooth[7] == pytest.approx((raw[6] + raw[7] + raw[8]) / 3)
    axis = panel(figure, "KL")
    assert lines(axis, linewidth=0.7) == [kl] and lines(axis, marker="o") == [{24: 2.0}]
    levels = [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert sorted(levels) == [0, 4.0]
    assert lines(panel(figure, "beta"), linewidth=0.7) == [{i: 0.1 + i for i in range(24)}]
    assert figure.legends[0].get_texts()[0].get_text() == (
        f"{folder}: ppo, 24 points, 128 answers an iteration, 512 prompts held out, KL target 4")
    assert figure.axes[-1].get_xlabel() == "iteration"


def test_runs_share_the_panels_that_both_have(tmp_path):
    # catches a run in another's colour, losses of two units in one panel, a level that is no level
    pytest.importorskip("matplotlib", reason="a picture needs it")
    say = lambda e, **fields: dict(kind="validation", epoch=e, **fields)
    sft = write_log(tmp_path / "sft", "sft", [
        say(0, loss=3.0, gold=-2.0), step(0, loss=2.5), step(10, loss=2.0),
        say(1, loss=2.25, gold=-1.0)])
    dpo = write_log(tmp_path / "dpo", "dpo", [
        say(0, loss=math.log(2), accuracy=0.5), step(0, loss=0.7, accuracy=0.25),
        step(10, loss=0.5, accuracy=0.75), dict(kind="final", gold=1.25, loss=0.6, accuracy=0.7)])
    grpo = write_log(tmp_path / "grpo", "grpo", [
        step(i, score=i / 4, accuracy=i / 4, gold=1.0 + i, kl_loss=0.0) for i in range(3)])
    figure = plot.picture([plot.read_run(f) for f in (sft, dpo, grpo)])
    assert [a.get_title() for a in figure.axes] == [
        "loss (nats per token)", "loss (nats per pair; 0.69: a coin toss)",
        "accuracy (share of pairs)", "right answers (share)", "gold — and score - -"]
    first, second, third = plot.COLOURS[:3]
    tokens, pairs, accuracy, right, gold = figure.axes
    assert lines(tokens, color=first, linewidth=0.7) == [{0: 2.5, 10: 2.0}]
    assert lines(tokens, color=first, marker="o") == [{0: 3.0, 11: 2.25}]  # after the step 10
    assert not lines(tokens, color=second) and not lines(pairs, color=first)
    assert lines(pairs, color=second, marker="o") == [{0: math.log(2), 11: 0.6}]
    assert lines(accuracy, color=second, linewidth=0.7) == [{0: 0.25, 10: 0.75}]
    assert lines(right, color=third, linewidth=0.7) == [{0: 0, 1: 0.25, 2: 0.5}]
    assert lines(gold, color=first, marker="o") == [{0: -2.0, 11: -1.0}]
    assert lines(gold, color=second) == [{0: 1.25, 1: 1.25}]  # a level from edge to edge
    assert lines(gold, color=third, linewidth=0.7) == [{0: 1, 1: 2, 2: 3}]
    assert figure.axes[-1].get_xlabel() == "step, of PPO and GRPO iteration"


def test_nothing_overlaps():
    # catches titles that are too long for their panel, numbers under a title, a legend over both
    pytest.importorskip("matplotlib", reason="a picture needs it")
    small, large = (plot.Run("ppo", "out/a: ppo, 60 points, 128 answers an iteration", 4.0, {
        field: {i: scale * (i + 1) for i in range(60)} for field in plot.FIELDS}, {})
        for scale in (1e-3, -123.0))
    for runs in ([small], [large, small]):
        figure = plot.picture(runs)
        figure.draw_without_rendering()
        # around a panel with its title, its numbers and the name of its axis
        boxes = [figure.legends[0].get_window_extent(), *(a.get_tightbbox() for a in figure.axes)]
        assert len(boxes) == 1 + len(plot.PANELS)
        assert all(b.x0 > -1 and b.x1 < figure.bbox.x1 + 1 and b.y0 > -1 for b in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        scales = {a.get_title(): a.get_yscale() for a in figure.axes}
        assert scales["policy loss"] == "linear"
        assert scales["gradient norm"] == ("log" if runs == [small] else "linear")


def test_rows_that_repeat_and_numbers_that_are_missing(tmp_path):
    # catches a step that counts twice, a null drawn as 0, an order not that of the steps
    rows = [step(0, kl=0.0, score=1.0), step(2, kl=9.0, score=None), step(1, kl=1.0, score=None),
            step(2, kl=2.0, score=3.0)]
    run = plot.read_run(write_log(tmp_path, "ppo", rows, kl_target=0.0))
    assert list(run.train["kl"].items()) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert run.train["score"] == {0: 1.0, 2: 3.0} and "3 points" in run.label


REPORT = dict(rows={name: dict(label=label, unit=unit) for name, label, unit in (
    ("gold", "gold, the true reward", ""), ("refusal", "refuses what is harmful", "%"),
    ("sums", "sums, right", "%"), ("distinct", "different answers of 10", ""))}, checkpoints={
        "sft": dict(gold=-0.5, gold_se=0.1, score=0.25, kl=0.0, refusal=0.5, refusal_low=0.4,
                    refusal_high=0.7, sums=0.25, sums_low=0.2, sums_high=0.3, distinct=9.0,
                    distinct_se=0.5),
        "ppo": dict(gold=1.5, gold_se=0.2, score=None, kl=4.0, refusal=0.875, refusal_low=0.8,
                    refusal_high=0.9, sums=None, distinct=5.0, distinct_se=None),
        "best of 4": dict(gold=0.5, gold_se=0.2, kl_bound=0.64)})


def test_a_picture_of_a_report():
    # catches a share that is not in percent, an interval of another row or checkpoint, KL for its
    # root, a missing number drawn as 0
    pytest.importorskip("matplotlib", reason="a picture needs it")
    figure = plot.report_picture(REPORT)
    rewards, distinct, rates = figure.axes
    sft, ppo, best = plot.COLOURS[:3]
    points = {(line.get_color(), line.get_markerfacecolor()): (*line.get_xdata(), *line.get_ydata())
              for line in rewards.lines if line.get_marker() == "o"}
    assert points == {(sft, sft): (0, -0.5), (sft, "white"): (0, 0.25), (ppo, ppo): (2, 1.5),
                      (best, best): (pytest.approx(0.8), 0.5)}
    ends = [bar for bars in rewards.collections for segment in bars.get_segments()
            for bar in [segment[:, 1].tolist()] if bar[0] != bar[1]]
    assert ends == [pytest.approx(v) for v in ([-0.696, -0.304], [1.108, 1.892], [0.108, 0.892])]
    dots = lambda axis, marker: [(line.get_color(), *line.get_xdata()) for line in axis.lines
                                 if line.get_marker() == marker and line.get_color() != "grey"]
    assert dots(rates, "o") == [(sft, 50), (ppo, 87.5), (sft, 25)]
    assert dots(rates, "None") == [(sft, pytest.approx(40), 70), (ppo, 80, 90), (sft, 20, 30)]
    assert [t.get_text() for t in rates.get_yticklabels()] == ["refuses what is harmful",
                                                               "sums, right"]
    heights = [line.get_ydata()[0] for line in rates.lines if line.get_marker() == "o"]
    assert -0.5 < heights[0] < heights[1] < 0.5 < heights[2] < 1.5
    assert dots(distinct, "o") == [(sft, 9), (ppo, 5)]
    assert dots(distinct, "None") == [(sft, pytest.approx(8.02), pytest.approx(9.98)), (ppo, 5, 5)]
    assert distinct.get_title("left") == "different answers of 10"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["sft", "ppo", "best of 4"]


@pytest.mark.parametrize("rows, checkpoints, reward", [(2, 2, "score"), (12, 6, "gold"),
                                                       (30, 7, "gold"), (24, 2, None)])
def test_nothing_overlaps_in_a_report(rows, checkpoints, reward):
    # catches names of rows that run into each other or out of the picture, a legend over a panel
    pytest.importorskip("matplotlib", reason="a picture needs it")
    names = [f"r{i}" for i in range(rows)] + [*plot.NUMBERS]
    metrics = {n: 0.5 for n in names} | {f"r{i}_low": 0.4 for i in range(rows)} | dict(
        {"kl": 2.0, reward: 1.0})
    figure = plot.report_picture(dict(
        rows={n: dict(label="a_set self-awareness-training-architecture: shows the behaviour "
                            "(chance 50.0%)" if n[1:].isdigit() else n, unit="%")
              for n in names}, checkpoints={f"out/a_checkpoint_{i}": metrics | {
                  f"r{i}_high": 0.6 for i in range(rows)} for i in range(checkpoints)}))
    figure.draw_without_rendering()
    boxes = [figure.legends[0].get_window_extent(), *(a.get_tightbbox() for a in figure.axes)]
    assert len(boxes) == 2 + (reward is not None) + len(plot.NUMBERS)
    assert all(b.x0 > -1 and b.x1 < figure.bbox.x1 + 1 and b.y0 > -1 for b in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    labels = [t.get_window_extent() for t in figure.axes[-1].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))


@pytest.mark.parametrize("report, flags, message", [
    ("{", (), "report.json is no report of evaluate.py"),
    ("[1]", (), "report.json is no report of evaluate.py"),
    ('{"checkpoints": {}}', (), "report.json is no report of evaluate.py"),
    (json.dumps(REPORT), ("--text=true",), "as text it is r/report.md"),
    (json.dumps(REPORT), ("r",), "holds a report, which is drawn alone"),
    (json.dumps(dict(rows={}, checkpoints=dict.fromkeys("abcdefgh", {}))), (),
     "8 checkpoints, of which at most 7 can be told apart"),
])
def test_a_report_that_cannot_be_drawn(tmp_path, report, flags, message):
    # catches tracebacks
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_text(report)
    done = run_script("plot.py", "r", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "r" / "report.png").exists()


def test_losses_of_dpo_by_their_unit():
    # catches squared nats in the panel of nats
    name = lambda loss: plot.by_unit(dict(kind="step", loss=1.0), "dpo", dict(loss=loss)).keys()
    assert "pair_loss" in name("dpo") and "pair_loss" in name("simpo")
    assert "ipo_loss" in name("ipo") and "ipo_loss" in name("ipo_mean")
    assert "kto_loss" in name("kto")


def test_characters(tmp_path):
    # catches a row or column that is off by one, symbols mixed up: at step 4 both runs have 4
    a = write_log(tmp_path / "a", "ppo", [step(i, kl=float(i)) for i in range(8)])
    b = write_log(tmp_path / "b", "ppo", [step(0, kl=7.0), step(4, kl=4.0),
                                          dict(kind="final", kl=0.0)])
    shown = plot.as_characters([plot.read_run(f) for f in (a, b)], 37)
    assert shown == f"""\
a  {a}: ppo, 8 points, 128 answers an iteration
b  {b}: ppo, 2 points, 128 answers an iteration
small letters: training, capitals: held out; across: iteration

KL to reference (nats per sequence)
         7 |b                      a
           |                    a
           |                a
           |             a
           |          a
           |       a
           |   a
         0 |a               B
           +------------------------
            0                      7
a  first 0  last 7  min 0  max 7
B  at 0
b  first 7  last 4  min 4  max 7"""


def test_a_level_in_characters(tmp_path):
    # catches the figure of a run without steps that stands at step 0
    a = write_log(tmp_path / "a", "ppo", [step(i, gold=float(i), score=1.0) for i in range(8)])
    b = write_log(tmp_path / "b", "evaluate", [dict(kind="final", gold=7.0, judged=99)])
    shown = plot.as_characters([plot.read_run(f) for f in (a, b)], 80).split("\n")
    assert shown[1] == f"b  {b}: evaluate, 99 prompts held out"
    assert shown[4] == "gold" and shown[5] == "         7 |" + "B " * 29 + "Ba"
    assert shown[shown.index("score") + 1] == "         1 |" + "a       a        a       " + \
        "a        a       a        a       a"


def test_a_run_that_goes_on(tmp_path, capsys):
    # catches a last line, half written, that stops everything or is passed over in silence
    folder = write_log(tmp_path, "ppo", [step(0, kl=0.0), step(1, kl=1.0)])
    with open(folder / "log.jsonl", "a") as f:
        f.write('{"kind": "step", "step": 2, "k')
    assert plot.read_run(folder).train == {"kl": {0: 0.0, 1: 1.0}}
    assert "the last line is incomplete" in capsys.readouterr().out


@pytest.mark.parametrize("text, message", [
    ("", "log.jsonl:1: not JSON, so no log of this project"),
    ("\n\n", "log.jsonl:1: not JSON"),
    ("step,loss\n1,2\n", "log.jsonl:1: not JSON"),
    ('{"step": 1, "loss": 2}\n', "is no log of this project"),
    ('{"kind": "step", "step": 1}\n', "is no log of this project"),
    ('[1]\n', "is no log of this project"),
    ('{"kind": "config", "stage": "ppo", "config": {"batch_size": 8}}\n{"step": 1}\n',
     "a later one no kind"),
    ('{"kind": "config", "stage": "ppo", "config": {"batch_size": 8}}\n{"ki\n{"kind": "note"}\n',
     "log.jsonl:2: not JSON"),
    ('{"kind": "config", "stage": "ppo", "config": {"batch_size": 8}}\n', "no curve to draw"),
    ('{"kind": "config", "stage": "ppo", "config": {"batch_size": 8}}\n'
     '{"kind": "step", "step": 0, "kl": 0}\n', "logged a second point yet"),
])
def test_a_log_that_cannot_be_drawn_is_one_line(tmp_path, text, message):
    # catches tracebacks, and an empty picture
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(text)
    for flags in ((), ("--text=true",)):
        done = run_script("plot.py", "run", *flags, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("words, message", [
    ((), "name the folder of a run: python plot.py out/ppo"),
    (("nowhere",), "nowhere holds no run: there is no log.jsonl in it"),
    (("run",) * 8, "8 runs: at most 7 can be told apart"),
    (("run", "--out=x/y.png"), "cannot write x/y.png"),
    (("run", "--out=y.doc"), "cannot write y.doc"),
])
def test_bad_arguments_are_one_line(tmp_path, words, message):
    # catches tracebacks, and colours that come twice
    pytest.importorskip("matplotlib", reason="a picture needs it")
    write_log(tmp_path / "run", "ppo", [step(0, kl=0.0), step(1, kl=1.0)])
    done = run_script("plot.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_picture_is_written(tmp_path):
    # catches a picture that lands elsewhere than it says, torch or a window that it waits for
    pytest.importorskip("matplotlib", reason="a picture needs it")
    for name in ("a", "b"):
        write_log(tmp_path / name, "pretrain", [step(0, loss=7.5), step(10, loss=1.5)])
    done = run_script("plot.py", "a", "b", cwd=tmp_path)
    assert done.stdout == "written: a/curves.png\n", done.stderr
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    done = run_script("plot.py", "a", "--out=c.pdf", cwd=tmp_path)
    assert done.stdout == "written: c.pdf\n" and (tmp_path / "c.pdf").exists(), done.stderr


def test_without_matplotlib(ppo_log, monkeypatch):
    # catches a traceback where it is missing, and characters that ask for it
    run = plot.read_run(ppo_log[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib; --text=true draws without it"):
        plot.picture([run])
    assert "\nEOS rate (share of answers)\n" in plot.as_characters([run], 80)


def test_characters_need_neither_torch_nor_matplotlib(ppo_log, tmp_path):
    # catches an import that a look at a log should not wait for
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "matplotlib.py").write_text("raise SystemExit('matplotlib is imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        done = run_process("plot.py", "ppo", "--text=true", cwd=tmp_path)
    assert done.returncode == 0 and "beta of the controller" in done.stdout, done.stderr


BINS = [dict(confidence=0.55, accuracy=0.5, pairs=1200), dict(confidence=0.9, accuracy=0.8,
                                                              pairs=30)]


def reward_log(folder):
    return write_log(folder, "reward", [
        step(0, loss=0.7, accuracy=0.5), step(5, loss=0.6, accuracy=0.6),
        dict(kind="final", loss=0.5, accuracy=0.7, calibration=BINS)], batch_size=8)


def test_the_calibration_of_a_reward_model(tmp_path):
    # catches axes the wrong way round, a diagonal that is none, counts of other bins
    pytest.importorskip("matplotlib", reason="a picture needs it")
    runs = [plot.read_run(reward_log(tmp_path / name)) for name in ("a", "b")]
    axis = panel(plot.picture(runs[:1]), "calibration")
    assert lines(axis) == [{0.5: 0.5, 1: 1}, {0.55: 0.5, 0.9: 0.8}]
    assert {t.get_position()[0]: t.get_text() for t in axis.texts} == {0.55: "1,200", 0.9: "30"}
    assert axis.get_xlabel() == "confidence in the winner"
    both = panel(plot.picture(runs), "calibration")
    assert len(lines(both)) == 3 and not both.texts  # the numbers of two would cover each other
    other = write_log(tmp_path / "c", "ppo", [step(0, kl=1.0), step(1, kl=2.0)])
    assert not [a for a in plot.picture([plot.read_run(other)]).axes
                if a.get_title().startswith("calibration")]


def test_the_calibration_in_characters(tmp_path):
    text = plot.as_characters([plot.read_run(reward_log(tmp_path / "a"))], 70)
    table = text.split("calibration of a\n")[1].split("\n")
    assert [line.split() for line in table] == [
        ["pairs", "confidence", "accuracy"], ["1200", "0.550000", "0.500000"],
        ["30", "0.900000", "0.800000"]]
