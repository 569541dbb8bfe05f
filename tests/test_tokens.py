"""Encoded rows in flat arrays: what they hold, their cache, their memory."""

import base64
import json
import tracemalloc

import numpy as np
import pytest
from cli import UserError
from conftest import encode_response, rows_from
from data import records, tokens
from data.load import load_rankings
from data.records import (
    check_demonstration,
    check_ranking,
    demonstration_rows,
    ranking_rows,
    split,
)
from data.text import text_rows
from data.tokenizer import load_tokenizer, read_ranks
from data.tokens import read_tokens

tok = load_tokenizer("synthetic")
PAIRS = [dict(prompt=f"Which is {i}?", chosen="It is this." * (i % 3 + 1), rejected=f"No {i}.",
              held_out=i % 4 == 0) for i in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path, tokenizer=tok, check=check_ranking, encode=ranking_rows, **options):
    return read_tokens(path, check, encode, tokenizer, **options)


def test_rows_are_what_the_records_say(folder):
    # catches rows that begin or end a token early, and facts of another row
    rows = read(write(folder / "x", PAIRS))
    assert len(rows) == 80 and rows.ids.values.dtype == np.uint16
    for n, record in enumerate(PAIRS):
        head = tok.encode_prompt(record["prompt"])
        for k, key in enumerate(("chosen", "rejected")):
            answer = encode_response(tok, record[key])
            assert rows[2 * n + k] == (head + answer, [0] * len(head) + [1] * len(answer))
            facts = rows.facts[2 * n + k]
            assert (facts["record"], facts["rank"], facts["chars"], facts["response"]) == (
                n, k, len(record[key]), len(answer))
            assert facts["held_out"] == record["held_out"] and np.isnan(facts["gold"])
    some = rows.select([3, 0]).select([1])
    assert some[0] == rows[0] and list(some.lengths) == [len(rows[0][0])]
    # by a hash of the prompt: the same rows, however the file is ordered
    of = lambda rows: {tuple(ids) for ids, _ in (rows[n] for n in range(len(rows)))}
    other = read(write(folder / "y", PAIRS[::-1]))
    assert of(rows.choose(10)) == of(other.choose(10)) != of(rows.select(range(10)))
    assert of(rows.choose(99)) == of(rows)


def test_many_kinds_of_tokens_take_four_bytes():
    # catches ids over 65,535 that come back as others
    class Large:
        n_tokens, encode_pieces = 70000, tok.encode_pieces

    rows = tokens.rows_of(tokens.flatten(Large, [[([(69999, 1), (3, 0)], {})]]))
    assert rows[0] == ([69999, 3], [1, 0]) and rows.ids.values.dtype == np.uint32
    assert rows_from([([5, 1786], [0, 1])])[0] == ([5, 1786], [0, 1])


def test_a_file_is_read_once(folder, monkeypatch, capsys):
    # catches a cache that is not used, one that is silent about what was dropped, and one that
    # calls the file by the name it had before
    rows = [*PAIRS, dict(prompt="Bad."), dict(PAIRS[1], weight=0), dict(PAIRS[1], extra=1)]
    first = read(write(folder / "before", rows), skip_bad=True)
    said = capsys.readouterr().out
    assert all(text in said for text in ("1 of 43 records are bad", "of weight 0", "extra",
                                         "41 records; 30 prompts to train on, 10 held out"))
    monkeypatch.setattr(tokens, "read_sides", None)
    again = read(write(folder / "after", rows), skip_bad=True)
    assert capsys.readouterr().out == said.replace("before", "after")
    assert [again[n] for n in range(len(again))] == [first[n] for n in range(len(first))]
    assert again.facts.tobytes() == first.facts.tobytes()


@pytest.mark.parametrize("change", ["content", "tokenizer", "code", "bad", "check"])
def test_another_reading_has_another_cache(folder, monkeypatch, change):
    # catches tokens of another file, vocabulary or version of the code
    class Other:
        name, hash, pad, eos, n_tokens = tok.name, "another", tok.pad, tok.eos, tok.n_tokens
        encode_pieces, prompt_pieces = tok.encode_pieces, tok.prompt_pieces

    path = write(folder / "x", PAIRS)
    read(path)
    options = {}
    if change == "content":
        write(folder / "x", [*PAIRS, PAIRS[0]])
    elif change == "tokenizer":
        options = dict(tokenizer=Other)
    elif change == "code":
        hashes = {"records.py": "another"}
        real = tokens.file_hash
        monkeypatch.setattr(tokens, "file_hash", lambda p: hashes.get(getattr(p, "name", 0))
                            or real(p))
    elif change == "bad":
        options = dict(skip_bad=True)
    else:
        options = dict(check=records.check_ranking_or_label)
    before = {*(folder / "out" / "cache").iterdir()}
    read(path, **options)
    assert len({*(folder / "out" / "cache").iterdir()} - before) == 1


def test_what_cannot_be_read_leaves_no_cache(folder, monkeypatch):
    # catches half a cache that the next run takes for a whole one
    path = write(folder / "x", [*PAIRS, dict(prompt="Bad.")])
    for _ in range(2):
        with pytest.raises(UserError, match="the field 'chosen' is missing"):
            read(path)
        assert not [*(folder / "out" / "cache").iterdir()]
    (folder / "out").rename(folder / "moved")
    (folder / "out").write_text("")
    with pytest.raises(UserError, match="cannot write out/cache/.*: Not a directory"):
        read(path)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "no card", "card", "one id",
                                    "folder"])
def test_a_damaged_cache_is_made_again(folder, damage):
    # catches a traceback, or rows that are not those of the file
    path = write(folder / "x", PAIRS)
    rows = [row for row in map(read(path).__getitem__, range(80))]
    [cache] = (folder / "out" / "cache").iterdir()
    whole = cache.read_bytes()
    other = {"short": whole[2:], "long": b"00" + whole, "empty": b"", "no card": whole[:-8],
             "card": whole[:-41] + b"]" + whole[-40:],
             "one id": whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]}
    cache.unlink()
    if damage != "folder":
        cache.write_bytes(other[damage])
        again = read(path)
        assert [again[n] for n in range(80)] == rows
        assert cache.read_bytes() == whole and [*(folder / "out" / "cache").iterdir()] == [cache]
    else:  # somebody else's
        cache.mkdir()
        with pytest.raises(UserError, match="cannot write out/cache"):
            read(path)


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    # catches tokens of one content kept under the name of another
    path, real = write(folder / "x", PAIRS), tokens.read_sides

    def changing(*args):
        write(folder / "x", PAIRS[1:])
        return real(*args)

    monkeypatch.setattr(tokens, "read_sides", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        read(path)
    assert not [*(folder / "out" / "cache").iterdir()]


def test_two_readers_at_once(folder, monkeypatch):
    # catches a reader that fails, or breaks the cache, because another one was there first
    path, real, seen = write(folder / "x", PAIRS), tokens.read_sides, []

    def slow(*args):
        if not seen:
            seen.append(1)
            seen.append(read(path))  # the other one begins later and ends first
        return real(*args)

    monkeypatch.setattr(tokens, "read_sides", slow)
    rows = read(path)
    assert [rows[n] for n in range(80)] == [seen[1][n] for n in range(80)]
    assert len([*(folder / "out" / "cache").iterdir()]) == 1


def test_ranks_of_any_size(folder):
    # catches an overflow: ranks are any whole numbers
    ranks = [3 * 10**9, 1, 10**300, 3 * 10**9]
    record = dict(prompt="a", completions=list("wxyz"), ranks=ranks, held_out=False)
    rows = read(write(folder / "x", [record]), needed=())
    assert rows.facts["rank"].tolist() == [1, 0, 3, 1]


@pytest.mark.parametrize("kind", ["pairs", "list", "long", "demonstrations", "text", "one text"])
def test_memory_does_not_grow_with_the_tokens(folder, kind):
    # catches tokens in Python lists (20 bytes and more for each byte of the file), and texts that
    # are all kept: what is allocated at most is to stay below the size of the file
    words = "The river runs past the old mill and under the stone bridge to the sea. " * 6
    rows = [dict(prompt=f"{i}: {words}", chosen=words, rejected=words[:99]) for i in range(4000)]
    if kind == "demonstrations":
        rows = [dict(prompt=r["prompt"], completion=r["chosen"]) for r in rows]
    if kind == "long":  # every answer has 200,000 letters
        rows = [dict(r, chosen=words * 450) for r in rows[:20]]
    path = write(folder / "x", rows)
    if kind == "list":
        (folder / "x").write_text(json.dumps(rows))
    if "text" in kind:
        (folder / "x").write_text(("\n" if kind == "one text" else "\n\n").join(
            r["prompt"] + r["chosen"] for r in rows))
    size = (folder / path).stat().st_size
    sides = split([dict(prompt=r["prompt"]) for r in rows])
    n = [len(sides.train), len(sides.held_out)]
    del rows, sides
    tracemalloc.start()
    if "text" in kind:
        kept = text_rows(path, tok, 64, 0, 0)
    elif kind == "demonstrations":
        kept = read(path, check=check_demonstration, encode=demonstration_rows)
    elif kind == "long":
        kept = read(path, needed=())
    else:
        kept = load_rankings(path, tok, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if kind in ("pairs", "list"):
        assert [len(kept.train), len(kept.held_out)] == n
    if kind == "demonstrations":
        assert [sum(kept.facts["held_out"] == side) for side in (False, True)] == n
        assert kept.facts["record"].tolist() == [*range(4000)]
    assert peak < 1.5 * size + 26e6, (peak, size)


@pytest.mark.parametrize("change, why", [
    (lambda lines: [*lines, lines[5]], "do not run from 0"),
    (lambda lines: [*lines[:9], lines[9].split()[0] + " 8", *lines[10:]], "do not run from 0"),
    (lambda lines: lines[:-1], "a single byte has no rank"), (lambda lines: [], "a single byte"),
    (lambda lines: [*lines, "dGg= " + "9" * 5000], "Exceeds the limit"),
    (lambda lines: [*lines, "d*Gg= 256"], "ranks file"), (lambda lines: [*lines, "x"], "unpack")])
def test_ranks_that_would_end_the_process_are_refused(tmp_path, change, why):
    # catches a Rust panic, which is no exception: nothing would be said or saved
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    path = tmp_path / "ranks"
    path.write_text("\n".join(lines))
    assert len(read_ranks(path)) == 256
    path.write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=f"is not a ranks file of tiktoken's format: .*{why}" if
                       why != "ranks file" else why) as error:
        read_ranks(path)
    assert "\n" not in str(error.value)
