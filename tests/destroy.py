"""Runs that destroy their model or learn nothing, tiny, by the real scripts: what each one says.

    python tests/destroy.py                    # all of them: two tables, exit status 1 if one fails
    python tests/destroy.py ppo dpo            # only these stages

A run of DESTROYED has to end with exit status 2 and one line, without a model, with a log that is
valid JSON and a state.pt that is finite; one of HARMLESS has to end with finite weights, and one of
USELESS as well, and it has to say so: in a note of the log, and again in its last lines.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from conftest import run_script  # puts the repository on the path

import common
from data.records import write_jsonl
from tiny_runs import make_inputs

FLAGS = dict(
    pretrain=["--data=text.txt", "--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=16",
              "--batch_size=4", "--steps=12", "--eval_every=5", "--warmup=0", "--dropout=0"],
    sft=["--data=demos.jsonl", "--init=sft", "--epochs=2", "--batch_size=4", "--samples=4",
         "--max_new_tokens=8", "--pretrain_data=text.txt", "--lr=1e-3", "--warmup=1",
         "--save_every=3"],
    label=["--init=sft", "--prompts=8", "--held_out=4", "--k=3", "--max_new_tokens=12",
           "--labeler=model", "--reward_model=reward"],
    reward=["--data=pairs.jsonl", "--init=sft", "--epochs=4", "--batch_size=2", "--lr=1e-3",
            "--warmup=1", "--samples=16", "--max_new_tokens=12", "--save_every=3", "--probe=0"],
    dpo=["--data=pairs.jsonl", "--init=sft", "--epochs=4", "--batch_size=2", "--lr=1e-3",
         "--warmup=1", "--max_new_tokens=12", "--eval_prompts=4", "--save_every=3"],
    ppo=["--data=pairs.jsonl", "--init=sft", "--reward_model=reward", "--iterations=6",
         "--batch_size=8", "--max_new_tokens=12", "--lr=1e-3", "--critic_lr=1e-3", "--warmup=0",
         "--eval_prompts=4", "--best_of=1", "--save_every=2"],
    grpo=["--data=pairs.jsonl", "--init=sft", "--reward=model", "--reward_model=reward",
          "--iterations=6", "--batch_size=8", "--k=4", "--max_new_tokens=12", "--lr=1e-3",
          "--warmup=0", "--eval_prompts=4", "--save_every=2"],
    evaluate=["--policy=sft", "--reference=sft", "--reward_model=reward", "--data=pairs.jsonl",
              "--max_new_tokens=12"],
    sample=["--prompt=Say.", "--max_new_tokens=8"])
LOSSES = ("dpo", "cdpo", "ipo", "ipo_mean", "dpo_norm", "simpo", "kto")
PTX = ["--ptx_data=text.txt", "--ptx_batch=2"]
LONG = {stage: ["--iterations=8"] for stage in ("ppo", "grpo")}

# (stage, flags, a part of the line)
DESTROYED = [
    *((stage, [f"--lr={lr}"], f"lower --lr (now {float(lr)})")
      for stage in ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
      for lr in ("1e3", "1e10", "1e38")),
    *((stage, [f"--weight_decay={x}"], f"lower --weight_decay (now {float(x)})")
      for stage in ("pretrain", "sft", "reward", "dpo") for x in ("1e6", "1e38")),
    *(("pretrain", [f"--muon_lr={x}"], "lower --muon_lr") for x in ("1e3", "1e38")),
    ("sft", ["--pretrain_mix=1e38"], "grad_norm is inf"),
    *(("dpo", [f"--loss={loss}", "--beta=1e38"], "lower --beta (now 1e+38)")
      for loss in LOSSES if not loss.startswith("ipo")),
    *(("dpo", [f"--loss={loss}", f"--beta={beta}"], f"raise --beta (now {beta})")
      for loss in ("ipo", "ipo_mean") for beta in ("1e-38", "1e-20")),
    ("dpo", ["--nll=1e38"], "lower --nll"),
    ("dpo", ["--loss=simpo", "--simpo_margin=1e38"], "lower --simpo_margin"),
    ("dpo", ["--loss=kto", "--desirable=1e38"], "lower --desirable"),
    ("dpo", ["--loss=kto", "--undesirable=1e38"], "lower --undesirable"),
    ("dpo", ["--temperature=1e-38"], "raise --temperature (now 1e-38)"),
    *(("ppo", ["--beta=1e38", *more], "lower --beta (now 1e+38)")
      for more in ([], ["--kl_in=loss"], ["--kl_in=loss", "--whiten=false"])),
    *(("grpo", ["--beta=1e38", *more], "lower --beta (now 1e+38)")
      for more in (["--method=rloo"], ["--method=grpo"], ["--method=dr_grpo"], ["--method=dapo"],
                   ["--kl_in=loss", "--kl_estimator=k2"], ["--kl_in=loss", "--kl_estimator=k3"])),
    *((stage, ["--ptx_coef=1e38", *PTX], "lower --ptx_coef") for stage in ("ppo", "grpo")),
    *((stage, [f"--temperature={x}"], "raise --temperature")
      for stage in ("ppo", "grpo") for x in ("1e-38",)),
    *((stage, [f"--missing_eos={x}"], f"{'raise' if x[0] == '-' else 'lower'} --missing_eos")
      for stage in ("ppo", "grpo") for x in ("-1e38", "1e38")),
    ("ppo", ["--critic_lr=1e3"], "lower --critic_lr (now 1000.0)"),
    ("ppo", ["--critic_lr=1e38"], "lower --critic_lr (now 1e+38)"),
    *(("ppo", [f"--{name}={x}"], f"lower --{name}") for name in ("gamma", "lam")
      for x in ("1e10", "1e38")),
    ("ppo", ["--entropy_coef=1e38"], "lower --entropy_coef"),
    ("ppo", ["--beta=1e30", "--kl_target=1", "--kl_horizon=2"], "lower --beta"),
    *((stage, ["--max_kl=0.05", "--lr=0.03"], "above --max_kl=0.05") for stage in ("ppo", "grpo")),
    # parents that are destroyed already
    *((stage, ["--reward_model=rm_scale"], "rm_scale is destroyed: its scale is 0")
      for stage in ("ppo", "grpo", "label", "evaluate")),
    *((stage, [f"--reward_model={name}"], f"{name} is destroyed: the weights of this reward model")
      for name in ("rm_nan", "rm_shift", "rm_huge")
      for stage in ("ppo", "grpo", "label", "evaluate")),
    *((stage, ["--reward_model=rm_large"], "_norm is inf") for stage in ("ppo", "grpo")),
    *((stage, ["--init=sft_nan"], "sft_nan is destroyed: the weights of this sft model")
      for stage in ("sft", "reward", "dpo", "ppo", "grpo", "label")),
    ("evaluate", ["--policy=sft_nan"], "sft_nan is destroyed"),
    ("sample", ["--models=sft,sft_nan"], "sft_nan is destroyed"),
    # finite weights, and a forward pass that is not
    *((stage, ["--init=sft_large"], "the weights are destroyed: lower --lr")
      for stage in ("ppo", "grpo", "reward")),
    ("label", ["--init=sft_large"], "make the checkpoint again"),
    *((stage, ["--init=sft_large"], "held_out_loss is nan") for stage in ("sft", "dpo")),
    ("evaluate", ["--policy=sft_large"], "make the checkpoint again"),
    ("sample", ["--models=sft_large"], "make the checkpoint again"),
]
# extreme, and still finite to the end
HARMLESS = [
    *((stage, [f"--grad_clip={x}"]) for stage in ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
      for x in ("1e-38", "1e38")),
    ("sft", ["--pretrain_mix=1e10"]),
    *(("dpo", [f"--loss={loss}", f"--beta={x}"]) for loss in LOSSES for x in ("1e3", "1e10")),
    *(("dpo", [f"--loss={loss}", "--beta=1e38"]) for loss in ("ipo", "ipo_mean")),
    *(("ppo", [f"--beta={x}", *more]) for x in ("1e3", "1e10")
      for more in ([], ["--kl_in=loss"], ["--kl_in=loss", "--whiten=false"])),
    *(("grpo", [f"--beta={x}", *more]) for x in ("1e3", "1e10")
      for more in (["--method=rloo"], ["--method=grpo"], ["--method=dr_grpo"], ["--method=dapo"],
                   ["--kl_in=loss", "--kl_estimator=k2"], ["--kl_in=loss", "--kl_estimator=k3"])),
    *((stage, flags) for stage in ("ppo", "grpo") for flags in (
        ["--ptx_coef=1e10", *PTX], ["--missing_eos=-1e10"], ["--adam_eps=1e-45"],
        ["--adam_eps=1e38"], ["--clip=1e38"], ["--clip=1e-38"])),
    *(("ppo", [flag]) for flag in (
        "--gamma=0", "--lam=0", "--entropy_coef=1e10", "--value_clip=1e38", "--value_clip=1e-38",
        "--kl_target=1e-38", "--kl_target=1e38", "--score_scaling=true")),
    ("grpo", ["--clip_high=1e38"]), ("dpo", ["--temperature=1e38"]),
]
NO_SIGNAL, NO_END, NOT_LEARNT = ("no signal: the responses", "hardly any response ends",
                                 "the training pairs are not learnt")
USELESS = [
    ("grpo", ["--reward=verifier", "--data=never.jsonl", *LONG["grpo"]], NO_SIGNAL),
    ("grpo", ["--max_new_tokens=1", "--init=sft_endless", *LONG["grpo"]], NO_END),
    ("grpo", ["--init=sft_endless", *LONG["grpo"]], NO_SIGNAL),
    ("grpo", ["--reward_model=rm_flat", "--missing_eos=-0.235294", *LONG["grpo"]], NO_SIGNAL),
    ("grpo", ["--temperature=1e-5", *LONG["grpo"]], "the entropy has collapsed"),
    ("grpo", ["--reward_model=rm_narrow", *LONG["grpo"]], "the mean score is outside"),
    ("ppo", ["--init=sft_endless", *LONG["ppo"]], NO_END),
    ("ppo", ["--init=sft_endless", *LONG["ppo"]], NO_SIGNAL),
    ("ppo", ["--reward_model=rm_flat", "--missing_eos=-0.235294", *LONG["ppo"]], NO_SIGNAL),
    ("ppo", ["--temperature=1e-5", *LONG["ppo"]], "the entropy has collapsed"),
    ("ppo", ["--temperature=1e38", *LONG["ppo"]], NO_END),
    ("ppo", ["--reward_model=rm_narrow", *LONG["ppo"]], "the mean score is outside"),
    ("ppo", ["--critic_lr=1e-12", "--iterations=12", "--reward_model=rm_far"],
     "the critic is worse than a constant"),
    *(("dpo", [f"--loss={loss}", "--data=contradictory.jsonl"], NOT_LEARNT) for loss in LOSSES
      if loss != "kto"),
    ("dpo", ["--data=contradictory.jsonl", "--epochs=16"], NOT_LEARNT),
    ("dpo", ["--lr=1e-12"], NOT_LEARNT),
    ("dpo", ["--lr=0.3", "--epochs=12"], "has risen over an epoch"),
    ("reward", ["--data=contradictory.jsonl", "--epochs=16"], NOT_LEARNT),
    ("reward", ["--data=contradictory.jsonl"], "is not above chance"),
    ("reward", ["--init=sft_flat", "--lr=1e-12", "--data=pairs.jsonl"], "all samples get the same"),
    ("sft", ["--max_new_tokens=1", "--lr=1e-12", "--init=sft_endless"], "hardly any sample ends"),
    ("sft", ["--lr=3"], "worse than that of guessing"),
    ("pretrain", ["--lr=3", "--steps=60"], "worse than that of guessing"),
]


def make_folder(folder):
    """What the runs read: make_inputs, and destroyed and useless copies of it."""
    make_inputs(folder)

    def copy(stage, name, change):
        content = torch.load(folder / stage / "model.pt", weights_only=True)
        change(content["weights"], content)
        (folder / name).mkdir()
        common.save_file(content, folder / name / "model.pt")

    copy("reward", "rm_scale", lambda w, _: w["scale"].zero_())
    copy("reward", "rm_shift", lambda w, _: w["shift"].fill_(math.inf))
    copy("reward", "rm_nan", lambda w, _: w["gpt.wte.weight"][0, :1].fill_(math.nan))
    copy("reward", "rm_huge", lambda w, _: w["head.weight"].mul_(1e30))
    copy("reward", "rm_large", lambda w, _: w["head.weight"].mul_(1e18))
    copy("reward", "rm_flat", lambda w, _: w["head.weight"].zero_())
    copy("reward", "rm_far", lambda w, _: w["head.bias"].fill_(50.0))
    copy("reward", "rm_narrow", lambda _, c: c["metrics"].update(score_min=7.0, score_max=7.5))
    copy("sft", "sft_nan", lambda w, _: w["wte.weight"][0, :1].fill_(math.nan))
    copy("sft", "sft_large", lambda w, _: [  # their product is squared: infinite
        w[f"h.0.{name}.weight"].mul_(1e15) for name in ("ln_1", "attn.c_attn")])
    copy("sft", "sft_flat", lambda w, _: w["ln_f.weight"].zero_())
    copy("sft", "sft_endless", lambda w, c: w["ln_f.bias"].neg_())
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    both = [dict(prompt=r["prompt"], chosen=r["completions"][a], rejected=r["completions"][1 - a],
                 held_out=r["held_out"]) for r in rows for a in (0, 1)]
    write_jsonl(folder / "contradictory.jsonl", both)
    write_jsonl(folder / "never.jsonl", [dict(prompt=r["prompt"], answer="987654",
                                              held_out=r["held_out"]) for r in rows])
    return folder


def run(folder, stage, flags):
    """(exit status, last line of what went wrong, notes, last lines) of a run; AssertionError where
    it breaks what holds for every run: valid JSON, finite states and models, one line."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    given = list({w.split("=")[0]: w for w in FLAGS[stage] + flags}.values())  # the last one counts
    result = run_script(f"{stage}.py", *given, *[f"--out={out}"] * (stage != "sample"), cwd=folder)
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    states = [torch.load(path, weights_only=True) for path in out.glob("*.pt")]
    assert all(x.isfinite().all() for state in states for x in tensors(state)), "a bad state"
    lines = result.stderr.strip().splitlines()
    assert result.returncode in (0, 2), result.stderr[-500:]
    if result.returncode:
        errors = [line for line in lines if line.startswith(f"{stage}.py: error: ")]
        others = [line for line in lines if not line.startswith("warning: ")]
        assert errors == others and len(errors) == 1, result.stderr[-500:]
        assert not (out / "model.pt").exists() and not any(r["kind"] == "final" for r in rows)
    notes = [r["text"] for r in rows if r["kind"] == "note"]
    return result.returncode, lines[-1] if lines else "", notes, result.stdout[-2000:]


def refuse(constant):
    raise AssertionError(f"the log holds {constant}, which is no JSON")


def tensors(value):
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []


def check(folder, stage, flags, expected):
    """What the run said. AssertionError if it is something else than `expected`: a part of the line
    of a destroyed run, (a part of the warning,) of a useless one, None for a harmless one."""
    status, line, notes, end = run(folder, stage, flags)
    if isinstance(expected, str):
        assert status == 2 and expected in line, (status, line)
        return line
    assert status == 0, line
    if expected is None:
        return "finite to the end"
    [warning] = [text for text in notes if expected[0] in text]  # once in the log, once at the end
    assert end.count(warning) == 1 and end.index("done after") < end.index(warning), end
    return warning


def main(stages):
    cases = [*DESTROYED, *((*case, None) for case in HARMLESS),
             *((*case, (text,)) for *case, text in USELESS)]
    cases = [case for case in cases if not stages or case[0] in stages]
    failed, start = 0, time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch))
        print("| tried | said |\n|---|---|")
        for stage, flags, expected in cases:
            try:
                said = check(folder, stage, flags, expected)
            except (AssertionError, ValueError) as error:
                said, failed = f"FAILED: {type(error).__name__} {error}", failed + 1
            said = said.replace(f"{scratch}/", "").replace("|", "\\|").replace("\n", " ")
            print(f"| {stage} {' '.join(flags)} | {said} |", flush=True)
    print(f"\n{len(cases)} runs, {failed} failed, {time.time() - start:.0f} seconds")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
