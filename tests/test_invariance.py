"""What must not matter: padding, batch order, micro-batches, the cache.

The first half runs the real stage scripts, in float64 and with plain gradient descent in place of
Adam (which would blow rounding up to whole steps where a gradient is zero but for rounding), and
compares the movement of every weight and every logged metric. The second half takes the functions
one by one.
"""

import copy
from types import SimpleNamespace

import cli
import common
import dpo
import grpo
import numpy as np
import ppo
import pytest
import reward
import sft
import torch
import torch.nn.functional as F
from conftest import rows_from
from data import batches, load
from data.load import Element
from data.records import collate
from model import GPT, GPTConfig, KVCache, generate, token_stats
from ppo import ValueModel, gae, masked_mean, policy_loss, token_rewards, value_loss, whiten
from reward import RewardModel, reward_loss
from sft import sft_loss
from tiny_runs import FLAGS, STAGES, make_inputs

MODULES = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo, grpo=grpo)
# a second iteration that starts away from the reference, and every option that adds to the loss
OPTIONS = dict(sft=[], reward=[], dpo=["--nll=0.2"], ppo=[
    "--iterations=2", "--entropy_coef=0.1", "--kl_target=0.5", "--score_scaling=true",
    "--ptx_coef=0.5", "--ptx_batch=4", "--ptx_data=text.txt"], grpo=[
    "--iterations=2", "--method=grpo", "--kl_in=loss", "--kl_estimator=k3", "--beta=0.3",
    "--ptx_coef=0.5", "--ptx_batch=4", "--ptx_data=text.txt"])
EOS, PAD = 0, 13  # of the fixture `tiny`


# --- the real scripts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("tiny"))


def train(folder, stage, out, patch, *flags, data=None):
    """Run the stage in this process; returns ({weight: movement}, [metrics of each step])."""
    patch.chdir(folder)
    patch.setattr(common, "adamw", lambda modules, lr, *_, **__: torch.optim.SGD(
        [p for m in modules for p in m.parameters()], lr=lr))
    logged, log = [], common.Run.log  # every row, also those that the stage logs in between

    def keep(run, kind="step", **row):
        logged.append({k: v for k, v in row.items() if type(v) in (int, float)
                       and not k.endswith("per_s")} if kind in ("step", "validation") else {})
        log(run, kind, **row)

    patch.setattr(common.Run, "log", keep)
    given = {f.split("=")[0]: f for f in (*FLAGS[stage], *OPTIONS[stage], *flags, f"--out={out}")}
    config = cli.read_flags(MODULES[stage].Config, given.values())
    config.data = data or config.data
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        MODULES[stage].main(config)
    finally:
        torch.set_default_dtype(default)
    end = torch.load(folder / out / "model.pt", weights_only=True)["weights"]
    start = torch.load("sft/model.pt", weights_only=True)["weights"]
    if stage == "reward":  # its transformer starts from the SFT weights
        start, end = ({f"gpt.{k}": v for k, v in start.items()},
                      {k: v for k, v in end.items() if k.startswith("gpt")})
    moved = {k: end[k].double() - start[k].double() for k in end}
    return moved, [row for row in logged if row]


@pytest.fixture(scope="module")
def plain(folder):
    """The three stages as they are: {stage: (movement, metrics)}."""
    with pytest.MonkeyPatch.context() as patch:
        return {stage: train(folder, stage, f"plain_{stage}", patch) for stage in STAGES}


def assert_same(found, expected, tolerance=1e-6):
    (moved, metrics), (moved0, metrics0) = found, expected
    size = torch.stack([v.norm() for v in moved0.values()]).norm()
    assert size > 1e-2  # otherwise nothing was compared
    difference = torch.stack([(moved[k] - moved0[k]).norm() for k in moved0]).norm()
    assert difference < tolerance * size, difference / size
    assert len(metrics) == len(metrics0)
    for row, row0 in zip(metrics, metrics0):
        assert row.keys() == row0.keys()
        for key in row0:
            assert row[key] == pytest.approx(row0[key], rel=1e-5, abs=2e-6, nan_ok=True), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing(folder, plain, monkeypatch, stage, micro_batch):
    # catches a mean of means: a loss divided by the count of its own micro-batch
    found = train(folder, stage, f"micro{micro_batch}_{stage}", monkeypatch,
                  f"--micro_batch={micro_batch}")
    assert_same(found, plain[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_padding_changes_nothing(folder, plain, monkeypatch, stage):
    # catches padding in a loss, a metric, a score, an advantage or a denominator: every batch gets
    # six columns more, filled with EOS and other ids that a mask by id would take for tokens
    def widen(tokens, mask):
        junk = torch.tensor([1595, 7, 1595, 42, 1595, 3]).expand(len(tokens), 6)
        return torch.cat([tokens, junk], 1), F.pad(mask, (0, 6))

    for module in (sft, batches, load):
        monkeypatch.setattr(module, "collate", lambda *args: widen(*collate(*args)))
    if stage in ("ppo", "grpo"):
        def wide_generate(*args, **options):
            tokens, mask, done = generate(*args, **options)
            return *widen(tokens, mask), done

        monkeypatch.setattr(MODULES[stage], "generate", wide_generate)
    assert_same(train(folder, stage, f"wide_{stage}", monkeypatch), plain[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_batch_order_changes_nothing(folder, plain, monkeypatch, stage):
    # catches a row that is scored, rewarded or trained with the numbers of its neighbour
    if stage in ("ppo", "grpo"):
        def reversed_generate(*args, **options):
            return tuple(x.flip(0) for x in generate(*args, **options))

        monkeypatch.setattr(MODULES[stage], "generate", reversed_generate)
        data = "pairs.jsonl"
    else:
        data = "demos.jsonl" if stage == "sft" else "pairs.jsonl"
        lines = (folder / data).read_text().splitlines()
        data = f"reversed_{data}"
        (folder / data).write_text("\n".join(lines[::-1]))
        # a sample is drawn with the numbers of its prompt's place in the list
        same = dict(text="", ids=[1595], finished=True)
        monkeypatch.setattr(batches, "sample_texts",
                            lambda model, tok, ids, *_, **__: [same] * len(ids))
    found = train(folder, stage, f"order_{stage}", monkeypatch, data=str(folder / data))
    expected = copy.deepcopy(plain[stage])
    if stage == "sft":
        for row in expected[1] + found[1]:
            row.pop("length", None), row.pop("eos_rate", None)
    assert_same(found, expected)


@pytest.mark.parametrize("stage, flags", [
    ("ppo", []), ("grpo", ["--method=dapo", "--kl_estimator=k2"]), ("grpo", ["--method=rloo"])])
def test_kl_in_the_loss_is_divided_by_the_whole_step(folder, monkeypatch, stage, flags):
    # catches a KL term that is divided by the tokens or responses of its own micro-batch
    whole, parts = (train(folder, stage, f"{stage}{len(flags)}loss{n}", monkeypatch,
                          "--kl_in=loss", "--beta=1.0", *flags, f"--micro_batch={n}")
                    for n in (0, 1))
    assert_same(parts, whole)


# --- one function at a time ----------------------------------------------------------------------

ROWS = [[1, 2, 3, 4, 0], [5, 6, 7], [8, 9, 10, 11, 12, 1, 0], [3, 3, 1, 0]]
MASKS = [[0, 0, 1, 1, 1], [0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1]]  # the last: two turns


def batch(rows=ROWS, masks=MASKS, extra=0):
    """tokens, mask; `extra` columns more, filled with EOS and ordinary ids."""
    tokens, mask = collate(rows, masks, PAD)
    junk = torch.tensor([EOS, 5, PAD, 2, EOS, 7])[:extra].expand(len(tokens), extra)
    return torch.cat([tokens, junk], 1), F.pad(mask, (0, extra)).double()


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("change", ["padding", "order", "split"])
def test_gradient_of_the_token_losses(tiny, change):
    # catches a log-probability, entropy or KL that depends on a row's neighbours or on padding
    torch.manual_seed(1)
    reference = GPT(tiny.config).double()

    def loss(tokens, mask):
        logp, entropy, kl, _ = token_stats(tiny, tokens, mask, 0.7, True, reference)
        return (sft_loss(logp, mask) + 0.3 * entropy.sum() + 0.7 * kl.sum()) / 12

    expected = gradient(tiny, loss(*batch()))
    if change == "padding":
        found = gradient(tiny, loss(*batch(extra=6)))
    elif change == "order":
        found = gradient(tiny, loss(*batch(ROWS[::-1], MASKS[::-1])))
    else:
        found = sum(gradient(tiny, loss(*batch([r], [m]))) for r, m in zip(ROWS, MASKS))
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("change", ["padding", "order", "split"])
def test_gradient_of_the_reward_loss(tiny, change):
    # catches a score read at another place when the batch changes, and a mean hidden in the loss
    torch.manual_seed(1)
    model = RewardModel(tiny.config).double()

    def loss(order, extra=0):
        tokens, mask = batch([ROWS[i] for i in order], [MASKS[i] for i in order], extra)
        scores = model.raw(tokens, mask)
        pairs = [(order.index(w), order.index(l)) for w, l in ((0, 1), (2, 3))
                 if w in order and l in order]
        winners, losers = zip(*pairs)
        return reward_loss(scores[list(winners)], scores[list(losers)]) / 2

    expected = gradient(model, loss([0, 1, 2, 3]))
    found = dict(padding=lambda: gradient(model, loss([0, 1, 2, 3], 6)),
                 order=lambda: gradient(model, loss([3, 1, 0, 2])),
                 split=lambda: gradient(model, loss([0, 1])) + gradient(model, loss([2, 3])))
    assert relative(found[change](), expected) < 1e-6


def test_critic_ignores_padding_and_order(tiny):
    # catches a value that sees the padding or another row
    torch.manual_seed(1)
    critic = ValueModel(RewardModel(tiny.config)).double()
    tokens, mask = batch()
    value = critic(tokens, mask)
    assert (value[mask == 0] == 0).all()
    wide_tokens, wide_mask = batch(extra=6)
    torch.testing.assert_close(critic(wide_tokens, wide_mask)[:, :tokens.size(1)], value)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(critic(tokens[order], mask[order]), value[order])


def ppo_quantities(mask, order=slice(None), junk=0.0):
    """What PPO computes of one batch, from random numbers, those outside the mask moved by junk."""
    torch.manual_seed(0)
    B, T = len(ROWS), 7
    draw = lambda: (torch.randn(B, T).double() + junk * (1 - mask[:, :T]))
    wide = lambda x: F.pad(x, (0, mask.size(1) - T), value=junk)[order]
    logp, old_logp, ref_logp, value, old_value = (wide(draw()) for _ in range(5))
    score, mask = torch.randn(B).double()[order], mask[order]
    reward = token_rewards(score, old_logp, ref_logp, mask, 0.3)
    advantage, returns = gae(reward, old_value, mask, 0.9, 0.8)
    white = whiten(advantage, mask)
    loss, info = policy_loss(logp, old_logp, white, mask, 0.2)
    v_loss = value_loss(value, old_value, returns, mask, 0.2)
    return (reward, advantage, returns, white), dict(
        info, loss=loss, value_loss=v_loss, explained=masked_mean((returns - old_value)**2, mask))


@pytest.mark.parametrize("extra, order, junk", [(6, [0, 1, 2, 3], 0.0), (0, [2, 0, 3, 1], 0.0),
                                                (0, [0, 1, 2, 3], 50.0), (3, [3, 2, 1, 0], -50.0)])
def test_ppo_arithmetic(extra, order, junk):
    # catches padding in GAE's recursion, in the whitening, the losses or a metric
    mask = batch()[1]
    mask[3] = torch.tensor([0., 1, 1, 1, 0, 0, 0])  # one turn
    tensors, numbers = ppo_quantities(mask)
    found_tensors, found_numbers = ppo_quantities(F.pad(mask, (0, extra)), order, junk)
    for x, y in zip(found_tensors, tensors):
        kept = F.pad(mask, (0, extra)).bool()[order]
        torch.testing.assert_close(x[kept], y[order][kept[:, :7]])
        assert (x[~kept] == 0).all()
    torch.testing.assert_close(found_numbers, numbers)


def test_ppo_sums_add_up_over_micro_batches():
    # catches a loss or metric that is a mean of its micro-batch
    torch.manual_seed(0)
    mask = batch()[1]
    args = [torch.randn(4, 7).double() for _ in range(3)]
    whole, info = policy_loss(*args, mask, 0.2)
    parts = [policy_loss(*(x[i:i + 1] for x in args), mask[i:i + 1], 0.2) for i in range(4)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    for key in ("clip_fraction", "approx_kl"):
        torch.testing.assert_close(sum(p[1][key] for p in parts), info[key])
    assert max(p[1]["ratio_max"] for p in parts) == info["ratio_max"]
    parts = [value_loss(*(x[i:i + 1] for x in args), mask[i:i + 1], 0.2) for i in range(4)]
    torch.testing.assert_close(sum(parts), value_loss(*args, mask, 0.2))


def test_scores_and_report_card_do_not_depend_on_the_batch(tiny):
    # catches scores handed back in the order of their length, and a card that depends on order
    torch.manual_seed(1)
    model = RewardModel(tiny.config).double()
    rows, masks = zip(*[(r[:3] + [1 + i % 12] * (i % 5) + [EOS], [0] * 3 + [1] * (i % 5 + 1))
                        for i, r in enumerate(ROWS[:1] * 6 + ROWS[2:3] * 6)])
    device = torch.device("cpu")
    scores = batches.over_rows(model, rows, masks, PAD, device)
    for batch_size in (1, 5):
        found = batches.over_rows(model, rows, masks, PAD, device, batch_size)
        torch.testing.assert_close(found, scores, rtol=1e-6, atol=0)
    records = [dict(prompt=f"What is {i + 1} plus 1?", gold=[i, 1.5, 0.2], pairs=[(0, 1), (2, 1)],
                    completions=["x" * (i + 1), "xx", "y"]) for i in range(4)]
    source = rows_from([*zip(rows, masks)], [
        dict(asked=i, chars=len(text), gold=gold) for i, r in enumerate(records)
        for text, gold in zip(r["completions"], r["gold"])])
    elements = [Element(source, (3 * i, 3 * i + 1, 3 * i + 2), r["pairs"], [], [])
                for i, r in enumerate(records)]

    def card(order):
        metrics = reward.evaluate(model, [elements[i] for i in order], PAD, device, noise=1.0)
        return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}

    assert card([2, 0, 3, 1]) == pytest.approx(card([0, 1, 2, 3]))


# --- generation ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [2, 1, 6, 3], [12]])
def test_cache_in_pieces_of_any_size(tiny, pieces):
    # catches a mask or position that only fits a prefill followed by single tokens
    tokens = torch.randint(0, PAD, (3, 12), generator=torch.Generator().manual_seed(0))
    cache, start, parts = KVCache(tiny.config, 3, 12, "cpu", torch.float64), 0, []
    for n in pieces:
        positions = torch.arange(start, start + n).expand(3, -1)
        parts.append(tiny(tokens[:, start:start + n], cache, positions if start else None))
        start += n
    torch.testing.assert_close(torch.cat(parts, 1), tiny(tokens))


@torch.no_grad()
def test_attention_reads_the_filled_part_of_the_cache():
    # catches a part that is too short, and steps that read all of the cache
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, n_tokens=13, block_size=140, n_layer=2, n_head=2,
                          n_embd=16)).double().eval()
    tokens = torch.randint(0, PAD, (3, 140))
    for filled in (64, 128):
        cache = KVCache(model.config, 3, 140, "cpu", torch.float64)
        cache.kv[:, :, :, :, filled:] = torch.nan
        model(tokens[:, :filled - 2], cache)
        for column in (filled - 2, filled - 1, filled):  # the last of them in the next part
            if column == filled:
                cache.kv[:, :, :, :, filled:] = 0
            found = model(tokens[:, [column]], cache, torch.tensor([[column], [5], [column]]))
            expected = model(tokens[:, :column + 1])[:, -1:]
            torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


@torch.no_grad()
def test_generation_of_many_rows_equals_one_row_at_a_time(tiny):
    # catches rows that are mixed up when finished ones leave the batch, and a cache or position
    # that belongs to another row: 60 prompts of 1 to 9 tokens, ending anywhere
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, PAD, 1 + i % 9).tolist() for i in range(60)]
    tokens, mask, _ = generate(tiny, prompts, 14, -1, temperature=0)
    # for EOS take the token that about half of the greedy rows hold
    share = torch.stack([((tokens == i) * mask).any(1).float().mean() for i in range(PAD)])
    eos = (share - 0.6).abs().argmin().item()
    tokens, mask, done = generate(tiny, prompts, 14, eos, temperature=0)
    assert 0.3 < done.float().mean() < 0.9 and len(mask.sum(1).unique()) > 3
    for row, m, finished, prompt in zip(tokens, mask.bool(), done, prompts):
        alone, alone_mask, alone_done = generate(tiny, [prompt], 14, eos, temperature=0)
        assert row[m].tolist() == alone[0][alone_mask[0].bool()].tolist()
        assert finished == alone_done[0]
        # and without a cache: each token is the argmax of the full forward over what precedes it
        ids = row[:len(prompt) + int(m.sum())]
        best = tiny.logits(tiny(ids[None]))[0].argmax(-1)
        assert best[len(prompt) - 1:-1].tolist() == ids[len(prompt):].tolist()


def test_samples_come_back_in_the_order_of_their_prompts(tiny):
    # catches batching by length that hands a prompt the response of another
    class Tokenizer:
        eos = EOS
        decode = staticmethod(str)

    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, PAD, 1 + i % 7).tolist() for i in range(20)]
    draw = lambda prompts, size: batches.sample_texts(tiny, Tokenizer, prompts, 8, None, 0.0, size)
    together = draw(prompts, 256)
    assert len({r["text"] for r in together}) > 10
    assert draw(prompts, 3) == together
    assert draw(prompts[::-1], 7)[::-1] == together
    assert [draw([p], 1)[0] for p in prompts] == together


def test_decoding_is_not_cut_by_padding(tiny, monkeypatch):
    # catches short prompts that wait for a batch of their own, as many steps again
    calls = []
    monkeypatch.setattr(batches, "ENOUGH", 1)
    monkeypatch.setattr(batches, "generate", lambda *args, **more: calls.append(args[1])
                        or generate(*args, **more))
    tokenizer = SimpleNamespace(eos=PAD - 1, decode=str)
    uniforms = lambda numbers, new, samples: torch.rand(len(numbers) * samples, new).double()
    batches.sample_texts(tiny, tokenizer, [[1] * 8, [2], [3]], 3, uniforms)
    assert [len(prompts) for prompts in calls] == [3]


@pytest.mark.parametrize("size, enough", [(0, 99), (0, 3), (1, 99), (2, 99), (3, 99), (7, 99)])
def test_pieces_change_neither_the_order_nor_the_gradient(monkeypatch, size, enough):
    # catches results in the order of their length, a loss that sees the rows of one piece only
    torch.manual_seed(0)
    rows, weight = torch.randn(7, 4).double(), torch.randn(4).double().requires_grad_()
    lengths, seen = torch.tensor([3, 1, 2, 9, 2, 5, 1]), []

    def fn(p):
        seen.append(len(p))
        return (rows[p] * weight).tanh().sum(1)

    monkeypatch.setattr(batches, "ENOUGH", enough)
    found = batches.in_pieces(fn, lengths, size)
    assert max(seen) == (size or 7) if enough == 99 else seen == [2, 2, 2, 1]
    loss = lambda scores: -F.logsigmoid(scores[[0, 3, 6]] - scores[[1, 2, 4]]).sum()
    expected = (rows * weight).tanh().sum(1)
    torch.testing.assert_close(found, expected)
    passes = len(seen)
    torch.testing.assert_close(torch.autograd.grad(loss(found), weight),
                               torch.autograd.grad(loss(expected), weight), rtol=0, atol=1e-12)
    # computed again where memory is bounded, and there is more than one piece
    assert len(seen) == passes * (1 if size in (0, 7) else 2)
