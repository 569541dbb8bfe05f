"""Random flags, records, texts and dialogues: what must hold for every one of them."""

import dataclasses
import json
import math
import string
from typing import get_args

import dpo
import label
import ppo
import pretrain
import pytest
import reward
import sft
import torch
from cli import UserError, read_flags
from conftest import elements_from, encode_messages, encode_response, read_rows
from data.records import (
    check_answer,
    check_demonstration,
    check_evaluation,
    check_prompt,
    check_ranking,
    check_ranking_or_label,
    collate,
    prompt_key,
    ranking_pairs,
    split,
    write_jsonl,
)
from data.tokenizer import load_tokenizer
from data.verifier import PARAMETERS, fulfils, n_items, n_sentences, plain, words
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

tok = load_tokenizer("synthetic")
many = settings(max_examples=200, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# --- flags ---------------------------------------------------------------------------------------

CONFIGS = st.sampled_from([m.Config for m in (pretrain, sft, label, reward, ppo, dpo)])
VALUES = {bool: st.booleans(), int: st.integers(), str: st.text(),
          float: st.floats(allow_nan=False) | st.integers(-10**9, 10**9)}


def kind_of(field):
    """(type, what a number of it may be) of a field."""
    kind = field.type
    if type(None) in get_args(kind):  # `X | None`: "auto" on the command line
        kind = get_args(kind)[0]
    kind, *bounds = get_args(kind) or (kind,)
    fits = lambda x: (kind is not float or math.isfinite(x)) and (not bounds or bounds[0](x))
    return kind, fits


def written(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@many
@given(CONFIGS, st.data())
def test_flags_of_every_stage_round_trip(config, data):
    # catches a value that changes on the way, and a flag that changes another field
    fields = dataclasses.fields(config)
    chosen = data.draw(st.lists(st.sampled_from(fields), unique_by=lambda f: f.name, max_size=5))
    values = {f.name: data.draw(VALUES[kind_of(f)[0]].filter(kind_of(f)[1])) for f in chosen}
    assume(all(v != "" or f.default == "" for f, v in zip(chosen, values.values())))  # refused
    parsed = read_flags(config, [f"--{name}={written(v)}" for name, v in values.items()])
    for f in fields:
        found, expected = getattr(parsed, f.name), values.get(f.name, f.default)
        assert found == expected and (found is None or type(found) is kind_of(f)[0])


@many
@given(CONFIGS, st.text(string.ascii_letters + string.digits + "_-", min_size=1), st.text())
def test_unknown_flags_are_refused_with_a_real_one(config, name, value):
    # catches abbreviations, prefixes and case that pass, and a suggestion that does not exist
    names = {f.name for f in dataclasses.fields(config)}
    assume(name not in names)
    with pytest.raises(UserError) as error:
        read_flags(config, [f"--{name}={value}"])
    message = str(error.value)
    assert message.startswith("cannot read") or message.split("--")[-1].rstrip("?") in names


@many
@given(CONFIGS, st.data())
def test_values_of_the_wrong_type_or_range_are_refused(config, data):
    # catches a default that swallows a typo, a 1 for true, a 0.5 for a count, a negative rate
    field = data.draw(st.sampled_from([f for f in dataclasses.fields(config)
                                       if kind_of(f)[0] is not str]))
    text = data.draw(st.text() | st.sampled_from(["", "1.5", "1e3", "yes", "0", "None", "[1]"]))
    try:
        expected = {bool: lambda t: {"true": True, "false": False}[t.lower()],
                    int: int, float: float}[kind_of(field)[0]](text)
        if not kind_of(field)[1](expected):
            raise ValueError
    except (ValueError, KeyError):
        with pytest.raises(UserError, match=f"--{field.name}="):
            read_flags(config, [f"--{field.name}={text}"])
        return
    found = getattr(read_flags(config, [f"--{field.name}={text}"]), field.name)
    assert found == expected


# --- records -------------------------------------------------------------------------------------

CHECKS = (check_demonstration, check_ranking, check_ranking_or_label, check_evaluation,
          check_prompt)
FIELDS = ["prompt", "completion", "messages", "chosen", "rejected", "completions", "ranks", "gold",
          "held_out", "role", "content", "label", "choices", "answer", "opinion", "with_opinion",
          "expect"]
UNICODE = st.characters()  # halves of surrogate pairs too: JSON can hold them
WORDS = st.text(UNICODE, min_size=1, max_size=12).filter(lambda s: s.strip())
LEAVES = (st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.just("")
          | st.sampled_from(["user", "assistant", "system"]))
JSON = st.recursive(LEAVES, lambda c: st.lists(c, max_size=3)
                    | st.dictionaries(st.sampled_from(FIELDS), c, max_size=3), max_leaves=12)
TURN = st.fixed_dictionaries(dict(role=st.sampled_from(["system", "user", "assistant"]),
                                  content=WORDS))
ANSWER = st.fixed_dictionaries(dict(role=st.just("assistant"), content=WORDS))
PROMPT = WORDS | st.lists(TURN, min_size=1, max_size=4).filter(
    lambda turns: turns[-1]["role"] != "assistant")
SIDE = dict(held_out=st.booleans())
DEMONSTRATION = st.fixed_dictionaries(dict(prompt=PROMPT, completion=WORDS), optional=SIDE) | \
    st.fixed_dictionaries(dict(messages=st.tuples(st.lists(TURN, max_size=4), ANSWER).map(
        lambda parts: [*parts[0], parts[1]])), optional=SIDE)


@st.composite
def rankings(draw):
    n = draw(st.integers(2, 5))
    record = dict(prompt=draw(PROMPT), completions=draw(st.lists(WORDS, min_size=n, max_size=n)),
                  ranks=draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)))
    if draw(st.booleans()):
        record["gold"] = draw(st.lists(st.floats(-9, 9) | st.integers(-9, 9), min_size=n,
                                       max_size=n))
    return record


RANKING = rankings() | st.fixed_dictionaries(dict(prompt=PROMPT, chosen=WORDS, rejected=WORDS),
                                             optional=SIDE)
LABEL = st.fixed_dictionaries(dict(prompt=PROMPT, completion=WORDS, label=st.booleans()),
                              optional=SIDE)
OBJECT = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)


@settings(many, max_examples=500)
@given(OBJECT | st.builds(lambda record, change: record | change, DEMONSTRATION | RANKING | LABEL,
                         OBJECT))
def test_any_object_is_a_record_or_a_data_error(record):
    # catches a KeyError or TypeError, there or in what the stages do next with the record
    for check in CHECKS:
        try:
            checked = check(record)
        except UserError:
            continue
        if "dropped" in checked:
            continue
        split([checked]), prompt_key(checked)
        if check in (check_ranking, check_ranking_or_label):
            elements_from([checked])
        if check is check_demonstration:
            encode_messages(tok, checked["messages"])


BOUNDS = st.dictionaries(st.sampled_from(["at_least", "at_most"]), st.integers(0, 4) | JSON)
CONSTRAINT = st.builds(lambda kind, word, bounds: dict(
    kind=kind, **{name: bounds.get(name, word) for name in PARAMETERS[kind]
                  if name in bounds or name in ("word", "text")}),
    st.sampled_from([*PARAMETERS]), st.sampled_from(["a", "B", "don't", "Yes,"]) | WORDS, BOUNDS)
SPOKEN = st.text(st.sampled_from("aB1'’-. \n!?,"), max_size=30) | WORDS


@many
@given(st.lists(CONSTRAINT, max_size=4) | JSON, SPOKEN)
def test_constraints_are_refused_or_can_be_checked(constraints, response):
    # catches a traceback in the middle of a run, for constraints that have passed the check
    try:
        checked = check_answer(dict(prompt="a", constraints=constraints))
    except UserError as error:
        assert "\n" not in str(error)
        return
    right = fulfils(response, checked["answer"])
    assert right in (True, False) and (not right or words(response))
    assert right == all(fulfils(response, [c]) for c in checked["answer"])
    assert right == fulfils(f" {response}\n", checked["answer"])


@many
@given(SPOKEN)
def test_what_is_counted(response):
    # catches a list that counts more lines than sentences, or sentences than words: the check of
    # the constraints relies on it
    text = plain(response)
    assert n_items(text) <= n_sentences(text) <= len(words(text))
    assert (n_sentences(text) > 0) == bool(words(text))
    assert fulfils(response, [dict(kind="words", at_most=10**6)]) == bool(words(text))
    for word in words(text):
        assert fulfils(response, [dict(kind="include", word=word)])
        assert not fulfils(response, [dict(kind="exclude", word=word)])


@many
@given(DEMONSTRATION)
def test_demonstrations_survive(record):
    # catches a turn, a side or a text that is lost or changed
    checked = check_demonstration(record)
    assert check_demonstration(checked) == checked
    assert ("held_out" in checked) == ("held_out" in record)
    turns = checked["messages"]
    if "messages" in record:
        assert turns == record["messages"]
    else:
        assert turns[-1] == dict(role="assistant", content=record["completion"])
        before = record["prompt"]
        before = [dict(role="user", content=before)] if isinstance(before, str) else before
        # only the completion is learnt, not what the assistant said before it
        assert turns[:-1] == [t | dict(weight=0) if t["role"] == "assistant" else t
                              for t in before]
        # the split goes by the prompt: the same for the demonstration and for its prompt alone
        assert prompt_key(checked) == prompt_key(check_prompt(record))
        assert split([checked]).train == [] or split([check_prompt(record)]).held_out == []


@many
@given(RANKING)
def test_rankings_survive_and_every_pair_is_ordered(record):
    # catches reversed or invented pairs, ties that make one, and gold given to another answer
    checked = check_ranking(record)
    texts = record.get("completions") or [record["chosen"], record["rejected"]]
    ranks = record.get("ranks", [1, 2])
    assert (checked["completions"], checked["ranks"]) == (texts, ranks)
    assert set(ranking_pairs(ranks)) == {(i, j) for i in range(len(ranks))
                                         for j in range(len(ranks)) if ranks[i] < ranks[j]}
    distinct = list(dict.fromkeys(texts))
    for e in elements_from([checked]):
        head = tok.encode_prompt(checked["prompt"])
        assert e.rows == [head + encode_response(tok, text) for text in distinct]
        for i, j in e.pairs:
            assert any(texts[a] == distinct[i] and texts[b] == distinct[j] and ranks[a] < ranks[b]
                       for a in range(len(texts)) for b in range(len(texts)))
        for text, gold in zip(distinct, e.facts("gold")):
            assert gold == checked["gold"][texts.index(text)] if "gold" in checked else gold != gold


@many
@given(st.lists(LABEL | RANKING, min_size=1, max_size=6))
def test_labels_survive_and_become_elements(records):
    # catches a label that is lost or flipped, a prompt on two sides of the split, an answer that is
    # taught although it was not wanted, and labels that do not follow from the pairs
    checked = [check_ranking_or_label(r) for r in records]
    for record, found in zip(records, checked):
        assert check_ranking_or_label(found) == found
        if "label" in record:
            assert found == record and type(found["label"]) is bool
            assert prompt_key(found) == prompt_key(check_prompt(record))
        else:
            assert found == check_ranking(record)
    single = [r for r in checked if "label" in r]
    for record in single:
        [e] = elements_from([record])
        assert e.labels == (1 if record["label"] else -1,) and e.best == (0,) * record["label"]
        assert e.rows[0] == tok.encode_prompt(record["prompt"]) + encode_response(
            tok, record["completion"])
    for e in elements_from([r for r in checked if "label" not in r] or single)[
            0 if len(single) < len(checked) else len(single):]:
        won, lost = ({p[side] for p in e.pairs} for side in (0, 1))
        for n, sign in enumerate(e.labels):
            balance = sum(i == n for i, _ in e.pairs) - sum(j == n for _, j in e.pairs)
            assert sign == (balance > 0) - (balance < 0)
            assert (n in e.best) == (n in won - lost)


@many
@given(st.lists(DEMONSTRATION, min_size=1, max_size=4))
@example([dict(prompt="half \ud800", completion="line\u2028break \x00 \"")])
def test_files_round_trip(tmp_path, records):
    # catches text that does not survive the file: line separators, surrogates, quotes
    write_jsonl(tmp_path / "x.jsonl", records)
    found = read_rows(tmp_path / "x.jsonl", lambda record, where: record)
    assert json.dumps(found) == json.dumps(records)


LINE = st.text(max_size=20) | JSON.map(json.dumps) | st.sampled_from(
    ["NaN", "[1]", '{"prompt": "a"}', '{"prompt": 1e999, "completion": ""}'])


@many
@given(st.lists(LINE, max_size=4))
@example(["[" * 100_000])
@example(["9" * 5000])
@example(['{"prompt": "\\ud800", "completion": "b"}'])
def test_any_file_is_records_or_a_data_error(tmp_path, lines):
    # catches a crash on odd lines: too deep, too long a number, half a surrogate pair
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    for check in CHECKS:
        try:
            read_rows(tmp_path / "x.jsonl", check)
        except UserError:
            pass


# --- texts and dialogues -------------------------------------------------------------------------

MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<|pad|>", "<|", "|>"]
TEXT = st.text(UNICODE) | st.lists(st.sampled_from(MARKERS) | st.text(max_size=3)).map("".join)
SPECIAL = {tok.pad, *tok.specials.values()}


@many
@given(TEXT)
@example("half \ud800")
@example("\ud83d\ude00")
def test_text_survives_and_markers_in_it_stay_text(text):
    # catches a special id made from what a user typed: a forged turn or an early end
    ids = tok.encode(text)
    assert not SPECIAL & set(ids) and all(0 <= i < tok.eos for i in ids)
    # two halves of a surrogate pair side by side become their character, a single one U+FFFD
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tok.decode(ids) == expected
    answer, _ = encode_messages(tok, [dict(role="assistant", content=text)])
    assert answer == [tok.specials["<|assistant|>"], *ids, tok.eos]
    user, assistant = tok.specials["<|user|>"], tok.specials["<|assistant|>"]
    assert tok.encode_prompt(text) == [user, *ids, assistant]


DIALOGUE = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5) \
    .map(lambda turns: [dict(role=r, content=c) for r, c in turns])


@many
@given(DIALOGUE, TEXT)
def test_mask_marks_the_assistant_turns_and_nothing_else(before, answer):
    # catches a turn that is not scored, a scored prompt token, a missing or doubled EOS
    turns = [*before, dict(role="assistant", content=answer)]
    ids, mask = encode_messages(tok, turns)
    expected, expected_mask = [], []  # the template, turn by turn
    for turn in turns:
        text, scored = tok.encode(turn["content"]), turn["role"] == "assistant"
        expected += [tok.specials[f"<|{turn['role']}|>"], *text] + [tok.eos] * scored
        expected_mask += [0] + [int(scored)] * len(text) + [1] * scored
    assert (ids, mask) == (expected, expected_mask)
    runs = "".join(map(str, mask)).strip("0").split("0")  # runs of 1, one for each assistant turn
    assert len([r for r in runs if r]) == sum(t["role"] == "assistant" for t in turns)
    assert ids.count(tok.eos) == sum(t["role"] == "assistant" for t in turns)
    assert all(m == 1 for i, m in zip(ids, mask) if i == tok.eos) and ids[-1] == tok.eos
    assert tok.pad not in ids


@many
@given(st.lists(st.tuples(DIALOGUE, TEXT), min_size=1, max_size=4))
def test_batches_are_padded_on_the_right_only(dialogues):
    # catches left padding, a pad inside a row, and a mask that reaches into the padding
    rows = [encode_messages(tok, [*d, dict(role="assistant", content=a)]) for d, a in dialogues]
    tokens, mask = collate(*zip(*rows), tok.pad)
    assert tokens.shape == mask.shape == (len(rows), max(len(ids) for ids, _ in rows))
    for (ids, m), row, row_mask in zip(rows, tokens, mask):
        assert row[:len(ids)].tolist() == ids and row_mask[:len(ids)].tolist() == m
        assert (row[len(ids):] == tok.pad).all() and (row_mask[len(ids):] == 0).all()
    assert mask.sum() == sum(sum(m) for _, m in rows)
    # and where every PAD is read as EOS, the mask stays what it is: it never looks at ids
    assert torch.equal(collate(*zip(*rows), tok.eos)[1], mask)
