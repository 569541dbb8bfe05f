"""Encoded rows in flat arrays, read from a data file once and kept under out/cache.

In a Python list a token takes 36 bytes and more, and the text it came from takes its letters. Here
it takes 2 bytes (4 with more than 65,536 kinds) and one for its mask, in files that are mapped into
memory: what is not looked at costs none. No text is kept.
"""

import hashlib
import json
import shutil
import tempfile
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import NOTES, UserError, note
from data.files import file_hash
from data.records import digest, read_sides

CACHE = Path("out/cache")
# What is known of a row beside its tokens. key: digest of its prompt; asked: of its question, see
# `records.question`; record: number of its record, whose rows stand together; answer: digest of the
# answer's text; chars: its length; rank, gold, label: as in the record; response: number of tokens
# that are scored; held_out: its side.
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
        digest = hashlib.sha256(self.lengths.tobytes())
        for start, end in zip(self.starts.tolist(), self.ends.tolist()):
            digest.update(self.values[start:end].tobytes())
        return digest.hexdigest()


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
    in `records.message_pieces`, facts {name: value} of FACTS. first: number of the first record.
    """
    rows = [(n, pieces, known) for n, record in enumerate(encoded, first)
            for pieces, known in record]
    ids, masks = zip(*tokenizer.encode_pieces([pieces for _, pieces, _ in rows]))
    facts = np.zeros(len(rows), FACTS)
    for row, mask, (n, _, known) in zip(facts, masks, rows):
        for name, value in (known | dict(record=n, response=sum(mask))).items():
            row[name] = value
    kind = id_type(tokenizer)
    return dict(ids=np.concatenate([np.array(row, kind) for row in ids]),
                masks=np.concatenate([np.array(mask, np.uint8) for mask in masks]),
                lengths=np.array([len(row) for row in ids], np.int64), facts=facts)


def rows_of(arrays):
    """The Rows that `flatten` has laid flat."""
    ends = np.cumsum(arrays["lengths"])
    starts = ends - arrays["lengths"]
    return Rows(Flat(arrays["ids"], starts, ends), Flat(arrays["masks"], starts, ends),
                arrays["facts"])


def read_tokens(path, check, encode, tokenizer, needed=("training", "held-out"), skip_bad=False):
    """The Rows of a data file, those of both sides; what `read_sides` says of the file is said.

    encode(tokenizer, record) -> rows as `flatten` takes them, of what `check` returns. They come
    from the cache where the same bytes were read by the same code for the same tokenizer.
    """
    code = [file_hash(Path(__file__).parent / name)
            for name in ("files.py", "records.py", "tokenizer.py", "tokens.py")]
    key = digest(json.dumps([file_hash(path), check.__name__, encode.__name__, tokenizer.name,
                             needed, skip_bad, code]))
    folder = CACHE / f"{key:016x}"
    kinds = dict(ids=id_type(tokenizer), masks=np.uint8, lengths=np.int64, facts=FACTS)
    card = _read_card(folder)
    if card is None:
        _write_cache(folder, path, check, encode, tokenizer, needed, skip_bad)
    else:
        for text in card["notes"]:
            note(text.replace(card["path"], str(path)))
        print(card["summary"].replace(card["path"], str(path)))
    return rows_of({name: np.memmap(folder / name, kind, "r") for name, kind in kinds.items()})


def _read_card(folder):
    """What is known of a cache; None where there is none, or not all of it."""
    try:
        card = json.loads((folder / "card.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in card["sizes"]}
        return card if sizes == card["sizes"] else None
    except (OSError, ValueError):
        return None


def _write_cache(folder, path, check, encode, tokenizer, needed, skip_bad):
    """Under another name until it is whole: two runs may write to one cache."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=CACHE))
    except OSError as error:
        raise UserError(f"{CACHE} is no folder that can be written to: {error.strerror}") from None
    said, n = len(NOTES), 0
    try:
        with ExitStack() as stack:
            out = {name: stack.enter_context(open(temporary / name, "wb"))
                   for name in ("ids", "masks", "lengths", "facts")}

            def keep(chunk):
                nonlocal n
                arrays = flatten(tokenizer, [encode(tokenizer, r) for r in chunk], n)
                for name, values in arrays.items():
                    out[name].write(values.tobytes())
                n += len(chunk)
                return range(n - len(chunk), n)  # what is kept of a record is its number

            sides = read_sides(path, check, needed, skip_bad, keep)
        facts = np.memmap(temporary / "facts", FACTS, "r+")
        facts["held_out"] = np.isin(facts["record"], sides.held_out)
        facts.flush()
        (temporary / "card.json").write_text(json.dumps(dict(
            path=str(path), notes=NOTES[said:], summary=sides.summary,
            sizes={name: (temporary / name).stat().st_size for name in out})))
        if _read_card(folder) is None:  # no other run was faster
            shutil.rmtree(folder, ignore_errors=True)  # something broken
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
