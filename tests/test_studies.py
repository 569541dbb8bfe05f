"""The studies that start from whole pipelines, tiny: each command writes its table and picture."""

import json
import shutil
from types import SimpleNamespace

import cli
import common
import numpy as np
import pytest
import torch
from cli import UserError
from conftest import ROOT, run_script
from data.tokenizer import load_tokenizer
from model import GPT
from studies import ablations, bugs, overoptimization, runs
from tiny_runs import make_inputs

FLAGS = ("pretrain.steps=1", "label.prompts=24", "label.held_out=6", "label.k=3",
         "label.max_new_tokens=8", "ppo.iterations=3", "ppo.batch_size=8", "ppo.max_new_tokens=8",
         "ppo.eval_prompts=6", "ppo.best_of=1", "evaluate.eval_prompts=6",
         "evaluate.max_new_tokens=8", "evaluate.samples=2", "reward.samples=8",
         "reward.max_new_tokens=8", "reward.probe=0", "reward.pretrain_mix=0", "sft.epochs=1",
         "sft.demos=40", "sft.samples=4", "sft.max_new_tokens=8", "sft.pretrain_mix=0")


def write_log(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(folder, stage, seed, parents, **config):
    """The log of a run that is over, of which the model is there already."""
    write_log(folder, [dict(kind="config", stage=stage, config=config | dict(seed=seed),
                            parents=parents), dict(kind="final")])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """seed1: a random base model and SFT model, their logs made up."""
    folder = tmp_path_factory.mktemp("studies")
    for seed in (1,):
        base = make_inputs(folder / f"seed{seed}")
        shutil.rmtree(base / "reward")  # trained, as its log tells of the rankings
        saved = torch.load(base / "sft" / "model.pt", weights_only=True)
        model = GPT(common.declared(dict(saved), "")[1])
        model.load_state_dict(saved["weights"])
        (base / "pretrain").mkdir()
        common.save_checkpoint(base / "pretrain" / "model.pt", model, "pretrain",
                               load_tokenizer("synthetic"), cli.Config(), {})
        finished(base / "pretrain", "pretrain", seed, {}, steps=1)
        finished(base / "sft", "sft", seed, dict(pretrain=saved["hash"]),
                 init=f"seed{seed}/pretrain", **runs.stage_flags(",".join(FLAGS))["sft"])
    return folder


@pytest.fixture
def folder(pipelines, monkeypatch):
    """The same, and every stage run in this process, also that of a copy of the scripts."""
    monkeypatch.chdir(pipelines)
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        return run_script(command[1], *command[2:], cwd=pipelines)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    return SimpleNamespace(path=pipelines, commands=commands)


def study(module, *flags):
    module.main(cli.read_flags(module.Config, [
        "--runs=seed{seed}", f"--flags={','.join(FLAGS)}", *flags]))


def made(folder):
    """What was run since the last call: the script's folder and name."""
    names = [c[0].removeprefix(f"{ROOT}/").removesuffix(".py") for c in folder.commands]
    folder.commands.clear()
    return names


def test_bugs(folder, monkeypatch, capsys):
    # catches a right run that has the bug, a judge that has it, a table of another run's figures
    for name, number in (("kl_sign_reversed", 3), ("kl_dropped", 11)):
        assert bugs.CASES[number - 1].bug == name
    monkeypatch.setattr(bugs, "CASES", (bugs.CASES[2], bugs.CASES[10]))
    draw = bugs.draw_curves
    monkeypatch.setattr(bugs, "draw_curves", lambda case, one, path: draw(case, one, path)
                        if case.bug == "kl_dropped" else path.touch())
    flags = ["--seeds=1", "--out=bugs", "--device=cpu"]
    study(bugs, *flags, "--pages=docs")
    ran = made(folder)
    copies = [f"{folder.path}/bugs/{case.bug}/scripts/ppo" for case in bugs.CASES]
    ran = [name for name in ran if name not in ("label", "reward")]  # made once for all studies
    assert sorted(ran) == sorted([*copies, "ppo", *3 * ["evaluate"]])
    for case in bugs.CASES:  # the copy differs by the bug alone
        lines = [(root / "ppo.py").read_text() for root in (
            folder.path / "bugs" / case.bug / "scripts", ROOT)]
        assert lines[0] == runs.applied(runs.BUGS[case.bug], lines[1])
    kl, right = ([row["returns_mean"] for row in runs.log_rows(f"bugs/{name}/seed1/ppo", "step")]
                 for name in ("kl_sign_reversed", "right-ppo"))
    assert kl[0] == right[0] and kl[1:] != right[1:]  # the KL is 0 at first
    judged = [runs.final("bugs/kl_dropped/seed1/judged")["gold"]]
    page = (folder.path / "docs" / "bugs.md").read_text()
    row = next(line for line in page.splitlines() if bugs.CASES[1].said in line)
    assert row.split(" | ")[2] == runs.with_interval(judged)
    for name, size in (("bugs.png", 9000), ("exercises/2.png", 9000)):
        assert (folder.path / "docs" / name).stat().st_size > size
    text = (folder.path / "docs" / "exercises.md").read_text()
    assert text.count("<details>") == text.count("</details>") == 2
    before = text.split("<details>")
    assert all(case.bug not in before[0] for case in bugs.CASES)
    last = runs.log_rows("bugs/kl_sign_reversed/seed1/ppo", "final")[0]
    assert f"kl {last['kl']:.3g} (" in before[0]
    drawn = []
    monkeypatch.setattr(bugs, "draw_costs", lambda rows, path: drawn.append(path))
    monkeypatch.setattr(bugs, "draw_curves", lambda case, one, path: drawn.append(path))
    study(bugs, *flags, "--pages=again")
    assert not made(folder) and (folder.path / "again" / "bugs.md").read_text() == page
    drawn.clear()
    study(bugs, *flags, "--case=2")
    assert not made(folder) and drawn[-1].as_posix() == "bugs/case2/exercises/2.png"
    (folder.path / "bugs" / "kl_dropped" / "bug.txt").write_text("as it was")
    with pytest.raises(UserError, match="another version of kl_dropped: delete it"):
        study(bugs, *flags, "--case=2")
    with pytest.raises(UserError, match="--case=3: there are 2"):
        study(bugs, "--case=3")


def test_every_case_is_a_known_bug():
    # catches a bug that was renamed, or that no longer applies
    for case in bugs.CASES:
        bug = runs.BUGS[case.bug]
        assert runs.applied(bug, (ROOT / bug.file).read_text()) and case.said and case.tell
    assert len({case.bug for case in bugs.CASES}) == 12


def test_figures_over_seeds():
    # catches the normal 1.96 in place of Student's, a spread over n in place of n - 1
    mean, half = runs.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, abs=1e-3)
    assert runs.with_interval([1.0]) == "+1.00" and runs.with_interval([None]) == "-"
    assert runs.stage_flags("ppo.lr=1,sft.lr=2,ppo.k=a=b") == dict(
        ppo=dict(lr="1", k="a=b"), sft=dict(lr="2"))
    with pytest.raises(UserError, match="lr=1: expected stage.name=value"):
        runs.stage_flags("lr=1")


def test_overoptimization(folder, monkeypatch, capsys):
    # catches a proxy that is trained on all rankings, a curve of another proxy or beta, best-of-n
    # of an older SFT model
    monkeypatch.setattr(overoptimization, "PROXIES", ("few, ensemble", "many"))
    monkeypatch.setattr(overoptimization, "BETAS", {"few, ensemble": (0.0,), "many": (0.0, 0.05)})
    small = ["--seeds=1", "--out=over", "--few=9", "--members=2", "--window=1", "--bon_prompts=5",
             "--bon_samples=4", "--max_new_tokens=8", "--device=cpu"]
    asked, load = [], overoptimization.load_prompts
    monkeypatch.setattr(overoptimization, "load_prompts", lambda *args, **more: asked.append(
        (args[1], args[4])) or load(*args, **more))
    study(overoptimization, *small, "--pages=docs")
    assert asked == [({"training": 5}, 1)]  # as the rollouts: of the seed's training prompts
    assert made(folder)[-4:] == ["reward", "ppo", "ppo", "ppo"]
    few = [json.loads(line) for line in open("over/seed1/few9.jsonl")]
    every = [json.loads(line) for line in open("seed1/label/rankings.jsonl")]
    assert [r for r in every if r["held_out"]] == [r for r in few if r["held_out"]]
    assert few[:9] == every[:9] and sum(not r["held_out"] for r in few) == 9
    log = lambda name: json.loads(open(f"over/seed1/{name}/log.jsonl").readline())["config"]
    assert log("reward-few-ensemble")["data"] == "over/seed1/few9.jsonl"
    assert log("reward-few-ensemble")["ensemble"] == 2
    assert log("ppo-few-ensemble-beta0")["reward_model"] == "over/seed1/reward-few-ensemble"
    assert (log("ppo-many-beta0.05")["beta"], log("ppo-many-beta0")["beta"]) == (0.05, 0.0)
    text = (folder.path / "docs" / "overoptimization.md").read_text()
    steps = runs.log_rows("over/seed1/ppo-many-beta0.05", "step")
    row = next(line for line in text.splitlines() if line.startswith("| many | 0.05 | "))
    top = max(steps, key=lambda s: s["gold"])
    gained = steps[-1]["score"] - top["score"]
    assert row.split(" | ")[4] == f"{top['gold']:+.2f}"
    assert row.split(" | ")[7:9] == [f"{top['gold'] - steps[-1]['gold']:.2f}", f"{gained:+.2f}"]
    held_out = runs.final("over/seed1/ppo-many-beta0.05")["gold"]
    assert row.endswith(f" | {held_out:+.2f} |")
    high, low = (overoptimization.ppo_curve(f"over/seed1/ppo-many-beta{beta}", 1)
                 for beta in ("0.05", "0"))
    row = next(line for line in text.splitlines() if line.startswith("| many | 0.05 - 0 | "))
    assert row.split(" | ")[3:] == [f"{max(high['gold']) - max(low['gold']):+.2f}",
                                    f"{overoptimization.off(high, low):+.2f} |"]
    assert "higher in 0 of 1" in text
    assert f"many {100 * runs.final('seed1/reward')['accuracy']:.1f}" in text
    assert (folder.path / "docs" / "overoptimization.png").stat().st_size > 20_000
    saved = json.loads((folder.path / "over/seed1/best_of_n.json").read_text())
    assert saved["curves"]["many"]["d"][0] == 0
    assert saved["curves"]["many"]["proxy"] == sorted(saved["curves"]["many"]["proxy"])
    monkeypatch.setattr(overoptimization, "draw", lambda *_: None)
    monkeypatch.setattr(overoptimization.batches, "sample_texts", None)  # nothing is drawn again
    study(overoptimization, *small, "--pages=again")
    assert not made(folder) and (folder.path / "again/overoptimization.md").read_text() == text
    with pytest.raises(TypeError):  # another size: drawn again
        study(overoptimization, *(f for f in small if "bon_p" not in f), "--bon_prompts=4")


def test_fits_and_checks_of_overoptimization():
    # catches a form with another sign, R^2 by another mean, a peak of the wrong curve
    d = np.linspace(0.1, 3, 9)
    square = overoptimization.fit(d, 0.3 + d * (2 - 0.5 * d), "square")
    assert [square[k] for k in ("a", "b", "peak", "r2")] == pytest.approx([2, 0.5, 2, 1])
    ln = overoptimization.fit(d, d * (2 - 1.5 * np.log(d)), "ln")
    assert [ln[k] for k in ("a", "b", "r2")] == pytest.approx([2, 1.5, 1])
    assert ln["peak"] == pytest.approx(np.exp(2 / 1.5 - 1))
    wrong = overoptimization.fit(d, d * (2 - 1.5 * np.log(d)), "square")
    assert 0.5 < wrong["r2"] < 0.999
    for a in (2 + 0.5 * d, -1 - 0.5 * d):  # rises, falls all the way
        assert np.isnan(overoptimization.fit(d, d * a, "square")["peak"])
    curve = dict(d=np.array([0, 1.0, 2]), gold=np.array([0, 1.0, 0.5]), step=np.array([0, 3, 8]),
                 proxy=np.array([0, 1.0, 2]), se=0.1)
    found = overoptimization.facts(curve)
    assert found["proxy_gain"] == 1 and found["falls"] and found["d_peak"] == 1
    assert found["step"] == 3 and found["reached"] and found["lost"] == 0.5
    assert not overoptimization.facts(curve | dict(se=0.2))["falls"]  # 0.5 < 2 * 0.28
    assert not overoptimization.facts(curve | dict(gold=np.arange(3)))["reached"]
    half = dict(d=np.array([0, 1.5]), gold=np.array([0, 1.0]))
    assert overoptimization.off(half, curve) == pytest.approx(0.25)
    three = dict(d=np.array([0, 9, 1.0, 1.5]), gold=np.array([0, 9, 1.2, 1.15]))
    assert overoptimization.off(three, curve) == pytest.approx((0.2 + 0.4) / 2)
    assert overoptimization.told([1, 1.1, 0.9]) == "+1.00 ± 0.25"
    assert overoptimization.told([-1, 1]).endswith(", no difference")


def test_points_of_ppo(folder):
    # catches the SFT model's iteration in the mean of others, a point that is left out, an error
    # by the trend
    write_log(folder.path / "points", [
        dict(kind="step", step=i, score=float(i), gold=2.0 * i + (-1) ** i, kl_exact=float(i))
        for i in range(7)])
    curve = overoptimization.ppo_curve(folder.path / "points", 3)
    assert list(curve["step"]) == [0, 2, 5] and list(curve["proxy"]) == [0, 2, 5]
    assert list(curve["d"]) == pytest.approx([0, 2 ** 0.5, 5 ** 0.5])
    assert curve["gold"] == pytest.approx([1, 4 - 1 / 3, 10 + 1 / 3])
    assert curve["se"] == pytest.approx((np.mean([0, 16, 0, 16, 0, 16]) / 2 / 3) ** 0.5)


def test_ablations(folder, monkeypatch, capsys):
    # catches an arm that starts from the default's model, one that is judged by another's figures,
    # a bug that stays in the scripts of the others
    parts = ablations.PARTS
    monkeypatch.setattr(ablations, "PARTS", dict(
        ppo={name: parts["ppo"][name] for name in ("nocritic", "patient", "eager")},
        labels={"cautious": parts["labels"]["cautious"]},
        more={name: parts["more"][name] for name in ("ppo3", "dpo", "dpo3")},
        size={"large": parts["size"]["large"]._replace(steps=[
            ("pretrain", dict(n_embd=40, n_head=2, n_layer=1)), ("sft", {})])},
        demos={"nosft": parts["ppo"]["nosft"]._replace(against="sft")}))
    flags = ["--seeds=1", "--out=abl", "--device=cpu"]
    study(ablations, *flags, "--pages=docs")
    assert [name.split("/")[-1] for name in made(folder)][-19:] == [
        "ppo", "ppo", "ppo", "ppo", "evaluate", "label", "reward", "ppo", "evaluate", "ppo", "dpo",
        "dpo", "evaluate", "pretrain", "sft", "evaluate", "sft", "ppo", "evaluate"]
    log = lambda name: json.loads(open(f"abl/{name}/log.jsonl").readline())["config"]
    assert log("nosft/seed1/ppo")["init"] == "abl/nosft/seed1/sft"
    assert (log("nosft/seed1/sft")["lr"], log("nosft/seed1/sft")["demos"]) == (1e-12, 64)
    assert log("cautious/seed1/label")["caution"] == 2
    assert log("cautious/seed1/reward")["data"] == "abl/cautious/seed1/label/rankings.jsonl"
    assert log("cautious/seed1/ppo")["reward_model"] == "abl/cautious/seed1/reward"
    value = lambda name: runs.log_rows(f"abl/{name}/seed1/ppo", "step")[0]["explained_variance"]
    assert value("ppo") != value("nocritic") and log("ppo/seed1/ppo")["max_kl"] == 0
    text = (folder.path / "docs" / "demos.md").read_text()
    found = (folder.path / "abl" / "report-demos" / "seed1" / "report.json").read_text()
    found = json.loads(found)["checkpoints"]
    assert "python studies/ablations.py --part=demos --seeds=1" in text
    row = next(line for line in text.splitlines() if line.startswith("| no SFT first"))
    assert "| different of 2 answers |" in text
    kl, gold = (found["abl/nosft/seed1/ppo"][k] for k in ("kl", "gold"))
    assert row.split(" | ")[2] == f"{gold:+.2f}" and row.split(" | ")[4] == f"{kl:.2f}"
    assert row.endswith(f"| {gold - found['seed1/sft']['gold']:+.2f}, one seed | the SFT model |")
    assert log("ppo3/seed1/ppo")["iterations"] == 9 and log("dpo3/seed1/dpo")["epochs"] == 3
    assert log("large/seed1/sft")["init"] == "abl/large/seed1/pretrain"
    assert log("large/seed1/pretrain")["n_embd"] == 40
    kl = [row["kl_exact"] for row in runs.log_rows("abl/eager/seed1/ppo", "step")]
    read = lambda part: (folder.path / "docs" / f"{part}.md").read_text()
    gold = [np.mean([row["gold"] for row in runs.log_rows(f"abl/{name}/seed1/ppo", "step")])
            for name in ("eager", "patient")]  # of all three iterations, wherever the top is
    assert f"with the eager controller largest KL {max(kl):.2f} nats" in read("ppo")
    assert kl.index(max(kl)) and f"in the same: {gold[0] - gold[1]:+.2f}." in read("ppo")
    own = runs.final("abl/cautious/seed1/ppo")["score_gap"]
    right = runs.final("abl/cautious/seed1/reward")["accuracy"]
    assert (f"agrees with {100 * right:.1f}% of its held-out labels; on it the policy gains "
            f"{own:+.2f} over the SFT model" in read("labels"))
    found = (folder.path / "abl" / "report-size" / "seed1" / "report.json").read_text()
    small, large = (json.loads(found)["checkpoints"][f"abl/{name}/seed1/{stage}"]["rating"]
                    for name, stage in (("ppo", "ppo"), ("large", "sft")))
    assert f"ratings it wins {100 / (1 + np.exp(large - small)):.0f}% of" in read("size")
    assert all((folder.path / "docs" / f"{part}.png").stat().st_size > 9_000
               for part in ablations.PARTS)
    monkeypatch.setattr(ablations, "draw", lambda *_: None)
    study(ablations, *flags, "--pages=once", "--part=demos")
    assert not made(folder) and (folder.path / "once" / "demos.md").read_text() == text
    assert [path.name for path in (folder.path / "once").glob("*.md")] == ["demos.md"]
    with pytest.raises(UserError, match="--part=ppos: expected all, or of ppo, labels, more"):
        study(ablations, "--part=ppos")


def test_sentences_of_ablations(folder, monkeypatch):
    # catches a share of the wrong loss, a verdict with the wrong sign, an arm beside another than
    # the one that differs by one thing, the KL at the end for that on the way, sizes changed over
    found = [dict(sft=dict(text_loss=1.0), ppo=dict(text_loss=1.2 + x, gold=1.0, rating=2.0),
                  ptx=dict(text_loss=1.05), large=dict(gold=0.5 - x, rating=2 - np.log(3)))
             for x in (0, 0.1, 0.05)]
    assert ablations.ptx_sentence(found) == (
        "PPO loses +0.250 ± 0.124 nats a token of text against the SFT model (costs); --ptx_coef "
        "gives back +0.200 ± 0.124, a share of 0.79 ± 0.10, at least half in 3 of 3 seeds.")
    sizes = dict(ppo=2000, large=20_500)
    monkeypatch.setattr(common, "load_policy", lambda path, *_: [
        SimpleNamespace(num_params=lambda: sizes[path])])
    said = ablations.size_sentence(found, {name: [name] for name in sizes})
    assert said.startswith("The small model has 2,000 parameters, the large one 20,500, 10.2 times")
    assert said.endswith("of the large SFT model: +0.55 ± 0.12, gains. By the report's ratings it "
                         "wins 75 ± 0% of comparisons between the two.")
    assert runs.verdict([-1, 1]) == "no difference"
    gold = {name: float(n) for n, name in enumerate(ablations.FIRST | ablations.PARTS["demos"])}
    page = ablations.page("demos", [{name: dict(gold=x) for name, x in gold.items()}], {},
                          cli.read_flags(ablations.Config, ["--seeds=1"]))
    for name, arm in ablations.PARTS["demos"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {arm.said} |"))
        other = (ablations.FIRST | ablations.PARTS["demos"])[arm.against].said
        assert row.endswith(f"{gold[name] - gold[arm.against]:+.2f}, one seed | {other} |")
    curves = {"patient": ([1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1]),
              "eager": ([1, 2, 2, 5, 2, 2], [9, 1, 1, 0, 1, 2])}
    for name, (kl, reward) in curves.items():
        write_log(folder.path / name, [dict(kind="step", step=i, kl_exact=k, gold=g, beta=1 / k)
                                       for i, (k, g) in enumerate(zip(kl, reward))])
    said = ablations.drift_sentence({name: [folder.path / name] for name in curves})
    assert "largest KL 2.00 nats, lowest beta 0.500; with" in said
    assert "largest KL 5.00 nats, lowest beta 0.200. " in said
    assert said.endswith("in the same: +0.00.")  # of iterations 1 to 5
    rows = (folder.path / "eager" / "log.jsonl").read_text().replace('"gold": 0', '"gold": -4')
    (folder.path / "eager" / "log.jsonl").write_text(rows)
    said = ablations.drift_sentence({name: [folder.path / name] for name in curves})
    assert said.endswith("in the same: -0.80.")
