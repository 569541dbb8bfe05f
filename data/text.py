"""Plain text for the next-token loss: pretraining, and the text mixed into SFT and PPO (ptx)."""

import re
from collections import Counter

import torch

from cli import UserError, note, progress
from data.files import is_json, text_lines
from data.records import MARKER, STOP, check_demonstration, check_prompt, check_ranking, read_sides
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
        texts = re.split(r"\n\s*\n", "\n".join(text for _, text in text_lines(data)))
        print(f"{data}: plain text, documents end at blank lines")
    found = Counter(stop for text in texts for stop in STOP.findall(text))
    if found:
        note(f"{data}: {sum(found.values())} markers end a document each and are not learnt: "
             + ", ".join(sorted(found)))
        texts = [part for text in texts for part in STOP.split(text)]
    texts = [text for text in texts if text.strip()]
    inside = sum(MARKER.search(text) is not None for text in texts)
    if inside:
        note(f"warning: {data}: {inside} documents hold markers of a chat template and are read as "
             "they stand: the model may learn to write them out")
    return texts


def check_text(record, where):
    """{"text"} of a record with one, else the texts of a record of our formats, with its prompt, by
    which the split goes."""
    fields = {k for k, v in record.items() if v is not None}
    if isinstance(record.get("text"), str):
        if fields & {"prompt", "messages", "chosen", "completion"}:  # the split goes by the prompt
            return check_prompt(record, where) | dict(text=record["text"])
        side = {k: record[k] for k in ("held_out", "split") if k in fields} or dict(held_out=False)
        return check_prompt(dict(prompt=record["text"] or "-", **side), where) | dict(
            text=record["text"])  # plain text that says nothing is not held out
    check = check_demonstration if fields & {"messages", "completion"} else \
        check_ranking if fields & {"chosen", "completions"} else check_prompt
    return check(record, where)


def text_of(record):
    """Prompt and answers of a record, one text; of a ranking every answer."""
    if "text" in record:
        return record["text"]
    turns = record.get("messages", record.get("prompt"))
    texts = [turns] if isinstance(turns, str) else \
        [t["content"] for t in turns if t.get("weight", 1)]
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
