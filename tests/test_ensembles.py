"""studies/ensembles.py, whole and tiny."""

from types import SimpleNamespace

import cli
import pytest
from cli import UserError
from conftest import run_script
from studies import ensembles, runs
from tiny_runs import make_inputs

FLAGS = ["--runs=s{seed}", "--out=runs", "--table=table.md", "--members=2",
         "--reward_flags=samples=8,max_new_tokens=12,probe=0,batch_size=8,pretrain_mix=0",
         "--ppo_flags=iterations=1,batch_size=8,max_new_tokens=12,eval_prompts=6,best_of=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """s1 and s2 with an SFT model and rankings each, and every stage run in this process."""
    for seed in (1, 2):
        make_inputs(tmp_path / f"s{seed}")
        done = run_script("label.py", "--prompts=34", "--held_out=12", "--k=3",
                          "--max_new_tokens=12", f"--seed={seed}", f"--init=s{seed}/sft",
                          f"--out=s{seed}/label", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        return run_script(command[1].split("/")[-1], *command[2:], cwd=tmp_path)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    return SimpleNamespace(path=tmp_path, commands=commands)


def study(*flags):
    ensembles.main(cli.read_flags(ensembles.Config, [*FLAGS, *flags]))


def test_the_study_at_reduced_size(folder):
    # catches a way that is not passed on, runs that are made again or taken from other settings,
    # a mean over something else than the seeds
    study("--seeds=2")
    text = (folder.path / "table.md").read_text()
    assert len(folder.commands) == 2 * (2 + 4)
    ways = [next(f for f in c if f.startswith("--score_by")) for c in folder.commands
            if c[0].endswith("ppo.py")]
    assert ways == ["--score_by=mean", "--score_by=mean", "--score_by=min",
                    "--score_by=mean-std"] * 2
    golds = [[ensembles.train("ppo", folder.path / "runs" / f"ppo-{way}-beta0.02-seed{seed}",
                              SimpleNamespace(device="auto"), "")["gold"] for seed in (1, 2)]
             for way in ensembles.WAYS]
    row = next(line for line in text.splitlines() if line.startswith("| gold, the true"))
    assert row == "| gold, the true reward | " + " | ".join(
        f"{(a + b) / 2:.2f} ({min(a, b):.2f} to {max(a, b):.2f})" for a, b in golds) + " |"
    study("--seeds=2")  # finished runs are taken as they are
    assert len(folder.commands) == 12 and (folder.path / "table.md").read_text() == text
    for flags, words in ((["--ppo_flags=iterations=2"], "--iterations=1, wanted: 2"),
                         (["--reward_flags=samples=9"], "--samples=8, wanted: 9")):
        name = flags[0].split("=")[0]
        with pytest.raises(UserError, match=words):
            ensembles.main(cli.read_flags(ensembles.Config, [
                *(f for f in FLAGS if not f.startswith(name)), *flags, "--seeds=1"]))
    (folder.path / "s1" / "sft" / "model.pt").write_bytes(
        (folder.path / "s1" / "reward" / "model.pt").read_bytes())
    with pytest.raises(UserError, match="was made from another s1/sft"):
        study("--seeds=1")


def test_a_stage_that_fails_is_one_line(folder):
    flags = [*(f for f in FLAGS if not f.startswith("--reward")), "--reward_flags=samples=0"]
    with pytest.raises(UserError, match="reward.py .*failed: .*--samples=0: must be above 0"):
        ensembles.main(cli.read_flags(ensembles.Config, [*flags, "--seeds=1"]))
    with pytest.raises(UserError, match="s3/label/rankings.jsonl"):
        ensembles.one_seed(3, cli.read_flags(ensembles.Config, FLAGS), "cpu")
