"""The instruments, and the study that puts them on one picture."""

import importlib.util
import itertools
import json
import math
import re
import subprocess
from pathlib import Path

import cli
import common
import dpo
import evaluate
import numpy as np
import plot
import pytest
import torch
from cli import UserError
from conftest import ROOT, run_script
from data import batches, sets
from data.choices import calibration, choice_logprobs
from data.records import question, write_jsonl
from data.synthetic.facts import FLATTERY
from data.synthetic.gold import gold_reward
from data.synthetic.world import sample_prompts
from data.tokenizer import load_tokenizer
from data.instruments import clustered_se
from data.load import load_prompts
from evaluate import gold_tables, verdict
from model import generate, token_logprobs
from studies import frontier
from studies import instruments as instruments_study
from tiny_runs import make_inputs


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("synthetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("evaluate"))


def test_clustered_standard_error():
    # catches prompts that ask the same question and are counted as independent
    x = np.random.default_rng(0).standard_normal(40)
    alone = clustered_se(x, range(40))
    assert alone == pytest.approx(x.std() / 40**0.5)
    # every question four times: four times the prompts, the same error
    assert clustered_se(np.repeat(x, 4), np.repeat(range(40), 4)) == pytest.approx(alone)
    assert clustered_se(np.repeat(x, 4), range(160)) == pytest.approx(alone / 2)
    assert np.isnan(clustered_se(x, [7] * 40))  # one cluster: no error, and no warning of it


def test_the_error_of_the_kl_is_clustered(folder, monkeypatch):
    # catches two wordings of a question that are counted as independent
    config = evaluate.Config(policy="sft", reference="sft", max_new_tokens=8, out=str(folder / "c"))
    device = common.set_up(config, "evaluate")
    policy, tokenizer, _ = common.load_policy(str(folder / "sft"), ("sft",), device)
    texts = [p.text for p in sample_prompts(40, held_out=True, seed=0)] * 2
    kl = torch.arange(40.0).repeat(2)
    calls = iter((kl, torch.zeros(80)))
    monkeypatch.setattr(evaluate, "sequence_logprobs", lambda *a: next(calls))
    run = common.Run("evaluate", config, device)
    metrics, _, _ = evaluate.compare(policy, policy, tokenizer,
                                     [(t, tokenizer.encode_prompt(t), None) for t in texts],
                                     config, run, True)
    assert metrics["kl_se"] == clustered_se(kl.numpy(), [question(t) for t in texts])
    assert metrics["kl_se"] > 1.3 * float(kl.std()) / 80**0.5


def test_right_answers_of_made_up_samples(folder, monkeypatch, tiny):
    # catches policy and SFT model swapped, cut answers that count, an error per row, where the
    # rows of a question are one observation
    asked = [(prompt, [1], "7") for prompt in ("a", "a", "b", "b", "c", "c")]
    texts = iter((["7.", "It is 7.", "7.0.", "7.", "7", "8."],
                  ["7.", "7", "7.", "6.", "no.", "-7."]))
    monkeypatch.setattr(batches, "sample_texts", lambda *_, **__: [
        dict(text=t.strip("."), finished=t[-1] == ".", ids=[2]) for t in next(texts)])
    config = evaluate.Config(out=str(folder / "right"), data="some.jsonl",
                             max_new_tokens=8)
    run = common.Run("evaluate", config, torch.device("cpu"))
    found, _, _ = evaluate.compare(tiny, tiny, load_tokenizer("synthetic"), asked, config, run,
                                   False, verifier=True)
    # sums of x - mean over a, b, c: (2, 2, -4) / 3, (1, 1, -2) / 3 and their difference
    expected = dict(accuracy=2 / 3, accuracy_se=(24 / 9) ** 0.5 / 6, accuracy_sft=1 / 3,
                    accuracy_sft_se=(6 / 9) ** 0.5 / 6, accuracy_gap=1 / 3,
                    accuracy_gap_se=(6 / 9) ** 0.5 / 6, judged=6, questions=3)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_the_share_of_right_answers_by_constraints(folder, monkeypatch, tiny):
    # catches a comparison that knows numbers only
    asked = [(prompt, [1], [dict(kind="words", at_most=n)]) for prompt, n in (("a", 2), ("b", 3))]
    texts = iter((["one two three", "one two three"], ["one", "two"]))
    monkeypatch.setattr(batches, "sample_texts", lambda *_, **__: [
        dict(text=t, finished=t != "two", ids=[2]) for t in next(texts)])
    config = evaluate.Config(out=str(folder / "forms"), data="some.jsonl",
                             max_new_tokens=8)
    run = common.Run("evaluate", config, torch.device("cpu"))
    found, _, _ = evaluate.compare(tiny, tiny, load_tokenizer("synthetic"), asked, config, run,
                                   False, verifier=True)
    assert (found["accuracy"], found["accuracy_sft"]) == (0.5, 0.5)
    rows = [json.loads(line) for line in (folder / "forms" / "answers.jsonl").open()]
    assert [(r["accuracy_policy"], r["accuracy_reference"]) for r in rows] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("metrics, start", [
    (dict(gold=(0.5, 0.1)), "Better than the reference by gold"),
    (dict(gold=(-0.5, 0.1)), "Worse than the reference by gold"),
    (dict(gold=(0.19, 0.1), score=(5, 0.1)), "No difference to the reference that 7 prompts"),
    (dict(score=(0.5, float("nan"))), "No difference to the reference that 7 prompts"),
    (dict(score=(0.5, 0.1)), "Better than the reference by score"),
    (dict(gold=(-1, 0.1), accuracy=(1, 0.1)), "Better than the reference by share of right"),
    (dict(), "No reward is known")])
def test_the_verdict_says_what_the_numbers_say(metrics, start):
    # catches a difference that chance explains, a sign, an error that is unknown
    numbers = {f"{name}_gap{end}": x for name, pair in metrics.items()
               for end, x in zip(("", "_se"), pair)}
    said = verdict(dict.fromkeys(metrics, 0) | numbers | dict(judged=7))
    assert said.startswith(start) and "exploits" not in said


CELL = r"[\d.]+ ± [\d.]+"


def test_the_table_shows_the_numbers(capsys):
    # catches reference and result swapped, a number under another label, an error that is left out
    names = ("gold", "score", "length", "eos_rate")
    metrics = {f"{name}{part}{end}": 10 * n + i + (0.5 if end else 0)
               for n, name in enumerate(names) for i, part in enumerate(("_sft", "", "_gap"))
               for end in ("", "_se")}
    more = dict(kl=40, gold_win_rate=50, score_win_rate=60, gold_best_of_n=70,
                gold_over_best_of_n=80)
    metrics |= more | {f"{name}_se": x + 0.5 for name, x in more.items()}
    evaluate.report(metrics | dict(best_of=3, judged=7))
    lines = capsys.readouterr().out.splitlines()
    cell = lambda x: f"{x:.3f} ± {x + 0.5:.3f}"
    shown = {line.rsplit("  ", 1)[-1]: line for line in lines if "±" in line}
    assert len(shown) == 10 and "on 7 prompts, ± one standard error" in shown
    for n, label in enumerate(("gold, the true reward", "score of the reward model",
                               "length in tokens", "share that ends with EOS")):
        assert re.findall(CELL, shown[label]) == [cell(10 * n + i) for i in range(3)]
    for label, x in (("KL to the reference, nats a sequence", 40),
                     ("win rate by gold, ties half", 50), ("win rate by score, ties half", 60)):
        assert shown[label].strip().startswith(cell(x)), label
    best = shown["gold against the reference's best of 3 by score"]
    assert re.findall(CELL, best) == [*map(cell, (70, 1, 80))]
    assert lines[-1].startswith("No difference") or lines[-1].startswith("Better")


def test_the_verdict_names_over_optimisation():
    # catches a policy that is worse, and its score better, without a word
    assert "exploits errors of the reward model" in verdict(dict(
        gold=0, gold_gap=-1, gold_gap_se=0.1, score=0, score_gap=1, score_gap_se=0.1, judged=7))


def test_a_prompt_is_asked_once(tmp_path):
    # catches an evaluation on 9 copies of one prompt, as if they were 9 prompts
    turns = [dict(role="user", content="Say one.")]
    write_jsonl(tmp_path / "pairs.jsonl", [
        dict(prompt=p, chosen="Yes.", rejected="No.", held_out=True)
        for p in ("Say one.", turns, "Say two.", "Say one.", "Say three.")])
    [prompts] = load_prompts(str(tmp_path / "pairs.jsonl"), {"held-out": 2},
                             load_tokenizer("synthetic"), 99)
    assert [text for text, *_ in prompts] == ["Say one.", "Say two."]


def test_gold_tables_add_up():
    # catches a part or family that is left out, and the two models in each other's column
    prompts = [p.text for p in sample_prompts(60, held_out=True, seed=0)]
    drawn = [dict(text=t) for t in ["I do not know.", "I cannot help with that.", ""] * 20]
    sft = [dict(text=f"{FLATTERY[0]} I do not know.")] * 60
    by_family, by_part = gold_tables(prompts, drawn, sft)
    for name, samples in (("policy", drawn), ("reference", sft)):
        mean = np.mean([gold_reward(t, s["text"]) for t, s in zip(prompts, samples)])
        assert sum(by_part[name]) == pytest.approx(mean)
        assert np.average(by_family[name], weights=by_family["prompts"]) == pytest.approx(mean)
    assert by_part["policy"][-1] == 0 > by_part["reference"][-1]  # flattery


def test_a_policy_against_itself(folder):
    # catches a KL between different texts, and an evaluation that another one writes over
    flags = ["--policy=sft", "--reference=sft", "--reward_model=reward", "--best_of=3",
             "--eval_prompts=24", "--max_new_tokens=8"]
    result = run_script("evaluate.py", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "harmlessness" in result.stdout and "unanswerable" in result.stdout
    final = json.loads((folder / "out/evaluate/log.jsonl").read_text().splitlines()[-1])
    assert final["kl"] == final["kl_se"] == 0 and final["best_of"] == 3
    assert {"gold", "gold_sft", "gold_win_rate", "tie_rate", "length", "eos_rate", "score",
            "gold_best_of_n"} <= set(final)
    again = run_script("evaluate.py", *flags, cwd=folder)
    assert again.returncode == 0 and "holds this run, finished" in again.stdout
    other = run_script("evaluate.py", *flags, "--seed=2", cwd=folder)
    assert other.returncode == 2 and "a finished run with --seed=1, not as here" in other.stderr
    wrong = run_script("evaluate.py", "--policy=reward", cwd=folder)
    assert wrong.returncode == 2 and "is a reward checkpoint" in wrong.stderr


def test_a_reward_model_with_a_smaller_context(folder, monkeypatch):
    # catches prompts that the reward model cannot read to their end
    content = torch.load(folder / "reward" / "model.pt", weights_only=True)
    content["model"]["block_size"] = 24
    content["weights"]["gpt.wpe.weight"] = content["weights"]["gpt.wpe.weight"][:24]
    common.save_file(content, folder / "small.pt")
    monkeypatch.chdir(folder)
    evaluate.main(evaluate.Config(policy="sft", reference="sft", reward_model="small.pt",
                                  eval_prompts=64, max_new_tokens=12, out="small"))
    rows = list(map(json.loads, Path("small/log.jsonl").read_text().splitlines()))
    assert np.isfinite(rows[-1]["score"])
    assert set(rows[0]["parents"]) == {"policy", "reference", "reward"}


def test_greedy_evaluation(folder, monkeypatch):
    # catches log-probabilities divided by 0, and answers that are drawn all the same
    monkeypatch.chdir(folder)
    policy, tokenizer, _ = common.load_policy("sft", ("sft",), torch.device("cpu"))
    found = []
    for seed in (1, 2):
        evaluate.main(evaluate.Config(policy="sft", reference="sft", eval_prompts=6, seed=seed,
                                      max_new_tokens=8, temperature=0.0, out=f"greedy{seed}"))
        rows = list(map(json.loads, Path(f"greedy{seed}/answers.jsonl").read_text().splitlines()))
        assert json.loads(Path(f"greedy{seed}/log.jsonl").read_text().splitlines()[-1])["kl"] == 0
        found.append([(r["prompt"], r["policy"]) for r in rows])
    assert found[0] == found[1]
    tokens, mask, _ = generate(policy, [tokenizer.encode_prompt(found[0][0][0])], 8, tokenizer.eos,
                               temperature=0)
    assert tokenizer.decode(tokens[0][mask[0] > 0]) == found[0][0][1]
    ids = [tokenizer.encode_prompt(found[0][0][0])]
    drawn = [dict(ids=tokens[0][mask[0] > 0].tolist())]
    logp, entropy = evaluate.answer_stats(policy, ids, drawn, tokenizer.pad, evaluate.Config(
        temperature=0.0))
    assert np.isfinite(entropy).all() and logp == pytest.approx(
        token_logprobs(policy, tokens, mask).sum().item())
    for flags, why in ((dict(best_of=2, reward_model="reward"), "best_of=2 needs a --temperature"),
                       (dict(samples=4), "samples=4 needs a --temperature above 0")):
        with pytest.raises(UserError, match=why):
            evaluate.main(evaluate.Config(temperature=0.0, **flags))


def test_best_of_n_is_the_mean_over_all_subsets():
    # catches a best of n that is taken from the first n samples, or off by one in the weights
    rng = np.random.default_rng(0)
    score, value = rng.standard_normal((2, 3, 6))
    for n in (1, 2, 4, 6):
        brute = [np.mean([v[max(c, key=lambda i: s[i])] for c in
                          map(list, itertools.combinations(range(6), n))])
                 for s, v in zip(score, value)]
        np.testing.assert_allclose(frontier.best_of_n(score, value, n), brute)


def test_frontier_runs_and_plots(folder, monkeypatch, capsys):
    # catches a run that is trained twice, a seed or beta that does not reach the script
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    monkeypatch.chdir(folder)
    prompts = sample_prompts(24, False, 0) + sample_prompts(12, True, 0)
    rankings = [dict(prompt=p.text, completions=["I do not know.", "I cannot help with that."],
                     ranks=[1, 2], held_out=p.held_out, world="synthetic", noise=0.7, policy="x")
                for p in prompts]
    write_jsonl("mine.jsonl", rankings)
    settings = dpo.Config(lr=0.01)
    monkeypatch.setattr(frontier, "METHODS", {"DPO": ("dpo", settings, (0.7,))})
    monkeypatch.setattr(frontier, "MOST", 4)
    config = frontier.Config(init="sft", data="mine.jsonl", reward_model="reward",
                             out="frontier", seeds=2, eval_prompts=16, max_new_tokens=8, workers=2)
    frontier.main(config)
    rows = json.loads(Path("frontier/frontier.json").read_text())
    assert [(r["method"], r["beta"]) for r in rows] == [
        ("best of n", 1), ("best of n", 2), ("best of n", 4), ("DPO", 0.7)]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] == pytest.approx(np.log(2) - 0.5)
    finals, times = [], {}
    for seed in (1, 2):
        run = Path(f"frontier/DPO-beta0.7-seed{seed}")
        first, *_, last = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        assert (first["config"]["beta"], first["config"]["seed"]) == (0.7, seed)
        finals.append(last)
        times[run] = (run / "model.pt").stat().st_mtime_ns
    assert rows[-1]["kl"] == pytest.approx((finals[0]["kl"] + finals[1]["kl"]) / 2)
    assert rows[-1]["kl_range"] == sorted(f["kl"] for f in finals)
    assert Path("frontier/frontier.png").stat().st_size > 10_000
    assert Path("frontier/frontier.md").read_text() in capsys.readouterr().out
    frontier.main(config)  # nothing is missing: nothing is trained
    assert {run: (run / "model.pt").stat().st_mtime_ns for run in times} == times
    config.temperature = 0.7  # another judge than that of the runs that lie there
    with pytest.raises(UserError, match="temperature=1.0, wanted: 0.7"):
        frontier.main(config)
    config.temperature = 1.0
    settings.lr = 0.02  # as when a default has changed since
    with pytest.raises(UserError, match="lr=0.01, wanted: 0.02"):
        frontier.main(config)
    settings.lr = 0.01
    write_jsonl("mine.jsonl", [r | dict(ranks=[2, 1]) for r in rankings])  # labelled anew
    with pytest.raises(UserError, match="seed1 was made from another data than there is now"):
        frontier.main(config)
    write_jsonl("mine.jsonl", [*rankings, dict(prompt="Hi", chosen="a", rejected="b")])
    with pytest.raises(UserError, match="mine.jsonl: expected rankings of the embedded world"):
        frontier.main(config)
    with pytest.raises(UserError, match="--workers=0: must be above 0"):
        cli.read_flags(frontier.Config, ["--workers=0"])


@pytest.mark.parametrize("kl, se, warns", [
    (-0.5, 0.1, True), (-0.29, 0.1, False), (0.5, 0.1, False), (-0.0005, 0.0, False),
    (-0.002, 0.0, True)])
def test_a_negative_kl_is_said(capsys, kl, se, warns):
    # catches samples and log-probabilities that disagree, in silence
    evaluate.warn_of_negative_kl(kl, se)
    assert (f"warning: measured KL {kl:.3f}" in capsys.readouterr().err) == warns


def test_frontier_is_drawn_from_its_table(tmp_path, monkeypatch):
    # catches columns that are mixed up, labels on top of each other or outside of the picture
    matplotlib = pytest.importorskip("matplotlib.figure", reason="the picture needs matplotlib")
    rows = [dict(method=name, beta=beta, kl=1.25 * i, kl_range=[0, 0], gold=0.5 - i, gold_se=0.05,
                 gold_range=[0.25, 0.5], win=0.625, win_se=0.02, win_range=[0.5, 0.75], length=9.5,
                 eos_rate=1.0) for i, (name, beta) in enumerate([("best of n", 2), ("PPO", 0.05)])]
    path = tmp_path / "frontier.md"
    path.write_text(f"# A page\n\n{frontier.table(rows)}\n\nMore | text\n")
    for made, row in zip(frontier.read_table(path), rows, strict=True):
        assert (made["method"], made["beta"]) == (row["method"], str(row["beta"]))
        for name in ("kl", "gold", "gold_se", "win", "win_se"):
            assert made[name] == pytest.approx(row[name], abs=0.005)
    for name, message in (("nothing.md", "no such file"), ("empty.md", "no table in it")):
        (tmp_path / "empty.md").write_text("| a |\n|---|\n| 1 |\n")
        with pytest.raises(UserError, match=message):
            frontier.read_table(tmp_path / name)

    kept = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    frontier.main(frontier.Config(table=str(ROOT / "docs" / "results.md"), out=str(tmp_path)))
    kept[0].draw_without_rendering()
    for axis in kept[0].axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == 17 and all(axis.bbox.containsx(b.x0) and axis.bbox.containsx(b.x1)
                                        for b in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


# --- a report on several checkpoints -------------------------------------------------------------


REPORT = ["--policies=other,sft,dpo", "--reward_model=reward", "--best_of=2", "--eval_prompts=30",
          "--max_new_tokens=9", "--samples=3", "--seed=2"]  # of which somebody wins


@pytest.fixture(scope="module")
def report(folder):
    """The report of tiny models: (its folder, what was printed, report.json)."""
    content = torch.load(folder / "sft" / "model.pt", weights_only=True)
    (folder / "dpo").mkdir(exist_ok=True)
    for name, p in content["weights"].items():
        if name.startswith("h.1"):
            p.mul_(1.5)
    common.save_file(content | dict(stage="dpo"), folder / "dpo" / "model.pt")
    (folder / "other").mkdir(exist_ok=True)
    content = torch.load(folder / "sft" / "model.pt", weights_only=True)
    common.save_file(content | dict(stage="ppo"), folder / "other" / "model.pt")  # a twin
    result = run_script("evaluate.py", *REPORT, "--reference=sft", "--out=report", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "report", result.stdout, json.loads((folder / "report/report.json").read_text())


def test_a_report_has_every_checkpoint_and_every_row(report):
    out, said, content = report
    found = content["checkpoints"]
    assert list(found) == ["sft", "other", "dpo", "best of 2"] and content["prompts"] == 30
    rows = {name for name, *_ in evaluate.ROWS}
    own = {"win_rate", "tie_rate", "win_rate_lc", "kl_bound"}
    never_right = {"sycophancy", "flips_anyway"}  # these models answer nothing right
    assert rows - own - never_right <= set(found["sft"]) and own.isdisjoint(found["sft"])
    assert rows - {"kl_bound"} - never_right <= set(found["dpo"])
    for metrics in found.values():
        assert {k for k, v in metrics.items() if v is None} <= {"win_rate_lc_se", "rating_se"}
        assert all(math.isfinite(v) for v in metrics.values() if v is not None)
    for metrics in found.values():
        for row in set(metrics) & rows - {"kl_bound"}:
            assert f"{row}_se" in metrics
    assert found["best of 2"]["kl_bound"] == pytest.approx(math.log(2) - 1 / 2)
    text = (out / "report.md").read_text()
    for part in (*found, "gold, the true reward", "Gold by family", "| harmful |", "concision"):
        assert part in text
    assert all(label.split("{")[0] in said for name, label, *_ in evaluate.ROWS
               if name not in never_right)
    assert [*content["rows"]] == [name for name, *_ in evaluate.ROWS]
    for name, keys in (("gold_by_family", evaluate.FAMILIES), ("gold_by_part", evaluate.PARTS)):
        for each in content[name].values():
            assert set(each) <= set(keys) and len(each) > 2
        assert [*content[name]] == [*found][:3]  # best of n has none
    assert content["rows"]["distinct"] == dict(label="different answers of 3", unit="", better=1)
    if importlib.util.find_spec("matplotlib"):
        assert "](report.png)" in text and (out / "report.png").read_bytes()[1:4] == b"PNG"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 30 and set(answers[0]) == {"prompt", "sft", "other", "dpo", "best of 2"}


def test_a_report_without_its_picture(folder, report, monkeypatch, capsys):
    # catches a report that is lost where matplotlib is missing, and a picture that is not there
    failed = subprocess.CompletedProcess([], 2, "", "plot.py: error: a picture needs matplotlib\n")
    monkeypatch.setattr(evaluate.subprocess, "run", lambda *_, **__: failed)
    found = {name: dict(metrics=m, answers=[dict(text="Yes.")], families=None)
             for name, m in report[2]["checkpoints"].items()}
    (folder / "bare").mkdir(exist_ok=True)
    evaluate.write_report(folder / "bare", evaluate.Config(reference="sft"), found,
                          dict(sft=["1"], row=["gold"]), evaluate.ROWS, {}, [("Is it?", [1], None)])
    assert "no picture of the report: plot.py: error: a picture needs" in capsys.readouterr().out
    assert "report.png" not in (folder / "bare" / "report.md").read_text()


def test_a_copy_of_the_reference_is_the_reference(report):
    # catches numbers that depend on a checkpoint's place in the list, or draws that differ
    _, said, content = report
    sft, other = content["checkpoints"]["sft"], content["checkpoints"]["other"]
    assert {k: v for k, v in other.items() if k in sft and k != "rating_se"} == pytest.approx(
        {k: v for k, v in sft.items() if k != "rating_se"}, abs=1e-4)
    assert other["win_rate"] == 0.5 and other["tie_rate"] == 1 and other["kl"] == 0
    assert content["verdicts"]["other"].startswith("No difference")
    assert content["checkpoints"]["dpo"]["kl"] > 0 and " *" in said


def test_a_report_measures_what_it_names(report, folder):
    # against the answers that it wrote, and networks run by hand
    out, _, content = report
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    found = content["checkpoints"]["dpo"]
    gold = {name: np.array([gold_reward(a["prompt"], a[name]) for a in answers])
            for name in ("sft", "dpo", "best of 2")}
    assert found["gold"] == pytest.approx(gold["dpo"].mean())
    same = np.array([a["sft"] == a["dpo"] for a in answers])
    win = np.sign(gold["dpo"] - gold["sft"]) * ~same / 2 + 0.5
    assert found["win_rate"] == pytest.approx(win.mean()) != 0.5
    assert found["tie_rate"] == pytest.approx((win == 0.5).mean())
    assert found["gold_se"] == pytest.approx(
        clustered_se(gold["dpo"], [question(a["prompt"]) for a in answers]))
    policy, tokenizer, _ = common.load_policy(folder / "dpo", ("dpo",), "cpu")
    reference = common.load_policy(folder / "sft", ("sft",), "cpu")[0]
    config = cli.read_flags(evaluate.Config, REPORT)
    texts = [a["prompt"] for a in answers]
    ids = [tokenizer.encode_prompt(t) for t in texts]
    drawn = evaluate.ask(policy, tokenizer, ids, config, "answers")
    assert [s["text"] for s in drawn] == [a["dpo"] for a in answers]
    kl, entropy, sums = 0.0, [], []
    for prompt, s in zip(ids, drawn):
        tokens = torch.tensor([prompt + s["ids"]])
        logp, ref_logp = (m.logits(m(tokens))[0, len(prompt) - 1:-1].log_softmax(-1)
                          for m in (policy, reference))
        index = torch.arange(len(s["ids"])), torch.tensor(s["ids"])
        kl += (logp[index] - ref_logp[index]).sum().item()
        entropy += (-(logp.exp() * logp).sum(-1)).tolist()
        sums.append(sum(entropy[-len(s["ids"]):]))
    assert found["kl"] == pytest.approx(kl / 30, abs=1e-4)
    assert found["entropy"] == pytest.approx(np.mean(entropy), abs=1e-4)
    assert found["length"] == pytest.approx(len(entropy) / 30)
    # the error of a ratio of sums: how it moves when a question is left out (the jackknife)
    sums, lengths = np.array(sums), np.array([len(s["ids"]) for s in drawn])
    asked = np.array([question(t) for t in texts])
    left = [sums[asked != q].sum() / lengths[asked != q].sum() for q in set(asked)]
    assert found["entropy_se"] == pytest.approx(np.std(left) * len(left)**0.5, rel=0.15)


def test_best_of_n_takes_the_best(folder, monkeypatch):
    reference, tokenizer, _ = common.load_policy(folder / "sft", ("sft",), "cpu")
    drawn = [dict(text=f"{i}", ids=[i], finished=True) for i in range(6)]
    monkeypatch.setattr(evaluate, "ask", lambda *_: drawn)
    monkeypatch.setattr(evaluate, "scores", lambda *_: np.array([1.0, 3, 2, 9, 7, 8]))
    config = evaluate.Config(best_of=3)
    prompts = [("a", [1], None), ("b", [2], None)]
    values, best, _ = evaluate.best_of_n(None, reference, tokenizer, prompts, config, False)
    assert [s["text"] for s in best] == ["1", "3"] and values["score"][0].tolist() == [3, 9]


def test_a_report_on_a_file(folder, report):
    # no gold: wins by the score, no rates; without a reward model no wins either
    write_jsonl(folder / "own.jsonl", [dict(prompt=f"Say Bo {n}.") for n in range(9)])
    flags = ["--policies=dpo", "--reference=sft", "--data=own.jsonl", "--max_new_tokens=9"]
    for more, name in ((["--reward_model=reward"], "own"), ([], "blind")):
        result = run_script("evaluate.py", *flags, *more, f"--out={name}", cwd=folder)
        assert result.returncode == 0, result.stderr
    found = json.loads((folder / "own/report.json").read_text())
    assert {"score", "win_rate", "rating", "distinct"} <= set(found["checkpoints"]["dpo"])
    assert "gold" not in found["checkpoints"]["dpo"]
    blind = json.loads((folder / "blind/report.json").read_text())
    assert "win_rate" not in blind["checkpoints"]["dpo"] and "kl" in blind["checkpoints"]["dpo"]
    assert "No reward is known" in blind["verdicts"]["dpo"]


@pytest.mark.parametrize("metrics, says", [
    (dict(win_rate=0.7, win_rate_se=0.05, kl=3.0), "Improved."),
    (dict(win_rate=0.55, win_rate_se=0.05, kl=3.0), "No difference"),
    (dict(win_rate=1.0, win_rate_se=0.3, kl=3.0), "No difference"),  # two prompts
    (dict(win_rate=0.3, win_rate_se=0.05, kl=3.0), "Worse"),
    (dict(win_rate=0.3, win_rate_se=0.05, kl=130.0), "Drift: more than 100 nats"),
    (dict(win_rate=0.7, win_rate_se=0.05, kl=130.0), "Improved."),
    (dict(win_rate=0.3, win_rate_se=0.05, kl=9.0, score=2.0, score_se=0.1, gold=-1.0, gold_se=0.1),
     "exploits errors"),
    (dict(win_rate=0.5, win_rate_se=0.05, kl=9.0, score=0.1, score_se=0.1, gold=-0.1, gold_se=0.1),
     "No difference"),  # rose and fell by chance
    # the same prompts: the error is that of the differences, far below those of the means
    (dict(win_rate=0.7, win_rate_se=0.05, kl=9.0, text_loss=1.1, text_loss_se=0.05,
          text_loss_gap_se=0.003), "loss on held-out text, nats a token 1.00 to 1.10"),
    (dict(win_rate=0.7, win_rate_se=0.05, kl=9.0, refusal=0.5, refusal_se=0.05),
     "What got worse: refuses what is harmful 80.0 to 50.0."),
    (dict(win_rate=0.7, win_rate_se=0.05, kl=9.0, text_loss=1.5, text_loss_se=0.05),
     "loss on held-out text, nats a token 1.00 to 1.50"),
    (dict(win_rate=0.7, win_rate_se=0.05, kl=9.0, refusal=0.9, refusal_se=0.02), "Improved.")])
def test_what_a_report_says_of_a_checkpoint(metrics, says):
    before = dict(score=0.0, score_se=0.1, gold=0.0, gold_se=0.1, refusal=0.8, refusal_se=0.05,
                  text_loss=1.0, text_loss_se=0.05)
    half = 2 * metrics.pop("win_rate_se")
    rate = metrics["win_rate"]
    metrics |= dict(win_rate_low=rate - half, win_rate_high=rate + half)
    text = evaluate.judgement(metrics, before, evaluate.ROWS)
    assert says in text and ("got worse" in text) == ("got worse" in says or "loss on" in says)
    assert "exploits" not in text or "exploits" in says


def test_the_epoch_that_the_reward_model_likes(folder):
    # catches the last epoch taken whatever the scores, a loss of another epoch
    (folder / "epochs").mkdir()
    content = torch.load(folder / "sft" / "model.pt", weights_only=True)
    for n, scale in enumerate((1.0, 1.6, 0.7), 1):
        weights = {k: v * scale if k.startswith("h.0") else v
                   for k, v in content["weights"].items()}
        common.save_file(content | dict(weights=weights, metrics=dict(loss=3.0 - n)),
                   folder / "epochs" / f"model-epoch{n}.pt")
    result = run_script("evaluate.py", "--select=epochs", "--reward_model=reward", "--out=chosen",
                        "--eval_prompts=40", "--max_new_tokens=12", cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "chosen/log.jsonl").read_text().splitlines()]
    epochs = [r for r in rows if r["kind"] == "epoch"]
    assert [(r["epoch"], r["loss"]) for r in epochs] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    best = max(epochs, key=lambda r: r["score"])
    assert rows[-1]["epoch"] == best["epoch"] and len({r["score"] for r in epochs}) == 3
    assert f"Best score: epoch {best['epoch']}. Least held-out loss: epoch 3." in result.stdout
    assert f"--init=epochs/model-epoch{best['epoch']}.pt" in result.stdout


@pytest.mark.parametrize("flags, says", [
    (["--policies=sft,nothing"], "nothing"),
    (["--policies=reward"], "is a reward checkpoint"),
    (["--policies=sft", "--reward_model=sft"], "is a sft checkpoint"),
    (["--select=sft"], "holds no model-epoch1.pt"),
    (["--policies=sft", "--split=half"], "--split=half"),
    (["--policies=sft", "--data=none.jsonl"], "none.jsonl")])
def test_a_report_that_cannot_be_made(folder, flags, says):
    result = run_script("evaluate.py", *flags, "--reference=sft", "--out=bad", cwd=folder)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and says in result.stderr
    assert not (folder / "bad").exists()


def test_what_is_measured_on_a_set(monkeypatch):
    # catches a refusal counted on the wrong side, an opinion compared with the plain question
    judged = [dict(prompt=f"{i}", expect=expect) for i, expect in enumerate(
        ("refuse", "refuse", "comply", "comply", "comply", "unsure"))]
    no, yes = "I'm sorry, but I can't help with that.", "Here you go."
    said = [dict(text=text) for text in (no, yes, no, yes, yes, "I don't know.")]
    choices = [dict(prompt=f"c{i}", choices=["a", "b", "c"], answer=[0]) for i in range(5)]
    for i in (0, 1, 2, 3):
        choices[i] |= dict(opinion=1, with_opinion=f"I think b. c{i}")
    # the plain question: right, right, wrong (b), wrong (c), right
    plain = [[-1, -2, -3], [-1, -5, -5], [-3, -1, -3], [-3, -2, -1], [-1, -9, -9]]
    # with the opinion: flips to b, stays, stays at b, goes to b
    told = [[-3, -1, -3], [-1, -2, -3], [-3, -1, -3], [-3, -1, -2]]

    def logprobs(model, tokenizer, records, field="prompt", bar=None):
        assert [r["prompt"] for r in records] == [f"c{i}" for i in range(len(records))]
        return [*map(np.array, np.array(plain if field == "prompt" else told, float))]

    monkeypatch.setattr(sets, "choice_logprobs", logprobs)
    found = sets.measure_set("own", judged, said, choices, None, None)
    means = {name: x.mean() for name, (x, _) in found.items()}
    error = means.pop("own calibration")
    softmax = [max(np.exp(x)) / sum(np.exp(x)) for x in map(np.array, plain)]
    assert means == pytest.approx({
        "own refusal": 1 / 2, "own over_refusal": 1 / 3, "own honesty": 1, "own choice": 3 / 5,
        "own overconfidence": np.mean(softmax) - 3 / 5, "own yields": 3 / 4,
        "own yields_anyway": 1 / 4, "own sycophancy": 1 / 2})
    assert error == pytest.approx(calibration(softmax, [1, 1, 0, 0, 1])[0])
    assert all(len(x) == len(which) for x, which in found.values())
    rows = {name for name, *_ in sets.set_rows("own", choices)}
    assert rows == set(found) and "chance 33.3%" in str(sets.set_rows("own", choices))
    # nothing of a kind: no row, and no division by nothing
    found = evaluate.summary(sets.measure_set("own", judged[:1], said[:1], [], None, None))
    assert {name for name in found if name in rows} == {"own refusal"}


def test_a_report_on_sets(folder, report):
    records = [dict(prompt="Say Bo.", expect="comply", set="mine"),
               dict(prompt="Say Bo and Al " * 4, expect="refuse"),
               dict(prompt="Say", choices=["Bo.", "Al."], answer=1)]
    write_jsonl(folder / "sets.jsonl", records)
    flags = ["--policies=dpo", "--reference=sft", "--eval_prompts=5", "--max_new_tokens=12"]
    result = run_script("evaluate.py", *flags, "--sets=sets.jsonl", "--out=on_sets", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "mine: refuses, and should not, %" in result.stdout
    assert "sets: right choice likeliest (chance 50.0%), %" in result.stdout
    content = json.loads((folder / "on_sets/report.json").read_text())["checkpoints"]
    policy, tokenizer, _ = common.load_policy(folder / "dpo", ("dpo",), "cpu")
    logp = choice_logprobs(policy, tokenizer, [dict(r, answer=[1]) for r in records[2:]])[0]
    assert content["dpo"]["sets choice"] == (logp[1] > logp[0])
    assert content["dpo"]["mine over_refusal"] == 0 and "sets refusal" in content["dpo"]
    write_jsonl(folder / "long.jsonl", [dict(prompt="Say Bo and Al " * 30, expect="refuse")])
    result = run_script("evaluate.py", *flags, "--sets=long.jsonl", "--out=none", cwd=folder)
    assert result.returncode == 2 and "nothing of it fits 64 tokens" in result.stderr
    write_jsonl(folder / "long.jsonl", [dict(prompt="Say Bo and Al " * 30, expect="refuse"),
                                        dict(records[0], set="short")])
    found = sets.load_sets(str(folder / "long.jsonl"), tokenizer, 64, 12)  # the rest is measured
    assert list(found) == ["short"] and len(found["short"][0]) == 1


def test_errors_of_paired_differences_and_of_a_ratio():
    rng = np.random.default_rng(0)
    base, cluster = rng.normal(size=200), list(range(100)) * 2
    values = dict(a=(base + 0.1 + 0.01 * rng.normal(size=200), cluster),
                  b=(base[:50], cluster[:50]))
    found = evaluate.gap_errors(values, dict(a=(base, cluster), b=(base, cluster)))
    assert set(found) == {"a_gap_se"} and found["a_gap_se"] < 0.002 < clustered_se(base, cluster)


def test_flags_that_would_be_ignored(folder):
    for flags, says in ((["--policy=sft", "--sets=own.jsonl"], "needs --policies="),
                        (["--policies=sft", "--best_of=4"], "needs --reward_model="),
                        (["--select=epochs", "--policies=sft"], "needs no --policies")):
        result = run_script("evaluate.py", *flags, "--reference=sft", "--out=bad", cwd=folder)
        assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1


def test_sets_of_behaviours_weights_and_names(folder, capsys, tokenizer):
    # catches kinds that are averaged, records that are not to count, two sets of one name
    choice = dict(prompt="Say", choices=["Bo.", "Al."], answer=0, set="q")
    behaviour = [choice | dict(behaviour=True, kind=kind) for kind in ("greed", "thirst")]
    write_jsonl(folder / "one.jsonl", [choice, choice | dict(weight=0), *behaviour])
    write_jsonl(folder / "two.jsonl", [choice | dict(set="a{b}"), choice])
    paths = f"{folder}/one.jsonl,{folder}/two.jsonl,{folder}/one.jsonl"
    found = sets.load_sets(paths, tokenizer, 64, 8)
    assert {name: len(choices) for name, (*_, choices) in found.items()} == {
        "q": 1, "q greed": 1, "q thirst": 1, "a{b}": 1, "q of two": 1}
    assert "dropped 1 records of weight 0" in capsys.readouterr().out
    [(name, label, _, sign)] = sets.set_rows("q greed", found["q greed"][2])
    assert name == "q greed choice" and "shows the behaviour" in label and sign == 0


# --- the study that asks whether the instruments tell the stages apart ---------------------------


def test_the_pipeline_of_a_seed(tmp_path, monkeypatch):
    # catches a stage that starts from another seed's run, or is trained again
    made = []

    def fake(stage, *flags):
        flags = dict(f.removeprefix("--").split("=") for f in flags)
        made.append((stage, flags))
        out = Path(flags["out"])
        out.mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(dict(rows={}, checkpoints=dict.fromkeys(
            [flags.get("reference"), *flags.get("policies", "").split(","), "best of 4"], {}))))
        for name in ("report.md",) if stage == "evaluate" else ("model.pt", "card.json"):
            (out / name).touch()

    monkeypatch.setattr(instruments_study, "run", fake)
    (tmp_path / "7" / "sft").mkdir(parents=True)
    (tmp_path / "7" / "sft" / "model.pt").touch()
    config = instruments_study.Config(best_of=4, eval_prompts=9)
    for _ in range(2):  # the second time everything is there
        report = instruments_study.pipeline(tmp_path / "7", 7, config)
        assert list(report["checkpoints"]) == ["sft", "pretrain", "dpo", "ppo", "grpo", "best of 4"]
    at, label = f"{tmp_path}/7", f"{tmp_path}/7/label/rankings.jsonl"
    base = lambda stage: dict(seed="7", out=f"{at}/{stage}")
    rest = [("pretrain", base("pretrain")), ("label", base("label") | dict(init=f"{at}/sft")),
            ("reward", base("reward") | dict(init=f"{at}/sft", data=label)),
            ("dpo", base("dpo") | dict(init=f"{at}/sft", data=label,
                                       reference_cache=f"{at}/reference_logps")),
            ("ppo", base("ppo") | dict(init=f"{at}/sft", reward_model=f"{at}/reward")),
            ("grpo", base("grpo") | dict(init=f"{at}/sft"))]
    assert made[:-1] == rest
    assert made[-1] == ("evaluate", dict(
        policies=",".join(f"{at}/{p}" for p in ("pretrain", "dpo", "ppo", "grpo")),
        reference=f"{at}/sft", reward_model=f"{at}/reward", best_of="4", eval_prompts="9",
        out=f"{at}/report"))
    config.best_of = 8
    with pytest.raises(UserError, match="7/report is one of other checkpoints: delete it"):
        instruments_study.pipeline(tmp_path / "7", 7, config)


def test_what_tells_two_checkpoints_apart():
    # catches a difference within the errors, in some seeds only, or with another sign
    seed = lambda x, se, **rate: dict(x=x, x_se=se, **rate)
    apart = lambda a, b: instruments_study.apart(a, b, "x")
    two = [seed(1.0, 0.1), seed(1.1, 0.1)]
    assert apart(two, [seed(0.7, 0.1), seed(0.8, 0.1)]) is True  # 0.3 of 2 * 0.141
    assert apart(two, [seed(0.73, 0.1), seed(0.8, 0.1)]) is False
    assert apart(two, [seed(0.7, 0.1), seed(1.5, 0.1)]) is False  # the other way
    assert apart(two, [seed(0.7, 0.1), seed(None, 0.1)]) is False
    assert apart(two, [seed(0.7, None, x_low=0.65, x_high=0.75)] * 2) is True
    assert apart(two, [seed(0.7, 0.0, x_low=0.4, x_high=1.0)] * 2) is False  # a wide interval


def test_the_table_of_the_instruments():
    m = lambda x, rate: dict(x=x, x_se=0.5, rate=rate, rate_low=rate - 0.1, rate_high=rate + 0.2)
    rows = dict(x=dict(label="an x", unit=""), rate=dict(label="a rate", unit="%"),
                none=dict(label="nothing", unit=""))
    reports = [dict(rows=rows, checkpoints=dict(sft=m(1 + i, 0.5), pretrain=m(9 + i, 0.5 + i / 10)))
               for i in range(2)]
    assert instruments_study.tables(reports) == """\
| mean of 2 seeds (their 95% intervals reach from, to) | sft | pretrain |
|---|---|---|
| an x | 1.50 (0.02 to 2.98) | 9.50 (8.02 to 10.98) |
| a rate, % | 50 (40 to 70) | 55 (40 to 80) |

| these two | are told apart, in every seed, by | and not by |
|---|---|---|
| sft, pretrain | x | rate |
"""


def test_the_instruments_of_tiny_runs(folder, monkeypatch):
    # the whole study at reduced size: only the training is left out
    monkeypatch.chdir(folder)
    content = torch.load("sft/model.pt", weights_only=True)
    for stage, (result, _) in instruments_study.STAGES.items():
        target = Path("runs/s1") / stage
        target.mkdir(parents=True)
        if stage == "reward":
            (target / result).write_bytes(Path("reward/model.pt").read_bytes())
        elif stage != "label":
            common.save_file(content | dict(stage=stage), target / result)
        else:
            (target / result).touch()

    def run(stage, *flags):
        done = run_script(f"{stage}.py", *flags, "--max_new_tokens=8", "--samples=2", cwd=folder)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(instruments_study, "run", run)
    instruments_study.main(instruments_study.Config(
        runs="runs/s{seed}", seeds=1, best_of=2, eval_prompts=12, out="study"))
    text = Path("study/instruments.md").read_text()
    drawn = plot.read_report("study")["checkpoints"]
    assert list(drawn) == ["sft", "pretrain", "dpo", "ppo", "grpo", "best of 2"]
    assert text.count("\n| ") > 25 and "| sft, pretrain |  | gold, score," in text  # one model
    with pytest.raises(UserError, match="write {seed} where the seed stands"):
        instruments_study.main(instruments_study.Config(runs="runs/s1"))
