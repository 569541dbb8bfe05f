"""Tokenizer and template, record formats, the split, batches."""

import time

import numpy as np
import pytest
import torch
from cli import UserError
from conftest import encode_messages, read_rows
from data import batches
from data.records import (
    check_demonstration,
    check_prompt,
    check_ranking,
    collate,
    fits,
    prompt_key,
    split,
    write_jsonl,
)
from data.text import pack
from data.tokenizer import load_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

tok = load_tokenizer("synthetic")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(text):
    # catches bytes lost by the tokenizer, and markers read out of ordinary text
    ids = tok.encode(text)
    assert tok.decode(ids) == text.encode("utf-8", "replace").decode("utf-8", "replace")
    assert all(i < tok.eos for i in ids)


def test_special_ids():
    # catches PAD = EOS and a PAD that the head could produce
    assert tok.pad == tok.n_tokens < tok.vocab_size and tok.vocab_size % 64 == 0
    assert tok.specials["<|endoftext|>"] == tok.eos
    assert len({tok.pad, *tok.specials.values()}) == 5
    assert tok.encode("<|user|><|endoftext|>") != [tok.specials["<|user|>"], tok.eos]


@pytest.mark.parametrize("processors", [1, 2, 3, 64, None])
def test_many_texts_on_many_processors(processors, monkeypatch):
    # catches texts in the order of the threads, and texts that none of them takes
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    texts = [f"Text {i} " * (i % 5) + "<|user|> \ud800 é" * (i % 3) for i in range(33)]
    for n in (0, 1, 7, 8, 9, 33):
        assert tok.encode_many(texts[:n]) == [tok.encode(text) for text in texts[:n]]


def test_template_exactly():
    # catches a missing or doubled EOS, stray newlines, and a loss on the wrong turns
    turns = [dict(role="system", content="Be brief."), dict(role="user", content="Hi"),
             dict(role="assistant", content="Hello."), dict(role="user", content="Bye"),
             dict(role="assistant", content="Good bye.")]
    e, (system, user, assistant) = tok.encode, range(tok.eos + 1, tok.eos + 4)
    expected = [system, *e("Be brief."), user, *e("Hi"), assistant, *e("Hello."), tok.eos,
                user, *e("Bye"), assistant, *e("Good bye."), tok.eos]
    ids, mask = encode_messages(tok, turns)
    assert ids == expected
    scored = [i for i, m in zip(ids, mask) if m]
    assert scored == [*e("Hello."), tok.eos, *e("Good bye."), tok.eos]
    assert tok.encode_prompt(turns[:4]) == expected[:-len(e("Good bye.")) - 1]


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.text(min_size=1))
def test_prompt_ids_are_a_prefix(prompt, response):
    # catches a merge across the boundary of prompt and response
    messages = [dict(role="user", content=prompt), dict(role="assistant", content=response)]
    ids, mask = encode_messages(tok, messages)
    head = tok.encode_prompt(prompt)
    assert ids[:len(head)] == head and mask == [0] * len(head) + [1] * (len(ids) - len(head))
    assert ids[-1] == tok.eos and ids.count(tok.eos) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, tok.pad), st.integers(0, 1)), min_size=1,
                         max_size=9), min_size=1, max_size=5))
@example([[(tok.pad, 1), (tok.eos, 1)], [(5, 1), (tok.pad, 0), (tok.pad, 1)]])
def test_masks_come_from_lengths(rows):
    # catches a mask made by comparing ids: rows here hold PAD and EOS ids inside
    rows, masks = ([[pair[n] for pair in row] for row in rows] for n in (0, 1))
    tokens, mask = collate(rows, masks, tok.pad)
    for row, m, tokens_row, mask_row in zip(rows, masks, tokens, mask):
        assert tokens_row.tolist() == row + [tok.pad] * (tokens.size(1) - len(row))
        assert mask_row.tolist() == m + [0] * (tokens.size(1) - len(row))
    assert tokens.dtype == torch.int64 and mask.dtype == torch.float32


@pytest.mark.parametrize("check, record, message", [
    (check_demonstration, dict(prompt="a"), "'completion' is missing"),
    (check_demonstration, dict(completion="a"), "'prompt' is missing"),
    (check_demonstration, dict(prompt="a", completion=" "), "'completion' is empty"),
    (check_demonstration, dict(prompt="a", completion=3), "'completion' is int"),
    (check_demonstration, dict(messages=[dict(role="user", content="a")]), "does not end with"),
    (check_demonstration, dict(messages=[dict(role="bot", content="a")]), "needs a role"),
    (check_ranking, dict(prompt="a", chosen="b"), "'rejected' is missing"),
    (check_ranking, dict(prompt="a", completions=["b"], ranks=[1]), "at least two"),
    (check_ranking, dict(prompt="a", completions=["b", "c"], ranks=[1]), "2 whole numbers"),
    (check_ranking, dict(prompt="a", completions=["b", "c"], ranks=[0, 1]), "2 whole numbers"),
    (check_ranking, dict(prompt="a", completions=["b", ""], ranks=[2, 1]), "completions[1]"),
    (check_prompt, dict(prompt=[]), "text or a list of turns"),
    (check_prompt, dict(prompt=[dict(role="assistant", content="a")]), "ends with an assistant"),
])
def test_bad_records_are_named(check, record, message):
    # catches a bad record that passes, or a message that does not say what is wrong
    with pytest.raises(UserError) as error:
        check(record, "x.jsonl:7")
    assert str(error.value).startswith("x.jsonl:7") and message in str(error.value)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                           lambda c: st.lists(c, max_size=3) | st.dictionaries(
                               st.sampled_from(["prompt", "completion", "role", "content",
                                                "messages", "ranks", "completions"]), c))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "chosen", "rejected",
                                        "completions", "ranks"]), json_values))
def test_any_json_is_a_record_or_an_error(record):
    # catches a crash (KeyError, TypeError) on odd input
    for check in (check_demonstration, check_ranking, check_prompt):
        try:
            check(record)
        except UserError:
            pass


def test_files(tmp_path):
    # catches errors that do not name file and line, and records lost on the way
    path = tmp_path / "a" / "x.jsonl"
    records = [dict(prompt="é", completion="b"), dict(prompt="c", completion="line\u2028break")]
    write_jsonl(path, records)
    assert read_rows(path, lambda r, w: r) == records
    path.write_text('{"prompt": "a", "completion": "b"}\n\nnot json\n')
    with pytest.raises(UserError, match=r"x.jsonl:3: not JSON"):
        read_rows(path, check_demonstration)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"x.jsonl: row 1: a record must be a JSON object"):
        read_rows(path, check_demonstration)
    path.write_text("\n")
    with pytest.raises(UserError, match="no records"):
        read_rows(path, check_demonstration)
    with pytest.raises(UserError, match="there is no file"):
        read_rows(tmp_path / "missing", check_demonstration)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_rows(path, check_demonstration)


def test_split_goes_by_prompt_in_every_format():
    # catches the same prompt on both sides, within a file or across stages
    demos = [dict(messages=[dict(role="user", content=f"q{i % 50}"),
                            dict(role="assistant", content=f"a{i}")]) for i in range(200)]
    pairs = [dict(prompt=f"q{i % 50}", completions=["a", "b"], ranks=[1, 2]) for i in range(100)]
    both = [split(file, 0.2) for file in (demos, pairs)]
    sides = [{prompt_key(r) for r in side} for s in both for side in (s.train, s.held_out)]
    assert not sides[0] & sides[1] and sides[0] == sides[2] and sides[1] == sides[3]
    assert 0 < len(sides[1]) < 25
    sides = split([dict(prompt="a", held_out=True), dict(prompt="b", held_out=False)])
    train, held_out = sides.train, sides.held_out
    assert [r["prompt"] for r in train + held_out] == ["b", "a"]


@pytest.mark.parametrize("n, size", [(3000, 8), (3000, 32), (2000, 7), (40, 32), (5, 8), (8, 8)])
def test_batches_are_of_like_length(n, size):
    # lengths spread like those of HH-RLHF: half of the rows below 134 tokens, a twentieth over 379
    lengths = np.exp(np.random.default_rng(n).normal(4.9, 0.63, n)).clip(8, 512).astype(int)
    first, again, other = (batches.like_length(list(lengths), size, np.random.default_rng(seed))
                           for seed in (0, 0, 1))
    assert sorted(first) == list(range(n)) and (first == again).all()
    assert n < 9 or (first != other).any()
    whole = first[:n // size * size].reshape(-1, size)
    longest = lengths[whole].max(1) if len(whole) else np.zeros(0)
    assert n < 99 or (longest * size).sum() <= 1.1 * lengths[whole].sum()
    if len(whole) > 9:  # neither from short to long nor from long to short
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5
    # the rest is of like length too, and over seeds every row is in it
    rests = [batches.like_length(lengths, size, np.random.default_rng(s))[n // size * size:]
             for s in range(200)]
    assert {len(rest) for rest in rests} == {n % size}
    assert n > 99 or n % size == 0 or {i for rest in rests for i in rest} == set(range(n))
    assert n < 99 or n % size == 0 or np.mean([np.ptp(lengths[rest]) for rest in rests]) < 50


def test_too_long_is_dropped_and_counted(capsys):
    # catches silent truncation, and a pair of which only one side is dropped
    assert fits("pairs", [5, 9, 2], 5).tolist() == [0, 2]
    said = capsys.readouterr().out
    assert "dropped 1 of 3" in said and "longest 5" in said


def test_every_format_keeps_its_side_of_the_split():
    # catches a record that says held_out and is trained on all the same
    demo = dict(prompt="a", completion="b", held_out=True)
    for check in (check_demonstration, check_prompt):
        assert split([check(demo)]).held_out
    pair = dict(prompt="a", chosen="b", rejected="c", held_out=True)
    assert split([check_ranking(pair)]).held_out
    with pytest.raises(UserError, match="true or false"):
        check_prompt(dict(prompt="a", held_out="false"))


def test_a_long_document_is_packed_in_linear_time():
    # catches a rest that is copied for every row: a million tokens would take minutes
    start = time.time()
    rows = pack([[7], list(range(1_000_000)), [8] * 9], 40)
    assert time.time() - start < 5 and rows.shape == (25_000, 40)
    assert rows.flatten().tolist() == [7, *range(999_999)]


def test_decoding_drops_eos_and_pad():
    # catches an end of text that is shown, counted by the gold reward, and ranked
    text = "The capital of Peru is Lima."
    ids = tok.encode(text)
    assert tok.decode([*ids, tok.eos, tok.pad, tok.vocab_size - 1]) == text
    user = tok.specials["<|user|>"]
    assert tok.decode([tok.eos, *ids[:2], user]) == tok.decode(ids[:2]) + "<|user|>"


def test_an_error_names_the_line_in_every_format(tmp_path):
    # catches a message that shows the record in place of its line
    path = tmp_path / "new" / "folder" / "data.jsonl"  # which is made
    good = dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")])
    write_jsonl(path, [good, dict(messages=good["messages"][:1])])
    with pytest.raises(UserError, match=r"data\.jsonl:2: 'messages' does not end"):
        read_rows(path, check_demonstration)


@pytest.mark.parametrize("size, most", [(4, 40), (0, 40), (3, 10**6), (100, 1)])
def test_pieces_hold_so_many_rows_and_tokens(size, most):
    # catches a bound on rows alone, under which long rows take all the memory; a lost row
    lengths = torch.tensor([5, 30, 12, 7, 50, 3, 8, 8, 21])
    rows = torch.tensor([8, 1, 2, 3, 4, 5, 6])
    parts = batches.by_length(rows, lengths, size, most)
    assert torch.cat(parts).tolist() == rows[lengths[rows].argsort()].tolist()
    for part, after in zip(parts, [*parts[1:], None]):
        tokens = len(part) * lengths[part].max()
        assert len(part) == 1 or len(part) <= (size or 99) and tokens <= most
        if after is not None:  # and none could have held the next row as well
            assert len(part) == size or (len(part) + 1) * lengths[after[0]] > most
    fine = batches.by_length(rows, lengths, size)
    assert most < 10**6 or [p.tolist() for p in parts] == [p.tolist() for p in fine]


def test_rows_of_a_prompt_stay_together():
    # catches pieces by each row's own length, which tear the answers to a prompt apart
    prompts = [3, 1, 4], [1, 5], [3, 1]  # of which one begins like another
    # of each row its prompt, and the length of its answer
    rows = [(0, 2), (1, 9), (2, 3), (1, 1), (0, 9), (2, 7), (1, 2), (0, 1)]
    tokens = torch.full((8, 12), 99)
    mask = torch.zeros(8, 12)
    for i, (k, n) in enumerate(rows):
        P = len(prompts[k])
        tokens[i, :P + n] = torch.tensor(prompts[k] + [7] * n)
        mask[i, P:P + n] = 1
    ends = batches.ends_together(tokens, mask)
    # the longest row's last place, and a fraction
    assert ends.int().tolist() == [{0: 11, 1: 10, 2: 8}[k] for k, _ in rows]
    order = torch.cat(batches.by_length(torch.arange(8), ends, 3)).tolist()
    assert [rows[i][0] for i in order] == [2, 2, 1, 1, 1, 0, 0, 0]
    same = torch.full((4, 2), 5)  # of prompts of one length, too
    same[::2, 0] = 6
    order = batches.ends_together(same, torch.tensor([[0.0, 1]] * 4)).argsort().tolist()
    assert order in ([0, 2, 1, 3], [1, 3, 0, 2])


def test_pieces_of_little_padding(monkeypatch):
    # catches a bound on padding that counts the tokens of the piece before, or of the whole batch
    lengths = torch.tensor([10, 10, 10, 11, 12, 30, 31, 100, 9])
    split = lambda size: [lengths[p].tolist() for p in batches.by_length(torch.arange(9), lengths,
                                                                         size)]
    assert split(0) == [[9, 10, 10, 10, 11, 12, 30, 31, 100]]  # there is not enough for two passes
    monkeypatch.setattr(batches, "ENOUGH", 60)
    # 60 tokens are enough: 6 * 12 = 72 of 62 are little padding, 7 * 30 of 92 are not
    assert split(0) == [[9, 10, 10, 10, 11, 12], [30, 31], [100]]
    assert split(4) == [[9, 10, 10, 10], [11, 12], [30, 31], [100]]
    assert split(1) == [[n] for n in sorted(lengths.tolist())]
