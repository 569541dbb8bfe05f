"""Text to token ids and back, and the chat template.

Two tokenizers, both `tiktoken.Encoding`s built from a ranks file:
    synthetic   byte-level BPE of 1,787 tokens for the embedded data, committed with the code
    gpt2        GPT-2's BPE, 50,257 tokens, from $GPT2_RANKS, tiktoken's cache or download

Ids behind the ranks: EOS (GPT-2's <|endoftext|>), the three chat markers, then PAD. EOS and the
markers can be produced; PAD is the first padded row of the vocabulary, which never gets probability
(model.py), and it is never EOS, so a mask can never lose the stop token.

The template, exactly, with nothing in between:
    <|system|>text<|user|>text<|assistant|>response EOS
Prompt and response are tokenised apart and joined as ids: BPE never merges across the boundary, so
the prompt's ids are a prefix of the whole. Markers spelled out in a text are ordinary text.
"""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from cli import UserError

# GPT-2's pre-tokenisation: contractions, words, numbers, punctuation, whitespace
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
ROLES = ("system", "user", "assistant")
SYNTHETIC_RANKS = Path(__file__).parent / "synthetic" / "synthetic.tiktoken"
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_RANKS = 50256
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
NAMES = ("synthetic", "gpt2")


class Tokenizer:
    """ids: 0..n_ranks-1 text, then EOS, <|system|>, <|user|>, <|assistant|>, then PAD."""

    def __init__(self, name, ranks):
        n = len(ranks)
        markers = {f"<|{role}|>": n + 1 + i for i, role in enumerate(ROLES)}
        self.name, self.eos, self.pad = name, n, n + 1 + len(ROLES)
        self.markers = {role: markers[f"<|{role}|>"] for role in ROLES}
        self.n_tokens = self.pad  # ids that can be produced
        self.vocab_size = (self.n_tokens // 64 + 1) * 64  # rows, PAD among them
        self.hash = hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest()
        self.encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens={"<|endoftext|>": n, **markers})

    def encode(self, text):
        """Ordinary text only: "<|user|>" inside a text does not become the marker."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text of the ids. EOS and PAD are dropped, markers are shown."""
        ids = [int(i) for i in ids]
        return self.encoding.decode([i for i in ids if i != self.eos and i < self.n_tokens])

    def encode_prompt(self, prompt):
        """A prompt (text, or a list of {"role", "content"} turns) up to and with <|assistant|>.

        Assistant turns inside the history end with EOS, as they did when they were produced.
        """
        [(ids, _)] = self.encode_pieces([self.prompt_pieces(prompt)])
        return ids

    def prompt_pieces(self, prompt):
        """The pieces of a prompt; none is scored."""
        turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        return [*((piece, 0) for piece, _ in self.message_pieces(turns)),
                (self.markers["assistant"], 0)]

    def message_pieces(self, turns):
        """The template: [(marker or EOS, mask) or (text, mask), ...]. The mask is 1 on every
        assistant turn, its EOS included, but on those with "weight": 0."""
        pieces = []
        for turn in turns:
            weight = turn.get("weight", 1) if turn["role"] == "assistant" else 0
            pieces += [(self.markers[turn["role"]], 0), (turn["content"], weight)]
            if turn["role"] == "assistant":
                pieces.append((self.eos, weight))
        return pieces

    def encode_many(self, texts):
        """`encode` of each, on all processors."""
        if len(texts) < 8:  # the threads cost more than they bring
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def encode_pieces(self, rows):
        """[(ids, mask), ...] of rows of pieces; every text is tokenised once, all in one call."""
        texts = list({piece for row in rows for piece, _ in row if isinstance(piece, str)})
        known = dict(zip(texts, self.encode_many(texts)))
        encoded = []
        for row in rows:
            ids, mask = [], []
            for piece, m in row:
                part = known[piece] if isinstance(piece, str) else [piece]
                ids += part
                mask += [m] * len(part)
            encoded.append((ids, mask))
        return encoded


def read_ranks(path):
    """{token bytes: rank} of a local file in tiktoken's format, a line per token: base64 rank.

    tiktoken's own loader would keep a copy in its cache and read that one, changed file or not.
    """
    try:
        lines = Path(path).read_text().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    except OSError as error:
        raise UserError(f"cannot read the ranks file {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not a ranks file of tiktoken's format") from None


@cache
def load_tokenizer(name):
    """The tokenizer of this name. UserError where the name or the ranks file is wrong or missing.

    GPT-2's ranks: the environment variable GPT2_RANKS may name a local r50k_base.tiktoken; without
    it tiktoken's own cache is tried, then a download.
    """
    if name == "synthetic":
        return Tokenizer(name, read_ranks(SYNTHETIC_RANKS))
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is unknown: choose one of {', '.join(NAMES)}")
    ranks_path = os.environ.get("GPT2_RANKS")
    if ranks_path:
        ranks = read_ranks(ranks_path)  # names the path where it cannot
        if len(ranks) != GPT2_RANKS:
            raise UserError(f"{ranks_path} holds {len(ranks)} tokens, GPT-2 has {GPT2_RANKS}")
        return Tokenizer(name, ranks)
    try:
        return Tokenizer(name, load_tiktoken_bpe(GPT2_URL, GPT2_SHA256))
    except Exception as error:  # any of requests' errors, or a wrong checksum
        why = str(error).split("\n")[0][:150]
        raise UserError(f"cannot load GPT-2's tokenizer from {GPT2_URL}: {why}. Without a "
                         "network, set GPT2_RANKS=PATH to a copy of that file") from None
