"""How fast is a stage: seconds a step, tokens a second, memory, and the share of what the machine
could do.

    python studies/bench.py --stage=sft --size=gpt2
    python studies/bench.py --stage=reward --size=small --lengths=real
    python studies/bench.py --stage=ppo --size=tiny --peer=true    # TRL does the same, in turn

Random weights and random tokens; the steps are those of the stages, by their own functions. Prints
one line of JSON. docs/speed.md says what its fields mean, and holds the figures.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder
ENVIRONMENT = dict(os.environ)  # the peer's, too: without what cli.py sets for our own scripts

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config:
    stage: str = "sft"  # pretrain, sft, reward, ranking, dpo, ppo, grpo, generate, label
    size: str = "tiny"  # tiny (1 million parameters), small (11), gpt2 (124), smollm2 (135)
    init: str = ""  # a checkpoint of a language model instead of random weights
    lengths: str = "full"  # "full": all rows of one length; "real": as in Alpaca (sft) and HH-RLHF
    batch_size: NotNegative[int] = 0  # B: rows, pairs, rankings or prompts a step; 0: by the size
    prompt: NotNegative[int] = 0  # P, tokens of a prompt; 0: by the size
    new: NotNegative[int] = 0  # R, tokens of an answer; 0: by the size
    compile: bool = False  # training steps as with --compile=true of the stages
    steps: Positive[int] = 8  # measured, after one more to warm up
    seed: NotNegative[int] = 1  # of weights, tokens and lengths
    device: str = "auto"  # "auto" (a GPU where there is one), "cpu", "cuda"
    # --- beside another implementation, see studies/peers.py
    peer: bool = False  # run both, each in a process of its own, in turn; prints medians of ratios
    rounds: Positive[int] = 3  # of that
    precompute: bool = False  # dpo: TRL, too, has the reference's log-probabilities beforehand
    nanochat: str = ""  # folder of a clone of nanochat: its engine is the peer of --stage=generate


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np
import torch

import common
import dpo
import grpo
import label
import ppo
import pretrain
import reward
import sft
from data import batches
from data.load import Element, all_rows, batch_rows, pair_indices
from data.records import collate
from data.tokens import FACTS, Rows, flat
from evaluate import rollout_metrics, sequence_logprobs
from model import GPT, GPTConfig, autocast, generate, text_loss, token_logprobs

LLAMA = dict(rope_theta=1e5, norm="rms", mlp="swiglu", bias="none")
SIZES = dict(
    tiny=GPTConfig(vocab_size=576, n_tokens=512, n_layer=4, n_head=4, n_embd=128),
    small=GPTConfig(vocab_size=1088, n_tokens=1024, n_layer=6, n_head=6, n_embd=384),
    gpt2=GPTConfig(vocab_size=50304, n_tokens=50257),
    smollm2=GPTConfig(vocab_size=49216, n_tokens=49152, block_size=8192, n_layer=30, n_head=9,
                      n_kv_head=3, n_embd=576, n_hidden=1536, **LLAMA))  # SmolLM2-135M's shapes
WORK = dict(tiny=(32, 32, 32), small=(8, 64, 64), gpt2=(2, 64, 64), smollm2=(4, 64, 64))  # B, P, R
# tokens (GPT-2's) of prompts and answers at these shares of the rows: 4,993 demonstrations of
# Alpaca, 2,299 harmless pairs of HH-RLHF, with our template. Between them a straight line; prompt
# and answers are drawn apart. In HH-RLHF their logarithms correlate by 0.2 to 0.3, yet 8 pairs in
# random order pad a token to 2.57, so drawn to 2.55.
SHARES = (0, .1, .25, .5, .75, .9, .95, .98, .99, 1)
ALPACA = (6, 10, 13, 16, 24, 33, 42, 60, 75, 245), (2, 8, 14, 45, 87, 128, 164, 228, 272, 623)
HH = (5, 12, 25, 83, 151, 256, 326, 419, 527, 804), (2, 10, 17, 32, 61, 102, 132, 184, 230, 572)
ANSWERS = dict(sft=1, reward=2, ranking=4, dpo=2)  # of a prompt, in the stages that read a file
PEERS = (*ANSWERS, "ppo", "generate")  # what studies/peers.py can do
PEER_SCRIPT = str(Path(__file__).with_name("peers.py"))


# --- the data -------------------------------------------------------------------------------------


def draw_lengths(config, work):
    """(n, 1 + answers): tokens of each prompt and of its answers. Real ones for 100 batches at
    least, of which the first are run: as many are sorted by length together, see
    `batches.like_length`."""
    n, answers = work.B * (config.steps + 1), ANSWERS.get(config.stage, 1)
    if config.lengths == "full":
        return np.array([[work.P] + [work.R] * answers] * n)
    n = max(n, 100 * work.B)
    rng = common.stream(config.seed, "bench", "lengths")
    prompt, answer = ALPACA if config.stage == "sft" else HH
    draw = lambda values, k: np.interp(rng.random((n, k)), SHARES, values).astype(int)
    return np.concatenate([draw(prompt, 1), draw(answer, answers)], 1)


def make_data(config, work):
    """(Rows, an Element for each prompt), random tokens; the answers are ranked as they stand."""
    rng, lengths = common.stream(config.seed, "bench", "tokens"), draw_lengths(config, work)
    draw = lambda n: rng.integers(0, work.size.n_tokens, n).tolist()
    rows, masks, facts = [], [], np.zeros(lengths[:, 1:].size, FACTS)
    for prompt, *answers in lengths.tolist():
        asked = draw(prompt)
        rows += [asked + draw(n) for n in answers]
        masks += [[0] * prompt + [1] * n for n in answers]
    facts["response"], k = lengths[:, 1:].ravel(), lengths.shape[1] - 1
    source, pairs = Rows(flat(rows), flat(masks), facts), tuple(combinations(range(k), 2))
    return source, [Element(source, tuple(range(i, i + k)), pairs, (1,) + (-1,) * (k - 1), (0,))
                    for i in range(0, len(rows), k)]


# --- the stages: each yields after a step (tokens, FLOPs, {part: seconds}) ------------------------


def flops(model, read, wanted, head=True):
    """Of one forward pass over `read`, [(tokens of a prompt, [tokens of each of its answers])]: 2
    for each weight of a block and token, a prompt once for all its answers, and the products of
    causal attention, of all positions in every block. `wanted`: the positions whose states are
    used; for the others no other weight of the last block is needed than those of keys and values.
    head: the vocabulary's, on the wanted ones.

    What is generated costs the same: the last token is never read, so an answer has R - 1.
    """
    c = model.config
    size = lambda blocks: sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    last = size(model.h[-1]) - 2 * c.n_kv_head * c.head_dim * c.n_embd
    tokens = sum(P + sum(answers) for P, answers in read)
    seen = sum(P * (P + 1) // 2 + sum(R * P + R * (R + 1) // 2 for R in answers)
               for P, answers in read)  # pairs of positions
    return (2 * size(model.h) * tokens - 2 * last * (tokens - wanted)
            + 4 * c.n_layer * c.n_head * c.head_dim * seen
            + head * 2 * c.n_embd * c.n_tokens * wanted)


def answers_of(elements, unread=0):
    """What `flops` takes for Elements, of whose answers the last `unread` tokens are not read."""
    return [(len(e.prompt), [int(n) - unread for n in e.facts("response")]) for e in elements]


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_step(model, optimizers, loss, config, step):
    """The end of a step, as it stands in the loops of pretrain.py, sft.py and reward.py."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    common.check_finite(config, step, loss=loss, grad_norm=norm)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def run_pretrain(config, work, model):
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2]
    given = pretrain.Config()
    optimizers = (common.adamw([model], given.lr, given.weight_decay, without=matrices),
                  pretrain.Muon(matrices, given.muon_lr, given.weight_decay))
    for step in range(config.steps + 1):
        T, rng = work.P + work.R, common.stream(config.seed, "bench", "rows", step)
        tokens = torch.from_numpy(rng.integers(0, work.size.n_tokens, (work.B, T))).to(work.device)
        with autocast(work.device):
            loss = text_loss(model, tokens)
        loss.backward()
        take_step(model, optimizers, loss.detach(), given, step)
        yield work.B * T, 3 * flops(model, [(0, [T - 1])] * work.B, work.B * (T - 1)), {}


def run_sft(config, work, model):
    rows, _ = make_data(config, work)
    given = common.sized(sft.Config(batch_size=work.B), "sft", model)
    optimizer, size = common.adamw([model], given.lr), given.micro_batch or work.B
    per_step = rows.facts["response"].sum() / len(rows) * work.B
    order = sft.epoch_order(rows, 0, given)
    for step in range(config.steps + 1):
        chosen = [rows[j] for j in order[step * work.B:(step + 1) * work.B]]
        loss_sum = torch.zeros((), device=work.device)
        for j in range(0, len(chosen), size):
            tokens, mask = (x.to(work.device) for x in collate(*zip(*chosen[j:j + size]),
                                                               work.tokenizer.pad))
            with autocast(work.device):
                loss = sft.sft_loss(token_logprobs(model, tokens, mask), mask)
            (loss / per_step).backward()
            loss_sum += loss.detach()
        take_step(model, [optimizer], loss_sum, given, step)
        read = [(mask.count(0), [mask.count(1) - 1]) for _, mask in chosen]
        scored = sum(mask.count(1) for _, mask in chosen)
        yield sum(len(ids) for ids, _ in chosen), 3 * flops(model, read, scored), {}


def run_reward(config, work, policy):
    _, elements = make_data(config, work)
    model = reward.RewardModel(work.size).to(work.device)
    model.gpt.compiled = config.compile
    model.gpt.load_state_dict(policy.state_dict())
    del policy
    given = common.sized(reward.Config(batch_size=work.B), "reward", model.gpt)
    optimizer = common.adamw([model], given.lr)
    order = reward.epoch_order(elements, 0, given)
    for step in range(config.steps + 1):
        batch = [elements[j] for j in order[step * work.B:(step + 1) * work.B]]
        tokens, mask = batch_rows(batch, work.tokenizer.pad, work.device)
        winners, losers = pair_indices(batch)
        scores = reward.score_batch(model.raw, tokens, mask, given.micro_batch)
        loss = reward.reward_loss(scores[winners], scores[losers])
        (loss / len(winners)).backward()
        take_step(model, [optimizer], loss.detach(), given, step)
        lengths = [len(ids) for e in batch for ids in e.rows]
        yield sum(lengths), 3 * flops(model.gpt, answers_of(batch), len(lengths), head=False), {}


def run_dpo(config, work, policy):
    _, elements = make_data(config, work)
    reference = twin(policy, work)
    given = common.sized(dpo.Config(batch_size=work.B), "dpo", policy)
    optimizer = common.adamw([policy], given.lr)
    order, average = dpo.epoch_order(elements, 0, given), dpo.per_step(elements, given)
    used = [elements[j] for j in order[:work.B * (config.steps + 1)]]
    dpo.set_reference(used, sequence_logprobs(reference, *all_rows(used), work.tokenizer.pad))
    for step in range(config.steps + 1):
        batch, others = dpo.batch_of(elements, order, step, given)
        dpo.update(policy, reference, optimizer, batch, others, average, given,
                   work.tokenizer.pad)
        lengths = [len(ids) for e in batch for ids in e.rows]
        scored = sum(int(e.facts("response").sum()) for e in batch)
        yield sum(lengths), 3 * flops(policy, answers_of(batch, 1), scored), {}


def twin(policy, work):
    """A frozen network with the same weights."""
    reference = GPT(work.size).to(work.device)
    reference.load_state_dict(policy.state_dict())
    return common.freeze(reference.eval())


def run_ppo(config, work, policy):
    reference, device = twin(policy, work), work.device
    reward_model = reward.RewardModel(work.size).to(device).eval()
    critic = ppo.ValueModel(reward_model)
    critic.gpt.compiled = config.compile
    common.freeze(reward_model)
    given = ppo.Config(batch_size=work.B, max_new_tokens=work.R, epochs=4, minibatches=1)
    given = common.sized(common.sized(given, "ppo", policy), "critic", reward_model.gpt)
    optimizers = [common.adamw([m], lr, eps=given.adam_eps)
                  for m, lr in ((policy, given.lr), (critic, given.critic_lr))]
    B, T, R = work.B, work.P + work.R, work.R
    read = [(work.P, [R - 1])] * B
    judged = flops(policy, [(work.P, [R])] * B, B, head=False)
    headless, passed = flops(policy, read, B * R, head=False), flops(policy, read, B * R)
    # generate, score, reference and critic, and forward and backward passes of policy and critic.
    # The old log-probabilities need no pass: with one minibatch they are those of the first epoch
    needed = passed + judged + passed + headless + given.epochs * 3 * (passed + headless)
    for step in range(config.steps + 1):
        clock = [now(device)]
        prompts, tokens, mask, finished = ppo.rollout(policy, work.prompts, work.tokenizer, given,
                                                      step)
        clock.append(now(device))
        with torch.no_grad():
            score = reward.score_batch(reward_model, tokens, mask, given.micro_batch)
        scored, finished = now(device), torch.ones_like(finished)  # or no score would be used
        batch = ppo.prepare(policy, critic, reference, tokens, mask, finished, score, given.beta,
                            given)
        common.check_finite(given, step, score=score, logp=batch["old_logp"])
        clock.append(now(device))
        ppo.update(policy, critic, reference, optimizers, batch, given.beta, given,
                   common.stream(config.seed, "bench", "order", step))
        clock.append(now(device))
        texts = [work.tokenizer.decode(t[m].tolist()) for t, m in zip(tokens.cpu(),
                                                                      mask.bool().cpu())]
        ppo.critic_metrics(batch)
        rollout_metrics(batch, [p for p, *_ in prompts], texts, given.beta, clock, False)
        yield B * T, needed, parts(clock, scored, now(device))


def run_grpo(config, work, policy):
    reference, device, B, T = twin(policy, work), work.device, work.B, work.P + work.R
    given = grpo.resolve(grpo.Config(batch_size=B, k=4 if B % 4 == 0 else 2, minibatches=1,
                                     max_new_tokens=work.R))
    given = common.sized(given, "grpo", policy)
    optimizer = common.adamw([policy], given.lr, eps=given.adam_eps)
    passed = flops(policy, [(work.P, [work.R - 1] * given.k)] * (B // given.k), B * work.R)
    needed = passed + passed + 3 * passed  # generated, the reference, forward and backward
    for step in range(config.steps + 1):
        clock = [now(device)]
        prompts, texts, tokens, mask, finished = grpo.rollout(policy, work.prompts, work.tokenizer,
                                                              given, step)
        clock.append(now(device))
        finished = torch.ones_like(finished)
        score = grpo.judge(None, prompts, texts, tokens, mask, finished, given)
        scored = now(device)
        batch = grpo.prepare(policy, reference, tokens, mask, finished, score, given)
        common.check_finite(given, step, score=score, logp=batch["old_logp"])
        clock.append(now(device))
        grpo.update(policy, optimizer, batch, given,
                    common.stream(config.seed, "bench", "order", step))
        clock.append(now(device))
        rollout_metrics(batch, [p for p, *_ in prompts], texts, given.beta, clock, False)
        yield B * T, needed, parts(clock, scored, now(device))


def parts(clock, scored, end):
    """{part: seconds} of an iteration; its log is what the stage computes for nothing else."""
    start, generated, prepared, trained = clock
    return dict(generate=generated - start, score=scored - generated, prepare=prepared - scored,
                train=trained - prepared, log=end - trained)


def run_generate(config, work, model):
    prompts = [ids for _, ids, _ in work.prompts]
    needed = flops(model, [(work.P, [work.R - 1])] * work.B, work.B * work.R)
    for step in range(config.steps + 1):
        draws = common.uniforms(config.seed, "bench", "answers", step, range(work.B), work.R)
        with autocast(work.device):
            generate(model, prompts, work.R, work.tokenizer.eos, 1.0, draws)
        yield work.B * work.R, needed, {}


def run_label(config, work, model):
    """The answers that label.py draws; who ranks them is not measured."""
    given, prompts = label.Config(), [ids for _, ids, _ in work.prompts]
    each = given.k + given.oversample
    needed = flops(model, [(work.P, [work.R - 1] * each)] * work.B, work.B * each * work.R)
    for step in range(config.steps + 1):
        batches.sample_texts(model, work.tokenizer, prompts, work.R,
                             partial(common.uniforms, config.seed, "bench", "answers", step),
                             given.temperature, batch_size=work.B * each, samples=each)
        yield work.B * each * work.R, needed, {}


STAGES = dict(pretrain=run_pretrain, sft=run_sft, reward=run_reward, ranking=run_reward,
              dpo=run_dpo, ppo=run_ppo, grpo=run_grpo, generate=run_generate, label=run_label)


# --- what the machine can do ----------------------------------------------------------------------


def fastest(fn, device, n=10):
    """Seconds of fn(), the least of n."""
    def once():
        start = now(device)
        fn()
        return now(device) - start
    return min(once() for _ in range(n))


def matrix_rate(device):
    """FLOP/s of a matrix product: bf16, 8192^3 on a GPU; fp32, 1024^3 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / fastest(lambda: a @ a, device)


def bandwidth(device):
    """Bytes a second that can be read, from 256 MiB on a CPU, 4 GiB on a GPU."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    return x.nbytes / fastest(x.sum, device)


def bytes_read(model, work, width):
    """Bytes that R steps of decoding have to read: all matrices each time, and the keys and values
    so far. width: bytes of a number."""
    c = model.config
    matrices = sum(p.numel() for p in model.h.parameters()) + c.n_tokens * c.n_embd
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * work.B
    return width * sum(matrices + cache * (work.P + t) for t in range(work.R))


# --- one run, or two in turn ----------------------------------------------------------------------


def make_work(config):
    """What is done in a step, in which sizes. UserError for a name that is none."""
    for name, known in dict(stage=STAGES, size=SIZES, lengths=("full", "real")).items():
        if getattr(config, name) not in known:
            raise UserError(f"--{name}={getattr(config, name)}: choose one of {', '.join(known)}")
    if config.lengths == "real" and config.stage not in ANSWERS:
        raise UserError(f"--lengths=real needs one of --stage={', '.join(ANSWERS)}")
    B, P, R = WORK[config.size]
    if config.size == "smollm2" and config.stage == "generate":
        B = 16
    return SimpleNamespace(size=SIZES[config.size], B=config.batch_size or B,
                           P=config.prompt or P, R=config.new or R)


def measure(config):
    """The fields of the line that is printed."""
    work, device = make_work(config), common.set_up(config, "bench")
    work.device = device
    if config.init:
        model, _, _ = common.load_policy(config.init, (*common.POLICIES, "pretrain"), device)
        work.size = model.config
    else:
        model = GPT(work.size).to(device).eval()
    model.compiled = config.compile
    if work.P + work.R > work.size.block_size:
        raise UserError(f"--prompt and --new: {work.P} + {work.R} tokens are over the context of "
                        f"{work.size.block_size}")
    pad, rng = work.size.n_tokens, common.stream(config.seed, "bench", "prompts")
    lengths = draw_lengths(config, work)
    # PAD for EOS: it is never drawn, so every answer has R tokens
    work.tokenizer = SimpleNamespace(eos=pad, pad=pad, decode=lambda ids: " ".join(map(str, ids)))
    work.prompts = [("", rng.integers(0, pad, work.P).tolist(), "1") for _ in range(work.B)]
    params, width = model.num_params(), 2 if device.type == "cuda" else 4  # bf16 under autocast
    read = bytes_read(model, work, width)
    steps, seconds, tokens, needed, shares = STAGES[config.stage](config, work, model), [], 0, 0, {}
    del model  # the stage has it, and may let it go
    next(steps)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(config.steps):
        start = now(device)
        n, count, times = next(steps)
        seconds.append(now(device) - start)
        tokens, needed = tokens + n, needed + count
        for name, value in times.items():
            shares[name] = shares.get(name, 0) + value
    after = resource.getrusage(resource.RUSAGE_SELF)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        after.ru_maxrss * 1024  # before what follows needs memory
    step = float(np.median(seconds))
    # steps of one length take one time, so that of the median; else they weigh by their tokens
    rate = tokens / config.steps / step if config.lengths == "full" else tokens / sum(seconds)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    products = matrix_rate(device)
    row = dict(stage=config.stage, size=config.size, lengths=config.lengths, params=params,
               B=work.B, P=round(lengths[:, 0].mean()), R=round(lengths[:, 1:].mean()),
               s_per_step=step, tok_per_s=rate,
               peak_mib=peak / 2**20, mfu=needed / tokens * rate / products,
               sys=system / (user + system), matrix_gflops=products / 1e9,
               device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
               threads=torch.get_num_threads())
    row |= {name: value / sum(seconds) for name, value in shares.items()}
    if config.stage == "generate":
        row["bandwidth_share"] = read / bandwidth(device) / step
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in row.items()}


def compare(config):
    """Ours and the peer, each as a process of its own, in turn: their lines, and the medians of the
    rounds: how many times as fast ours is, and which share of the peer's memory it takes."""
    if config.stage not in PEERS or config.init:
        raise UserError(f"--peer=true needs one of --stage={', '.join(PEERS)}, and no --init")
    speed, memory = [], []
    for n in range(config.rounds):
        mine = replace(config, seed=config.seed + n, peer=False)
        work = make_work(mine)
        flags = [f"--{k}={cli.as_text(v)}" for k, v in asdict(mine).items() if v != ""]
        task = dict(stage=mine.stage, model=asdict(work.size), B=work.B, P=work.P, R=work.R,
                    lengths=draw_lengths(mine, work)[:work.B * (mine.steps + 1)].tolist(),
                    nanochat=mine.nanochat, precompute=mine.precompute)
        lines = []
        for command in ([__file__, *flags], [PEER_SCRIPT, json.dumps(task)]):
            output = subprocess.run([sys.executable, *command], check=True, text=True,
                                    env=ENVIRONMENT, stdout=subprocess.PIPE).stdout
            output = output.splitlines()[-1]
            print(output, flush=True)
            lines.append(json.loads(output))
        ours, theirs = lines
        speed.append(ours["tok_per_s"] / theirs["tok_per_s"])
        memory.append(ours["peak_mib"] / theirs["peak_mib"])
    return dict(stage=config.stage, size=config.size, lengths=config.lengths,
                peer=theirs["peer"], rounds=config.rounds, speed=round(float(np.median(speed)), 3),
                memory=round(float(np.median(memory)), 3), speeds=[round(x, 3) for x in speed])


def main(config):
    print(json.dumps(compare(config) if config.peer else measure(config)))


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
