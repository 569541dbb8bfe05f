"""Text to token ids and back, and the chat template.

Every tokenizer is a `tiktoken.Encoding`, byte-level BPE:
    synthetic   1,787 tokens for the embedded data, committed with the code
    gpt2        GPT-2's 50,257 tokens, from $GPT2_RANKS, tiktoken's cache or download
    others      from the tokenizer.json that a checkpoint of convert.py carries

EOS and the markers of the template can be produced; PAD is the first id behind the vocabulary, so
it never gets probability (model.py), and it is never EOS: a mask can never lose the stop token.

The template of our own models, exactly, with nothing in between:
    <|system|>text<|user|>text<|assistant|>response EOS
Prompt and response are tokenised apart and joined as ids: BPE never merges across the boundary, so
the prompt's ids are a prefix of the whole. Markers spelled out in a text are ordinary text.
"""

import base64
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from cli import UserError, shorten
from data.files import parse_json

ROLES = ("system", "user", "assistant")
SYNTHETIC_RANKS = Path(__file__).parent / "synthetic" / "synthetic.tiktoken"
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_RANKS = 50256
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
NAMES = ("synthetic", "gpt2")

# --- chat templates, as data ---------------------------------------------------------------------
#
# begin stands before the first turn, head and tail of its role around each text. An answer is what
# stands between the assistant's head and the first special token of its tail, which is EOS.
# default_system: what the system says where a dialogue has no such turn, or None. trim: texts
# lose the white space at their ends.


def template(head, tail, begin="", answer_tail=None, default_system=None, trim=False):
    return dict(begin=begin, head={role: head.format(role=role) for role in ROLES},
                tail={role: tail for role in ROLES} | dict(assistant=answer_tail or tail),
                default_system=default_system, trim=trim)


TEMPLATES = dict(
    markers=template("<|{role}|>", "", answer_tail="<|endoftext|>"),
    chatml=template("<|im_start|>{role}\n", "<|im_end|>\n"),
    llama3=template("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>",
                    begin="<|begin_of_text|>", trim=True))

# --- what text is cut into before BPE ------------------------------------------------------------

# GPT-2's: contractions, words, numbers, punctuation, whitespace
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# the same on what is left between digits, which stand alone: no space goes with them (SmolLM2)
DIGITS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|"
          r"\s+(?!\S)|\s")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class Tokenizer:
    """ids 0..n_tokens-1 can be produced, PAD is n_tokens.

    ranks: {bytes: id}, of two tokens that could be joined the one with the lower id comes first.
    specials: {text: id}, never found in text, but for those of `found` (Qwen's <think>). state:
    what a checkpoint keeps to make this again.
    """

    def __init__(self, name, ranks, specials, pattern=PATTERN, nfc=False, found=(), *, template,
                 state=None):
        self.name, self.state, self.template = name, state or name, template
        self.specials, self.nfc, self.found = specials, nfc, frozenset(found)
        self.n_tokens = self.pad = max(*ranks.values(), *specials.values()) + 1
        self.vocab_size = (self.n_tokens // 64 + 1) * 64  # rows, PAD among them
        self.hash = hashlib.sha256(repr((sorted(ranks.items()), sorted(specials.items()), pattern,
                                         nfc, sorted(found), template)).encode()).hexdigest()
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=specials)
        # bytes that the vocabulary lacks (SmolLM2: some control characters): they are left out
        unknown = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self.unknown = re.compile(b"[" + re.escape(unknown) + b"]") if unknown else None
        self.begin = self.split(template["begin"])
        self.head, self.tail = ({role: self.split(template[part][role]) for role in ROLES}
                                for part in ("head", "tail"))
        self.eos = self.tail["assistant"][0]
        # what separates plain texts, in pretraining
        self.separator = next((specials[t] for t in ("<|endoftext|>", "<|begin_of_text|>")
                               if t in specials), self.eos)

    def split(self, text):
        """A text of a template as ids of the special tokens and what stands between them."""
        parts = re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text)
        return [self.specials.get(part, part) for part in parts if part]

    def encode(self, text):
        """Ordinary text only: "<|user|>" inside a text does not become the marker."""
        return self.encode_many([text])[0]

    def decode(self, ids):
        """Text of the ids. EOS and PAD are dropped, markers are shown."""
        ids = [int(i) for i in ids]
        return self.encoding.decode([i for i in ids if i != self.eos and i < self.n_tokens])

    def encode_prompt(self, prompt):
        """A prompt (text, or a list of {"role", "content"} turns) up to where the answer begins.

        Assistant turns inside the history end with EOS, as they did when they were produced.
        """
        [(ids, _)] = self.encode_pieces([self.prompt_pieces(prompt)])
        return ids

    def prompt_pieces(self, prompt):
        """The pieces of a prompt; none is scored."""
        turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        return [(piece, 0) for piece in [*(piece for piece, _ in self.message_pieces(turns)),
                                         *self.head["assistant"]]]

    def message_pieces(self, turns):
        """The template: [(marker or EOS, mask) or (text, mask), ...]. The mask is 1 on every
        assistant turn, its EOS included, but on those with "weight": 0. Behind the last EOS nothing
        follows."""
        pieces, behind = [(piece, 0) for piece in self.begin], []
        if self.template["default_system"] is not None and turns[0]["role"] != "system":
            turns = [dict(role="system", content=self.template["default_system"]), *turns]
        for turn in turns:
            text = turn["content"].strip() if self.template["trim"] else turn["content"]
            head, tail = self.head[turn["role"]], self.tail[turn["role"]]
            pieces += [(piece, 0) for piece in behind + head]
            if turn["role"] == "assistant":
                weight = turn.get("weight", 1)
                pieces += [(text, weight), (self.eos, weight)]
                behind = tail[1:]
            else:
                if isinstance(head[-1], str):  # one text with what stands before it, "user\\n"
                    text = pieces.pop()[0] + text
                pieces.append((text, 0))
                behind = tail
        return pieces if turns[-1]["role"] == "assistant" else \
            pieces + [(piece, 0) for piece in behind]

    def encode_many(self, texts):
        """The ids of each text, on all processors."""
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        if self.unknown:
            # half a surrogate pair becomes the replacement character, as in tiktoken
            whole = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
            if any(self.unknown.search(text.encode()) for text in whole):
                return [self.encode_known(text) for text in whole]
        encode = partial(self.encoding.encode, allowed_special=self.found, disallowed_special=())
        n = min(os.cpu_count() or 1, len(texts) // 8)
        if n < 2:  # a thread costs more than it brings
            return [*map(encode, texts)]
        # not tiktoken's encode_batch: it hands each text to a thread, which takes longer than most
        with ThreadPoolExecutor(n) as pool:
            parts = [*pool.map(lambda i: [*map(encode, texts[i::n])], range(n))]
        return [parts[i % n][i // n] for i in range(len(texts))]

    def encode_known(self, text):
        """The ids of a text without the bytes that are unknown; it is cut with them."""
        ids, found = [], {t: self.specials[t] for t in self.found}
        cut = re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None
        for part in cut.split(text) if cut else [text]:
            if part in found:
                ids.append(found[part])
                continue
            for piece in regex.findall(self.encoding._pat_str, part):
                piece = self.unknown.sub(b"", piece.encode())
                ids += self.encoding._encode_single_piece(piece) if piece else []
        return ids

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


# --- by name -------------------------------------------------------------------------------------


def read_ranks(path):
    """{token bytes: rank} of a local file in tiktoken's format, a line per token: base64 rank.

    tiktoken's own loader would keep a copy in its cache and read that one, changed file or not.
    """
    try:
        lines = Path(path).read_text().splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in map(str.split, lines)}
        # with a rank twice, or none, tiktoken stops the whole process
        if sorted(ranks.values()) != [*range(len(lines))]:
            raise ValueError("its ranks do not run from 0 without gaps, each once")
        if not ranks.keys() >= {bytes([b]) for b in range(256)}:
            raise ValueError("a single byte has no rank")
        return ranks
    except OSError as error:
        raise UserError(f"cannot read the ranks file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a ranks file of tiktoken's format: "
                        f"{shorten(str(error), 80)}") from None


def load_tokenizer(state):
    """The tokenizer of this name, or of the files that a checkpoint of convert.py carries.

    UserError where the name or the ranks file is wrong or missing.

    GPT-2's ranks: the environment variable GPT2_RANKS may name a local r50k_base.tiktoken; without
    it tiktoken's own cache is tried, then a download.
    """
    if isinstance(state, dict):
        return _from_files(json.dumps(state))
    return _by_name(state)


@cache
def _by_name(name):
    if name == "synthetic":
        return _with_markers(name, read_ranks(SYNTHETIC_RANKS))
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is unknown: choose one of {', '.join(NAMES)}")
    ranks_path = os.environ.get("GPT2_RANKS")
    if ranks_path:
        ranks = read_ranks(ranks_path)  # names the path where it cannot
        if len(ranks) != GPT2_RANKS:
            raise UserError(f"{ranks_path} holds {len(ranks)} tokens, GPT-2 has {GPT2_RANKS}")
        return _with_markers(name, ranks)
    try:
        return _with_markers(name, load_tiktoken_bpe(GPT2_URL, GPT2_SHA256))
    except Exception as error:  # any of requests' errors, or a wrong checksum
        why = str(error).split("\n")[0][:150]
        raise UserError(f"cannot load GPT-2's tokenizer from {GPT2_URL}: {why}. Without a "
                         "network, set GPT2_RANKS=PATH to a copy of that file") from None


def _with_markers(name, ranks):
    """ids: 0..n_ranks-1 text, then EOS, <|system|>, <|user|>, <|assistant|>."""
    specials = ["<|endoftext|>", *(f"<|{role}|>" for role in ROLES)]
    return Tokenizer(name, ranks, {text: len(ranks) + n for n, text in enumerate(specials)},
                     template=TEMPLATES["markers"])


# --- from tokenizer.json -------------------------------------------------------------------------


# {byte: the letter that byte-level vocabularies write for it} (GPT-2): visible ones stand for
# themselves, the others for those from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in VISIBLE} | {
    b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in VISIBLE)}
BYTES = {letter: b for b, letter in LETTERS.items()}


def pattern_of(pre):
    """The pattern that a "pre_tokenizer" of tokenizer.json stands for, or None if it is unknown."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": None}]
    kinds = [part["type"] for part in parts]
    if kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    cuts = parts[-1].get("use_regex", True)  # by GPT-2's pattern
    if kinds == ["ByteLevel"] and cuts:
        return PATTERN
    if kinds == ["Digits", "ByteLevel"] and cuts and parts[0].get("individual_digits"):
        return DIGITS
    if kinds == ["Split", "ByteLevel"] and not cuts and parts[0]["behavior"] == "Isolated" \
            and not parts[0].get("invert"):
        found = parts[0]["pattern"].get("Regex")
        return found if found in (QWEN, LLAMA3) else None
    return None


@cache
def _from_files(state):
    """The Tokenizer of a state {"name", "tokenizer.json", "template", ...}, given as JSON."""
    state = json.loads(state)
    form = state["template"]
    texts = [form["begin"], *(form[part][role] for part in ("head", "tail") for role in ROLES)]
    if not all(isinstance(text, str) for text in texts) \
            or not isinstance(form["default_system"], str | None) or form["trim"] not in (0, 1):
        raise ValueError("its chat template is not made of texts")
    return Tokenizer(state["name"], *read_json(state["tokenizer.json"], state["name"]),
                     template=state["template"], state=state)


def read_json(text, where):
    """(ranks, specials, pattern, nfc, found) of a tokenizer.json, as Tokenizer takes them.
    UserError for what is not byte-level BPE, or pre-tokenised as none of the models that we know.
    """
    def refuse(why):
        raise UserError(f"{where}: {why}")

    try:
        content = parse_json(text)
        model, pre = content["model"], content.get("pre_tokenizer")
        normalizer = (content.get("normalizer") or {"type": None})["type"]
        vocab = model.get("vocab")
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        if not all(token.encode() for token in added):
            refuse("an added token is empty")
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            refuse(f"its model is {model.get('type')}, not byte-level BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
            if model.get(name):
                refuse(f"its BPE has a {name}, which is not read")
        if normalizer not in (None, "NFC"):
            refuse(f"the normalizer {normalizer} is not known (NFC is)")
        for token in content["added_tokens"]:
            for name in ("lstrip", "rstrip", "single_word"):
                if token.get(name):
                    refuse(f"the added token {token['content']!r} has {name}, which is not read")
        found = [token["content"] for token in content["added_tokens"]
                 if not token.get("special", True)]
        pattern = pattern_of(pre)
        if pattern is None:
            refuse(f"the pre_tokenizer {json.dumps(pre, ensure_ascii=False)[:200]} is not known: "
                   "those of GPT-2, SmolLM2, Qwen and Llama 3 are")
        merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair)
                  for pair in model["merges"]]
        order = [vocab[token] for token in merged]
        if order != sorted(order):
            refuse("the ids do not follow the order of the merges")
        plain = {token for token in vocab if token not in added}
        lost = plain - set(merged) - set(BYTES)
        if lost:
            refuse(f"{len(lost)} tokens that no merge makes, such as {sorted(lost)[0]!r}")
        ranks = {bytes(BYTES[letter] for letter in token): vocab[token] for token in plain}
        ids = sorted([*ranks.values(), *added.values()])
        # with an id twice tiktoken stops the whole process
        if ids != list(range(len(ids))) or not all(type(i) is int for i in ids):
            refuse("its ids do not run from 0 without gaps")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        refuse("not a tokenizer.json that can be read "
               f"({type(error).__name__}: {shorten(str(error), 80)})")
    return ranks, added, pattern, normalizer == "NFC", found
