"""Plain text for the next-token loss: pretraining, and the text mixed into SFT and PPO (ptx)."""

from pathlib import Path

import torch

from cli import UserError, progress
from data.records import check_prompt, read_jsonl, split
from data.synthetic.corpus import documents


def read_texts(data, n, seed):
    """A list of documents: n embedded ones ("synthetic"), the paragraphs of a .txt file (a blank
    line ends a document), or all the text of each record of a .jsonl file, without those that the
    later stages hold out. UserError if it cannot be read."""
    if data == "synthetic":
        return list(documents(n, seed))
    path = Path(data)
    if not path.is_file():
        raise UserError(f"no text file at {path}")
    if path.suffix != ".jsonl":
        try:
            return [d for d in path.read_text(encoding="utf-8").split("\n\n") if d.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None

    def strings(value):  # every text of a record, in order: prompt, then completion, ...
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            return [s for k, v in value.items() if k != "role" for s in strings(v)]
        return [s for v in value for s in strings(v)] if isinstance(value, list) else []

    def check(record, where):  # a record with a prompt must be one that the split can read
        if not {"prompt", "messages"} & set(record):
            return record | dict(held_out=False)  # plain text: nothing is held out
        check_prompt(record, where)
        return record

    return ["\n".join(strings(record)) for record in split(read_jsonl(path, check)).train]


def pack(documents, length):
    """Token lists, each beginning with EOS, packed into rows: (rows, length).

    A row begins where a document begins, so that the first positions see beginnings, as they will
    in every later stage. A document that does not fit fills its row up and starts again in the next
    one; only one longer than a row goes on where it was cut. A last row is left out if unfilled.
    """
    rows, row = [], []
    for document in documents:
        start = 0  # of what is still to be placed: slicing the rest off would be quadratic
        while len(document) - start > length - len(row):
            end = start + length - len(row)
            rows.append(row + document[start:end])
            row, start = [], end if len(document) > length else 0
        row = row + document[start:]
    if len(row) == length:
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def text_rows(data, tokenizer, length, n, seed):
    """Rows (rows, length) of token ids; documents are separated by EOS. UserError if too short."""
    texts = read_texts(data, n, seed)
    rows = pack([[tokenizer.eos, *tokenizer.encode(t)] for t in progress(texts, "tokens")], length)
    if len(rows) < 2:
        raise UserError(f"{data}: too little text for two rows of {length} tokens")
    return rows
