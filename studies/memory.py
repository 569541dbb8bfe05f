"""What a step of each stage needs in memory: a formula of named parts, and a check against peaks.

    python studies/memory.py                 # the table of docs/scale.md, for a GPU
    python studies/memory.py --check=true    # formula against measured peaks of the real stages

A stage goes through moments: it samples, it prepares, it updates. What a moment needs is the sum
of its parts, and the peak of the stage is the largest moment. The formula counts tensors by hand
from the modules of model.py; it runs nothing. A network with `qk_norm` is not covered, and the last
block counts as a whole, though it computes only the states that are wanted: some 3% too much.

The check runs every moment as the stages do, on random tokens, each in a process of its own. On a
CPU it reads the process's largest resident size. For that malloc gives every tensor pages of its
own (MALLOC_MMAP_THRESHOLD_), which go back to the system as soon as the tensor is freed: otherwise
the peak would hold what malloc keeps for later. On a GPU it reads torch's own counter.
"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive


@dataclass
class Config:
    prompt: Positive[int] = 896  # tokens
    new: Positive[int] = 128  # tokens of the answer behind it
    check: bool = False  # run the stages and compare
    tolerance: Positive[float] = 0.15  # of the check: how far measured / formula may be from 1
    device: str = "auto"  # of the check: "auto" (a GPU where there is one), "cpu", "cuda"
    child: str = ""  # for the study itself: one case of the check, in JSON


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np
import torch

import common
import dpo
import grpo
import ppo
import reward
import sft
from model import GPT, GPTConfig, autocast, token_logprobs

STAGES = dict(sft=sft, reward=reward, ppo=ppo, dpo=dpo, grpo=grpo)
# logits that token_stats computes at a time, if that makes 128 tokens or more; True: on a GPU
CHUNK = {False: 2**24, True: 2**27}
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Case:
    """What the formula needs to know. All networks of a stage have the same size."""
    stage: str
    model: GPTConfig
    rows: int  # of a forward pass in training: micro_batch
    prompt: int  # tokens
    new: int  # tokens behind the prompt; only on these the head runs
    batch: int  # rows of a rollout
    k: int = 1  # of them, rows of a prompt
    checkpointing: bool = False
    gpu: bool = True  # bf16 under autocast; False: all in fp32, on a CPU
    pieces: bool = True  # an optimiser step has several backward passes, whose gradients add up
    drops: bool = True  # half of a rollout's rows end before the others, and leave the cache

    @property
    def tokens(self):
        """Tokens of a forward pass in training."""
        return self.rows * (self.prompt + self.new)

    @property
    def low(self):
        """Bytes of a number that autocast rounds."""
        return 2 if self.gpu else 4


# --- numbers: how many a network has --------------------------------------------------------------


def block_linears(c):
    """Numbers in the linear maps of one block."""
    q, kv, wide = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_hidden
    fc = 2 * wide if c.mlp == "swiglu" else wide  # gate and value in one matrix
    biases = (q + 2 * kv) * (c.bias != "none") + (fc + 2 * c.n_embd) * (c.bias == "all")
    return c.n_embd * (q + 2 * kv) + q * c.n_embd + c.n_embd * fc + wide * c.n_embd + biases


def table_size(c):
    """Numbers in the matrix of the embedding, and of the head."""
    return c.vocab_size * c.n_embd


def num_params(c):
    positions = 0 if c.rope_theta else c.block_size * c.n_embd
    norm = c.n_embd * (2 if c.norm == "layer" else 1)  # scale, and a bias
    return (table_size(c) * (1 if c.tied else 2) + positions
            + c.n_layer * (block_linears(c) + 2 * norm) + norm)


# --- bytes that stay through a run ----------------------------------------------------------------


def parameters(c):
    return 4 * num_params(c)  # of a trained network, fp32 on every device


def gradients(c, vocabulary=True):
    """vocabulary False: a reward model or critic. A head of its own gets no gradient there."""
    return 4 * (num_params(c) - (0 if vocabulary or c.tied else table_size(c)))


def moments_of_adam(c, vocabulary=True):
    """Two numbers a parameter that gets a gradient. The fused step and the clipping of gradients
    work in place, so neither needs more."""
    return 2 * gradients(c, vocabulary)


def frozen(c, gpu):
    """A network without gradients: on a GPU common.freeze rounds the blocks' linear maps."""
    return parameters(c) - (2 * c.n_layer * block_linears(c) if gpu else 0)


# --- bytes of a forward pass with gradients -------------------------------------------------------


def block_activations(c, gpu):
    """Bytes a token that one block keeps for its backward pass."""
    low, q, kv = 2 if gpu else 4, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    kept = 2 * 4 * c.n_embd  # inputs of the two norms: the residual stream stays in fp32
    kept += 2 * 4 * (2 if c.norm == "layer" else 1)  # their mean and 1 / std, or the latter
    if c.norm == "rms" and not gpu:
        kept += 2 * 4 * c.n_embd  # on a CPU RMSNorm is made of parts, and keeps x / rms as well
    kept += 2 * low * c.n_embd  # outputs of the norms, which are inputs of linear maps
    kept += low * (q + 2 * kv)  # queries, keys and values in one tensor; without rotation all read
    if c.rope_theta:
        kept += low * (q + kv)  # rotated queries and keys; the tensor above lives on for the values
        kept += low * q  # the output once more: after a rotation it has another order in memory
    kept += low * q + 4 * c.n_head  # output of the attention, logsumexp of each head
    # GELU: its input and output. SwiGLU: gate and value, silu(gate), the product
    return kept + low * c.n_hidden * (4 if c.mlp == "swiglu" else 2)


def activations(case):
    """Kept for the backward pass of one forward pass, the head not counted."""
    c = case.model
    # the last norm, as those of the blocks; its output is not kept
    norm = 4 * c.n_embd * (2 if c.norm == "rms" and not case.gpu else 1) \
        + 4 * (2 if c.norm == "layer" else 1)
    angles = 4 * c.head_dim if c.rope_theta else 0  # sine and cosine, for all blocks
    block = block_activations(c, case.gpu)
    if case.checkpointing:  # the input of each block, and all of the block that is computed again
        blocks = c.n_layer * 4 * c.n_embd + block - 4 * c.n_embd
    else:
        blocks = c.n_layer * block
    return case.tokens * (blocks + norm + angles)


def rounded_weights(case, blocks):
    """The copies in bf16 that autocast makes of a trained network's linear maps, of so many blocks.
    All are there until its forward pass has ended, and longer where the backward pass needs them.
    """
    return 2 * blocks * block_linears(case.model) if case.gpu else 0


# --- bytes that come and go -----------------------------------------------------------------------


def chunk_of_logits(case, rows):
    """(bytes of a chunk, number of chunks) of the head over the answers of so many rows."""
    positions = rows * case.new
    chunks = -(-positions // max(128, CHUNK[case.gpu] // case.model.n_tokens))
    return 4 * -(-positions // chunks) * case.model.n_tokens, chunks


def head_backward(case):
    """The backward pass of the head, while all activations are still there."""
    chunk, chunks = chunk_of_logits(case, case.rows)
    table = 4 * table_size(case.model)
    hidden = 4 * case.rows * case.new * case.model.n_embd
    # hidden states; where there are chunks, their gradient, and that of one chunk as wide as all
    kept = hidden * (3 if chunks > 1 else 2)
    # autograd adds up the gradients of the chunks before it adds them to .grad; where the step is
    # one backward pass, this sum is what `gradients` counts already
    kept += table * (chunks > 1) * case.pieces
    # log-softmax: its output, the gradient of that, and of the logits; then that of the matrix
    return kept + max(3 * chunk, table)


def block_backward(case):
    """The largest gradients inside the last block: of the residual stream, and of the MLP."""
    c = case.model
    wide = c.n_hidden * (2 if c.mlp == "swiglu" else 1)
    return case.tokens * (4 * c.n_embd + case.low * (c.n_embd + wide))


def block_forward(case, tokens):
    """The largest tensors alive in a block without gradients: the residual stream twice and a norm
    of it, in fp32, and those of the MLP."""
    c = case.model
    wide = c.n_hidden * (4 if c.mlp == "swiglu" else 2)
    return tokens * (3 * 4 * c.n_embd + case.low * wide)


def kv_cache(case, rows):
    """Keys and values of every layer for so many rows of prompt and answer."""
    c = case.model
    return rows * (case.prompt + case.new) * c.n_layer * 2 * c.n_kv_head * c.head_dim * case.low


def sampling(case):
    """Of a row's vocabulary: logits and p in fp32, p and its sum in fp64, and the last sum."""
    return case.batch * case.model.n_tokens * (4 + 4 + 8 + 8 + 8)


# --- the moments of a stage -----------------------------------------------------------------------


def held(case):
    """{part: bytes} that are there at every moment of the stage."""
    c, critic = case.model, case.stage == "ppo"
    head = case.stage != "reward"
    parts = {"parameters": parameters(c), "Adam": moments_of_adam(c, head)}
    if critic:
        parts["parameters"] += parameters(c)
        parts["Adam"] += moments_of_adam(c, vocabulary=False)
    # the reference, and PPO's reward model
    networks = dict(sft=0, reward=0, dpo=1, grpo=1, ppo=2)[case.stage]
    return parts | {"frozen": networks * frozen(c, case.gpu)}


def moments(case):
    """{moment: {part: bytes}} of a stage; the largest sum is its peak."""
    c, stage = case.model, case.stage
    grads = gradients(c, stage != "reward") + (gradients(c, False) if stage == "ppo" else 0)
    rounded = rounded_weights(case, c.n_layer)
    training = held(case) | {
        "gradients": grads, "activations": activations(case),
        # under checkpointing a block at a time, of which there are copies again
        "weights in bf16": rounded_weights(case, 1) if case.checkpointing else rounded}
    table = 4 * table_size(c)
    # the head's gradient of a tied matrix, which waits for that of the embedding
    waiting = table if c.tied and stage != "reward" and case.pieces else 0
    chunk, _ = chunk_of_logits(case, case.rows)
    found = {
        # at its end, with the gradients of the pass before: logits, and divided by the temperature
        "forward": training | {"weights in bf16": rounded,
                               "temporary": 2 * chunk if stage != "reward" else 0},
        "block": training | {"temporary": block_backward(case) + waiting},
        # at the end of the backward pass: the embedding's gradient, before it is added
        "embedding": training | {"activations": 0, "temporary": table + waiting}}
    if stage != "reward":
        found["head"] = training | {"temporary": head_backward(case)}
    if stage in ("ppo", "grpo"):
        networks = 2 if stage == "ppo" else 1
        # exact KL: log-probabilities of both networks, and three products of them
        found["prepare"] = held(case) | {"weights in bf16": networks * rounded, "temporary": max(
            block_forward(case, case.tokens), chunk * (5 if stage == "ppo" else 3))}
        prompts = case.batch // case.k
        copies = {"weights in bf16": rounded}
        found["prompts"] = held(case) | copies | {
            "KV cache": kv_cache(case, prompts),
            "temporary": block_forward(case, prompts * case.prompt)}
        # the cache of the prompts is there until that of their rows is copied from it
        again = kv_cache(case, prompts) if case.k > 1 else 0
        if case.drops:  # the rows that are not done are copied out of it, sampling's tensors beside
            again = max(again, kv_cache(case, case.batch // 2) + sampling(case) // 2)
        found["answers"] = held(case) | copies | {
            "KV cache": kv_cache(case, case.batch), "temporary": max(again, sampling(case))}
    return found


def peak(case, only=None):
    """(moment, bytes) of the largest one, of all or of those named."""
    sums = {name: sum(parts.values()) for name, parts in moments(case).items()
            if only is None or name in only}
    return max(sums.items(), key=lambda item: item[1])


# --- the check ------------------------------------------------------------------------------------

# 10 and 40 million parameters; the second dialect has a head of its own
SMALL = dict(vocab_size=20032, n_tokens=20000, block_size=256)
LLAMA = dict(rope_theta=1e4, norm="rms", mlp="swiglu", bias="none", tied=False)
CHECKED = {
    "GPT-2 10M": GPTConfig(**SMALL, n_layer=6, n_head=4, n_embd=256),
    "GPT-2 40M": GPTConfig(**SMALL, n_layer=9, n_head=8, n_embd=512),
    "Llama 14M": GPTConfig(**SMALL, **LLAMA, n_layer=6, n_head=4, n_kv_head=2, n_embd=256,
                           n_hidden=704),
    "Llama 43M": GPTConfig(**SMALL, **LLAMA, n_layer=9, n_head=8, n_kv_head=2, n_embd=512,
                           n_hidden=1408)}
TRAINING = ("forward", "block", "embedding", "head", "prepare")
ROLLOUT = ("prompts", "answers")


def check_cases(gpu):
    """[(name of the network, Case, moments)]: training of every stage, and the two rollouts."""
    found = []
    for name, model in CHECKED.items():
        small = model.n_layer == 6
        for stage in STAGES:
            # dpo and reward have one backward pass a step, and compute its pieces again
            case = Case(stage, model, rows=4, prompt=32, new=224, batch=8, gpu=gpu,
                        pieces=stage not in ("dpo", "reward"), drops=False)
            found.append((name, case, TRAINING))
            if stage == "sft" or stage == "ppo" and small:
                found.append((name, dataclasses.replace(case, checkpointing=True), TRAINING))
            if stage in ("ppo", "grpo") and small:
                k = 4 if stage == "grpo" else 1
                found.append((name, dataclasses.replace(case, prompt=240, new=16, batch=32, k=k),
                              ROLLOUT))
    return found


def training_step(case, networks, optimizers, batch, device):
    """One optimiser step of the stage, or one iteration, on random tokens: batch rows."""
    policy, other, judge = networks  # other: reference; judge: reward model, or PPO's critic
    config = STAGES[case.stage].Config(micro_batch=case.rows, batch_size=batch)
    tokens = torch.randint(case.model.n_tokens, (batch, case.prompt + case.new), device=device)
    mask = torch.ones(tokens.shape, device=device)
    mask[:, :case.prompt] = 0
    score, finished = torch.randn(batch, device=device), mask[:, 0] == 0
    rng = np.random.default_rng(0)
    if case.stage == "ppo":
        config = dataclasses.replace(config, minibatches=1, epochs=1)
        data = ppo.prepare(policy, judge, other, tokens, mask, finished, score, 0.1, config)
        return ppo.update(policy, judge, other, optimizers, data, 0.1, config, rng)
    if case.stage == "grpo":
        config = grpo.resolve(dataclasses.replace(config, minibatches=1, k=4,
                                                  max_new_tokens=case.new))
        data = grpo.prepare(policy, other, tokens, mask, finished, score, config)
        return grpo.update(policy, optimizers[0], data, config, rng)
    if case.stage == "dpo":
        config = dataclasses.replace(config, beta=0.1)
        pairs = range(0, batch, 2), range(1, batch, 2)  # in place of those of a file
        tensors = tokens, mask, score, mask.sum(1), score, *map(list, pairs), []
        elements = [SimpleNamespace(pairs=[(0, 1)])] * len(pairs[0])
        with patch.object(dpo, "batch_tensors", lambda *_: tensors):
            return dpo.update(policy, other, optimizers[0], elements, [], (len(elements), 1),
                              config, 0)
    if case.stage == "reward":  # from here on as in the loops of the two stages
        scores = reward.score_batch(policy.raw, tokens, mask, case.rows)
        reward.reward_loss(scores[::2], scores[1::2]).backward()
    else:
        for i in range(0, batch, case.rows):
            with autocast(device):
                loss = sft.sft_loss(token_logprobs(policy, tokens[i:i + case.rows],
                                                   mask[i:i + case.rows]), mask[i:i + case.rows])
            (loss / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)
    optimizers[0].step()
    optimizers[0].zero_grad(set_to_none=True)


def rollout(case, policy):
    """Sample as the stage does; no answer ends before its length."""
    config = STAGES[case.stage].Config(batch_size=case.batch, max_new_tokens=case.new)
    prompts = [("", [1] * case.prompt, None)] * case.batch
    pad = case.model.n_tokens  # as EOS it is never drawn
    tokenizer = SimpleNamespace(eos=pad, pad=pad, decode=lambda ids: "")
    if case.stage == "grpo":
        config = dataclasses.replace(config, k=case.k)
    STAGES[case.stage].rollout(policy, prompts, tokenizer, config, 0)


def resident(name):
    """A line of /proc/self/status, in bytes."""
    [line] = [x for x in open("/proc/self/status") if x.startswith(name)]
    return int(line.split()[1]) * 1024


def measure(case, only, device):
    """Bytes at the peak of the moments `only`, above what the process had before its networks."""
    def build(case):
        policy = GPT(case.model) if case.stage != "reward" else reward.RewardModel(case.model)
        policy, other, judge = policy.to(device).eval(), None, None
        if case.stage in ("ppo", "dpo", "grpo"):
            other = common.freeze(GPT(case.model).to(device).eval())
        trained, scorer = [policy], None
        if case.stage == "ppo":
            scorer = reward.RewardModel(case.model).to(device).eval().requires_grad_(False)
            judge = ppo.ValueModel(scorer)
            common.freeze(scorer)
            trained.append(judge)
        for network in trained:
            getattr(network, "gpt", network).checkpointing = case.checkpointing
        # scorer: only held
        return (policy, other, judge), [common.adamw([m], 1e-5) for m in trained], scorer

    # first a tiny network, so that torch has loaded what it loads once
    tiny = dataclasses.replace(case, model=dataclasses.replace(
        case.model, vocab_size=128, n_tokens=100, n_layer=1), rows=2, prompt=4, new=4, batch=4)
    if only == ROLLOUT:
        rollout(tiny, build(tiny)[0][0])
    training_step(tiny, *build(tiny)[:2], 4, device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident("VmRSS")
    networks, optimizers, scorer = build(case)
    # the moments of Adam come with the first step; a small one, the second is measured
    training_step(dataclasses.replace(case, rows=1, prompt=4, new=4), networks, optimizers, 4,
                  device)
    assert all(optimizer.state for optimizer in optimizers), "nothing was trained"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident size
    if only == ROLLOUT:
        rollout(case, networks[0])
    else:
        training_step(case, networks, optimizers, case.batch, device)
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return after - before


def write_case(case, only):
    return json.dumps([dataclasses.asdict(case), only])


def read_case(text):
    """(case, only) of what `write_case` wrote: JSON has no tuples."""
    case, only = json.loads(text)
    model = case["model"] | dict(rope_scaling=tuple(case["model"]["rope_scaling"]))
    return Case(**case | dict(model=GPTConfig(**model))), tuple(only)


def check(config):
    device = common.find_device(config.device)
    rows = []
    for name, case, only in cli.progress(check_cases(device.type == "cuda"), "check"):
        child = write_case(case, only)
        output = subprocess.run(
            [sys.executable, __file__, f"--child={child}", f"--device={device}"], check=True,
            stdout=subprocess.PIPE, text=True, env=dict(
                os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000000",
                MALLOC_TRIM_THRESHOLD_="65536", OMP_NUM_THREADS="1")).stdout
        moment, formula = peak(case, only)
        rows.append((name, case.stage + (" rollout" if only == ROLLOUT else ""),
                     case.checkpointing, moment, formula, int(output.split()[-1])))
        cli.say(f"{name}, {rows[-1][1]}: {rows[-1][-1] / formula:.3f}")
    worst = max(abs(measured / formula - 1) for *_, formula, measured in rows)
    print("\n| network | what | checkpointing | largest moment | formula, MiB | measured, MiB | "
          "ratio |\n" + "|---" * 7 + "|")
    for name, what, checkpointing, moment, formula, measured in rows:
        print(f"| {name} | {what} | {cli.as_text(checkpointing)} | {moment} | {formula / MIB:,.0f} "
              f"| {measured / MIB:,.0f} | {measured / formula:.3f} |")
    print(f"\nlargest difference {worst:.1%}, tolerance {config.tolerance:.0%}")
    if worst > config.tolerance:
        sys.exit(1)


# --- the table ------------------------------------------------------------------------------------

# as convert.py makes them: the rows of the vocabulary are rounded up, with room for PAD
MODELS = {
    "GPT-2": GPTConfig(),
    "SmolLM2-360M": GPTConfig(
        vocab_size=49216, n_tokens=49152, block_size=8192, n_layer=32, n_head=15, n_kv_head=5,
        n_embd=960, n_hidden=2560, rope_theta=1e5, norm="rms", mlp="swiglu", bias="none"),
    "Llama-3.2-1B": GPTConfig(
        vocab_size=128320, n_tokens=128256, block_size=131072, n_layer=16, n_head=32, n_kv_head=8,
        n_embd=2048, n_hidden=8192, rope_theta=5e5, norm="rms", mlp="swiglu", bias="none")}
SPARE = 1.1  # for what is not counted: CUDA's own memory, gaps between tensors


def table_case(stage, model, config):
    """The stage with its default flags, on a GPU."""
    defaults = STAGES[stage].Config()
    column = sum(num_params(model) > limit for limit in common.SIZES)
    micro_batch = common.AUTO[stage]["micro_batch"][column]
    return Case(stage, model, micro_batch, config.prompt, config.new, defaults.batch_size,
                getattr(defaults, "k", 1), pieces=stage not in ("dpo", "reward"))


def print_table(config):
    print("| network | stage | micro_batch | weights, Adam, frozen | activations | update | "
          "rollout | of it KV cache | 24 GiB | 80 GiB |\n" + "|---" * 10 + "|")
    gib = lambda value: f"{value / GIB:.1f}"
    pair = lambda values: " / ".join(map(gib, values))
    for name, model in MODELS.items():
        for stage in STAGES:
            plain = table_case(stage, model, config)
            both = plain, dataclasses.replace(plain, checkpointing=True)
            cells = [name, stage, plain.rows, gib(sum(held(plain).values())),
                     pair(map(activations, both)), pair(peak(c, TRAINING)[1] for c in both)]
            cells += [gib(peak(plain, ROLLOUT)[1]), gib(kv_cache(plain, plain.batch))] \
                if stage in ("ppo", "grpo") else ["-", "-"]
            for size in (24 * GIB, 80 * GIB):
                fits = [peak(c)[1] * SPARE <= size for c in both]
                cells.append("yes" if fits[0] else "checkpointing" if fits[1] else "no")
            print("| " + " | ".join(map(str, cells)) + " |")


def main(config):
    if config.child:
        print(measure(*read_case(config.child), common.find_device(config.device)))
    elif config.check:
        check(config)
    else:
        print_table(config)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
