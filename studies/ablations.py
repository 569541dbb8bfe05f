"""Take it out and see: PPO, its labels and its demonstrations, one thing changed at a time.

Each arm is a chain of stages with other flags than the default pipeline, judged with all others of
its part and seed in one report of evaluate.py (on the same prompts, with the same random numbers):
proxy, gold, KL, length, diversity, entropy, refusals, loss on text. docs/triage.md uses it.

    python studies/ablations.py                     # all parts, 3 seeds; resumes where it stopped
    python studies/ablations.py --part=ppo --workers=2    # two runs side by side, one thread each

ppo: what of PPO is needed. labels: what biased, noisy and few labels teach. more: three times the
training, PPO and DPO. demos: LIMA's question, few careful or many uneven demonstrations, and their
share of refusals. size: PPO of the small model against an SFT model ten times its size.
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive, UserError


@dataclass
class Config:
    part: str = "all"  # "ppo", "labels", "more", "demos", "size"; several with commas; "all"
    runs: str = "out/seed{seed}"  # base model, SFT model, rankings, reward model; made if missing
    out: str = "out/ablations"  # a folder for every run
    pages: str = "docs/ablations"  # a page and a picture for each part go here
    seeds: Positive[int] = 3  # from 1 on; of every stage
    flags: str = ""  # of stages, with commas between: ppo.iterations=10,evaluate.samples=4
    workers: Positive[int] = 1  # runs side by side; above 1 with one thread each
    device: str = "auto"  # "auto", "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import common
from common import ROOT
from studies import runs


class Arm(NamedTuple):
    said: str  # what is changed
    steps: list  # [(stage, flags)]: each starts from those of the arm before it, else the pipeline
    curve: str = "gold"  # what is drawn of its last stage
    against: str = "ppo"  # the arm that differs by one thing
    bug: str = ""  # of tests/mutants.py: with the scripts in which it is


def ppo(**flags):
    return [("ppo", dict(max_kl=0) | flags)]


def labelled(**flags):
    """The same answers, ranked again by a labeler with other biases; a reward model; PPO."""
    return [("label", dict(answers="{base}/label/rankings.jsonl") | flags), ("reward", {}), *ppo()]


# large enough that some ratios leave the clip's range: at the default rate it has little to do
FAST = dict(epochs=4, lr=1e-3)
FIRST = {"ppo": Arm("PPO as it is", ppo()), "sft": Arm("the SFT model", [])}
PARTS = dict(
    ppo={
        "beta0": Arm("beta 0", ppo(beta=0), "kl_exact"),
        "fast": Arm("4 epochs an iteration, lr 0.001", ppo(**FAST), "clip_fraction"),
        "noclip": Arm("4 epochs, lr 0.001, no clip", ppo(**FAST, clip=1e9, value_clip=1e9),
                      "approx_kl", "fast"),
        # lambda below 1 would discount the score; whitening still takes the batch's mean off
        "nocritic": Arm("no critic: values 0, lambda 1", ppo(lam=1.0), bug="critic_is_zero"),
        "nowhiten": Arm("advantages not whitened", ppo(whiten=False)),
        # steps too small to move a weight: the base model under the chat template
        "nosft": Arm("no SFT first", [("sft", dict(epochs=1, demos=64, lr=1e-12)), *ppo()]),
        "ptx": Arm("pretraining text mixed in, --ptx_coef=0.3", ppo(ptx_coef=0.3)),
        "patient": Arm("controller: target 2 nats", ppo(kl_target=2.0), "kl_exact"),
        "eager": Arm("eager controller: 2 nats, horizon 140",
                     ppo(kl_target=2.0, kl_horizon=140.0), "kl_exact", "patient")},
    labels={
        "long": Arm("labeler likes length: 0.15 a word", labelled(length=0.15), "length"),
        "cautious": Arm("labeler likes caution: 2 a refusal", labelled(caution=2.0)),
        # two ways to a reward model below 60%: what it learned is noise, or all it saw is
        "scarce": Arm("labels scarce: 60 prompts", labelled(prompts=60)),
        "noisy": Arm("labels noisy: 5,500 prompts, noise 6", labelled(noise=6.0))},
    more={
        "ppo3": Arm("PPO, three times the iterations", ppo(iterations="3x"), "entropy"),
        "dpo": Arm("DPO", [("dpo", {})], "chosen_logp"),
        "dpo3": Arm("DPO, three epochs", [("dpo", dict(epochs=3))], "chosen_logp", "dpo")},
    demos={
        "many": Arm("SFT: 6,000 uneven ones", [("sft", dict(demos=6000, quality=0.25))],
                    against="sft"),
        "few": Arm("SFT: 600 careful demonstrations", [("sft", dict(demos=600, quality=1.0))],
                   against="many"),
        "again": Arm("SFT: the 600 for as many steps", [
            ("sft", dict(demos=600, quality=1.0, epochs=30))], against="many"),
        "safe": Arm("SFT: 6,000 careful ones", [("sft", dict(quality=1.0))], against="sft"),
        "tenth": Arm("SFT: a tenth of the harmful prompts", [
            ("sft", dict(quality=1.0, safety=0.1))], against="safe"),
        "unsafe": Arm("SFT: no harmful prompts", [("sft", dict(quality=1.0, safety=0.0))],
                      against="safe")},
    size={
        "large": Arm("SFT model of ten times the size", [
            ("pretrain", dict(n_layer=8, n_head=8, n_embd=320)), ("sft", {})])})
TITLES = dict(ppo="what of PPO is needed", labels="what biased, noisy and few labels teach",
              more="three times the training", demos="which demonstrations",
              size="a small model with feedback, a large one without")
COLUMNS = (("score", "proxy", 1, "+.2f"), ("gold", "gold", 1, "+.2f"),
           ("win_rate", "wins against SFT, %", 100, ".0f"), ("kl", "KL, nats", 1, ".2f"),
           ("length", "length", 1, ".1f"), ("distinct", "different of {samples} answers", 1, ".1f"),
           ("entropy", "entropy, nats a token", 1, ".2f"),
           ("repetition", "runs of 3 said before, %", 100, ".1f"),
           ("refusal", "refuses the harmful, %", 100, ".0f"),
           ("over_refusal", "refuses the harmless, %", 100, ".0f"),
           ("honesty", "admits what nobody can know, %", 100, ".0f"),
           ("facts", "facts right, %", 100, ".0f"),
           ("text_loss", "loss on text", 1, ".3f"))
UNITS = dict(gold="gold", kl_exact="KL (nats)", clip_fraction="clipped (share)",
             approx_kl="KL of a step (nats a token)", length="length (tokens)",
             entropy="entropy (nats a token)", chosen_logp="log p of chosen (nats)")


# --- the runs ------------------------------------------------------------------------------------


def inputs_of(stage, flags, base, made):
    """What a stage of an arm starts from: what the arm has made, else that of the pipeline."""
    found = runs.starts_from(stage, base)
    if "init" in found:
        before = "pretrain" if stage == "sft" else "sft"
        found["init"] = str(made.get(before, base / before))
    if "label" in made and "data" in found:
        found["data"] = f"{made['label']}/rankings.jsonl"
    if "reward" in made and "reward_model" in found:
        found["reward_model"] = str(made["reward"])
    return {} if "answers" in flags else found  # answers come with what they are of


def train(name, arm, seed, config, scripts=ROOT):
    """The folder of the last stage of an arm, each trained now unless it is there."""
    base, out = Path(config.runs.format(seed=seed)), Path(config.out) / name / f"seed{seed}"
    more, made, folder = runs.stage_flags(config.flags), {}, base / "sft"
    for stage, flags in arm.steps:
        usual = more.get(stage, {})
        if flags.get("iterations") == "3x":
            flags = flags | dict(iterations=3 * int(usual.get("iterations", 60)))
        if "answers" in flags:  # the pipeline's: nothing is sampled
            flags = flags | dict(answers=flags["answers"].format(base=base))
            usual = {k: v for k, v in usual.items() if k in ("prompts", "held_out")}
        flags = inputs_of(stage, flags, base, made) | usual | flags | dict(seed=seed)
        folder, cache = out / stage, {}
        if stage == "dpo":
            cache = dict(reference_cache=str(out / "reference_logps"))
        runs.run(stage, folder, config, flags, runs.inputs(flags), scripts, **cache)
        made[stage] = folder
    return folder


def report(part, folders, seed, config):
    """{arm: metrics} of evaluate.py's report on all policies of a part and seed."""
    base = Path(config.runs.format(seed=seed))
    others = {name: str(f) for name, f in folders.items() if f != base / "sft"}
    out = Path(config.out) / f"report-{part}" / f"seed{seed}"
    flags = dict(policies=",".join(others.values()), reference=str(base / "sft"),
                 reward_model=str(base / "reward"))
    flags |= runs.stage_flags(config.flags).get("evaluate", {})
    runs.run("evaluate", out, config, flags, runs.inputs(flags))
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))["checkpoints"]
    return {name: found[str(folder)] for name, folder in folders.items()}


# --- what they say -------------------------------------------------------------------------------


def ptx_sentence(found):
    """How much of the loss on text that PPO loses its mix-in gives back; found: of each seed."""
    lost, back = ([one[a]["text_loss"] - one[b]["text_loss"] for one in found]
                  for a, b in (("ppo", "sft"), ("ppo", "ptx")))
    shares = [b / x for x, b in zip(lost, back) if x > 0]
    text = runs.with_interval
    return (f"PPO loses {text(lost, '+.3f')} nats a token of text against the SFT model "
            f"({runs.verdict([-x for x in lost])}); --ptx_coef gives back {text(back, '+.3f')}"
            + (f", a share of {text(shares, '.2f')}, at least half in "
               f"{sum(share >= 0.5 for share in shares)} of {len(shares)} seeds."
               if len(shares) == len(lost) else "."))


def drift_sentence(folders):
    """How far the controllers let the KL go on the way; folders: {arm: [one of each seed]}."""
    curves = {name: {field: [runs.curve(folder, "step", field)[1] for folder in folders[name]]
                     for field in ("kl_exact", "beta", "gold")} for name in ("patient", "eager")}
    said = [f"largest KL {runs.with_interval([max(c) for c in each['kl_exact']], '.2f')} nats, "
            f"lowest beta {runs.with_interval([min(c) for c in each['beta']], '.3f')}"
            for each in curves.values()]
    gaps = []
    for kl, *gold in zip(curves["eager"]["kl_exact"], curves["eager"]["gold"],
                         curves["patient"]["gold"]):
        top = kl.index(max(kl))
        around = slice(max(top - 2, 0), top + 3)  # gold of one iteration is too noisy
        eager, patient = (mean(x[around]) for x in gold)
        gaps.append(eager - patient)
    return (f"On the way, of a target of 2 nats: {said[0]}; with the eager controller {said[1]}. "
            "Where its KL is largest, gold of the five iterations around less that of the other "
            f"controller in the same: {', '.join(f'{gap:+.2f}' for gap in gaps)}.")


def clip_sentence(folders):
    shares = [max(runs.curve(folder, "step", "clip_fraction")[1]) for folder in folders["fast"]]
    return ("With 4 epochs at lr 0.001 the clip holds back at most "
            f"{runs.with_interval([100 * x for x in shares], '.1f')}% of the tokens of an "
            "iteration.")


def hacking_sentence(name, said, found, folders):
    """How good the reward model of an arm's own labels is, and what it thinks of the policy."""
    right = [100 * runs.final(folder.parent / "reward")["accuracy"] for folder in folders[name]]
    own = [runs.final(folder)["score_gap"] for folder in folders[name]]
    gold = [one[name]["gold"] - one["sft"]["gold"] for one in found]
    return (f"{said}: its own reward model agrees with {runs.with_interval(right, '.1f')}% of its "
            f"held-out labels; on it the policy gains {runs.with_interval(own)} over the SFT "
            f"model, of gold {runs.with_interval(gold)}.")


def size_sentence(found, folders):
    """The small PPO model beside the large SFT model: their sizes, their gold, who wins."""
    models = [common.load_policy(folders[name][0], common.POLICIES, "cpu")[0]
              for name in ("ppo", "large")]
    small, large = (model.num_params() for model in models)
    gaps = [one["ppo"]["gold"] - one["large"]["gold"] for one in found]
    wins = [100 / (1 + math.exp(one["large"]["rating"] - one["ppo"]["rating"])) for one in found]
    return (f"The small model has {small:,} parameters, the large one {large:,}, "
            f"{large / small:.1f} times as many. Gold of the small PPO model less that of the "
            f"large SFT model: {runs.with_interval(gaps)}, {runs.verdict(gaps)}. By the report's "
            f"ratings it wins {runs.with_interval(wins, '.0f')}% of comparisons between the two.")


def remarks(part, found, folders):
    """What the table does not show, a paragraph each."""
    arms = PARTS[part]
    said = [ptx_sentence(found)] if "ptx" in arms else []
    said += [drift_sentence(folders)] if "eager" in arms else []
    said += [clip_sentence(folders)] if "fast" in arms else []
    said += [hacking_sentence(name, arm.said, found, folders) for name, arm in arms.items()
             if arm.steps[0][0] == "label"]
    return said + ([size_sentence(found, folders)] if "large" in arms else [])


def page(part, found, folders, config):
    """Markdown; found: [{arm: metrics}] of each seed; folders: {arm: [one of each seed]}."""
    text, arms = runs.with_interval, FIRST | PARTS[part]
    samples = runs.stage_flags(config.flags).get("evaluate", {}).get("samples", 10)
    heads = [title.format(samples=samples) for _, title, *_ in COLUMNS]
    lines = [f"# Take it out and see: {TITLES[part]}\n",
             f"    {runs.as_typed('ablations', replace(config, part=part))}\n",
             f"Means of {config.seeds} seeds ± half of their 95% interval (Student's t); the last "
             "columns: gold less that of the arm that differs by one thing, seed by seed, no "
             "difference where the interval covers 0. Proxy: the default reward model, whichever "
             "trained the arm. KL: to the SFT model as it is. Loss on text: nats a token of "
             "held-out pretraining text. [triage.md](../triage.md): from a symptom to its "
             "cause.\n",
             f"![a curve of every arm, beside that of the default]({part}.png)\n",
             "| arm | " + " | ".join(heads) + " | gold, difference | from |",
             "|" + "---|" * (len(COLUMNS) + 3)]
    for name, arm in arms.items():
        gaps = [one[name]["gold"] - one[arm.against]["gold"] for one in found]
        cells = [text([None if one[name].get(key) is None else unit * one[name][key]
                       for one in found], form) for key, _, unit, form in COLUMNS]
        gap = (" | " if name == arm.against else
               f"{text(gaps)}, {runs.verdict(gaps)} | {arms[arm.against].said}")
        lines.append(f"| {arm.said} | " + " | ".join(cells) + f" | {gap} |")
    return "\n".join(lines + [""] + [said + "\n" for said in remarks(part, found, folders)])


def draw(arms, folders, path):
    """A panel for each arm: one curve of it, a line a seed (orange), over the default's (grey)."""
    columns = min(3, len(arms))
    lines = -(-len(arms) // columns)
    figure = runs.new_figure(3.6 * columns, 0.5 + 2.5 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (name, arm) in zip(axes, arms.items()):
        stage = arm.steps[-1][0]
        kind = "step" if stage == "ppo" else "validation"
        for each, colour in ((folders.get(stage, ()), "#999999"), (folders[name], "#D55E00")):
            for folder in each:
                axis.plot(*runs.curve(folder, kind, arm.curve), color=colour, lw=1,
                          marker="" if kind == "step" else "o", ms=3)
        axis.set_title(arm.said.replace(": ", ":\n"), fontsize=9)
        axis.set_ylabel(UNITS[arm.curve], fontsize=8)
        axis.set_xlabel("iteration" if kind == "step" else "epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25, lw=0.6)
    for axis in axes[len(arms):]:
        axis.axis("off")
    said = ["orange: the arm, a line a seed", "grey: the same stage as it is"]
    figure.suptitle(("\n" if columns == 1 else "; ").join(said), fontsize=10)
    figure.savefig(path, dpi=110)


def study(part, config, pool):
    """Train and judge the arms of a part; write its page and picture."""
    arms, seeds, path = FIRST | PARTS[part], range(1, config.seeds + 1), Path(config.pages, part)
    scripts = {name: runs.with_bug(arm.bug, Path(config.out) / name) if arm.bug else ROOT
               for name, arm in arms.items()}
    jobs = [(name, seed) for seed in seeds for name in arms]
    done = dict(zip(jobs, pool.map(lambda job: train(
        job[0], arms[job[0]], job[1], config, scripts[job[0]]), jobs)))
    found = list(pool.map(lambda seed: report(
        part, {name: done[name, seed] for name in arms}, seed, config), seeds))
    folders = {name: [done[name, seed] for seed in seeds] for name in arms}
    text = page(part, found, folders, config)
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(PARTS[part], folders, path.with_suffix(".png"))
    print(f"written: {path}.md, {part}.png")


def main(config):
    common.find_device(config.device)  # refuses one that is not there before the runs
    parts = list(PARTS) if config.part == "all" else config.part.split(",")
    if set(parts) - set(PARTS):
        raise UserError(f"--part={config.part}: expected all, or of {', '.join(PARTS)}")
    Path(config.pages).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.workers) as pool:
        list(pool.map(lambda seed: runs.pipeline(config, seed), range(1, config.seeds + 1)))
        for part in parts:
            study(part, config, pool)


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
