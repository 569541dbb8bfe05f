"""What a person is asked, the journal of the answers, the terminal."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
from data.person import RECENT, Session, ask_in_terminal, read_ranks, visible
from data.records import check_ranking


def make_items(n, k=2):
    return [dict(prompt=f"question {i}", completions=[f"answer {i} {c}" for c in "abcdefghi"[:k]],
                 family="made") for i in range(n)]


@contextlib.contextmanager
def opened(folder, items, **options):
    session = Session(items, folder, **options)
    try:
        yield session
    finally:
        session.close()


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answer(session, best="abcdefghi"):
    """Rank the current question by the last letter of its answers. Returns the question."""
    question = session.question()
    assert session.rank(question["id"], [best.index(a[-1]) + 1 for a in question["answers"]])
    return question


def without_waiting(patch):
    """For thousands of writes. What has to be on disk has a test of its own."""
    patch.setattr(os, "fsync", lambda number: None)


def view(session):
    """All that a person sees of a session."""
    return session.question(), session.progress(), session.records()


# --- the session ---------------------------------------------------------------------------------


def test_ranks_are_in_the_items_order(tmp_path):
    # catches ranks that stay in the order in which the answers were shown
    items = make_items(20, 4)
    with opened(tmp_path, items, repeat=0) as session:
        shown = [answer(session, "cabd")["shown"] for _ in items]
    assert len({tuple(order) for order in shown}) > 10  # of 24: random
    assert [r["ranks"] for r in lines(tmp_path / "rankings.jsonl")] == [[2, 3, 1, 4]] * 20
    assert [e["shown"] for e in lines(tmp_path / "choices.jsonl")] == shown


def test_the_answers_are_shown_as_they_are(tmp_path):
    # catches answers beside the wrong prompt, and an order that always is the item's
    turns = [dict(role="system", content="s"), dict(role="user", content="u")]
    items = [dict(prompt=turns, completions=list("abc"))] + make_items(1)
    with opened(tmp_path, items) as session:
        question = session.question()
        assert question["prompt"] == turns and not question["repeat"]
        assert question["answers"] == ["abc"[i] for i in question["shown"]]
        answer(session)
        assert session.question()["prompt"] == [dict(role="user", content="question 0")]


def test_records_are_what_the_reward_model_reads(tmp_path):
    # catches a lost field, a gap in the ranks, a skipped item or a half character that cannot be
    # read back
    items = make_items(4, 3)
    items[2]["completions"][0] = "half a pair \ud83d and\u2028a line c"
    with opened(tmp_path, items, repeat=0) as session:
        session.rank(0, [3, 1, 3])
        session.skip(1)
        session.rank(2, [2, 2, 2])
        session.rank(3, [3, 2, 1])
    records = lines(tmp_path / "rankings.jsonl")
    assert [r["prompt"] for r in records] == ["question 0", "question 2", "question 3"]
    assert [sorted(r["ranks"]) for r in records] == [[1, 2, 2], [1, 1, 1], [1, 2, 3]]
    assert records[1] == items[2] | dict(ranks=[1, 1, 1])
    checked = read_rows(tmp_path / "rankings.jsonl", check_ranking)
    assert [c["ranks"] for c in checked] == [r["ranks"] for r in records]


@pytest.mark.parametrize("ranks", [[1], [1, 2, 3], [1, 3], [0, 1], [True, 2], [1.0, 2], "12", None,
                                   [1, "2"]], ids=str)
def test_bad_ranks(tmp_path, ranks):
    # catches half a ranking in the journal
    with opened(tmp_path, make_items(2)) as session:
        before = view(session)
        with pytest.raises(ValueError, match="2 whole numbers from 1 to 2"):
            session.rank(0, ranks)
        assert view(session) == before and lines(tmp_path / "choices.jsonl") == []


def test_every_event_is_on_disk_before_it_returns(tmp_path, monkeypatch):
    # catches a choice that waits in a buffer
    synced, fsync = [], os.fsync

    def noted(number):
        fsync(number)
        synced.append(os.fstat(number).st_ino)
    with opened(tmp_path, make_items(9), repeat=0.5) as session:
        journal = tmp_path / "choices.jsonl"
        monkeypatch.setattr(os, "fsync", noted)
        for act in [answer, lambda s: s.skip(s.id), lambda s: s.undo(s.id)] + [answer] * 8:
            synced.clear()
            events = len(lines(journal))
            act(session)
            assert len(lines(journal)) == events + 1 and journal.stat().st_ino in synced
            assert lines(tmp_path / "rankings.jsonl") == session.records()
    assert any(e.get("repeat") for e in lines(journal))
    event = lines(journal)[0]
    assert event.keys() == {"kind", "item", "hash", "ranks", "shown", "repeat", "seconds"}
    assert 0 <= event["seconds"] < 60


def test_another_id_changes_nothing(tmp_path):
    # catches the answer of a second tab to a question that the first one has answered; also where
    # an undo has brought the question back
    with opened(tmp_path, make_items(3), repeat=0) as session:
        answer(session)
        session.undo(1)
        before = view(session)
        assert session.question()["item"] == 0
        assert session.question()["id"] == session.progress()["id"] == session.id == 2
        for act in (session.rank, lambda n, _: session.skip(n), lambda n, _: session.undo(n)):
            for old in (0, 1, 3, None, "2"):
                assert act(old, [2, 1]) is False
        assert view(session) == before and len(lines(tmp_path / "choices.jsonl")) == 2


def test_undo(tmp_path):
    # catches an undo that leaves the record, that shows another question, or goes past the start
    with opened(tmp_path, make_items(30), repeat=0.3, seed=2) as session:
        seen = []
        while session.question():
            seen.append(view(session))
            session.skip(session.id) if len(seen) % 7 == 3 else answer(session)
        assert any(question["repeat"] for question, _, _ in seen)
        while seen:
            assert session.undo(session.id) is True
            question, progress, records = view(session)
            before = seen.pop()
            assert dict(question, id=0) == dict(before[0], id=0)
            assert dict(progress, id=0) == dict(before[1], id=0)
            assert records == before[2] == lines(tmp_path / "rankings.jsonl")
        events = len(lines(tmp_path / "choices.jsonl"))
        assert session.undo(session.id) is True  # there is nothing left
        assert len(lines(tmp_path / "choices.jsonl")) == events


def test_repeats(tmp_path, monkeypatch):
    # catches a repeat that is recorded, comes too soon, twice, in the old order or not at all
    without_waiting(monkeypatch)
    with opened(tmp_path, make_items(200, 3), repeat=0.2) as session:
        questions = []
        while session.question():
            questions.append(answer(session))
        assert session.progress()["done"] == 200 == len(session.records())
    repeats = [n for n, q in enumerate(questions) if q["repeat"]]
    assert len(repeats) == len({questions[n]["item"] for n in repeats})
    assert abs(len(repeats) - 0.2 * len(questions)) <= 1
    # one in each stretch of five, but not always at the same place of it
    assert [n // 5 for n in repeats[3:]] == list(range(repeats[3] // 5, len(questions) // 5))
    assert len({n % 5 for n in repeats}) == 5
    distances = []
    for n in repeats:
        [first] = [m for m, q in enumerate(questions[:n]) if q["item"] == questions[n]["item"]]
        assert questions[first]["shown"] != questions[n]["shown"]
        distances.append(n - first)
    assert min(distances) > RECENT and max(distances) > 60
    assert lines(tmp_path / "rankings.jsonl") == [
        item | dict(ranks=[1, 2, 3]) for item in make_items(200, 3)]


def test_no_repeats(tmp_path):
    # catches a share of 0 that divides by it
    with opened(tmp_path, make_items(60), repeat=0) as session:
        assert not any(answer(session)["repeat"] for _ in range(60))
        assert session.finished and session.question() is None


@pytest.mark.parametrize("repeat", [-0.1, 0.6, float("nan")])
def test_bad_share_of_repeats(tmp_path, repeat):
    # catches questions that never end
    with pytest.raises(cli.UserError, match="0 to 0.5"):
        Session(make_items(3), tmp_path, repeat=repeat)


@pytest.mark.parametrize("first, second, agreement, pairs", [
    ([1, 2, 3], [1, 2, 3], 1.0, 3),
    ([1, 2, 3], [3, 2, 1], 0.0, 3),
    ([1, 2, 3], [1, 3, 2], 2 / 3, 3),  # by hand: 1-2 and 1-3 agree, 2-3 does not
    ([1, 1, 2], [1, 2, 3], 1.0, 2),  # the tied pair is left out
    ([2, 1, 1], [1, 1, 2], 0.0, 1),  # only 1-3 is tied in neither
    ([1, 1, 1], [1, 2, 3], None, 0)])
def test_agreement_with_oneself(tmp_path, first, second, agreement, pairs):
    # catches ties that count, pairs compared in the order shown, and a share of nothing
    with opened(tmp_path, make_items(20, 3), repeat=0.5) as session:
        assert session.progress()["agreement"] is None
        while not (question := session.question())["repeat"]:
            session.rank(question["id"], [first[i] for i in question["shown"]])
        session.rank(question["id"], [second[i] for i in question["shown"]])
        progress = session.progress()
        assert progress["agreement"] == (agreement and pytest.approx(agreement))
        assert progress["agreement_pairs"] == pairs
        shown = f"{agreement:.0%} of {pairs} pairs" if pairs else "skipped\n"
        assert shown in session.summary()


# --- restarts ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(st.sampled_from("rrrrsuo"), max_size=40), seed=st.integers(0, 99),
       repeat=st.sampled_from([0, 0.1, 0.5]), n=st.integers(1, 12))
def test_any_sequence_of_events(tmp_path_factory, actions, seed, repeat, n):
    # catches whatever a restart changes: against a list of what stands, and a session that is
    # closed and opened again before every event
    folder, items = tmp_path_factory.mktemp("person"), make_items(n, 3)
    stands, options = [], dict(seed=seed, repeat=repeat)  # (item, repeat, ranks or None)
    with pytest.MonkeyPatch.context() as patch, opened(folder / "once", items, **options) as once:
        without_waiting(patch)
        for number, action in enumerate(actions):
            with opened(folder / "again", items, **options) as session:
                assert view(session) == view(once)
                question = session.question()
                for s in (session, once):
                    assert s.id == len(lines(s.folder / "choices.jsonl"))
                    if action == "u":
                        assert s.undo(s.id)
                    elif action == "o":  # of another tab
                        assert not s.rank(s.id - 1, [1, 2, 3])
                    elif question:
                        assert s.rank(s.id, [1, 1 + number % 2, 2 + number % 2]) \
                            if action == "r" else s.skip(s.id)
                if action == "u":
                    del stands[-1:]
                elif action in "rs" and question:
                    own = [0, 0, 0]
                    for i, r in zip(question["shown"], [1, 1 + number % 2, 2 + number % 2]):
                        own[i] = r
                    stands.append((question["item"], question["repeat"], own if action == "r"
                                   else None))
        kept = [items[item] | dict(ranks=ranks) for item, again, ranks in stands
                if ranks and not again]
        first = [item for item, again, _ in stands if not again]
        assert once.records() == kept == lines(once.rankings)
        assert first == list(range(len(first))) and once.finished == (len(first) == n)
        assert {item for item, again, _ in stands if again} <= set(first)


def test_killed_while_writing(tmp_path, capsys, monkeypatch):
    # catches a choice that is lost although it was confirmed, and half a line that breaks the next
    without_waiting(monkeypatch)
    items = make_items(6)
    with opened(tmp_path / "whole", items) as session:
        answer(session)
        session.skip(1)
        session.undo(2)
        before = view(session)
        answer(session)
        after = view(session)
    whole = (tmp_path / "whole" / "choices.jsonl").read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    folder = tmp_path / "cut"
    for end in range(start, len(whole) + 1):
        folder.mkdir(exist_ok=True)
        (folder / "choices.jsonl").write_bytes(whole[:end])
        with opened(folder, items) as session:
            assert view(session) == (after if end == len(whole) else before)
            assert lines(folder / "rankings.jsonl") == session.records()
            said = capsys.readouterr().out
            assert ("cut off a half-written last line" in said) == (start < end < len(whole))
            answer(session)
        # what was written after it can be read
        with opened(folder, items) as session:
            assert session.id == (5 if end == len(whole) else 4)
        cli.NOTES.clear()


def test_killed_between_the_two_files(tmp_path):
    # catches rankings that are believed where the journal knows better
    items = make_items(4)
    with opened(tmp_path, items, repeat=0) as session:
        for _ in range(3):
            answer(session)
        rankings = (tmp_path / "rankings.jsonl").read_bytes()
    for damaged in (rankings[:-1], rankings[:100], b"", rankings + rankings):
        (tmp_path / "rankings.jsonl").write_bytes(damaged)
        with opened(tmp_path, items):
            assert (tmp_path / "rankings.jsonl").read_bytes() == rankings
    (tmp_path / "rankings.jsonl").unlink()
    with opened(tmp_path, items):
        assert (tmp_path / "rankings.jsonl").read_bytes() == rankings


def test_more_items_go_on(tmp_path):
    # catches a longer list of questions that starts again
    with opened(tmp_path, make_items(2), repeat=0) as session:
        answer(session)
        answer(session)
    with opened(tmp_path, make_items(3), repeat=0) as session:
        assert session.question()["item"] == 2 and session.progress()["done"] == 2


@pytest.mark.parametrize("change", [
    lambda items: items[0].update(prompt="question"),
    lambda items: items[0].update(completions=items[0]["completions"][::-1]),
    lambda items: items.reverse(), lambda items: items.clear()])
def test_a_journal_of_other_answers(tmp_path, change):
    # catches ranks that are put to answers which nobody ranked
    items = make_items(3)
    with opened(tmp_path, items) as session:
        answer(session)
    kept = (tmp_path / "rankings.jsonl").read_bytes()
    change(items)
    with pytest.raises(cli.UserError, match="choices.jsonl, line 1: a choice between other answ"):
        Session(items, tmp_path)
    assert (tmp_path / "rankings.jsonl").read_bytes() == kept
    with opened(tmp_path, make_items(3)) as session:  # the folder is free again
        assert session.id == 1


@pytest.mark.parametrize("line", [
    "", "{", "7", "null", '{"kind": "ranks"}', '{"kind": "undo", "item": 0, "hash": "HASH"}',
    '{"kind": "what", "item": 0, "hash": "HASH", "shown": [0, 1], "repeat": false}',
    '{"kind": "ranks", "item": 0, "hash": "HASH", "shown": [0, 1], "repeat": false}'])
def test_a_journal_that_cannot_be_read(tmp_path, line):
    # catches a traceback, and a choice that is passed over in silence
    with opened(tmp_path, make_items(2)) as session:
        answer(session)
        session.undo(1)
        known = session.hashes[0]
    with open(tmp_path / "choices.jsonl", "a") as file:
        file.write(line.replace("HASH", known) + "\n")
    with pytest.raises(cli.UserError, match="choices.jsonl, line 3: no choice that can be read"):
        Session(make_items(2), tmp_path)


def test_rankings_of_another_labeler_are_kept(tmp_path):
    # catches the rankings of an hour of computing, overwritten
    (tmp_path / "rankings.jsonl").write_text("{}\n")
    with pytest.raises(cli.UserError, match="was not made by a person"):
        Session(make_items(2), tmp_path)
    assert (tmp_path / "rankings.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("completions", [None, "ab", [], ["a"], list("abcdefghij")], ids=str)
def test_items_that_cannot_be_ranked(tmp_path, completions):
    # catches a question without keys for its answers
    with pytest.raises(cli.UserError, match="question 2: a person ranks 2 to 9 answers"):
        Session([*make_items(1), dict(prompt="p", completions=completions)], tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    # catches a traceback
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.UserError, match="cannot write in .*file"):
        Session(make_items(2), tmp_path / "file")


def test_a_full_disk(tmp_path, monkeypatch):
    # catches a choice that counts although it was not saved
    with opened(tmp_path, make_items(3), repeat=0) as session:
        answer(session)

        def full(number):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch, pytest.raises(cli.UserError, match="No space left"):
            patch.setattr(os, "fsync", full)
            answer(session)
        assert session.id == 1
        with pytest.raises(ValueError):  # it is over
            answer(session)
    with opened(tmp_path, make_items(3), repeat=0) as session:
        assert session.records() == lines(tmp_path / "rankings.jsonl")


# --- the terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("line, ranks", [
    ("2 1 3", [2, 1, 3]), ("3 1 2", [2, 3, 1]), ("2=1 3", [1, 1, 2]), ("1 2 = 3", [1, 2, 2]),
    ("1=2=3", [1, 1, 1]), ("3 1", [2, 3, 1]), ("3=1", [1, 2, 1]), ("2 > 1, 3", [2, 1, 3]),
    ("2,1", [2, 1, 3])])
def test_read_ranks(line, ranks):
    # catches positions that are taken for ranks
    assert read_ranks(line, 3) == ranks


@pytest.mark.parametrize("line, why", [
    ("", "answers 1, 2, 3 are missing"), ("=", "a tie is written"),
    ("1", "answers 2, 3 are missing"), ("4 1 2", "'4' is no answer"), ("0 1 2", "'0' is no answer"),
    ("1 1 2", "twice"), ("1=1 2", "twice"), ("best 1", "'best' is no answer"), ("123", "'123' is"),
    ("=1 2", "a tie is written"), ("1== 2", "a tie is written"), ("-1 2 3", "'-1'"),
    ("1 ² 3", "'²'"), ("1 2 3 4", "'4'")])
def test_ranks_that_cannot_be_read(line, why):
    # catches a slip of the finger that becomes a ranking
    with pytest.raises(ValueError, match=why):
        read_ranks(line, 3)


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_terminal(tmp_path, monkeypatch, capsys):
    # catches a ranking of the numbers shown that is recorded as one of the items, a key that does
    # something else, wrong input that is not asked again
    items = make_items(4, 3)
    with opened(tmp_path, items, repeat=0) as session:
        order = [session.question()["shown"]]
        typed(monkeypatch, "2 1 3\n9\n2=1 3\nu\ns\nS\n?\n3\n\n3 2 1\nq\n")
        ask_in_terminal(session)
        out = capsys.readouterr().out
        assert out.index("question 0") < out.index("'9' is no answer") < out.index("question 2")
        assert out.count("question 1\n") == 2 and out.count("question 3") == 1  # asked again
        assert out.count("equally good") == 2 and "missing" in out
        assert "2 of 4 questions labelled, 2 skipped" in out
        # at the end: undo, and once more
        typed(monkeypatch, "1=2=3\nx\nu\n3 1 2\n\n")
        ask_in_terminal(session)
        out = capsys.readouterr().out
        assert "only u and Enter" in out and "2 of 4 questions labelled" in out
    events = lines(tmp_path / "choices.jsonl")
    assert [e["kind"] for e in events] == ["ranks", "ranks", "undo", "skip", "skip", "ranks",
                                           "undo", "ranks"]
    assert [events[0]["ranks"][i] for i in order[0]] == [2, 1, 3]
    assert [events[7]["ranks"][i] for i in events[7]["shown"]] == [2, 3, 1]


@pytest.mark.parametrize("end", ["", "2 1", "q\n", " Q \n"])
def test_the_terminal_ends(tmp_path, monkeypatch, capsys, end):
    # catches a traceback at Ctrl-D
    with opened(tmp_path, make_items(3), repeat=0) as session:
        typed(monkeypatch, "1 2\n" + end)
        ask_in_terminal(session)
    assert f"{2 if end == '2 1' else 1} of 3 questions" in capsys.readouterr().out


def test_interrupted_terminal(tmp_path, monkeypatch, capsys):
    # catches a traceback at Ctrl-C
    def interrupted(prompt):
        raise KeyboardInterrupt
    with opened(tmp_path, make_items(3)) as session:
        typed(monkeypatch, "")
        monkeypatch.setattr("builtins.input", interrupted)
        ask_in_terminal(session)
    assert "0 of 3 questions" in capsys.readouterr().out


def test_control_characters_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    # catches a text of a model that clears the screen, rings, or turns the order of the letters
    evil = "\x1b[2Ja\x07b\rc\x9bd\x7fe\u202ef\ud800g\0"
    items = [dict(prompt=[dict(role="user\x1b[1m", content=evil)], completions=[evil, "b\tc\nd"])]
    with opened(tmp_path, items) as session:
        typed(monkeypatch, "\x1b[31m\n")
        ask_in_terminal(session)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out.expandtabs())
    assert out.count(r"\x1b[2Ja\x07b\rc\x9bd\x7fe\u202ef\ud800g\x00") == 2
    assert visible("ä\t\n日\u200d😀") == "ä\t\n日\u200d😀"
    assert r"'\x1b[31m' is no answer" in out


@pytest.mark.parametrize("columns, width", [("60", 60), ("7", 40), ("500", 100)])
def test_long_texts_are_wrapped(tmp_path, monkeypatch, capsys, columns, width):
    # catches lines that break within a word, and code that loses its indentation
    items = [dict(prompt="word " * 60, completions=["if x:\n    y = 1\n\nz", "word " * 60])]
    monkeypatch.setenv("COLUMNS", columns)
    with opened(tmp_path, items) as session:
        typed(monkeypatch, "")
        ask_in_terminal(session)
    out = capsys.readouterr().out
    body = out[out.index("---"):out.index("best first>")]
    assert width - 5 < max(map(len, body.splitlines())) <= width and body.count("word") == 120
    assert "if x:\n" + " " * 9 + "y = 1\n\n" + " " * 5 + "z\n" in body


def test_terminal_as_a_process(tmp_path):
    # catches what only a real standard input has
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "from data.person import Session, ask_in_terminal\n"
            "ask_in_terminal(Session([dict(prompt='p', completions=['a', 'b'])], sys.argv[2]))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], timeout=120,
                          input=b"\xff\xfe\n1 2\n\n", capture_output=True)
    assert done.returncode == 0 and b"1 of 1 questions labelled" in done.stdout
    assert len(lines(tmp_path / "rankings.jsonl")) == 1
