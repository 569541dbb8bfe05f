"""Plain text for the next-token loss: pretraining, and the text mixed into SFT and PPO (ptx)."""

import re

import torch

from cli import UserError, note, progress
from data.files import is_json, text_lines
from data.records import STOPS, check_demonstration, check_prompt, check_ranking, read_sides
from data.synthetic.corpus import documents


def read_texts(data, n, seed, skip_bad=False):
    """A list of documents: n embedded ones ("synthetic"), the paragraphs of a text file (a blank
    line ends a document, and so does a marker such as <|endoftext|>), or the text of the records of
    a JSON file, without those that the later stages hold out. UserError if it cannot be read."""
    if data == "synthetic":
        return list(documents(n, seed))
    if is_json(data):
        records = read_sides(data, check_text, needed=("training",), skip_bad=skip_bad).train
        texts = [text_of(record) for record in records]
        print(f"{data}: read as text are the field \"text\" where there is one, else prompt and "
              "answers")
    else:
        texts = "\n".join(text for _, text in text_lines(data)).split("\n\n")
    found = {stop: n for stop in STOPS if (n := sum(text.count(stop) for text in texts))}
    if found:
        note(f"{data}: {sum(found.values())} markers end a document each and are not learnt: "
             + ", ".join(found))
        texts = [part for text in texts for part in re.split("|".join(map(re.escape, STOPS)), text)]
    return [text for text in texts if text.strip()]


def check_text(record, where):
    """{"text"} of a record with one, else the texts of a record of our formats, with its prompt, by
    which the split goes."""
    if isinstance(record.get("text"), str):
        return dict(prompt=record["text"], held_out=False)  # plain text: nothing is held out
    fields = {k for k, v in record.items() if v is not None}
    check = check_demonstration if fields & {"messages", "completion"} else \
        check_ranking if fields & {"chosen", "completions"} else check_prompt
    return check(record, where)


def text_of(record):
    """Prompt and answers of a record, one text; of a ranking every answer."""
    turns = record.get("messages", record.get("prompt"))
    texts = [turns] if isinstance(turns, str) else [t["content"] for t in turns]
    return "\n".join([*texts, *record.get("completions", ())])


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


def text_rows(data, tokenizer, length, n, seed, skip_bad=False):
    """Rows (rows, length) of token ids; documents are separated by EOS. UserError if too short."""
    texts = read_texts(data, n, seed, skip_bad)
    rows = pack([[tokenizer.eos, *tokenizer.encode(t)] for t in progress(texts, "tokens")], length)
    if len(rows) < 2:
        raise UserError(f"{data}: too little text for two rows of {length} tokens")
    return rows
