"""Flags, run folders, checkpoints."""

import dataclasses
import hashlib
import json
import os
import random
import re
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import cli
import common
import evaluate
import grpo
import pytest
import sample
import sft
import torch
from cli import NotNegative, Positive, UserError, read_flags
from data import files
from data.tokenizer import load_tokenizer
from full_disk import Disk
from hypothesis import given, settings
from hypothesis import strategies as st
from model import GPT, GPTConfig


@dataclass
class Config(cli.Config):
    out: str = "out/x"  # output folder
    steps: Positive[int] = 10  # how many,
    #                            over two lines
    # --- how it learns
    lr: NotNegative[float] = 1e-3  # how fast
    bonus: float = 0.5


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1).filter(lambda text: "~" not in text), st.integers(1),
       st.floats(0, allow_infinity=False), st.booleans())
def test_flags_round_trip(out, steps, lr, resume):
    # catches values that change on the way: "=" in a value, a 1 for a float, newlines
    argv = [f"--out={out}", f"--steps={steps}", f"--lr={lr}", f"--resume={str(resume).lower()}"]
    config = read_flags(Config, argv)
    assert (config.out, config.steps, config.lr, config.resume) == (out, steps, lr, resume)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_argument_is_read_or_refused(argument):
    # catches a crash on odd arguments, and unknown ones that pass
    if argument in ("-h", "--help"):
        return
    try:
        read_flags(Config, [argument])
    except UserError:
        return
    assert argument.split("=")[0] in ("--out", "--steps", "--lr", "--resume", "--overwrite")


@dataclass
class Folders:
    folders: cli.Words = ()  # of runs
    out: str = ""  # a file


def test_words_are_what_begins_without_a_dash():
    # catches words that are lost or taken for another field, a flag for them, one without a value
    given = ["b", "--out=x", "a=c", ""]
    assert read_flags(Folders, given) == Folders(("b", "a=c", ""), "x")
    assert read_flags(Folders, []) == Folders()
    for bad in ("--folders=x", "-b", "--out"):
        with pytest.raises(UserError):
            read_flags(Folders, [bad])
    assert "\n  FOLDERS ...                         of runs\n  --out= " in cli.help_text(Folders)


@pytest.mark.parametrize("argv, message", [
    (["--step=3"], "unknown flag --step: did you mean --steps?"),
    (["--steps=3.5"], "expected a whole number"),
    (["--lr=fast"], "expected a number"),
    (["--resume=1"], "expected true or false"),
    (["--resume"], "written --name=value"),
    (["steps=3"], "written --name=value"),
    (["--steps=1", "--steps=2"], "given twice"),
])
def test_bad_flags(argv, message):
    # catches abbreviations, silent coercion and repeated flags
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_flags(Config, argv)


@pytest.mark.parametrize("argv, message", [
    (["--steps=0"], "--steps=0: must be above 0"), (["--lr=nan"], "--lr=nan: must be a finite"),
    (["--lr=-inf"], "must be a finite"), (["--lr=-1e-9"], "--lr=-1e-09: must not be negative"),
    (["--bonus=inf"], "must be a finite")])
def test_numbers_out_of_range(argv, message):
    # catches a range that is declared and not read
    with pytest.raises(UserError, match=message):
        read_flags(Config, argv)
    assert read_flags(Config, ["--lr=0", "--steps=1", "--bonus=-3"]).bonus == -3


def test_flags_that_may_be_left_open():
    # catches "auto" that is refused, or lets a bad number pass, or is shown as None
    @dataclass
    class Config:
        beta: cli.NotNegative[float] | None = None  # the method's own
        drop: bool | None = None

    assert read_flags(Config, []) == read_flags(Config, ["--beta=auto", "--drop=auto"])
    assert read_flags(Config, ["--beta=auto"]).beta is None
    assert read_flags(Config, ["--beta=0", "--drop=false"]) == Config(0.0, False)
    for argv, message in ((["--beta=-1"], "must not be negative"), (["--beta=nan"], "finite"),
                          (["--drop=None"], "true or false"), (["--beta=none"], "a number")):
        with pytest.raises(UserError, match=message):
            read_flags(Config, argv)
    assert cli.as_text(None) == "auto" and cli.as_text(True) == "true"
    shown = cli.help_text(grpo.Config)
    assert "--clip_high=auto" in shown and "--drop=auto" in shown and "None" not in shown


def test_tables_and_cells():
    # catches columns that are mixed up, a None that is shown as a number, text that is cut wrongly
    shown = cli.table(dict(a=[1, None], bb=[0.5, "x"], text=["first", "second one"]))
    assert shown == "\na       bb  text\n1 0.500000  first\n-        x  second one"
    assert cli.plus_minus(1.23456, 0.1) == "1.235 ± 0.100"
    assert cli.plus_minus(1.5, None) == cli.plus_minus(1.5, float("nan")) == "1.500"
    assert cli.shorten(" two\n lines ", 9) == "two lines"
    assert cli.shorten("x" * 11, 10) == "xxxxxxx..."
    assert cli.shorten("abcdefghijk", 10, end=True) == "...efghijk"


def test_no_bar_without_a_terminal(capsys):
    # catches a line per update in a file, items that are lost
    assert list(cli.progress([1, 2, 3], "x")) == list(cli.progress(range(1, 4), None)) == [1, 2, 3]
    cli.say("a line")
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == "a line\n"


def test_a_run_says_what_it_is_and_what_comes_next(tmp_path, capsys):
    # catches a flag that was given and is not shown, or one at its default that is; curves of a
    # stage that trains nothing
    config = Config(out=str(tmp_path), seed=3)
    run = common.Run("x", config, torch.device("cpu"))
    start = capsys.readouterr().out
    assert f"x: writes to {tmp_path}, runs on cpu; --seed=3\n" == start
    run.finish({}, "python y.py --init=z")
    end = f"result in {tmp_path}\ncurves: python plot.py {tmp_path}\nnext: python y.py --init=z\n"
    assert capsys.readouterr().out.endswith(end)
    common.Run("y", cli.Config(out=str(tmp_path / "y")), torch.device("cpu")).finish({})
    assert "curves" not in capsys.readouterr().out


def test_notes_are_kept_in_the_log(tmp_path, capsys):
    # catches what was dropped and said on the terminal only; notes that a resumed run repeats
    cli.note("training prompts: dropped 2 of 5")
    run = common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    run.save_state(1, 2)
    cli.note("warning: KL below 0")
    run.log(loss=1.0)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["config", "note", "step", "note"]
    assert rows[1]["text"] == "training prompts: dropped 2 of 5"
    cli.note("training prompts: dropped 2 of 5")
    run = common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    run.load_state()
    run.finish(dict(loss=0.5))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["config", "note", "final"]
    assert capsys.readouterr().out.count("dropped 2 of 5") == 2


def test_seconds_count_all_sessions(tmp_path, monkeypatch):
    # catches a resumed run that says it took the time of its last session
    clock = [1000.0]
    monkeypatch.setattr(common.time, "time", lambda: clock[0])
    run = common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    clock[0] += 50
    run.save_state(1, 2)
    clock[0] += 3000  # interrupted
    run = common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    run.load_state()
    clock[0] += 7
    run.finish({})
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["seconds"] == 57


def test_help_shows_every_field_with_its_comment():
    # catches undocumented flags, a comment over two lines that is cut, a field shown twice
    shown = cli.help_text(Config)
    for part in ("--out=out/x", "output folder", "how many, over two lines", "--lr=0.001",
                 "how fast", "--bonus=0.5", "\nhow it learns:\n", "--seed=1", "\nthe run:\n",
                 "--resume=auto "):
        assert shown.count(part) == 1, part


STAGES = ("pretrain", "sft", "label", "reward", "ppo", "dpo", "grpo", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_every_stage_is_documented(stage):
    # catches a flag without a comment where its name does not say everything
    config = __import__(stage).Config
    lines = [line for line in cli.help_text(config).split("\n") if line.startswith("  --")]
    fields = [f.name for f in dataclasses.fields(config)]
    assert sorted(re.match(r"  --(\w+)=", line)[1] for line in lines) == sorted(fields)
    bare = {line.split("=")[0].strip(" -") for line in lines if len(line.split()) == 1}
    assert bare <= {"n_head", "n_embd", "dropout", "grad_clip", "weight_decay", "adam_eps",
                    "epochs", "iterations", "gamma", "value_clip", "temperature", "critic_lr"}
    for required in ("init", "data", "out", "seed", "lr", "device"):
        assert required in fields or stage in ("label", "evaluate")


def test_help_does_not_wait_for_torch():
    # catches a heavy import before the flags are read
    scripts = [*(f"{stage}.py" for stage in STAGES), "trace.py"]
    scripts += [str(p.relative_to(common.ROOT)) for p in (common.ROOT / "studies").glob("*.py")
                if p.name != "runs.py"]  # what the others share, no script
    code = "\n".join([
        "import contextlib, io, runpy, sys", f"for script in {scripts}:",
        "    sys.argv = [script, '--help']",
        "    with contextlib.redirect_stdout(io.StringIO()) as out:",
        "        try: runpy.run_path(script, run_name='__main__')",
        "        except SystemExit as stop: assert stop.code == 0",
        "    assert '--device' in out.getvalue() or script in out.getvalue(), script",
        "    assert not {'torch', 'tiktoken'} & set(sys.modules), script"])
    result = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of Linux")
def test_malloc_keeps_its_pages_for_the_next_step():
    code = """
import resource, types, common, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    before = faults()
    for size in (2**20, 2**23, 2**22):
        torch.ones(size).exp()
    return faults() - before
print(min(step() for _ in range(3)))
common.set_up(types.SimpleNamespace(seed=1, device="cpu"), "sft")
print(min(step() for _ in range(5)))
"""
    process = subprocess.run([sys.executable, "-c", code], text=True, check=True,
                             capture_output=True,
                             cwd=cli.__file__.removesuffix("cli.py"))
    without, kept = process.stdout.split()
    if int(without) < 1000:
        pytest.skip("this malloc keeps its pages by itself")
    assert int(kept) < 100


@pytest.mark.parametrize("given, count", [
    ({}, "2000"), (dict(GOMP_SPINCOUNT="7"), "7"), (dict(OMP_WAIT_POLICY="ACTIVE"), "None")])
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, count):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | given
    code = "import cli, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], text=True, check=True,
                             capture_output=True,
                             env=env, cwd=cli.__file__.removesuffix("cli.py"))
    assert process.stdout.split() == [count, "False"]  # set before torch reads it


def test_a_finished_run_is_not_touched(tmp_path, capsys):
    # catches results written over, and old files that survive --overwrite
    config = Config(out=str(tmp_path / "run"))
    run = common.Run("x", config, torch.device("cpu"))
    (run.folder / "model.pt").write_text("result")
    (run.folder / "notes.txt").write_text("mine")
    run.finish(dict(loss=1.0))
    log = (run.folder / "log.jsonl").read_text()
    with pytest.raises(SystemExit) as stop:
        common.Run("x", config, torch.device("cpu"))
    assert stop.value.code == 0
    assert "holds this run, finished: --overwrite=true" in capsys.readouterr().out
    for other in (dict(resume=True), dict(steps=9)):
        with pytest.raises(UserError, match="no interrupted run|a finished run with --steps=10, "):
            common.Run("x", Config(out=config.out, **other), torch.device("cpu"))
    assert (run.folder / "model.pt").read_text() == "result"
    assert (run.folder / "log.jsonl").read_text() == log
    common.Run("x", Config(out=config.out, overwrite=True), torch.device("cpu"))
    assert not (run.folder / "model.pt").exists() and (run.folder / "notes.txt").exists()
    with pytest.raises(UserError, match="no interrupted run"):
        common.Run("x", Config(out=config.out, resume=True), torch.device("cpu"))
    run.save_state(1, 2)
    with pytest.raises(UserError, match="an interrupted run: without --resume=false it goes on"):
        common.Run("x", Config(out=config.out, resume=False), torch.device("cpu"))
    assert common.Run("x", config, torch.device("cpu")).resuming


def test_only_the_files_of_a_run_are_removed(tmp_path):
    # catches an --out that names a folder with other people's files, or with another stage's run
    names = ("model.py", "state.md", "models.txt", "model.pt.bak", "rankings.jsonl",
             "choices.jsonl")
    for name in names:
        (tmp_path / name).write_text("mine")
    common.Run("x", Config(out=str(tmp_path), overwrite=True), torch.device("cpu"))
    common.Run("x", Config(out=str(tmp_path), overwrite=True), torch.device("cpu"))
    assert len([p for p in tmp_path.iterdir() if p.read_text() == "mine"]) == 6
    with pytest.raises(UserError, match="holds a x run: choose another --out"):
        common.Run("y", Config(out=str(tmp_path), overwrite=True), torch.device("cpu"))


def test_resume_needs_the_same_settings(tmp_path):
    # catches a run that goes on under other settings than its log says
    common.Run("x", Config(out=str(tmp_path), steps=5), torch.device("cpu")).save_state(1, 2)
    with pytest.raises(UserError, match="an interrupted run with --steps=5, not as here"):
        common.Run("x", Config(out=str(tmp_path), steps=6, resume=True), torch.device("cpu"))
    common.Run("x", Config(out=str(tmp_path), steps=5, resume=True), torch.device("cpu"))


def test_resume_needs_the_same_inputs(tmp_path):
    # catches a run that goes on from an SFT model that was trained again, or with edited data
    @dataclass
    class WithData(Config):
        data: str = str(tmp_path / "data.jsonl")

    def go_on(resume=True, **parents):
        return common.Run("x", WithData(out=str(tmp_path / "run"), resume=resume),
                          torch.device("cpu"), parents)

    data = tmp_path / "data.jsonl"
    data.write_text("one")
    run = go_on(resume=None, sft="abc")
    run.save_state(1, 2)
    assert run.parents == dict(sft="abc", data=common.text_hash("one"))
    assert go_on(sft="abc").load_state()["step"] == 1
    with pytest.raises(UserError, match="made from .*abc.* are now .*def"):
        go_on(sft="def")
    data.write_text("two")
    with pytest.raises(UserError, match=f"are now .*{common.text_hash('two')}"):
        go_on(sft="abc")
    assert (run.folder / "state.pt").exists()


def test_resume_elsewhere_is_said(tmp_path, capsys, one_thread):
    # catches a run that goes on with other threads, whose last digits differ, and says nothing
    common.Run("x", Config(out=str(tmp_path)), torch.device("cpu")).save_state(1, 2)
    common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    assert "warning" not in capsys.readouterr().err
    torch.set_num_threads(2)
    common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    assert "started with threads 1, here is 2" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path):
    # catches a traceback where a part of the path is a file
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        with pytest.raises(UserError, match=f"--out=.*{out} is no folder that can be written to"):
            common.Run("x", Config(out=str(tmp_path / out)), torch.device("cpu"))


def test_log_keys_are_frozen(tmp_path):
    # catches a typo in a metric's name
    run = common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    run.log(loss=1.0, step=0)
    with pytest.raises(KeyError, match="lss"):
        run.log(lss=1.0, step=1)
    run.finish(dict(loss=0.5))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["config", "step", "final"]
    assert rows[0]["config"]["steps"] == 10 and "torch" in rows[0]["versions"]
    assert rows[2]["loss"] == 0.5 and rows[2]["seconds"] >= 0


def checkpoint(path, stage="sft", **change):
    tokenizer = load_tokenizer("synthetic")
    size = dict(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens, block_size=16,
                n_layer=1, n_head=1, n_embd=8) | change
    torch.manual_seed(0)
    model = GPT(GPTConfig(**size)).eval()
    common.save_checkpoint(path, model, stage, tokenizer, Config(), dict(loss=1.0))
    return model


def test_checkpoint_round_trip(tmp_path):
    # catches weights or sizes lost in the file
    model = checkpoint(tmp_path / "model.pt", dropout=0.1)
    loaded, tokenizer, content = common.load_policy(tmp_path, ("sft",), torch.device("cpu"))
    assert tokenizer.name == "synthetic" and content["metrics"]["loss"] == 1.0
    assert "weights" not in content  # or they would be in memory twice
    assert loaded.config.dropout == 0.0 and not loaded.training  # no dropout after pretraining
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert content["hash"] == common.weights_hash(loaded.state_dict())


def test_foreign_checkpoints_are_refused(tmp_path):
    # catches a wrong file that is half loaded
    load = lambda *stages: common.load_policy(tmp_path, stages, torch.device("cpu"))
    with pytest.raises(UserError, match="holds no checkpoint: there is no model.pt in it"):
        load("sft")  # and no command that would train into this folder
    with pytest.raises(UserError, match="no checkpoint at .*python sft.py"):
        common.load_policy(tmp_path / "nowhere", ("sft",), torch.device("cpu"))
    (tmp_path / "model.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load("sft")
    torch.save(dict(weights={}), tmp_path / "model.pt")
    with pytest.raises(UserError, match="it is not what was written, by its digest"):
        load("sft")
    checkpoint(tmp_path / "model.pt", stage="pretrain")
    with pytest.raises(UserError, match="is a pretrain checkpoint; needed here: sft"):
        load("sft")
    checkpoint(tmp_path / "model.pt", vocab_size=4096, n_tokens=4000)
    with pytest.raises(UserError, match="vocabulary of 4000 tokens.*do not belong together"):
        load("sft")


def test_lineage_warning(capsys):
    # catches a reward model of another SFT run that is used in silence
    common.check_lineage("sft", "abc", dict(sft="abc"), "x")
    assert capsys.readouterr().err == ""
    common.check_lineage("sft", "abc", dict(sft="def"), "x")
    assert "x does not descend from the sft run" in capsys.readouterr().err


def test_cosine_schedule():
    # catches a warm-up that starts at 0 for good, and an end that is not reached
    factors = [common.cosine(s, 100, 10) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[-1] < 0.001 and all(a >= b for a, b in zip(factors[10:], factors[11:]))


@pytest.mark.parametrize("schedule", [common.cosine, common.linear])
def test_a_warm_up_takes_a_tenth_of_the_run_at_most(schedule, capsys):
    # catches a short run that never comes near its peak learning rate, in silence
    for steps, longest in ((100, 10), (25, 2), (9, 0), (1, 0)):
        found = [schedule(s, steps, 60) for s in range(steps)]
        assert found == [schedule(s, steps, longest) for s in range(steps)]
        assert max(found) > 0.8
        common.say_warmup(steps, 60)
        assert f"warm-up: {longest} of {steps} steps" in capsys.readouterr().out
    common.say_warmup(100, 10)
    assert capsys.readouterr().out == ""


def test_adamw_gets_what_it_is_given():
    # catches equal betas, a lost eps, decay on biases and gains, a parameter left out or in twice
    model = GPT(GPTConfig(64, 60, 8, 1, 1, 8))
    optimizer = common.adamw([model], 0.1, 0.2, betas=(0.7, 0.8), eps=1e-3,
                             without=[model.wpe.weight])
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.7, 0.8), 1e-3)
        for p in group["params"]:
            assert group["weight_decay"] == (0.2 if p.dim() == 2 else 0.0)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted({id(p) for p in model.parameters()} - {id(model.wpe.weight)})
    assert common.adamw([model], 0.1).param_groups[0]["betas"] == (0.9, 0.95)


def test_a_missing_default_input_is_made_as_asked(tmp_path, monkeypatch):
    # catches a stage before that runs elsewhere, with flags of its own, or although it is there
    from sft import Config
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.subprocess, "Popen", lambda command, **_: commands.append(command)
                        or SimpleNamespace(wait=lambda: 0))
    common.ensure_input(Config(), "init", "pretrain")
    common.ensure_input(Config(device="cpu"), "init", "pretrain")
    script = [sys.executable, str(common.ROOT / "pretrain.py")]
    assert commands == [script, [*script, "--device=cpu"]]
    (tmp_path / "out" / "pretrain").mkdir(parents=True)
    (tmp_path / "out" / "pretrain" / "model.pt").write_text("it is there")
    common.ensure_input(Config(), "init", "pretrain")
    assert len(commands) == 2


# --- values that depend on the size of the model, and memory -------------------------------------


@pytest.mark.parametrize("millions, column", [(1, 0), (29, 0), (31, 1), (135, 1), (499, 1),
                                              (501, 2), (1500, 2)])
def test_the_size_of_the_model_decides(millions, column):
    # catches a pretrained model that is destroyed by the learning rate of a small one, and a flag
    # of the user's that is overwritten
    import dpo
    import ppo
    import sft
    model = SimpleNamespace(num_params=lambda: millions * 1e6)
    found = common.sized(sft.Config(warmup=3), "sft", model)
    assert found.lr == (1e-3, 5e-5, 1e-5)[column] and found.warmup == 3
    assert found.max_new_tokens == (48, 128, 256)[column]
    assert found.text_length == (40, 256, 512)[column] and found.pretrain_data is None
    found = common.sized(ppo.Config(), "ppo", model)
    assert found.lr == (3e-4, 1e-5, 3e-6)[column] and found.critic_lr is None
    assert common.sized(found, "critic", model).critic_lr == found.lr
    found = common.sized(dpo.Config(loss="kto", beta=0.7), "kto", model)
    assert found.lr == (1e-4, 5e-6, 5e-6)[column] and found.beta == 0.7


def test_every_open_flag_of_a_stage_is_in_the_table():
    # catches a flag at None that no one decides: it would reach the optimiser or the loop
    import dpo
    import evaluate
    import label
    import ppo
    import reward
    import sft
    later = dict(sft={"pretrain_data"}, ppo={"critic_lr", "reference"},
                 grpo={*grpo.METHODS["dapo"], "kl_estimator", "reference"},
                 evaluate={"eval_prompts", "split", "out"},
                 **{loss: {"reference"} for loss in dpo.LOSSES})
    rows = [("sft", sft), ("reward", reward), ("ppo", ppo), ("grpo", grpo), ("label", label),
            ("evaluate", evaluate), *((loss, dpo) for loss in dpo.LOSSES)]
    assert common.AUTO.keys() == {"critic", *(name for name, _ in rows)}
    for name, module in rows:
        open_ = {f.name for f in dataclasses.fields(module.Config) if f.default is None}
        assert open_ - {"resume"} - later.get(name, set()) == common.AUTO[name].keys(), name
        assert all(len(row) == 3 for row in common.AUTO[name].values())
        rates = common.AUTO[name].get("lr", (3, 2, 1))
        assert rates[0] > rates[1] >= rates[2]


def test_blocks_are_prepared_as_the_flags_say(tiny, monkeypatch):
    # catches a flag that reaches the first network only, and a traceback without a compiler
    tried, other = [], GPT(tiny.config)
    monkeypatch.setattr(torch, "compile", lambda fn: tried.append(fn) or fn)
    for checkpointing, compiled in ((True, False), (False, True)):
        common.prepare_blocks(SimpleNamespace(checkpointing=checkpointing, compile=compiled), tiny,
                              other)
        for network in (tiny, other):
            assert (network.checkpointing, network.compiled) == (checkpointing, compiled)
        assert len(tried) == compiled  # nothing is compiled that nobody asked for
    monkeypatch.setattr(torch, "compile", lambda fn: 1 / 0)
    with pytest.raises(UserError, match="^--compile=true: torch cannot compile here: division by "
                                        "zero. Leave it out$"):
        common.prepare_blocks(SimpleNamespace(checkpointing=False, compile=True), tiny)


class OutOfMemoryError(RuntimeError):  # as torch.cuda's
    pass


@dataclass
class Trained(cli.Config):
    batch_size: int = 8
    micro_batch: int | None = 4
    checkpointing: bool = False


@pytest.mark.parametrize("error", [OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_flag_to_lower(error, capsys):
    # catches a traceback of fifty lines, and a line that does not say what to do
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_main(main, Trained())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--micro_batch (now 4) or --batch_size (now 8), or take --checkpointing=true" in said
    with pytest.raises(SystemExit):
        cli.run_main(main, cli.Config())
    assert "lower the model's size" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["torch.load", "GPT.load_state_dict"])
def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(where, tmp_path, monkeypatch, capsys):
    tokenizer = load_tokenizer("synthetic")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens, n_layer=1,
                          n_head=1, n_embd=8))
    common.save_checkpoint(tmp_path / "model.pt", model, "sft", tokenizer, cli.Config(), {})

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    owner, name = where.split(".")
    monkeypatch.setattr(dict(torch=torch, GPT=GPT)[owner], name, fail)
    with pytest.raises(SystemExit):
        cli.run_main(lambda _: common.load_policy(tmp_path, ("sft",), "cpu"), cli.Config())
    assert "out of memory" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def main(config):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_main(main, Trained())


@pytest.mark.parametrize("change", [
    lambda c: c.pop("tokenizer"), lambda c: c.update(tokenizer={"name": "x"}),
    lambda c: c["model"].update(heads=3), lambda c: c["model"].pop("n_embd"),
    lambda c: c["weights"].pop("ln_f.weight"), lambda c: c.update(weights=None),
    lambda c: c["weights"].update({"ln_f.weight": torch.zeros(3)}),
    lambda c: c["model"].update(n_head=2), lambda c: c["weights"]["wte.weight"][3].add_(1),
    lambda c: c.update(stage="dpo"), lambda c: c["metrics"].update(loss=0.1)])
def test_a_changed_checkpoint_is_one_clear_line(tmp_path, change):
    # catches a byte that has changed, also where the shapes of the weights do not know of it
    path = tmp_path / "model.pt"
    checkpoint(path)
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match="is damaged, or of another version") as error:
        common.load_policy(path, ["sft", "dpo"], torch.device("cpu"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda c: c.pop("tokenizer"), lambda c: c.update(tokenizer={"name": "x"}),
    lambda c: c["model"].update(heads=3), lambda c: c["model"].pop("n_embd"),
    lambda c: c["weights"].pop("ln_f.weight"), lambda c: c.update(weights=None),
    lambda c: c["weights"].update({"ln_f.weight": torch.zeros(3)}),
    lambda c: c["weights"].update({"ln_f.weight": "1"}), lambda c: c.pop("metrics"),
    lambda c: c["weights"]["wte.weight"][3].add_(1), lambda c: c.update(hash=1),
    lambda c: c["weights"].update({"ln_f.weight": torch.zeros(8, dtype=torch.long)}),
    lambda c: c["model"].update(n_layer=10**9), lambda c: c["model"].update(block_size=2**31 - 1),
    lambda c: c["model"].update(n_embd=10**30), lambda c: c["model"].update(norm_eps="1"),
    lambda c: c["model"].update(rope_scaling=(1.0, float("nan"), 1.0, 1.0)),
    lambda c: (c["model"].update(block_size=2**31 - 1), c["weights"].update(
        {"wpe.weight": torch.zeros(1, 8).expand(2**31 - 1, 8)}))])
def test_a_checkpoint_of_another_version_is_one_clear_line(tmp_path, change):
    # catches a traceback where a file is of another version, and memory taken for a declared size
    tokenizer = load_tokenizer("synthetic")
    path = tmp_path / "model.pt"
    model = GPT(GPTConfig(tokenizer.vocab_size, tokenizer.n_tokens, 16, 1, 1, 8))
    common.save_checkpoint(path, model, "sft", tokenizer, Config(), {})
    common.load_policy(path, ["sft"], torch.device("cpu"))
    old = common.load_file(path) | dict(format="rlhf-1")  # which has no digest to say it first
    change(old)
    torch.save(old, path)
    with pytest.raises(UserError, match="is damaged, or of another version") as error:
        common.load_policy(path, ["sft"], torch.device("cpu"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- files --------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    # catches a traceback, and a part of a file that stays behind
    path = tmp_path / "model.pt"
    for writes in range(3):  # it takes three
        path.write_text("old")
        monkeypatch.setattr(files, "open", Disk(writes).open, raising=False)
        with pytest.raises(UserError, match="cannot write .*model.pt: No space left on device "
                                            r"\(needs 0.4 MB, [\d,.]+ MB are free\)"):
            common.save_file(dict(weights=torch.ones(10**5)), path)
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
        assert path.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    # catches a name that stands for nothing after a loss of power
    said = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: said.append(
            name + " folder" * (name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)))
            or real(*args))
    common.save_file(dict(x=torch.ones(3)), tmp_path / "x.pt")
    assert said == ["fsync", "replace", "fsync folder"]
    assert common.load_file(tmp_path / "x.pt")["x"].tolist() == [1, 1, 1]


def test_half_a_row_is_taken_back(tmp_path, monkeypatch):
    # catches a log that no later run can read
    run = common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    before = (tmp_path / "log.jsonl").read_bytes()
    monkeypatch.setattr(files, "open", Disk(0).open, raising=False)
    with pytest.raises(UserError, match="cannot write .*log.jsonl: No space left"):
        run.log(loss=1.0)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_the_room_is_looked_at_before_the_first_step(tmp_path, monkeypatch):
    # catches a run that finds out at its first saved state, an hour later
    model = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = common.adamw([model], 0.1)
    free = lambda n: monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(
        free=n))
    run = common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    free(23.9e6)  # two states of weights and two moments, 4 MB each
    with pytest.raises(UserError, match="state.pt: a run of this model needs 24.0 MB, 23.9 MB are"):
        run.load_state(model=model, optimizer=optimizer)
    free(24.1e6)
    assert run.load_state(model=model, optimizer=optimizer) == {}
    run.save_state(3, 9, model=model)
    again = common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    free(1000)  # going on takes none at first: the state is there already
    assert again.load_state(model=model)["step"] == 3
    assert not again.due(3, 1) and again.due(4, 1)
    with pytest.raises(UserError, match="cannot write .*state.pt: it needs 4.0 MB, 0.0 MB are"):
        again.save_state(4, 9, model=model)


def test_a_checkpoint_is_compared_without_drawing_first_weights(tmp_path, monkeypatch):
    # catches the second that torch needs to draw nothing on the meta device, and random numbers
    # that loading takes or leaves: the head of a reward model comes behind it
    config = GPTConfig(vocab_size=16, n_tokens=13, block_size=8, n_layer=1, n_head=2, n_embd=8)
    weights, normal_ = GPT(config).state_dict(), torch.Tensor.normal_
    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_",
                        lambda x, *a, **b: drawn.append(x.device.type) or normal_(x, *a, **b))
    monkeypatch.setattr(common, "declared", lambda checkpoint, path: (None, config))
    torch.manual_seed(3)
    found, _ = common.build(GPT, dict(weights=dict(weights)), tmp_path, torch.device("cpu"))
    after = torch.rand(3)
    assert set(drawn) == {"cpu"}
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
    torch.manual_seed(3)
    GPT(config)
    assert torch.equal(torch.rand(3), after)


def test_a_damaged_state_is_refused(tmp_path):
    # catches a flipped bit in a run that goes on
    model = torch.nn.Linear(3, 3)
    common.Run("x", Config(out=str(tmp_path)), torch.device("cpu")).save_state(
        1, 9, model=model, metrics=dict(loss=0.5))
    path = tmp_path / "state.pt"
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(100):
        broken, n = bytearray(whole), rng.randrange(len(whole))
        broken[n] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        run = common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
        try:  # what the archive pads its files with may be anything
            assert run.load_state(model=torch.nn.Linear(3, 3))["metrics"] == dict(loss=0.5)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 20
    common.save_file(dict(step=1), path)
    run = common.Run("x", Config(out=str(tmp_path), resume=True), torch.device("cpu"))
    with pytest.raises(UserError, match="of another version of this project"):
        run.load_state(model=model)


def test_every_number_of_a_state_is_in_its_digest():
    # catches a digest that knows only some of a file
    state = lambda: dict(model=dict(w=torch.ones(2, 3), b=torch.ones((), dtype=torch.bfloat16)),
                         optimizer=[dict(step=torch.tensor(1), lr=0.1)], rng=torch.arange(4),
                         n=None)

    def digest(change):
        content, found = state(), hashlib.sha256()
        change(content)
        common.add_to(found, content)
        return found.hexdigest()

    changes = [lambda s: None, lambda s: s["model"]["w"][1, 2].add_(1e-6),
               lambda s: s["model"].update(w=torch.ones(3, 2)), lambda s: s["model"]["b"].zero_(),
               lambda s: s["optimizer"][0].update(lr=0.2), lambda s: s["rng"][3].add_(1),
               lambda s: s["optimizer"].append({}), lambda s: s.update(n=0), lambda s: s.pop("n"),
               lambda s: s.update(rng=torch.arange(4).int()), lambda s: s.update(n=[1, 23]),
               lambda s: s.update(n=[12, 3])]
    assert len(set(map(digest, changes))) == len(changes)
    assert digest(changes[0]) == digest(changes[0])


def test_files_of_dead_processes_are_swept(tmp_path):
    # catches disks that fill up with parts of files, and a file that another run is writing
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = {f"model.pt.{files.HOST}.1.tmp", f"model.pt.elsewhere.{dead.pid}.tmp", "notes.tmp",
            "notes.x.tmp", "notes.x.y.tmp", "model.tmp.pt"}
    for name in (f"model.pt.{files.HOST}.{dead.pid}.tmp", "log.elsewhere.1.tmp",
                 files.unfinished(tmp_path / "log").name, *kept):
        (tmp_path / name).write_text("")
    os.utime(tmp_path / "log.elsewhere.1.tmp", (time.time() - 90000,) * 2)
    common.Run("x", Config(out=str(tmp_path)), torch.device("cpu"))
    assert {p.name for p in tmp_path.iterdir()} == kept | {"log.jsonl"}


# --- what the user gives, and where the output goes ----------------------------------------------


def test_a_home_folder_is_found(monkeypatch):
    # catches a folder that is called ~
    monkeypatch.setenv("HOME", "/home/me")
    read = lambda *argv: cli.read_flags(sft.Config, argv)
    assert read("--out=~/a").out == "/home/me/a" and read("--out=a/~b~/c").out == "a/~b~/c"
    assert read("--init=x,~/y,~").init == "x,/home/me/y,/home/me"
    assert cli.read_flags(sample.Config, ["--prompt=~/x is?"]).prompt == "~/x is?"
    with pytest.raises(UserError, match="--out= is empty"):
        read("--out=")
    with pytest.raises(UserError, match="did you mean --save_every"):
        read("--save-every=5")
    assert evaluate.Config().reward_model == "" == cli.read_flags(
        evaluate.Config, ["--reward_model="]).reward_model


def test_any_seed_is_a_seed():
    # catches a time stamp that torch or numpy refuses
    for seed in (2**32, 2**64, 10**30):
        assert cli.read_flags(sft.Config, [f"--seed={seed}"]).seed == seed
        assert 0 <= common.stream(seed, "x", "y").random() < 1


def test_a_device_without_numbers_is_refused():
    with pytest.raises(UserError, match="--device=meta is not available here"):
        common.find_device("meta")


def test_output_that_nobody_takes_is_dropped(tmp_path):
    # catches a run that ends because of `| head -1`, or of a full disk behind `> log`
    reader, writer = os.pipe()
    os.close(reader)
    code = """
import sys, cli
def main(config):
    for n in range(9000):
        print('line', n, flush=n % 9 == 0)
    print('x', file=sys.stderr)
    open('done', 'w').close()
cli.run_main(main, cli.Config())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=writer, stderr=writer,
                         env=os.environ | dict(PYTHONPATH=str(common.ROOT)))
    assert ran.returncode == 0 and (tmp_path / "done").exists()


def test_errors_of_the_system_are_one_line(tmp_path, capsys):
    # catches a traceback for a file that nobody thought of
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda _: open(tmp_path), cli.Config())
    assert stop.value.code == 2 and f"error: {tmp_path}: Is a directory" in capsys.readouterr().err
