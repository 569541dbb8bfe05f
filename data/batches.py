"""A network run over many rows, in batches of like length: one home for every such loop.

Most rows end far before the longest one. Where rows of like length stand together, a forward pass
that stops at the last of them has little padding to run over.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cli import processes, progress
from data.records import collate
from model import autocast, generate, prompts_of, text_loss


# --- several processes: each computes its share --------------------------------------------------


def share(items):
    """Those of a sequence or tensor of items that this process computes: every so many-th one; with
    fewer items than processes none for some."""
    number, count = processes()
    return items[number::count]


def to_compute(n):
    """`share` of the numbers 0 to n - 1, where the results are gathered: a process without a share
    does the first one again, so that it knows what a result is like."""
    return share(range(n)) or range(1)


def gather(mine, n):
    """The results for n items from those `to_compute` names, in order, on every process: a tensor
    (m, ...) to a tensor (n, ...), a list to a list."""
    _, count = processes()
    if count == 1:
        return mine
    if not isinstance(mine, torch.Tensor):
        parts = [None] * count
        dist.all_gather_object(parts, mine)
        return [parts[i % count][i // count] for i in range(n)]
    most = -(-n // count)  # items of a process; who has fewer sends zeros, which are cut off
    full = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(full) for _ in range(count)]
    dist.all_gather(parts, full)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def gather_answers(tokens, mask, finished, n, pad, samples=1):
    """What `generate` returned for the prompts that `to_compute(n)` names, for all n prompts."""
    if processes()[1] == 1:
        return tokens, mask, finished
    width = torch.tensor(tokens.shape[1])
    dist.all_reduce(width, dist.ReduceOp.MAX)
    more = int(width) - tokens.shape[1]
    groups = (F.pad(tokens, (0, more), value=pad), F.pad(mask, (0, more)), finished)
    return tuple(gather(x.unflatten(0, (-1, samples)), n).flatten(0, 1) for x in groups)


def text_share(model, tokens):
    """This process's part of `text_loss(model, tokens)`: the parts of all add up to it."""
    mine, device = share(tokens), model.wte.weight.device
    if not len(mine):
        return torch.zeros((), device=device, requires_grad=True)
    with autocast(device):
        # a mean over its tokens; all rows are of one length, so it counts by its rows
        return text_loss(model, mine.to(device)) * len(mine) / len(tokens)


# --- batches of like length ----------------------------------------------------------------------

ENOUGH = 2**11  # tokens of a forward pass; measured on a CPU


def ends(mask):
    """Position of the last response token of each row, (B,), from its mask (B, T)."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def ends_together(tokens, mask):
    """`ends`, but of the longest row that begins with the same prompt, and a fraction that tells
    prompts apart: sorted by it, rows of a prompt are neighbours, and a pass reads it once."""
    prompts, of = prompts_of(tokens, mask.int().argmax(1))
    own = ends(mask)
    longest = own.new_zeros(len(prompts)).scatter_reduce(0, of, own, "amax")
    return longest[of] + of / len(prompts)


def by_length(rows, lengths, size, most=math.inf, padding=0.2):
    """The indices `rows` in pieces of at most `size` (0: of any size), sorted by their lengths.

    A piece ends before it takes more than `most` tokens, padding among them, and where this share
    of it would be padding; but not below ENOUGH tokens: smaller passes are no faster.
    lengths: of all rows, not only of these. The price: a row has other neighbours in the next
    forward pass, and may round differently.
    """
    rows = rows[lengths[rows].argsort(stable=True)]
    cuts, start, real = [], 0, 0
    for n, length in enumerate(lengths[rows].tolist()):
        padded, real = (n - start + 1) * length, real + length
        if n > start and (n - start == size or padded > most
                          or padded > ENOUGH and real < (1 - padding) * padded):
            cuts.append(n)
            start, real = n, length
    return rows.tensor_split(cuts)


def like_length(lengths, size, rng, bucket=100):
    """A permutation of rows of these lengths, whose batches of `size` are of like length.

    The rows are shuffled; within every `bucket` batches they are sorted by length; then the batches
    are shuffled. One that is not full comes last: its rows are a slice of the last sorted bucket,
    at a random place. On pairs of HH-RLHF a batch runs over 1.13 times its tokens, not 2.3 (at 8
    prompts).

    The trap: a sum that is divided by the tokens of its own step makes those of short rows weigh
    more, and the model brief. The stages divide by what an average step of the epoch holds.
    """
    order, n = rng.permutation(len(lengths)), len(lengths) // size  # whole batches
    buckets = np.arange(len(order)) // (bucket * size)
    order = order[np.lexsort((np.asarray(lengths)[order], buckets))]
    short = len(order) - n * size  # rows of the batch that is not full
    start = rng.integers(n // bucket * bucket * size, n * size + 1)
    rest = slice(start, start + short)
    batches = np.delete(order, rest).reshape(n, size)
    return np.concatenate([batches[rng.permutation(n)].ravel(), order[rest]])


def in_pieces(fn, lengths, size, bar=None, most=math.inf):
    """fn(indices) for every piece of the rows: its results (n, ...) joined, in the rows' order.

    size bounds the memory (0 does not): where a gradient is needed, a piece is computed again in
    the backward pass. So a loss may compare rows of different pieces. bar: shows progress under
    this name.
    Without gradients several processes, which all have the same rows, share them; with them a
    process has its own rows.
    """
    n, gradients = len(lengths), torch.is_grad_enabled()
    mine = range(n) if gradients else to_compute(n)
    rows = torch.arange(mine.start, mine.stop, mine.step)
    parts = by_length(rows.to(lengths.device), lengths, size, most)
    if size and size < len(rows) and gradients:
        fn = partial(checkpoint, fn, use_reentrant=False, preserve_rng_state=False)
    results = torch.cat([fn(part) for part in progress(parts, bar)])
    results = results[torch.cat(parts).argsort()]  # from the order by length to that of the rows
    return results if gradients else gather(results, n)


@torch.no_grad()
def over_rows(fn, rows, masks, pad, device, size=64, bar=None):
    """fn(tokens, mask) -> (n,) over encoded rows, lists of ids and masks: (rows,), on the CPU in
    float64, in their order."""
    def piece(part):
        part = part.tolist()
        tokens, mask = collate([rows[i] for i in part], [masks[i] for i in part], pad)
        with autocast(device):
            return fn(tokens.to(device), mask.to(device)).cpu().double()

    lengths = getattr(rows, "lengths", None)  # data.tokens.Flat need not be read for it
    if lengths is None:
        lengths = [len(row) for row in rows]
    return in_pieces(piece, torch.as_tensor(lengths), size, bar, most=2**14)


def sample_texts(model, tokenizer, prompt_ids, max_new_tokens, uniforms, temperature=1.0,
                 batch_size=256, samples=1, bar=None):
    """Sampled responses of each prompt (a list of ids): [{"text", "ids", "finished"}], in order.

    uniforms(numbers of prompts, max_new_tokens, samples): what `generate` takes for them, as by
    `common.uniforms` with its first arguments; temperature 0 needs none.
    samples: how many of each; those of a prompt are adjacent, and it is read once for all of them.
    batch_size counts responses. ids are the response's tokens, EOS included if it ended
    (`finished`). bar: shows progress under this name.
    """
    results = {}  # of each prompt: its samples
    lengths = torch.tensor([len(ids) + max_new_tokens for ids in prompt_ids])
    mine = to_compute(len(lengths))
    # most: of the cache. Padding costs little here: a step reads the weights for few rows as for
    # many, and one more batch takes as many steps again
    parts = by_length(torch.tensor(mine), lengths, max(1, batch_size // samples),
                      most=max(1, 2**15 // samples), padding=1.0)
    for part in progress(parts, bar):
        rows = [i * samples + k for i in part.tolist() for k in range(samples)]
        with autocast(model.wte.weight.device):
            tokens, mask, done = generate(
                model, [prompt_ids[i] for i in part], max_new_tokens, tokenizer.eos, temperature,
                uniforms and uniforms(part.tolist(), max_new_tokens, samples), samples=samples)
        for i, row, m, finished in zip(rows, tokens.tolist(), mask.bool().tolist(), done.tolist()):
            ids = [t for t, keep in zip(row, m) if keep]
            results.setdefault(i // samples, []).append(
                dict(text=tokenizer.decode(ids), ids=ids, finished=finished))
    every = gather([results[i] for i in mine], len(lengths))
    return [sample for some in every for sample in some]
