"""Plain text for the next-token loss: pretraining, and the text mixed into SFT and PPO (ptx)."""

from array import array
from collections import Counter

import numpy as np
import torch

from cli import UserError, note, progress
from data.files import is_json, text_lines
from data.records import (MARKER, STOP, check_demonstration, check_prompt, check_ranking, chunks,
                          read_sides)
from data.synthetic.corpus import documents


def read_texts(data, n, seed, skip_bad=False):
    """Documents, one at a time: n embedded ones ("synthetic"), the paragraphs of a text file (a
    blank line ends a document, and so does a marker such as <|endoftext|>), or the text of the
    records of a JSON file, without those that the later stages hold out. UserError if it cannot be
    read."""
    if data == "synthetic":
        yield from documents(n, seed)
        return
    if is_json(data):
        texts = read_sides(data, check_text, needed=("training",), skip_bad=skip_bad,
                           keep=lambda records: [text_of(r) for r in records]).train
        print(f"{data}: read as text are the field \"text\" where there is one, else prompt and "
              "answers")
    else:
        texts = paragraphs(text for _, text in text_lines(data))
        print(f"{data}: plain text, documents end at blank lines; longer than a million letters, "
              "they are cut at a line break")
    ends, inside = Counter(), 0
    for text in texts:
        ends.update(STOP.findall(text))
        for part in filter(str.strip, STOP.split(text)):
            inside += MARKER.search(part) is not None
            yield part
    if ends:
        note(f"{data}: {sum(ends.values())} markers end a document each and are not learnt: "
             + ", ".join(sorted(ends)))
    if inside:
        note(f"warning: {data}: {inside} documents hold markers of a chat template and are read as "
             "they stand: the model may learn to write them out")


def paragraphs(lines, limit=10**6):
    """Texts between blank lines; one of over `limit` letters is cut behind a line."""
    part, size = [], 0
    for line in lines:
        if line.strip():
            part.append(line)
            size += len(line)
        if part and (size > limit or not line.strip()):
            yield "\n".join(part)
            part, size = [], 0
    if part:
        yield "\n".join(part)


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
    """Token lists, each beginning with EOS, packed into rows: (rows, length), int32.

    A row begins where a document begins, so that the first positions see beginnings, as they will
    in every later stage. A document that does not fit fills its row up and starts again in the next
    one; only one longer than a row goes on where it was cut. A last row is left out if unfilled.
    """
    flat, room = array("i"), length  # of the row that is being filled
    for document in documents:
        start = 0  # of what is still to be placed: slicing the rest off would be quadratic
        while len(document) - start > room:
            flat.extend(document[start:start + room])
            start, room = start + room if len(document) > length else 0, length
        flat.extend(document[start:])
        room -= len(document) - start
    tokens = torch.from_numpy(np.asarray(flat))  # the same memory
    return tokens[:len(tokens) // length * length].view(-1, length)


def text_rows(data, tokenizer, length, n, seed, skip_bad=False):
    """Rows (rows, length) of token ids, int32; documents are separated by one token. UserError
    if they are too short."""
    def encoded():
        for chunk in chunks(progress(read_texts(data, n, seed, skip_bad), "tokens"), len):
            for ids in tokenizer.encode_many(chunk):
                yield [tokenizer.separator, *ids]

    rows = pack(encoded(), length)
    if len(rows) < 2:
        raise UserError(f"{data}: too little text for two rows of {length} tokens")
    return rows
