"""What only a GPU shows. Everything here skips where there is none."""

import copy
import linecache
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

import common
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, autocast, generate, token_logprobs
from sample import stream
from test_stages import chain, rows as log_rows  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
GPT2 = dict(vocab_size=128, n_tokens=120, block_size=64, n_layer=3, n_head=4, n_embd=64)
LLAMA = GPT2 | dict(n_kv_head=2, rope_theta=1e4, norm="rms", mlp="swiglu", bias="none", tied=False)


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def net(request):
    torch.manual_seed(0)
    return GPT(GPTConfig(**request.param)).eval()


@pytest.fixture
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    yield
    torch.set_float32_matmul_precision(before)


def rows(B=6, T=40, seed=1):
    """Tokens (B, T) and the mask of responses that begin and end at different places."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 120, (B, T), generator=rng)
    start = torch.randint(1, T // 2, (B, 1), generator=rng)
    end = torch.randint(T // 2, T + 1, (B, 1), generator=rng)
    columns = torch.arange(T)
    return tokens, ((columns >= start) & (columns < end)).float()


def test_fp32_is_the_same_on_both(net, full_precision):
    tokens, mask = rows()
    expected = token_logprobs(net, tokens, mask)
    there = copy.deepcopy(net).to(GPU)
    torch.testing.assert_close(token_logprobs(there, tokens.to(GPU), mask.to(GPU)).cpu(), expected,
                               atol=1e-4, rtol=0)


def test_greedy_text_is_the_same_on_both(net, full_precision):
    # catches a graph of a step that goes on with the rows, the cache or the tokens of another one
    prompts = [[i, 2 * i, 3][:1 + i % 3] for i in range(24)]
    free, _, _ = generate(net, prompts, 40, eos=125, temperature=0)
    eos = int(free[:, 8:20].flatten().mode().values)
    ended = generate(net, prompts, 40, eos, temperature=0)[2]
    # nine or more that end at different steps, and two that do not: the batch is halved twice
    prompts = [prompts[i] for i in [*ended.nonzero()[:, 0], *(~ended).nonzero()[:2, 0]]]
    expected = generate(net, prompts, 40, eos, temperature=0)
    assert len(prompts) > 10 and len(expected[1].sum(1).unique()) > 5
    there = copy.deepcopy(net).to(GPU)
    for every in (1, 8):
        for one, other in zip(expected, generate(there, prompts, 40, eos, temperature=0,
                                                 check_every=every)):
            assert one.tolist() == other.cpu().tolist()
    frozen = common.freeze(there)
    with autocast(GPU):
        tokens, mask, _ = generate(frozen, [[1, 2, 3]], 20, eos, temperature=0)
    assert list(stream(frozen, [1, 2, 3], 20, eos, temperature=0)) == tokens[mask.bool()].tolist()


def test_bf16_rounds_and_no_more(net):
    # catches a head or a softmax under autocast: its logits would be off by 2^-9 of their size
    tokens, mask = rows(B=32)
    expected = token_logprobs(net, tokens, mask)
    with autocast(GPU):
        found = token_logprobs(net.to(GPU), tokens.to(GPU), mask.to(GPU))
    assert found.dtype == torch.float32
    error = (found.cpu() - expected)[mask.bool()]
    assert error.abs().mean() < 0.02 and error.mean().abs() < 0.005


def test_compiled_blocks_round_and_no_more(net):
    # catches kernels that are compiled wrong, and a first ratio of PPO that is far from 1
    tokens, mask = rows(B=32)
    expected = token_logprobs(net, tokens, mask)
    net.to(GPU).compiled = True
    with autocast(GPU):
        found = token_logprobs(net, tokens.to(GPU), mask.to(GPU))
        with torch.no_grad():
            again = token_logprobs(net, tokens.to(GPU), mask.to(GPU))
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    found, again = found.detach().cpu(), again.cpu()
    for error in ((found - expected)[mask.bool()], (found - again)[mask.bool()]):
        assert error.abs().mean() < 0.02 and error.mean().abs() < 0.005


def test_frozen_weights_round_once(net):
    tokens, mask = (x.to(GPU) for x in rows())
    with autocast(GPU), torch.no_grad():
        expected = token_logprobs(net.to(GPU), tokens, mask)
        frozen = common.freeze(net)
        found = token_logprobs(frozen, tokens, mask)
    assert frozen.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert frozen.wte.weight.dtype == torch.float32
    assert torch.equal(found, expected)


def test_samples_follow_the_distribution_that_is_scored(net):
    # 20,000 first tokens after one prompt, against the scored probabilities: chi square
    net, n = net.to(GPU), 20000
    uniforms = torch.rand(n, 2, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    with autocast(GPU):
        tokens, mask, _ = generate(net, [[1, 2, 3]], 2, eos=0, uniforms=uniforms, samples=n)
        first = tokens[:, 3]
        logp = token_logprobs(net, torch.cat([torch.tensor([[1, 2, 3]], device=GPU).expand(120, 3),
                              torch.arange(120, device=GPU)[:, None]], 1),
                              torch.tensor([[0.0, 0, 0, 1]], device=GPU).expand(120, 4))[:, 3]
    expected = n * logp.exp()
    observed = torch.bincount(first, minlength=120)
    assert abs(expected.sum() - n) < 1e-2 * n
    chi = ((observed - expected) ** 2 / expected).sum()
    assert chi < 119 + 5 * (2 * 119) ** 0.5


def synchronisations(fn):
    """The lines of source at which fn makes the processor wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fn()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [linecache.getline(w.filename, w.lineno).strip() for w in found
            if "synchroniz" in str(w.message)]


def test_decoding_never_waits_for_a_step(net):
    net = net.to(GPU)
    uniforms = torch.rand(2, 40, dtype=torch.double)

    def run(n):
        with autocast(GPU):
            return generate(net, [[1, 2], [3]], n, eos=125, uniforms=uniforms, check_every=1000)
    run(40)
    assert synchronisations(lambda: run(40)) == synchronisations(lambda: run(10))
    assert len(synchronisations(lambda: run(40))) < 12


@pytest.mark.parametrize("shared", [False, True])
def test_a_training_step_waits_only_for_sizes_and_for_its_check(net, shared):
    # catches a number that is read, or a tensor that is made on the CPU, in the middle of a step
    net, config = net.to(GPU).train(), SimpleNamespace(out="", lr=1e-4)
    optimizer = common.adamw([net], 1e-4)
    tokens, mask = (x.to(GPU) for x in rows())
    if shared:
        mask = mask[:1].expand(6, -1).clone()
        tokens = torch.where(mask.cumsum(1) > 0, tokens, tokens[0])

    def step():
        with autocast(GPU):
            loss = -token_logprobs(net, tokens, mask).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        common.check_finite(config, 1, loss=loss, grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step()
    # the last response column and the number of response tokens are shapes of what follows (the
    # backward pass asks for the latter again), and so are how many rows share a prompt, and the
    # sizes of shared prompts; nothing bad may get into the weights
    known = ("nonzero()", "int(used.max())", "[predicts]", "run_backward(", "isfinite().all()",
             "int(start.min())", ".unique(", "torch.stack(sizes).tolist()")
    for line in synchronisations(step):
        assert any(words in line for words in known), line


def test_every_stage_runs_and_a_cpu_reads_what_it_wrote(chain):  # noqa: F811
    folder, _ = chain
    for stage in ("pretrain", "sft", "reward", "dpo", "ppo", "grpo"):
        assert log_rows(folder, stage, "config")[0]["device"] == torch.cuda.get_device_name()
        [final] = log_rows(folder, stage, "final")
        assert all(math.isfinite(x) for x in final.values() if isinstance(x, float))
        weights = torch.load(folder / "out" / stage / "model.pt", weights_only=True)["weights"]
        assert all(w.device.type == "cpu" and w.dtype == torch.float32 and w.isfinite().all()
                   for w in weights.values())
    for stage in ("sft", "ppo"):
        policy = common.load_policy(folder / "out" / stage, (stage,), "cpu")[0]
        tokens = torch.randint(0, load_tokenizer("synthetic").n_tokens, (2, 9))
        assert token_logprobs(policy, tokens, torch.ones(2, 9)).isfinite().all()
