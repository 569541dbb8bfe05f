"""Naive twins: every stage once more, as plainly as it can be said.

A second implementation of each stage's whole run, written to be read beside it and to disagree with
it wherever one of the two is wrong (test_naive.py compares them). One row at a time; no batches, no
padding, no cache, no micro-batches; attention head by head; the optimisers by their formulas. It
takes the Config of a stage and its input files, and returns the final weights, the rows of the log
and the final row. Speed is nothing here: at the size of the tests a run takes a second.

What it shares with the product: the embedded world (prompts, documents, contractors, gold reward),
the principles of its rule judge, the tokenizer's encode and decode, the reading of a number at the
end of a text, the tables of what each loss and method stands for, and the classes that draw the
first random weights. All else is written again. Random streams are part of the contract: each line
that draws says from which.

Reading order: the network, the optimisers, sampling, data; then a function a stage, each shorter
than its script: pretrain, sft, label, reward, compare and evaluate, dpo, ppo, grpo.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from data.synthetic import facts
from data.synthetic.corpus import documents
from data.synthetic.gold import gold_reward, sentences
from data.synthetic.people import demonstrations
from data.synthetic.principles import PRINCIPLES
from data.synthetic.world import FAMILIES, lookup, sample_prompts
from data.tokenizer import load_tokenizer
from data.verifier import final_answer
from grpo import METHODS
from model import GPT, GPTConfig
from reward import RewardModel

DATA = Path(__file__).parents[1] / "data"

# --- the network, one row at a time --------------------------------------------------------------


class Network:
    """A transformer as a dict of weights. prefix: "gpt." inside a reward model or a critic."""

    def __init__(self, weights, size, prefix=""):
        self.w = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        self.size, self.prefix, self.seen = size, prefix, None

    def __getitem__(self, name):
        return self.w[self.prefix + name]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self[name + ".weight"] + self[name + ".bias"]

    def linear(self, x, name):
        return x @ self[name + ".weight"].T + self[name + ".bias"]

    def hidden(self, ids):
        """ids, a list of T -> hidden states (T, C)."""
        T, n_head = len(ids), self.size["n_head"]
        future = torch.ones(T, T).triu(1).bool()
        x = self["wte.weight"][ids] + self["wpe.weight"][:T]
        if self.seen is not None:
            x = x + self.seen  # zeros, whose gradient is that of the embeddings
        for n in range(self.size["n_layer"]):
            qkv = self.linear(self.norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn").chunk(3, 1)
            heads = []
            for q, k, v in zip(*(part.chunk(n_head, 1) for part in qkv)):
                scores = q @ k.T / math.sqrt(q.shape[1])
                heads.append(scores.masked_fill(future, -math.inf).softmax(1) @ v)
            x = x + self.linear(torch.cat(heads, 1), f"h.{n}.attn.c_proj")
            y = self.linear(self.norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + self.linear(y, f"h.{n}.mlp.c_proj")
        return self.norm(x, "ln_f")

    def all_logp(self, ids, temperature=1.0):
        """log p(. | ids[:t]) for t = 1..T-1 and all real tokens, (T - 1, V): row t - 1 predicts t.
        """
        logits = self.hidden(ids[:-1]) @ self["wte.weight"][:self.size["n_tokens"]].T / temperature
        return logits - logits.logsumexp(1, keepdim=True)

    def logp(self, row, temperature=1.0):
        """log p of the tokens that the row's mask marks, each given all before it: a vector."""
        ids, mask = row
        every = self.all_logp(ids, temperature)
        return torch.stack([every[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]])

    def score(self, row):
        """A reward model's raw score, read at the last marked token."""
        ids, mask = row
        last = max(t for t in range(len(ids)) if mask[t])
        return self.hidden(ids)[last] @ self.w["head.weight"][0] + self.w["head.bias"][0]

    def values(self, row):
        """A critic's value of every marked token, read one position before it."""
        ids, mask = row
        every = self.hidden(ids) @ self.w["head.weight"][0] + self.w["head.bias"][0]
        return torch.stack([every[t - 1] for t in range(1, len(ids)) if mask[t]])

    def state(self):
        return {name: w.detach().clone() for name, w in self.w.items()}


def load(path, score_by="mean"):
    """(Network, checkpoint, tokenizer) of a folder's model.pt or of a file; a reward model comes as
    Members, of one or of several."""
    path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    c = torch.load(path, weights_only=True)
    n = c["config"].get("ensemble", 1) if c["stage"] == "reward" else 1
    if n > 1:
        network = Members([Network({k.removeprefix(f"members.{m}."): w for k, w in
                                    c["weights"].items() if k.startswith(f"members.{m}.")},
                                   c["model"], "gpt.") for m in range(n)], score_by)
    elif c["stage"] == "reward":
        network = Members([Network(c["weights"], c["model"], "gpt.")])
    else:
        network = Network(c["weights"], c["model"])
    return network, c, load_tokenizer(c["tokenizer"])


# --- optimisers and schedules --------------------------------------------------------------------


class AdamW:
    """Loshchilov and Hutter 2019; betas 0.9 and 0.95; matrices decay, vectors do not."""

    def __init__(self, weights, lr, decay=0.0, eps=1e-8):
        self.weights, self.lr, self.decay, self.eps, self.n = weights, lr, decay, eps, 0
        self.m = [torch.zeros_like(w) for w in weights]
        self.v = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, factor):
        self.n += 1
        lr = self.lr * factor
        for w, m, v in zip(self.weights, self.m, self.v):
            m.copy_(0.9 * m + 0.1 * w.grad)
            v.copy_(0.95 * v + 0.05 * w.grad**2)
            if w.dim() >= 2:
                w -= lr * self.decay * w
            w -= lr * (m / (1 - 0.9**self.n)) / ((v / (1 - 0.95**self.n)).sqrt() + self.eps)


class Muon:
    """Jordan et al. 2024: Nesterov momentum 0.95, its singular values all pulled towards 1."""

    def __init__(self, weights, lr, decay):
        self.weights, self.lr, self.decay = weights, lr, decay
        self.m = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, factor):
        lr = self.lr * factor
        for w, m in zip(self.weights, self.m):
            m.copy_(0.95 * m + 0.05 * w.grad)
            ahead = 0.95 * m + 0.05 * w.grad
            u, s, v = torch.linalg.svd(ahead / (ahead.norm() + 1e-7), full_matrices=False)
            for _ in range(5):  # Newton-Schulz, on the singular values themselves
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            rows, columns = w.shape
            w -= lr * self.decay * w
            w -= lr * math.sqrt(max(1, rows / columns)) * (u * s) @ v


def clip(weights, limit):
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before."""
    norm = math.sqrt(sum((w.grad**2).sum().item() for w in weights))
    for w in weights:
        w.grad *= min(1.0, limit / (norm + 1e-6))
    return norm


def clear(*networks):
    for network in networks:
        for w in network.w.values():
            w.grad = None


def cosine(step, steps, warmup):
    """Up in a line over the warm-up (at most a tenth), then down to 0 along half a cosine."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def linear(step, steps, warmup):
    """Up in a line over the warm-up (at most a tenth), times a line from 1 down to a tenth."""
    warmup = min(warmup, steps // 10)
    return min(1, (step + 1) / max(warmup, 1)) * (1 - 0.9 * step / steps)


# --- sampling ------------------------------------------------------------------------------------


def number(seed, stage, purpose, step=0):
    """The seed of the random stream that these four name."""
    digest = hashlib.sha256(repr((seed, stage, purpose, step)).encode()).hexdigest()
    return int(digest[:15], 16)


def stream(*name):
    return np.random.default_rng(number(*name))


@torch.no_grad()
def sample(network, prompt, limit, eos, temperature, random):
    """A response to the prompt: (its ids, ended by itself?).

    A token is the first at which the sum of the probabilities so far, in double precision, exceeds
    a number u in [0, 1). `limit` of these are drawn for every response, also where it ends before.
    """
    row = list(prompt)
    for u in random.random(limit):
        p = network.all_logp([*row, 0], temperature)[-1].exp().double()
        row.append(int((p.cumsum(0) <= u * p.sum()).sum()))
        if row[-1] == eos:
            break
    return row[len(prompt):], row[-1] == eos


def sample_many(network, tokenizer, prompts, limit, name, temperature=1.0, samples=1, first=0):
    """`samples` responses to each prompt, one after the other; each prompt draws from a stream of
    its own. name: seed, stage, purpose, step; first: the number of the first prompt."""
    found = []
    for n, prompt in enumerate(prompts):
        random = stream(*name[:3], (name[3], first + n))
        found += [sample(network, prompt, limit, tokenizer.eos, temperature, random)
                  for _ in range(samples)]
    return [dict(ids=ids, text=tokenizer.decode(ids), finished=end) for ids, end in found]


# --- data ----------------------------------------------------------------------------------------


def prompt_ids(tokenizer, prompt):
    """<|role|> text for every turn, EOS behind the assistant's, and <|assistant|> at the end."""
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    ids = []
    for turn in turns:
        ids.append(tokenizer.specials[f"<|{turn['role']}|>"])
        ids.extend(tokenizer.encode(turn["content"]))
        if turn["role"] == "assistant":
            ids.append(tokenizer.eos)
    return ids + [tokenizer.specials["<|assistant|>"]]


def answer_row(tokenizer, prompt, answer):
    """(ids, mask) of a prompt and a complete answer."""
    head, tail = prompt_ids(tokenizer, prompt), [*tokenizer.encode(answer), tokenizer.eos]
    return head + tail, [0] * len(head) + [1] * len(tail)


def dialogue_row(tokenizer, messages):
    """(ids, mask) of a dialogue: every assistant turn is marked, its EOS included."""
    ids, mask = [], []
    for turn in messages:
        text = tokenizer.encode(turn["content"])
        if turn["role"] == "assistant":
            text = [*text, tokenizer.eos]
        ids += [tokenizer.specials[f"<|{turn['role']}|>"], *text]
        mask += [0] + [int(turn["role"] == "assistant")] * len(text)
    return ids, mask


def messages_of(record):
    if "messages" in record:
        return record["messages"]
    turns = [dict(role="user", content=record["prompt"])] \
        if isinstance(record["prompt"], str) else record["prompt"]
    return [*turns, dict(role="assistant", content=record["completion"])]


def prompt_of(record):
    return record["messages"][:-1] if "messages" in record else record["prompt"]


def key_of(prompt):
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    return json.dumps([[t["role"], t["content"]] for t in turns])


def asked_first(record):
    """The first thing that the user says, in lower case and with single spaces."""
    prompt = prompt_of(record)
    said = [prompt] if isinstance(prompt, str) else \
        [t["content"] for t in prompt if t["role"] == "user"]
    return " ".join(said[0].lower().split())


def read(path):
    """(training records, held-out records): a tenth by a hash of what is asked first, or as one of
    the records that ask it says."""
    sides = [], []
    records = [json.loads(line) for line in Path(path).read_text().split("\n") if line.strip()]
    said = {asked_first(r): r["held_out"] for r in records if "held_out" in r}
    for record in records:
        held_out = False  # plain text has no prompt to hold out
        if "text" not in record:
            digest = hashlib.sha256(asked_first(record).encode()).hexdigest()
            held_out = said.get(asked_first(record), int(digest[:8], 16) < 0.1 * 2**32)
        sides[held_out].append(record)
    return sides


def once(prompts):
    """Each prompt once, in the order of its first record."""
    found = {}
    for p in prompts:
        found.setdefault(key_of(p), p)
    return list(found.values())


def choose(records, n, key=lambda r: key_of(prompt_of(r))):
    """n of them by the hash of a key, which knows nothing of the order of a file."""
    return sorted(records, key=lambda r: hashlib.sha256(repr(key(r)).encode()).hexdigest())[:n]


def order_of(lengths, size, random):
    """Rows in a random order, but every hundred batches sorted by length; out of what is left in
    the end a batch that is not full is taken from anywhere; the whole ones in a random order."""
    order, batches = list(random.permutation(len(lengths))), []
    short = len(order) % size
    while len(order) >= 100 * size:
        bucket, order = sorted(order[:100 * size], key=lambda i: lengths[i]), order[100 * size:]
        batches += [bucket[i:i + size] for i in range(0, 100 * size, size)]
    order.sort(key=lambda i: lengths[i])
    start = random.integers(100 * size * (len(batches) // 100), len(lengths) - short + 1)
    start -= len(lengths) - len(order)
    last = [order.pop(start) for _ in range(short)]
    batches += [order[i:i + size] for i in range(0, len(order), size)]
    shuffled = random.permutation(len(batches))
    return [i for n in shuffled for i in batches[n]] + last


def held_out_prompts(data, count, tokenizer, room, split="held_out"):
    """Or those of another split, None: all prompts of a file, the held-out ones of the world."""
    if data == "synthetic":
        prompts = [p.text for p in sample_prompts(count or 512, held_out=True, seed=0)]
    else:
        train, held_out = ([prompt_of(r) for r in side] for side in read(data))
        prompts = dict(train=train, held_out=held_out).get(split, held_out + train)
        prompts = choose(once(prompts), count, key_of)
    return [p for p in prompts if len(prompt_ids(tokenizer, p)) <= room]


def texts_in(record):
    """The answers of a ranking, a pair or a label."""
    if "completions" in record:
        return record["completions"]
    return [record[k] for k in ("chosen", "rejected", "completion") if k in record]


def merged(records):
    """One ranking a prompt: [{prompt, completions, pairs, gold?}], pairs (better, worse)."""
    found = {}
    for record in records:
        texts, ranks = record.get("completions"), record.get("ranks")
        if texts is None:
            texts, ranks = [record["chosen"], record["rejected"]], [1, 2]
        one = found.setdefault(key_of(record["prompt"]), dict(
            prompt=record["prompt"], completions=[], pairs=[], gold={}))
        for n, text in enumerate(texts):
            if text not in one["completions"]:
                one["completions"].append(text)
                if "gold" in record:
                    one["gold"][text] = record["gold"][n]
        place = one["completions"].index
        for i in range(len(texts)):
            for j in range(len(texts)):
                if ranks[i] < ranks[j] and texts[i] != texts[j]:
                    one["pairs"].append((place(texts[i]), place(texts[j])))
    for one in found.values():  # gold counts where every answer has it
        gold = [one["gold"].get(text) for text in one["completions"]]
        one["gold"] = None if None in gold else gold
    return [one for one in found.values() if one["pairs"]]


def texts_of(data, n, seed):
    """The documents of a text source."""
    if data == "synthetic":
        return list(documents(n, seed))
    if not data.endswith(".jsonl"):
        return [d for d in Path(data).read_text().split("\n\n") if d.strip()]
    return [r["text"] if "text" in r else "\n".join(t["content"] for t in messages_of(r))
            for r in read(data)[0]]


def text_rows(data, tokenizer, length, n, seed):
    """Rows of `length` ids. A row begins with EOS and a document; one that no longer fits is cut
    and starts again in the next row, but one longer than a row goes on there."""
    rows, row = [], []
    for text in texts_of(data, n, seed):
        rest = [tokenizer.eos, *tokenizer.encode(text)]
        while len(row) + len(rest) > length:
            cut = length - len(row)
            rows.append(row + rest[:cut])
            rest, row = rest[cut:] if len(rest) > length else rest, []
        row = row + rest
    return rows + ([row] if len(row) == length else [])


def text_loss(network, rows):
    """Mean over all predictions of all rows, nats per token."""
    total = sum(network.logp((row, [1] * len(row))).sum() for row in rows)
    return -total / sum(len(row) - 1 for row in rows)


def hash_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def noise_of(data):
    """The labeler's noise where all records are rankings of the embedded world, else None."""
    records = [json.loads(line) for line in Path(data).read_text().split("\n") if line.strip()]
    return records[-1]["noise"] if all("world" in r for r in records) else None


class Log(list):
    """The rows of log.jsonl, the first one (config) and the times left out."""

    def add(self, kind, **row):
        self.append(dict(kind=kind, **row))


# --- stage 0: pretraining ------------------------------------------------------------------------


def pretrain(c):
    torch.manual_seed(number(c.seed, "pretrain", "weights"))
    if c.init == "none":
        tokenizer, parents = load_tokenizer(c.tokenizer), {}
        size = dict(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens,
                    block_size=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        network = Network(GPT(GPTConfig(**size)).state_dict(), size)
    else:
        network, parent, tokenizer = load(c.init)
        parents = dict(pretrain=parent["hash"])
    rows = text_rows(c.data, tokenizer, network.size["block_size"] + 1, c.documents, c.seed)
    n = max(1, min(256, len(rows) // 50))
    train, held_out = rows[:-n], rows[-n:]
    inner = [w for name, w in network.w.items() if name.startswith("h.") and w.dim() == 2]
    outer = [w for w in network.w.values() if not any(w is other for other in inner)]
    muon, adamw = Muon(inner, c.muon_lr, c.weight_decay), AdamW(outer, c.lr, c.weight_decay)
    log = Log()
    for step in range(c.steps):
        if step % c.eval_every == 0:
            log.add("validation", step=step, loss=text_loss(network, held_out).item())
        random = stream(c.seed, "pretrain", "rows", step)
        batch = [train[i] for i in random.integers(0, len(train), c.batch_size)]
        clear(network)
        loss = text_loss(network, batch)
        loss.backward()
        norm = clip([*inner, *outer], c.grad_clip)
        factor = cosine(step, c.steps, c.warmup)
        muon.step(factor)
        adamw.step(factor)
        if step % 10 == 0 or step == c.steps - 1:
            log.add("step", step=step, loss=loss.item(), lr=c.lr * factor, grad_norm=norm,
                    tok_per_s=c.batch_size * network.size["block_size"])
    final = dict(loss=text_loss(network, held_out).item())
    final["perplexity"] = math.exp(final["loss"])
    if c.data == "synthetic":  # what it writes behind held-out prompts, as plain text
        prompts = [p for p in sample_prompts(512, held_out=True, seed=0)
                   if 1 + len(tokenizer.encode(p.text)) + 48 <= network.size["block_size"]]
        drawn = sample_many(network, tokenizer, [[tokenizer.eos, *tokenizer.encode(p.text)]
                                                 for p in prompts], 48,
                            (c.seed, "pretrain", "samples", 0))
        gold = [gold_reward(p.text, s["text"]) for p, s in zip(prompts, drawn)]
        for p, s, g in list(zip(prompts, drawn, gold))[:8]:
            log.add("sample", family=p.family, prompt=p.text, response=s["text"], gold=g)
        final |= dict(gold=np.mean(gold), eos_rate=np.mean([s["finished"] for s in drawn]))
    return network.state(), log, final, parents


# --- stage 1: supervised fine-tuning -------------------------------------------------------------


def sft(c):
    network, parent, tokenizer = load(c.init)
    block = network.size["block_size"]
    if c.data == "synthetic":
        random = stream(c.seed, "sft", "safety")
        prompts = [p for p in sample_prompts(c.demos, held_out=False, seed=c.seed)
                   if p.family != "harmful" or random.random() < c.safety]
        sides = (demonstrations(prompts, c.seed, c.quality),
                 demonstrations(sample_prompts(512, held_out=True, seed=0), 0, c.quality))
        asked = [p.text for p in sample_prompts(c.samples, held_out=True, seed=0)]
    else:
        sides = read(c.data)
    fitting = lambda side: [r for r in side
                            if len(dialogue_row(tokenizer, messages_of(r))[0]) <= block]
    rows_of = lambda side: [dialogue_row(tokenizer, messages_of(r)) for r in side]
    sides = [fitting(side) for side in sides]
    train, held_out = map(rows_of, sides)
    heads = [prompt_ids(tokenizer, p) for p in asked] if c.data == "synthetic" \
        else [ids[:mask.index(1)] for ids, mask in rows_of(choose(sides[1], c.samples))]
    asked = [p for p, h in zip(asked, heads) if len(h) + c.max_new_tokens <= block] \
        if c.data == "synthetic" else []
    heads = [h for h in heads if len(h) + c.max_new_tokens <= block]
    text, source = None, c.pretrain_data or "synthetic"
    if c.pretrain_mix > 0 and (c.data == "synthetic" or c.pretrain_data):
        text = text_rows(source, tokenizer, min(40, block), 20000, c.seed)
    log, weights = Log(), list(network.w.values())
    optimizer = AdamW(weights, c.lr, c.weight_decay)

    def validate(epoch):
        with torch.no_grad():
            loss = -sum(network.logp(row).sum().item() for row in held_out)
        drawn = sample_many(network, tokenizer, heads, c.max_new_tokens,
                            (c.seed, "sft", "samples", epoch))
        row = dict(epoch=epoch, loss=loss / sum(sum(mask) for _, mask in held_out),
                   eos_rate=np.mean([s["finished"] for s in drawn]),
                   length=np.mean([len(s["ids"]) for s in drawn]))
        if c.data == "synthetic":
            gold = [gold_reward(p, s["text"]) for p, s in zip(asked, drawn)]
            row["gold"] = np.mean(gold)
            row["gold_se"] = clustered_se(gold, [question(p, True) for p in asked])
        for i in range(min(8, len(drawn))):
            log.add("sample", epoch=epoch, response=drawn[i]["text"],
                    prompt=asked[i] if asked else tokenizer.decode(heads[i]),
                    gold=gold[i] if asked else None)
        log.add("validation", **row)
        return row

    step, per_epoch, final = 0, math.ceil(len(train) / c.batch_size), validate(0)
    average = sum(sum(mask) for _, mask in train) / per_epoch  # response tokens a step
    for epoch in range(c.epochs):
        order = order_of([len(ids) for ids, _ in train],
                         c.batch_size, stream(c.seed, "sft", "order", epoch))
        for start in range(0, len(train), c.batch_size):
            batch = [train[i] for i in order[start:start + c.batch_size]]
            tokens = sum(sum(mask) for _, mask in batch)
            clear(network)
            loss = -sum(network.logp(row).sum() for row in batch)
            (loss / average).backward()
            if text:
                picked = stream(c.seed, "sft", "text", step).integers(
                    0, len(text), max(1, c.batch_size // 2))
                (c.pretrain_mix * text_loss(network, [text[i] for i in picked])).backward()
            norm, factor = clip(weights, c.grad_clip), cosine(step, c.epochs * per_epoch, c.warmup)
            optimizer.step(factor)
            if step % 10 == 0:
                log.add("step", step=step, loss=loss.item() / tokens, lr=c.lr * factor,
                        grad_norm=norm, tok_per_s=tokens)
            step += 1
        final = validate(epoch + 1)
    return network.state(), log, final, {parent["stage"]: parent["hash"]}


# --- stage 2a: labels ----------------------------------------------------------------------------


def label(c):
    """Also the rankings and the card: (rankings, log, final, parents)."""
    records, skipped, parents = [], 0, {}
    if c.answers:
        asked = []
        for held_out, side, most in zip((False, True), read(c.answers), (c.prompts, c.held_out)):
            for r in choose(side, most):
                if "chosen" in r:
                    r = dict(prompt=r["prompt"], completions=[r["chosen"], r["rejected"]],
                             ranks=[1, 2])
                asked.append(dict(r, held_out=held_out))
    else:
        writers = [load(path) for path in c.init.split(",")]
        for path, (_, parent, _) in zip(c.init.split(","), writers):
            parents[path if parents else parent["stage"]] = parent["hash"]
        asked = asked_of(c, writers)
    judge = None
    if c.labeler == "model":
        judge, parent, tokenizer = load(c.reward_model)
        parents["reward"] = parent["hash"]
    elif c.labeler == "principles":
        path = Path(c.principles or DATA / "synthetic" / "principles.txt")
        principles = [s for s in path.read_text().split("\n") if s and not s.startswith("#")]
        parents["principles"] = hash_of(path)
        if c.judge:
            judge, parent, tokenizer = load(c.judge)
            parents["judge"] = parent["hash"]
    for n, r in enumerate(asked):
        first, second = (stream(c.seed, "label", f"labeler {person}", n) for person in (1, 2))
        prompt, texts = r["prompt"], r["completions"]
        if len(texts) < 2:
            skipped += 1
            continue
        new = dict(prompt=prompt, completions=texts, held_out=r["held_out"])
        if "world" in r:
            gold = [gold_reward(prompt, text) for text in texts]
            new |= dict(gold=[round(g, 3) for g in gold], family=lookup(prompt).family,
                        world="synthetic", noise=0.0, policy=r["policy"])
        new |= dict(before=r["ranks"]) if "ranks" in r else {}
        new |= dict(sources=r["sources"]) if "sources" in r else {}
        if c.labeler == "simulated":  # a Gumbel draw each: the difference of two is logistic
            values = np.array([perceived(c, text, g) for text, g in zip(texts, gold)])
            new |= dict(noise=c.noise, **{name: ranks_of(values + c.noise * random.gumbel(
                size=len(texts))) for name, random in (("ranks", first), ("second", second))})
        else:
            if c.labeler == "model":
                rows = [answer_row(tokenizer, prompt, text) for text in texts]
                scores = [judged(judge, row) for row in rows] if max(
                    len(ids) for ids, _ in rows) <= judge.size["block_size"] else None
            elif c.judge:
                scores, beliefs, changed = believed(judge, tokenizer, prompt, texts, principles)
            else:
                scores = [np.mean([votes(prompt, text, other, principles)
                                   for m, other in enumerate(texts) if m != k])
                          for k, text in enumerate(texts)]
            if scores is None:
                continue
            new |= dict(scores=scores, ranks=ranks_of([round(s, 9) for s in scores]))
            if c.judge:
                new |= dict(first=np.mean(beliefs), differ=np.mean(changed))
        records.append(new)
    log = Log()
    for r in records[:6]:
        log.add("sample", prompt=r["prompt"], completions=r["completions"], ranks=r["ranks"],
                gold=r.get("gold"))
    final = dict(figures(records), prompts=len(records), skipped=skipped)
    if c.labeler != "simulated":
        final["left_out"] = len(asked) - skipped - len(records)
    return records, log, final, parents


def asked_of(c, writers):
    """The prompts with the answers that the writers give in turn: with the n-th prompt, writer n
    begins."""
    (_, parent, tokenizer), draws = writers[0], math.ceil((c.k + c.oversample) / len(writers))
    if c.data == "synthetic":
        asked = [dict(prompt=p.text, held_out=held_out, world="synthetic", policy=parent["hash"])
                 for n, held_out in ((c.prompts, False), (c.held_out, True))
                 for p in sample_prompts(n, held_out, c.seed)]
    else:
        room = min(network.size["block_size"] for network, *_ in writers) - c.max_new_tokens
        asked = [dict(prompt=p, held_out=held_out) for held_out, split, n in (
            (False, "train", c.prompts), (True, "held_out", c.held_out))
            for p in held_out_prompts(c.data, n, tokenizer, room, split)]
    for start in range(0, len(asked), c.chunk):
        part = asked[start:start + c.chunk]
        heads = [prompt_ids(tokenizer, r["prompt"]) for r in part]
        drawn = [sample_many(network, tokenizer, heads, c.max_new_tokens,
                             (c.seed, "label", f"answers {w}" if w else "answers", 0),
                             c.temperature, draws, start)
                 for w, (network, *_) in enumerate(writers)]
        for i, r in enumerate(part):
            texts, sources = [], []
            for turn in range(draws * len(writers)):
                w = (start + i + turn) % len(writers)
                s = drawn[w][i * draws + turn // len(writers)]
                if s["finished"] and s["text"].strip() and s["text"] not in texts:
                    texts.append(s["text"])
                    sources.append(w)
            r["completions"] = texts[:c.k]
            if len(writers) > 1:
                r["sources"] = sources[:c.k]
    return asked


def ranks_of(values):
    return [1 + sum(other > mine for other in values) for mine in values]


def votes(prompt, a, b, principles):
    """Of the principles that tell two answers apart, the share that is for a."""
    gaps = [float(PRINCIPLES[p](prompt, a)) - float(PRINCIPLES[p](prompt, b)) for p in principles]
    return sum(g > 0 for g in gaps) / sum(g != 0 for g in gaps) if any(gaps) else 0.5


@torch.no_grad()
def believed(judge, tokenizer, prompt, texts, principles):
    """(mean probability of each answer to beat another, every P(the one shown first), whether the
    choice changed with the order); None for the first if a question does not fit."""
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    said = "\n\n".join(t["role"].capitalize() + ": " + t["content"] for t in turns)
    first = {}
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            for p in principles if i != j else ():
                head = prompt_ids(tokenizer, (
                    "Here is a conversation, and two replies of the assistant to its last turn."
                    f"\n\n{said}\n\n(A) {a}\n\n(B) {b}\n\n{p} Answer with (A) or (B)."))
                odds = []
                for choice in map(tokenizer.encode, ("(A)", "(B)")):
                    if len(head) + len(choice) > judge.size["block_size"]:
                        return None, None, None
                    mask = [0] * len(head) + [1] * len(choice)
                    odds.append(judge.logp((head + choice, mask)).sum().item())
                first[i, j, p] = 1 / (1 + math.exp(odds[1] - odds[0]))
    wins = [np.mean([(first[i, j, p] + 1 - first[j, i, p]) / 2 for j in range(len(texts))
                     for p in principles if i != j]) for i in range(len(texts))]
    return wins, [*first.values()], [(q > 0.5) == (first[j, i, p] > 0.5)
                                     for (i, j, p), q in first.items() if i < j]


def figures(records):
    """What the labels are like."""
    every = [(r, i, j) for r in records for i in range(len(r["ranks"]))
             for j in range(len(r["ranks"])) if i != j]
    pairs = [(r, i, j) for r, i, j in every if r["ranks"][i] < r["ranks"][j]]
    mean = lambda values: np.mean(values) if len(values) else None
    long = lambda r, i, j: len(r["completions"][i]) - len(r["completions"][j])
    final = dict(pairs=len(pairs), ties=len(every) // 2 - len(pairs),
                 longer_preferred=mean([long(*pair) > 0 for pair in pairs]))
    golds = [g for r in records for g in r.get("gold", [])]
    if golds:
        final |= dict(gold=mean(golds), gold_std=np.std(golds), gold_accuracy=mean([
            r["gold"][i] > r["gold"][j] for r, i, j in pairs if r["gold"][i] != r["gold"][j]]))
    if "second" in records[0]:
        final["agreement"] = mean([r["second"][i] < r["second"][j] for r, i, j in pairs])
    if "first" in records[0]:
        final |= {name: mean([r[name] for r in records]) for name in ("first", "differ")}
    if "sources" in records[0]:
        duels = [(r, i, j) for r, i, j in every if (r["sources"][i], r["sources"][j]) == (1, 0)]
        final |= rate("wins_1", [(r, half(r["ranks"][j] - r["ranks"][i])) for r, i, j in duels])
    if "before" in records[0]:
        old = [(r, i, j) for r, i, j in every if r["before"][i] < r["before"][j]]
        both = [(r, i, j) for r, i, j in old if r["ranks"][i] != r["ranks"][j]]
        final |= dict(file_pairs=len(both), file_ties=len(every) // 2 - len(old),
                      tied_here=len(old) - len(both))
        final |= rate("file_agreement", [(r, r["ranks"][i] < r["ranks"][j]) for r, i, j in both])
        final |= rate("file_longer", [(r, half(long(r, i, j))) for r, i, j in both])
    return final


def rate(name, found):
    """A share with Wilson's 95% interval, of as many trials as would have its clustered error."""
    values = np.array([float(x) for _, x in found])
    p, z = values.mean(), 1.96
    se = clustered_se(values, [question(r["prompt"], "world" in r) for r, _ in found])
    n = p * (1 - p) / se**2
    middle, half_width = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + (z / 2 / n)**2)
    return {name: p, f"{name}_low": (middle - half_width) / (1 + z * z / n),
            f"{name}_high": (middle + half_width) / (1 + z * z / n)}


def perceived(c, text, gold):
    """What the labeler sees of an answer: the gold reward, and what it likes or dislikes."""
    said = [s.removeprefix("- ") for s in sentences(text)]
    return (gold + c.length * len(text.split())
            + c.flattery * sum(s in facts.FLATTERY for s in said)
            + c.confidence * sum(s in facts.CONFIDENCE for s in said)
            + c.caution * sum(s in facts.DONT_KNOW or s in facts.REFUSAL for s in said)
            + c.bullets * text.startswith("- "))


# --- stage 2b: the reward model ------------------------------------------------------------------


def half(x):
    """1 for a positive number, 0 for a negative one, a half for 0."""
    return float(np.sign(x)) / 2 + 0.5


def reward(c):
    policy, parent, tokenizer = load(c.init)
    block, size = policy.size["block_size"], GPTConfig(**policy.size)
    noise = noise_of(c.data)
    sides = []
    for records in read(c.data):
        rows_of = lambda r: [answer_row(tokenizer, r["prompt"], t) for t in texts_in(r)]
        sides.append(merged([r for r in records
                             if all(len(ids) <= block for ids, _ in rows_of(r))]))
        for one in sides[-1]:
            one["rows"] = rows_of(one)
    train, held_out = sides
    log, networks = Log(), []
    per_epoch = math.ceil(len(train) / c.batch_size)
    for member in range(c.ensemble):  # each as if it were alone, with a seed of its own
        seed = c.seed + member
        torch.manual_seed(number(seed, "reward", "weights"))
        GPT(size)  # the policy was drawn first
        drawn = RewardModel(size).head.state_dict()
        network = Network({"gpt." + k: w for k, w in policy.w.items()}
                          | {"head." + k: w for k, w in drawn.items()}, policy.size, "gpt.")
        networks.append(network)
        text = None
        if c.pretrain_mix > 0 and noise is not None:
            text = text_rows("synthetic", tokenizer, min(40, block), 20000, seed)
        weights, step = list(network.w.values()), 0
        optimizer = AdamW(weights, c.lr, c.weight_decay)
        average = sum(len(one["pairs"]) for one in train) / per_epoch
        for epoch in range(c.epochs):
            order = order_of([max(len(ids) for ids, _ in one["rows"]) for one in train],
                             c.batch_size, stream(seed, "reward", "order", epoch))
            for start in range(0, len(train), c.batch_size):
                batch = [train[i] for i in order[start:start + c.batch_size]]
                clear(network)
                losses, right = [], []
                for one in batch:
                    scores = [network.score(row) for row in one["rows"]]
                    for i, j in one["pairs"]:
                        margin = scores[i] - scores[j]
                        losses.append(torch.log1p(torch.exp(-margin)))
                        right.append(half(margin.item()))
                loss = sum(losses)
                (loss / average).backward()
                if text:
                    picked = stream(seed, "reward", "text", step).integers(0, len(text), 16)
                    (c.pretrain_mix * text_loss(network, [text[i] for i in picked])).backward()
                norm = clip(weights, c.grad_clip)
                factor = cosine(step, c.epochs * per_epoch, c.warmup)
                optimizer.step(factor)
                if step % 5 == 0:
                    log.add("step", step=member * c.epochs * per_epoch + step, member=member,
                            loss=loss.item() / len(losses), accuracy=np.mean(right),
                            lr=c.lr * factor, grad_norm=norm, pairs_per_s=len(losses))
                step += 1

    # shift and scale: demonstrations average 0, samples of the SFT model have standard deviation 1
    if c.demos != "auto":
        demos = [messages_of(r) for r in choose(read(c.demos)[0], c.samples)]
    elif noise is not None:
        prompts = sample_prompts(c.samples, held_out=False, seed=c.seed)
        demos = [messages_of(r) for r in
                 demonstrations(prompts, c.seed, parent["config"].get("quality", 0.5))]
    else:
        demos = [messages_of(dict(prompt=one["prompt"],
                                  completion=one["completions"][one["pairs"][0][0]]))
                 for one in choose(train, c.samples)]
    demos = [row for row in (dialogue_row(tokenizer, m) for m in demos) if len(row[0]) <= block]
    asked = [(one["prompt"], prompt_ids(tokenizer, one["prompt"]))
             for one in choose(train, c.samples)]
    asked = [(p, h) for p, h in asked if len(h) + c.max_new_tokens <= block]
    drawn = sample_many(policy, tokenizer, [h for _, h in asked], c.max_new_tokens,
                        (c.seed, "reward", "samples", 0))
    complete = [(p, h, s["ids"]) for (p, h), s in zip(asked, drawn) if s["finished"]]
    samples = [(h + ids, [0] * len(h) + [1] * len(ids)) for _, h, ids in complete]
    sft = []
    with torch.no_grad():
        for network in networks:
            of_samples = [network.score(row).item() for row in samples]
            network.w["shift"] = torch.tensor(np.mean([network.score(row).item()
                                                       for row in demos]))
            network.w["scale"] = torch.tensor(max(np.std(of_samples), 1e-6))
            sft.append((np.mean(of_samples) - network.w["shift"]) / network.w["scale"])
        together = Members(networks)
        final = report_card(together, held_out, noise)
        final |= dict(shift=np.mean([n.w["shift"] for n in networks]),
                      scale=np.mean([n.w["scale"] for n in networks]),
                      demo_score=np.mean([judged(together, row) for row in demos]),
                      sft_score=np.mean(sft))
    if c.probe:
        final |= probe(together, tokenizer, complete[:8], c, noise, log)
    state = networks[0].state() if c.ensemble == 1 else {
        f"members.{n}.{name}": w for n, one in enumerate(networks)
        for name, w in one.state().items()}
    return state, log, final, {parent["stage"]: parent["hash"]}


class Members:
    """Reward models whose scores, each by its own shift and scale, are taken together."""

    def __init__(self, networks, score_by="mean"):
        self.networks, self.score_by = networks, score_by
        self.w, self.size = networks[0].w, networks[0].size  # of the first: the critic's start

    def each(self, row):
        return [(n.score(row) - n.w["shift"]) / n.w["scale"] for n in self.networks]

    def judge(self, row):
        found = torch.stack(self.each(row))
        mean = found.sum() / len(found)
        if self.score_by == "mean":
            return mean
        return found.min() if self.score_by == "min" else \
            mean - (((found - mean) ** 2).sum() / len(found)).sqrt()


def probe(judge, tokenizer, answers, c, noise, log):
    """Up to c.probe replacements of a token of each answer: of 16 tries, each one of the 16 tokens
    of a random place that promise most by the gradient, the one that raises the score most."""
    special = {tokenizer.eos, *tokenizer.specials.values()}
    allowed = [i for i in range(tokenizer.n_tokens) if i not in special]
    answers = [(p, h, ids) for p, h, ids in answers if len(ids) > 1]
    if not answers:
        return {}
    rng, rise, gold_rise = stream(c.seed, "reward", "probe"), [], []
    guided = [list(h + ids) for _, h, ids in answers]
    random = [list(ids) for ids in guided]
    masks = [[0] * len(h) + [1] * len(ids) for _, h, ids in answers]
    before = [judged(judge, row) for row in zip(guided, masks)]
    now, lucky = list(before), list(before)

    def better(ids, mask, score, edits):
        best, kept = score, ids
        for place, token in edits:
            tried = [*ids[:place], token, *ids[place + 1:]]
            if judged(judge, (tried, mask)) > best:
                best, kept = judged(judge, (tried, mask)), tried
        return kept, best

    for _ in range(c.probe):
        for n, mask in enumerate(masks):
            places, gains = [t for t, m in enumerate(mask) if m][:-1], 0
            for network in judge.networks:  # d score / d row of the table, one place at a time
                network.seen = torch.zeros(len(mask), network.size["n_embd"], requires_grad=True)
            judge.judge((guided[n], mask)).backward()
            for network in judge.networks:
                table = network["wte.weight"].detach()
                gains = gains + torch.stack([
                    (table[allowed] - table[guided[n][t]]) @ network.seen.grad[t] for t in places])
                network.seen = None
            for t, row in zip(places, gains):
                if guided[n][t] in allowed:
                    row[allowed.index(guided[n][t])] = -math.inf
            best = gains.argsort(1, descending=True)[:, :16].tolist()
            at, which = rng.integers(len(places), size=16), rng.integers(16, size=16)
            edits = [(places[i], allowed[best[i][k]]) for i, k in zip(at, which)]
            guided[n], now[n] = better(guided[n], mask, now[n], edits)
    for _ in range(c.probe):
        drawn = []  # for all answers, before any is changed
        for mask in masks:
            places = [t for t, m in enumerate(mask) if m][:-1]
            at, which = rng.integers(len(places), size=16), rng.integers(len(allowed), size=16)
            drawn.append([(places[i], allowed[k]) for i, k in zip(at, which)])
        for n, mask in enumerate(masks):
            random[n], lucky[n] = better(random[n], mask, lucky[n], drawn[n])
    for (prompt, h, ids), new, first, last in zip(answers, guided, before, now):
        texts = [tokenizer.decode(ids), tokenizer.decode(new[len(h):])]
        gold = [gold_reward(prompt, t) for t in texts] if noise is not None else [None, None]
        log.add("probe", prompt=prompt if noise is not None else tokenizer.decode(h),
                before=texts[0], after=texts[1], score_before=first, score_after=last,
                gold_before=gold[0], gold_after=gold[1])
        rise.append(last - first)
        gold_rise.append(gold[1] - gold[0] if noise is not None else None)
    final = dict(probe_gain=np.mean(rise), probe_random_gain=np.mean(lucky) - np.mean(before))
    return final | (dict(probe_gold_gain=np.mean(gold_rise)) if noise is not None else {})


def interval(values, clusters):
    """Wilson's, 95%, of as many independent trials as would have the clustered error."""
    p, se, z = np.mean(values), clustered_se(values, clusters), 1.96
    n = p * (1 - p) / se**2 if se and se > 1e-9 else len(set(clusters))
    middle, width = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n)
    width *= math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return dict(low=max(0, middle - width), high=min(1, middle + width))


def correlation(groups):
    """Spearman's within groups, [[(x, y), ...], ...]."""
    xs, ys = [], []
    for group in groups:
        for values, out in ((list(x), xs) for x, xs in zip(zip(*group), (xs, ys))):
            ranks = [sum(a < b for a in values) + sum(a == b for a in values) / 2 for b in values]
            out += [r - np.mean(ranks) for r in ranks]
    scale = math.sqrt(np.dot(xs, xs) * np.dot(ys, ys))
    return np.dot(xs, ys) / scale if scale else None


def report_card(judge, held_out, noise):
    """Figures over the held-out pairs; their errors clustered by what is asked."""
    pairs, answers = [], []  # of each pair what is known of it
    mean_scale = np.mean([n.w["scale"].item() for n in judge.networks])
    for one in held_out:
        each = np.array([[x.item() for x in judge.each(row)] for row in one["rows"]])
        raw = each.mean(1) * mean_scale if len(judge.networks) > 1 else \
            np.array([judge.networks[0].score(row).item() for row in one["rows"]])
        chars = [len(t) for t in one["completions"]]
        asked = question(one["prompt"], noise is not None)
        family = lookup(one["prompt"]).family if noise is not None else None
        gold = one["gold"] or [None] * len(chars)
        answers.append(dict(raw=raw, chars=chars, gold=gold, family=family, each=each))
        for i, j in one["pairs"]:
            known = gold[i] is not None
            pairs.append(dict(
                margin=raw[i] - raw[j], right=half(raw[i] - raw[j]), asked=asked, family=family,
                chars=(chars[i], chars[j]), longer=half(chars[i] - chars[j]),
                gap=gold[i] - gold[j] if known else None, members=[half(m) for m in
                                                                   each[i] - each[j]]))
    column = lambda name, some=None: [p[name] for p in (pairs if some is None else some)]

    def line(some, **names):
        right, asked = column("right", some), column("asked", some)
        return names | dict(pairs=len(some), accuracy=np.mean(right)) | interval(right, asked)

    def length(p):
        w, l = p["chars"]
        return "about equal" if abs(w - l) <= 0.1 * max(w, l) else "longer" if w > l else "shorter"

    right, asked, longer = column("right"), column("asked"), column("longer")
    sure = [1 / (1 + math.exp(-abs(m))) for m in column("margin")]  # of the pair's winner
    table = []
    for b in range(10):  # confidence from 0.5 to 1 in ten equal bins
        inside = [n for n, s in enumerate(sure) if min(int((s - 0.5) * 20), 9) == b]
        if inside:
            table.append(dict(confidence=np.mean([sure[n] for n in inside]),
                              accuracy=np.mean([right[n] for n in inside]), pairs=len(inside)))
    whole = interval(right, asked)
    tables = lambda name, values, of: [
        line(some, **{name: v}) for v in values if (some := [p for p in pairs if of(p) == v])]
    final = dict(
        loss=np.mean([math.log1p(math.exp(-m)) for m in column("margin")]),
        accuracy=np.mean(right), accuracy_se=clustered_se(right, asked), accuracy_low=whole["low"],
        accuracy_high=whole["high"], pairs=len(pairs), margin=np.mean(column("margin")),
        longer_wins=np.mean(longer), longer_wins_se=clustered_se(longer, asked),
        shorter_wins=1 - np.mean(longer),
        by_length=tables("preferred", ("longer", "about equal", "shorter"), length),
        length_correlation=correlation([list(zip(a["raw"], a["chars"])) for a in answers]),
        calibration=table, calibration_error=sum(
            abs(t["confidence"] - t["accuracy"]) * t["pairs"] for t in table) / len(pairs),
        overconfidence=np.mean(sure) - np.mean(right))
    scores = [score for a in answers for score in a["each"].mean(1)]
    final |= dict(score_min=min(scores), score_max=max(scores))
    known = [p for p in pairs if p["gap"] is not None]
    if known:
        final["gold_accuracy"] = np.mean([half(p["gap"]) for p in known])
    if noise is not None:
        agrees = lambda some: np.mean([p["right"] == half(p["gap"]) for p in some])
        for name, some in (
                ("accuracy_on_wide_gold", [p for p in pairs if abs(p["gap"]) > noise]),
                ("gold_agreement", [p for p in pairs if p["gap"]])):
            if some:
                final[name] = agrees(some)
        by_gold = lambda some: correlation([list(zip(a["raw"], a["gold"])) for a in some])
        final["gold_correlation"] = by_gold(answers)
        final["by_gold_gap"] = tables("from", (0, 0.5, 1, 2), lambda p: max(
            low for low in (0, 0.5, 1, 2) if low <= abs(p["gap"])))
        final["by_family"] = tables("family", FAMILIES, lambda p: p["family"])
        for t in final["by_family"]:
            t["gold_correlation"] = by_gold([a for a in answers if a["family"] == t["family"]])
    if len(judge.networks) > 1:
        final["members"] = list(np.mean([p["members"] for p in pairs], 0))
        final["spread"] = np.mean(np.concatenate([a["each"] for a in answers]).std(1))
    return final


# --- after the training: the policy against the model it started from ----------------------------


def clustered_se(values, clusters):
    """Of a mean whose entries depend on each other within a cluster; None for a single cluster."""
    mean, sums = np.mean(values), {}
    for v, cluster in zip(values, clusters):
        sums[cluster] = sums.get(cluster, 0.0) + v - mean
    return math.sqrt(sum(s * s for s in sums.values())) / len(values) if len(sums) > 1 else None


def question(prompt, synthetic):
    """What an embedded prompt asks, whatever its wording; of other data the prompt itself."""
    return (lookup(prompt).relation.name, lookup(prompt).x) if synthetic else key_of(prompt)


@torch.no_grad()
def compare(log, policy, reference, tokenizer, prompts, c, synthetic, reward_model=None, n=1,
            answers=None):
    """Figures of the policy's answers beside the first of the reference's n answers."""
    heads = [prompt_ids(tokenizer, p) for p in prompts]
    n = n if synthetic and reward_model else 1  # else nobody chooses a best one
    drawn = sample_many(policy, tokenizer, heads, c.max_new_tokens,
                        (c.seed, "evaluate", "policy", 0), c.temperature)
    others = sample_many(reference, tokenizer, heads, c.max_new_tokens,
                         (c.seed, "evaluate", "reference", 0), c.temperature, n)
    others = [others[i:i + n] for i in range(0, len(others), n)]
    first = [some[0] for some in others]
    clusters = [question(p, synthetic) for p in prompts]
    as_row = lambda h, s: (h + s["ids"], [0] * len(h) + [1] * len(s["ids"]))
    final = dict(judged=len(prompts), questions=len(set(clusters)))

    def add(name, values):
        final[name], final[f"{name}_se"] = np.mean(values), clustered_se(values, clusters)

    def add_both(name, policy_has, reference_has):
        add(name, policy_has)
        add(f"{name}_sft", reference_has)
        add(f"{name}_gap", [a - b for a, b in zip(policy_has, reference_has)])

    add("kl", [(policy.logp(as_row(h, s), c.temperature)
                - reference.logp(as_row(h, s), c.temperature)).sum().item()
               for h, s in zip(heads, drawn)])
    add_both("length", *([len(s["ids"]) for s in some] for some in (drawn, first)))
    add_both("eos_rate", *([float(s["finished"]) for s in some] for some in (drawn, first)))
    if answers:
        add_both("accuracy", *([right(s["text"], s["finished"], a) for s, a in zip(some, answers)]
                               for some in (drawn, first)))
    if reward_model:
        judge = lambda h, s: judged(reward_model, as_row(h, s)) if s["finished"] \
            else c.missing_eos
        score = [judge(h, s) for h, s in zip(heads, drawn)]
        scores = [[judge(h, s) for s in some] for h, some in zip(heads, others)]
        add_both("score", score, [some[0] for some in scores])
        # one answer has one score: two passes over it differ by their rounding alone
        add("score_win_rate", [0.5 if s["ids"] == other["ids"] else half(a - b[0])
                               for s, other, a, b in zip(drawn, first, score, scores)])
    if synthetic:
        gold = [gold_reward(p, s["text"]) for p, s in zip(prompts, drawn)]
        golds = [[gold_reward(p, s["text"]) for s in some] for p, some in zip(prompts, others)]
        add_both("gold", gold, [some[0] for some in golds])
        add("gold_win_rate", [half(a - b[0]) for a, b in zip(gold, golds)])
        final["tie_rate"] = np.mean([a == b[0] for a, b in zip(gold, golds)])
        if reward_model and n > 1:
            best = [g[int(np.argmax(s))] for g, s in zip(golds, scores)]
            final["best_of"] = n
            add("gold_best_of_n", best)
            add("gold_over_best_of_n", [a - b for a, b in zip(gold, best)])
    for p, a, b in list(zip(prompts, drawn, first))[:12]:
        log.add("held_out_sample", prompt=p, sft=b["text"], policy=a["text"])
    return final


def right(text, end, answer):
    return float(end and final_answer(text) == final_answer(answer))


def judged(reward_model, row):
    """The score of a row, after shift and scale, of all members."""
    with torch.no_grad():
        return reward_model.judge(row).item()


def evaluate(c):
    (policy, parent, tokenizer), (reference, ref_parent, _) = load(c.policy), load(c.reference)
    parents = dict(policy=parent["hash"], reference=ref_parent["hash"])
    networks, reward_model = [policy, reference], None
    if c.reward_model:
        reward_model, rm_parent, _ = load(c.reward_model, c.score_by)
        parents["reward"], networks = rm_parent["hash"], [*networks, reward_model]
    room = min(n.size["block_size"] for n in networks) - c.max_new_tokens
    prompts, log = held_out_prompts(c.data, c.eval_prompts, tokenizer, room, c.split), Log()
    final = compare(log, policy, reference, tokenizer, prompts, c, c.data == "synthetic",
                    reward_model, c.best_of)
    return None, log, final, parents


# --- stages 2 and 3 in one: direct preferences ---------------------------------------------------


def dpo(c):
    beta, lr = c.beta, c.lr
    (policy, parent, tokenizer), (reference, _, _) = load(c.init), load(c.init)
    block, synthetic = policy.size["block_size"], noise_of(c.data) is not None
    prompts = held_out_prompts("synthetic" if synthetic else c.data, c.eval_prompts, tokenizer,
                               block - c.max_new_tokens)

    # an element: one prompt with its answers, each with its label, log pi_ref and length
    sides = []
    for records in read(c.data):
        records = [r for r in records  # with every answer that it has
                   if all(len(answer_row(tokenizer, r["prompt"], t)[0]) <= block
                          for t in texts_in(r))]
        singles = [dict(prompt=r["prompt"], completions=[r["completion"]], pairs=[],
                        labels=[1 if r["label"] else -1]) for r in records if "label" in r]
        side = singles + merged([r for r in records if "label" not in r])
        for one in side:
            one["rows"] = [answer_row(tokenizer, one["prompt"], t) for t in one["completions"]]
            if "labels" not in one:  # desirable: wins more pairs than it loses
                one["labels"] = [int(np.sign(sum((i == n) - (j == n) for i, j in one["pairs"])))
                                 for n in range(len(one["rows"]))]
            one["best"] = [n for n, label in enumerate(one["labels"])
                           if label > 0 and all(j != n for _, j in one["pairs"])]
        sides.append(side)
        for one in side:
            with torch.no_grad():
                one["ref"] = [reference.logp(row).sum().item() for row in one["rows"]]
    train, held_out = sides
    watched = choose(train, len(held_out))

    def implicit(one, logp):
        """What the loss takes for the reward of each answer, over beta."""
        lengths = [sum(mask) for _, mask in one["rows"]]
        if c.loss == "simpo":
            return [p / n for p, n in zip(logp, lengths)]
        ratio = [p - r for p, r in zip(logp, one["ref"])]
        return [x / n for x, n in zip(ratio, lengths)] if c.loss in ("ipo_mean", "dpo_norm") \
            else ratio

    def loss_of_pair(m):  # m: difference of two implicit rewards over beta
        if c.loss == "cdpo":
            return -(1 - c.label_smoothing) * log_sigmoid(beta * m) \
                - c.label_smoothing * log_sigmoid(-beta * m)
        if c.loss in ("ipo", "ipo_mean"):
            return (m - 1 / (2 * beta)) ** 2
        return -log_sigmoid(beta * (m - c.simpo_margin) if c.loss == "simpo" else beta * m)

    def loss_of_answer(ratio, label, baseline):  # kto
        return (c.desirable if label > 0 else c.undesirable) \
            * (1 - torch.sigmoid(label * beta * (ratio - baseline)))

    nearly = lambda m: half(m if abs(m) > 1e-5 else 0)  # closer than rounding is a tie

    def measure(elements):
        with torch.no_grad():
            losses, right, chosen, rejected = [], [], [], []
            for one in elements:
                logp = [policy.logp(row).sum() for row in one["rows"]]
                r = implicit(one, logp)
                for i, j in one["pairs"]:
                    losses.append(loss_of_pair(r[i] - r[j]).item())
                    right.append(nearly(beta * (r[i] - r[j]).item()))
                    chosen.append((beta * r[i].item(), logp[i].item()))
                    rejected.append((beta * r[j].item(), logp[j].item()))
            if c.loss == "kto":
                losses = [loss_of_answer(policy.logp(row).sum() - ref, label, 0.0).item()
                          for one in elements for row, ref, label
                          in zip(one["rows"], one["ref"], one["labels"]) if label]
            if not chosen:  # single answers only: a reward is right by its sign
                for one in elements:
                    logp = policy.logp(one["rows"][0]).sum().item()
                    r, label = beta * (logp - one["ref"][0]), one["labels"][0]
                    right.append(nearly(label * r))
                    (chosen if label > 0 else rejected).append((r, logp))
        mean = lambda pairs, n: np.mean([p[n] for p in pairs]) if pairs else None
        margin = mean(chosen, 0) - mean(rejected, 0) if chosen and rejected else None
        return dict(loss=np.mean(losses), accuracy=np.mean(right), chosen_reward=mean(chosen, 0),
                    rejected_reward=mean(rejected, 0), margin=margin,
                    chosen_logp=mean(chosen, 1), rejected_logp=mean(rejected, 1))

    log = Log()

    def validate(epoch):
        seen = measure(watched)
        row = measure(held_out) | dict(epoch=epoch, train_loss=seen["loss"],
                                       train_accuracy=seen["accuracy"])
        log.add("validation", **row)
        return row

    weights, step, per_epoch = list(policy.w.values()), 0, math.ceil(len(train) / c.batch_size)
    optimizer, final = AdamW(weights, lr, c.weight_decay), validate(0)
    # what a step holds on average: pairs or labelled answers, and tokens of the best answers
    average = sum(sum(map(abs, one["labels"])) if c.loss == "kto" else len(one["pairs"])
                  for one in train) / per_epoch
    average_best = sum(sum(one["rows"][n][1]) for one in train for n in one["best"]) / per_epoch
    for epoch in range(c.epochs):
        order = order_of([max(len(ids) for ids, _ in one["rows"]) for one in train],
                         c.batch_size, stream(c.seed, "dpo", "order", epoch))
        shuffled = [train[i] for i in order]
        for start in range(0, len(train), c.batch_size):
            batch = shuffled[start:start + c.batch_size]
            baseline = 0.0
            if c.loss == "kto":  # z0: each prompt with an answer to the next one, taken in turn
                ratios = []
                for n, one in enumerate(batch, start):
                    following = [*shuffled[n + 1:], *shuffled[:n]]
                    others = [e for e in following if e["prompt"] != one["prompt"]] or following
                    other = (others or [one])[0]["completions"]
                    row = answer_row(tokenizer, one["prompt"], other[n % len(other)])
                    if len(row[0]) <= block:
                        with torch.no_grad():
                            ratios.append((policy.logp(row) - reference.logp(row)).sum().item())
                baseline = max(0.0, np.mean(ratios)) if ratios else 0.0
            clear(policy)
            losses, right, best = [], [], []
            for one in batch:
                logp = [policy.logp(row).sum() for row in one["rows"]]
                if c.loss == "kto":
                    for p, ref, label in zip(logp, one["ref"], one["labels"]):
                        if label:
                            losses.append(loss_of_answer(p - ref, label, baseline))
                            right.append(nearly(label * (p.item() - ref - baseline)))
                else:
                    r = implicit(one, logp)
                    for i, j in one["pairs"]:
                        losses.append(loss_of_pair(r[i] - r[j]))
                        right.append(nearly(beta * (r[i] - r[j]).item()))
                best += [logp[n] for n in one["best"]]
            loss = sum(losses)
            total = loss / average
            if c.nll > 0 and best:
                total = total - c.nll * sum(best) / average_best
            total.backward()
            norm, factor = clip(weights, c.grad_clip), cosine(step, c.epochs * per_epoch, c.warmup)
            optimizer.step(factor)
            if step % 10 == 0:
                log.add("step", step=step, loss=loss.item() / len(losses), accuracy=np.mean(right),
                        baseline=baseline, lr=lr * factor, grad_norm=norm,
                        answers_per_s=sum(len(one["rows"]) for one in batch))
            step += 1
        final = validate(epoch + 1)
    final = final | compare(log, policy, reference, tokenizer, prompts, c, synthetic)
    return policy.state(), log, final, {parent["stage"]: parent["hash"]}


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


# --- stage 3: PPO --------------------------------------------------------------------------------


def ppo(c):
    (policy, parent, tokenizer), (reference, _, _) = load(c.init), load(c.init)
    reward_model, rm_parent, _ = load(c.reward_model, c.score_by)
    w = reward_model.w  # the critic starts as the reward model, shift and scale folded into it
    critic = Network({k: v for k, v in w.items() if k not in ("shift", "scale")}
                     | {"head.weight": w["head.weight"] / w["scale"],
                        "head.bias": (w["head.bias"] - w["shift"]) / w["scale"]},
                     reward_model.size, "gpt.")
    block = min(policy.size["block_size"], reward_model.size["block_size"])
    train = [p.text for p in sample_prompts(2000, held_out=False, seed=c.seed)] \
        if c.data == "synthetic" else choose(once(map(prompt_of, read(c.data)[0])), None, key_of)
    train = [p for p in train if len(prompt_ids(tokenizer, p)) + c.max_new_tokens <= block]
    asked = held_out_prompts(c.data, c.eval_prompts, tokenizer, block - c.max_new_tokens)
    text = text_rows(c.ptx_data, tokenizer, min(64, block), 3000, c.seed) if c.ptx_coef else None
    weights, critic_weights = list(policy.w.values()), list(critic.w.values())
    optimizers = (AdamW(weights, c.lr, eps=c.adam_eps),
                  AdamW(critic_weights, c.critic_lr, eps=c.adam_eps))
    log, beta, scores_so_far = Log(), c.beta, []
    for step in range(c.iterations):
        # rollout
        chosen = stream(c.seed, "ppo", "prompts", step).choice(
            len(train), c.batch_size, replace=len(train) < c.batch_size)
        heads = [prompt_ids(tokenizer, train[i]) for i in chosen]
        drawn = sample_many(policy, tokenizer, heads, c.max_new_tokens,
                            (c.seed, "ppo", "answers", step), c.temperature)
        rows = [(h + s["ids"], [0] * len(h) + [1] * len(s["ids"])) for h, s in zip(heads, drawn)]
        ended = [s["finished"] for s in drawn]

        # score; rewards, advantages and returns of each episode
        raw = [judged(reward_model, row) for row in rows]
        scores_so_far += [s for s, end in zip(raw, ended) if end]
        scale = 1.0
        if c.score_scaling and any(ended):
            scale = max(np.std(scores_so_far), 1e-4)
        episodes = []
        for row, s, end in zip(rows, raw, ended):
            e = episode(policy, reference, critic, row, c)
            e["score"] = s / scale if end else c.missing_eos
            e["reward"] = -beta * (e["old_logp"] - e["ref_logp"])
            if c.kl_in == "loss":  # the KL at the state that the action leads to
                e["reward"] = -beta * torch.cat([e["exact_kl"][1:], torch.zeros(1)])
            e["reward"][-1] += e["score"]
            advantage = later = later_value = 0.0
            e["advantage"] = torch.zeros_like(e["reward"])
            for t in reversed(range(len(e["reward"]))):
                delta = e["reward"][t] + c.gamma * later_value - e["old_value"][t]
                advantage = delta + c.gamma * c.lam * later
                e["advantage"][t] = later = advantage
                later_value = e["old_value"][t]
            e["returns"] = e["advantage"] + e["old_value"]
            episodes.append(e)
        every = lambda name, some=episodes: torch.cat([e[name] for e in some])
        spread = 1.0
        if c.whiten:
            mean, spread = every("advantage").mean(), every("advantage").var(correction=0)
            spread = (spread + 1e-8).sqrt()
            for e in episodes:
                e["advantage"] = (e["advantage"] - mean) / spread

        # train
        factor, seen, norms, ptx = linear(step, c.iterations, c.warmup), [], [], None
        random = stream(c.seed, "ppo", "minibatches", step)
        for _ in range(c.epochs):
            order = random.permutation(c.batch_size)
            size = c.batch_size // c.minibatches
            for start in range(0, c.batch_size, size):
                batch = [episodes[i] for i in order[start:start + size]]
                tokens = len(every("old_logp", batch))
                clear(policy, critic)
                for e in batch:
                    loss, info = episode_loss(policy, reference, critic, e, beta / spread, c)
                    (loss / tokens).backward()
                    seen.append(info)
                if c.ptx_coef > 0:
                    picked = [text[i] for i in random.integers(0, len(text), c.ptx_batch)]
                    ptx = text_loss(policy, picked)
                    (c.ptx_coef * ptx).backward()
                norms.append([clip(weights, c.grad_clip), clip(critic_weights, c.grad_clip)])
                for optimizer in optimizers:
                    optimizer.step(factor)

        # log: what the rollouts were like, before the updates on them
        kl = [(e["old_logp"] - e["ref_logp"]).sum().item() for e in episodes]
        lengths, n = [len(e["reward"]) for e in episodes], len(every("reward"))
        finished = [s for s, end in zip(raw, ended) if end]
        returns, error = every("returns"), every("returns") - every("old_value")
        texts = [s["text"] for s in drawn]
        row = dict(
            step=step, score=np.mean(finished) if finished else None, kl=np.mean(kl), beta=beta,
            lr=c.lr * factor,
            objective=np.mean([e["score"] for e in episodes]) - beta * np.mean(kl),
            kl_se=clustered_se(kl, [question(train[i], c.data == "synthetic") for i in chosen]),
            kl_exact=np.mean([e["exact_kl"].sum().item() for e in episodes]),
            kl_per_token=sum(kl) / n, entropy=every("entropy").mean().item(),
            length=np.mean(lengths), length_min=min(lengths), length_max=max(lengths),
            eos_rate=np.mean(ended), returns_mean=returns.mean().item(),
            returns_std=returns.std(correction=0).item(), explained_variance=1 - (
                (error**2).mean() / returns.var(correction=0).clamp(min=1e-8)).item(),
            ratio_max=max(i["ratio_max"] for i in seen), ptx_loss=ptx.item() if ptx else None,
            grad_norm=np.mean([a for a, _ in norms]),
            critic_grad_norm=np.mean([b for _, b in norms]),
            **{k: sum(i[k] for i in seen) / (n * c.epochs) for k in
               ("clip_fraction", "approx_kl", "policy_loss", "value_loss")},
            generate_tok_per_s=n, score_tok_per_s=n, train_tok_per_s=n)
        if c.data == "synthetic":
            row["gold"] = np.mean([gold_reward(train[i], t) for i, t in zip(chosen, texts)])
        log.add("step", **row)
        if step % c.log_every == 0 or step == c.iterations - 1:
            for i in range(min(4, c.batch_size)):
                log.add("sample", step=step, prompt=train[chosen[i]], response=texts[i],
                        score=episodes[i]["score"], kl=kl[i])
        if c.kl_target > 0:
            error = min(max(np.mean(kl) / c.kl_target - 1, -0.2), 0.2)
            beta *= 1 + error * c.batch_size / c.kl_horizon
    final = compare(log, policy, reference, tokenizer, asked, c, c.data == "synthetic",
                    reward_model, c.best_of)
    parents = {parent["stage"]: parent["hash"], "reward": rm_parent["hash"]}
    return policy.state(), log, final | dict(beta=row["beta"]), parents


@torch.no_grad()
def episode(policy, reference, critic, row, c):
    """What is fixed while we train on a response: one number for each of its tokens."""
    every, ref = policy.all_logp(row[0], c.temperature), reference.all_logp(row[0], c.temperature)
    places = [t - 1 for t in range(1, len(row[0])) if row[1][t]]
    every, ref, tokens = every[places], ref[places], [row[0][t + 1] for t in places]
    at = range(len(places))
    return dict(row=row, old_logp=every[at, tokens], ref_logp=ref[at, tokens],
                entropy=-(every.exp() * every).sum(1),
                exact_kl=(every.exp() * (every - ref)).sum(1),
                old_value=critic.values(row) if critic else None)


def episode_loss(policy, reference, critic, e, beta, c):
    """(sum of the losses over the tokens of a response, sums for the log)."""
    logp, value = policy.logp(e["row"], c.temperature), critic.values(e["row"])
    ratio = (logp - e["old_logp"]).exp()
    bounded = ratio.clamp(1 - c.clip, 1 + c.clip)
    policy_loss = -torch.minimum(ratio * e["advantage"], bounded * e["advantage"]).sum()
    near = e["old_value"] + (value - e["old_value"]).clamp(-c.value_clip, c.value_clip)
    value_loss = 0.5 * torch.maximum((value - e["returns"])**2, (near - e["returns"])**2).sum()
    loss = policy_loss + value_loss
    places = [t - 1 for t in range(1, len(e["row"][0])) if e["row"][1][t]]
    if c.kl_in == "loss" or c.entropy_coef > 0:
        every = policy.all_logp(e["row"][0], c.temperature)[places]
        with torch.no_grad():
            ref = reference.all_logp(e["row"][0], c.temperature)[places]
        if c.kl_in == "loss":
            loss = loss + beta * (every.exp() * (every - ref)).sum()
        loss = loss + c.entropy_coef * (every.exp() * every).sum()
    clipped = bounded * e["advantage"] < ratio * e["advantage"]
    return loss, dict(ratio_max=ratio.max().item(), clip_fraction=clipped.sum().item(),
                      approx_kl=(ratio - 1 - ratio.log()).sum().item(),
                      policy_loss=policy_loss.item(), value_loss=value_loss.item())


# --- stage 3 without a critic: GRPO --------------------------------------------------------------


def grpo(c):
    method = dict(clip_high=c.clip, kl_estimator="k2") | METHODS[c.method]
    if c.method == "rloo" and c.reward == "model":
        method["beta"] = 0.1
    pick = lambda name: method[name] if getattr(c, name) is None else getattr(c, name)
    advantage, aggregate, drop, kl_in, clip_high, beta, estimator = map(pick, (
        "advantage", "aggregate", "drop", "kl_in", "clip_high", "beta", "kl_estimator"))
    (policy, parent, tokenizer), (reference, _, _) = load(c.init), load(c.init)
    parents, block = {parent["stage"]: parent["hash"]}, policy.size["block_size"]
    reward_model = None
    if c.reward == "model":
        reward_model, rm_parent, _ = load(c.reward_model, c.score_by)
        parents["reward"] = rm_parent["hash"]
        block = min(block, reward_model.size["block_size"])
    if c.data == "synthetic":
        families = FAMILIES if reward_model else ("arithmetic",)
        sides = [[(p.text, p.answer) for p in sample_prompts(n, held_out, seed, families)]
                 for n, held_out, seed in ((2000, False, c.seed), (c.eval_prompts, True, 0))]
    else:
        sides = [[(prompt_of(r), str(r.get("answer"))) for r in side] for side in read(c.data)]
        for n, side in enumerate(sides):
            answer = dict((key_of(p), a) for p, a in reversed(side))  # of the first record
            sides[n] = [(p, answer[key_of(p)])
                        for p in choose(once([p for p, _ in side]), n and c.eval_prompts or None,
                                        key_of)]
    train, asked = ([(p, a) for p, a in side if len(prompt_ids(tokenizer, p)) + c.max_new_tokens
                     <= block] for side in sides)
    text = text_rows(c.ptx_data, tokenizer, min(64, block), 3000, c.seed) if c.ptx_coef else None
    weights, log, B = list(policy.w.values()), Log(), c.batch_size
    optimizer = AdamW(weights, c.lr, eps=c.adam_eps)
    for step in range(c.iterations):
        # rollout: K answers to each prompt
        chosen = stream(c.seed, "grpo", "prompts", step).choice(
            len(train), B // c.k, replace=len(train) < B // c.k)
        tasks = [train[i] for i in chosen for _ in range(c.k)]
        heads = [prompt_ids(tokenizer, p) for p, _ in tasks]
        drawn = sample_many(policy, tokenizer, heads[::c.k], c.max_new_tokens,
                            (c.seed, "grpo", "answers", step), c.temperature, c.k)
        texts = [s["text"] for s in drawn]

        # score; advantage of each answer over its group
        episodes = []
        for h, t, s, (_, answer) in zip(heads, texts, drawn, tasks):
            ids, end = s["ids"], s["finished"]
            e = episode(policy, reference, None, (h + ids, [0] * len(h) + [1] * len(ids)), c)
            if reward_model:
                e["score"] = judged(reward_model, e["row"]) if end else c.missing_eos
            else:
                e["score"] = right(t, end, answer)
            e["kl"] = (e["old_logp"] - e["ref_logp"]).sum().item()
            e["reward"] = e["score"] - (beta * e["kl"] if kl_in == "reward" else 0.0)
            episodes.append(e)
        groups = [episodes[i:i + c.k] for i in range(0, B, c.k)]
        signal = []
        for group in groups:
            rewards, scores = [e["reward"] for e in group], [e["score"] for e in group]
            signal.append(max(scores) > min(scores))
            for e in group:
                a = e["reward"] - np.mean(rewards)
                if advantage == "grpo":
                    a /= np.std(rewards, ddof=1) + 1e-4
                elif advantage == "rloo":
                    a = e["reward"] - (sum(rewards) - e["reward"]) / (c.k - 1)
                e["advantage"] = a if max(rewards) > min(rewards) else 0.0
                e["kept"] = signal[-1] or not drop

        # train
        steps, seen, ptx = [], [], None
        random = stream(c.seed, "grpo", "minibatches", step)
        for _ in range(c.epochs):
            order = random.permutation(B)
            size = B // c.minibatches
            for start in range(0, B, size):
                batch = [e for e in (episodes[i] for i in order[start:start + size]) if e["kept"]]
                if not batch and c.ptx_coef == 0:
                    continue
                clear(policy)
                length = lambda e: len(e["old_logp"])
                total = sum(map(length, batch))
                sums = np.zeros(2)
                for e in batch:
                    logp = policy.logp(e["row"], c.temperature)
                    ratio = (logp - e["old_logp"]).exp()
                    bounded = ratio.clamp(1 - c.clip, 1 + clip_high)
                    a = e["advantage"]
                    loss, kl = -torch.minimum(ratio * a, bounded * a).sum(), torch.zeros(())
                    l = logp - e["ref_logp"]
                    if kl_in == "loss":
                        kl = beta * (0.5 * l.sum()**2 if estimator == "k2"
                                       else ((-l).exp() - 1 + l).sum())
                    weight = dict(sequence=1 / (len(batch) * length(e)), tokens=1 / total,
                                  constant=1 / (len(batch) * c.max_new_tokens),
                                  sum=1 / len(batch))[aggregate]
                    (weight * (loss + kl)).backward()
                    sums += [weight * loss.item(), weight * kl.item()]
                    seen.append((length(e), (bounded * a < ratio * a).sum().item(),
                                 (ratio - 1 - ratio.log()).sum().item(), ratio.max().item()))
                if c.ptx_coef > 0:
                    picked = [text[i] for i in random.integers(0, len(text), c.ptx_batch)]
                    ptx = text_loss(policy, picked)
                    (c.ptx_coef * ptx).backward()
                steps.append([*sums, clip(weights, c.grad_clip)])
                optimizer.step(linear(step, c.iterations, c.warmup))

        # log
        kl, lengths = [e["kl"] for e in episodes], [len(e["old_logp"]) for e in episodes]
        n, tokens = sum(lengths), sum(s[0] for s in seen)
        means = np.mean(steps, 0) if steps else np.zeros(3)
        score = np.mean([e["score"] for e in episodes])
        row = dict(
            step=step, score=score, accuracy=None if reward_model else score,
            kl=None, kl_se=None, kl_per_token=None, objective=score, no_signal=1 - np.mean(signal),
            kept=np.mean([e["kept"] for e in episodes]),
            advantage_std=np.std([e["advantage"] for e in episodes], ddof=1),
            entropy=sum(e["entropy"].sum().item() for e in episodes) / n, length=n / B,
            length_min=min(lengths), length_max=max(lengths),
            eos_rate=np.mean([s["finished"] for s in drawn]),
            lr=c.lr * linear(step, c.iterations, c.warmup),
            policy_loss=means[0], kl_loss=means[1], grad_norm=means[2],
            ratio_max=max((s[3] for s in seen), default=0.0), ptx_loss=ptx.item() if ptx else None,
            clip_fraction=sum(s[1] for s in seen) / max(tokens, 1),
            approx_kl=sum(s[2] for s in seen) / max(tokens, 1),
            generate_tok_per_s=n, score_tok_per_s=n, train_tok_per_s=n)
        if beta > 0:
            row |= dict(kl=np.mean(kl), kl_se=clustered_se(kl, [question(p, c.data == "synthetic")
                                                                for p, _ in tasks]),
                        kl_per_token=sum(kl) / n, objective=score - beta * np.mean(kl))
        if c.data == "synthetic":
            row["gold"] = np.mean([gold_reward(p, t) for (p, _), t in zip(tasks, texts)])
        log.add("step", **row)
        if step % c.log_every == 0 or step == c.iterations - 1:
            for (p, _), t, e in list(zip(tasks, texts, episodes))[:min(c.k, 4)]:
                log.add("sample", step=step, prompt=p, response=t, score=e["score"],
                        advantage=e["advantage"])
    synthetic = c.data == "synthetic"
    final = compare(log, policy, reference, tokenizer, [p for p, _ in asked], c, synthetic,
                    reward_model, answers=None if reward_model else [a for _, a in asked])
    return policy.state(), log, final, parents
