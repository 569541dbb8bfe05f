"""Preflight: files that are faulty in one respect each."""

import json

import cli
import pytest
import reward
import torch
from conftest import run_script
from data.load import load_rankings
from data.preflight import overfit, overfit_line, ranking_lines
from data.records import check_ranking, ranking_rows, write_jsonl
from data.tokenizer import load_tokenizer
from data.tokens import read_tokens
from reward import reward_loss
from test_probe import make_model
from tiny_runs import make_inputs

WORDS = ["sea", "hill", "ship", "bird", "lamp", "stone", "cloud", "field"]


def good(n):
    """A record without a fault: its answers are equally long, the better one stands anywhere."""
    text = lambda adjective: f"The {WORDS[n % 8]} {n:02d} is {adjective}."
    return dict(prompt=f"Tell me of number {n:02d}.", completions=[text("good"), text("poor")],
                ranks=[[1, 2], [2, 1]][n // 2 % 2], held_out=n % 5 == 4)


def lines_of(folder, records, monkeypatch, block_size=64, max_new_tokens=40):
    """[(ok, text), ...] of these records."""
    monkeypatch.chdir(folder)
    write_jsonl(folder / "data.jsonl", records)
    tokenizer = load_tokenizer("synthetic")
    source = read_tokens("data.jsonl", check_ranking, ranking_rows, tokenizer)
    return ranking_lines(source, tokenizer, block_size, max_new_tokens)


RECORDS = [good(n) for n in range(20)]


def test_good_data_have_no_fault(tmp_path, monkeypatch):
    found = lines_of(tmp_path, RECORDS, monkeypatch)
    assert [text for ok, text in found if not ok] == [] and len(found) == 10
    said = " | ".join(text for _, text in found)
    assert "longer wins 50.0%, shorter wins 50.0%" in said and "0 ties, 20 pairs" in said
    assert "the first listed answer wins 50.0%" in said


def change(n, **fields):
    return RECORDS[n] | fields


answers = lambda n: RECORDS[n]["completions"]
FAULTS = [
    # longer wins: a longer answer in 14 of 20 records, preferred in each
    ("longer wins 85.0% of the pairs: length alone", [
        change(n, completions=[a + (" Yes." if r == 1 else "") for a, r in zip(
            answers(n), RECORDS[n]["ranks"])]) if n < 14 else RECORDS[n] for n in range(20)]),
    ("shorter wins 85.0% of the pairs: length alone", [
        change(n, completions=[a + (" Yes." if r == 2 else "") for a, r in zip(
            answers(n), RECORDS[n]["ranks"])]) if n < 14 else RECORDS[n] for n in range(20)]),
    ("the first listed answer wins 75.0% of the pairs: were", [
        change(n, ranks=[1, 2] if n < 15 else [2, 1]) for n in range(20)]),
    ("the first listed answer wins 25.0% of the pairs: were", [
        change(n, ranks=[1, 2] if n < 5 else [2, 1]) for n in range(20)]),
    ("12 ties, 8 pairs: most", [change(n, ranks=[1, 1]) if n not in (0, 1, 4, 6, 7, 10, 14, 8)
                                else RECORDS[n] for n in range(20)]),
    ("1 answers stand twice in their ranking: ", [
        *RECORDS[1:], change(0, completions=[*answers(0), answers(0)[1]], ranks=[1, 2, 2])]),
    ("2 of 22 records are copies of another: ", [*RECORDS, RECORDS[3], RECORDS[6]]),
    ("1 pairs of answers are ordered both ways: ", [*RECORDS, change(3, ranks=[
        3 - r for r in RECORDS[3]["ranks"]])]),
    ("1 held-out prompts are training prompts too", [
        *RECORDS, change(3, prompt="tell me, of number 03", held_out=True,
                         completions=["It is so.", "It is no."])]),
    ("75.0% of the held-out answers stand on the training side", [
        change(n, completions=answers(n - 1)) if n in (4, 9, 14) else RECORDS[n]
        for n in range(20)]),
]


@pytest.mark.parametrize("words, records", FAULTS, ids=[words[:40] for words, _ in FAULTS])
def test_a_fault_is_found_and_only_it(tmp_path, monkeypatch, words, records):
    # catches a count of something else, a limit that is never reached
    bad = [text for ok, text in lines_of(tmp_path, records, monkeypatch) if not ok]
    assert len(bad) == 1 and bad[0].startswith(words), bad


@pytest.mark.parametrize("limits, words", [
    (dict(block_size=25), "1 of 21 rankings have an answer over 25 tokens"),
    (dict(max_new_tokens=25), "1 of 42 answers are longer than --max_new_tokens=25")])
def test_answers_that_do_not_fit(tmp_path, monkeypatch, limits, words):
    records = [*RECORDS, dict(prompt="Go.", completions=["The sea is good.", "No. " * 10],
                              ranks=[1, 2], held_out=False)]
    # a short answer is preferred there: the baselines stay fine
    [bad] = [t for ok, t in lines_of(tmp_path, records, monkeypatch, **limits) if not ok]
    assert bad.startswith(words)


def test_chosen_always_stands_first(tmp_path, monkeypatch):
    # catches a warning about every file of pairs
    pairs = [dict(prompt=r["prompt"], chosen=r["completions"][0], rejected=r["completions"][1],
                  held_out=r["held_out"]) for r in RECORDS]
    assert all(ok for ok, _ in lines_of(tmp_path, pairs, monkeypatch))


def losses_of(folder, monkeypatch, records, **flags):
    monkeypatch.chdir(folder)
    write_jsonl(folder / "data.jsonl", records)
    model, tokenizer = make_model()
    train = load_rankings("data.jsonl", tokenizer, 64).train
    config = reward.Config(lr=3e-3, micro_batch=0, **flags)
    return overfit(model, reward_loss, train, config, tokenizer.pad, torch.device("cpu"))


def test_overfitting_reaches_nearly_zero(tmp_path, monkeypatch):
    # catches steps that train nothing, another sign of the loss, a loss that is no mean
    losses = losses_of(tmp_path, monkeypatch, RECORDS)
    assert 0.3 < losses[0] < 1.2 and losses[-1] < 0.05 and len(losses) < 150
    assert all(loss >= 0.05 for loss in losses[:-1])
    ok, text = overfit_line(losses)
    assert ok and f"{losses[0]:.2f} at the start (a coin toss: 0.69)" in text


def test_contradictions_cannot_be_learnt(tmp_path, monkeypatch):
    # catches a check that always passes: with both orders of a pair the best loss is ln 2
    both = RECORDS + [r | dict(ranks=[3 - x for x in r["ranks"]]) for r in RECORDS]
    losses = losses_of(tmp_path, monkeypatch, both)
    assert len(losses) == 151 and losses[-1] > 0.6
    ok, text = overfit_line(losses)
    assert not ok and "cannot learn them by heart" in text


def test_preflight_is_no_run(tmp_path):
    # catches a folder that it leaves behind, a training that follows, another exit status
    make_inputs(tmp_path)
    flags = ["--data=pairs.jsonl", "--init=sft", "--preflight=true", "--out=pre"]
    done = run_script("reward.py", *flags, "--lr=0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [s for s in done.stdout.splitlines() if s.startswith(("ok ", "look:"))]
    assert len(lines) == 11 and not (tmp_path / "pre").exists()
    assert "report card" not in done.stdout and "32 pairs alone" in lines[-1]
    (tmp_path / "none.jsonl").write_text(json.dumps(dict(
        prompt="a", completions=["x", "y"], ranks=[1, 1])) + "\n")
    done = run_script("reward.py", "--data=none.jsonl", *flags[1:], cwd=tmp_path)
    assert done.returncode == 2 and "error:" in done.stderr
    assert cli.read_flags(reward.Config, []).preflight is False
