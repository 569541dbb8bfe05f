"""The real scripts, tiny: the whole chain, resume, and what a user sees when something is wrong."""

import json
import math

import cli
import common
import label
import plot
import pytest
import torch
from conftest import run_process, run_script
from data import batches
from data.records import write_jsonl
from data.synthetic.world import lookup
from tiny_runs import make_inputs

TINY = dict(
    pretrain=["--steps=12", "--n_layer=1", "--n_embd=64", "--n_head=2", "--documents=500",
              "--block_size=128", "--batch_size=8"],
    sft=["--demos=512", "--epochs=1", "--batch_size=8", "--samples=32", "--save_every=30"],
    label=["--prompts=24", "--held_out=12", "--k=3", "--oversample=1", "--max_new_tokens=80"],
    reward=["--batch_size=4", "--samples=16", "--max_new_tokens=80"],
    dpo=["--batch_size=4", "--eval_prompts=8", "--max_new_tokens=80"],
    ppo=["--iterations=2", "--batch_size=8", "--eval_prompts=8", "--best_of=2",
         "--max_new_tokens=80"],
    grpo=["--iterations=2", "--batch_size=8", "--k=4", "--eval_prompts=8", "--max_new_tokens=80"])

PARENTS = dict(pretrain=set(), sft={"pretrain"}, label={"sft"}, reward={"sft", "data"},
               dpo={"sft", "data"}, ppo={"sft", "reward"}, grpo={"sft"})


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder in which every stage has run once, tiny; and the output of each."""
    folder = tmp_path_factory.mktemp("chain")
    outputs = {}
    for stage, flags in TINY.items():
        result = run_script(f"{stage}.py", *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
        outputs[stage] = result.stdout
    return folder, outputs


def rows(folder, stage, kind):
    lines = (folder / "out" / stage / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_every_stage_writes_what_it_promises(chain):
    # catches a missing file, an incomplete log, a checkpoint that needs more than weights_only
    folder, outputs = chain
    for stage in TINY:
        out = folder / "out" / stage
        final = rows(folder, stage, "final")
        assert len(final) == 1 and "seconds" in final[0] and "done after" in outputs[stage]
        assert rows(folder, stage, "config")[0]["config"]["seed"] == 1
        assert not (out / "state.pt").exists()
        parents = rows(folder, stage, "config")[0]["parents"]
        assert set(parents) == PARENTS[stage]
        if stage != "label":
            content = torch.load(out / "model.pt", weights_only=True)
            assert content["stage"] == stage and content["tokenizer"] == "synthetic"
            assert content["parents"] == parents
    card = json.loads((folder / "out" / "label" / "card.json").read_text())
    sft = torch.load(folder / "out" / "sft" / "model.pt", weights_only=True)
    assert card["parents"]["sft"] == sft["hash"]
    assert (folder / "out" / "sft" / "model-epoch1.pt").exists()


def test_reward_model_is_centred_and_scaled(chain):
    # catches a shift or scale that is measured but not applied
    final = rows(chain[0], "reward", "final")[0]
    assert abs(final["demo_score"]) < 1e-4
    assert final["scale"] > 0 and 0 <= final["accuracy"] <= 1
    assert {"longer_wins", "shorter_wins", "calibration_error", "gold_accuracy",
            "accuracy_on_wide_gold", "accuracy_se"} <= set(final)


def test_ppo_logs_what_one_needs_to_see(chain):
    # catches a metric that is not logged, KL at the start that is not 0, a ratio that is not 1
    folder, outputs = chain
    first = rows(folder, "ppo", "step")[0]
    assert {"score", "kl", "kl_se", "kl_exact", "kl_per_token", "objective", "entropy", "length",
            "length_min", "length_max", "eos_rate", "clip_fraction", "approx_kl", "ratio_max",
            "grad_norm", "critic_grad_norm", "explained_variance", "returns_mean", "returns_std",
            "beta", "generate_tok_per_s", "score_tok_per_s", "train_tok_per_s",
            "policy_loss", "value_loss", "gold"} <= set(first)
    assert abs(first["kl"]) < 1e-4 and abs(first["kl_exact"]) < 1e-4
    assert "first minibatch: |log ratio|" in outputs["ppo"]
    final = rows(folder, "ppo", "final")[0]
    assert {"score", "gold", "gold_sft", "gold_win_rate", "tie_rate", "kl", "kl_se", "length",
            "eos_rate", "gold_best_of_n"} <= set(final)
    assert rows(folder, "ppo", "sample")[0]["prompt"]


def test_grpo_checks_the_embedded_arithmetic(chain):
    # catches prompts of another family, answers of another question, samples that are not clustered
    folder, outputs = chain
    final = rows(folder, "grpo", "final")[0]
    assert {"accuracy", "accuracy_se", "accuracy_sft", "accuracy_sft_se", "judged", "questions",
            "gold", "gold_sft", "kl", "kl_se", "length", "eos_rate"} <= set(final)
    assert final["judged"] == 8 >= final["questions"] and "The policy loss" in outputs["grpo"]
    samples = rows(folder, "grpo", "held_out_sample") + rows(folder, "grpo", "sample")
    assert len(samples) == 16
    for sample in samples:
        assert lookup(sample["prompt"]).family == "arithmetic"
    # the first four of each logged iteration are answers to one prompt
    assert len({s["prompt"] for s in rows(folder, "grpo", "sample")[:4]}) == 1


def test_dpo_logs_what_one_needs_to_see(chain):
    # catches a metric that is not logged, a loss that is not ln 2 at the start, a lost cache
    folder, outputs = chain
    start, end = rows(folder, "dpo", "validation")
    for name in ("loss", "train_loss"):
        assert start[name] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("accuracy", "train_accuracy"):
        assert start[name] == pytest.approx(0.5)
    final = rows(folder, "dpo", "final")[0]
    assert {"loss", "accuracy", "train_loss", "train_accuracy", "chosen_reward", "rejected_reward",
            "margin", "chosen_logp", "rejected_logp", "gold", "gold_sft", "gold_win_rate",
            "tie_rate", "kl", "kl_se", "length", "eos_rate"} <= set(final)
    assert final["loss"] == end["loss"] and "first minibatch: |log ratio|" in outputs["dpo"]
    assert list((folder / "out" / "reference_logps").iterdir())  # one, and those of later tests
    content = torch.load(folder / "out" / "dpo" / "model.pt", weights_only=True)
    sft = torch.load(folder / "out" / "sft" / "model.pt", weights_only=True)
    assert content["parents"]["sft"] == sft["hash"]


def test_every_run_can_be_drawn(chain):
    # catches a stage whose log plot.py cannot read, a value that is not the one logged
    folder, outputs = chain
    for stage in TINY:
        drawn = run_script("plot.py", f"out/{stage}", "--text=true", cwd=folder)
        assert (f"curves: python plot.py out/{stage}\n" in outputs[stage]) == (stage != "label")
        if stage == "label":
            assert drawn.returncode == 2 and "no curve to draw" in drawn.stderr
            continue
        assert drawn.returncode == 0 and f"out/{stage}: {stage}, " in drawn.stdout, drawn.stderr
        run, steps = plot.read_run(folder / "out" / stage), rows(folder, stage, "step")
        for field in set(steps[0]) & plot.FIELDS - {"accuracy", "beta", "score", "kl_loss"}:
            logged = {r["step"]: r[field] for r in steps if r[field] is not None}
            assert run.train.get(field, {}) == logged, (stage, field)
        assert any("loss" in field for field in run.train)
        final = rows(folder, stage, "final")[0]
        for field in set(final) & plot.FIELDS - {"accuracy", "beta"}:
            assert list(run.held_out[field].values())[-1] == final[field], (stage, field)
    both = run_script("plot.py", *(f"out/{stage}" for stage in TINY), "--text=true", cwd=folder)
    assert both.returncode == 0 and both.stdout.count("\ngold\n") == 1


def test_a_log_is_a_table_of_pandas(chain):
    # catches a log that pandas cannot read in one line, as docs/log.md says it does
    pandas = pytest.importorskip("pandas", reason="reads the log as docs/log.md says")
    for stage in TINY:
        frame = pandas.read_json(chain[0] / "out" / stage / "log.jsonl", lines=True)
        for kind in ("step", "validation", "final"):
            for logged, (_, row) in zip(rows(chain[0], stage, kind),
                                        frame[frame.kind == kind].iterrows(), strict=True):
                for field, value in logged.items():
                    if isinstance(value, int | float):
                        assert row[field] == pytest.approx(value, rel=1e-9), (stage, field)


@pytest.mark.parametrize("flags", [
    ["--kl_in=loss", "--entropy_coef=0.01", "--score_scaling=true"],
    ["--kl_target=1", "--ptx_coef=1", "--ptx_batch=4", "--temperature=0.7"],
    ["--whiten=false", "--epochs=1", "--minibatches=1", "--micro_batch=3"],
])
def test_ppo_options_run(chain, flags):
    # catches an option that only works alone, or not at all
    out = f"--out=out/ppo_{len(flags)}_{flags[0].strip('-')}"
    result = run_script("ppo.py", *TINY["ppo"], *flags, out, cwd=chain[0])
    assert result.returncode == 0, result.stderr


def test_a_missing_stage_is_run_first(tmp_path):
    # catches a default input that is not made, and a failure of the stage before that is lost
    (tmp_path / "out" / "pretrain").mkdir(parents=True)
    (tmp_path / "out" / "pretrain" / "model.pt").write_text("junk, so that sft.py fails at once")
    result = run_process("label.py", *TINY["label"], cwd=tmp_path)
    assert "running `python sft.py` first" in result.stdout
    assert result.returncode == 2
    assert "sft.py: error: out/pretrain/model.pt is not a checkpoint" in result.stderr
    assert "label.py: error: `python sft.py` failed with exit status 2" in result.stderr
    assert not (tmp_path / "out" / "label").exists()


def test_cut_answers_are_not_ranked(tmp_path, monkeypatch):
    # catches an answer cut by the length limit that is ranked and so gets an EOS it never had
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    sample, cut, ended = batches.sample_texts, set(), set()

    def keep(*args, **options):
        drawn = sample(*args, **options)
        for s in drawn:
            (ended if s["finished"] else cut).add(s["text"])
        return drawn

    monkeypatch.setattr(batches, "sample_texts", keep)
    label.main(cli.read_flags(label.Config, [
        "--init=sft", "--prompts=12", "--held_out=6", "--k=4", "--max_new_tokens=6",
        "--temperature=0.9", "--out=ranked"]))
    lines = (tmp_path / "ranked" / "rankings.jsonl").read_text().splitlines()
    ranked = {text for line in lines for text in json.loads(line)["completions"]}
    assert len(ranked) > 4 and len(cut - ended) > 4
    assert ranked <= ended


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage, change", [
    ("pretrain", dict(eval_every=4)), ("sft", dict(save_every=30)), ("reward", dict(save_every=2)),
    ("ppo", dict(save_every=1, kl_target=1.0, score_scaling=True, iterations=3))])
def test_resume_is_exact(chain, tmp_path, monkeypatch, stage, change):
    # catches anything that resume forgets: optimiser, data order, beta, running statistics
    module = __import__(stage)
    monkeypatch.chdir(chain[0])
    config = cli.read_flags(module.Config, TINY[stage])
    for name, value in change.items():
        setattr(config, name, value)
    config.out = str(tmp_path / "whole")
    module.main(config)

    config.out, save, calls = str(tmp_path / "parts"), common.Run.save_state, []

    def save_and_stop(run, *args, **state):
        save(run, *args, **state)
        calls.append(1)
        if len(calls) == 2:
            run.log("later", x=1)  # written after the state: resume must cut it off
            raise Stop

    monkeypatch.setattr(common.Run, "save_state", save_and_stop)
    with pytest.raises(Stop):
        module.main(config)
    monkeypatch.setattr(common.Run, "save_state", save)
    module.main(config)
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True)
                    for name in ("whole", "parts"))
    assert whole["hash"] == parts["hash"]
    kinds = lambda name: [json.loads(line)["kind"] for line in
                          (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert kinds("parts") == kinds("whole")


@pytest.mark.parametrize("script, flags, message", [
    ("sft.py", ["--epoch=3"], "unknown flag --epoch: did you mean --epochs?"),
    ("sft.py", ["--epochs=three"], "expected a whole number"),
    ("sft.py", ["--init=nowhere"], "--init=nowhere does not exist: `python pretrain.py"),
    ("sft.py", ["--init=out/reward"], "is a reward checkpoint; needed here: sft or convert"),
    ("sft.py", ["--init=text.txt"], "is not a checkpoint of this project"),
    ("sft.py", ["--data=missing.jsonl"], "there is no file missing.jsonl"),
    ("sft.py", ["--data=broken.jsonl"], "broken.jsonl:2: not JSON"),
    ("sft.py", ["--data=fields.jsonl"], "fields.jsonl:1: the field 'completion' is missing"),
    ("sft.py", ["--data=empty.jsonl"], "empty.jsonl:1: 'completion' is empty"),
    ("sft.py", ["--data=long.jsonl"], "fits the context of 128 tokens"),
    ("sft.py", ["--out=out/sft"], "holds a finished run with --"),
    ("label.py", ["--out=out/label"], "out/label holds a finished run with --"),
    ("reward.py", ["--data=fields.jsonl"], "fields.jsonl:1: the field 'chosen' is missing"),
    ("ppo.py", ["--data=long.jsonl"], "no training prompt of at most"),
    ("ppo.py", ["--reward_model=out/sft"], "is a sft checkpoint; needed here: reward"),
    ("ppo.py", ["--reward_model=nowhere"], "--reward_model=nowhere does not exist"),
    ("ppo.py", ["--kl_in=both"], "--kl_in=both: expected reward or loss"),
    ("ppo.py", ["--minibatches=0"], "--minibatches=0: must be above 0"),
    ("ppo.py", ["--kl_target=1", "--batch_size=64", "--kl_horizon=12.8"],
     "--kl_horizon=12.8: beta would change its sign"),
    ("ppo.py", ["--kl_target=1", "--beta=0"], "--beta=0: the controller"),
    ("ppo.py", ["--seed=-1"], "--seed=-1: must not be negative"),
    ("sft.py", ["--max_new_tokens=127"], "no held-out prompt leaves that much room"),
    ("label.py", ["--max_new_tokens=127"], "do not fit the context of 128"),
    ("pretrain.py", ["--data=latin.txt"], "not UTF-8"),
    ("sft.py", ["--out=text.txt"], "--out=text.txt is no folder"),
    ("sft.py", ["--out=out/reward"], "out/reward holds a reward run: choose another --out"),
    ("pretrain.py", ["--tokenizer=bert"], "tokenizer 'bert' is unknown"),
    ("pretrain.py", ["--n_head=3"], "n_embd=128 is not a multiple of n_head=3"),
    ("pretrain.py", ["--data=missing.txt"], "there is no file missing.txt"),
])
def test_bad_input_is_one_clear_line(chain, script, flags, message):
    # catches tracebacks, wrong exit statuses, and files touched by a run that cannot start
    folder = chain[0]
    (folder / "text.txt").write_text("hello")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    write_jsonl(folder / "fields.jsonl", [dict(prompt="a")] * 3)
    write_jsonl(folder / "empty.jsonl", [dict(prompt="a", completion="")])
    write_jsonl(folder / "long.jsonl", [dict(prompt=f"{i} " * 300, completion="b")
                                        for i in range(60)])
    times = lambda: {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*")
                     if p.is_file() and "cache" not in p.parts}
    before = times()
    if not any(f.startswith("--out") for f in flags):
        flags = [*flags, "--out=out/new"]
    result = run_script(script, *flags, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert times() == before


def test_vocabulary_that_does_not_fit(chain):
    # catches token ids of one tokenizer fed to a model of another
    folder = chain[0]
    content = torch.load(folder / "out" / "sft" / "model.pt", weights_only=True)
    content["model"] |= dict(vocab_size=64, n_tokens=60)
    (folder / "odd").mkdir()
    common.save_file(content, folder / "odd" / "model.pt")
    result = run_script("sft.py", "--init=odd", "--out=out/new", cwd=folder)
    assert result.returncode == 2 and "do not belong together" in result.stderr
    assert not (folder / "out" / "new").exists()


def test_lineage_is_checked_across_runs(chain, tmp_path):
    # catches a reward model used with a policy of another SFT run, in silence
    folder = chain[0]
    run_script("sft.py", *TINY["sft"], "--seed=2", "--out=out/sft2", cwd=folder)
    result = run_script("ppo.py", *TINY["ppo"], "--init=out/sft2", f"--out={tmp_path}/p",
                        cwd=folder)
    assert result.returncode == 0 and "does not descend from the sft run" in result.stderr


def test_a_trained_policy_starts_the_next_round(chain):
    # catches a stage that takes SFT models only: a second round labels and trains the last policy
    folder = chain[0]
    again = ["--init=out/dpo", "--reward_model=out/reward"]
    for script, flags in (
            ("label.py", [*TINY["label"], "--init=out/dpo", "--out=out/label2"]),
            ("dpo.py", [*TINY["dpo"], "--data=out/label2/rankings.jsonl", "--init=out/dpo",
                        "--out=out/dpo2"]),
            ("ppo.py", [*TINY["ppo"], *again, "--out=out/ppo2"]),
            ("grpo.py", [*TINY["grpo"], *again, "--reward=model", "--out=out/grpo2"])):
        result = run_script(script, *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
    first, *others = [torch.load(folder / "out" / name / "model.pt", weights_only=True)
                      for name in ("dpo", "dpo2", "ppo2", "grpo2")]
    assert all(c["parents"]["dpo"] == first["hash"] for c in others)


def test_real_pairs_without_embedded_data(chain):
    # catches stages that only work on the embedded data
    folder = chain[0]
    demos = [dict(prompt=f"Say {i}.", completion=f"It is {i}.") for i in range(40)]
    pairs = [dict(prompt=[dict(role="user", content=f"Say {i}.")], chosen=f"It is {i}.",
                  rejected="No.") for i in range(40)]
    write_jsonl(folder / "demos.jsonl", demos)
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "text.txt").write_text("\n\n".join(f"It is {i}." for i in range(300)))
    for script, flags in (
            ("pretrain.py", ["--data=text.txt", *TINY["pretrain"][:4],
                             "--block_size=128", "--out=out/rp"]),
            ("pretrain.py", ["--data=demos.jsonl", "--init=out/rp", "--steps=3", "--out=out/rp2"]),
            ("sft.py", ["--data=demos.jsonl", "--init=out/rp2", "--epochs=1", "--out=out/rs"]),
            ("reward.py", ["--data=pairs.jsonl", "--init=out/rs", "--out=out/rr",
                           "--max_new_tokens=90"]),
            ("ppo.py", ["--data=pairs.jsonl", "--init=out/rs", "--reward_model=out/rr",
                        "--out=out/rq", "--iterations=2", "--batch_size=8"])):
        result = run_script(script, *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
    final = rows(folder, "rq", "final")[0]
    assert {"score", "score_sft", "kl", "length", "length_sft", "score_win_rate"} <= set(final)
    assert "gold" not in final
