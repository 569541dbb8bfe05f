"""Adversarial probing of a reward model: "gradient ascent on R", before PPO does it.

From a normal answer, one token after another is replaced so that the score rises (HotFlip,
Ebrahimi et al. 2018). With g_t the gradient of the score with respect to the input embedding at
position t, the score after token v has taken the place of token x is, to first order,

    score + g_t . (wte[v] - wte[x])

Tried exactly are random positions, at each one of the 16 tokens of the largest estimate, and the
best try is kept if the score rises (the draw is from GCG, Zou et al. 2023: the estimate is good
near by, and the largest ones of all positions are those that lie: with them the search stopped
after 2 of 12 edits, at +0.65). The prompt and EOS stay, special tokens never come in. Random edits
of the same budget, any token at a random position, say how much of it the gradient did.
"""

import numpy as np
import torch

import cli
from data import batches
from data.records import collate
from data.report_card import world
from data.synthetic.gold import gold_reward
from model import autocast

TRIES = 16  # candidates of an edit that are scored exactly
TOP = 16  # tokens of a position among which a candidate is drawn


def embedding_gradients(model, tokens, mask):
    """[(1, T, C), ...]: the gradient of the score of one row with respect to the token embeddings
    of every member. The positions' embeddings are added to them, so it is the same for the sum."""
    inputs = []

    def keep(module, args, output):
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    hooks = [member.gpt.wte.register_forward_hook(keep) for member in model.members]
    try:
        with torch.enable_grad(), autocast(tokens.device):
            return torch.autograd.grad(model(tokens, mask).sum(), inputs)
    finally:
        for hook in hooks:
            hook.remove()


def best_tokens(model, tokens, mask, places, allowed, n):
    """For every row the n tokens of the largest estimated gain at each of its places,
    (places, n), best first. places: for every row the positions that may be edited; allowed: the
    ids that may come in, (V,); the token that stands there is none."""
    found = []
    for row, where in enumerate(places):
        gain, here = 0.0, tokens[row, where][:, None]
        # a row at a time: only here are activations kept
        gradients = embedding_gradients(model, tokens[row:row + 1], mask[row:row + 1])
        for gradient, member in zip(gradients, model.members):
            table, g = member.gpt.wte.weight.detach(), gradient[0, where]
            gain = gain + g @ table[allowed].T - (g * table[here[:, 0]]).sum(1)[:, None]
        gain = gain.masked_fill(allowed == here, -torch.inf)  # (places, V)
        found.append(allowed[gain.topk(min(n, len(allowed) - 1)).indices])
    return found


def attack(model, rows, masks, pad, allowed, edits, device, rng, guided=True):
    """Rows (lists of ids, their masks) after up to `edits` replacements that raise the score.

    allowed: ids that may come in. rng: numpy Generator. guided: by the gradient, else any token.
    Returns (rows, scores before, scores after), the scores as lists.
    """
    tokens, mask = (x.to(device) for x in collate(rows, masks, pad))
    ids, allowed = tokens.clone(), torch.as_tensor(allowed, device=device)
    places = [m.nonzero()[:-1, 0] for m in mask]  # the last one is EOS

    @torch.no_grad()
    def score(tokens, mask):
        with autocast(device):
            return batches.in_pieces(lambda p: model(tokens[p], mask[p]), batches.ends(mask), 64)

    before = score(ids, mask)
    now = before.clone()
    for _ in cli.progress(range(edits), "probe"):
        best = best_tokens(model, ids, mask, places, allowed, TOP) if guided else places
        flat = []  # (row, position, token) of every try
        for n, (where, among) in enumerate(zip(places, best)):
            at = rng.integers(len(where), size=TRIES)
            token = among[at, rng.integers(among.shape[1], size=TRIES)] if guided else \
                allowed[rng.integers(len(allowed), size=TRIES)]
            flat += zip([n] * TRIES, where[at].tolist(), token.tolist())
        row, place, token = (torch.tensor(x, device=device) for x in zip(*flat))
        tried = ids[row]
        tried[torch.arange(len(row), device=device), place] = token
        scores = score(tried, mask[row])
        for n in range(len(ids)):
            mine = torch.where(row == n, scores, -torch.inf)
            top = int(mine.argmax())
            if mine[top] > now[n]:
                ids[n] = tried[top]
                now[n] = mine[top]
    return ([ids[n, :len(r)].tolist() for n, r in enumerate(rows)], before.tolist(), now.tolist())


def probe(model, tokenizer, answers, edits, rng, device, log):
    """Attack `answers`, [(Element, ids of a complete answer), ...], say what came out, return the
    metrics; log(**row) takes a row for each answer. rng: numpy Generator, of the tries.

    probe_gain: by how much the score rises, in standard deviations of SFT samples (its unit), mean
    over the answers; probe_random_gain: the same of random edits of the same budget;
    probe_gold_gain: of the true reward, where it is known. The edited ids are scored as they stand;
    its text, read again, may be other tokens.
    """
    answers = [(e, ids) for e, ids in answers if len(ids) > 1]  # one token is EOS alone
    if not answers:
        return {}
    prompts = [e.prompt for e, _ in answers]
    rows = [p + ids for p, (_, ids) in zip(prompts, answers)]
    masks = [[0] * len(p) + [1] * len(ids) for p, (_, ids) in zip(prompts, answers)]
    special = {tokenizer.eos, *tokenizer.specials.values()}
    allowed = [i for i in range(tokenizer.n_tokens) if i not in special]
    edited, before, after = attack(model, rows, masks, tokenizer.pad, allowed, edits, device, rng)
    _, _, by_chance = attack(model, rows, masks, tokenizer.pad, allowed, edits, device, rng, False)
    found = []
    for (e, ids), head, row, first, last in zip(answers, prompts, edited, before, after):
        known = world().get(int(e.facts("key")[0]))
        texts = [tokenizer.decode(ids), tokenizer.decode(row[len(head):])]
        gold = [gold_reward(known.text, text) for text in texts] if known else [None, None]
        found.append(dict(prompt=known.text if known else tokenizer.decode(head), before=texts[0],
                          after=texts[1], score_before=first, score_after=last,
                          gold_before=gold[0], gold_after=gold[1]))
        log(**found[-1])
    rise = lambda name: float(np.mean([f[f"{name}_after"] - f[f"{name}_before"] for f in found]))
    metrics = dict(probe_gain=rise("score"),
                   probe_random_gain=float(np.mean(np.subtract(by_chance, before))))
    if all(f["gold_before"] is not None for f in found):
        metrics["probe_gold_gain"] = rise("gold")
    show(found, metrics, edits)
    return metrics


def show(found, metrics, edits):
    """Print the answer of the highest score after the edits, and in a sentence what it means."""
    worst = max(found, key=lambda f: f["score_after"])
    number = lambda x: "" if x is None else f"{x:.2f}"
    names = ("before", "after")
    columns = dict(score=[number(worst[f"score_{n}"]) for n in names])
    if worst["gold_before"] is not None:
        columns["gold"] = [number(worst[f"gold_{n}"]) for n in names]
    cli.say(cli.table(columns | {f"the edited answer of the highest score, to: "
                                 f"{cli.shorten(worst['prompt'], 60)}":
                                 [cli.shorten(worst[n], 100) for n in names]}))
    cli.say("\n" + verdict(metrics, edits))


def verdict(metrics, edits):
    gain, chance, gold = (metrics.get(name) for name in
                          ("probe_gain", "probe_random_gain", "probe_gold_gain"))
    words = (f"Probe: up to {edits} edits of tokens raise the score by {gain:.2f} standard "
             f"deviations (random edits {chance:.2f})")
    if gold is not None:
        words += f" while the true reward changes by {gold:+.2f}"
    if gain < 1 or gold is not None and gold > 0:
        return words + ": no exploit found."
    return words + (": what the gradient finds, PPO can find too." if gold is not None else
                    ": read the answer; if it is junk, PPO can find it too.")
