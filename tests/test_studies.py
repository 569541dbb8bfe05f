"""The studies that start from whole pipelines, tiny: each command writes its table and picture."""

import json
import shutil
from types import SimpleNamespace

import cli
import common
import pytest
import torch
from cli import UserError
from conftest import ROOT, run_script
from data.tokenizer import load_tokenizer
from model import GPT
from studies import bugs, runs
from tiny_runs import make_inputs

FLAGS = ("pretrain.steps=1", "label.prompts=24", "label.held_out=6", "label.k=3",
         "label.max_new_tokens=8", "ppo.iterations=3", "ppo.batch_size=8", "ppo.max_new_tokens=8",
         "ppo.eval_prompts=6", "ppo.best_of=1", "evaluate.eval_prompts=6",
         "evaluate.max_new_tokens=8", "reward.samples=8", "reward.max_new_tokens=8",
         "reward.probe=0", "reward.pretrain_mix=0")


def finished(folder, stage, seed, parents, **config):
    """The log of a run that is over, of which the model is there already."""
    rows = [dict(kind="config", stage=stage, config=config | dict(seed=seed), parents=parents),
            dict(kind="final")]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """seed1 and seed2: base model and SFT model random, the same in both, their logs made up."""
    folder = tmp_path_factory.mktemp("studies")
    for seed in (1, 2):
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
                 init=f"seed{seed}/pretrain")
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


def study(module, *flags, small=FLAGS):
    module.main(cli.read_flags(module.Config, [
        "--runs=seed{seed}", f"--flags={','.join(small)}", *flags]))


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
    study(bugs, "--seeds=2", "--out=bugs", "--pages=docs", "--device=cpu")
    ran = made(folder)
    copies = [f"{folder.path}/bugs/{case.bug}/scripts/ppo" for case in bugs.CASES]
    assert sorted(ran) == sorted(2 * [*copies, "label", "reward", "ppo", *3 * ["evaluate"]])
    for case in bugs.CASES:  # the copy differs by the bug alone
        lines = [(root / "ppo.py").read_text() for root in (
            folder.path / "bugs" / case.bug / "scripts", ROOT)]
        assert lines[0] == bugs.applied(bugs.BUGS[case.bug], lines[1])
    kl, right = ([row["returns_mean"] for row in runs.log_rows(f"bugs/{name}/seed1/ppo", "step")]
                 for name in ("kl_sign_reversed", "right-ppo"))
    assert kl[0] == right[0] and kl[1:] != right[1:]  # the KL is 0 at first
    judged = [runs.final(f"bugs/kl_dropped/seed{seed}/judged")["gold"] for seed in (1, 2)]
    page = (folder.path / "docs" / "bugs.md").read_text()
    row = next(line for line in page.splitlines() if bugs.CASES[1].said in line)
    assert row.split(" | ")[2] == runs.with_interval(judged)
    for name, size in (("bugs.png", 9000), ("exercises/1.png", 9000), ("exercises/2.png", 9000)):
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
    study(bugs, "--seeds=2", "--out=bugs", "--pages=again", "--device=cpu")
    assert not made(folder) and (folder.path / "again" / "bugs.md").read_text() == page
    drawn.clear()
    study(bugs, "--seeds=2", "--out=bugs", "--case=2", "--device=cpu")
    assert not made(folder) and drawn[-1].as_posix() == "bugs/case2/exercises/2.png"
    (folder.path / "bugs" / "kl_dropped" / "bug.txt").write_text("as it was")
    with pytest.raises(UserError, match="another version of kl_dropped: delete it"):
        study(bugs, "--seeds=2", "--out=bugs", "--case=2", "--device=cpu")
    with pytest.raises(UserError, match="--case=3: there are 2"):
        study(bugs, "--case=3")


def test_every_case_is_a_known_bug():
    # catches a bug that was renamed, or that no longer applies
    for case in bugs.CASES:
        bug = bugs.BUGS[case.bug]
        assert bugs.applied(bug, (ROOT / bug.file).read_text()) and case.said and case.tell
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
