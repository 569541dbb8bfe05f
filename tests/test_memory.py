"""studies/memory.py: its parts against numbers by hand, real tensors, and real backward passes."""

import dataclasses

import common
import pytest
import torch
from conftest import ROOT
from model import GPT, GPTConfig, KVCache, generate, rotary_angles, token_stats
from reward import RewardModel
from studies import memory
from studies.memory import Case

TINY = dict(vocab_size=128, n_tokens=100, block_size=64, n_layer=3, n_head=4, n_embd=64)
LLAMA = TINY | dict(n_kv_head=2, head_dim=16, n_hidden=160, rope_theta=1e4, norm="rms",
                    mlp="swiglu", bias="none")
DIALECTS = dict(gpt2=TINY, gpt2_untied=TINY | dict(tied=False), llama=LLAMA,
                llama_untied=LLAMA | dict(tied=False), qwen2=LLAMA | dict(bias="qkv"),
                wide_heads=LLAMA | dict(head_dim=32))
every = pytest.mark.parametrize("fields", DIALECTS.values(), ids=DIALECTS)


def case(fields=TINY, **changes):
    return Case(**dict(dict(stage="sft", model=GPTConfig(**fields), rows=3, prompt=30, new=10,
                            batch=8, gpu=False), **changes))


def saved_bytes(fn, without):
    """(bytes of all storages that fn saves for the backward pass, its result); not those of the
    tensors `without`."""
    known, seen, kept = {t.untyped_storage().data_ptr() for t in without}, {}, []

    def pack(t):
        kept.append(t)  # or another tensor would get its address
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = fn()
    return sum(size for p, size in seen.items() if p not in known), result


# --- what stays -----------------------------------------------------------------------------------


@every
def test_parameters(fields):
    # catches a bias, a norm or a head that is counted in one dialect only
    model = GPT(GPTConfig(**fields))
    assert memory.num_params(model.config) == model.num_params()
    assert memory.parameters(model.config) == sum(p.nbytes for p in model.parameters())
    assert memory.block_linears(model.config) == sum(
        p.numel() for m in model.h[0].modules() if isinstance(m, torch.nn.Linear)
        for p in m.parameters())


def test_parameters_by_hand():
    # catches a formula and a network that are wrong alike: two known sizes
    assert memory.num_params(GPTConfig(vocab_size=50257, n_tokens=50256)) == 124_439_808
    llama = dataclasses.replace(memory.MODELS["Llama-3.2-1B"], vocab_size=128_256,
                                n_tokens=128_255)
    assert memory.num_params(llama) == 1_235_814_400


@every
def test_gradients_and_the_moments_of_adam(fields):
    # catches a moment forgotten, the head of a reward model that gets no gradient
    tokens, mask = torch.randint(100, (2, 12)), torch.ones(2, 12)
    for model, vocabulary, small in ((GPT(GPTConfig(**fields)), True, 0),
                                     (RewardModel(GPTConfig(**fields)), False, 65)):
        optimizer = common.adamw([model], 1e-3)
        loss = token_stats(model, tokens, mask)[0] if vocabulary else model(tokens, mask)
        loss.sum().backward()
        config = GPTConfig(**fields)
        assert memory.gradients(config, vocabulary) + 4 * small == sum(
            p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        assert memory.moments_of_adam(config, vocabulary) + 8 * small == sum(
            value.nbytes for state in optimizer.state.values() for name, value in state.items()
            if name != "step")


@every
def test_frozen(fields):
    # catches an embedding or a norm that is counted as rounded
    model = GPT(GPTConfig(**fields))
    assert memory.frozen(model.config, gpu=False) == sum(p.nbytes for p in model.parameters())
    common.round_blocks(model)
    assert memory.frozen(model.config, gpu=True) == sum(p.nbytes for p in model.parameters())


# --- a forward pass -------------------------------------------------------------------------------


def block_of(fields):
    model = GPT(GPTConfig(**fields))
    x = torch.randn(3, 40, 64, requires_grad=True)
    positions = torch.arange(40).expand(3, 40)
    angles = rotary_angles(model.config, positions) if model.config.rope_theta else None
    return model, x, angles


@every
def test_block_activations(fields):
    # catches a tensor that autograd keeps and the formula does not: fp32, to the byte
    model, x, angles = block_of(fields)
    found, _ = saved_bytes(lambda: model.h[0](x, 0, None, angles),
                           [*model.parameters(), *(angles or ())])
    assert found == 3 * 40 * memory.block_activations(model.config, gpu=False)


@every
def test_block_activations_under_autocast(fields):
    # catches 2 bytes for 4 and the other way round. RMSNorm keeps x / rms on a CPU only
    model, x, angles = block_of(fields)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = saved_bytes(lambda: model.h[0](x, 0, None, angles),
                               [*model.parameters(), *(angles or ())])
    if model.config.norm == "rms":
        found -= 2 * x.nbytes
    # biases are rounded too, but not kept
    weights = sum(2 * m.weight.numel() for m in model.h[0].modules()
                  if isinstance(m, torch.nn.Linear))
    assert found - weights == 3 * 40 * memory.block_activations(model.config, gpu=True)
    assert 0.98 < weights / memory.rounded_weights(case(fields, gpu=True), blocks=1) <= 1
    assert memory.rounded_weights(case(fields), blocks=1) == 0


@every
def test_activations_of_a_network(fields):
    # catches the last norm, the angles. Tolerance: indices, 16 bytes a token, are not counted
    model = GPT(GPTConfig(**fields))
    tokens = torch.randint(100, (3, 40))
    found, _ = saved_bytes(lambda: model(tokens), model.parameters())
    assert 0 <= found - memory.activations(case(fields)) <= 16 * 120
    # on a GPU every norm keeps its input only
    norms = 4 * 64 + 4 * (1 if model.config.norm == "rms" else 2)
    angles = 4 * model.config.head_dim * bool(model.config.rope_theta)
    assert memory.activations(case(fields, gpu=True)) == 120 * (
        3 * memory.block_activations(model.config, gpu=True) + norms + angles)


@every
def test_checkpointing_keeps_less_and_changes_no_gradient(fields):
    # catches checkpointing that is not switched on, and one that computes something else
    torch.manual_seed(0)
    model = GPT(GPTConfig(**fields))
    tokens, mask = torch.randint(100, (3, 41)), torch.ones(3, 41)

    def run(checkpointing):
        model.checkpointing = checkpointing
        found, logp = saved_bytes(lambda: token_stats(model, tokens, mask)[0], model.parameters())
        logp.sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found, logp, grads

    (full, logp, grads), (less, logp_again, grads_again) = run(False), run(True)
    assert torch.equal(logp, logp_again)
    for a, b in zip(grads, grads_again):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    # one block is computed again in the backward pass, and not there in the forward pass.
    # Tolerance: angles, indices
    block = 120 * (memory.block_activations(model.config, False) - 4 * 64)
    saving = memory.activations(case(fields)) + block \
        - memory.activations(case(fields, checkpointing=True))
    assert abs(full - less - saving) <= 120 * (4 * model.config.head_dim + 16)
    assert less < full / 2


def test_rounded_blocks_change_no_number_under_autocast():
    # catches a module that is rounded although autocast leaves it in fp32
    for fields in DIALECTS.values():
        model = GPT(GPTConfig(**fields)).requires_grad_(False)
        tokens = torch.randint(100, (3, 40))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = model.logits(model(tokens))
            common.round_blocks(model)
            assert model.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
            assert torch.equal(model.logits(model(tokens)), before)


# --- the head, the rollout ------------------------------------------------------------------------


def test_chunks_of_logits():
    # catches bytes of another type, and a chunk that is larger than the answers are
    small, large = case(new=10, rows=3), case(dict(TINY, vocab_size=50304, n_tokens=50257),
                                              new=100, rows=8)
    assert memory.chunk_of_logits(small, 3) == (4 * 30 * 100, 1)
    assert memory.chunk_of_logits(large, 8) == (4 * 267 * 50257, 3)  # 2^24 // 50257 = 333
    assert memory.chunk_of_logits(dataclasses.replace(large, gpu=True), 8) == (4 * 800 * 50257, 1)
    huge = case(dict(TINY, vocab_size=200_064, n_tokens=200_000), new=100, rows=8)
    assert memory.chunk_of_logits(huge, 8) == (4 * 115 * 200_000, 7)  # 128, not below


@every
def test_kv_cache(fields):
    # catches the heads of queries for those of keys, one of keys and values, a layer
    one = case(fields)
    for gpu, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        cache = KVCache(one.model, 5, 40, torch.device("cpu"), dtype)
        assert memory.kv_cache(dataclasses.replace(one, gpu=gpu), 5) == cache.kv.nbytes


def test_generate_makes_the_cache_of_the_formula(monkeypatch):
    # catches a rollout that allocates another length or another number of rows
    made = []
    real = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args: (real(self, *args),
                                                                  made.append(self))[0])
    one = case(LLAMA, batch=8, k=4, prompt=6, new=5)
    generate(GPT(one.model), [[1] * 6] * 2, 5, eos=100, temperature=0, samples=4)
    assert made[0].kv.nbytes == memory.kv_cache(one, 8)


def test_parts_by_hand():
    # catches a factor that is lost: C 64, H 4, V 128 rows of 100 tokens, 3 rows of 30 + 10
    one = case()
    assert memory.block_backward(one) == 120 * 4 * (64 + 64 + 256)
    assert memory.block_backward(dataclasses.replace(one, gpu=True)) == 120 * (256 + 2 * 320)
    assert memory.block_backward(case(LLAMA)) == 120 * 4 * (64 + 64 + 320)
    assert memory.block_forward(one, 7) == 7 * 4 * (3 * 64 + 2 * 256)
    assert memory.block_forward(case(LLAMA), 7) == 7 * 4 * (3 * 64 + 4 * 160)
    assert memory.sampling(one) == 8 * 100 * 32
    hidden, table = 4 * 30 * 64, 4 * 128 * 64
    assert memory.head_backward(one) == 2 * hidden + max(3 * 4 * 30 * 100, table)
    chunks = case(dict(TINY, vocab_size=400_064, n_tokens=400_000), rows=13)  # 130 of 128
    table = 4 * 400_064 * 64
    most = max(3 * 4 * 65 * 400_000, table)
    assert memory.head_backward(chunks) == 3 * 4 * 130 * 64 + table + most
    assert memory.head_backward(dataclasses.replace(chunks, pieces=False)) \
        == 3 * 4 * 130 * 64 + most


# --- the stages -----------------------------------------------------------------------------------


def test_what_a_stage_holds():
    # catches a network too many or too few: of ppo policy, critic; reference, reward model frozen
    size = memory.parameters(GPTConfig(**TINY))
    for stage, trained, frozen in (("sft", 1, 0), ("reward", 1, 0), ("dpo", 1, 1), ("grpo", 1, 1),
                                   ("ppo", 2, 2)):
        found = memory.held(case(stage=stage))
        assert found == {"parameters": trained * size, "Adam": 2 * trained * size,
                         "frozen": frozen * size}, stage
    # a reward model does not train a head of its own
    untied = GPTConfig(**LLAMA, tied=False)
    found = memory.held(case(LLAMA | dict(tied=False), stage="reward"))
    assert found["Adam"] == 8 * (memory.num_params(untied) - 128 * 64)


def test_moments():
    # catches a gradient during sampling, a rollout in a stage without one
    for stage in memory.STAGES:
        found = memory.moments(case(stage=stage, prompt=60, new=4))
        rollout = {"prepare", "prompts", "answers"} if stage in ("ppo", "grpo") else set()
        head = set() if stage == "reward" else {"head"}
        assert set(found) == {"forward", "block", "embedding"} | head | rollout
        for name in rollout:
            assert "gradients" not in found[name] and "activations" not in found[name]
    # under checkpointing all rounded weights are there at the end of the forward pass only
    found = memory.moments(case(stage="reward", gpu=True, checkpointing=True))
    rounded = [found[name]["weights in bf16"] for name in ("forward", "block")]
    assert rounded == [3 * rounded[1], 2 * memory.block_linears(GPTConfig(**TINY))]
    found = memory.moments(case(stage="ppo", gpu=True))
    rounded = [found[name]["weights in bf16"] for name in ("block", "prepare", "answers")]
    assert rounded == [3 * 2 * memory.block_linears(GPTConfig(**TINY)) * n for n in (1, 2, 1)]
    answers = memory.moments(case(stage="grpo", k=4, batch=64))["answers"]
    assert answers["KV cache"] == memory.kv_cache(case(), 64)
    assert answers["temporary"] == memory.kv_cache(case(), 32) + 64 * 100 * 16
    one = case(stage="grpo", k=4, batch=64, drops=False)
    assert memory.moments(one)["answers"]["temporary"] == memory.kv_cache(one, 16)
    # logits of 3 answers of 4,000 tokens, five times: more than a block
    one = case(stage="ppo", prompt=1, new=4000)
    large = dataclasses.replace(one, model=GPTConfig(**dict(TINY, vocab_size=1024, n_tokens=1000)))
    assert memory.moments(large)["prepare"]["temporary"] == 5 * 4 * 12000 * 1000
    assert memory.peak(case(stage="ppo", batch=4096))[0] in ("prompts", "answers")
    assert memory.peak(case(stage="ppo", batch=1, rows=64))[0] in ("head", "block")


def test_the_table(capsys):
    # catches a formula, a default or a size that was changed, and the page was not
    memory.main(memory.Config())
    table = capsys.readouterr().out
    assert table.count("\n") == 17 and table in (ROOT / "docs" / "scale.md").read_text()


def test_a_rollout_may_be_what_does_not_fit(capsys):
    # catches a column that looks at the update only
    memory.main(memory.Config(prompt=1100))
    [row] = [line for line in capsys.readouterr().out.splitlines()
             if line.startswith("| SmolLM2-360M | grpo")]
    assert row.endswith("| no | yes |")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_case_of_the_check_comes_back_as_it_was(gpu):
    # catches a field that JSON changes, as it does tuples
    for _, one, only in memory.check_cases(gpu):
        assert memory.read_case(memory.write_case(one, only)) == (one, tuple(only))


@pytest.mark.parametrize("stage, only", [*((stage, memory.TRAINING) for stage in memory.STAGES),
                                         ("ppo", memory.ROLLOUT), ("grpo", memory.ROLLOUT)])
def test_the_check_runs_what_the_stages_have(stage, only):
    # catches a function or a field of a stage that the check calls by an older name, and what the
    # process holds besides in the figure: torch alone is over 100 MiB
    one = case(stage=stage, rows=4, k=4 if stage == "grpo" else 1)
    # so small that pages of an earlier test, returned meanwhile, can bring it below 0
    assert abs(memory.measure(one, only, torch.device("cpu"))) < 64 * 2**20
