"""studies/knowledge.py: its pairs are what they are called, and its shares count what they say."""

import pytest
import torch
from data import batches
from data.synthetic.gold import gold_reward
from data.synthetic.world import FAMILIES, all_prompts, lookup
from studies import knowledge
from tiny_runs import make_inputs

HELD_OUT = [p for p in all_prompts().values() if p.held_out]


def test_the_first_answer_is_the_better_one():
    # catches answers in the wrong order, and a "wrong" answer that happens to be right
    found = knowledge.contrasts(all_prompts().values())
    assert len(found) == 16 and sum(map(len, found.values())) > 15_000
    for name, pairs in found.items():
        for prompt, better, worse in pairs:
            assert gold_reward(prompt, better) > gold_reward(prompt, worse), (name, prompt)
    asked = {prompt for pairs in found.values() for prompt, *_ in pairs}
    assert asked == {p.text for p in HELD_OUT}
    assert {lookup(prompt).family for prompt in asked} == set(FAMILIES)


@pytest.mark.parametrize("scores, share", [([1.0, 0.0], "100.0%"), ([0.0, 1.0], "0.0%"),
                                           ([2.0, 2.0], "50.0%")])
def test_shares(tmp_path, monkeypatch, capsys, scores, share):
    # catches better and worse mixed up, and ties that count as right
    make_inputs(tmp_path)
    found = knowledge.contrasts(all_prompts().values())
    few = {name: pairs[::len(pairs) // 20] for name, pairs in found.items()}
    monkeypatch.setattr(knowledge, "contrasts", lambda _: few)
    monkeypatch.setattr(batches, "over_rows",
                        lambda model, rows, *_: torch.tensor(scores).tile(len(rows) // 2))
    knowledge.main(knowledge.Config(reward_model=str(tmp_path / "reward")))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " | " in line][1:]
    assert len(rows) == 16 and all(row[2] == share for row in rows)
    assert all(row[4] == "0.0%" for row in rows)  # no spread, no interval


def test_answers_stand_in_the_order_of_their_pair(tmp_path, monkeypatch, capsys):
    # catches a reshape that pairs answers to different questions: a longer answer scores higher
    make_inputs(tmp_path)
    monkeypatch.setattr(knowledge, "contrasts", lambda *_: {
        "long | short": [("What is 1 plus 1?", "The result of 1 plus 1 is 2.", "2."),
                         ("What is 2 plus 1?", "3.", "The result of 2 plus 1 is 3."),
                         ("What is 3 plus 1?", "The result of 3 plus 1 is 4.", "4.")]})
    monkeypatch.setattr(batches, "over_rows",
                        lambda model, rows, masks, *_: torch.tensor([float(sum(m)) for m in masks]))
    knowledge.main(knowledge.Config(reward_model=str(tmp_path / "reward")))
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["3", "3", "66.7%"]
