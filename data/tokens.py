"""Encoded rows in flat arrays, read from a data file once and kept under out/cache.

In a Python list a token takes 36 bytes and more, and the text it came from takes its letters. Here
it takes 2 bytes (4 with more than 65,536 kinds) and one for its mask, in files that are mapped into
memory: what is not looked at costs none. No text is kept.
"""

import hashlib
import io
import json
import re
import tempfile
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cli import NOTES, UserError, first_process, note, processes
from data.files import cannot_write, file_hash, sweep, whole_file
from data.records import digest, need_sides, read_sides

CACHE = Path("out/cache")
# on what the rows of a file depend beside the file and the tokenizer
CODE = ("files.py", "records.py", "tokenizer.py", "tokens.py", "synthetic/world.py",
        "synthetic/facts.py")
# What is known of a row beside its tokens. key: digest of its prompt; asked: of its question, see
# `records.question`; record: number of its record, whose rows stand together; answer: digest of the
# answer's text; chars: its length; rank: 0 is best; gold: or nan; label: 1, -1, or 0 for none;
# response: number of tokens that are scored; held_out: its side.
FACTS = np.dtype([("key", "u8"), ("asked", "u8"), ("record", "i8"), ("answer", "u8"),
                  ("chars", "i4"), ("rank", "i4"), ("gold", "f8"), ("label", "i1"),
                  ("response", "i4"), ("held_out", "?")])


@dataclass
class Flat:
    """Rows of numbers: row n is values[starts[n]:ends[n]], given as a list."""

    values: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, n):
        return self.values[self.starts[n]:self.ends[n]].tolist()

    @property
    def lengths(self):
        return self.ends - self.starts

    def select(self, numbers):
        numbers = np.asarray(numbers, dtype=int)
        return Flat(self.values, self.starts[numbers], self.ends[numbers])

    def hash(self):
        sha = hashlib.sha256(self.lengths.tobytes())
        for start, end in zip(self.starts.tolist(), self.ends.tolist()):
            sha.update(self.values[start:end])
        return sha.hexdigest()


@dataclass
class Rows:
    """Rows (ids, mask) with their FACTS; the mask is 1 on the tokens that are scored."""

    ids: Flat
    masks: Flat
    facts: np.ndarray

    def __len__(self):
        return len(self.facts)

    def __getitem__(self, n):
        return self.ids[n], self.masks[n]

    @property
    def lengths(self):
        return self.ids.lengths

    def select(self, numbers):
        numbers = np.asarray(numbers, dtype=int)
        return Rows(self.ids.select(numbers), self.masks.select(numbers), self.facts[numbers])

    def side(self, held_out):
        return self.select(np.flatnonzero(self.facts["held_out"] == held_out))

    def choose(self, n):
        """n of the rows by a hash of their prompts: never the first ones of a file, whose order may
        be that of its sources."""
        return self.select(np.argsort(self.facts["key"], kind="stable")[:n])


def flat(rows):
    """Lists of numbers, one after the other, as a Flat."""
    values, lengths = array("I"), array("q")
    for row in rows:
        values.extend(row)
        lengths.append(len(row))
    ends = np.cumsum(lengths, dtype=np.int64)
    return Flat(np.asarray(values), ends - np.asarray(lengths), ends)


def id_type(tokenizer):
    return np.uint16 if tokenizer.n_tokens <= 2**16 else np.uint32


def flatten(tokenizer, encoded, first=0):
    """{name: array}: ids, masks, lengths (tokens of each row) and facts.

    encoded: for each record its rows, [(pieces, facts), ...]; pieces [(id or text, mask), ...] as
    in `Tokenizer.message_pieces`, facts {name: value} of FACTS. first: number of the first record.
    """
    rows = [(n, pieces, known) for n, record in enumerate(encoded, first)
            for pieces, known in record]
    encoded = tokenizer.encode_pieces([pieces for _, pieces, _ in rows])
    facts = np.zeros(len(rows), FACTS)
    for row, (_, mask), (n, _, known) in zip(facts, encoded, rows):
        for name, value in (known | dict(record=n, response=sum(mask))).items():
            row[name] = value
    joined = lambda kind, part: np.fromiter(
        (x for row in encoded for x in row[part]), kind, sum(len(ids) for ids, _ in encoded))
    return dict(ids=joined(id_type(tokenizer), 0), masks=joined(np.uint8, 1), facts=facts,
                lengths=np.array([len(ids) for ids, _ in encoded], np.int64))


def encode_rows(tokenizer, records, encode):
    """The Rows of checked records that come from no file; encode as in `read_tokens`."""
    return rows_of(flatten(tokenizer, [encode(tokenizer, r) for r in records]))


def rows_of(arrays):
    """The Rows that `flatten` has laid flat."""
    ends = np.cumsum(arrays["lengths"])
    starts = ends - arrays["lengths"]
    return Rows(Flat(arrays["ids"], starts, ends), Flat(arrays["masks"], starts, ends),
                arrays["facts"])


def read_tokens(path, check, encode, tokenizer, needed=("training", "held-out"), skip_bad=False):
    """The Rows of a data file, those of both sides; what `read_sides` says of the file is said.

    encode(tokenizer, record) -> rows as `flatten` takes them, of what `check` returns. They come
    from the cache where the same bytes were read by the same code for the same tokenizer. Of
    several processes the first one makes it, and the others wait.
    """
    content = file_hash(path)
    code = [file_hash(Path(__file__).parent / name) for name in CODE]
    key = digest(json.dumps([content, check.__name__, encode.__name__, tokenizer.hash, skip_bad,
                             code]))
    cache = CACHE / f"{key:016x}"
    several = processes()[1] > 1 and dist.is_initialized()
    if several and not first_process():
        dist.all_reduce(torch.zeros(()))  # a barrier, on the CPU
    card = _read_card(cache)
    if card is None and several and not first_process():
        raise UserError(f"{cache} is not here, and the first process made it: several machines "
                        "need one file system, with the same files")
    if card is None:
        try:
            _write_cache(cache, path, check, encode, tokenizer, skip_bad)
        except OSError as error:
            raise UserError(cannot_write(cache, error)) from None
        if file_hash(path) != content:
            cache.unlink(missing_ok=True)  # by another process
            raise UserError(f"{path} changed while it was read: start again")
        card = _read_card(cache)
    else:
        named = re.compile(rf"(^|^warning: |\n  ){re.escape(card['path'])}(?=:)")
        for text in card["notes"]:
            note(named.sub(lambda m: m[1] + str(path), text))
        print(named.sub(lambda m: m[1] + str(path), card["summary"]))
    if several and first_process():
        dist.all_reduce(torch.zeros(()))  # now the others can read it
    arrays, offset = {}, 0
    for name, kind in _kinds(tokenizer).items():
        arrays[name] = np.memmap(cache, kind, "r", offset, card["counts"][name])
        offset += arrays[name].nbytes
    rows = rows_of(arrays)
    need_sides(path, rows.facts["held_out"], needed)
    return rows


def _kinds(tokenizer):
    """{array: its type}, in the order in which a cache holds them; behind them the card, JSON, its
    length in 8 bytes, and the SHA-256 of all that."""
    return dict(lengths=np.int64, facts=FACTS, ids=id_type(tokenizer), masks=np.uint8)


def _read_card(cache):
    """What is known of a cache, or None if there is none, or not all of it."""
    try:
        with open(cache, "rb") as f:
            size = f.seek(-40, 2)
            length, found = int.from_bytes(f.read(8), "big"), f.read()
            content = np.memmap(f, np.uint8, "r")[:size + 8]
            return json.loads(content[-8 - length:-8].tobytes()) \
                if hashlib.sha256(content).digest() == found else None
    except (OSError, ValueError):
        return None


def _write_cache(cache, path, check, encode, tokenizer, skip_bad):
    CACHE.mkdir(parents=True, exist_ok=True)
    sweep(CACHE)
    said, n = len(NOTES), 0
    with ExitStack() as stack:
        parts = {name: stack.enter_context(tempfile.TemporaryFile(dir=CACHE))
                 for name in _kinds(tokenizer)}

        def keep(chunk):
            nonlocal n
            arrays = flatten(tokenizer, [encode(tokenizer, r) for r in chunk], n)
            for name, values in arrays.items():
                parts[name].write(values.tobytes())
            n += len(chunk)
            return range(n - len(chunk), n)  # what is kept of a record is its number

        sides = read_sides(path, check, (), skip_bad, keep)
        parts["facts"].flush()
        facts = np.memmap(parts["facts"], FACTS, "r+")
        facts["held_out"] = np.isin(facts["record"], sides.held_out)
        facts.flush()
        counts = {name: parts[name].seek(0, 2) // np.dtype(kind).itemsize
                  for name, kind in _kinds(tokenizer).items()}
        with whole_file(cache) as f:
            sha = hashlib.sha256()
            card = json.dumps(dict(path=str(path), notes=NOTES[said:], summary=sides.summary,
                                   counts=counts)).encode()
            for part in (*parts.values(), io.BytesIO(card + len(card).to_bytes(8, "big"))):
                part.seek(0)
                while content := part.read(2**20):
                    sha.update(content)
                    f.write(content)
            f.write(sha.digest())
