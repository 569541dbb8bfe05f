"""Stage 1, supervised fine-tuning: cross-entropy on the tokens of the response.

    L_SFT = - sum_{t in response} log p(y_t | x, y_<t) / response tokens of an average batch

The prompt is conditioned on, never scored; EOS is part of the response, so the model learns to
stop. Every assistant turn of a dialogue is scored.

    python sft.py                                            # the embedded data
    python sft.py --data=out/data/alpaca.jsonl --init=...    # any file of demonstrations

    {"prompt": P, "completion": text}       # a demonstration; P is text or a list of turns
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    # --- data and models
    data: str = "synthetic"  # "synthetic" or a file of demonstrations
    out: str = "out/sft"  # output folder
    init: str = "out/pretrain"  # checkpoint to start from
    demos: Positive[int] = 6000  # embedded data: number of demonstrations
    quality: NotNegative[float] = 0.5  # embedded data: of the contractors, 0 careless, 1 careful
    safety: NotNegative[float] = 1.0  # embedded data: share kept of those on harmful prompts
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    # --- training
    epochs: Positive[int] = 3
    pretrain_mix: NotNegative[float] = 0.5  # weight of the loss on half as many rows of text
    pretrain_data: str | None = None  # the text: a text or JSON file; auto: that of embedded data
    text_length: Positive[int] | None = None  # tokens of its rows
    batch_size: Positive[int] = 32  # dialogues a step
    micro_batch: NotNegative[int] | None = None  # dialogues a forward pass; 0 takes the whole batch
    lr: Positive[float] | None = None  # peak; warm-up, then cosine to 0
    warmup: NotNegative[int] | None = None  # steps
    weight_decay: NotNegative[float] = 0.0
    grad_clip: Positive[float] = 1.0
    checkpointing: bool = False  # compute activations again: less memory, a third more time
    compile: bool = False  # blocks by torch.compile: for long runs on a GPU
    # --- looking and saving
    max_new_tokens: Positive[int] | None = None  # of the samples that are looked at
    samples: Positive[int] = 512  # how many of them
    save_every: Positive[int] = 100  # steps between saved states


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import math
import time
from functools import partial

import numpy as np
import torch

import common
from cli import plus_minus, progress, say, shorten, table
from data import batches
from data.instruments import clustered_se
from data.records import Split, check_demonstration, collate, demonstration_rows, fits, question
from data.synthetic.gold import gold_reward
from data.synthetic.people import demonstrations
from data.synthetic.world import sample_prompts
from data.text import text_rows
from data.tokens import encode_rows, read_tokens
from model import autocast, token_logprobs


def sft_loss(logp, response_mask):
    """- sum of the log-probabilities of the response tokens (InstructGPT, section 3.1).

    logp (B, T), nats per token; response_mask (B, T). Returns a scalar, a SUM in nats: the caller
    divides by the response tokens of an average step. Texts that write a mean per example first
    weigh a token of a short answer more than one of a long answer; we do not. A mean per step would
    do the same, where the rows of a step are of like length.
    """
    return -(logp * response_mask).sum()


def load_data(config, tokenizer, block_size):
    """A Split of Rows, one a dialogue; the masks are 1 on every assistant turn, EOS included."""
    if config.data == "synthetic":
        rng = common.stream(config.seed, "sft", "safety")
        prompts = [p for p in sample_prompts(config.demos, held_out=False, seed=config.seed)
                   if p.family != "harmful" or rng.random() < config.safety]
        asked = sample_prompts(512, held_out=True, seed=0)
        sides = Split(demonstrations(prompts, config.seed, config.quality),
                      demonstrations(asked, 0, config.quality))
        sides = sides.each(lambda _, records: encode_rows(
            tokenizer, map(check_demonstration, records), demonstration_rows))
    else:
        rows = read_tokens(config.data, check_demonstration, demonstration_rows, tokenizer,
                           skip_bad=config.skip_bad)
        sides = Split(rows.side(False), rows.side(True))

    def fitting(name, rows):
        rows = rows.select(fits(f"{name} dialogues", rows.lengths, block_size))
        if not len(rows):
            raise UserError(f"--data={config.data}: no {name} dialogue fits the context of "
                            f"{block_size} tokens")
        return rows

    return sides.each(fitting)


def epoch_order(train, epoch, config):
    """The dialogues of an epoch as indices, those of a batch of like length."""
    return batches.like_length(train.lengths, config.batch_size,
                               common.stream(config.seed, "sft", "order", epoch))


def main(config):
    device = common.set_up(config, "sft")
    common.ensure_input(config, "init", "pretrain")

    # --- model and data ------------------------------------------------------
    model, tokenizer, parent = common.load_policy(config.init, common.STARTS, device)
    config = common.sized(config, "sft", model)
    common.prepare_blocks(config, model)
    data = load_data(config, tokenizer, model.config.block_size)
    text = None  # rows of pretraining text, or None
    source = config.pretrain_data or ("synthetic" if config.data == "synthetic" else None)
    if config.pretrain_mix > 0 and source:
        text = text_rows(source, tokenizer, min(config.text_length, model.config.block_size), 20000,
                         config.seed, config.skip_bad)
    # prompts that samples are drawn for, to see what the loss does not show
    if config.data == "synthetic":
        asked = [(p.text, tokenizer.encode_prompt(p.text))
                 for p in sample_prompts(config.samples, held_out=True, seed=0)]
    else:
        ids = [row[:mask.index(1)] for row, mask in data.held_out.choose(config.samples)]
        asked = [(tokenizer.decode(i), i) for i in ids]
    room = model.config.block_size - config.max_new_tokens
    asked = [asked[n] for n in fits("prompts to sample on", [len(i) for _, i in asked], room)]
    if not asked:
        raise UserError(f"--max_new_tokens={config.max_new_tokens}: no held-out prompt leaves "
                        f"that much room in the context of {model.config.block_size}")
    texts, ids = zip(*asked)
    steps_per_epoch = -(-len(data.train) // config.batch_size)
    steps = config.epochs * steps_per_epoch
    tokens_per_step = data.train.facts["response"].sum() / steps_per_epoch
    common.say_warmup(steps, config.warmup)
    run = common.Run("sft", config, device, {parent["stage"]: parent["hash"]})
    print(f"{model.num_params():,} parameters\n{len(data.train):,} dialogues of {config.data}, "
          f"{len(data.held_out)} held out; text mixed in: {source if text is not None else 'none'}")

    def batch(rows):
        tokens, mask = collate(*zip(*rows), tokenizer.pad)
        return tokens.to(device), mask.to(device)

    @torch.no_grad()
    def validate(epoch):
        """Held-out loss per token and, on the embedded data, gold reward of fresh samples."""
        model.eval()
        logp = batches.over_rows(
            lambda tokens, mask: token_logprobs(model, tokens, mask).sum(1), data.held_out.ids,
            data.held_out.masks, tokenizer.pad, device, bar="held-out loss")
        common.check_finite(config, f"after epoch {epoch}", held_out_loss=logp)
        metrics = dict(epoch=epoch,
                       loss=-logp.sum().item() / int(data.held_out.facts["response"].sum()))
        samples = batches.sample_texts(
            model, tokenizer, ids, config.max_new_tokens,
            partial(common.uniforms, config.seed, "sft", "samples", epoch), bar="samples")
        metrics["eos_rate"] = float(np.mean([s["finished"] for s in samples]))
        metrics["length"] = float(np.mean([len(s["ids"]) for s in samples]))  # tokens
        gold = None
        if config.data == "synthetic":
            gold = [gold_reward(t, s["text"]) for t, s in zip(texts, samples)]
            metrics["gold"] = float(np.mean(gold))
            metrics["gold_se"] = clustered_se(gold, [question(t) for t in texts])
        for i in range(min(8, len(texts))):
            run.log("sample", epoch=epoch, prompt=texts[i], response=samples[i]["text"],
                    gold=gold and gold[i])
        run.log("validation", **metrics)
        if epoch > 0:
            run.watch(f"hardly any sample ends, below 5% before --max_new_tokens="
                      f"{config.max_new_tokens}: raise it, or train for more --epochs",
                      metrics["eos_rate"] < 0.05, 1)
            run.watch("the loss is worse than that of guessing: lower --lr",
                      metrics["loss"] > math.log(model.config.n_tokens), 1)
        say(f"epoch {epoch}: held-out loss {metrics['loss']:.3f} nats a token, "
            f"{metrics['eos_rate']:.1%} of samples end, after {metrics['length']:.1f} tokens"
            + (f", gold {plus_minus(metrics['gold'], metrics['gold_se'])}" if "gold" in metrics
               else ""))
        say(table({"prompt": [shorten(t, 60, end=True) for t in texts[:3]],  # behind a template
                   f"sample after epoch {epoch}": [shorten(s["text"], 100)
                                                   for s in samples[:3]]}) + "\n")
        return metrics

    # --- training loop -------------------------------------------------------
    optimizer = common.adamw([model], config.lr, config.weight_decay)
    micro_batch = config.micro_batch or config.batch_size
    state = run.load_state(model=model, optimizer=optimizer)

    def save(step):
        run.save_state(step, steps, model=model, optimizer=optimizer, metrics=metrics)

    first, metrics = state.get("step", 0), state.get("metrics") or validate(0)
    bar = progress(range(first, steps), "sft", initial=first, total=steps)
    for step in bar:
        start = time.perf_counter()
        if run.due(step, config.save_every):
            save(step)
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == first:
            order = epoch_order(data.train, epoch, config)
        chosen = [data.train[j]
                  for j in order[i * config.batch_size:(i + 1) * config.batch_size]]
        lr = config.lr * common.cosine(step, steps, config.warmup)
        common.set_lr(optimizer, lr)
        mine, loss_sum = batches.share(chosen), torch.zeros((), device=device)
        for j in range(0, len(mine), micro_batch):
            tokens, mask = batch(mine[j:j + micro_batch])
            with autocast(device):
                loss = sft_loss(token_logprobs(model, tokens, mask), mask)
            (loss / tokens_per_step).backward()
            loss_sum = loss_sum + loss.detach()
        if text is not None:
            # what small models forget while they learn the demonstrations is how to use what they
            # know on questions that were not demonstrated (InstructGPT mixes in 10% before PPO)
            rows = common.stream(config.seed, "sft", "text", step).integers(
                0, len(text), max(1, config.batch_size // 2))
            mix = batches.text_share(model, text[rows])
            (config.pretrain_mix * mix).backward()
        common.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        common.check_finite(config, step, loss=loss_sum, grad_norm=norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # --- log: nothing from here on changes the weights -------------------
        if step % 10 == 0:
            count = sum(sum(mask) for _, mask in chosen)  # response tokens of this step
            loss_sum, seconds = common.total(loss_sum), time.perf_counter() - start
            value = loss_sum.item() / count
            run.log(step=step, loss=value, lr=lr, grad_norm=norm.item(), tok_per_s=count / seconds)
            bar.set_postfix(loss=f"{value:.3f}")
        if i + 1 == steps_per_epoch:
            metrics = validate(epoch + 1)
            run.save_model(model, tokenizer, metrics, f"model-epoch{epoch + 1}.pt")
    save(steps)

    # The last epoch is the default: the loss is best after an earlier one, gold after the last.
    run.save_model(model, tokenizer, metrics)
    run.finish(metrics, f"python label.py --init={config.out}" if config.data == "synthetic" else
               f"python reward.py --init={config.out} --data=PAIRS.jsonl")


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
