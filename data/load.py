"""What the stages after SFT read, as token ids: prompts, and rankings with all their answers."""

import json
import tempfile
from collections import Counter
from dataclasses import dataclass

import numpy as np

from cli import UserError, note, progress
from data.files import cannot_write
from data.records import (Split, check_prompt, check_ranking, chunks, collate, fits, prompt_digest,
                          ranking_pairs, ranking_rows, read_sides)
from data.synthetic.world import FAMILIES, all_prompts, sample_prompts
from data.tokens import Flat, Rows, flat, read_tokens


@dataclass
class Prompts:
    """What is asked: (text or turns, ids, answer or None) of each."""

    texts: list  # JSON of [prompt, answer], in bytes: as objects they take many times the memory
    ids: Flat

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, n):
        prompt, answer = json.loads(self.texts[n])
        return prompt, self.ids[n], answer


def load_prompts(data, counts, tokenizer, room, seed=0, families=FAMILIES, check=check_prompt,
                 skip_bad=False):
    """For every side of `counts` its Prompts.

    data: "synthetic" or a file. counts: {side: n}, sides "training", "held-out" or "all"; n of a
    file's prompts, None for all, each once however often it stands there. The embedded held-out
    ones are the same in every stage. Those over `room` tokens are dropped.
    """
    dumps = lambda prompt, answer: json.dumps([prompt, answer]).encode() + b"\n"
    file = tempfile.TemporaryFile()  # the texts, of which only some may be asked for

    def keep(records):
        places = []
        for r in records:
            places.append((prompt_digest(r), file.tell()))
            file.write(dumps(r["prompt"], r.get("answer")))
        file.flush()
        return places

    def at(place):
        file.seek(place)
        return file.readline()

    try:
        sides = None if data == "synthetic" else read_sides(
            data, check, [side for side in counts if side != "all"], skip_bad, keep)
    except OSError as error:
        raise UserError(cannot_write(f"{tempfile.gettempdir()}/prompts", error)) from None
    lists = []
    for side, n in counts.items():
        if sides is None:
            texts = [dumps(p.text, p.answer) for h in (False, True)
                     if side in ("all", "held-out" if h else "training")
                     for p in (sample_prompts(n, h, 0 if h else seed, families) if n else
                               [p for p in all_prompts().values() if p.held_out == h])]
        else:
            rows = {"training": sides.train, "held-out": sides.held_out,
                    "all": sides.held_out + sides.train}[side]
            found = dict(reversed(rows))  # each prompt once: where it stands first
            keys = sorted(found)[:n]  # by a hash: never the first ones of a file
            print(f"{len(keys):,} of {len(found):,} prompts, side: {side}")
            if side == "all" and (n := len({*keys} & {key for key, _ in sides.train})):
                note(f"{n} of them are on the training side, by the hash or by their own word: a "
                     "model that was trained on their answers repeats them")
            texts = [at(found[key]) for key in keys]
        ids = flat(encode_prompts(tokenizer, progress(texts, "tokens")))
        kept = fits(f"{side} prompts", ids.lengths, room)
        if not len(kept):
            raise UserError(f"--data={data}: no {side} prompt of at most {room} tokens")
        lists.append(Prompts([texts[n] for n in kept], ids.select(kept)))
    return lists


def encode_prompts(tokenizer, texts):
    """The ids of each prompt, of JSON as in Prompts."""
    for chunk in chunks(texts, len):
        for ids, _ in tokenizer.encode_pieces([tokenizer.prompt_pieces(json.loads(text)[0])
                                               for text in chunk]):
            yield ids


@dataclass(slots=True)
class Element:
    """One prompt with all its answers: each passes through the network once, however many pairs."""

    source: Rows  # where the answers are
    numbers: tuple  # which rows of it
    pairs: tuple  # (i, j), answer i preferred to j
    labels: tuple  # 1 desirable, -1 undesirable, 0 neither, for each answer (kto)
    best: tuple  # desirable answers that no other beats
    ref: list | None = None  # log pi_ref of each answer, nats per sequence (dpo.py)

    @property
    def rows(self):
        """Ids of prompt + answer, for each answer."""
        return [self.source.ids[n] for n in self.numbers]

    @property
    def masks(self):
        """1 on the answer's tokens, EOS included."""
        return [self.source.masks[n] for n in self.numbers]

    @property
    def prompt(self):
        """The ids of the prompt."""
        ids, mask = self.source[self.numbers[0]]
        return ids[:mask.index(1)]

    @property
    def longest(self):
        """Tokens of the longest row."""
        ids = self.source.ids
        return max(int(ids.ends[n] - ids.starts[n]) for n in self.numbers)

    def facts(self, name):
        """What `data.tokens.FACTS` tells of each answer."""
        return self.source.facts[name][[*self.numbers]]


def make_elements(source, records):
    """(Elements, one for each prompt; pairs left out, the same answer twice; prompts left out, no
    answer beats another). records: the rows of each, as ranges; they are its ranking, or one
    labelled answer.

    Several rankings or pairs of a prompt come together here, so that they share one batch element
    and each answer is read once. A labelled answer stays an element of its own, and comes first.
    In a ranking an answer is desirable where it wins more pairs than it loses.
    """
    facts, firsts = source.facts, [rows[0] for rows in records]
    elements, groups = [], {}  # the rankings of each prompt
    for rows, key, label in zip(records, facts["key"][firsts].tolist(),
                                facts["label"][firsts].tolist()):
        if label:
            elements.append(Element(source, (rows[0],), (), (label,), (0,) * (label > 0)))
        else:
            groups.setdefault(key, []).append(rows)
    same = unranked = 0
    alike = {}  # most elements have the same pairs, as a tuple: one object for all of them
    for key in list(groups):
        numbers, pairs = {}, []  # {answer: (its place, its row)}
        for rows in groups.pop(key):
            index = [numbers.setdefault(answer, (len(numbers), n))[0]
                     for n, answer in zip(rows, facts["answer"][rows].tolist())]
            found = ranking_pairs(facts["rank"][rows].tolist())
            kept = [(index[i], index[j]) for i, j in found if index[i] != index[j]]
            pairs += kept
            same += len(found) - len(kept)
        if not pairs:
            unranked += 1
            continue
        won, lost = (Counter(side) for side in zip(*pairs))
        labels = tuple(int(np.sign(won[n] - lost[n])) for n in range(len(numbers)))
        best = tuple(n for n, label in enumerate(labels) if n not in lost and label > 0)
        pairs, labels, best = (alike.setdefault(x, x) for x in (tuple(pairs), labels, best))
        elements.append(Element(source, tuple(n for _, n in numbers.values()), pairs, labels, best))
    return elements, same, unranked


def load_rankings(path, tokenizer, block_size, check=check_ranking, skip_bad=False):
    """A Split of Elements, those of single labelled answers first.

    A ranking with an answer over block_size tokens is dropped whole: cut, it would have no EOS.
    Only then do those of one prompt come together, so that a long answer costs its own ranking and
    not the others of its prompt.
    """
    source = read_tokens(path, check, ranking_rows, tokenizer, skip_bad=skip_bad)
    starts = np.flatnonzero(np.diff(source.facts["record"], prepend=-1))  # of the records
    longest = np.maximum.reduceat(source.lengths, starts)
    sizes = np.diff(starts, append=len(source))

    def elements(name, held_out):
        numbers = np.flatnonzero(source.facts["held_out"][starts] == held_out)
        kept = numbers[fits(f"{name} rankings", longest[numbers], block_size)]
        found, same, unranked = make_elements(
            source, [range(starts[n], starts[n] + sizes[n]) for n in kept.tolist()])
        if same:
            note(f"{name} rankings: left out {same} pairs, the same answer twice")
        if unranked:
            note(f"{name} rankings: left out {unranked} prompts, no answer beats another")
        if not found:
            raise UserError(f"--data={path}: no {name} ranking is left to use")
        labelled = sum(not e.pairs for e in found)
        prompts = len(np.unique([e.facts("key")[0] for e in found]))
        print(f"{name}: {prompts:,} prompts, {sum(len(e.pairs) for e in found):,} pairs"
              + f", {labelled:,} labelled answers" * (labelled > 0))
        return found

    return Split(elements("training", False), elements("held-out", True))


def choose_elements(elements, n):
    """n of the Elements by a hash of their prompts: never the first ones of a file."""
    return sorted(elements, key=lambda e: e.facts("key")[0])[:n]


def all_rows(elements):
    """(rows, masks) of every answer of every Element, in order; all of one source."""
    if any(e.source is not elements[0].source for e in elements):
        raise ValueError("elements of several sources")
    rows = elements[0].source.select(np.concatenate([e.numbers for e in elements]))
    return rows.ids, rows.masks


def pair_indices(elements):
    """(winners, losers): for every pair the indices of its two among the answers of all Elements,
    one after the other."""
    winners, losers, offset = [], [], 0
    for e in elements:
        winners += [offset + i for i, _ in e.pairs]
        losers += [offset + j for _, j in e.pairs]
        offset += len(e.numbers)
    return winners, losers


def batch_rows(elements, pad, device):
    """(tokens (n, T), mask (n, T)): the n answers of all Elements."""
    return [x.to(device) for x in collate(*all_rows(elements), pad)]
