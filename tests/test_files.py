"""Files as people have them: wrappings, shapes, sides, what a record says, bad records.

Whatever the wrapping and the shape, the same records train the same model, to the last digit."""

import gzip
import json
import os
import threading

import pytest
import torch
from cli import NOTES, UserError
from conftest import encode_messages, encode_response, read_rows, run_script
from data import tokens
from data.files import file_hash, is_json
from data.load import load_prompts, load_rankings
from data.records import (
    check_answer,
    check_demonstration,
    check_evaluation,
    check_prompt,
    check_ranking,
    check_ranking_or_label,
    read_sides,
    split,
    split_key,
    write_jsonl,
)
from data.text import read_texts
from data.tokenizer import load_tokenizer
from studies import fuzz
from tiny_runs import FLAGS, make_inputs

tok = load_tokenizer("synthetic")
user = lambda text: dict(role="user", content=text)
bot = lambda text, **more: dict(role="assistant", content=text, **more)
system = lambda text: dict(role="system", content=text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("files"))


# --- wrappings -----------------------------------------------------------------------------------

LINES = lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode()
WRAPPINGS = dict(
    lines=LINES, array=lambda rows: json.dumps(rows, indent=1).encode(),
    gzip_lines=lambda rows: gzip.compress(LINES(rows)),
    gzip_array=lambda rows: gzip.compress(json.dumps(rows).encode()),
    bom=lambda rows: b"\xef\xbb\xbf" + LINES(rows),
    bom_array=lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    crlf=lambda rows: LINES(rows).replace(b"\n", b"\r\n"),
    blank_lines=lambda rows: b"\n \n" + LINES(rows).replace(b"\n", b"\n\n"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt", "data"])
@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_what_a_file_is_is_decided_by_its_bytes(tmp_path, wrap, name):
    # catches a format that goes by the name, and records lost or changed by a wrapping
    rows = [dict(prompt=f"é {i}", completion="line\u2028break\r\n") for i in range(3)]
    (tmp_path / name).write_bytes(WRAPPINGS[wrap](rows))
    assert is_json(tmp_path / name)
    assert read_rows(tmp_path / name, lambda row, where: row) == rows


def test_a_pipe_is_read_once_and_kept(tmp_path):
    # catches a pipe that the second reader finds empty: its hash, the rankings, the prompts
    os.mkfifo(tmp_path / "pipe")
    rows = [dict(prompt=f"{i}?", chosen="a", rejected="b", held_out=i > 4) for i in range(9)]
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes(gzip.compress(LINES(rows), mtime=0)))
    writer.start()
    data = load_rankings(tmp_path / "pipe", tok, 64)
    writer.join()
    assert (len(data.train), len(data.held_out)) == (5, 4)
    (tmp_path / "file").write_bytes(gzip.compress(LINES(rows), mtime=0))
    assert file_hash(tmp_path / "pipe") == file_hash(tmp_path / "file")


@pytest.mark.parametrize("content, message", [
    (b"PAR1\x00\x00", "is a parquet file: `python -m data.convert"),
    (b"PK\x03\x04\x00", "is a zip archive: unpack it"), (b"BZh91AY", "is bzip2: unpack it"),
    ("[1]".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, `git lfs pull`"),
    (gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], "not a whole gzip file"),
    (b"\x1f\x8bnot gzip", "not a whole gzip file"),
    (b'[{"prompt": "a"},\n {"prompt"', "not JSON"), (b"", "holds no records"),
    (b"[]", "holds no records"), (b"prompt,completion\na,b\n", ":1: not JSON"),
    (b'{"data": [\n{"prompt": "a"}]}', ":1: not JSON"), (b'"text"', ":1: a record must be a JSON"),
    (b'{"prompt": "\xff"}', ":1: not UTF-8"), (b'{"a": 1}', "here are: a. docs/data.md"),
    (b'{"instruction": "a", "input": "", "output": "b"}',
     "here are: instruction, output. docs/data.md has the formats, `python -m data.convert`")])
def test_other_files_are_refused_with_the_way_out(tmp_path, content, message):
    # catches a traceback, and text of another format that is read as records
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / "data.jsonl", check_prompt)
    assert str(tmp_path / "data.jsonl") in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_file(tmp_path, monkeypatch):
    # catches the advice to train the stage before, given for a slip of the pen
    monkeypatch.chdir(tmp_path)
    write_jsonl("pairs.jsonl", [dict(prompt="a")])
    os.mkdir("gsm8k")
    for name, message in (("alpaca", "`python -m data.alpaca` writes out/data/alpaca.jsonl"),
                          ("gsm8k", "`python -m data.gsm8k --source=gsm8k` writes"),
                          ("pair.jsonl", "did you mean pairs.jsonl?"),
                          (".", "is a folder; name a file in it: pairs.jsonl"),
                          ("far/away", "there is no file far/away"),
                          ("Anthropic/hh-rlhf", "`python -m data.hh_rlhf` writes"),
                          ("https://hub/alpaca_eval", "https://hub/alpaca_eval is a data set"),
                          ("/dev/null", "/dev/null is neither a file nor a pipe"),
                          ("a" * 300, "cannot read aaa")):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            read_sides(name, check_prompt)


def test_a_typing_error_does_not_train_another_model(folder):
    # catches "make one with `python label.py --out=.`" for a file name that is mistyped
    for name in ("pars.jsonl", "alpaca"):
        run = run_script("dpo.py", "--init=sft", f"--data={name}", "--out=x", cwd=folder)
        assert run.returncode == 2 and "label.py" not in run.stderr and not (folder / "x").exists()
        assert ("did you mean pairs.jsonl?" if name == "pars.jsonl" else "-m data.alpaca") \
            in run.stderr


# --- shapes --------------------------------------------------------------------------------------


def turns_of(prompt):
    return [user(prompt)] if isinstance(prompt, str) else prompt


DEMO_SHAPES = dict(
    text=lambda p, a: dict(prompt=p, completion=a),
    messages=lambda p, a: dict(messages=[user(p), bot(a)]),
    turns=lambda p, a: dict(prompt=[user(p)], completion=[bot(a)]),
    mixed=lambda p, a: dict(prompt=p, completion=[bot(a)]),
    whole=lambda p, a: dict(prompt=p, completion=[user(p), bot(a)]),
    implicit=lambda p, a: dict(completion=[user(p), bot(a)]),
    nulls=lambda p, a: dict(prompt=p, completion=a, messages=None, system=None, label=None,
                            input="", weight=None),
    no_system=lambda p, a: dict(messages=[system(""), user(p), bot(a)]),
    extra=lambda p, a: dict(prompt=p, completion=a, id=7, url="x", score=[1, {"b": None}]),
    parts=lambda p, a: dict(messages=[dict(role="user", content=[dict(type="text", text=p)]),
                                      bot(a, name="x")]),
    learnt=lambda p, a: dict(messages=[user(p), bot(a, weight=1)], label=True, weight=1.0))


@pytest.mark.parametrize("shape", DEMO_SHAPES)
def test_every_shape_of_a_demonstration_is_the_same_demonstration(shape):
    checked = check_demonstration(DEMO_SHAPES[shape]("Hi.", "Hello."))
    assert checked == dict(messages=[user("Hi."), bot("Hello.")])


PAIR_SHAPES = dict(
    text=lambda p, c, r: dict(prompt=p, chosen=c, rejected=r),
    turns=lambda p, c, r: dict(prompt=turns_of(p), chosen=[bot(c)], rejected=[bot(r)]),
    implicit=lambda p, c, r: dict(chosen=[*turns_of(p), bot(c)], rejected=[*turns_of(p), bot(r)]),
    whole=lambda p, c, r: dict(prompt=p, chosen=[*turns_of(p), bot(c)],
                               rejected=[*turns_of(p), bot(r)], messages=None, score_chosen=9),
    ranking=lambda p, c, r: dict(prompt=p, completions=[[bot(r)], c], ranks=[2, 1]),
    table=lambda p, c, r: dict(prompt=p, completions=[c, r], ranks=[1.0, 2.0]))


@pytest.mark.parametrize("prompt", ["Hi.", [user("a"), bot("b"), user("c")],
                                    [system("s"), user("a")]])
@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_every_shape_of_a_pair_is_the_same_pair(shape, prompt):
    checked = check_ranking(PAIR_SHAPES[shape](prompt, "yes", "no"))
    assert turns_of(checked["prompt"]) == turns_of(prompt)
    assert sorted(zip(checked["ranks"], checked["completions"])) == [(1, "yes"), (2, "no")]
    assert turns_of(check_prompt(PAIR_SHAPES[shape](prompt, "yes", "no"))["prompt"]) == \
        turns_of(prompt)


def test_a_shared_first_answer_is_part_of_the_prompt_but_never_the_last_turn():
    # catches an implicit prompt that swallows the answer, where two are equal
    same = [user("a"), bot("b")]
    assert check_ranking(dict(chosen=same, rejected=same))["completions"] == ["b", "b"]
    longer = check_ranking(dict(chosen=[*same, user("c"), bot("d")],
                                rejected=[*same, user("c"), bot("e")]))
    assert longer["prompt"] == [*same, user("c")] and longer["completions"] == ["d", "e"]


@pytest.mark.parametrize("check, record, message", [
    (check_demonstration, dict(prompt="a", input="b", completion="c"), "'input' beside the prompt"),
    (check_demonstration, dict(messages=[dict(role="gpt", content="a")]), "not 'gpt'"),
    (check_demonstration, dict(prompt="a", completion="b", weight=0.5), "only 0 or 1"),
    (check_demonstration, dict(messages=[user("a"), bot("b", weight=0.3)]), "only 0 or 1"),
    (check_demonstration, dict(messages=[user("a"), bot("b", train="no")]), "only 0 or 1"),
    (check_demonstration, dict(prompt="a", completion="b", label="bad"), "'label' must be"),
    (check_demonstration, dict(messages=[user("a"), dict(role="assistant", content=None,
                                                         tool_calls=[1])]), "'tool_calls'"),
    (check_demonstration, dict(messages=[dict(role="user", content=[dict(type="image_url")]),
                                         bot("b")]), "more than text"),
    (check_demonstration, dict(prompt=[system("a"), user("b")], system="c", completion="d"),
     "'system' beside"),
    (check_demonstration, dict(prompt="a", completion="b", split="somewhere"), "'split' is"),
    (check_ranking, dict(chosen=[user("a"), bot("b")], rejected=[user("c"), bot("d")]),
     "no first turn in common"),
    (check_ranking, dict(prompt="a", chosen=[user("x"), bot("b")], rejected="c"),
     "one assistant turn"),
    (check_ranking, dict(prompt="a", chosen=[bot("b"), user("c"), bot("d")], rejected="e"),
     "one assistant turn"),
    (check_ranking, dict(chosen="\n\nHuman: a\n\nAssistant: b", rejected="x"),
     "`python -m data.convert`"),
    (check_ranking, dict(prompt="a", completions=["b", "c"], ranks=[1.5, 2]), "whole numbers"),
    (check_ranking, dict(prompt="a", completions=["b", "c"], ranks=[1, 2], gold=[float("nan"), 1]),
     "'gold' must be"),
    (check_ranking, dict(prompt="a", completion="b", label=True), "`python dpo.py --loss=kto`"),
    (check_ranking, dict(prompt="a", completion="b"), "`python sft.py`"),
    (check_demonstration, dict(messages=[system("")]), "nothing else"),
    (check_prompt, dict(question="a"), "here are: question")])
def test_what_cannot_be_honoured_is_refused(check, record, message):
    with pytest.raises(UserError) as error:
        check(record, "x.jsonl:7")
    assert str(error.value).startswith("x.jsonl:7") and message in str(error.value)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_same_records_in_any_shape_train_the_same_model(folder, stage):
    # catches a shape or a wrapping that reaches the training in another way
    data = "demos" if stage == "sft" else "pairs"
    rows = [json.loads(line) for line in (folder / f"{data}.jsonl").read_text().splitlines()]
    if stage == "sft":
        shapes = list(DEMO_SHAPES.values())
        forms = [[shapes[(i + n) % len(shapes)](r["prompt"], r["completion"])
                  | dict(split="test" if r["held_out"] else "train") for i, r in enumerate(rows)]
                 for n in (1, 4)]
    else:  # rankings with turns for prompts and answers
        forms = [[r | dict(prompt=[user(r["prompt"])],
                           completions=[[bot(c)] for c in r["completions"]]) for r in rows]]
        forms.append([r | dict(id=3, gold=None, input="") for r in rows])
    for n, (form, wrap) in enumerate(zip(forms, ("gzip_array", "bom"))):
        (folder / f"form{n}").write_bytes(WRAPPINGS[wrap](form))
    hashes = set()
    for name in (f"{data}.jsonl", "form0", "form1"):
        flags = [f"--data={name}" if f.startswith("--data=") else f for f in FLAGS[stage]]
        run = run_script(f"{stage}.py", *flags, f"--out=out/{stage}-{name}", cwd=folder)
        assert run.returncode == 0, run.stderr
        hashes.add(torch.load(folder / f"out/{stage}-{name}/model.pt", weights_only=True)["hash"])
    assert len(hashes) == 1


# --- sides ---------------------------------------------------------------------------------------


def test_one_question_is_on_one_side_however_it_is_written():
    # catches a held-out question that is trained on: with a system turn, a trailing newline, as
    # the start of a longer dialogue, in capitals, in other spaces or other code points
    for i in range(60):
        forms = [f"Who wrote book {i}?", f"Who wrote book {i}?\n", f"  WHO wrote\tbook {i}? ",
                 f"Who wrote\u00a0book {i}?", f"Ｗho wrote book {i}?",
                 f"\ufeffWho wro\u200bte book {i}?"]
        records = [dict(prompt=form) for form in forms]
        records += [dict(prompt=[system("Be brief."), user(form)]) for form in forms]
        records += [dict(prompt=[user(form), bot("Me."), user("And you?")]) for form in forms]
        records += [dict(messages=[user(form), bot("Me."), user("Why?"), bot("So.")])
                    for form in forms]
        sides = split(records)
        assert len({split_key(r) for r in records}) == 1
        assert not sides.train or not sides.held_out
    many = split([dict(prompt=f"Who wrote book {i}?") for i in range(2000)])
    assert 150 < len(many.held_out) < 250


def test_the_side_is_decided_for_a_prompt_and_not_for_a_record():
    # catches records of one prompt on both sides, of which one says where it belongs
    sides = split([dict(prompt="P", held_out=True), dict(prompt="p "), dict(prompt="Q")]
                  + [dict(prompt="Q", held_out=False)])
    assert [r["prompt"] for r in sides.held_out] == ["P", "p "]
    assert len(sides.train) == 2
    with pytest.raises(UserError, match="2 prompts are marked as held out in one record and not"):
        split([dict(prompt=p, held_out=h) for p, h in (("a", True), ("A", False), ("b", True),
                                                       ("b\n", False), ("c", True))])


@pytest.mark.parametrize("said, held_out", [
    ("train", False), ("test", True), ("validation", True), ("Train", False), ("train_sft", False),
    ("test_prefs", True), ("held_out", True), ("valid1", True), ("train-00000", False)])
def test_a_split_column_is_honoured(said, held_out):
    record = dict(prompt="a", completion="b", chosen="c", rejected="d", split=said)
    for check in (check_demonstration, check_ranking, check_prompt):
        assert check(record)["held_out"] == held_out


def test_pretraining_text_leaves_out_what_later_stages_hold_out(tmp_path):
    # catches held-out answers in the text, whatever the file is called and however it is wrapped
    rows = [dict(prompt=f"Question {i}?", completion=f"Answer {i}.") for i in range(200)]
    sides = split([check_prompt(r) for r in rows])
    for name, wrap in (("x.json", "array"), ("x.jsonl", "lines"), ("x.txt", "gzip_lines")):
        (tmp_path / name).write_bytes(WRAPPINGS[wrap](rows))
        texts = list(read_texts(str(tmp_path / name), 0, 0))
        assert len(texts) == len(sides.train) and texts[0].count("\n") == 1
        assert not {r["prompt"] for r in sides.held_out} & {t.split("\n")[0] for t in texts}


def test_each_stage_says_how_many_prompts_stand_on_each_side(folder):
    for stage, n in (("sft", "24 prompts to train on, 6 held out"),
                     ("reward", "8 prompts to train on, 6 held out")):
        run = run_script(f"{stage}.py", *FLAGS[stage], f"--out=said/{stage}", cwd=folder)
        assert n in run.stdout
    assert "training: 8 prompts, 21 pairs" in run.stdout


def test_own_prompts_are_all_answered(folder, monkeypatch):
    # catches a file of own prompts that is cut to the tenth that hashes to held-out
    monkeypatch.chdir(folder)
    write_jsonl("own.jsonl", [dict(prompt=f"Say {i}.") for i in range(3)])
    flags = ["--policy=sft", "--reference=sft", "--max_new_tokens=8"]
    run = run_script("evaluate.py", *flags, "--data=own.jsonl", "--out=own", cwd=folder)
    assert run.returncode == 0 and "3 of 3 prompts, side: all" in run.stdout
    answers = [json.loads(line) for line in (folder / "own/answers.jsonl").read_text().splitlines()]
    assert sorted(a["prompt"] for a in answers) == [f"Say {i}." for i in range(3)]
    assert all(set(a) == {"prompt", "reference", "policy", "length_reference", "length_policy",
                          "eos_rate_reference", "eos_rate_policy"} for a in answers)
    run = run_script("evaluate.py", *flags, "--data=pairs.jsonl", "--split=held_out", "--out=own2",
                     cwd=folder)
    assert "6 of 6 prompts, side: held-out" in run.stdout
    run = run_script("evaluate.py", *flags, "--data=pairs.jsonl", "--split=test", cwd=folder)
    assert run.returncode == 2 and "--split=test: choose one of all, train, held_out" in run.stderr


def test_a_prompt_is_asked_once_on_every_side(tmp_path):
    # catches prompts with many answers that are asked more often than others
    write_jsonl(tmp_path / "x", [dict(prompt=f"{i % 4}", chosen="a", rejected=f"{i}",
                                      held_out=i % 4 == 3) for i in range(20)])
    train, all_ = load_prompts(str(tmp_path / "x"), dict(training=None, all=3), tok, 64)
    assert sorted(p for p, *_ in train) == ["0", "1", "2"] and len({p for p, *_ in all_}) == 3


# --- what a record says --------------------------------------------------------------------------


def test_what_is_not_to_be_learnt_is_not_learnt(tmp_path, capsys):
    # catches an answer marked as wrong that SFT imitates, and a turn of weight 0 that it scores
    write_jsonl(tmp_path / "x", [
        dict(prompt=f"{i}", completion="b", held_out=i > 7,
             **[dict(label=True), dict(label=False), dict(label=0), dict(weight=0)][i % 4])
        for i in range(12)])
    sides = read_sides(tmp_path / "x", check_demonstration)
    assert (len(sides.train), len(sides.held_out)) == (2, 1)
    said = capsys.readouterr().out
    assert 'left out 6 of 12 records, marked as wrong ("label": false)' in said
    assert "left out 3 of 12 records, of weight 0" in said and len(NOTES) >= 2
    messages = [user("a"), bot("b", weight=0), user("c"), bot("d", train=True)]
    ids, mask = encode_messages(tok, check_demonstration(dict(messages=messages))["messages"])
    assert [i for i, m in zip(ids, mask) if m] == encode_response(tok, "d")
    assert check_demonstration(dict(messages=messages[:2]))["dropped"]


@pytest.mark.parametrize("check, record", [
    (check_demonstration, dict(prompt="a", completion="b")),
    (check_ranking, dict(prompt="a", chosen="b", rejected="c")),
    (check_ranking_or_label, dict(prompt="a", completion="b", label=True)),
    (check_answer, dict(prompt="a", answer="3")), (check_prompt, dict(prompt="a")),
    (check_evaluation, dict(prompt="a", expect="refuse"))])
def test_weights_and_sides_are_honoured_by_every_reader(check, record):
    # catches a reader that takes what another one leaves out, or tests on what it trains on
    for field in ("weight", "loss_weight", "train", "trainable", "training"):
        assert check({**record, field: 0})["dropped"] == "of weight 0"
        assert "dropped" not in check({**record, field: 1})
        with pytest.raises(UserError, match="only 0 or 1"):
            check({**record, field: 0.25})
    assert check(dict(record, loss=False))["dropped"] and "dropped" not in check(
        dict(record, loss=2.3))  # a measurement
    for field in ("mask", "masked", "loss_mask", "weights"):
        with pytest.raises(UserError, match="cannot be honoured"):
            check({**record, field: [0, 1]})
    for field in ("input", "context", "history", "tools", "system_prompt"):
        with pytest.raises(UserError, match="beside the prompt"):
            check({**record, field: ["x"]})
        assert "dropped" not in check({**record, field: []})
    with pytest.raises(UserError, match="contradict"):
        check(dict(record, held_out=False, split="test"))
    # what is left out says all the same where its prompt belongs
    assert check(dict(record, weight=0, held_out=True))["held_out"]


def test_what_is_left_out_still_says_where_its_prompt_belongs(tmp_path):
    # catches a held-out prompt that is trained on because only a wrong answer to it said so
    write_jsonl(tmp_path / "x", [dict(prompt="Who", completion="a", label=False, held_out=True),
                                 dict(prompt="who", completion="b"),
                                 dict(prompt="Q", completion="c", held_out=False)])
    sides = read_sides(tmp_path / "x", check_demonstration)
    assert [len(sides.train), len(sides.held_out)] == [1, 1]


def test_answers_that_are_not_to_be_learnt_are_refused_in_pairs():
    for key in ("chosen", "rejected"):
        record = dict(prompt="a", chosen="b", rejected="c") | {key: [bot("d", weight=0)]}
        with pytest.raises(UserError, match="marked as not to be learnt"):
            check_ranking(record)
    # a history that is not learnt in one of the two is the same history
    first = [user("a"), bot("b", weight=0), user("c")]
    again = [user("a"), bot("b"), user("c")]
    checked = check_ranking(dict(chosen=[*first, bot("d")], rejected=[*again, bot("e")]))
    assert checked["completions"] == ["d", "e"] and len(checked["prompt"]) == 3


def test_of_a_prompt_with_turns_only_the_completion_is_learnt():
    messages = check_demonstration(dict(prompt=[user("a"), bot("b"), user("c")],
                                        completion="d"))["messages"]
    ids, mask = encode_messages(tok, messages)
    assert [i for i, m in zip(ids, mask) if m] == encode_response(tok, "d")


def test_a_dialogue_in_one_text_is_no_prompt():
    # catches dialogues of HH-RLHF's kind that the split cannot see into
    with pytest.raises(UserError, match="dialogue in one text"):
        check_prompt(dict(prompt="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"))
    assert check_prompt(dict(prompt="Human: a question about Assistant: b"))


def test_a_system_prompt_beside_the_prompt_is_read():
    record = dict(system="Be brief.", prompt="Hi.", completion="Yes.", chosen="Yes.", rejected="No")
    head = [system("Be brief."), user("Hi.")]
    assert check_demonstration(record)["messages"] == [*head, bot("Yes.")]
    assert check_ranking(record)["prompt"] == check_prompt(record)["prompt"] == head
    whole = dict(record, prompt=[user("Hi.")], chosen=[user("Hi."), bot("Yes.")])
    assert check_ranking(whole)["completions"] == ["Yes.", "No"]


def test_labels_0_and_1_are_labels():
    for label in (0, 1, False, True):
        checked = check_ranking_or_label(dict(prompt="a", completion="b", label=label))
        assert checked["label"] is bool(label)


def test_kto_needs_both_kinds_of_labels(folder):
    # catches nan metrics from data of one class
    write_jsonl(folder / "good.jsonl", [dict(prompt=f"Say {i}.", completion="Yes.", label=True,
                                             held_out=i > 8) for i in range(12)])
    run = run_script("dpo.py", "--init=sft", "--data=good.jsonl", "--loss=kto", "--out=x",
                     cwd=folder)
    assert run.returncode == 2 and "labelled alike" in run.stderr


def test_fields_that_are_not_used_are_named_once(tmp_path, capsys):
    write_jsonl(tmp_path / "x", [dict(prompt=f"{i}", completion="b", source="web", toxicity=i,
                                      nothing=None) for i in range(50)])
    read_sides(tmp_path / "x", check_demonstration)
    said = capsys.readouterr().out
    assert said.count("fields that are not used: source, toxicity\n") == 1


def test_fields_of_other_formats_are_named_where_they_are_not_used(tmp_path, capsys):
    # catches an answer, a label or messages beside what a stage reads, dropped in silence
    write_jsonl(tmp_path / "x", [dict(prompt="a", chosen="b", rejected="c", label=1, answer="4",
                                      messages=[user("a")])])
    for check, unused in ((check_ranking, "answer, label, messages"),
                          (check_answer, "chosen, label, messages, rejected")):
        read_sides(tmp_path / "x", check, needed=())
        assert f"fields that are not used: {unused}\n" in capsys.readouterr().out
    write_jsonl(tmp_path / "x", [dict(prompt="a", chosen="b", rejected="c"), dict(
        prompt="b", constraints=[dict(kind="words", at_most=3)])])
    read_sides(tmp_path / "x", check_prompt, needed=())
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"prompt": "a", "prompt": "b", "completion": "c"}',
                                  '[{"prompt": "a", "prompt": "b", "completion": "c"}]',
                                  '{"messages": [{"role": "user", "role": "system"}]}'])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    # catches the last one taken in silence, as every JSON reader does
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match="a key stands twice in (prompt|role)"):
        read_sides(tmp_path / "x", check_demonstration)


def test_what_stands_in_a_turn_and_is_not_used_is_named(tmp_path, capsys):
    # catches a mask of another trainer that is ignored in silence
    write_jsonl(tmp_path / "x", [dict(messages=[user("a"), bot("b", reward=1, name=None)])])
    read_sides(tmp_path / "x", check_demonstration, needed=())
    assert "fields that are not used: messages[].reward\n" in capsys.readouterr().out


def test_identical_answers_and_ties_are_counted(tmp_path, capsys):
    write_jsonl(tmp_path / "x", [
        *(dict(prompt=f"{i}", chosen="a", rejected="b", held_out=i > 3) for i in range(6)),
        dict(prompt="6", chosen="same", rejected="same", held_out=False),
        dict(prompt="7", completions=["a", "b"], ranks=[1, 1], held_out=False)])
    assert len(load_rankings(tmp_path / "x", tok, 64).train) == 4
    said = capsys.readouterr().out
    assert "left out 1 pairs, the same answer twice" in said
    assert "left out 2 prompts, no answer beats another" in said
    assert "training: 4 prompts, 4 pairs" in said


def test_a_long_answer_costs_its_own_pair_only(tmp_path):
    # catches a prompt that is lost with all its pairs for one answer that is too long
    write_jsonl(tmp_path / "x", [dict(prompt="a", chosen="b", rejected=r, held_out=False) for r in
                                 ("c", "d", "e " * 99)]
                + [dict(prompt="h", chosen="b", rejected="c", held_out=True)])
    assert len(load_rankings(tmp_path / "x", tok, 64).train[0].pairs) == 2


# --- text and markers ----------------------------------------------------------------------------


def test_web_records_give_their_text_and_not_their_metadata(tmp_path):
    # catches a url, an id or the name of a generator that is learnt as text
    web = [dict(text=f"Story {i}.", id=f"<{i}>", url="http://x", meta=dict(lang="en"))
           for i in range(5)]
    pairs = [dict(prompt="P", chosen="C", rejected="R", generator_chosen="gpt", held_out=False)]
    for rows, expected in ((web, [f"Story {i}." for i in range(5)]), (pairs, ["P\nC\nR"])):
        (tmp_path / "x").write_bytes(LINES(rows))
        assert list(read_texts(str(tmp_path / "x"), 0, 0)) == expected
    (tmp_path / "x").write_bytes(LINES([dict(body="a", id=3)]))
    with pytest.raises(UserError, match="here are: body, id"):
        list(read_texts(str(tmp_path / "x"), 0, 0))


def test_a_text_column_does_not_hide_the_prompt_from_the_split(tmp_path):
    # catches held-out answers in the text of a set that has its records rendered as well
    rows = [dict(prompt=f"Q{i}", completion=f"A{i}", text=f"Q{i} A{i}") for i in range(200)]
    (tmp_path / "x").write_bytes(LINES(rows))
    sides = split([check_prompt(r) for r in rows])
    assert list(read_texts(str(tmp_path / "x"), 0, 0)) == [
        r["prompt"] + " A" + r["prompt"][1:] for r in sides.train]
    (tmp_path / "x").write_bytes(LINES([dict(text="a", split="test"), dict(text="b"),
                                        dict(text="c", held_out=True)]))
    assert list(read_texts(str(tmp_path / "x"), 0, 0)) == ["b"]
    (tmp_path / "x").write_bytes(LINES([dict(messages=[user("a"), bot("b", weight=0), user("c"),
                                                       bot("d")], held_out=False)]))
    assert list(read_texts(str(tmp_path / "x"), 0, 0)) == ["a\nc\nd"]


def test_plain_text(tmp_path, capsys):
    # catches text that is taken for JSON, and what is no text but is learnt as if it were
    path = tmp_path / "x"
    path.write_text("[Verse 1]\na\n \n{chorus}\n\n\nb <|im_start|>user")
    assert list(read_texts(str(path), 0, 0)) == ["[Verse 1]\na", "{chorus}", "b <|im_start|>user"]
    assert "1 documents hold markers" in capsys.readouterr().out
    for content, message in ((b"%PDF-1.7", "a PDF"), (b"<!DOCTYPE html>", "a web page"),
                             ("story".encode("utf-16-le"), "UTF-16"), (b'"a"\n"b"', "JSON object"),
                             (b"a\ncaf\xe9", ":2: not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_texts(str(path), 0, 0))


@pytest.mark.parametrize("stop", ["<|endoftext|>", "</s>", "<|im_end|>", "<|EOT|>",
                                  "<｜end▁of▁sentence｜>"])
def test_documents_end_at_a_stop_marker_and_it_is_not_learnt(tmp_path, capsys, stop):
    # catches 400 stories that become 308 documents, with the marker as text
    stories = [f"Story {i}.\n\nIt ends." if i % 3 else f"Story {i}." for i in range(40)]
    (tmp_path / "x.txt").write_text(f"\n{stop}\n".join(stories))
    texts = list(read_texts(str(tmp_path / "x.txt"), 0, 0))
    assert not any(stop in t for t in texts)
    assert [t.strip() for t in texts if "Story" in t] == [f"Story {i}." for i in range(40)]
    assert f"39 markers end a document each and are not learnt: {stop}\n" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_bytes(LINES([dict(text=f"a{stop}b")]))
    assert list(read_texts(str(tmp_path / "x.jsonl"), 0, 0)) == ["a", "b"]


def test_an_answer_ends_with_our_own_eos_and_no_other(tmp_path, capsys):
    # catches a model that learns to spell the stop marker of another template
    write_jsonl(tmp_path / "x", [
        dict(messages=[user("a </s>"), bot("b</s>"), user("c"), bot("d <|im_end|>\n")]),
        dict(prompt="e", completion="f<|eot_id|></s>"), dict(prompt="g", completion="h")])
    sides = read_sides(tmp_path / "x", check_demonstration, needed=())
    texts = [[t["content"] for t in r["messages"]] for r in sides.train + sides.held_out]
    assert sorted(texts) == [["a </s>", "b", "c", "d"], ["e", "f"], ["g", "h"]]
    said = capsys.readouterr().out
    assert "cut off a stop marker behind 3 answers" in said and "1 texts hold markers" in said
    write_jsonl(tmp_path / "x", [dict(prompt="a", completion="</s>"),
                                 dict(prompt="b", completion="c")])
    sides = read_sides(tmp_path / "x", check_demonstration, needed=())
    assert len(sides.train + sides.held_out) == 1
    assert "left out 1 of 2 records, of which an answer is a stop marker" in capsys.readouterr().out
    write_jsonl(tmp_path / "x", [dict(prompt="a", completions=["b</s>", "c"], ranks=[1, 2])])
    sides = read_sides(tmp_path / "x", check_ranking, needed=())
    assert (sides.train + sides.held_out)[0]["completions"] == ["b", "c"]


# --- bad records ---------------------------------------------------------------------------------


def test_a_line_that_is_no_utf8_costs_only_itself(tmp_path, capsys):
    good = json.dumps(dict(prompt="a", completion="b")).encode()
    (tmp_path / "x").write_bytes(good + b"\ncaf\xe9\n" + b"\xef\xbb\xbf" + good + b"\n")
    with pytest.raises(UserError, match=r"x:2: not UTF-8 text \(--skip_bad=true goes on without"):
        read_rows(tmp_path / "x", check_demonstration)
    assert len(read_rows(tmp_path / "x", check_demonstration, skip_bad=True)) == 2


def test_bad_records_are_all_counted_and_can_be_skipped(folder):
    # catches a run that is lost to one bad line, and bad lines that are left out in silence
    lines = (folder / "demos.jsonl").read_text().splitlines()
    for i in range(12):
        lines.insert(2 * i, ['{"prompt": 3}', "no json", "[1]", '{"prompt": "a"}'][i % 4])
    (folder / "holes.jsonl").write_text("\n".join(lines))
    flags = [f if not f.startswith("--data") else "--data=holes.jsonl" for f in FLAGS["sft"]]
    run = run_script("sft.py", *flags, "--out=holes", cwd=folder)
    assert run.returncode == 2 and not (folder / "holes").exists()
    assert "holes.jsonl: 12 bad records of 42; --skip_bad=true goes on without" in run.stderr
    assert run.stderr.count("holes.jsonl:") == 11 and "holes.jsonl:3: not JSON" in run.stderr
    run = run_script("sft.py", *flags, "--skip_bad=true", "--out=holes", cwd=folder)
    assert run.returncode == 0 and "12 of 42 records are bad and left out" in run.stdout
    whole = run_script("sft.py", *FLAGS["sft"], "--out=whole", cwd=folder)
    assert whole.returncode == 0
    assert len({torch.load(folder / name / "model.pt", weights_only=True)["hash"]
                for name in ("holes", "whole")}) == 1
    assert "12 of 42 records" in (folder / "holes/log.jsonl").read_text()


@pytest.fixture
def own_cache(monkeypatch):
    """The study puts the cache of tokens elsewhere; behind the test it is where it was."""
    monkeypatch.setattr(tokens, "CACHE", tokens.CACHE)


def test_readers_survive_broken_files(tmp_path, capsys, own_cache):
    # the short form of studies/fuzz.py
    fuzz.main(fuzz.Config(n=400, seed=7, out=str(tmp_path / "fuzz")))
    said = capsys.readouterr().out
    assert "400 inputs: " in said and ", 0 broke a reader" in said


def test_a_reader_that_breaks_is_noticed(tmp_path, capsys, monkeypatch, own_cache):
    # catches a study that could not fail
    monkeypatch.setitem(fuzz.READERS, "check_prompt", lambda path: json.loads(path.read_bytes()))
    with pytest.raises(SystemExit) as stop:
        fuzz.main(fuzz.Config(n=400, seed=7, out=str(tmp_path / "fuzz")))
    assert stop.value.code == 1 and "Error: " in capsys.readouterr().out
    assert list((tmp_path / "fuzz").glob("check_prompt-*"))
