"""Stage 0, pretraining: a language model of plain text, the base of all that follows.

    L = - sum_t log p(x_t | x_<t) / number of tokens          next token, every token counts

The result continues text. It does not answer: asked a question it writes more questions.

    python pretrain.py                                  # the embedded data, about two minutes
    python pretrain.py --data=books.txt --tokenizer=gpt2 --n_layer=12 --n_head=12 --n_embd=768 ...
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "synthetic"  # "synthetic", a text file, or a JSON file of records
    out: str = "out/pretrain"  # output folder
    init: str = "none"  # checkpoint to go on from; "none" starts from random weights
    tokenizer: str = "synthetic"  # "synthetic" or "gpt2"
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    # --- size of the model, here and nowhere else
    n_layer: Positive[int] = 4  # model size, here and nowhere else; with --init that of the model
    n_head: Positive[int] = 4
    n_embd: Positive[int] = 128
    block_size: Positive[int] = 72  # tokens of context, all of them trained; for every later stage
    dropout: NotNegative[float] = 0.0
    dialect: str = "gpt2"  # "gpt2", or "llama": rotary positions, RMSNorm, SwiGLU, no biases
    # --- training
    steps: Positive[int] = 1100  # optimiser steps
    batch_size: Positive[int] = 27  # sequences a step, of block_size predictions each
    micro_batch: NotNegative[int] = 0  # sequences a forward pass; 0 takes the whole batch
    lr: Positive[float] = 5e-3  # AdamW's peak (embeddings, biases, gains); then cosine to 0
    muon_lr: Positive[float] = 0.02  # Muon's peak (the matrices of the blocks)
    warmup: NotNegative[int] = 30  # steps
    weight_decay: NotNegative[float] = 0.1
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    documents: Positive[int] = 60000  # embedded data: documents to write
    eval_every: Positive[int] = 250  # steps between validation losses and saved states


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import math
import time
from functools import partial

import numpy as np
import torch

import common
from cli import progress, say, shorten, table
from data import batches
from data.records import Split
from data.synthetic.gold import gold_reward
from data.synthetic.world import sample_prompts
from data.text import text_rows
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig, autocast, text_loss


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: each matrix moves by about the same amount in all directions.

    With M the (Nesterov) momentum of the gradient, W <- W - lr sqrt(max(1, rows / columns)) U V^T
    where M = U S V^T (Jordan et al. 2024). U V^T is approximated by Newton-Schulz steps: each
    applies an odd polynomial to the singular values that pulls them all towards 1. For the same
    text it leaves a lower loss than AdamW, and here the compute is what is short. For the matrices
    inside the blocks only; embeddings, biases and gains stay with AdamW. torch.optim.Muon does the
    same in bf16, which most CPUs are slow at.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        shapes = sorted({p.shape for p in matrices})  # a group for each, worked on as one batch
        groups = [dict(params=[p for p in matrices if p.shape == shape]) for shape in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            step = orthogonal(grad.lerp(state["momentum"], group["momentum"]))
            scale = group["lr"] * max(1, grad.size(1) / grad.size(2)) ** 0.5
            for p, u in zip(params, step):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=scale)


def orthogonal(m, steps=5):
    """(n, rows, columns) -> about U V^T for each m = U S V^T: singular values 0.7 to 1.2.

    In full fp32 also where other products run in TF32: the polynomial of the Gram matrix magnifies
    the rounding of its small eigenvalues, and the direction would be wrong by 7% and more.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return newton_schulz(m, steps)
    finally:
        torch.set_float32_matmul_precision(before)


def newton_schulz(m, steps):
    wide = m.size(1) <= m.size(2)
    x = m if wide else m.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values at most 1
    gram, total = x @ x.mT, None  # the smaller square: the long side is touched twice, not always
    for _ in range(steps):
        p = 2.0315 * gram @ gram - 4.7750 * gram
        p.diagonal(dim1=1, dim2=2).add_(3.4445)  # x <- p x, so gram <- p gram p
        gram, total = p @ gram @ p, p if total is None else p @ total
    return total @ x if wide else (total @ x).mT


# SwiGLU has three matrices where GELU has two: 8/3 of the width make as many numbers
LLAMA = dict(rope_theta=10000.0, norm="rms", mlp="swiglu", bias="none")


def main(config):
    device = common.set_up(config, "pretrain")

    # --- model and data ------------------------------------------------------
    parents = {}
    if config.dialect not in ("gpt2", "llama"):
        raise UserError(f"--dialect={config.dialect}: choose gpt2 or llama")
    if config.init == "none":
        tokenizer = load_tokenizer(config.tokenizer)
        try:
            size = GPTConfig(tokenizer.vocab_size, tokenizer.n_tokens, config.block_size,
                             config.n_layer, config.n_head, config.n_embd, config.dropout,
                             **(LLAMA | dict(n_hidden=round(config.n_embd / 3) * 8)
                                if config.dialect == "llama" else {}))
        except ValueError as error:
            raise UserError(str(error)) from None
        model = GPT(size).to(device)
    else:
        model, tokenizer, parent = common.load_policy(config.init, ("pretrain",), device)
        parents = dict(pretrain=parent["hash"])
    common.prepare_blocks(config, model)
    # the whole context: a later stage that grows longer must not meet a position never trained
    rows = text_rows(config.data, tokenizer, model.config.block_size + 1, config.documents,
                     config.seed, config.skip_bad)
    n = max(1, min(256, len(rows) // 50))
    data = Split(rows[:-n], rows[-n:].to(device))
    common.say_warmup(config.steps, config.warmup)
    run = common.Run("pretrain", config, device, parents)
    print(f"{model.num_params():,} parameters\n{data.train.numel():,} tokens of {config.data} text "
          f"in rows of {data.train.shape[1]}, {len(data.held_out)} rows held out")

    @torch.no_grad()
    def validation_loss(step):
        model.eval()
        with autocast(device):
            parts = batches.share(data.held_out.split(config.batch_size))
            total = sum(text_loss(model, rows).item() * len(rows)
                        for rows in progress(parts, "held-out loss"))
        total = common.total(torch.tensor(total, dtype=torch.double)).item()
        common.check_finite(config, step, held_out_loss=total)
        return total / len(data.held_out)

    # --- training loop -------------------------------------------------------
    # the matrices of the blocks go to Muon, the rest (embeddings, biases, gains) to AdamW
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2]
    adamw = common.adamw([model], config.lr, config.weight_decay, without=matrices)
    muon = Muon(matrices, config.muon_lr, config.weight_decay)
    micro_batch = config.micro_batch or config.batch_size
    first = run.load_state(model=model, adamw=adamw, muon=muon).get("step", 0)

    def save(step):
        run.save_state(step, config.steps, model=model, adamw=adamw, muon=muon)

    bar = progress(range(first, config.steps), "pretrain", initial=first, total=config.steps)
    for step in bar:
        # first, so that no state is saved whose loss is not finite
        held_out = validation_loss(step) if step % config.eval_every == 0 else None
        if run.due(step, config.eval_every):
            save(step)
        if held_out is not None:
            run.log("validation", step=step, loss=held_out)
        start = time.perf_counter()
        model.train()
        factor = common.cosine(step, config.steps, config.warmup)
        common.set_lr(adamw, config.lr * factor)
        common.set_lr(muon, config.muon_lr * factor)
        # the batch depends on seed and step alone, so a resumed run reads what it would have read
        rng = common.stream(config.seed, "pretrain", "rows", step)
        tokens = data.train[rng.integers(0, len(data.train), config.batch_size)].to(device)
        count, loss_sum = tokens[:, 1:].numel(), torch.zeros((), device=device)
        mine = batches.share(tokens)
        for j in range(0, len(mine), micro_batch):
            part = mine[j:j + micro_batch]
            with autocast(device):
                # a mean over its tokens; all rows are of one length, so it counts by its rows
                loss = text_loss(model, part) * len(part) / len(tokens)
            loss.backward()
            loss_sum = loss_sum + loss.detach()
        common.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        common.check_finite(config, step, loss=loss_sum, grad_norm=norm)
        adamw.step()
        muon.step()
        model.zero_grad(set_to_none=True)
        # --- log: nothing from here on changes the weights -------------------
        if step % 10 == 0 or step + 1 == config.steps:
            value, seconds = common.total(loss_sum).item(), time.perf_counter() - start
            run.log(step=step, loss=value, lr=config.lr * factor, grad_norm=norm.item(),
                    tok_per_s=count / seconds)
            bar.set_postfix(loss=f"{value:.3f}", tok_per_s=f"{count / seconds:.0f}")

    save(config.steps)

    # --- what it can do ------------------------------------------------------
    metrics = dict(loss=validation_loss(config.steps))
    common.check_finite(config, config.steps, perplexity=torch.tensor(metrics["loss"]).exp())
    metrics["perplexity"] = math.exp(metrics["loss"])
    run.watch("the loss is worse than that of guessing: lower --lr and --muon_lr",
              metrics["loss"] > math.log(model.config.n_tokens), 1)
    model.eval()
    if config.data == "synthetic":
        metrics.update(base_gold(model, tokenizer, config, run))
    run.save_model(model, tokenizer, metrics)
    say(f"\nHeld-out loss {metrics['loss']:.3f} nats a token, perplexity "
        f"{metrics['perplexity']:.2f}"
        + (f"; gold of the continuations {metrics['gold']:.2f}" if "gold" in metrics else ""))
    run.finish(metrics, f"python sft.py --init={config.out}"
               + ("" if config.data == "synthetic" else " --data=DEMONSTRATIONS.jsonl"))


def base_gold(model, tokenizer, config, run, n=512):
    """Gold reward of what the base model writes after held-out prompts given as plain text."""
    prompts = sample_prompts(n, held_out=True, seed=0)
    prompts = [p for p in prompts
               if len(tokenizer.encode(p.text)) + 49 <= model.config.block_size]
    if not prompts:
        return {}
    ids = [[tokenizer.eos, *tokenizer.encode(p.text)] for p in prompts]
    samples = batches.sample_texts(model, tokenizer, ids, 48, partial(
        common.uniforms, config.seed, "pretrain", "samples", 0), bar="samples")
    gold = [gold_reward(p.text, s["text"]) for p, s in zip(prompts, samples)]
    say(table({"prompt": [shorten(p.text, 40) for p in prompts[:3]],
               "continuation": [shorten(s["text"], 100) for s in samples[:3]]}))
    for p, s, g in list(zip(prompts, samples, gold))[:8]:
        run.log("sample", family=p.family, prompt=p.text, response=s["text"], gold=g)
    ended = [s["finished"] for s in samples]
    return dict(gold=float(np.mean(gold)), eos_rate=float(np.mean(ended)))


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
