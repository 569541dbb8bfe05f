"""A person as the labeler: what is asked, what was answered, and the terminal to ask in.

A `Session` decides which answers are shown next and keeps every choice on disk. data/page.py asks
on a web page, `ask_in_terminal` in the terminal; both only call its methods.

    choices.jsonl    the truth, a line for each event, only ever appended to:
                     {"kind": "ranks" | "skip" | "undo", "item": number, "hash": of the item, ...}
    rankings.jsonl   what reward.py and dpo.py read, made of it: the items with their "ranks"
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import textwrap
import time
from itertools import combinations
from pathlib import Path

from cli import UserError, note
from data.files import parse_json, sync_folder, whole_file

RECENT = 5  # the last questions are not asked again yet: they would be remembered
# what a terminal would obey, or cannot print: control characters but tab and line break, those that
# turn the direction of the text, halves of surrogate pairs
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HELP = """  2 1 3    answer 2 is best, then 1, then 3; the last one may be left out
  2=1 3    2 and 1 are equally good, 3 is worse
  s        skip: this question makes no record
  u        undo: take the last choice back, several times in a row if need be
  q        stop; the same command goes on later
  ?        this list"""


class Session:
    """The questions to one person, and the answers.

    items: dicts with "prompt" (text or turns), "completions" (2 to 9 texts) and what else is to
    stand in the record. folder: for the two files above; one session at a time. repeat: the share
    of questions that show an earlier item again, in another order, to measure how far the person
    agrees with themselves. What is asked follows from the seed and the choices that stand, so it
    goes on after a restart as if there had been none.

    UserError: an item that cannot be ranked, a folder that is in use, that holds rankings of
    another origin or choices about other answers, and a disk that takes no more (then the session
    is over, and the next one goes on from the last choice that was saved).
    """

    def __init__(self, items, folder, seed=1, repeat=0.1):
        if not 0 <= repeat <= 0.5:
            raise UserError(f"repeat is {repeat}: the share of repeated questions is 0 to 0.5")
        self.items, self.folder, self.seed, self.repeat = list(items), Path(folder), seed, repeat
        self.hashes = [_hash(item, n) for n, item in enumerate(self.items)]
        self.rankings = self.folder / "rankings.jsonl"
        self.id = 0  # events in the journal; also the id of the current question
        self.stack = []  # the choices that stand: no undo, and none that was undone
        self.since = None  # when the current question was first asked for
        self.journal = None
        path = self.folder / "choices.jsonl"
        if self.rankings.exists() and not path.exists():
            raise UserError(f"{self.rankings} was not made by a person, and would be overwritten: "
                            "choose another folder (--out=DIR), or move it away")
        with self.saving():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.journal = open(path, "a+b")
            self._read()
            _rewrite(self.rankings, self.records())
            sync_folder(self.folder)  # the names of the files, too

    def _read(self):
        """Go through the journal. A half-written last line, of a process that was killed before it
        confirmed the choice, is cut off."""
        self.journal.seek(0)
        content = self.journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            note(f"{self.journal.name}: cut off a half-written last line; that choice is asked for "
                 "again")
            self.journal.truncate(whole)
        for n, line in enumerate(content[:whole].splitlines(), 1):
            where = f"{self.journal.name}, line {n}"
            try:
                event = parse_json(line)
                if type(event["item"]) is not int or event["item"] < 0:
                    raise ValueError
                if self.hashes[event["item"]:][:1] != [event["hash"]]:
                    raise UserError(f"{where}: a choice between other answers than these: go on "
                                    "with those, or choose another folder (--out=DIR)")
                answers = range(len(self.items[event["item"]]["completions"]))
                if event["kind"] != "undo" and (
                        sorted(event["shown"]) != [*answers] or event["repeat"] not in (0, 1)) or \
                        event["kind"] == "ranks" and (
                            len(event["ranks"]) != len(answers)
                            or not all(type(r) is int and r > 0 for r in event["ranks"])):
                    raise ValueError
                self._apply(event)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                raise UserError(f"{where}: no choice that can be read; mend the line, or choose "
                                "another folder (--out=DIR)") from None

    def _apply(self, event):
        """Returns the choice that now stands, or no longer stands."""
        if event["kind"] not in ("ranks", "skip", "undo"):
            raise ValueError
        if event["kind"] == "undo":
            event = self.stack.pop()
        else:
            self.stack.append({key: event[key] for key in ("kind", "item", "repeat", "shown")}
                              | ({"ranks": event["ranks"]} if event["kind"] == "ranks" else {}))
        self.id += 1
        self.since = None
        return event

    @contextlib.contextmanager
    def saving(self):
        """Whatever goes wrong with a file is a UserError, and ends the session: a half-written
        line has to be cut off before the next one."""
        try:
            yield
        except (OSError, UserError) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot write in {self.folder}: {error.strerror}. Every choice before "
                            "is saved; the same command goes on from there") from None

    def _save(self, kind, item, **more):
        """On disk first, then in memory, then in rankings.jsonl, which a restart makes anew."""
        event = dict(kind=kind, item=item, hash=self.hashes[item], **more)
        with self.saving():
            _append(self.journal, event)
            changed = self._apply(event)
            if changed["kind"] == "ranks" and not changed["repeat"]:
                if kind == "undo":
                    _rewrite(self.rankings, self.records())
                else:
                    with open(self.rankings, "ab") as file:
                        _append(file, self.records()[-1])

    def close(self):
        with contextlib.suppress(OSError):  # of what could not be written
            if self.journal:
                self.journal.close()

    @property
    def finished(self):
        return len({e["item"] for e in self.stack}) == len(self.items)

    def records(self):
        """The rankings so far: each item once, as first ranked. 1 is best, equal numbers are
        ties."""
        return [self.items[e["item"]] | dict(ranks=e["ranks"]) for e in self.stack
                if e["kind"] == "ranks" and not e["repeat"]]

    def question(self):
        """What to ask now, None at the end: {"id", "item", "repeat", "shown", "prompt", "answers"}.

        prompt: turns. answers: texts in the order to show them in, which `shown` gives as indices
        of the item's completions. id: what the answer has to name.
        """
        if self.finished:
            return None
        asked = {e["item"] for e in self.stack}
        item = next(n for n in range(len(self.items)) if n not in asked)
        rng = random.Random(f"{self.seed} {len(self.stack)}")
        repeated = {e["item"] for e in self.stack if e["repeat"]}
        again = [e for e in self.stack[:-RECENT] if e["kind"] == "ranks" and not e["repeat"]
                 and e["item"] not in repeated]
        # one falls at random into each stretch of 1 / repeat questions
        due = len(repeated) + random.Random(f"{self.seed} repeat {len(repeated)}").random()
        first = rng.choice(again) if again and self.repeat * (len(self.stack) + 1) > due else None
        if first:
            item = first["item"]
        prompt, completions = self.items[item]["prompt"], self.items[item]["completions"]
        shown = rng.sample(range(len(completions)), len(completions))
        while first and shown == first["shown"]:
            rng.shuffle(shown)
        self.since = self.since or time.monotonic()
        return dict(id=self.id, item=item, repeat=first is not None, shown=shown,
                    prompt=[dict(role="user", content=prompt)] if isinstance(prompt, str)
                    else prompt, answers=[completions[i] for i in shown])

    def progress(self):
        """{"id", "done", "total", "skipped", "agreement", "agreement_pairs", "undo"}.

        done, skipped: of `total` items. agreement: the share of pairs that were put in the same
        order both times, of those tied in neither; None where there is no such pair. undo: whether
        there is something to take back.
        """
        first = [e for e in self.stack if not e["repeat"]]
        ranks, same = {e["item"]: e.get("ranks") for e in first}, []
        for e in self.stack:
            if e["repeat"] and e["kind"] == "ranks":
                for (a, b), (c, d) in zip(combinations(ranks[e["item"]], 2),
                                          combinations(e["ranks"], 2)):
                    if a != b and c != d:
                        same.append((a < b) == (c < d))
        done = sum(e["kind"] == "ranks" for e in first)
        return dict(id=self.id, done=done, total=len(self.items), skipped=len(first) - done,
                    agreement=sum(same) / len(same) if same else None, agreement_pairs=len(same),
                    undo=bool(self.stack))

    def rank(self, question_id, ranks):
        """Rank the answers of the current question, in the order in which they are shown: 1 is
        best, equal numbers are ties. It is on disk when this returns.

        False, and nothing changes, where another question is the current one by now. ValueError
        where these are no ranks.
        """
        question = self._current(question_id)
        if question is None:
            return False
        shown = question["shown"]
        if not isinstance(ranks, list) or len(ranks) != len(shown) or \
                not all(type(r) is int and 1 <= r <= len(shown) for r in ranks):
            raise ValueError(f"ranks must be {len(shown)} whole numbers from 1 to {len(shown)}")
        levels = sorted(set(ranks))
        own = [0] * len(shown)  # in the item's order, without gaps: 1 3 3 is 1 2 2
        for position, r in zip(shown, ranks):
            own[position] = levels.index(r) + 1
        self._answer("ranks", question, ranks=own)
        return True

    def skip(self, question_id):
        """No record of the current question. False as of `rank`."""
        question = self._current(question_id)
        if question is None:
            return False
        self._answer("skip", question)
        return True

    def undo(self, question_id):
        """Take back the last choice that stands, a skip and a repeat too; its question is the
        current one again. At the end of all questions the id is that of `progress`. False as of
        `rank`: a tab that sends this twice takes back one choice, not two."""
        if question_id != self.id:
            return False
        if self.stack:
            self._save("undo", self.stack[-1]["item"])
        return True

    def _current(self, question_id):
        return self.question() if question_id == self.id else None

    def _answer(self, kind, question, **ranks):
        """seconds: since this process first showed the question, pauses included."""
        self._save(kind, question["item"], **ranks, shown=question["shown"],
                   repeat=question["repeat"], seconds=round(time.monotonic() - self.since, 1))

    def summary(self):
        """Lines about what was done."""
        p = self.progress()
        text = f"{p['done']} of {p['total']} questions labelled, {p['skipped']} skipped"
        if p["agreement"] is not None:
            text += (f"; in repeated ones you agreed with yourself on {p['agreement']:.0%} of "
                     f"{p['agreement_pairs']} pairs")
        return f"{text}\nall choices are saved in {self.folder}"


def _append(file, *rows):
    """Lines at the end of the file, on disk when this returns."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # half a surrogate pair is no UTF-8, and written as its JSON escape
    file.write(text.encode(errors="backslashreplace"))
    file.flush()
    os.fsync(file.fileno())


def _rewrite(path, rows):
    """The file with these lines and no others, or as it was."""
    with whole_file(path) as file:
        _append(file, *rows)


def _hash(item, n):
    """16 hex digits, of the prompt and the answers. UserError where they cannot be ranked."""
    answers = item.get("completions")
    if not isinstance(answers, list) or not 2 <= len(answers) <= 9:
        raise UserError(f"question {n + 1}: a person ranks 2 to 9 answers, here are "
                        f"{len(answers) if isinstance(answers, list) else 'none'}")
    text = json.dumps([item["prompt"], answers])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the terminal --------------------------------------------------------------------------------


def visible(text):
    """The text with control characters written out: a model may have said what clears a screen."""
    return CONTROL.sub(lambda m: m[0].encode("unicode_escape", "surrogatepass").decode(), text)


def read_ranks(line, k):
    """The ranks of answers 1 to k of a line such as "2=1 3", best first. ValueError says what is
    wrong with it."""
    groups = [group.split("=")
              for group in re.split(r"[\s,>]+", re.sub(r"\s*=\s*", "=", line)) if group]
    named = [part for group in groups for part in group]
    for part in named:
        if not re.fullmatch("[1-9]", part) or int(part) > k:
            raise ValueError(f"{part!r} is no answer: they have the numbers 1 to {k}" if part else
                             "a tie is written 2=1, with a number on either side")
    if len(set(named)) < len(named):
        raise ValueError("an answer stands there twice")
    missing = [str(n) for n in range(1, k + 1) if str(n) not in named]
    if len(missing) > 1:
        raise ValueError(f"answers {', '.join(missing)} are missing; of one that is left out alone "
                         "it is clear that it comes last")
    groups += [missing] if missing else []
    return [next(r for r, group in enumerate(groups, 1) if str(n) in group)
            for n in range(1, k + 1)]


def _print_text(head, text):
    """A text behind its head, wrapped, and indented as far."""
    width = max(40, min(100, shutil.get_terminal_size().columns))
    for line in visible(text).split("\n"):
        print(textwrap.fill(line, width, initial_indent=head, subsequent_indent=" " * len(head),
                            replace_whitespace=False, break_on_hyphens=False) or head.rstrip())
        head = " " * len(head)


def ask_in_terminal(session):
    """Ask for a ranking after the other, until the end, "q", Ctrl-C or Ctrl-D; says what was
    done."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits its line
    sys.stdin.reconfigure(errors="replace")  # half a character in what is typed
    print(HELP)
    asked = None  # the question on the screen
    try:
        while True:
            question, known = session.question(), session.progress()
            if question and question["id"] != asked:
                print(f"\n--- {known['done'] + known['skipped'] + 1} of {known['total']}")
                for turn in question["prompt"]:
                    _print_text(f"{visible(turn['role'])}: ", turn["content"])
                for n, answer in enumerate(question["answers"], 1):
                    print()
                    _print_text(f"  {n}  ", answer)
            asked = session.id
            line = input("\nbest first> " if question else
                         "\nno question is left: Enter ends, u takes the last choice back> ")
            line = line.strip().lower()
            if line == "q" or not question and not line:
                break
            elif line == "u":
                if not known["undo"]:
                    print("there is nothing to take back")
                session.undo(asked)
            elif line == "?":
                print(HELP)
            elif not question:
                print("only u and Enter mean something here")
            elif line == "s":
                session.skip(asked)
            else:
                try:
                    session.rank(asked, read_ranks(line, len(question["answers"])))
                except ValueError as error:
                    print(f"{visible(str(error))} (? explains what to type)")
    except (EOFError, KeyboardInterrupt):
        print()
    print(session.summary())
