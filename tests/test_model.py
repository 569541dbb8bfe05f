"""The transformer, its cache, sampling, and the one log-probability function."""

import contextlib
from functools import partial

import model
import pytest
import torch
import torch.nn.functional as F
from model import (GPT, GPTConfig, KVCache, SharedPrompts, generate, states, token_logprobs,
                   token_stats)

EOS = 0


@pytest.mark.parametrize("shape", [(600,), (1, 600), (1, 1, 600), (2, 1, 600), (3, 2, 600),
                                   (8, 600), (9, 600), (0, 600)])
@pytest.mark.parametrize("out", [500, 300])  # above and below 2^18 numbers
def test_linear_is_that_of_torch(shape, out):
    # catches a bias or a row that is lost, rows and columns swapped, on the way for a few rows
    x, weight, bias = (torch.randn(*size).double().requires_grad_()
                       for size in (shape, (out, 600), (out,)))
    for b in (bias, None):
        inputs = [x, weight, bias][:3 if b is not None else 2]
        found, expected = model.linear(x, weight, b), F.linear(x, weight, b)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
        toward = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs, toward),
                                   torch.autograd.grad(expected, inputs, toward))


def right_pad(rows, pad=13):
    T = max(map(len, rows))
    return torch.tensor([r + [pad] * (T - len(r)) for r in rows])


def response_mask(starts, rows):
    T = max(map(len, rows))
    return torch.tensor([[float(s <= t < len(r)) for t in range(T)] for s, r in zip(starts, rows)])


@torch.no_grad()
def test_cache_equals_full_forward(tiny):
    # catches a cache slot, position or mask that is off by one
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    tails = [[3, 4, 5], [1, 2, 3], [7, 8, 9]]
    full = [tiny(torch.tensor([r + t]))[0] for r, t in zip(rows, tails)]
    cache = KVCache(tiny.config, 3, 10, "cpu", torch.float64)
    hidden = tiny(right_pad(rows), cache, torch.arange(5).expand(3, -1))
    for b, r in enumerate(rows):
        torch.testing.assert_close(hidden[b, :len(r)], full[b][:len(r)])
    for step in range(3):
        token = torch.tensor([t[step] for t in tails])[:, None]
        position = torch.tensor([len(r) + step for r in rows])[:, None]
        hidden = tiny(token, cache, position)
        for b, r in enumerate(rows):
            torch.testing.assert_close(hidden[b, 0], full[b][len(r) + step])


def uniforms(*size):
    return torch.rand(size, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_greedy_with_mixed_lengths_equals_one_row_at_a_time(tiny):
    # catches left-padding and batching errors in generate
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
    tokens, mask, done = generate(tiny, prompts, 8, EOS, temperature=0)
    for b, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(8):
            ids.append(tiny.logits(tiny(torch.tensor([ids])))[0, -1].argmax().item())
            if ids[-1] == EOS:
                break
        assert tokens[b][:len(ids)].tolist() == ids
        assert mask[b].nonzero().flatten().tolist() == list(range(len(prompt), len(ids)))
        assert done[b].item() == (ids[-1] == EOS)


def test_generate_stops_at_eos_and_pads_behind_it(tiny):
    # catches tokens after EOS, a mask without EOS, and PAD inside a response
    prompts = [[1 + i % 12] * (1 + i % 4) for i in range(200)]
    tokens, mask, done = generate(tiny, prompts, 12, EOS, uniforms=uniforms(200, 12))
    assert done.any() and not done.all()
    for row, m, finished, prompt in zip(tokens, mask.bool(), done, prompts):
        response = row[m].tolist()
        assert row[:len(prompt)].tolist() == prompt
        assert (EOS in response) == finished and EOS not in response[:-1]
        assert len(response) == 12 or finished
        end = len(prompt) + len(response)
        assert (row[end:] == tiny.config.n_tokens).all()
        assert max(response) < tiny.config.n_tokens


def test_samples_follow_the_tempered_softmax(tiny):
    # catches a missing temperature and a wrong sampler: chi-square on 20,000 first tokens
    T, n = 0.7, 20000
    p = F.softmax(tiny.logits(tiny(torch.tensor([[1, 2]])))[0, -1] / T, -1).double()
    tokens, _, _ = generate(tiny, [[1, 2]] * n, 1, EOS, T, uniforms(n, 1))
    counts = torch.bincount(tokens[:, 2], minlength=13).double()
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 45  # 12 degrees of freedom: exceeded once in 100,000


def test_a_row_draws_with_its_own_numbers(tiny):
    # catches a sampler that draws from the global stream, numbers that depend on who is still there
    prompts, numbers = [[1 + i % 12] * (1 + i % 4) for i in range(40)], uniforms(40, 12)
    response = lambda row, mask: row[mask.bool()].tolist()
    draw = lambda which: [response(*row) for row in zip(*generate(
        tiny, [prompts[i] for i in which], 12, 4, 1.0, numbers[which])[:2])]
    together = draw([*range(40)])
    assert sorted(map(len, together))[20] < 10  # rows leave the batch, at different times
    assert draw([*range(39, -1, -1)]) == together[::-1]
    assert [draw([i])[0] for i in range(40)] == together
    for row in range(40):  # another number changes this row, from that token on
        numbers[row, 2] = (numbers[row, 2] + 0.5) % 1
    changed = draw([*range(40)])
    assert changed != together and [r[:2] for r in changed] == [r[:2] for r in together]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_samples_of_a_prompt_are_those_of_the_repeated_prompt(tiny, temperature):
    # catches a cache, a last state or a length that is handed to the rows of another prompt
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11, 12], [2, 9]]
    seeded = lambda prompts, samples, eos: generate(
        tiny, prompts, 12, eos, temperature, uniforms(20, 12), samples=samples)
    eos = seeded(prompts, 1, -1)[0][1, 5].item()  # a token that is said: rows end at it
    found, expected = (seeded(prompts, 5, eos),
                       seeded([p for p in prompts for _ in range(5)], 1, eos))
    assert found[2].any() and len(found[1].sum(1).unique()) > 1
    for x, y in zip(found, expected):
        assert torch.equal(x, y)


def test_generate_refuses_what_does_not_fit(tiny):
    # catches silent truncation
    with pytest.raises(ValueError, match="temperature 1.0 needs uniforms"):
        generate(tiny, [[1, 2]], 3, EOS)
    with pytest.raises(ValueError, match="do not fit the context of 24"):
        generate(tiny, [[1] * 20], 5, EOS)
    with pytest.raises(ValueError, match="empty"):
        generate(tiny, [[1], []], 5, EOS)
    with pytest.raises(ValueError, match="25 tokens do not fit"):
        tiny(torch.zeros(1, 25, dtype=torch.long))


def test_token_logprobs_by_hand(tiny):
    # catches a shift by one, a missing temperature, and head work in the wrong place
    tokens, mask = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0., 0, 1, 1, 0]])
    logp = token_logprobs(tiny, tokens, mask, temperature=0.5)
    logits = tiny(tokens)[0] @ tiny.wte.weight[:13].T / 0.5
    for t in (2, 3):
        expected = logits[t - 1, tokens[0, t]] - logits[t - 1].logsumexp(0)
        assert abs(logp[0, t].item() - expected.item()) < 1e-5  # the head returns fp32
    assert logp[0, [0, 1, 4]].tolist() == [0, 0, 0]


def test_padded_vocabulary_rows_get_no_probability(tiny):
    # catches probability leaking to the padded rows, PAD among them
    assert tiny.logits(tiny(torch.tensor([[1, 2]]))).size(-1) == 13
    with torch.no_grad():
        tiny.wte.weight[13:] = 100.0
    logits = tiny.logits(tiny(torch.tensor([[1, 2]])))
    assert torch.isfinite(logits).all() and logits.abs().max() < 100


def test_log_probabilities_of_a_bf16_model_are_fp32(tiny):
    # catches a log-softmax in low precision: three digits of a log-probability, noise in every KL
    model, tokens = tiny.bfloat16(), torch.tensor([[1, 2, 3, 4, 0]])
    mask = torch.tensor([[0., 0, 1, 1, 1]])
    logp = token_logprobs(model, tokens, mask)
    expected = F.log_softmax(model.logits(model(tokens)).double(), -1)[0, [1, 2, 3], [3, 4, 0]]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp[0, 2:].double(), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_log_probabilities_under_autocast_are_fp32():
    # catches logits that are rounded to bf16 before the log-softmax
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_tokens=500, block_size=32, n_layer=2, n_head=2,
                          n_embd=64)).eval()
    tokens, mask = torch.randint(500, (4, 32)), torch.ones(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, hidden = token_logprobs(model, tokens, mask), model(tokens[:, :-1])
    exact = (hidden.double() @ model.wte.weight[:500].double().T).log_softmax(-1)
    exact = exact.gather(2, tokens[:, 1:, None])[..., 0]
    assert logp.dtype == torch.float32
    assert (logp[:, 1:] - exact).abs().max() < 1e-5


def test_exact_kl_at_a_temperature(tiny):
    # catches a temperature that only one of the two distributions gets
    torch.manual_seed(1)
    reference = GPT(tiny.config).double()
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0., 0, 1]])
    _, entropy, kl, ref_logp = token_stats(tiny, tokens, mask, 0.5, True, reference)
    p = F.softmax(tiny.logits(tiny(tokens))[0, 1].double() / 0.5, -1)
    q = F.softmax(reference.logits(reference(tokens))[0, 1].double() / 0.5, -1)
    assert abs(entropy[0, 2].item() + (p * p.log()).sum().item()) < 1e-5
    assert abs(kl[0, 2].item() - (p * (p / q).log()).sum().item()) < 1e-5
    torch.testing.assert_close(ref_logp, token_logprobs(reference, tokens, mask, 0.5))
    assert ref_logp[0, 2].item() == pytest.approx(q[3].log().item(), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_values_nor_gradients(tiny, chunk):
    # catches a wrong scatter or a wrong recomputation in the chunked head
    torch.manual_seed(1)
    reference = GPT(tiny.config).double()
    rows = [[1, 2, 3, 4, 0], [5, 6, 7], [8, 9, 10, 11, 12, 1, 0]]
    tokens, mask = right_pad(rows), response_mask([2, 1, 3], rows)

    def run(chunk):
        tiny.zero_grad()
        out = token_stats(tiny, tokens, mask, 0.8, True, reference, chunk=chunk)
        sum((x * mask).sum() * w for x, w in zip(out[:3], (1, 0.3, 0.7))).backward()
        return [x.detach() for x in out], [p.grad.clone() for p in tiny.parameters()]

    (values, gradients), (expected, expected_gradients) = run(chunk), run(8192)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_whole_vocabulary_is_never_kept_for_the_backward_pass():
    # catches (N, V) log-probabilities that wait for the backward pass: 0.8 GB at 4,096 x 50,000
    model = GPT(GPTConfig(60032, 60000, 512, 1, 1, 8))
    tokens, mask, kept = torch.randint(60000, (1, 401)), torch.ones(1, 401), {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        logp = token_logprobs(model, tokens, mask)
    # of 2 chunks the last one, whose backward pass comes first, and the embedding
    assert [n for n in kept.values() if n > 60032 * 8] == [200 * 60000]
    logp.sum().backward()


def test_no_forward_pass_over_padding_of_all_rows(tiny):
    # catches a forward pass that is as wide as the longest response of another micro-batch
    rows = [[1, 2, 3, 4, 0], [5, 6, 7]]
    tokens, mask = right_pad(rows), response_mask([2, 1], rows)
    widths = []
    tiny.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    expected = token_logprobs(tiny, tokens, mask)
    wide = token_logprobs(tiny, F.pad(tokens, (0, 9)), F.pad(mask, (0, 9)))
    assert widths == [4, 4] and wide.shape == (2, 14)
    torch.testing.assert_close(wide, F.pad(expected, (0, 9)))
    assert token_logprobs(tiny, tokens, mask * 0).tolist() == [[0] * 5] * 2


def test_states_that_are_wanted(tiny):
    # catches a last block that leaves out what the wanted positions look at
    tokens = torch.randint(0, 13, (3, 7))
    at = torch.tensor([20, 3, 4, 3, 9])  # in any order, and twice
    for part in (at, at[:0]):
        found, expected = tiny(tokens, at=part), tiny(tokens).flatten(0, 1)[part]
        torch.testing.assert_close(found, expected)
        toward = torch.randn_like(expected)
        for x, y in zip(*(torch.autograd.grad(out, tiny.parameters(), toward, allow_unused=True,
                                              materialize_grads=True)
                          for out in (found, expected))):
            torch.testing.assert_close(x, y)


DIALECTS = [dict(), dict(rope_theta=1e4, norm="rms", mlp="swiglu", n_kv_head=2, bias="qkv",
                         qk_norm=True, tied=False)]


@pytest.mark.parametrize("dialect", DIALECTS, ids=["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(4))
def test_a_shared_prompt_is_read_once_and_changes_nothing(dialect, seed, monkeypatch):
    # catches a row behind another's prompt, a mask or position that is off by one, states in
    # another order, and a prompt that is read for each of its rows
    torch.manual_seed(seed)
    network = GPT(GPTConfig(vocab_size=64, n_tokens=50, block_size=40, n_layer=3, n_head=4,
                            n_embd=32, **dialect)).double()
    draw = lambda n: torch.randint(0, 50, (n,)).tolist()
    # 1, 2, 3, ... rows behind prompts of which one begins like another; answers of one token; the
    # longest prompt has short answers
    asked = [draw(9), draw(1), draw(17)]
    asked.append(asked[0] + draw(8))
    answers = [1], [1, 12], [1, 12, 2], [1, 2, 2, 1]
    if seed == 3:
        answers = [[1] * (n + 1) for n in range(4)]
    rows = [(len(prompt), prompt + draw(n)) for prompt, each in zip(asked, answers) for n in each]
    rows = [rows[i] for i in torch.randperm(len(rows))]
    tokens = right_pad([ids for _, ids in rows], 50)
    mask = response_mask([start for start, _ in rows], [ids for _, ids in rows])
    before = mask[:, 1:].bool()
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    behind_it = [tokens[:, :-1], mask, before]
    read = []
    monkeypatch.setattr(SharedPrompts, "attend", lambda self, layer, q, *others, **options: (
        read.append(len(q)), attend(self, layer, q, *others, **options))[1])
    for inputs, tail in ((behind_it, 1), ([tokens, mask, last.bool()], 0)):
        read.clear()
        found, expected = states(network, *inputs), network(inputs[0])[inputs[2]]
        assert read == [9 + 1 + 17 + 17 + sum(len(ids) - start - tail for start, ids in rows)] * 3
        torch.testing.assert_close(found, expected)
        toward = torch.randn_like(expected)
        both = [torch.autograd.grad(out, network.parameters(), toward, allow_unused=True)
                for out in (found, expected)]
        torch.testing.assert_close(*both)


attend = SharedPrompts.attend


def test_prompts_are_shared_only_where_it_saves_something(tiny, monkeypatch):
    shared = []
    monkeypatch.setattr(SharedPrompts, "attend", lambda self, layer, q, *others, **options: (
        shared.append(q), attend(self, layer, q, *others, **options))[1])
    for rows, starts in (([[1, 2, 3, 4], [5, 6, 7]], [2, 1]),  # of two prompts
                         ([[1, *[2] * 21], [1, *[2] * 20]], [1, 1]),  # a twentieth
                         ([[1, 2, 3, 4, 5]] * 2 + [[6, 7]], [4, 4, 0])):  # one without a prompt
        token_logprobs(tiny, right_pad(rows), response_mask(starts, rows))
        assert not shared


def test_rows_behind_a_shared_prompt_must_fit_the_context(tiny):
    rows = [[1] * 20 + [2, 3, 4, 5, 6, 7]] * 2
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        token_logprobs(tiny, right_pad(rows), response_mask([20, 20], rows))


def test_sampling_rounds_weights_once(tiny):
    # catches copies in bf16 that are made again at every step
    tiny.float()
    shapes = [list(p.shape) for p in tiny.h.parameters() if p.dim() == 2]

    def rounded(steps):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(
                record_shapes=True) as profile:
            generate(tiny, [[1, 2]], steps, EOS + 20, uniforms=uniforms(1, steps))
        return sum(e.name == "aten::_to_copy" and e.input_shapes[0] in shapes
                   for e in profile.events())

    assert rounded(3) == rounded(9) == len(shapes)


@pytest.mark.parametrize("dialect", DIALECTS, ids=["gpt2", "llama"])
def test_compiled_blocks_change_nothing(dialect, monkeypatch):
    # catches blocks that are compiled for one length, one layer or one batch; and that are not
    torch.manual_seed(0)
    network = GPT(GPTConfig(vocab_size=64, n_tokens=50, block_size=40, n_layer=3, n_head=4,
                            n_embd=32, **dialect)).double()
    made, eager = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):  # all but the machine's code, which takes a minute to make
        made.append(graph)
        return eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    ran, compiled = [], model.compiled_block.__wrapped__()
    monkeypatch.setattr(model, "compiled_block", lambda: lambda *inputs: (
        ran.append(inputs[1].shape), compiled(*inputs))[1])

    def run():
        logp = token_logprobs(network, tokens, mask)
        return logp, torch.autograd.grad(logp.sum(), network.parameters())

    for T, shared, checkpointing in ((40, False, False), (40, True, False), (33, True, False),
                                     (29, False, True), (40, False, False)):
        tokens, mask = torch.randint(0, 50, (6, T)), torch.ones(6, T)
        mask[:, :T // 2] = 0
        if shared:
            tokens[1::2, :T // 2] = tokens[::2, :T // 2]
        network.checkpointing, network.compiled = checkpointing, False
        expected = run()
        assert not ran
        network.compiled = True
        torch.testing.assert_close(run(), expected, rtol=1e-6, atol=1e-9)
        assert len(ran) == (6 if checkpointing else 3)
        ran.clear()
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(network, tokens, mask), expected[0])
        assert len(ran) == 3
        ran.clear()
        generate(network, [[1, 2, 3]], 2, EOS, temperature=0)
        assert not ran
    # for all layers and lengths: with and without gradients, `at`, shared prompts; and the first
    # one once more, because torch meets the dropout's float and starts again
    assert len(made) == 9


def test_a_gradient_may_be_computed_with_what_is_sampled(tiny):
    # catches tensors of inference mode
    tokens, mask, _ = generate(tiny, [[1, 2]], 4, EOS, uniforms=uniforms(1, 4))
    (token_logprobs(tiny, tokens, mask) * mask).sum().backward()


def test_entropy_and_exact_kl_by_hand(tiny):
    # catches KL(ref || pi) in place of KL(pi || ref)
    torch.manual_seed(1)
    reference = GPT(tiny.config).double()
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0., 0, 1]])
    _, entropy, kl, _ = token_stats(tiny, tokens, mask, 1.0, True, reference)
    p = F.softmax(tiny.logits(tiny(tokens))[0, 1].double(), -1)
    q = F.softmax(reference.logits(reference(tokens))[0, 1].double(), -1)
    assert abs(entropy[0, 2].item() + (p * p.log()).sum().item()) < 1e-5
    assert abs(kl[0, 2].item() - (p * (p / q).log()).sum().item()) < 1e-5


def test_padding_and_batch_order_change_nothing(tiny):
    # catches attention to padding and masks by id
    rows = [[1, 2, 3, 4, 0], [5, 6, 7], [8, 9, 10, 11, 12, 1, 0]]
    tokens, mask = right_pad(rows), response_mask([2, 1, 3], rows)
    logp = token_logprobs(tiny, tokens, mask)
    wide = token_logprobs(tiny, F.pad(tokens, (0, 6), value=13), F.pad(mask, (0, 6)))
    torch.testing.assert_close(wide[:, :7], logp)
    order = [2, 0, 1]
    torch.testing.assert_close(token_logprobs(tiny, tokens[order], mask[order]), logp[order])


def test_first_weights():
    # catches a std that is not the one written down, a matrix left as torch draws it
    config = GPTConfig(vocab_size=640, n_tokens=600, block_size=96, n_layer=3, n_head=2, n_embd=64)
    torch.manual_seed(3)
    model = GPT(config)
    std = 0.02 * 4  # 0.02 at width 1024, and width 64 is a sixteenth of it
    drawn = 0
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == float(name.endswith("weight"))).all(), name  # norms 1, biases 0
            continue
        expected = std / 6**0.5 if name.endswith("c_proj.weight") else std  # two additions a layer
        n, drawn = p.numel(), drawn + 1
        assert abs(p.mean().item()) < 4 * expected / n**0.5, name
        assert abs(p.std().item() / expected - 1) < 4 / (2 * n)**0.5, name
        assert abs((p**4).mean().item() / expected**4 - 3) < 4 * 96**0.5 / n**0.5, name  # a normal
    assert drawn == 2 + 4 * 3


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_where_gpt2_has_it(monkeypatch, training):
    # catches a place without dropout, and dropout outside of training
    config = GPTConfig(vocab_size=16, n_tokens=13, block_size=8, n_layer=3, n_head=2, n_embd=16,
                       dropout=0.3)
    model, places = GPT(config).train(training), []
    real, attention = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: places.append(
        ("hidden", p, training)) or real(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, dropout_p, **options:
                        places.append(("attention", dropout_p, training)) or attention(
                            *args, dropout_p=dropout_p, **options))
    model(torch.randint(13, (2, 5)))
    hidden = ("hidden", 0.3, training)
    assert places == [hidden] + [("attention", 0.3 * training, training), hidden, hidden] * 3


def test_bad_sizes_are_refused():
    # catches a model whose heads or vocabulary do not fit
    with pytest.raises(ValueError, match="n_head"):
        GPTConfig(n_embd=10, n_head=3)
    with pytest.raises(ValueError, match="n_tokens"):
        GPTConfig(vocab_size=64, n_tokens=64)


def test_logits_match_transformers():
    # catches any difference from GPT-2: norm placement, GELU, scaling, positions, tying
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(vocab_size=64, n_tokens=61, block_size=32, n_layer=3, n_head=4, n_embd=32)
    torch.manual_seed(0)
    ours = GPT(config).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=4)).eval()
    weights = {}
    for name, value in ours.state_dict().items():
        if name.endswith("weight") and any(k in name for k in ("c_attn", "c_proj", "c_fc")):
            value = value.T  # GPT-2 stores its matrices the other way round
        weights[f"transformer.{name}"] = value * 3 if "wpe" in name else value
    with torch.no_grad():
        ours.wpe.weight *= 3
    theirs.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits[..., :61]
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-5, rtol=1e-5)


def test_no_low_precision_on_a_cpu():
    # catches bf16 where it is a hundred times slower, or fp32 on every GPU
    assert isinstance(model.autocast(torch.device("cpu")), contextlib.nullcontext)
    assert isinstance(model.autocast(torch.device("cuda")), torch.autocast)
