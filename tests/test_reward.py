"""The reward model: its loss, where it reads, its report card."""

import json
import math

import cli
import numpy as np
import pytest
import reward
import torch
import torch.nn.functional as F
from conftest import elements_from, encode_response, rows_from, run_script
from data import batches
from data.load import Element
from data.records import digest, prompt_digest, question, ranking_pairs
from data.tokenizer import load_tokenizer
from reward import (
    Ensemble,
    RewardModel,
    combine,
    evaluate,
    load_reward_model,
    reward_loss,
)
from tiny_runs import FLAGS, make_inputs


def test_bradley_terry_numbers():
    # catches a reversed pair: 2.1 against 0.4 is an 84.5% win and a loss of 0.168
    loss = reward_loss(torch.tensor([2.1]), torch.tensor([0.4])).item()
    assert math.exp(-loss) == pytest.approx(0.845, abs=1e-3)
    assert loss == pytest.approx(0.168, abs=5e-4)
    assert reward_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_loss_is_a_sum_and_blind_to_a_shift():
    # catches a hidden mean and a loss that sees absolute scores
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.1])
    parts = [reward_loss(c[None], r[None]) for c, r in zip(chosen, rejected)]
    assert reward_loss(chosen, rejected).item() == pytest.approx(sum(parts).item())
    assert reward_loss(chosen + 5, rejected + 5).item() == pytest.approx(sum(parts).item())


def test_pairs_of_a_ranking():
    # catches reversed ranks (1 is best), pairs made from ties, and missing pairs
    assert ranking_pairs([2, 1, 3]) == [(0, 2), (1, 0), (1, 2)]
    assert ranking_pairs([1, 1, 2]) == [(0, 2), (1, 2)]
    assert ranking_pairs([1, 1]) == []
    assert len(ranking_pairs([4, 2, 1, 3])) == 6


def test_score_is_read_at_the_last_response_token(tiny):
    # catches reading the last column, a pad, or the first token that looks like PAD or EOS
    model = RewardModel(tiny.config).double().eval()
    tokens = torch.tensor([[1, 0, 3, 4, 0, 13, 13],  # EOS (0) also stands in the prompt
                           [1, 2, 0, 7, 0, 7, 13],  # and behind the response, with other ids
                           [1, 2, 3, 4, 5, 0, 13]])
    mask = torch.tensor([[0., 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]])
    expected = model.head(model.gpt(tokens))[[0, 1, 2], [4, 2, 5], 0].float()
    torch.testing.assert_close(model.raw(tokens, mask), expected, check_dtype=False)


def test_padding_does_not_change_the_score(tiny):
    # catches a score that depends on the longest answer of the batch
    model = RewardModel(tiny.config).double().eval()
    tokens, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[0., 0, 1, 1]])
    wide = model(F.pad(tokens, (0, 9), value=13), F.pad(mask, (0, 9)))
    torch.testing.assert_close(wide, model(tokens, mask))


def test_shift_and_scale(tiny):
    # catches a forward that forgets one of them or applies them in the wrong order
    model = RewardModel(tiny.config).double().eval()
    tokens, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[0., 0, 1, 1]])
    raw = model.raw(tokens, mask)
    model.shift.fill_(0.3)
    model.scale.fill_(4.0)
    torch.testing.assert_close(model(tokens, mask), (raw - 0.3) / 4, check_dtype=False,
                               rtol=1e-6, atol=1e-7)


def test_head_initialisation():
    # catches a head that starts with large scores: std 1 / sqrt(d + 1), bias 0
    from model import GPTConfig
    torch.manual_seed(0)
    model = RewardModel(GPTConfig(64, 60, 8, 1, 1, 4096))
    assert model.head.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert model.head.bias.item() == 0


def test_report_card_on_a_known_model():
    # catches reversed accuracy, wrong baselines, and a calibration that is not one

    class Oracle:
        shift, scale = torch.tensor(0.0), torch.tensor(1.0)

        """Its score is the id of the response's first token over ten."""
        def raw(self, tokens, mask):
            first = mask.argmax(1)
            return tokens[torch.arange(len(tokens)), first].float() / 10

    records = [dict(prompt="What is 1 plus 1?", pairs=[(0, 1)], gold=[3.0, 0.0]),
               dict(prompt="Work out 1 plus 1.", pairs=[(0, 1)], gold=[0.1, 0.0]),
               dict(prompt="What is 2 plus 1?", pairs=[(1, 0)], gold=[-1.0, 1.0])]
    for record, completions in zip(records, (["xx", "y"], ["x", "yy"], ["xx", "y"])):
        record["completions"] = completions
    rows = [[[1, 30], [1, 10]], [[1, 20], [1, 25]], [[1, 5], [1, 9]]]
    masks = [[[0, 1], [0, 1]]] * 3
    source = rows_from([x for r, m in zip(rows, masks) for x in zip(r, m)], [
        dict(key=prompt_digest(r), asked=digest(question(r["prompt"])), chars=len(text), gold=gold)
        for r in records for text, gold in zip(r["completions"], r["gold"])])
    elements = [Element(source, (2 * n, 2 * n + 1), record["pairs"], [], [])
                for n, record in enumerate(records)]
    card = evaluate(Oracle(), elements, 99, torch.device("cpu"), noise=1.0)
    assert card["accuracy"] == pytest.approx(2 / 3)
    assert card["longer_wins"] == pytest.approx(1 / 3)
    assert card["gold_accuracy"] == 1.0
    assert card["accuracy_on_wide_gold"] == 1.0  # the pair it gets wrong differs by 0.1 only
    margins = np.array([2.0, -0.5, 0.4])
    assert card["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    # two prompts ask the same: (1 + 0 - 4/3)^2 + (1 - 2/3)^2 under the root, over 3
    assert card["accuracy_se"] == pytest.approx((2 / 9)**0.5 / 3)


def test_equal_scores_are_half_right():
    # catches a tie of the model that counts as a win: a constant score would be 100% accurate

    class Constant:
        shift, scale = torch.tensor(0.5), torch.tensor(2.0)

        def raw(self, tokens, mask):
            return torch.zeros(len(tokens))

    elements = elements_from([dict(prompt="a", completions=["xx", "y"], ranks=[1, 2])])
    card = evaluate(Constant(), elements, 99, torch.device("cpu"))
    assert card["accuracy"] == 0.5 and card["loss"] == pytest.approx(math.log(2))
    assert card["score_min"] == card["score_max"] == -0.25


def test_shift_and_scale_are_stored_with_the_weights(tmp_path):
    # catches a score that is centred in the run that measured it and in no later one
    make_inputs(tmp_path)
    model, _, checkpoint = load_reward_model(tmp_path / "reward", torch.device("cpu"))
    assert model.shift.item() == pytest.approx(0.4) and model.scale.item() == pytest.approx(1.7)
    assert "weights" not in checkpoint  # or they would be in memory twice
    assert {"shift", "scale"} <= set(torch.load(tmp_path / "reward" / "model.pt")["weights"])


def test_a_run_ends_centred_and_scaled(tmp_path, monkeypatch):
    # catches a shift or scale that is measured but not applied, or with the wrong sign
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    scored, score = [], batches.over_rows

    def keep(model, rows, *rest, **options):
        found = score(model, rows, *rest, **options)
        if isinstance(model, RewardModel):  # the scores after shift and scale
            scored.append((rows, found))
        return found

    monkeypatch.setattr(batches, "over_rows", keep)
    reward.main(cli.read_flags(reward.Config, [*FLAGS["reward"], "--out=centred"]))
    model, tokenizer, _ = load_reward_model(tmp_path / "centred", torch.device("cpu"))
    (demos, _), (samples, _), (_, again) = scored
    masks = lambda rows: [[0] * (len(r) - 1) + [1] for r in rows]  # the score is read at the end
    read = lambda rows: score(model, rows, masks(rows), tokenizer.pad, torch.device("cpu"))
    assert abs(again.mean()) < 1e-5 and abs(read(demos).mean()) < 1e-5
    assert read(samples).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    final = json.loads((tmp_path / "centred" / "log.jsonl").read_text().splitlines()[-1])
    assert abs(final["shift"]) > 0.01  # something had to be shifted
    assert final["sft_score"] == pytest.approx(read(samples).mean().item(), abs=1e-4)


def test_the_answers_of_a_prompt_share_its_ids():
    # catches a prompt that is cut to make room for its answer, for each answer by another length
    tokenizer, prompt = load_tokenizer("synthetic"), "Which of them is it? " * 20
    [e] = elements_from([dict(prompt=prompt, completions=["No.", "Yes. " * 9], ranks=[1, 2])])
    prompts = [[t for t, m in zip(row, mask) if m == 0] for row, mask in zip(e.rows, e.masks)]
    assert prompts[0] == prompts[1] == tokenizer.encode_prompt(prompt)


def test_rankings_of_one_prompt_share_an_element():
    # catches pairs of one prompt spread over batch elements, and answers read more than once
    pair = lambda p, c, r: dict(prompt=p, completions=[c, r], ranks=[1, 2])
    merged = elements_from([pair("a", "x", "y"), pair("b", "x", "y"), pair("a", "z", "x"),
                            dict(prompt="a", completions=["x", "y"], ranks=[1, 1])])
    tokenizer = load_tokenizer("synthetic")
    assert [(e.rows, e.pairs) for e in merged] == [
        ([tokenizer.encode_prompt(p) + encode_response(tokenizer, c) for c in texts], pairs)
        for p, texts, pairs in (("a", "xyz", ((0, 1), (2, 0))), ("b", "xy", ((0, 1),)))]
    assert np.isnan(merged[0].facts("gold")).all()
    [e] = elements_from([dict(prompt="a", completions=["x", "yy"], ranks=[2, 1], gold=[1, 2])])
    assert e.pairs == ((1, 0),)
    assert e.facts("gold").tolist() == [1, 2] == e.facts("chars").tolist()


# --- ensembles -----------------------------------------------------------------------------------


def test_scores_of_members_are_combined_by_hand():
    # catches a maximum, a std over answers, one divided by N - 1
    scores = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, -1.0]])
    assert combine(scores, "mean").tolist() == pytest.approx([3, 1])
    assert combine(scores, "min").tolist() == [1, -1]
    assert combine(scores, "mean-std").tolist() == pytest.approx([3 - (8 / 3)**0.5, 1 - 2**0.5])
    for how in reward.SCORE_BY:  # of one member each is its score
        assert combine(scores[:1], how).tolist() == pytest.approx([1, 2])


def make_ensemble(config, n=3):
    members = []
    for i in range(n):
        torch.manual_seed(i)
        members.append(RewardModel(config).double().eval())
        members[i].shift.fill_(0.3 * i)
        members[i].scale.fill_(1.0 + i)
    return Ensemble(members)


@pytest.mark.parametrize("how", ["mean", "min", "mean-std"])
def test_every_member_has_its_own_shift_and_scale(tiny, how):
    # catches raw scores that are combined, and a shift or scale of another member
    model = make_ensemble(tiny.config)
    model.score_by = how
    tokens, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 13]]), torch.tensor([[0., 0, 1, 1],
                                                                              [0., 1, 1, 0]])
    each = [[(m.raw(tokens, mask)[row].item() - 0.3 * n) / (1 + n)
             for n, m in enumerate(model.members)] for row in (0, 1)]
    for row, values in enumerate(each):
        expected = dict(mean=np.mean(values), min=min(values))
        expected["mean-std"] = np.mean(values) - np.std(values)
        assert model.each(tokens, mask)[row].tolist() == pytest.approx(values, rel=1e-6)
        assert model(tokens, mask)[row].item() == pytest.approx(expected[how], rel=1e-6)
        assert model.raw(tokens, mask)[row].item() == pytest.approx(2 * expected[how], rel=1e-6)


FEW = ["--data=pairs.jsonl", "--init=sft", "--samples=16", "--max_new_tokens=12", "--epochs=2",
       "--batch_size=3", "--lr=0.01", "--warmup=0", "--probe=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with single runs of the seeds 5 and 6, and an ensemble of both."""
    folder = make_inputs(tmp_path_factory.mktemp("ensemble"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in (("five", ["--seed=5"]), ("six", ["--seed=6"]),
                            ("both", ["--seed=5", "--ensemble=2"])):
            reward.main(cli.read_flags(reward.Config, [*FEW, *flags, f"--out={name}"]))
    return folder


def weights(path):
    return torch.load(path / "model.pt", weights_only=True)["weights"]


def test_a_member_is_a_single_run_of_its_seed(trained):
    # catches members with the same head or order, a second one that starts from the first one's
    # weights, or with its optimiser's state
    both, single = weights(trained / "both"), [weights(trained / n) for n in ("five", "six")]
    names = [name for name in single[0] if name not in ("shift", "scale")]
    assert len(both) == 2 * len(single[0])
    for n, alone in enumerate(single):
        assert all(torch.equal(both[f"members.{n}.{name}"], alone[name]) for name in names)
        # all are measured on the samples of the first seed, so the others' differ from theirs
        same = torch.equal(both[f"members.{n}.scale"], alone["scale"])
        assert same == (n == 0)
        assert both[f"members.{n}.shift"].item() == pytest.approx(alone["shift"].item(), abs=1e-6)
    assert not torch.equal(single[0]["head.weight"], single[1]["head.weight"])


def test_members_are_centred_and_the_log_says_who(trained):
    # catches a scale of the last member for all
    rows = [json.loads(line) for line in (trained / "both" / "log.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["member"]) for r in rows if r["kind"] == "step"]
    assert steps == [(0, 0), (5, 0), (6, 1), (11, 1)]
    final = rows[-1]
    assert abs(final["demo_score"]) < 1e-5 and len(final["members"]) == 2 and final["spread"] > 0


def test_an_ensemble_resumes_inside_its_second_member(trained, monkeypatch):
    # catches a state of one member only, an optimiser that starts anew, a lost order or text
    monkeypatch.chdir(trained)
    flags = [*FEW, "--seed=5", "--ensemble=2", "--save_every=8", "--out=again"]
    save, calls = reward.common.Run.save_state, []

    def stop(run, *args, **state):
        save(run, *args, **state)
        calls.append(args[0])
        if calls[-1] == 8:  # 6 steps each: two of the second member are made
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reward.common.Run, "save_state", stop)
        reward.main(cli.read_flags(reward.Config, flags))
    reward.main(cli.read_flags(reward.Config, flags))
    one, other = weights(trained / "both"), weights(trained / "again")
    assert calls == [0, 8] and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", reward.SCORE_BY)
def test_consumers_score_by(trained, monkeypatch, how):
    # catches a flag that a stage does not pass on: the score of each answer, by hand
    monkeypatch.chdir(trained)
    model, tokenizer, checkpoint = load_reward_model("both", torch.device("cpu"), how)
    assert checkpoint["config"]["ensemble"] == 2 and not any(
        p.requires_grad for p in model.parameters())
    import evaluate
    flags = ["--policy=sft", "--reference=sft", "--reward_model=both", "--data=pairs.jsonl",
             f"--score_by={how}", f"--out=scored-{how}", "--max_new_tokens=12", "--eval_prompts=6"]
    evaluate.main(cli.read_flags(evaluate.Config, flags))
    said = [json.loads(s) for s in open(f"scored-{how}/answers.jsonl")]
    judged = 0
    for row in said:
        ids = tokenizer.encode_prompt(row["prompt"])
        answer = encode_response(tokenizer, row["policy"])
        if row["eos_rate_policy"] and len(answer) == row["length_policy"]:
            args = torch.tensor([ids + answer]), torch.tensor([[0.] * len(ids) + [1.] *
                                                               len(answer)])
            each = [m(*args).item() for m in model.members]
            value = dict(mean=np.mean(each), min=min(each))
            value["mean-std"] = np.mean(each) - np.std(each)
            assert row["score_policy"] == pytest.approx(value[how], abs=1e-4)
            judged += 1
    assert judged > 1


@pytest.mark.parametrize("stage, flags", [("ppo", []), ("grpo", ["--reward=model"])])
def test_policies_are_trained_by_each_way(trained, monkeypatch, stage, flags):
    # catches a way that training does not see: by the minimum no score is above the mean's
    monkeypatch.chdir(trained)
    module, score = __import__(stage), {}
    for how in reward.SCORE_BY:
        flags_of = [*FLAGS[stage], *flags, "--reward_model=both", f"--score_by={how}",
                    f"--out={stage}-{how}"]
        flags_of = {f.split("=")[0]: f for f in flags_of}.values()
        module.main(cli.read_flags(module.Config, flags_of))
        first = next(r for r in map(json.loads, open(f"{stage}-{how}/log.jsonl"))
                     if r["kind"] == "step")
        score[how] = first["score"]  # of the same answers: nothing is trained yet
    # of two members the mean less the standard deviation is the smaller one
    assert score["mean"] > score["min"] == pytest.approx(score["mean-std"], abs=1e-4)


def test_an_unknown_way_is_one_line(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for path in ("both", "five"):
        with pytest.raises(cli.UserError, match="--score_by=max: choose one of mean, min, mean-s"):
            load_reward_model(path, torch.device("cpu"), "max")
    assert isinstance(load_reward_model("five", torch.device("cpu"), "min")[0], RewardModel)


def test_the_critic_starts_from_the_first_member(trained):
    # catches another member, or one without its shift and scale
    from ppo import ValueModel
    model, _, _ = load_reward_model(trained / "both", torch.device("cpu"))
    critic, first = ValueModel(model.members[0]), model.members[0]
    torch.testing.assert_close(critic.head.weight, first.head.weight / first.scale)
    assert model.gpt is first.gpt


def test_an_ensemble_is_no_transformers_folder(trained):
    # catches one that is called damaged
    done = run_script("convert.py", "--source=both", "--to=transformers", "--out=x", cwd=trained)
    assert done.returncode == 2 and "both is an ensemble of reward models" in done.stderr


def test_no_probe_no_rows(trained, monkeypatch):
    # catches a probe that --probe=0 does not leave out, or that changes the weights
    monkeypatch.chdir(trained)
    reward.main(cli.read_flags(reward.Config, [*FEW[:-1], "--seed=5", "--probe=0",
                                               "--out=quiet"]))
    rows = [[json.loads(s) for s in open(f"{name}/log.jsonl")] for name in ("five", "quiet")]
    kinds = [[r["kind"] for r in found].count("probe") for found in rows]
    assert kinds[0] > 0 == kinds[1] and "probe_gain" in rows[0][-1] and \
        "probe_gain" not in rows[1][-1]
    one, other = weights(trained / "five"), weights(trained / "quiet")
    assert all(torch.equal(one[name], other[name]) for name in one)
