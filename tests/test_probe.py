"""The probe: edits that the gradient finds, and what they leave alone."""

import numpy as np
import pytest
import torch
from conftest import elements_from
from data import probe
from data.synthetic.gold import gold_reward
from data.synthetic.world import all_prompts
from data.tokenizer import load_tokenizer
from model import GPTConfig
from reward import Ensemble, RewardModel

CPU = torch.device("cpu")


class Exploit(torch.nn.Module):
    """Its score counts a token, by the first channel of the embedding; EOS is what it likes least:
    to replace it would raise the score most."""

    def __init__(self, gpt, token=7, eos=0):
        super().__init__()
        self.gpt = gpt
        with torch.no_grad():
            self.gpt.wte.weight[:, 0] = torch.linspace(0, 0.1, len(self.gpt.wte.weight))
            self.gpt.wte.weight[token, 0] = 1.0
            self.gpt.wte.weight[eos, 0] = -5.0

    @property
    def members(self):
        return [self]

    def forward(self, tokens, mask):
        return self.gpt.wte(tokens)[..., 0].sum(1)


ROWS = [[1, 2, 3, 4, 5, 6, 0], [3, 0, 1, 0]]  # EOS is 0; it stands in the second prompt as well
MASKS = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.fixture
def best_only(monkeypatch):
    """Each try is the token that the gradient likes best at its place."""
    monkeypatch.setattr(probe, "TOP", 1)


def attack(model, edits, rows=ROWS, masks=MASKS):
    return probe.attack(model, rows, masks, 13, range(1, 13), edits, CPU, np.random.default_rng(0))


def test_the_gradient_finds_a_planted_exploit(tiny, best_only):
    # catches a gradient of something else, an estimate with the wrong sign, edits that are dropped
    model = Exploit(tiny)
    rows, before, after = attack(model, 3)
    assert rows == [[1, 2, 3, 7, 7, 7, 0], [3, 0, 7, 0]]  # prompt and EOS as before, all others 7
    value = lambda row: sum(model.gpt.wte.weight[t, 0].item() for t in row)
    for old, new, low, high in zip(ROWS, rows, before, after):
        pad = [13] * (7 - len(old))
        assert low == pytest.approx(value(old + pad))
        assert high == pytest.approx(value(new + pad))


def test_one_edit_a_round(tiny, best_only):
    # catches a budget that is exceeded
    rows, *_ = attack(Exploit(tiny), 1)
    assert [sum(a != b for a, b in zip(old, new)) for old, new in zip(ROWS, rows)] == [1, 1]
    same, before, after = attack(Exploit(tiny), 0)
    assert same == ROWS and before == after


@pytest.mark.parametrize("top", [1, 16])
def test_an_edit_that_lowers_the_score_is_not_made(tiny, monkeypatch, top):
    # catches the best try taken whatever it does: 7 is the best token already
    monkeypatch.setattr(probe, "TOP", top)
    for edits in (1, 4):
        assert attack(Exploit(tiny), edits, [[1, 7, 7, 0]], [[0, 1, 1, 1]])[0] == [[1, 7, 7, 0]]


@pytest.mark.parametrize("score_by", ["mean", "min", "mean-std"])
def test_estimates_are_the_gradient_at_the_embedding(tiny, score_by):
    # catches a member that is left out, a gradient at another position: against a small step along
    # the difference of two embeddings, for every place and token of the answer
    members = []
    for n in range(3):
        torch.manual_seed(n)
        model = RewardModel(tiny.config).double().eval()
        model.shift.fill_(0.3 * n)
        model.scale.fill_(1.0 + n)
        members.append(model)
    ensemble = Ensemble(members, score_by).requires_grad_(False)
    tokens, mask = torch.tensor([ROWS[0]]), torch.tensor([MASKS[0]]).double()
    gradients = probe.embedding_gradients(ensemble, tokens, mask)
    assert len(gradients) == 3 and not any(m.gpt.wte._forward_hooks for m in members)
    places, allowed = torch.tensor([3, 4, 5]), torch.arange(1, 13)
    [found] = probe.best_tokens(ensemble, tokens, mask, [places], allowed, 99)
    assert found.shape == (3, 11)
    for place, best in zip(places.tolist(), found.tolist()):
        slopes = {}
        for token in allowed.tolist():
            def nudge(module, args, output, place=place, token=token):
                output = output.clone()
                step = module.weight[token] - module.weight[tokens[0, place]]
                output[0, place] += 1e-6 * step
                return output

            hooks = [m.gpt.wte.register_forward_hook(nudge) for m in members]
            up = ensemble(tokens, mask)
            for hook in hooks:
                hook.remove()
            slopes[token] = ((up - ensemble(tokens, mask)) / 1e-6).item()
        del slopes[tokens[0, place].item()]  # the token that stands there is no edit
        assert best == sorted(slopes, key=slopes.get, reverse=True)


def make_model():
    tokenizer = load_tokenizer("synthetic")
    torch.manual_seed(3)
    size = GPTConfig(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens, block_size=64,
                     n_layer=2, n_head=2, n_embd=32)
    return RewardModel(size).eval(), tokenizer


def test_random_edits_do_not_find_it():
    # catches a baseline that looks at the gradient, or tries more: 160 of 1,500 tokens
    model, tokenizer = make_model()
    model = Exploit(model.gpt, 700, tokenizer.eos)
    rows, masks = [[1, 2, 3, 4, 5, 6, tokenizer.eos]], [[0, 1, 1, 1, 1, 1, 1]]
    gains = []
    for guided in (True, False):
        _, [before], [after] = probe.attack(model, rows, masks, tokenizer.pad, range(1500), 10, CPU,
                                            np.random.default_rng(0), guided)
        gains.append(after - before)
    assert gains[0] > 3.5 > 2.5 > gains[1] > 0


def test_guided_edits_beat_random_ones(capsys, monkeypatch):
    # catches candidates that the gradient did not choose; and one that changes prompt or EOS, or
    # lets a marker in
    model, tokenizer = make_model()
    answers = [(e, e.rows[0][len(e.prompt):]) for e in elements_from([
        dict(prompt=f"Tell me: {n} plus {n}?", completions=[f"It is {2 * n}, I think.", "No."],
             ranks=[1, 2]) for n in range(2, 8)])]
    seen, score = [], model.forward

    def keep(tokens, mask):
        seen.append((tokens, mask))
        return score(tokens, mask)

    tried, real = [], probe.attack
    monkeypatch.setattr(probe, "attack", lambda *args: tried.append(args[4]) or real(*args))
    model.forward = keep
    logged = []
    found = probe.probe(model, tokenizer, answers, 6, np.random.default_rng(0), CPU,
                        lambda **row: logged.append(row))
    assert found["probe_gain"] > 1.2 * found["probe_random_gain"] > 0
    assert found["probe_gain"] == pytest.approx(
        np.mean([r["score_after"] - r["score_before"] for r in logged]))
    assert len(logged) == 6 and all(r["gold_before"] is None for r in logged)  # not of the world
    special = set(tokenizer.specials.values())
    assert [set(range(tokenizer.n_tokens)) - set(allowed) for allowed in tried] == [special] * 2
    heads = {tuple(e.prompt) for e, _ in answers}
    for tokens, mask in seen:
        for row, m in zip(tokens.tolist(), mask.tolist()):
            start, end = m.index(1), len(m) - 1 - m[::-1].index(1)
            assert tuple(row[:start]) in heads and row[end] == tokenizer.eos
            assert not special & set(row[start:end])
    worst = max(logged, key=lambda r: r["score_after"])
    out = capsys.readouterr().out
    assert worst["after"][:30] in out and "Probe: up to 6 edits" in out


def test_gold_of_an_embedded_prompt(capsys):
    # catches gold of the answer before the edits, or of another prompt
    model, tokenizer = make_model()
    prompt = next(p.text for p in all_prompts().values() if p.family == "arithmetic")
    [e] = elements_from([dict(prompt=prompt, completions=["It is 4.", "No."], ranks=[1, 2])])
    logged = []
    found = probe.probe(model, tokenizer, [(e, e.rows[0][len(e.prompt):]), (e, [tokenizer.eos])],
                        2, np.random.default_rng(0), CPU, lambda **row: logged.append(row))
    [row] = logged  # an answer of EOS alone has nothing to edit
    assert row["prompt"] == prompt and row["before"] == "It is 4."
    assert row["gold_before"] == gold_reward(prompt, "It is 4.")
    assert row["gold_after"] == gold_reward(prompt, row["after"]) and row["after"] != row["before"]
    assert found["probe_gold_gain"] == pytest.approx(row["gold_after"] - row["gold_before"])
    assert probe.probe(model, tokenizer, [(e, [tokenizer.eos])], 2, None, CPU, None) == {}


@pytest.mark.parametrize("gain, gold, words", [
    (3.0, -1.5, "changes by -1.50: what the gradient finds, PPO can find too"),
    (3.0, 0.0, "what the gradient finds"), (3.0, 0.5, "by +0.50: no exploit found"),
    (0.5, -1.0, "no exploit found"),
    (3.0, None, "read the answer; if it is junk")])
def test_verdict_of_the_probe(gain, gold, words):
    metrics = dict(probe_gain=gain, probe_random_gain=0.25)
    metrics |= {} if gold is None else dict(probe_gold_gain=gold)
    said = probe.verdict(metrics, 9)
    assert words in said and f"{gain:.2f} standard deviations (random edits 0.25)" in said
