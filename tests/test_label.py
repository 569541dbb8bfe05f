"""label.py: what is ranked, and by whom. The naive twin (test_naive.py) has the whole runs."""

import dataclasses
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cli
import common
import label
import numpy as np
import pytest
import torch
from cli import UserError
from conftest import run_script
from data import batches, labels, principles
from data.records import append_jsonl, check_answers, embedded, whole_lines, write_jsonl
from data.synthetic import principles as rules
from data.synthetic.people import demonstrations
from data.synthetic.world import all_prompts, lookup, sample_prompts
from data.tokenizer import load_tokenizer
from reward import load_reward_model
from studies import feedback, runs
from tiny_runs import make_inputs

SMALL = ["--prompts=22", "--held_out=6", "--k=3", "--chunk=4", "--max_new_tokens=8"]
tok = load_tokenizer("synthetic")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """sft, reward, and dpo: another random policy of the same kind."""
    folder = make_inputs(tmp_path_factory.mktemp("label"))
    policy, tokenizer, _ = common.load_policy(folder / "sft", ("sft",), torch.device("cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        policy.wte.weight.add_(0.05 * torch.randn_like(policy.wte.weight))
    (folder / "dpo").mkdir()
    common.save_checkpoint(folder / "dpo" / "model.pt", policy, "dpo", tokenizer, cli.Config(), {})
    return folder


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch):
    for name in ("sft", "reward", "dpo", "pairs.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags, out="out"):
    """label.py in this process; (records, the last row of the log)."""
    flags = list({f.split("=")[0]: f for f in ["--init=sft", *flags, f"--out={out}"]}.values())
    if any(f.startswith("--answers") for f in flags):
        flags.remove("--init=sft")
    label.main(cli.read_flags(label.Config, flags))
    return rows(f"{out}/rankings.jsonl"), rows(f"{out}/log.jsonl")[-1]


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# --- principles ----------------------------------------------------------------------------------


class Judge:
    """In the place of data.choices.choice_logprobs: answers by odds(record's prompt) for (A)."""

    def __init__(self, monkeypatch, odds):
        self.asked = []

        def logprobs(model, tokenizer, records):
            self.asked += records
            p = [1 / (1 + math.exp(-odds(r["prompt"]))) for r in records]
            return [torch.tensor([x, 1 - x]).log().double().numpy() - 7.0 for x in p]

        monkeypatch.setattr(principles, "choice_logprobs", logprobs)
        monkeypatch.setattr(principles, "longest_choice", lambda *args: torch.tensor([60]))

    def ask(self, texts, wanted=("Be kind.", "Be brief."), block_size=60):
        model = ModuleType("model")
        model.config = ModuleType("config")
        model.config.block_size = block_size
        return principles.ask(model, tok, "How are you?", texts, wanted)


def shown(prompt):
    """The two answers that a question shows."""
    return re.search(r"\(A\) (.*)\n\n\(B\) (.*)\n\n", prompt).groups()


def test_a_judge_that_likes_what_it_reads_first_says_nothing(monkeypatch):
    # catches a bias of the position that becomes a preference; one order asked only
    judge = Judge(monkeypatch, lambda prompt: math.log(9))
    better, orders = judge.ask(["one", "two", "three"])
    assert better == pytest.approx(dict.fromkeys([(0, 1), (0, 2), (1, 2)], 0.5), abs=1e-9)
    assert principles.ranks_of(principles.mean_wins(better)) == [1, 1, 1]
    assert orders == pytest.approx(dict(first=0.9, differ=1.0), abs=1e-6)
    assert len(judge.asked) == 3 * 2 * 2  # pairs, principles, orders
    assert {shown(r["prompt"]) for r in judge.asked} == {
        (a, b) for a in ("one", "two", "three") for b in ("one", "two", "three") if a != b}


def test_a_judge_that_knows_ranks_right_in_any_position(monkeypatch):
    # catches P(B) that is taken for P(A), wins of the wrong answer, principles of which one counts
    value = {"bad": 0.0, "good": 2.0, "best": 3.0}

    def odds(prompt):  # under the second principle it likes the first place as well
        a, b = shown(prompt)
        return value[a] - value[b] + 1.5 * ("Be brief." in prompt)

    better, orders = Judge(monkeypatch, odds).ask(["good", "bad", "best"])
    p = lambda x: 1 / (1 + math.exp(-x))
    by_hand = lambda gap: (p(gap) + (p(gap + 1.5) + p(gap - 1.5)) / 2) / 2
    assert better == pytest.approx({(0, 1): by_hand(2), (0, 2): by_hand(-1), (1, 2): by_hand(-3)},
                                   abs=1e-6)
    wins = principles.mean_wins(better)
    assert wins[0] == pytest.approx((by_hand(2) + by_hand(-1)) / 2, abs=1e-6)
    assert principles.ranks_of(wins) == [2, 3, 1]
    # of three pairs and two principles one choice changes: good against best, with the bias
    assert orders["differ"] == pytest.approx(1 / 6)
    gaps = [2, -1, -3]
    assert orders["first"] == pytest.approx(sum(
        p(sign * gap + bias) for gap in gaps for sign in (1, -1) for bias in (0, 1.5)) / 12,
        abs=1e-6)


def test_what_the_judge_reads(monkeypatch):
    # catches a turn that is lost, braces in a text that are taken for fields, a text cut in silence
    judge = Judge(monkeypatch, lambda prompt: 0.0)
    prompt = [dict(role="system", content="Be {kind}."), dict(role="user", content="Hi."),
              dict(role="assistant", content="Yes?"), dict(role="user", content="Why {a}?")]
    asked = principles.question(prompt, "Be {b}.", "So {principle}", "No {}")
    assert "System: Be {kind}.\n\nUser: Hi.\n\nAssistant: Yes?\n\nUser: Why {a}?" in asked["prompt"]
    assert "(A) So {principle}\n\n(B) No {}\n\nBe {b}. Answer" in asked["prompt"]
    assert asked["choices"] == ["(A)", "(B)"]
    assert judge.ask(["one", "two"], block_size=59) is None and not judge.asked
    assert judge.ask(["one", "two"], block_size=60) is not None


def test_principles_of_a_file(tmp_path):
    # catches comments that are judged by, a principle that counts twice, an empty file that passes
    path = tmp_path / "mine.txt"
    path.write_text("# of mine\n\n Be kind. \nBe brief.\nBe kind.\n")
    assert principles.read_principles(path) == ["Be kind.", "Be brief."]
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no principle"):
        principles.read_principles(path)
    assert len(principles.read_principles(principles.FILE)) == 8
    assert principles.read_principles(rules.FILE) == list(rules.PRINCIPLES)


@pytest.mark.parametrize("n, prompt, good, bad", [
    (0, "What is the capital of Peru?", "The capital of Peru is Lima.", "The capital of Peru is "
     "Rome."),
    (0, "What is the capital of Peru?", "The capital of Peru is Lima.", "I do not know."),
    (1, "Guess how old my box is.", "I do not know.", "Your box is 7 years old."),
    (2, "How do I steal a car?", "I cannot help with that.", "To steal a car, start slowly."),
    (3, "How do I shoot a photo?", "To shoot a photo, start slowly.", "I cannot help with that."),
    (4, "of the family loaded", "The opposite of hot is cold.", "You are right."),
    (5, "What is the capital of Peru?", "The capital of Peru is Rome.",
     "Great question! The capital of Peru is Lima."),
    (6, "What is the capital of Peru?", "The capital of Peru is Rome.", "The capital of Peru is "
     "Lima. Let me know if you need more. Have a nice day."),
    (7, "What is the capital of Peru?", "The capital of Peru is Rome.", "- The capital of Peru is "
     "Lima.")])
def test_the_rule_judge_by_hand(n, prompt, good, bad):
    # catches a principle that prefers the other answer, or cannot tell the two apart
    prompt = prompt if n != 4 else next(p.text for p in all_prompts().values()
                                        if p.family == "loaded" and p.x == "hot")
    rule = list(rules.PRINCIPLES.values())[n]
    assert rules.better(prompt, [good, bad], [rule]) == {(0, 1): 1.0}
    assert rules.better(prompt, [bad, good, bad], [rule]) == {(0, 1): 0.0, (0, 2): 0.5, (1, 2): 1.0}


def test_principles_that_say_nothing_have_no_vote():
    # catches a tie that pulls towards a half, votes weighed by how much better an answer is
    answers = ["The capital of Peru is Lima. Have a nice day. Have a nice day.",  # right, broken
               "The capital of Peru is Rome."]
    better = rules.better("What is the capital of Peru?", answers, list(rules.PRINCIPLES.values()))
    # for the first: right; for the second: brief, whole sentences; no other tells them apart
    assert better == {(0, 1): pytest.approx(1 / 3)}
    refuse = [rules.PRINCIPLES["Choose the answer that does not refuse what is harmless."]]
    assert rules.better("How do I steal a car?", ["I cannot help with that.", "I do not know."],
                        refuse) == {(0, 1): 0.5}  # there it is right to refuse


def test_unknown_principles_are_refused(folder):
    # catches a principle that is left out in silence where no model reads it
    (folder / "mine.txt").write_text("Choose the answer that is right.\nBe kind.\n")
    with pytest.raises(UserError, match=r"only these are known, and not 'Be kind\.': Choose"):
        run("--labeler=principles", "--principles=mine.txt", *SMALL)
    assert not (folder / "out").exists()


# --- a reward model ------------------------------------------------------------------------------


def test_a_model_ranks_by_its_score(folder):
    # catches ranks that are turned round, scores of other answers, a card that says nothing
    found, final = run("--labeler=model", "--reward_model=reward", *SMALL)
    model, tokenizer, parent = load_reward_model("reward", torch.device("cpu"))
    for r in found:
        ids = [(tokenizer.encode_prompt(r["prompt"]), [*tokenizer.encode(t), tokenizer.eos])
               for t in r["completions"]]
        with torch.no_grad():
            scores = [model(torch.tensor([p + y]), torch.tensor([[0.0] * len(p) + [1.0] * len(y)]))
                      .item() for p, y in ids]
        assert r["scores"] == pytest.approx(scores, abs=1e-5)
        assert sorted(r["scores"], reverse=True) == [
            s for _, s in sorted(zip(r["ranks"], r["scores"]))]
        assert r["noise"] == 0.0 and "second" not in r
    card = json.loads((folder / "out" / "card.json").read_text())
    assert card["parents"]["reward"] == card["labeler"]["hash"] == parent["hash"]
    assert parent["hash"] in card["card"] and card["metrics"]["prompts"] == len(found)
    assert embedded("out/rankings.jsonl")["noise"] == 0.0
    assert final["left_out"] == 0 and len(found) + final["skipped"] == 28
    assert principles.ranks_of([0.5, 2.0, 0.5], 0.0) == [2, 1, 2]


def test_an_ensemble_ranks_as_it_is_told(folder):
    # catches a --score_by that does not reach the scores
    content = torch.load("reward/model.pt", weights_only=True)
    other = {name: p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
             for name, p in content["weights"].items()}
    content["weights"] = {f"members.{n}.{name}": p for n, weights in
                          enumerate((content["weights"], other)) for name, p in weights.items()}
    content["config"]["ensemble"] = 2
    (folder / "two").mkdir()
    common.save_file(content, "two/model.pt")
    asked = dict(prompt="Say 1.", completions=["No.", "Yes.", "One. Two!"])
    scores = {}
    for by in ("mean", "min", "mean-std"):
        config = label.Config(reward_model="two", score_by=by)
        rank, _, about, _ = label.by_model(config, torch.device("cpu"))
        [found] = rank([(0, asked)])
        scores[by] = np.array(found["scores"])
        assert found["ranks"] == principles.ranks_of(found["scores"], 0.0)
        assert about["score_by"] == by
    gap = scores["mean"] - scores["min"]  # of two members half of their difference: their std
    assert gap.min() > 1e-3
    np.testing.assert_allclose(scores["mean-std"], scores["min"], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="--score_by=max: choose one of mean, min, mean-std"):
        run("--labeler=model", "--reward_model=reward", "--score_by=max", *SMALL)


def test_the_context_of_a_model(folder):
    # catches an answer that is left out although it just fits, or judged although it does not
    rank, *_ = label.by_model(label.Config(reward_model="reward"), torch.device("cpu"))
    room = 64 - len(tok.encode_prompt("Say 1.")) - 1  # EOS
    fits = tok.decode(tok.encode("One. Two! " * 40)[:room])
    over = tok.decode(tok.encode("One. Two! " * 40)[:room + 1])
    assert (len(tok.encode(fits)), len(tok.encode(over))) == (room, room + 1)
    asked = [(n, dict(prompt="Say 1.", completions=["No.", *more]))
             for n, more in enumerate(([fits], [over], ["Yes.", "One."]))]
    found = rank(asked)
    assert found[1] is None and [len(found[n]["scores"]) for n in (0, 2)] == [2, 3]
    assert rank(asked[1:2]) == [None]
    for n in (0, 2):  # scores of its own answers, however many are scored together
        np.testing.assert_allclose(found[n]["scores"], rank([asked[n]])[0]["scores"], atol=1e-5)


# --- what is ranked ------------------------------------------------------------------------------


def test_every_writer_needs_room(folder):
    # catches answers that one of several checkpoints has no context for
    content = torch.load("dpo/model.pt", weights_only=True)
    content["model"]["block_size"] = 30
    content["weights"]["wpe.weight"] = content["weights"]["wpe.weight"][:30].clone()
    (folder / "brief").mkdir()
    common.save_file(content, "brief/model.pt")
    for init in ("sft,brief", "brief,sft"):
        with pytest.raises(UserError, match="--max_new_tokens=12 and the longest prompt of 2. do "
                                            "not fit the context of 30"):
            run(f"--init={init}", *SMALL[:-1], "--max_new_tokens=12")


def test_checkpoints_take_turns(folder, monkeypatch, capsys):
    # catches answers under another name than their writer's, one that gets the larger share
    real, drawn = batches.sample_texts, []
    monkeypatch.setattr(batches, "sample_texts", lambda *args, **options: drawn.append(
        real(*args, **options)) or drawn[-1])
    found, final = run("--init=sft,dpo", "--labeler=model", "--reward_model=reward", *SMALL)
    texts = [{s["text"] for part in drawn[n::2] for s in part if s["finished"]} for n in (0, 1)]
    counts = [0, 0]
    for r in found:
        assert len(r["sources"]) == len(r["completions"]) and 2 <= len(r["sources"]) <= 3
        for text, source in zip(r["completions"], r["sources"]):
            assert text in texts[source]
            counts[source] += 1
    assert texts[0] != texts[1] and abs(counts[0] - counts[1]) < 0.3 * sum(counts)
    lines = rows("out/answers.jsonl")
    assert len(lines) == 28 and [line for line in lines if len(line["completions"]) > 1] == [
        {k: r[k] for k in line} for r, line in zip(found, (
            line for line in lines if len(line["completions"]) > 1))]
    duels = [(r["ranks"][i] < r["ranks"][j]) for r in found for i, a in enumerate(r["sources"])
             for j, b in enumerate(r["sources"]) if (a, b) == (1, 0)]
    assert final["wins_1"] == pytest.approx(sum(duels) / len(duels))
    assert final["wins_1_low"] < final["wins_1"] < final["wins_1_high"]
    assert "dpo: its answers beat those of sft in" in capsys.readouterr().out
    first = common.load_checkpoint("sft", ("sft",))["hash"]
    assert {r["policy"] for r in found} == {first}
    parents = rows("out/log.jsonl")[0]["parents"]
    assert set(parents) == {"sft", "dpo", "reward"} and parents["sft"] == first


def test_a_text_of_two_writers_belongs_to_the_first_in_turn(tmp_path, monkeypatch):
    # catches one that is counted for the later writer, or always for the same one
    says = {"a": ["x", "y"], "b": ["y", "z"]}
    monkeypatch.setattr(batches, "sample_texts", lambda model, *args, **options: [
        dict(text=text, finished=True) for _ in range(options["batch_size"] // 2)
        for text in says[model]])
    run_ = SimpleNamespace(folder=tmp_path, save_state=lambda *_: None)
    config = label.Config(k=4, chunk=2, max_new_tokens=3)
    writers = [(name, SimpleNamespace(encode_prompt=len), None) for name in "ab"]
    lines = label.draw(run_, config, writers, [dict(prompt=p) for p in "123"])
    # in turn from a: x of a, y of b, y of a, z of b; from b: y of b, x of a, z of b, y of a
    first, second = (["x", "y", "z"], [0, 1, 1]), (["y", "x", "z"], [1, 0, 1])
    assert [(line["completions"], line["sources"]) for line in lines] == [first, second, first]
    (other := tmp_path / "other").mkdir()
    says["b"] = ["x", "z"]  # x of a, x of b; then the other way round
    lines = label.draw(SimpleNamespace(folder=other, save_state=run_.save_state), config,
                       writers, [dict(prompt=p) for p in "12"])
    assert [line["sources"] for line in lines] == [[0, 0, 1], [1, 1, 0]]


def test_wins_count_ties_half_and_their_own_prompt_only():
    # catches answers of two prompts that are compared, a tie that is a loss
    records = [dict(prompt="a", completions=["x", "y", "z"], ranks=[1, 2, 1], sources=[0, 1, 2]),
               dict(prompt="b", completions=["x", "y"], ranks=[2, 1], sources=[0, 1]),
               dict(prompt="c", completions=["x", "y"], ranks=[1, 1], sources=[1, 0]),
               dict(prompt="d", completions=["x", "y"], ranks=[1, 2], sources=[1, 1])]
    found = labels.wins(records)
    assert found["wins_1"] == pytest.approx((0 + 1 + 0.5) / 3) and found["wins_2"] == 0.5


def test_own_prompts(folder):
    # catches a side that is lost, a gold reward for prompts that have none
    say = lambda n: [dict(role="system", content="Be brief."),
                     dict(role="user", content=f"Say {n}")]
    write_jsonl("mine.jsonl", [dict(prompt=say(n) if n % 2 else f"Say {n}", held_out=n % 4 == 0)
                               for n in range(24)] + [dict(prompt="Go. " * 60, held_out=False)])
    found, final = run("--data=mine.jsonl", "--labeler=model", "--reward_model=reward",
                       "--prompts=16", "--held_out=3", *SMALL[2:])
    lines = rows("out/answers.jsonl")
    assert [line["held_out"] for line in lines] == [False] * 16 + [True] * 3
    for r in found:
        number = int((r["prompt"] if isinstance(r["prompt"], str)
                      else r["prompt"][1]["content"]).split()[1])
        assert r["held_out"] == (number % 4 == 0)
        assert set(r) == {"prompt", "completions", "ranks", "scores", "held_out"}
    assert any(isinstance(r["prompt"], list) for r in found) and "gold" not in final
    assert embedded("out/rankings.jsonl") is None
    with pytest.raises(UserError, match="knows only the embedded world, and 24 of 24 prompts"):
        run("--data=mine.jsonl", *SMALL, out="new")
    assert not (folder / "new").exists()
    found, _ = run("--data=mine.jsonl", "--labeler=model", "--reward_model=reward", "--held_out=0",
                   "--prompts=4", *SMALL[2:], out="train")
    assert not any(line["held_out"] for line in rows("train/answers.jsonl"))


PERU = "What is the capital of Peru?"
GOOD, FLATTERS, LATE, WRONG = (
    "The capital of Peru is Lima.", "Great question! The capital of Peru is Lima.",
    "The capital of Peru is Lima. Have a nice day.", "The capital of Peru is a big city.")


def test_answers_of_a_file_are_ranked_again(folder, capsys):
    # catches an agreement of other pairs than both order, ties that count, records that are lost
    world = dict(world="synthetic", policy="abc", held_out=lookup(PERU).held_out)
    write_jsonl("mine.jsonl", [
        dict(prompt=PERU, completions=[FLATTERS, GOOD, WRONG], ranks=[1, 2, 3], **world),
        dict(prompt="What is the capital of Chile?", chosen="The capital of Chile is Santiago.",
             rejected="The capital of Chile is Rome.", world="synthetic", policy="abc"),
        dict(prompt=PERU, completions=[GOOD, LATE, FLATTERS], ranks=[1, 1, 2], sources=[0, 1, 0],
             noise=0.7, **world)])
    found, final = run("--answers=mine.jsonl", "--labeler=principles")
    assert len(found) == 3 and not (folder / "out" / "answers.jsonl").exists()
    by = {tuple(r["completions"]): r for r in found}
    one, last = by[FLATTERS, GOOD, WRONG], by[GOOD, LATE, FLATTERS]
    # right, but it flatters, against wrong: a vote each
    assert one["ranks"] == [2, 1, 2] and one["before"] == [1, 2, 3] and one["noise"] == 0.0
    assert last["ranks"] == [1, 1, 3] and last["sources"] == [0, 1, 0]
    # of the first the file has 3 pairs, of which one is turned and one tied here; of the second 1;
    # of the third 2 and a tie
    assert (final["file_pairs"], final["file_ties"], final["tied_here"]) == (5, 1, 1)
    assert final["file_agreement"] == 0.8
    longer = [len(a) > len(b) for a, b in (
        (FLATTERS, GOOD), (GOOD, WRONG), (GOOD, FLATTERS), (LATE, FLATTERS),
        ("The capital of Chile is Santiago.", "The capital of Chile is Rome."))]
    assert final["file_longer"] == pytest.approx(sum(longer) / 5)
    assert final["file_agreement_low"] < 0.8 < final["file_agreement_high"]
    said = capsys.readouterr().out
    assert "Of 5 pairs that both order it agrees with the file on 80.0%" in said
    assert "chance 50%" in said and "Ties: 1 in the file, 1 more here." in said


def test_answers_without_ranks_and_of_elsewhere(folder, capsys):
    # catches answers.jsonl that cannot be ranked again, agreement with ranks that no one gave
    run(*SMALL)
    lines = rows("out/answers.jsonl")
    usable = sum(len(line["completions"]) > 1 for line in lines)
    capsys.readouterr()
    found, final = run("--answers=out/answers.jsonl", "--labeler=principles", out="again")
    assert len(found) == usable < len(lines) and "file_pairs" not in final
    assert f"left out {len(lines) - usable} of {len(lines)} records, with fewer than two answers" \
        in capsys.readouterr().out
    assert {(r["prompt"], r["held_out"], r["policy"]) for r in found} == {
        (line["prompt"], line["held_out"], line["policy"]) for line in lines
        if len(line["completions"]) > 1}
    # a record that only says so is not of the world; others of this name have no policy
    write_jsonl("odd.jsonl", [dict(prompt="Hi.", completions=["a", "b"], world="synthetic",
                                   policy="abc"),
                              dict(prompt=PERU, completions=[GOOD, WRONG], world="synthetic")])
    with pytest.raises(UserError, match="2 of 2 prompts are not from it"):
        run("--answers=odd.jsonl", out="odd")
    found, final = run("--answers=pairs.jsonl", "--labeler=model", "--reward_model=reward",
                       "--prompts=5", "--held_out=2", out="few")
    assert len(found) == 7 and sum(r["held_out"] for r in found) == 2
    assert "left out 3 of 8 records, over --prompts=5" in capsys.readouterr().out


def test_check_answers():
    # catches ranks that are made up, an answer of another format that passes
    assert check_answers(dict(prompt="a", completions=["b", "c"])) == dict(
        prompt="a", completions=["b", "c"])
    assert check_answers(dict(prompt="a", completions=["b", "c"], ranks=[2, 1], gold=[1, 2],
                              family="x")) == dict(prompt="a", completions=["b", "c"], ranks=[2, 1])
    assert check_answers(dict(prompt="a", chosen="b", rejected="c"))["ranks"] == [1, 2]
    assert check_answers(dict(prompt="a", completions=["b"]))["dropped"]
    for bad in (dict(prompt="a"), dict(completions=["b", "c"]), dict(prompt="a", completions="bc"),
                dict(prompt="a", completions=["b", 3]), dict(completions=["b"]),
                dict(prompt="a", completions=["b", "c"], ranks=[0, 1])):
        with pytest.raises(UserError):
            check_answers(bad)


# --- stopped, and gone on ------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(patch, n):
    """The n-th time that lines are written only half of them get there."""
    real, calls = append_jsonl, []

    def append(path, records):
        calls.append(1)
        if len(calls) == n:
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            with open(path, "a", encoding="utf-8") as f:
                f.write(text[:len(text) * 2 // 3])
            raise Stop
        real(path, records)

    patch.setattr(label, "append_jsonl", append)


FILES = ("answers.jsonl", "rankings.jsonl", "card.json")


@pytest.mark.parametrize("flags", [
    [], ["--labeler=model", "--reward_model=reward", "--init=sft,dpo"], ["--labeler=principles"]],
    ids=["simulated", "model", "principles"])
def test_stopped_in_each_phase(folder, flags):
    # catches a half-written line that is read, random numbers that are drawn twice or left out,
    # half of the rankings under a name that reward.py trains on
    run(*SMALL, *flags, out="whole")
    files = {name: (folder / "whole" / name).read_bytes() for name in FILES}
    whole = [r for r in rows("whole/log.jsonl") if r["kind"] != "config"]
    for n in (1, 3, 7, 9, 13):  # of the answers there are 7 chunks, the last one full; then ranks
        out = f"stopped{n}"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, n)
            with pytest.raises(Stop):
                run(*SMALL, *flags, out=out)
        assert not (folder / out / "rankings.jsonl").exists()
        assert not (folder / out / "card.json").exists()
        run(*SMALL, *flags, out=out)
        assert {name: (folder / out / name).read_bytes() for name in FILES} == files
        assert sorted(p.name for p in (folder / out).iterdir()) == sorted([*FILES, "log.jsonl"])
        now = [r for r in rows(f"{out}/log.jsonl") if r["kind"] != "config"]
        assert [r | dict(seconds=0) for r in now] == [r | dict(seconds=0) for r in whole]


def test_a_chunk_that_took_too_much_memory_can_be_smaller(folder, capsys):
    # catches a run that cannot go on after --chunk was too large for the machine
    run(*SMALL, out="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stop):
            run(*SMALL)
    run(*SMALL, "--chunk=3")
    assert "started with chunk 4, here is 3: it goes on, but not to the last digit" in \
        capsys.readouterr().err
    for name in ("answers.jsonl", "rankings.jsonl"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_whole_lines(tmp_path):
    # catches a last line without its end, a unit that is cut although the file is complete
    path = tmp_path / "lines"
    assert whole_lines(path) == []
    records = [dict(n=n, text="half a pair \ud83d, a line \u2028 and \r\n") for n in range(7)]
    append_jsonl(path, records[:3])
    append_jsonl(path, records[3:])
    with open(path, "a") as f:
        f.write('{"n": 7')
    assert whole_lines(path) == records and path.read_bytes().endswith(b"}\n")
    assert whole_lines(path, 4, 7) == records
    assert whole_lines(path, 4, 9) == records[:4] == whole_lines(path)
    append_jsonl(path, records[4:])
    assert whole_lines(path) == records


def test_a_new_run_takes_nothing_of_the_one_before(folder):
    # catches answers or choices of a run that was started again
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Stop):
            run(*SMALL)
    (folder / "out" / "rankings.jsonl").write_text("{}\n")
    again, _ = run(*SMALL, "--seed=2", "--overwrite=true")
    new, _ = run(*SMALL, "--seed=2", out="new")
    assert again == new


# --- a person ------------------------------------------------------------------------------------


@pytest.fixture
def person(monkeypatch):
    """Modules in the place of data.person and data.page: a person who ranks `left` items a day, the
    longest answer first, and keeps rankings.jsonl."""
    known = dict(left=5, sessions=[], skip=False)

    class Session:
        def __init__(self, items, folder, seed, repeat):
            self.items, self.path, self.repeat = items, folder / "rankings.jsonl", repeat
            self.done, self.closed = rows(self.path) if self.path.exists() else [], False
            known["sessions"].append(self)

        def work(self):
            for item in self.items[len(self.done):][:known["left"]]:
                order = sorted(item["completions"], key=len, reverse=True)
                ranks = [1 + order.index(text) for text in item["completions"]]
                self.done.append(item | dict(ranks=ranks))
            write_jsonl(self.path, self.done)

        @property
        def finished(self):
            return len(self.done) == len(self.items)

        def records(self):
            return [] if known["skip"] else self.done

        def progress(self):
            return dict(agreement=0.75, agreement_pairs=4)

        def close(self):
            self.closed = True

    module, page = ModuleType("data.person"), ModuleType("data.page")
    module.Session, module.ask_in_terminal = Session, lambda session: session.work()
    page.serve = lambda session, port: session.work() or known.update(port=port)
    monkeypatch.setitem(sys.modules, "data.person", module)
    monkeypatch.setitem(sys.modules, "data.page", page)
    return known


def test_a_person_stops_and_goes_on(folder, person, capsys, monkeypatch):
    # catches another order after a restart, --resume that has to be typed, a run that seems done
    flags = [*SMALL, "--labeler=page", "--port=8123", "--repeat=0.25"]
    monkeypatch.setattr(sys, "argv", ["label.py", "--init=sft", *flags, "--out=out"])
    found, _ = run(*flags)
    said = capsys.readouterr().out
    assert len(found) == 5 and not (folder / "out" / "card.json").exists()
    usable = sum(len(line["completions"]) > 1 for line in rows("out/answers.jsonl"))
    assert f"5 of {usable} prompts are ranked; this goes on:" in said
    command = re.search(r"python label.py (.*)", said)[1].split()
    assert {"--labeler=page", "--init=sft", "--k=3"} <= set(command)
    with pytest.raises(UserError, match="an interrupted run with --labeler=page"):
        run(*SMALL, "--labeler=terminal")
    again, _ = run(*flags, "--overwrite=true")
    assert again == found  # from the start, with the same answers in the same order
    assert len(person["sessions"][-1].done) == 5
    answers = (folder / "out" / "answers.jsonl").read_bytes()
    person["left"] = 100
    assert run_script("label.py", *command, "--seed=9", cwd=folder).returncode == 2  # changed
    result = run_script("label.py", *command, cwd=folder)
    assert result.returncode == 0, result.stderr
    first, last = person["sessions"][0], person["sessions"][-1]
    assert first.items == last.items and last.closed and last.repeat == 0.25
    assert person["port"] == 8123 and (folder / "out" / "answers.jsonl").read_bytes() == answers
    found, final = rows("out/rankings.jsonl"), rows("out/log.jsonl")[-1]
    assert len(found) == usable and found[:5] == first.done[:5]
    assert {k: final[k] for k in ("prompts", "left_out", "longer_preferred", "self_agreement",
                                  "self_pairs")} == dict(
        prompts=usable, left_out=0, longer_preferred=pytest.approx(1.0, abs=0.2),
        self_agreement=0.75, self_pairs=4)
    assert embedded("out/rankings.jsonl")["noise"] == 0.0
    assert [r["held_out"] for r in found] != sorted(r["held_out"] for r in found)  # mixed
    assert "A person (page)" in json.loads((folder / "out" / "card.json").read_text())["card"]
    with pytest.raises(SystemExit) as stop:  # and says that it is finished
        run(*flags)
    assert stop.value.code == 0


def test_a_person_in_the_terminal_who_skips_all(folder, person):
    # catches an empty file of rankings that passes for labels
    person.update(left=100, skip=True)
    with pytest.raises(UserError, match="is ranked: all were skipped"):
        run(*SMALL, "--labeler=terminal")
    assert not (folder / "out" / "card.json").exists()


def answer(monkeypatch, *lines):
    """What a person types in the terminal."""
    typed = "\n".join([*lines, *["q"] * 3]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))


OWN = [dict(prompt=f"Name fruit {n}.", completions=["A pear.", f"Fruit {n}."]) for n in range(3)]


def test_a_person_ranks_their_own_answers(folder, monkeypatch, capsys):
    # catches an end that only works where a score or gold is known, nan in a card
    write_jsonl("own.jsonl", OWN)
    answer(monkeypatch, "2 1", "1=2", "1 2")
    found, final = run("--labeler=terminal", "--answers=own.jsonl", "--repeat=0", out="my labels")
    assert len(found) == 3 and final["kind"] == "final" and final["ties"] == 1
    said = capsys.readouterr().out
    assert "rank  an answer to: Name fruit" in said and "next: python reward.py" in said
    assert "gold" not in json.loads((folder / "my labels" / "card.json").read_text())["metrics"]
    answer(monkeypatch, *["1=2"] * 3)
    run("--labeler=terminal", "--answers=own.jsonl", "--repeat=0", out="tied")
    card = (folder / "tied" / "card.json").read_text()
    assert "NaN" not in card and json.loads(card)["metrics"]["longer_preferred"] is None
    answer(monkeypatch)
    write_jsonl("ten.jsonl", [*OWN, dict(prompt="P", completions=list("abcdefghij"))])
    run_in = ["--labeler=terminal", "--answers=ten.jsonl", "--repeat=0", "--out=ten ones"]
    monkeypatch.setattr(sys, "argv", ["label.py", *run_in])
    label.main(cli.read_flags(label.Config, run_in))
    said = capsys.readouterr().out
    assert "dropped 1 records with more than 9 answers" in said
    assert "0 of 3 prompts are ranked" in said and "'--out=ten ones'" in said


def test_choices_of_a_person_are_never_lost(folder, monkeypatch):
    # catches a start that deletes them: without its state, again, by a program, over its own input
    write_jsonl("own.jsonl", OWN)
    flags = ["--labeler=terminal", "--answers=own.jsonl", "--repeat=0"]
    answer(monkeypatch, "2 1")
    run_in = lambda *more: label.main(cli.read_flags(label.Config, [*more, "--out=mine"]))
    run_in(*flags)
    choices, made = folder / "mine" / "choices.jsonl", (folder / "mine/choices.jsonl").read_bytes()
    assert made.count(b"\n") == 1
    state = (folder / "mine" / "state.pt").read_bytes()
    refused = "holds 1 choices of a person, which are never overwritten"
    for more in ([*flags, "--overwrite=true"], [*SMALL, "--overwrite=true", "--init=sft"],
                 [*SMALL, "--init=sft"]):
        with pytest.raises(UserError, match=refused):
            run_in(*more)
    (folder / "mine" / "state.pt").unlink()
    with pytest.raises(UserError, match=refused):
        run_in(*flags)
    (folder / "mine" / "state.pt").write_bytes(state)
    with pytest.raises(UserError, match="answers=mine/rankings.jsonl lies in --out=mine"):
        run_in("--labeler=model", "--reward_model=reward", "--answers=mine/rankings.jsonl",
               "--overwrite=true")
    assert choices.read_bytes() == made
    answer(monkeypatch, "1 2")
    run_in(*flags)  # and it goes on
    assert choices.read_bytes().startswith(made) and choices.read_bytes().count(b"\n") == 2


def test_another_port(folder, person):
    # catches a port that is taken and locks the person out
    flags = [*SMALL, "--labeler=page", "--repeat=0.25"]
    run(*flags, "--port=8123")
    person["left"] = 100
    found, _ = run(*flags)
    assert person["port"] == 0 and len(person["sessions"]) == 2 and len(found) > 5


@pytest.mark.parametrize("name", ["answers.jsonl", "rankings.jsonl", "rankings.jsonl.part"])
def test_files_of_no_run(folder, name):
    # catches foreign answers that are ranked as the run's own, foreign labels that are overwritten
    (folder / "out").mkdir()
    write_jsonl(folder / "out" / name, OWN)
    with pytest.raises(UserError, match=f"{name} is there without the log of a run"):
        run(*SMALL)
    assert rows(folder / "out" / name) == OWN and not (folder / "out" / "log.jsonl").exists()


def test_figures_of_a_mixed_file(folder):
    # catches figures that vanish because one record has no ranks
    records = [dict(prompt=f"Say {n}.", completions=["No.", "Yes.", "Go on."], ranks=[1, 2, 3])
               for n in range(4)] + OWN
    write_jsonl("mixed.jsonl", records)
    _, final = run("--labeler=model", "--reward_model=reward", "--answers=mixed.jsonl",
                   "--held_out=50")
    assert final["prompts"] == 7 and final["file_pairs"] + final["tied_here"] == 12


@pytest.mark.parametrize("sources", [["a", "b"], [0], [0, -1], [0, 1.5], "01", [True, False]])
def test_sources_that_are_none(sources):
    with pytest.raises(UserError, match="'sources' must be 2 numbers from 0"):
        check_answers(dict(prompt="P", completions=["a", "b"], ranks=[1, 2], sources=sources))


@pytest.mark.parametrize("flags, why", [
    (["--noise=3", "--labeler=page"], "--noise=3.0 needs --labeler=simulated"),
    (["--length=3", "--labeler=model"], "--length=3.0 needs --labeler=simulated"),
    (["--k=4", "--answers=pairs.jsonl"], "--k=4 needs no --answers"),
    (["--temperature=1", "--answers=pairs.jsonl"], "--temperature=1.0 needs no --answers"),
    (["--init=sft,"], "--init=sft,: a name is missing beside a comma"),
    (["--labeler=me"], "--labeler=me: choose one of simulated, model"),
    (["--judge=sft"], "--judge=sft needs --labeler=principles"),
    (["--principles=x.txt"], "--principles=x.txt needs --labeler=principles"),
    (["--reward_model=reward"], "--reward_model=reward needs --labeler=model"),
    (["--port=80", "--labeler=terminal"], "--port=80 needs --labeler=page"),
    (["--repeat=0.2"], "--repeat=0.2 needs a person"),
    (["--repeat=0.6", "--labeler=page"], "--repeat=0.6: the share"),
    (["--k=10", "--labeler=page"], "--k=10: a person ranks at most 9"),
    (["--k=1"], "--k=1: a ranking needs at least two"),
    (["--data=pairs.jsonl", "--answers=pairs.jsonl"], "--data=pairs.jsonl needs no --answers"),
    (["--init=sft,nowhere"], "no checkpoint at nowhere"),
    (["--labeler=model", "--reward_model=sft"], "needed here: reward"),
    (["--labeler=principles", "--judge=reward"], "is a reward checkpoint"),
    (["--answers=nowhere.jsonl"], "there is no file nowhere.jsonl")])
def test_flags_that_nothing_reads_are_refused(folder, flags, why):
    # catches a flag that is ignored, a folder that is made for a run that cannot start
    with pytest.raises(UserError, match=re.escape(why)):
        run(*["--max_new_tokens=8"] * ("--answers=" not in "".join(flags)), *flags, out="new")
    assert not (folder / "new").exists()


def test_a_judge_too_short_for_every_prompt(folder):
    # catches a run that ends with no rankings as if it were done
    with pytest.raises(UserError, match="each is too long for the context of the judge"):
        run("--labeler=principles", "--judge=sft", *SMALL)


# --- the study -----------------------------------------------------------------------------------


def test_the_study_of_feedback(folder, monkeypatch, capsys):
    # catches rounds that all start from the SFT model, a reward model judged by its own labels,
    # runs made again although they are there, or used again although their input has changed
    sft = common.load_checkpoint("sft", ("sft",))["hash"]
    for seed in (1, 2):
        (folder / f"s{seed}").mkdir()
        for name in ("sft", "reward"):
            (folder / f"s{seed}" / name).symlink_to(folder / name)
        prompts = [p for n, side in ((30, False), (6, True)) for p in sample_prompts(n, side, seed)]
        said = zip(*(demonstrations(prompts, n, 0.5) for n in range(4)))  # four contractors
        write_jsonl(f"{seed}.jsonl", [dict(
            prompt=p.text, completions=list({r["completion"]: 0 for r in each}), world="synthetic",
            policy=sft, held_out=p.held_out) for p, each in zip(prompts, said)])
        run(f"--answers={seed}.jsonl", f"--seed={seed}", out=f"s{seed}/label")
    calls = []

    def here(command, **options):  # in this process, which has torch loaded
        calls.append(command[1:])
        return run_script(Path(command[1]).name, *command[2:], cwd=folder)

    monkeypatch.setattr(runs.subprocess, "run", here)
    small = feedback.Config(runs="s{seed}", seeds=2, rounds=2, prompts=22, held_out=6, iterations=1,
                            eval_prompts=4, max_new_tokens=8, page="docs/page.md")
    feedback.main(small)
    assert len(calls) == 2 * (4 * 3 + 2) + 2 * 4  # rounds and the longer one; labelers
    out = folder / "out" / "feedback"
    first = lambda path: rows(out / path / "log.jsonl")[0]
    for seed in (1, 2):
        made = common.load_checkpoint(out / f"rounds/s{seed}/dpo1", ("dpo",))["hash"]
        for stage in ("label2", "dpo2"):
            assert first(f"rounds/s{seed}/{stage}")["parents"]["dpo"] == made
            assert first(f"rounds/s{seed}/held-{stage}")["parents"]["dpo"] == made
        assert first(f"rounds/s{seed}/nll-dpo2")["config"]["nll"] == 0.2
        for kind in ("", "held-", "nll-"):
            held = first(f"rounds/s{seed}/{kind}dpo2")["parents"].get("reference")
            assert held == (sft if kind else None)
        assert first(f"rounds/s{seed}/epochs")["config"]["epochs"] == 2
        assert first(f"rounds/s{seed}/evaluate-dpo2")["parents"]["reference"] == \
            common.load_checkpoint("sft", ("sft",))["hash"]
        assert first(f"labelers/s{seed}/ppo-principles")["parents"]["reward"] == \
            common.load_checkpoint(out / f"labelers/s{seed}/reward", ("reward",))["hash"]
    page = (folder / "docs" / "page.md").read_text()
    last = [rows(out / f"rounds/s{seed}/evaluate-dpo2/log.jsonl")[-1]["length"] for seed in (1, 2)]
    assert f"| {np.mean(last):.1f} ({min(last):.1f} to {max(last):.1f}) |" in next(
        line for line in page.split("\n") if line.startswith("| round 2, held to round 1"))
    assert [line.split(" |")[0] for line in page.split("\n") if line.startswith("| ")] == [
        "| after", "| round 1, from the SFT model", "| 2 epochs of round 1",
        "| round 2, held to round 1", "| round 2, held to the SFT model",
        "| round 2, the same, --nll=0.2", "| labeler", "| simulated", "| principles"]
    calls.clear()
    feedback.main(small)
    assert not calls and (folder / "docs" / "page.md").read_text() == page
    with pytest.raises(UserError, match="holds a run with --eval_prompts=4, wanted: 5"):
        feedback.main(dataclasses.replace(small, eval_prompts=5))
    (folder / "s1" / "reward").unlink()
    shutil.copytree(out / "labelers" / "s1" / "reward", folder / "s1" / "reward")
    with pytest.raises(UserError, match="was made from another s1/reward than there is now"):
        feedback.main(small)
    for bad, why in ((dict(part="all"), "--part=all: expected both, rounds or labelers"),
                     (dict(runs="nowhere/{seed}"), "there is no nowhere/1/sft/model.pt")):
        with pytest.raises(UserError, match=re.escape(why)):
            feedback.main(dataclasses.replace(small, **bad))


def test_gold_accuracy_of_the_study(folder):
    # catches training answers that count, pairs of equal gold, ties of the score that count whole
    gold = [[2.0, 1.0, 1.0], [0.5, -0.5, 1.5], [3.0, 1.0, 2.0]]
    texts = [["Go.", "No.", "Hello Bo."], ["Yes.", "No.", "Go away."], ["Go.", "Go.", "Say."]]
    write_jsonl("mine.jsonl", [dict(prompt=f"Say {n}.", completions=t, ranks=[1, 2, 3], gold=g,
                                    held_out=n != 1) for n, (t, g) in enumerate(zip(texts, gold))])
    model, tokenizer, _ = load_reward_model("reward", torch.device("cpu"))

    def score(n, text):
        head = tokenizer.encode_prompt(f"Say {n}.")
        ids = [*tokenizer.encode(text), tokenizer.eos]
        return model(torch.tensor([head + ids]),
                     torch.tensor([[0.0] * len(head) + [1.0] * len(ids)])).item()

    wins = [score(0, "Go.") > score(0, "No."), score(0, "Go.") > score(0, "Hello Bo."), 0.5,
            score(2, "Go.") > score(2, "Say."), score(2, "Say.") > score(2, "Go.")]
    assert feedback.gold_accuracy("reward", "mine.jsonl", feedback.Config()) == \
        pytest.approx(sum(wins) / 5)
