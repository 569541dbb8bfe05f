"""The transformer that every stage shares, from scratch, in two dialects.

GPT-2's, the default: learned positions, LayerNorm, GELU, biases. And that of the Llama line (Llama,
Qwen2, Qwen3), by fields of `GPTConfig`: rotary positions, RMSNorm, SwiGLU, fewer heads for keys and
values than for queries. The names of the modules are GPT-2's in both.

Reading order: `Attention`, `MLP`, `Block`, `KVCache`, `GPT`, then the two functions that the
stages call, `generate` (sampling) and `token_logprobs` (scoring). `SharedPrompts` and `least` only
save time.

Shapes: B batch, T time (tokens), P prompt length, C channels (n_embd), H heads, D head_dim, V
vocabulary rows, N the number of response tokens in a batch.

Rows are always RIGHT-padded. With causal attention a real token never sees the padding behind it,
so scoring and training need no attention mask at all, and positions are simply 0, 1, 2, ...
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50304  # rows of the embedding: n_tokens rounded up to a multiple of 64
    n_tokens: int = 50260  # ids that may ever be produced; the rows behind get probability zero
    block_size: int = 1024  # longest sequence; of learned positions their number
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # used by pretrain.py only: later stages compare log-probabilities
    # --- the dialect; a size of 0 stands for GPT-2's
    n_kv_head: int = 0  # heads of keys and values, each read by n_head / n_kv_head heads; 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_hidden: int = 0  # width of the MLP; 0: 4 n_embd
    rope_theta: float = 0.0  # base of the rotary positions; 0: learned positions
    rope_scaling: tuple = ()  # Llama 3's: factor, low, high frequency factor, first block_size
    norm: str = "layer"  # "layer": LayerNorm, "rms": RMSNorm, which has no mean and no bias
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # "gelu", in its tanh form, or "swiglu"
    bias: str = "all"  # "all" linear maps have one, "none", or "qkv": those of q, k, v (Qwen2)
    qk_norm: bool = False  # RMSNorm over D of every query and key, before they rotate (Qwen3)
    tied: bool = True  # one matrix for embedding and head

    def __post_init__(self):
        for name, size in vars(self).items():
            kind = type(GPTConfig.__dataclass_fields__[name].default)
            if kind is int and (type(size) is not int or not 0 <= size < 2**31):
                raise ValueError(f"{name}={size!r}: must be a whole number from 0, below 2^31")
            if type(size) is not kind and not (kind is float and type(size) is int):
                raise ValueError(f"{name}={size!r}: must be of type {kind.__name__}")
            below = 1 if name == "dropout" else math.inf
            if kind is float and not 0 <= size < below:
                raise ValueError(f"{name}={size!r}: must be at least 0, and below {below}")
        if len(self.rope_scaling) not in (0, 4) or not all(
                0 < x < math.inf for x in self.rope_scaling):
            raise ValueError(f"rope_scaling={self.rope_scaling}: must be four positive numbers")
        if not self.head_dim and self.n_head and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        for name, size in dict(n_kv_head=self.n_head, head_dim=self.n_embd // (self.n_head or 1),
                               n_hidden=4 * self.n_embd).items():
            object.__setattr__(self, name, getattr(self, name) or size)  # frozen, but not yet
        for name in ("block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim",
                     "n_hidden"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a whole number above 0")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of "
                             f"n_kv_head={self.n_kv_head}")
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs")
        for name, known in dict(norm=("layer", "rms"), mlp=("gelu", "swiglu"),
                                bias=("all", "none", "qkv")).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: expected one of "
                                 + ", ".join(known))
        if not 0 < self.n_tokens < self.vocab_size:
            raise ValueError(f"n_tokens={self.n_tokens} must lie below vocab_size={self.vocab_size}"
                             " (the first id behind the real tokens is PAD)")


def as_numbers(hidden, dtype):
    """The mask of attention, -inf where `hidden`: every layer would make it of truth values."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)


class KVCache:
    """Keys and values of every layer in one fixed block of memory, (n_layer, 2, B, H_kv, S, D).

    Each row writes at its own position, so rows of different length share the cache without left
    padding. Slots behind a row's position hold leftovers of the padding; the mask in `Attention`
    hides them until the row overwrites them.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, device, dtype):
        self.kv = torch.zeros(config.n_layer, 2, batch_size, config.n_kv_head, max_length,
                              config.head_dim, device=device, dtype=dtype)

    def move_to(self, positions, first=False):
        """The next tokens stand at `positions` (B, T): where all layers write, what they see.

        first: positions are 0..T-1 in an empty cache. Those tokens see each other alone.
        """
        self.places = torch.arange(len(positions), device=positions.device)[:, None], positions
        self.mask, self.filled = None, self.kv.size(4)
        if first:
            return
        if positions.device.type == "cpu":  # of a GPU one would wait for it, and a graph is static
            # in steps of 64, because attention is slower at the first sight of a shape
            self.filled = min(self.filled, (int(positions.max()) // 64 + 1) * 64)
        # a query at position p may look at slots 0..p, whatever lies behind them: (B, 1, T, S)
        later = torch.arange(self.filled, device=positions.device) > positions[:, None, :, None]
        self.mask = as_numbers(later, self.kv.dtype)

    def attend(self, layer, q, k, v, **options):
        """Write k, v (B, H_kv, T, D) of one layer; what q (B, H, T, D) gets from all slots."""
        for slots, new in zip(self.kv[layer], (k, v)):
            # advanced indices (B, T) first, heads last: the indexed view is (B, T, H, D)
            slots.transpose(1, 2)[self.places] = new.transpose(1, 2).to(slots.dtype)
        if self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        k, v = self.kv[layer, :, :, :, :self.filled].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, self.mask.to(q.dtype), **options)


class SharedPrompts:
    """Attention of rows that share prompts, of which each is computed once.

    The network reads N tokens, one a row and without padding: first those of the G prompts, then
    those that follow in each of the B rows. Row b stands behind prompt of[b]. Attention itself
    needs padding: (G, P) prompts, and (B, R) of what follows.

    of (B,); lengths (G,) of the prompts, at most P; after (B,) of what follows, at most R. T: the
    width of the padded rows.
    """

    def __init__(self, lengths, of, after, P, R, T):
        self.of, self.P, self.R, self.T, device = of, P, R, T, of.device
        place = torch.arange(P + R, device=device)  # of keys: a prompt, then what follows it
        behind = (place >= lengths[of, None]) & (place < P)  # (B, P + R)
        later = place > place[P:, None]  # (R, P + R)
        hidden = (behind[:, None] | later)[:, None]  # (B, 1, R, P + R)
        self.mask = as_numbers(hidden, precision(device))
        real = torch.cat([(place[:P] < lengths[:, None]).flatten(),
                          (place[:R] < after[:, None]).flatten()])  # (G P + B R,)
        self.real = real.nonzero()[:, 0]  # (N,) where each token stands in the padded blocks
        self.token = real.cumsum(0) - 1  # (G P + B R,) which token stands there; in padding, any

    def attend(self, layer, q, k, v, **options):
        """q (N, H, 1, D), k, v (N, H_kv, 1, D) -> (N, H, 1, D)."""
        n = len(self.token) - len(self.of) * self.R
        fold = lambda x, size: x[:, :, 0].unflatten(0, (-1, size)).transpose(1, 2)
        unfold = lambda x: x.transpose(1, 2).flatten(0, 1)
        q, k, v = (x.index_select(0, self.token) for x in (q, k, v))
        if options.pop("enable_gqa"):  # on a GPU no fast kernel takes grouped heads and a mask
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        prompts = [fold(x[:n], self.P) for x in (q, k, v)]  # (G, H, P, D)
        asked = F.scaled_dot_product_attention(*prompts, is_causal=True, **options)
        keys, values = (torch.cat([old.index_select(0, self.of), fold(new[n:], self.R)], 2)
                        for old, new in zip(prompts[1:], (k, v)))  # (B, H, P + R, D)
        rest = F.scaled_dot_product_attention(fold(q[n:], self.R), keys, values,
                                              self.mask.to(q.dtype), **options)
        return torch.cat([unfold(asked), unfold(rest)]).index_select(0, self.real)[:, :, None]


MKL = torch.backends.mkl.is_available()  # of other libraries nothing is measured


def linear(x, weight, bias=None):
    """F.linear: x (..., in), weight (out, in) -> (..., out), and faster in a step of decoding.

    That is bound by reading the weights. On a CPU, where no cache holds a matrix, MKL reads it 1.2
    to 4 times faster for W x^T than for x W^T, if x has 2 to 8 rows; so one row is computed twice.
    """
    few = x.numel() <= 8 * x.size(-1)
    if not few or weight.numel() < 2**18 or x.device.type != "cpu" or not MKL:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.size(-1))
    n = len(rows)
    y = weight @ (rows.repeat(2, 1) if n == 1 else rows).t()  # (out, rows)
    # contiguous: attention is slow where the numbers of a head do not lie side by side
    y = y[:, :n].t().contiguous().view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def norm(config):
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


def rotary_angles(config, positions):
    """(cos, sin), each (B, 1, T, D/2) in fp32, of the angles by which `rotate` turns.

    Pair d turns by position * theta^(-2d / D). Llama 3 stretches its slow pairs for a longer
    context: those that make under `low` turns in the first block_size `factor` times, those of
    over `high` turns not at all, in between a mixture of both.
    """
    pair = torch.arange(0, config.head_dim, 2, device=positions.device)
    speed = 1.0 / config.rope_theta ** (pair.float() / config.head_dim)
    if config.rope_scaling:
        factor, low, high, first = config.rope_scaling
        turns = first * speed / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        speed = kept * speed + (1 - kept) * speed / factor
    angles = positions[:, None, :, None] * speed
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, H, T, D), turned: number d of the first half and of the second half are a pair."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def pick(x, at):
    """x (B, T, C) -> (N, C); at (N,): places in the flattened (B T,), or None for x itself."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)


class Attention(nn.Module):
    """Causal self-attention; n_head / n_kv_head query heads share one head of keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.D = config.n_head, config.n_kv_head, config.head_dim
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.D,
                             bias=config.bias != "none")
        self.c_proj = Linear(self.n_head * self.D, config.n_embd, bias=config.bias == "all")
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.D, config.norm_eps) for _ in range(2))

    def forward(self, x, layer=0, cache=None, angles=None, at=None):
        B, T, _ = x.shape
        sizes = [self.n_head, self.n_kv_head, self.n_kv_head]  # heads of q, k, v: (B, heads, T, D)
        q, k, v = self.c_attn(x).view(B, T, sum(sizes), self.D).transpose(1, 2).split(sizes, dim=1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        options = dict(dropout_p=self.dropout if self.training else 0.0,
                       enable_gqa=self.n_kv_head < self.n_head)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        else:
            y = cache.attend(layer, q, k, v, **options)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.D)
        y = self.c_proj(pick(y, at))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.swiglu, self.dropout = config.mlp == "swiglu", config.dropout
        wide = config.n_hidden * (2 if self.swiglu else 1)  # gate and value of SwiGLU in one matrix
        self.c_fc = Linear(config.n_embd, wide, bias=config.bias == "all")
        self.c_proj = Linear(config.n_hidden, config.n_embd, bias=config.bias == "all")

    def forward(self, x):
        x = self.c_fc(x)
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh")  # GPT-2 uses the tanh form
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block: x + attn(ln(x)), then x + mlp(ln(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, layer=0, cache=None, angles=None, at=None):
        x = pick(x, at) + self.attn(self.ln_1(x), layer, cache, angles, at)
        return x + self.mlp(self.ln_2(x))


@functools.cache
def compiled_block():
    """Block's forward, compiled at its first calls: one function for all blocks and all lengths."""
    # with gradients or without, behind shared prompts or not, the last block, one row: more than 8
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(Block.forward, dynamic=True)


class GPT(nn.Module):
    """Embedding, blocks, a last norm; the head is the embedding's own matrix (tied) or another.

    `forward` returns hidden states, not logits: a reward or value head reads them directly, and
    the vocabulary head, by far the largest product at small size, is applied only where needed.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # compute each block again in the backward pass: less memory
        self.compiled = False  # blocks by torch.compile, in training and scoring
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rope_theta:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # GPT-2 draws all matrices with std 0.02, at widths 768 to 1600. A narrow model needs more:
        # at width 128 that std leaves attention nearly uniform, and the model learns to copy from
        # its context several times later. So 0.02 stands for width 1024, others scale as 1/sqrt.
        std = 0.02 * math.sqrt(1024 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # shrink what is added to the residual stream, 2 additions a layer
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # LayerNorm weights stay at 1

    def forward(self, tokens, cache=None, positions=None, at=None):
        """tokens (B, T) -> final hidden states (B, T, C), after the last norm.

        `positions` (B, T) says where each token stands in a cache; without, they are 0..T-1.
        `at` (N,): of the B T states only these are wanted, and returned as (N, C). The last block
        computes no others: behind its attention nobody looks at them.
        """
        T = cache.T if isinstance(cache, SharedPrompts) else tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        first = positions is None
        if first:
            positions = torch.arange(T, device=tokens.device).expand_as(tokens)
        if self.config.rope_theta:
            x, angles = self.wte(tokens), rotary_angles(self.config, positions)
        else:
            x, angles = self.wte(tokens) + self.wpe(positions), None
        x = F.dropout(x, self.config.dropout, self.training)
        if isinstance(cache, KVCache):
            cache.move_to(positions, first)
        recompute = self.checkpointing and torch.is_grad_enabled()
        # decoding has a graph of its own, `one_launch`
        compiled = self.compiled and not isinstance(cache, KVCache)
        run = compiled_block() if compiled else Block.__call__
        for layer, block in enumerate(self.h):
            inputs = block, x, layer, cache, angles, at if layer + 1 == len(self.h) else None
            x = checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs)
        return self.ln_f(x)

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., n_tokens) in fp32 (fp64 where the network is fp64).

        The padded rows of the vocabulary (PAD is the first of them) are cut off, in sampling and
        scoring alike: left in, they would leak probability and make the two disagree.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # not under autocast: it would round the logits to bf16, 0.03 nats off in a log-probability
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.wte if self.config.tied else self.lm_head
            # cut from the logits, not from the matrix: whole rows of 64 are multiplied faster, and
            # the gradient of a slice would be one more matrix of this size
            return linear(hidden.to(dtype), head.weight.to(dtype))[..., :self.config.n_tokens]

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once


def autocast(device):
    """bf16 on a GPU; on a CPU nothing, because bf16 is some 100 times slower on common ones."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def precision(device, otherwise=torch.float32):
    """The dtype that autocast rounds to on this device; without autocast the other one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) \
        else otherwise


def one_launch(fn, *inputs):
    """fn as a CUDA graph: on a GPU a step of decoding is a thousand kernels, each done before the
    next one is launched. fn may read and write only tensors that stay where they are: weights that
    autocast rounds do so until it is left, frozen ones always.

    Returns a function of inputs of the same shapes; its result is overwritten by the next call.
    """
    inputs, stream = [x.clone() for x in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn(*inputs)  # what libraries allocate at a first call must not be part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn(*inputs)

    def replay(*values):
        for x, value in zip(inputs, values):
            x.copy_(value)
        graph.replay()
        return result

    return replay


def sampling(fn):
    """fn in inference mode, where views cost less than without gradients alone. Under autocast that
    would round all weights again at every step: its copies of them are not kept there."""
    @functools.wraps(fn)
    def run(*args, **options):
        rounds = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
        with torch.no_grad() if rounds else torch.inference_mode():
            return fn(*args, **options)
    return run


@sampling
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, uniforms=None, check_every=8,
             samples=1):
    """Sample `samples` responses per prompt, y_t ~ softmax(logits / temperature).

    Plain samples: no top-k, no top-p, no minimum length, because the log-probabilities that the
    stages compute are those of exactly this distribution. temperature 0 takes the argmax.

    prompts: lists of token ids, of different lengths.
    uniforms (B, max_new_tokens), float64 in [0, 1): what the tokens of each row are drawn with, as
    `common.uniforms` makes them; only temperature 0 needs none.
    Rows of a prompt are adjacent: B = prompts * samples, row p * samples + k is sample k of prompt
    p. Each prompt is read once, whatever `samples` is: its cache is expanded to its rows.
    Returns tokens (B, T), prompt and response contiguous and right-padded with PAD;
    response_mask (B, T), 1.0 on response tokens, EOS included; finished (B,), True where the row
    ended with EOS (a row cut at max_new_tokens gets none). T is the longest row of the result.
    Raises ValueError for an empty prompt, one that leaves no room in the context, or no uniforms
    where some are needed, and FloatingPointError where the first logits are not finite.
    """
    config, device = model.config, model.wte.weight.device
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    if min(lengths) == 0:
        raise ValueError("generate: a prompt is empty")
    if longest + max_new_tokens > config.block_size:
        raise ValueError(f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones do "
                         f"not fit the context of {config.block_size}")
    if temperature and uniforms is None:
        raise ValueError(f"generate: temperature {temperature} needs uniforms, as common.uniforms "
                         "makes them")
    pad, size = config.n_tokens, longest + max_new_tokens
    tokens = torch.full((len(prompts), size), pad)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    start = torch.tensor(lengths, device=device)
    uniforms = uniforms.to(device) if temperature else None

    cache = KVCache(config, len(prompts), size, device,
                    precision(device, model.wte.weight.dtype))
    # prefill: the padding of short rows leaves junk in their later slots, see KVCache
    ends = torch.arange(len(prompts), device=device) * longest + start - 1
    last = model(tokens[:, :longest], cache, at=ends)  # (B, C), of the last token of each prompt
    if samples > 1:  # repeat_interleave, not repeat: the rows of a prompt are adjacent
        tokens, start, last = (x.repeat_interleave(samples, 0) for x in (tokens, start, last))
        cache.kv = cache.kv.repeat_interleave(samples, 2)
    B = len(tokens)
    position = start.clone()  # (B,) where each row's next token goes, right behind its prompt
    done = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # the rows still in the batch, those of the cache
    forward = None
    for step in range(max_new_tokens):
        logits = model.logits(last)
        # sampled from nan, a token would be an id that does not exist
        if step == 0 and not (logits / (temperature or 1)).isfinite().all():
            raise FloatingPointError(f"the logits are not finite at temperature {temperature}")
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            # the first token whose cumulative probability exceeds u. fp64, because fp32 sums round
            # away the rare tokens; unlike multinomial it never syncs, and a row draws the same
            # whatever rows are beside it
            p = F.softmax(logits / temperature, dim=-1)
            cumulative = p.double().cumsum(-1)
            u = uniforms[rows, step, None]
            token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
        token = token.masked_fill(done[rows], pad)
        tokens[rows, position[rows]] = token
        position[rows] += ~done[rows]
        done[rows] |= token == eos
        if step + 1 == max_new_tokens:
            break
        # asking the GPU whether rows are done stalls it, so there we ask only now and then
        if device.type == "cpu" or step % check_every == 0:
            active = (~done[rows]).nonzero()[:, 0]
            if len(active) == 0:
                break
            if len(active) <= len(rows) // 2:  # half of the work would be for finished rows
                rows, cache.kv, forward = rows[active], cache.kv[:, :, active], None
        # a finished row repeats its last token in place; nothing reads the result
        current = position[rows] - 1
        inputs = tokens[rows, current][:, None], current[:, None]
        if forward is None:
            forward = lambda token, place: model(token, cache, place)[:, 0]
            if device.type == "cuda":
                forward = one_launch(forward, *inputs)
        last = forward(*inputs)

    columns = torch.arange(int(position.max()), device=device)
    response_mask = ((columns >= start[:, None]) & (columns < position[:, None])).float()
    with torch.inference_mode(False):  # else no gradient may be computed where they take part
        return tokens[:, :columns.numel()].clone(), response_mask.clone(), done.clone()


def token_logprobs(model, tokens, response_mask, temperature=1.0):
    """Log-probability of every response token: the one function that all stages score with.

    tokens (B, T), right-padded; response_mask (B, T), 1 on response tokens, EOS included.
    Returns logp (B, T) in fp32: logp[:, t] = log p(tokens[:, t] | tokens[:, :t]) in nats per token
    under softmax(logits / temperature); exactly 0 outside the mask. No reduction.
    """
    return token_stats(model, tokens, response_mask, temperature)[0]


def trim(tokens, response_mask):
    """Both without the columns behind the last response token of all rows: what follows there is
    padding, and nobody looks back at it. (B, T) to (B, T'), T' at least 1."""
    used = response_mask.any(0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    return tokens[:, :width], response_mask[:, :width]


def states(model, tokens, response_mask, wanted):
    """The final hidden states, (N, C), of the positions `wanted` (B, T), bool: none of them before
    the last token of its row's prompt."""
    return model(*least(tokens, response_mask, wanted)).flatten(0, -2)


def least(tokens, response_mask, wanted):
    """What a network is called with for `states`, so that it computes little else.

    A prompt that several rows begin with is read once, where that saves a tenth of the tokens.
    """
    (B, T), device = tokens.shape, tokens.device
    at, column = wanted.flatten().nonzero()[:, 0], torch.arange(T, device=device)
    if len(at) == B * T:
        return tokens,
    plain = tokens, None, None, at
    start = response_mask.int().argmax(1)  # (B,) tokens of the prompts
    if B == 1 or len(at) == 0 or int(start.min()) == 0:
        return plain
    prompts, of = prompts_of(tokens, start)
    if len(prompts) == B:
        return plain
    lengths = (prompts >= 0).sum(1)  # (G,)
    after = (wanted * column).amax(1) + 1 - start  # (B,)
    sizes = lengths.max(), after.max().clamp(min=1), lengths.sum() + after.sum()
    P, R, N = torch.stack(sizes).tolist()  # a GPU is waited for once
    if N > 0.9 * B * T:
        return plain
    shared = SharedPrompts(lengths, of, after, P, R, T)
    place = (start[:, None] + column[:R]).clamp(max=T - 1)  # (B, R), behind the prompts
    inputs = torch.cat([prompts[:, :P].flatten(), tokens.gather(1, place).flatten()])
    positions = torch.cat([column[:P].repeat(len(prompts)), place.flatten()])
    row, place = at // T, at % T - start[at // T]  # (n,); -1: at the last token of a prompt
    at = torch.where(place < 0, of[row] * P + start[row] - 1, len(prompts) * P + row * R + place)
    return inputs[shared.real, None], shared, positions[shared.real, None], shared.token[at]


def prompts_of(tokens, start):
    """(prompts (G, T) without repetition, -1 behind each; of (B,), which of them a row begins with)
    of rows (B, T) whose prompts have `start` (B,) tokens."""
    behind = torch.arange(tokens.shape[1], device=tokens.device) >= start[:, None]
    return tokens.masked_fill(behind, -1).unique(dim=0, return_inverse=True)


def token_stats(model, tokens, response_mask, temperature=1.0, entropy=False, ref_model=None,
                chunk=None):
    """`token_logprobs` and, from the same forward, what needs the whole distribution.

    Returns (logp, entropy, kl, ref_logp), each (B, T), fp32, nats per token, 0 outside the mask:
    entropy of p(. | tokens[:, :t]) if `entropy`, else None; with `ref_model` the exact
    KL(p || p_ref) = sum_v p(v) (log p(v) - log p_ref(v)) at each visited state and the
    log-probabilities of the tokens under it, else None.

    The head runs on response positions only, at most `chunk` of them at a time (by default as many
    as make 64 MiB of logits, 512 on a GPU), and chunks recompute their log-softmax in the backward
    pass: of (B, T, V) and (N, V) no more than a chunk ever exists in fp32.
    """
    chunk = chunk or max(128, 2 ** (27 if tokens.is_cuda else 24) // model.config.n_tokens)
    T = tokens.shape[1]
    tokens, response_mask = trim(tokens, response_mask)
    predicts = response_mask[:, 1:].bool()  # token t is predicted from the hidden state at t - 1
    targets = tokens[:, 1:][predicts]  # (N,)
    inputs = least(tokens[:, :-1], response_mask, predicts)
    hidden, ref_hidden = model(*inputs).flatten(0, -2), None  # (N, C)
    if ref_model is not None:
        with torch.no_grad():
            ref_hidden = ref_model(*inputs).flatten(0, -2)

    def stats(hidden, targets, ref_hidden):
        logp_all = F.log_softmax(model.logits(hidden) / temperature, dim=-1)  # (n, V)
        logp = logp_all.gather(1, targets[:, None])[:, 0]
        entropies = -(logp_all.exp() * logp_all).sum(-1) if entropy else None
        kl = ref_logp = None
        if ref_hidden is not None:
            with torch.no_grad():
                ref_all = F.log_softmax(ref_model.logits(ref_hidden) / temperature, dim=-1)
            ref_logp = ref_all.gather(1, targets[:, None])[:, 0]
            kl = (logp_all.exp() * (logp_all - ref_all)).sum(-1)
        return logp, entropies, kl, ref_logp

    N = targets.numel()
    size = math.ceil(N / math.ceil(N / chunk)) if N else 1  # of chunks that are all of one size
    parts = []
    for i in range(0, max(N, 1), size):
        args = (hidden[i:i + size], targets[i:i + size],
                None if ref_hidden is None else ref_hidden[i:i + size])
        # not the last one: its backward pass is the first, when there is no other
        recompute = i + size < N and torch.is_grad_enabled()
        parts.append(checkpoint(stats, *args, use_reentrant=False) if recompute else stats(*args))

    def scatter(values):  # (N,) back to (B, T)
        if values[0] is None:
            return None
        values = torch.cat(values)
        out = values.new_zeros(predicts.shape).masked_scatter(predicts, values)
        return F.pad(out, (1, T - tokens.shape[1]))  # column 0 has no token before it

    return tuple(scatter(values) for values in zip(*parts))


def text_loss(model, tokens):
    """Next-token loss on plain text, tokens (rows, T): nats per token, a MEAN over predictions.

    What SFT and the reward model mix in, and PPO-ptx (InstructGPT eq. 2). Position 0 predicts
    nothing of itself, so the mean is over rows (T - 1) tokens.
    """
    tokens = tokens.long()  # of the int32 in which texts are kept
    everything = torch.ones(tokens.shape, device=tokens.device)
    return -token_logprobs(model, tokens, everything).sum() / (tokens.numel() - len(tokens))
