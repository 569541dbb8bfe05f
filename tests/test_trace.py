"""trace.py: every printed number redone from the others, as with a calculator."""

import ast
import itertools
import json
import math
import re

import data.verifier
import grpo
import naive
import pytest
from conftest import run_script
from data.records import write_jsonl
from tiny_runs import FLAGS, make_inputs

DPO = [*(f for f in FLAGS["dpo"] if not f.startswith(("--epochs", "--lr"))), "--epochs=4",
       "--lr=0.01"]
PER_TOKEN = ("ipo_mean", "dpo_norm", "simpo")
GRPO = [f for f in FLAGS["grpo"] if not f.startswith(("--iterations", "--lr", "--out"))]
PPO = [f for f in FLAGS["ppo"] if not f.startswith(("--iterations", "--lr", "--out"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("trace"))
    (folder / "done").mkdir()
    (folder / "done" / "model.pt").write_text("a finished run")
    return folder


def trace(folder, stage, *flags):
    """The script's output, after the checks that hold for every stage."""
    content = lambda: {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")
                       if not p.is_relative_to(folder / "out" / "cache") and p != folder / "out"}
    before = content()
    result = run_script("trace.py", stage, *flags, "--out=done", cwd=folder)
    assert result.returncode == 0, result.stderr
    # nothing is written, not even a folder, and the finished run in --out is as it was
    assert content() == before
    return result.stdout


def table(output, first):
    """The table whose first column has this name: {name: [number, None or text]}."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [first])
    names, columns = lines[start].split(), []
    for line in lines[start + 1:]:
        cells = line.split(maxsplit=len(names) - 1)
        if not cells or not cells[0].isdigit():
            break
        columns.append([None if c == "-" else c if n == "text" else float(c)
                        for n, c in zip(names, cells)])
    return dict(zip(names, zip(*columns)))


def number(output, pattern):
    return float(re.search(pattern + r" ?(-?[\d.]+)", output)[1])


def check_logp(folder, t, column, temperature=1.0, init="sft"):
    """The column holds the log-probabilities of the model `init`: those of the naive network, for
    the tokens that the table shows, up to half a character, which it cannot show."""
    network, _, tokenizer = naive.load(folder / init)
    ids = []
    for text in itertools.takewhile(lambda text: "\ufffd" not in text, t["text"]):
        text = tokenizer.eos if text == "EOS" else ast.literal_eval(text)
        ids.append(text if isinstance(text, int) else tokenizer.encoding.encode_single_token(text))
    every = network.all_logp(ids, temperature)
    for n, (token, logp, m) in enumerate(zip(ids, t[column], t["mask"])):
        assert logp == (near(every[n - 1, token].item()) if m else None)


near = lambda x: pytest.approx(x, rel=2e-5, abs=2e-5)  # six printed digits


def test_sft(folder):
    # catches a table whose numbers are not those of the loss
    output = trace(folder, "sft", *FLAGS["sft"])
    t = table(output, "position")
    assert t["position"] == tuple(range(len(t["text"]))) and t["text"][-1] == "EOS"
    assert t["mask"].count(1.0) >= 4 and 0.0 in t["mask"] and t["text"][0] == "'<|user|>'"
    check_logp(folder, t, "logp")
    scored = [x for x, m in zip(t["logp"], t["mask"]) if m]
    assert None not in scored and all(x is None for x, m in zip(t["logp"], t["mask"]) if not m)
    assert number(output, r"sum\(mask\) = .* =") == near(-sum(scored) / len(scored))


def test_reward(folder):
    # catches a score that is not at EOS, pairs that are reversed, a mean that is none
    output = trace(folder, "reward", *FLAGS["reward"])
    t, pairs = table(output, "answer"), table(output, "chosen")
    scores = [x for x in t["score"] if x is not None]
    ends = [text for x, text in zip(t["score"], t["text"]) if x is not None]
    assert len(scores) == 3 and set(ends) == {"EOS"}
    losses = []
    for w, l, margin, sigmoid, loss in zip(*pairs.values()):
        assert margin == near(scores[int(w)] - scores[int(l)])
        assert sigmoid == near(1 / (1 + math.exp(-margin)))
        assert loss == near(-math.log(sigmoid))
        losses.append(loss)
    assert len(losses) in (2, 3)
    assert number(output, r"pairs = .* =") == near(sum(losses) / len(losses))


@pytest.mark.parametrize("flags", [
    [], ["--kl_in=loss", "--entropy_coef=0.1", "--whiten=false", "--gamma=0.9", "--lam=0.5"],
    ["--seed=3", "--temperature=0.7", "--score_scaling=true"]])
def test_ppo(folder, flags):
    # catches a column that is not what the next one is made from: KL term, reward, GAE, whitening
    output = trace(folder, "ppo", *PPO, "--iterations=3", "--lr=0.05", *flags)
    t = table(output, "position")
    rows = [dict(zip(t, row)) for row in zip(*t.values()) if row[1] == 1.0]
    options = dict(f.strip("-").split("=") for f in flags)
    check_logp(folder, t, "ref_logp", float(options.get("temperature", 1)))
    gamma, lam = float(options.get("gamma", 1)), float(options.get("lam", 0.95))
    mean, std = number(output, "mean"), number(output, ", std")
    assert number(output, "beta =") == 0.1
    assert rows[-1]["score"] is not None
    assert (rows[-1]["text"] == "EOS") == ("of the reward model" in output)
    next_value = next_advantage = next_kl = policy = critic = 0.0
    for r in reversed(rows):
        score = r["score"] or 0.0  # "-" everywhere but on the last action
        kl = next_kl if "kl_in" in options else r["old_logp"] - r["ref_logp"]
        assert r["kl_term"] == near(-0.1 * kl)
        assert r["reward"] == near(r["kl_term"] + score)
        delta = r["reward"] + gamma * next_value - r["value"]
        assert r["advantage"] == near(delta + gamma * lam * next_advantage)
        assert r["returns"] == near(r["advantage"] + r["value"])
        white = r["advantage"] if "whiten" in options else (r["advantage"] - mean) / std
        assert r["white"] == near(white)
        assert r["ratio"] == near(math.exp(r["logp"] - r["old_logp"]))
        clip = min(max(r["ratio"], 0.8), 1.2)
        policy -= min(r["ratio"] * white, clip * white)
        moved = r["value"] + min(max(r["new_value"] - r["value"], -0.2), 0.2)
        critic += 0.5 * max((r["new_value"] - r["returns"]) ** 2, (moved - r["returns"]) ** 2)
        next_value, next_advantage = r["value"], r["advantage"]
        next_kl = r.get("exact_kl", 0.0)
    loss = policy + critic
    if "kl_in" in options:
        loss += 0.1 * sum(r["kl"] for r in rows) - 0.1 * sum(r["entropy"] for r in rows)
    assert number(output, r"loss     = [^=]*= .* =") == near(loss / len(rows))
    assert max(abs(r["ratio"] - 1) for r in rows) > 0.01  # after updates, away from the reference
    assert max(abs(r["old_logp"] - r["ref_logp"]) for r in rows) > 0.01


@pytest.mark.parametrize("flags", [
    [], ["--method=grpo", "--kl_in=loss", "--kl_estimator=k3", "--temperature=0.7"],
    ["--method=dapo", "--kl_in=loss", "--beta=0.05", "--seed=4"], ["--method=dr_grpo",
                                               "--ptx_coef=0.5", "--ptx_data=text.txt"]])
def test_grpo(folder, flags):
    # catches a table whose rewards, advantages, weights or losses do not follow from each other
    output = trace(folder, "grpo", *GRPO, "--iterations=3", "--lr=0.05", *flags)
    g, t = table(output, "response"), table(output, "position")
    options = dict(f.strip("-").split("=") for f in flags)
    method, K, in_loss = options.get("method", "rloo"), 4, "kl_in" in options
    beta = float(options.get("beta", dict(grpo=0.04, dr_grpo=0).get(method, 0.1)))
    assert len(g["response"]) == K and set(g["kept"]) == {1.0}
    mean = sum(g["reward"]) / K
    std = (sum((r - mean) ** 2 for r in g["reward"]) / (K - 1)) ** 0.5
    assert number(output, "mean") == near(mean) and number(output, ", std") == near(std)
    high, loss = 0.28 if method == "dapo" else 0.2, 0.0
    for i in range(K):
        row = {name: column[i] for name, column in g.items()}
        assert row["finished"] == 1 or row["score"] == -3
        assert row["reward"] == near(row["score"] - (0 if in_loss or not beta else
                                                     beta * row["seq_kl"]))
        scale = dict(rloo=K / (K - 1), dr_grpo=1).get(method) or 1 / (std + 1e-4)
        assert row["advantage"] == near((row["reward"] - mean) * scale)
        assert row["weight"] == near(1 / dict(
            rloo=K, grpo=K * row["tokens"], dr_grpo=K * 12, dapo=sum(g["tokens"]))[method])
        loss += row["weight"] * (row["policy"] + (row["kl"] if in_loss else 0))
    assert number(output, r"loss      = .* =") == near(loss)
    assert ("score - beta seq_kl" in output) == (beta > 0 and not in_loss)
    assert ("pretraining text comes on top" in output) == ("ptx_coef" in options)
    shown = int(number(output, "those of response"))
    rows = [dict(zip(t, row)) for row in zip(*t.values()) if row[1] == 1.0]
    advantage, policy, log_ratio, k3 = g["advantage"][shown], 0.0, 0.0, 0.0
    assert len(rows) == g["tokens"][shown] and abs(advantage) == max(map(abs, g["advantage"]))
    assert (rows[-1]["text"] == "EOS") == (g["finished"][shown] == 1)
    for r in rows:
        assert r["ratio"] == near(math.exp(r["logp"] - r["old_logp"]))
        assert r["clipped"] == near(min(max(r["ratio"], 0.8), 1 + high))
        policy -= min(r["ratio"] * advantage, r["clipped"] * advantage)
        l = r["logp"] - r.get("ref_logp", 0)
        log_ratio, k3 = log_ratio + l, k3 + math.exp(-l) - 1 + l
    assert number(output, r"of response \d =") == near(policy) == g["policy"][shown]
    if beta:
        check_logp(folder, t, "ref_logp", float(options.get("temperature", 1)))
        assert max(abs(r["old_logp"] - r["ref_logp"]) for r in rows) > 0.001  # after an iteration
        assert g["seq_kl"][shown] == near(sum(r["old_logp"] - r["ref_logp"] for r in rows))
    else:
        assert "ref_logp" not in t and "seq_kl" not in g
    if in_loss:
        assert g["kl"][shown] == near(beta * (k3 if "kl_estimator" in options
                                              else log_ratio**2 / 2))
    assert max(abs(r["ratio"] - 1) for r in rows) > 0.01  # after updates


@pytest.mark.parametrize("loss, flags", [
    ("dpo", []), ("cdpo", ["--label_smoothing=0.2"]), ("ipo", ["--beta=0.3"]), ("ipo_mean", []),
    ("dpo_norm", ["--beta=1.5"]), ("simpo", ["--simpo_margin=0.8"]), ("kto", ["--desirable=1.5"])])
def test_dpo(folder, loss, flags):
    # catches a sum without EOS, a length off by one, a reward in other units than the loss's, a
    # formula that is not the one that the number comes from
    output = trace(folder, "dpo", *DPO, f"--loss={loss}", *flags)
    beta, e = number(output, "beta ="), 0.2
    rewards = []
    for side in ("chosen", "rejected"):
        t = table(output[output.index(f"{side}: "):], "position")
        rows = [dict(zip(t, row)) for row in zip(*t.values())]
        scored = [r for r in rows if r["mask"]]
        assert rows[-1]["text"] == "EOS" and rows[-1]["mask"] == 1  # EOS is part of the sums
        assert rows[len(rows) - len(scored) - 1]["text"] == "'<|assistant|>'"
        assert all(r["logp"] is r["ref_logp"] is r["log_ratio"] is None
                   for r in rows if not r["mask"])
        check_logp(folder, t, "ref_logp")
        for r in scored:
            assert r["log_ratio"] == near(r["logp"] - r["ref_logp"])
        assert max(abs(r["log_ratio"]) for r in scored) > 0.001  # away from the reference
        cells = next(line.split() for line in output.splitlines() if line.endswith(f"  {side}"))
        names = next(line.split() for line in output.splitlines() if "sum_ref_logp" in line)
        sums = dict(zip(names, map(float, cells[:-1])))
        assert sums["sum_logp"] == near(sum(r["logp"] for r in scored))
        assert sums["sum_ref_logp"] == near(sum(r["ref_logp"] for r in scored))
        assert sums["tokens"] == len(scored)
        reward = beta * (sums["sum_logp"] - sums["sum_ref_logp"] * (loss != "simpo"))
        rewards.append(reward / sums["tokens"] if loss in PER_TOKEN else reward)
        assert sums["reward"] == near(rewards[-1])
    margin, sigmoid = rewards[0] - rewards[1], lambda x: 1 / (1 + math.exp(-x))
    expected = dict(
        cdpo=-(1 - e) * math.log(sigmoid(margin)) - e * math.log(sigmoid(-margin)),
        ipo=((margin - 0.5) / beta) ** 2, ipo_mean=((margin - 0.5) / beta) ** 2,
        simpo=-math.log(sigmoid(margin - beta * 0.8)),
        kto=(1.5 * (1 - sigmoid(rewards[0])) + 1.0 * (1 - sigmoid(-rewards[1]))) / 2)
    flipped = "loss = -0.8 log sigmoid(margin) - 0.2 log sigmoid(-margin)"
    assert (flipped in output) == (loss == "cdpo")
    if loss != "kto":
        assert number(output, r"margin = .* =") == near(margin)
    expected = expected.get(loss, -math.log(sigmoid(margin)))
    assert number(output, r"\nloss = .* =") == near(expected)


@pytest.mark.parametrize("arguments, message", [
    ([], "the first argument is the stage, one of sft, reward, ppo, dpo, grpo"),
    (["evaluate"], "the first argument is the stage, one of sft, reward, ppo, dpo, grpo"),
    (["--seed=2", "sft"], "the first argument is the stage"),
    (["sft", "--epoch=3"], "unknown flag --epoch: did you mean --epochs?"),
    (["sft", "--init=nowhere"], "--init=nowhere does not exist"),
    (["ppo", *PPO, "--kl_in=both"], "--kl_in=both: expected reward or loss"),
    (["grpo", *GRPO, "--method=ppo"], "--method=ppo: expected one of grpo"),
    (["dpo", *DPO, "--loss=orpo"], "--loss=orpo: expected one of dpo"),
    (["dpo", "--init=sft", "--data=labels.jsonl", "--loss=kto"],
     "the data has single answers only"),
    (["grpo", "--init=sft", "--data=answers.jsonl", "--batch_size=8", "--k=4",
      "--max_new_tokens=12"], "every group's scores are all equal")])
def test_bad_input_is_one_clear_line(folder, arguments, message):
    # catches tracebacks, wrong exit statuses, and a table where there is nothing to show
    write_jsonl(folder / "labels.jsonl", [dict(prompt=f"Say {i}.", completion="One.", label=i > 3,
                                               held_out=i % 2 > 0) for i in range(8)])
    write_jsonl(folder / "answers.jsonl", [dict(prompt=f"Say {i}.", answer="123456", held_out=i > 8)
                                           for i in range(12)])
    result = run_script("trace.py", *arguments, cwd=folder)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line and "%|" not in line]  # no bars
    assert len(errors) == 1 and errors[0].startswith("trace.py: error: ") and message in errors[0]


def test_help():
    # catches the flags of another stage
    shown = run_script("trace.py", "grpo", "--help", cwd=".")
    assert shown.returncode == 0 and "\n  --kl_estimator=auto " in shown.stdout


@pytest.mark.parametrize("stage, flags", [
    ("sft", ["--batch_size=1", "--epochs=1"]), ("reward", ["--batch_size=1", "--epochs=1"]),
    ("dpo", ["--batch_size=3", "--micro_batch=2", "--nll=0.5", "--epochs=4"]),
    ("dpo", ["--loss=kto", "--weight_decay=0.5"]),
    ("ppo", ["--kl_target=1", "--kl_horizon=20", "--score_scaling=true", "--ptx_coef=0.5"]),
    ("ppo", ["--kl_in=loss", "--micro_batch=3", "--warmup=2", "--critic_lr=0.03"]),
    ("grpo", ["--method=grpo", "--ptx_coef=0.5", "--warmup=2", "--micro_batch=3"]),
    ("grpo", ["--reward=verifier", "--data=sums.jsonl", "--seed=2"])])
def test_the_numbers_are_those_of_the_run(folder, monkeypatch, stage, flags):
    # catches a trace that draws, orders or trains otherwise than the stage does
    write_jsonl(folder / "sums.jsonl", [dict(prompt=f"Say {i}.", answer=i, held_out=i > 8)
                                        for i in range(12)])
    for module in (data.verifier, grpo):  # a random model is never right
        monkeypatch.setattr(module, "is_right", lambda text, i: (len(text) + int(i)) % 2 == 0)
    out = f"run{len(list(folder.iterdir()))}"
    more = ["--lr=0.05"] * (stage in ("ppo", "dpo", "grpo")) + \
        ["--iterations=2", "--ptx_data=text.txt"] * (stage in ("ppo", "grpo"))
    given = {f.split("=")[0]: f for f in (*FLAGS[stage], *more, *flags)}.values()
    result = run_script(f"{stage}.py", *given, f"--out={out}", cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    step = [r for r in rows if r["kind"] == "step"]
    output = trace(folder, stage, *given)
    if stage in ("sft", "reward"):  # batches of one
        assert number(output, r"\nloss = .* =") == near(step[0]["loss"])
        return
    t, samples = table(output, "position"), [r for r in rows if r["kind"] == "sample"][4:]
    check_logp(folder, t, "logp", init=out)  # the run has no step more than the trace
    if stage == "ppo":
        kl = sum(old - ref for old, ref in zip(t["old_logp"], t["ref_logp"]) if ref is not None)
        assert (t["score"][-1], kl) == (near(samples[0]["score"]), near(samples[0]["kl"]))
        assert number(output, "beta =") == near(step[1]["beta"])
    elif stage == "grpo":
        g = table(output, "response")
        for name in ("score", "advantage"):
            assert g[name] == tuple(near(r[name]) for r in samples)
