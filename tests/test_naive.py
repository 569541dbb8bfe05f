"""The real scripts, whole and tiny, against their naive twins (naive.py): every weight, every row.

Each case runs a script as its command line does, in float64, where two right implementations agree
to ten digits: what is left of a difference is a fault. Cases marked `cut` are interrupted after a
saved state and go on from it. A clock that ticks once a look makes speeds into counts.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import runpy
import sys
import time
from functools import partial

import cli
import common
import naive
import numpy as np
import pytest
import torch
from conftest import ROOT
from data import batches
from data.records import write_jsonl
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from reward import Ensemble, RewardModel

MODULES = {stage: __import__(stage) for stage in
           ("pretrain", "sft", "label", "reward", "dpo", "ppo", "grpo", "evaluate")}
PRETRAIN = ["--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=54",
            "--batch_size=5", "--steps=31", "--warmup=3", "--eval_every=5", "--documents=120",
            "--lr=0.01", "--muon_lr=0.05"]
SFT = ["--init=base", "--epochs=2", "--batch_size=5", "--samples=5", "--max_new_tokens=6",
       "--lr=0.003", "--warmup=3", "--save_every=4"]
LABEL = ["--init=sft", "--prompts=34", "--held_out=9", "--k=3", "--max_new_tokens=9", "--chunk=4"]
REWARD = ["--init=sft", "--batch_size=2", "--lr=0.01", "--warmup=2", "--samples=6",
          "--max_new_tokens=9", "--save_every=2", "--probe=2"]
DPO = ["--init=sft", "--batch_size=3", "--lr=0.003", "--warmup=2", "--max_new_tokens=8",
       "--eval_prompts=4", "--save_every=2", "--epochs=2"]
PPO = ["--init=sft", "--reward_model=reward", "--iterations=3", "--batch_size=8",
       "--max_new_tokens=9", "--lr=0.01", "--critic_lr=0.02", "--warmup=2", "--eval_prompts=5",
       "--best_of=2", "--log_every=2", "--save_every=2", "--micro_batch=3"]
GRPO = ["--init=sft", "--iterations=3", "--batch_size=12", "--k=4", "--max_new_tokens=9",
        "--lr=0.01", "--warmup=2", "--eval_prompts=5", "--log_every=2", "--save_every=2",
        "--micro_batch=4"]
LONG = ["--iterations=21", "--batch_size=4", "--max_new_tokens=3", "--warmup=9", "--lr=0.001"]
PAIRS, EMBEDDED = "--data=pairs.jsonl", "--data=label/rankings.jsonl"
# every flag that changes the loss, the data or the figures is in one case at least
CASES = dict(
    pretrain=[
        (PRETRAIN, "cut"),
        ([*PRETRAIN, "--data=text.txt", "--init=base", "--weight_decay=0.7", "--grad_clip=0.2",
          "--micro_batch=2", "--seed=3", "--steps=11", "--warmup=0"], ""),
        ([*PRETRAIN, "--data=mixed.jsonl", "--block_size=9"], ""),
        ([*PRETRAIN, "--data=full.txt", "--block_size=3", "--steps=3"], "")],
    sft=[
        ([*SFT, "--data=demos.jsonl", "--pretrain_data=text.txt", "--weight_decay=0.5"], "cut"),
        ([*SFT, "--demos=60", "--quality=0.2", "--safety=0.3", "--epochs=1", "--seed=2",
          "--micro_batch=2", "--pretrain_mix=0.8", "--samples=10"], ""),
        ([*SFT, "--data=demos.jsonl", "--grad_clip=0.1", "--warmup=1", "--init=sft"], ""),
        ([*SFT, "--data=demos.jsonl", "--pretrain_mix=0", "--pretrain_data=text.txt"], "")],
    label=[
        ([*LABEL, "--oversample=2", "--temperature=0.8"], "cut"),
        ([*LABEL, "--seed=7", "--noise=0.1", "--length=0.2", "--flattery=2", "--bullets=-3",
          "--confidence=1.5", "--caution=-1", "--chunk=5", "--k=5", "--temperature=1.2"], ""),
        ([*LABEL, "--init=sft,dpo", "--labeler=model", "--reward_model=reward", "--k=5"], "cut"),
        ([*LABEL, "--init=dpo,sft", "--labeler=model", "--reward_model=short", "--data=demos.jsonl",
          "--held_out=2", "--k=4"], ""),
        (["--labeler=principles", "--answers=label/rankings.jsonl", "--prompts=30"], ""),
        (["--labeler=principles", "--answers=pairs.jsonl", "--judge=judge",
          "--principles=mine.txt"], "")],
    reward=[
        ([*REWARD, EMBEDDED], "cut"),
        ([*REWARD, EMBEDDED, "--pretrain_mix=0", "--demos=demos.jsonl", "--micro_batch=2",
          "--weight_decay=0.6", "--seed=4"], ""),
        ([*REWARD, PAIRS, "--epochs=2", "--grad_clip=0.05", "--probe=0"], ""),
        # 17 steps each: interrupted in the second one
        ([*REWARD, EMBEDDED, "--ensemble=2", "--seed=2", "--save_every=19"], "cut"),
        ([*REWARD, PAIRS, "--ensemble=3", "--epochs=2"], "")],
    dpo=[
        ([*DPO, EMBEDDED, "--epochs=1"], "cut"),
        ([*DPO, PAIRS, "--nll=0.4", "--beta=0.7", "--weight_decay=0.5", "--temperature=0.8"], ""),
        ([*DPO, PAIRS, "--loss=cdpo", "--label_smoothing=0.2", "--lr=auto", "--seed=5"], ""),
        ([*DPO, PAIRS, "--loss=ipo", "--micro_batch=2"], ""),
        ([*DPO, PAIRS, "--loss=ipo_mean", "--grad_clip=0.1"], ""),
        ([*DPO, PAIRS, "--loss=dpo_norm"], ""),
        ([*DPO, PAIRS, "--loss=simpo", "--simpo_margin=0.7"], ""),
        ([*DPO, PAIRS, "--loss=kto", "--desirable=1.3", "--undesirable=0.6"], ""),
        ([*DPO, "--data=labels.jsonl", "--loss=kto", "--batch_size=4", "--lr=0.01", "--epochs=3",
          "--warmup=0"], "cut")],
    ppo=[
        ([*PPO, "--kl_target=0.3", "--kl_horizon=40", "--score_scaling=true", "--ptx_coef=0.7",
          "--ptx_data=text.txt", "--ptx_batch=3"], "cut"),
        ([*PPO, PAIRS, "--kl_in=loss", "--entropy_coef=0.02", "--temperature=0.8", "--beta=0.3",
          "--missing_eos=-1.5", "--best_of=1"], ""),
        ([*PPO, PAIRS, "--kl_in=loss", "--whiten=false", "--gamma=0.9", "--lam=0.7", "--clip=0.05",
          "--value_clip=0.02", "--minibatches=4", "--epochs=3", "--adam_eps=1e-3", "--seed=6",
          "--iterations=2"], ""),
        ([*PPO, "--grad_clip=0.05", "--micro_batch=0", "--beta=0", "--iterations=2",
          "--save_every=2", "--batch_size=4"], ""),
        ([*PPO, "--reward_model=ensemble", "--score_by=min", "--iterations=2"], ""),
        ([*PPO, PAIRS, *LONG], "")],
    grpo=[
        ([*GRPO, "--ptx_coef=0.7", "--ptx_data=text.txt", "--ptx_batch=3"], "cut"),
        ([*GRPO, PAIRS, "--reward=model", "--reward_model=reward", "--method=grpo", "--beta=0.3",
          "--kl_estimator=k3", "--epochs=2", "--missing_eos=-1.5"], ""),
        ([*GRPO, "--data=answers.jsonl", "--method=dapo", "--epochs=2", "--clip=0.05",
          "--temperature=1.2", "--seed=6", "--adam_eps=1e-3"], ""),
        ([*GRPO, "--reward=model", "--reward_model=reward", "--method=dr_grpo", "--beta=0.2",
          "--minibatches=3", "--grad_clip=0.05", "--micro_batch=0"], ""),
        ([*GRPO, "--data=answers.jsonl", "--advantage=grpo", "--aggregate=tokens", "--drop=true",
          "--kl_in=loss", "--clip_high=0.1", "--beta=0.2", "--epochs=2"], ""),
        ([*GRPO, "--data=answers.jsonl", "--beta=0", "--aggregate=sequence", "--epochs=2"], ""),
        ([*GRPO, PAIRS, "--reward=model", "--reward_model=ensemble", "--score_by=mean-std",
          "--iterations=2"], ""),
        ([*GRPO, PAIRS, "--reward=model", "--reward_model=reward", *LONG], "")],
    evaluate=[
        (["--policy=sft", "--reference=base", "--reward_model=reward", "--best_of=3",
          "--eval_prompts=6", "--max_new_tokens=9", "--temperature=1.1"], ""),
        (["--policy=sft", "--reference=base", "--reward_model=ensemble", "--best_of=2",
          "--eval_prompts=6", "--max_new_tokens=9"], ""),
        (["--policy=base", "--reference=sft", "--data=demos.jsonl", "--eval_prompts=3",
          "--max_new_tokens=7", "--seed=2", "--split=held_out"], ""),
        (["--policy=base", "--reference=sft", "--data=answers.jsonl", "--max_new_tokens=7"], "")])
ALL = [(stage, n) for stage, cases in CASES.items() for n in range(len(cases))]


def names(n):
    return " and ".join(["Bo", "Christopher", "Al", "Geraldine"][:1 + n % 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random networks that end about every seventh token and often say a number, a full stop or a
    line break; records of every format, with duplicates, ties, dialogues and some over-long."""
    folder, tokenizer = tmp_path_factory.mktemp("naive"), load_tokenizer("synthetic")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(11)
    size = GPTConfig(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens, block_size=64,
                     n_layer=2, n_head=4, n_embd=32)
    base, policy, reward_model = GPT(size), GPT(size), RewardModel(size)
    ensemble = Ensemble([RewardModel(size) for _ in range(3)])
    likely = [i for text in (" 4", " 7", " 12", ".", "\n", " I") for i in tokenizer.encode(text)]
    with torch.no_grad():
        for network in (base, policy):
            network.ln_f.bias.fill_(4 * 32**-0.5)
            network.wte.weight[tokenizer.eos] = 1.4 * 32**-0.5
            network.wte.weight[likely] = 1.2 * 32**-0.5
        reward_model.head.weight.mul_(3)
        reward_model.shift.fill_(0.4)
        reward_model.scale.fill_(1.7)
        for n, member in enumerate(ensemble.members):
            member.head.weight.mul_(3 + n)
            member.shift.fill_(0.4 - n)
            member.scale.fill_(1.7 + n)
    stages = dict(base="pretrain", ensemble="reward", judge="sft", short="reward")
    save = lambda name, model, parents, config=None: (folder / name).mkdir() or \
        common.save_checkpoint(folder / name / "model.pt", model, stages.get(name, name), tokenizer,
                               config or MODULES["sft"].Config(quality=0.3), {}, parents=parents)
    save("base", base, {})
    save("dpo", base, {})
    torch.manual_seed(12)
    judge = GPT(dataclasses.replace(size, block_size=280))
    for p in judge.parameters():
        torch.nn.init.normal_(p, std=0.7)
    save("judge", judge, {})
    short = RewardModel(dataclasses.replace(size, block_size=20))
    save("short", short, {})
    (folder / "mine.txt").write_text("# mine\nThe longer one.\n\nChoose the one that is true.\n")
    save("sft", policy, {})
    parents = dict(sft=torch.load(folder / "sft" / "model.pt")["hash"])
    save("reward", reward_model, parents)
    save("ensemble", ensemble, parents, MODULES["reward"].Config(ensemble=3))
    torch.set_default_dtype(before)

    say = lambda n: f"Say {names(n)} {n}."
    user = lambda text: dict(role="user", content=text)
    bot = lambda text: dict(role="assistant", content=text)
    demos = [dict(prompt=say(n), completion=f"Hello {names(n + 1)}.") for n in range(40)]
    demos += [dict(messages=[dict(role="system", content="Be brief."), user(say(n)),
                             bot(f"Yes, {names(n)}."), user("Again."), bot("I will not.")])
              for n in range(12)]
    demos += [dict(prompt=say(50), completion="Hello. " * 60), dict(
        messages=[user("Go."), bot("I see.")], held_out=True)]
    write_jsonl(folder / "demos.jsonl", demos)
    pairs = [dict(prompt=say(n), chosen=f"I see {names(n)}.", rejected=f"No {n}.",
                  held_out=n % 4 == 3) for n in range(11)]
    pairs += [dict(prompt=say(n), completions=["Good day.", f"I see {names(n)}.", "No.", "No."],
                   ranks=[[1, 2, 2, 3], [4, 3, 2, 1], [2, 1, 3, 3]][n % 3], held_out=n % 4 == 3)
              for n in range(9)]
    pairs += [dict(prompt=[user(say(n)), bot("No."), user("Why?")], chosen="I do.",
                   rejected="The sea is blue.") for n in range(14)]
    pairs += [dict(prompt=go * 30, chosen="Yes.", rejected="No.", held_out=go == "Go. ")
              for go in ("Go. ", "Go on. ")]
    pairs += [dict(prompt=say(3), chosen="Yes.", rejected="No. " * 60, held_out=True),
              dict(prompt=say(60), chosen="Yes.", rejected="No. " * 60)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "labels.jsonl", [
        dict(prompt=say(n), completion=f"I see {names(n + n // 3)}.", label=n % 3 > 0,
             held_out=n % 5 == 4) for n in range(19)])
    write_jsonl(folder / "answers.jsonl", [
        dict(prompt=f"Count to {n}.", answer=f"{n % 3 * 4 + n % 2 * 3}", held_out=n % 3 == 0)
        for n in range(14)])
    write_jsonl(folder / "mixed.jsonl", [dict(text=f"{say(n)} Plain.") for n in range(25)] + demos)
    (folder / "text.txt").write_text("\n\n".join(
        f"{say(n)} " + "I see the sea. " * (n % 9) for n in range(90)))
    # every document fills a row of 4 exactly, the last one included
    (folder / "full.txt").write_text("\n\n".join(f"{x} b c" for x in "acdefgh"))
    with in_folder(folder):
        assert run_stage("label", [*LABEL, "--out=label"]) == 0
    return folder


@contextlib.contextmanager
def in_folder(folder):
    """float64, the folder as the current one, and a clock that ticks at every look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(time, "perf_counter", itertools.count().__next__)
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(torch.float32)


def run_stage(stage, flags):
    """The script as its command line runs it, in this process. Returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{stage}.py", *flags])
        try:
            runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


def run_in_two_parts(stage, flags, out, every):
    """Interrupted right after its second saved state, that of step `every`, then resumed."""
    save, calls = common.Run.save_state, []

    def save_and_stop(run, *args, **state):
        save(run, *args, **state)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "save_state", save_and_stop)
        assert run_stage(stage, flags) == 130
    assert torch.load(out / "state.pt", weights_only=True)["step"] == every
    return run_stage(stage, flags)


def differences(real, twin, where=""):
    """Every place where two logs, rows or numbers differ, as text."""
    if isinstance(twin, dict) and isinstance(real, dict):
        for key in sorted(set(real) ^ set(twin)):
            yield f"{where}.{key} stands only in the {'script' if key in real else 'twin'}"
        for key in sorted(set(real) & set(twin)):
            yield from differences(real[key], twin[key], f"{where}.{key}")
    elif isinstance(twin, (list, tuple)) and isinstance(real, (list, tuple)):
        if len(real) != len(twin):
            yield f"{where}: {len(real)} and {len(twin)} entries"
        for n, (a, b) in enumerate(zip(real, twin)):
            yield from differences(a, b, f"{where}[{n}]")
    elif isinstance(real, float) and isinstance(twin, (int, float)) or type(twin) is float:
        if not isinstance(real, (int, float)) or not abs(real - twin) <= 1e-7 * (1 + abs(twin)):
            yield f"{where}: {real!r} and {twin!r}"
    elif real != twin:
        yield f"{where}: {real!r} and {twin!r}"


def documented(stage):
    """{kind of row: {field: its definition}} of docs/log.md for a stage."""
    sections = re.split(r"^## ", (ROOT / "docs" / "log.md").read_text(), flags=re.MULTILINE)
    wanted = ["all stages", f"{stage}.py"]
    if stage in COMPARING:
        wanted.append("the comparison at the end")
    kinds = {}
    for section in sections:
        if section.split("\n")[0] in wanted:
            for part in section.split("\n### ")[1:]:
                kind, *lines = part.split("\n")
                for names, _, definition in re.findall(
                        r"^\| (`[^|]+`) \| ([^|]+) \| ([^|]+) \|$", "\n".join(lines), re.MULTILINE):
                    for name in re.findall(r"`(\w+)`", names):
                        kinds.setdefault(kind, {})[name] = definition
    return kinds


def undocumented(stage, rows):
    """Fields of the rows that docs/log.md does not define, misses, or says are never null."""
    kinds = documented(stage)
    for row in rows:
        kind, defined = row["kind"], kinds.get(row["kind"], {})
        for name in set(row) - set(defined) - {"kind"}:
            yield f"{kind}.{name} has no definition"
        for name, definition in defined.items():
            if name not in row and not definition.startswith("only with"):
                yield f"{kind}.{name} is defined but not there"
            if row.get(name, 0) is None and "null" not in definition:
                yield f"{kind}.{name} is null"
        SEEN.setdefault(stage, set()).update((kind, name) for name in row)


SEEN = {}  # the fields of all rows of all cases
COMPARING = ("dpo", "ppo", "grpo", "evaluate")  # the stages that share the fields of the comparison


def plain(x):
    """numpy's and torch's numbers as Python's, for the comparison."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return x.item() if isinstance(x, (np.generic, torch.Tensor)) else x


@pytest.mark.parametrize("stage, n", ALL, ids=[f"{stage}-{n}" for stage, n in ALL])
def test_script_and_twin_agree(folder, stage, n):
    flags, how = CASES[stage][n]
    flags = list({f.split("=")[0]: f for f in flags}.values())  # the last one of a name counts
    out = folder / "out" / f"{stage}{n}"
    with in_folder(folder):
        flags.append(f"--out={out}")
        config = cli.read_flags(MODULES[stage].Config, flags)
        if how == "cut":
            every = dict(pretrain="eval_every").get(stage, "save_every")
            every = config.chunk if stage == "label" else getattr(config, every)
            assert run_in_two_parts(stage, flags, out, every) == 0
        else:
            assert run_stage(stage, flags) == 0
        auto = common.AUTO.get(config.loss if stage == "dpo" else stage, {})  # all models are small
        auto = auto | (common.AUTO["critic"] if stage == "ppo" else {})
        small = {k: v[0] for k, v in auto.items() if getattr(config, k) is None}
        result, log, final, parents = getattr(naive, stage)(dataclasses.replace(config, **small))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name in ("data", "answers", "demos", "pretrain_data", "ptx_data"):  # files that it has read
        if (folder / str(getattr(config, name, "-"))).is_file():
            parents[name] = naive.hash_of(folder / getattr(config, name))
    assert not set(undocumented(stage, rows))
    first, *steps, last = [r for r in rows if r["kind"] != "note"]
    assert first["parents"] == parents and first["stage"] == stage
    assert (first["device"], first["threads"]) == ("cpu", torch.get_num_threads())
    assert first["versions"] == dict(python=sys.version.split()[0], torch=torch.__version__)
    assert last.pop("seconds") >= 0 and last.pop("kind") == "final"
    found = [*differences(steps, plain(log), "log"), *differences(last, plain(final), "final")]
    if stage == "label":
        written = [json.loads(line) for line in (out / "rankings.jsonl").read_text().splitlines()]
        card = json.loads((out / "card.json").read_text())
        found += [*differences(written, plain(result), "rankings"),
                  *differences(card["metrics"], plain(final), "card"),
                  *differences(card["parents"], parents, "parents")]
    elif stage != "evaluate":
        checkpoint = torch.load(out / "model.pt", weights_only=True)
        found += [*differences(checkpoint["parents"], parents, "parents"),
                  *differences(checkpoint["metrics"], plain(final), "metrics")]
        assert set(checkpoint["weights"]) == set(result)
        for row in steps:  # every epoch is kept, with its own figures
            if stage in ("sft", "dpo") and row.get("epoch", 0) > 0 and row["kind"] == "validation":
                kept = torch.load(out / f"model-epoch{row['epoch']}.pt", weights_only=True)
                found += differences(kept["metrics"] | dict(kind="validation"), row, "epoch")
        for name, weight in checkpoint["weights"].items():
            distance = (weight - result[name]).abs().max().item()
            if not distance < 1e-8:
                found.append(f"weight {name}: {distance:.1e}")
    assert not found, "\n".join(found[:20])
    if stage == "dpo" and config.loss == "kto":
        assert max(row.get("baseline", 0) for row in rows) > 0.01  # z0 takes part


@pytest.mark.parametrize("stage", CASES)
def test_every_defined_field_is_written(stage):
    # catches a definition of a field that went away, and an option that no case covers
    needed = COMPARING if stage in COMPARING else (stage,)
    if not set(needed) <= set(SEEN):
        pytest.skip("needs the cases of this stage before it")
    seen = set().union(*(SEEN[s] for s in needed))
    for kind, fields in documented(stage).items():
        if kind not in ("every row", "note"):
            assert {name for name in fields if (kind, name) not in seen} == set(), kind


POLICIES, ASK = ("sft", "dpo", "ppo", "grpo"), ["--max_new_tokens=9", "--eval_prompts=4"]
# (reader, flags, the stages whose output it takes and the flag it takes it by)
READERS = [("sft", [*SFT, "--data=demos.jsonl"], "init", ("pretrain", "sft")),
           ("reward", [*REWARD, EMBEDDED], "init", ("pretrain", "sft")),
           ("reward", REWARD, "data", ("label",)), ("dpo", DPO, "data", ("label",)),
           ("ppo", PPO, "reward_model", ("reward",)),
           ("grpo", [*GRPO, "--reward=model"], "reward_model", ("reward",)),
           ("evaluate", ["--policy=sft", "--reference=sft", *ASK], "reward_model",
            ("reward",)),
           ("label", LABEL, "init", POLICIES), ("dpo", [*DPO, EMBEDDED], "init", POLICIES),
           ("ppo", PPO, "init", POLICIES), ("grpo", GRPO, "init", POLICIES),
           ("evaluate", ["--reference=base", *ASK], "policy",
            ("pretrain", *POLICIES)),
           ("evaluate", ["--policy=sft", *ASK], "reference",
            ("pretrain", *POLICIES))]


@pytest.fixture(scope="module")
def outputs(folder):
    """{stage: what it wrote}, of networks that say anything: white space, halves of characters,
    markers of the template spelled out by chance."""
    made = {}
    with in_folder(folder):
        for stage, flags in (
                ("pretrain", [*PRETRAIN, "--init=base", "--lr=1e-4", "--muon_lr=1e-4"]),
                ("sft", [*SFT, "--data=demos.jsonl"]), ("label", LABEL),
                ("reward", [*REWARD, EMBEDDED]), ("dpo", [*DPO, EMBEDDED]), ("ppo", PPO),
                ("grpo", GRPO)):
            flags = {f.split("=")[0]: f for f in flags}.values()
            assert run_stage(stage, [*flags, f"--out=made/{stage}"]) == 0
            made[stage] = f"made/{stage}" + "/rankings.jsonl" * (stage == "label")
    return made


@pytest.mark.parametrize("reader, flags, by, writer", [
    (reader, flags, by, writer) for reader, flags, by, writers in READERS for writer in writers],
    ids=lambda x: x if isinstance(x, str) else "")
def test_what_one_stage_writes_the_next_one_reads(folder, outputs, reader, flags, by, writer):
    # catches an output that a later stage refuses
    flags = [f for f in flags if not f.startswith(f"--{by}=")]
    with in_folder(folder):
        assert run_stage(reader, [*flags, f"--{by}={outputs[writer]}",
                                  f"--out=read/{reader}-{by}-{writer}"]) == 0


@pytest.mark.parametrize("stage, flags", [
    ("pretrain", PRETRAIN), ("sft", [*SFT, "--data=demos.jsonl", "--pretrain_mix=0"]),
    ("reward", [*REWARD, PAIRS, "--pretrain_mix=0"]), ("dpo", [*DPO, PAIRS]), ("ppo", PPO),
    ("grpo", GRPO)])
def test_micro_batches_bound_a_forward_pass(folder, stage, flags):
    # catches a --micro_batch that is read and not used: only the memory shows it
    rows, forward = set(), GPT.forward

    def keep(network, tokens, cache=None, *args, **options):
        if torch.is_grad_enabled():
            rows.add(len(tokens if cache is None else cache.of))
        return forward(network, tokens, cache, *args, **options)

    with in_folder(folder) as patch:
        patch.setattr(GPT, "forward", keep)
        flags = [f for f in flags if not f.startswith(("--micro_batch", "--batch_size"))]
        assert run_stage(stage, [*flags, "--batch_size=16", "--micro_batch=2",
                                 f"--out=micro/{stage}"]) == 0
    assert max(rows) == 2  # also of prompts with more answers than that


@pytest.mark.parametrize("n, options", [(40, dict()), (7, dict(batch_size=6, samples=2)),
                                        (5, dict(batch_size=1, samples=3, temperature=0.6))])
def test_what_a_prompt_is_answered_depends_on_no_batch(folder, n, options):
    # catches a row that draws with the numbers of its neighbour, answers that go to another prompt
    with in_folder(folder):
        model, tokenizer, _ = common.load_policy("sft", ("sft",), torch.device("cpu"))
        prompts = [tokenizer.encode_prompt(names(k) + "." * (k % 3)) for k in range(n)]
        each = options.get("samples", 1)
        uniforms = partial(common.uniforms, 1, "test", "answers", 2)
        found = batches.sample_texts(model, tokenizer, prompts, 12, uniforms, **options)
        expected = naive.sample_many(
            naive.load("sft")[0], tokenizer, prompts, 12, (1, "test", "answers", 2),
            options.get("temperature", 1.0), each)
    assert found == expected


def test_too_few_samples_to_measure_the_scale_on(folder, capsys):
    # catches a scale of one sample, which is 0, and of none
    with in_folder(folder):
        for few, why in (
                (["--samples=1", "--max_new_tokens=9"], "too few to measure the scale on"),
                (["--samples=3", "--max_new_tokens=1"], "too few to measure the scale on"),
                (["--samples=3", "--max_new_tokens=63"], "no training prompt leaves that much")):
            assert run_stage("reward", ["--init=sft", PAIRS, *few, "--out=few"]) == 2
            assert why in capsys.readouterr().err


def test_the_records_say_where_they_come_from(folder):
    # catches an embedded world that is known by a file's name, or by a card that lies beside it
    lines = (folder / "label" / "rankings.jsonl").read_text()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "mine.jsonl").write_text(lines)
    own = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(folder / "elsewhere" / "rankings.jsonl", own)  # own pairs, named like ours
    (folder / "elsewhere" / "card.json").write_text("[1, 2, 3]")
    result = {}
    with in_folder(folder):
        for name, data in (("ours", "label/rankings"), ("renamed", "elsewhere/mine"),
                           ("own", "pairs"), ("own renamed", "elsewhere/rankings")):
            flags = [*REWARD, f"--data={data}.jsonl", f"--out=known/{name}"]
            assert run_stage("reward", flags) == 0
            result[name] = torch.load(f"known/{name}/model.pt", weights_only=True)["hash"]
    assert result["ours"] == result["renamed"] and result["own"] == result["own renamed"]


@pytest.mark.parametrize("stage, flags", [("reward", REWARD), ("dpo", DPO)])
def test_rankings_of_another_model_are_said(folder, capsys, stage, flags):
    # catches labels of one policy that train another in silence
    with in_folder(folder):
        for init, warns in (("sft", False), ("said/sft", True)):
            flags = [*(f for f in flags if not f.startswith("--init")), f"--init={init}"]
            if not (folder / init).exists():
                assert run_stage("sft", [*SFT, "--data=demos.jsonl", f"--out={init}"]) == 0
            capsys.readouterr()
            assert run_stage(stage, [*flags, EMBEDDED, f"--out=said/{stage}{warns}"]) == 0
            assert ("does not descend from the sft run" in capsys.readouterr().err) == warns


def test_a_run_that_starts_again_leaves_nothing_of_the_one_before(folder):
    # catches a log that goes on with the rows of the run before
    flags = [*(f for f in DPO if not f.startswith("--epochs")), PAIRS]
    with in_folder(folder):
        assert run_stage("dpo", [*flags, "--epochs=3", "--out=again"]) == 0
        assert run_stage("dpo", [*flags, "--out=once"]) == 0
        assert run_stage("dpo", [*flags, "--out=again", "--overwrite=true"]) == 0
    again, once = ([json.loads(line) for line in (folder / name / "log.jsonl").read_text()
                    .splitlines()][1:-1] for name in ("again", "once"))
    assert again == once
    files = [sorted(p.name for p in (folder / name).iterdir()) for name in ("again", "once")]
    assert files[0] == files[1]
