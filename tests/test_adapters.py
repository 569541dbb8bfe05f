"""Adapters of public data sets: the conversions, the real files, downloads, bad input.

The real files are read in place from ../shared/data and skipped where that is missing; everything
else runs on small files made here and on a server on 127.0.0.1. No test needs the network.
"""

import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import cli
import data.tokenizer
import pytest
from cli import UserError
from conftest import read_rows
from data import alpaca, alpaca_eval, download, fine_grained_rlhf, hh_rlhf, instructions
from data.records import (check_answer, check_demonstration, check_ranking, prompt_key, split,
                          write_jsonl)
from data.verifier import fulfils

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")

ALPACA = dict(instruction="Name a fruit.", input="", output="Pear.")
EVAL = dict(instruction="Name a fruit.", output_1="Pear.", generator_1="a", output_2="Chair.",
            generator_2="b", preference=1)


def dialogue(*texts, roles=("Human", "Assistant")):
    return "".join(f"\n\n{roles[i % len(roles)]}: {text}" for i, text in enumerate(texts))


HH = dict(chosen=dialogue("Hi", "Hello.", "A fruit?", "Pear."),
          rejected=dialogue("Hi", "Hello.", "A fruit?", "Chair."))


def write_json(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


def run(adapter, monkeypatch, *flags):
    """The adapter's own command line, in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{adapter.__name__}.py", *flags])
    try:
        cli.run_main(adapter.main, cli.parse(adapter.Config))
    except SystemExit as stop:
        return stop.code
    return 0


# --- conversions ---------------------------------------------------------------------------------


def test_alpaca_convert():
    """Would catch: an input that is lost, run together with the instruction, or left as "No input";
    an empty output taken as a demonstration."""
    def prompt(text):
        record, reason = alpaca.convert(dict(ALPACA, input=text))
        assert reason is None and record["completion"] == "Pear."
        return record["prompt"]

    assert prompt("") == "Name a fruit."
    assert prompt(" green, round \n") == "Name a fruit.\n\ngreen, round"
    for text in ("No input", "<noinput>", "\\<noinput\\>", "No input required.", "<no input>"):
        assert prompt(text) == "Name a fruit."
    for text in ("input", "No input device", "no", "7"):  # these are real inputs
        assert prompt(text) == f"Name a fruit.\n\n{text}"
    for output in ("", " \n", "<nooutput>", "<noinput>", "No Output"):
        record, reason = alpaca.convert(dict(ALPACA, output=output))
        assert record is None and "output" in reason
    assert alpaca.convert(dict(ALPACA, instruction=" "))[0] is None


def test_hh_convert():
    """Would catch: lost turns, swapped answers, a split at blank lines or at a quoted "Human:"."""
    record, reason = hh_rlhf.convert(HH)
    assert reason is None
    assert record == dict(chosen="Pear.", rejected="Chair.", prompt=[
        dict(role="user", content="Hi"), dict(role="assistant", content="Hello."),
        dict(role="user", content="A fruit?")])

    question = "Two things:\n\nHow are you?\nHuman: is that a word?\n\n\nYes?"
    answer = "First\n\n- Human: yes\n\n\n- Assistant: too"
    record, reason = hh_rlhf.convert(dict(chosen=dialogue(question, answer),
                                          rejected=dialogue(question, "No.")))
    assert reason is None
    assert record["prompt"] == [dict(role="user", content=question)]
    assert record["chosen"] == answer


@pytest.mark.parametrize("chosen, rejected, reason", [
    (dialogue("Hi", "A."), dialogue("Ho", "B."), "differ"),
    (dialogue("Hi", "A.", "B", "C."), dialogue("Hi", "A."), "differ"),
    (dialogue("Hi", "A."), dialogue("Hi", " "), "empty last turn"),
    (dialogue("Hi", "A."), "\n\nHuman: Hi\n\nAssistant:", "empty last turn"),
    (dialogue("Hi", "", "Ho", "A."), dialogue("Hi", "", "Ho", "B."), "empty turn before the last"),
    (dialogue("", "A."), dialogue("", "B."), "empty turn before the last"),
    (dialogue("Hi", "x", "A.", roles=("Human", "Assistant", "Assistant")),
     dialogue("Hi", "x", "B.", roles=("Human", "Assistant", "Assistant")), "alternate"),
    (dialogue("A.", roles=("Assistant",)), dialogue("B.", roles=("Assistant",)), "alternate"),
    (dialogue("Hi", "A."), dialogue("Hi", "A. "), "same answer"),
    (dialogue("Hi"), dialogue("Hi", "A."), "parse"),
    ("Hi" + dialogue("Ho", "A."), dialogue("Hi", "A."), "parse"),
    ("A.", "B.", "parse"),
    ("", dialogue("Hi", "A."), "parse"),
])
def test_hh_drops(chosen, rejected, reason):
    """Would catch: a broken dialogue turned into a pair whose prompt is not what was judged."""
    record, why = hh_rlhf.convert(dict(chosen=chosen, rejected=rejected))
    assert record is None and reason in why


def test_alpaca_eval_convert():
    """Would catch: chosen and rejected swapped, a float 2.0 read as a tie, a tie read as a pair."""
    first = dict(prompt="Name a fruit.", chosen="Pear.", rejected="Chair.", generator_chosen="a",
                 generator_rejected="b")
    second = dict(prompt="Name a fruit.", chosen="Chair.", rejected="Pear.", generator_chosen="b",
                  generator_rejected="a")
    for preference, expected in ((1, first), (1.0, first), (2, second), (2.0, second)):
        assert alpaca_eval.convert(dict(EVAL, preference=preference)) == (expected, None)
    for preference, reason in ((0, "tie"), (0.0, "tie"), (1.5, "tie"), (None, "preference")):
        record, why = alpaca_eval.convert(dict(EVAL, preference=preference))
        assert record is None and reason in why
    for change in (dict(output_1=" "), dict(output_2=""), dict(output_2="Pear.\n")):
        assert alpaca_eval.convert(dict(EVAL, **change))[0] is None
    for preference in (1.37, 3, "1", True):
        with pytest.raises(UserError, match="row 7.*preference"):
            alpaca_eval.convert(dict(EVAL, preference=preference), "row 7")


def test_fine_grained_convert():
    """Would catch: judgements read in another order, a tie that makes a pair, a lost answer."""
    row = {"question": " Which? ", "preference": [1, 2, 0, 2, 1, 1], "passages": [],
           **{f"prediction {n + 1}": text for n, text in enumerate("abcd")}}
    pairs, dropped = fine_grained_rlhf.convert(row)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [
        ("a", "b"), ("c", "a"), ("c", "b"), ("b", "d"), ("c", "d")]
    assert {p["prompt"] for p in pairs} == {"Which?"} and sum(dropped.values()) == 1
    pairs, dropped = fine_grained_rlhf.convert(row | {"prediction 2": "a", "prediction 3": ""})
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("a", "d")] and len(dropped) == 3
    for wrong in ([1, 2, 0], [1, 2, 0, 2, 1, 3], "121212", [True] * 6):
        with pytest.raises(UserError, match="row 7.*preference"):
            fine_grained_rlhf.convert(row | dict(preference=wrong), "row 7")


def test_halves_share_no_training_prompt(tmp_path, monkeypatch):
    """Would catch: a judge that was trained on what the reward model saw; a lost record."""
    from studies import halves
    rows = [dict(prompt=f"q{i // 2}", chosen="a", rejected=f"b{i}") for i in range(400)]
    for name, part in (("one", rows[:150]), ("two", rows[150:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    monkeypatch.chdir(tmp_path)
    halves.main(halves.Config(data="one.jsonl,two.jsonl"))
    files = [[json.loads(line) for line in open(f"out/real/{name}.jsonl")]
             for name in ("first", "second")]
    prompts = [{r["prompt"] for r in file} for file in files]
    held_out = {r["prompt"] for r in split(rows).held_out}
    assert prompts[0] & prompts[1] == held_out and len(held_out) > 5
    assert prompts[0] | prompts[1] == {r["prompt"] for r in rows}
    assert len(files[0]) + len(files[1]) == 400 + len(split(rows).held_out)
    assert 60 < len(prompts[0]) < 160
    for path, message in (("", "--data= is missing"), ("none.jsonl", "none.jsonl")):
        with pytest.raises(UserError, match=message):
            halves.main(halves.Config(data=path))


# --- the real files ------------------------------------------------------------------------------

# adapter, check, records, distinct prompts, dropped
REAL = [(alpaca, check_demonstration, 4993, 4993, 7),
        (hh_rlhf, check_ranking, 2299, 2297, 13),
        (fine_grained_rlhf, check_ranking, 2616, 488, 384),
        (alpaca_eval, check_ranking, 10345, 805, 120)]


@real
@pytest.mark.parametrize("adapter, check, n, n_prompts, n_dropped", REAL)
def test_real_set(adapter, check, n, n_prompts, n_dropped, tmp_path, monkeypatch, capsys):
    """Would catch: rows lost or gained, a record that a stage refuses, a prompt on both sides of
    the split, counts that do not add up."""
    name, out = adapter.__name__.split(".")[1], tmp_path / "records.jsonl"
    assert run(adapter, monkeypatch, f"--source={SHARED / name}", f"--out={out}") == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # the checksums of the local copy are the pinned ones
    assert printed.out.count("\n") == 1
    assert f"{n + n_dropped} rows read, {n} written to {out}, {n_prompts} distinct prompts, " \
           f"{n_dropped} dropped: " in printed.out

    records = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert len(records) == n
    assert len(read_rows(out, check)) == n  # every record passes
    sides = split(records)
    train, held_out = ({prompt_key(r) for r in side} for side in (sides.train, sides.held_out))
    assert len(train | held_out) == n_prompts and not train & held_out
    assert 0.05 < len(held_out) / n_prompts < 0.15


@real
def test_real_details():
    """Would catch: adapters that pass the counts but mix up who said what."""
    rows, _ = alpaca_eval.records(SHARED / "alpaca_eval" / "gpt4" / "annotations.json")
    won = sum(r["generator_chosen"] == "gpt4" for r in rows)
    assert (len(rows), won) == (793, 761)
    assert all({r["generator_chosen"], r["generator_rejected"]} == {"gpt4", "text_davinci_003"}
               for r in rows)
    rows, _ = hh_rlhf.records(SHARED / "hh_rlhf" / "harmless-base" / "test.jsonl.gz")
    assert sum(len(r["prompt"]) > 1 for r in rows) > 1000  # several turns are kept
    assert all(r["prompt"][0]["role"] == r["prompt"][-1]["role"] == "user" for r in rows)


@real
def test_real_command_line(tmp_path):
    """Would catch: a script that only works when it is imported."""
    for name in ("alpaca", "hh_rlhf", "alpaca_eval"):
        out = tmp_path / f"{name}.jsonl"
        result = subprocess.run([sys.executable, "-m", f"data.{name}", f"--out={out}",
                                 f"--source={SHARED / name}"],
                                cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"{name}: ") and out.stat().st_size > 1e6


def test_instructions_convert():
    """Would catch: an instruction that contradicts its request, or that lost its input."""
    for text in ("Describe an atom.", "Why do people sleep?", "Explain what a listener does"):
        assert instructions.convert(dict(instruction=f" {text}\n")) == (dict(prompt=text), None)
    for text, reason in (("", "without"), ("Name 3 fruits", "a form"), ("Sort\na, b", "a form"),
                         ("Name three fruits", "a form"), ("Write a Story", "a form"),
                         ("Sort these:", "a form"), ("why " * 21, "more than 20 words")):
        record, why = instructions.convert(dict(instruction=text))
        assert record is None and reason in why
    assert "input" in instructions.convert(dict(instruction="Why?", input="x"))[1]


def written_instructions(folder, monkeypatch, *flags):
    out = folder / "i.jsonl"
    assert run(instructions, monkeypatch, f"--source={folder}", f"--out={out}", "--overwrite=true",
               *flags) == 0
    read_rows(out, check_answer)  # every record passes
    return [json.loads(line) for line in out.open(encoding="utf-8")]


def test_instructions(tmp_path, monkeypatch, capsys):
    """Would catch: an instruction on both sides, asked one way here and another way there; a
    side that other files see otherwise, constraints that the request does not say, a seed that
    does not count, rows that are lost in silence."""
    asked = [f"Describe a {a} {b}." for a in ("red", "green", "big", "new", "old") for b in
             ("tree", "house", "river", "car", "bird", "town", "shop", "road", "book", "film")] \
        + ["describe A RED  tree."]
    write_json(tmp_path / "harmless_a.json", [dict(instruction=text) for text in asked[:20]])
    write_json(tmp_path / "alpaca_b.json", [dict(instruction=t, input="") for t in asked[20:]])
    first = written_instructions(tmp_path, monkeypatch)
    assert "51 rows read, 50 written" in capsys.readouterr().out
    assert first == written_instructions(tmp_path, monkeypatch)
    others = [written_instructions(tmp_path, monkeypatch, f"--seed={n}") for n in range(2, 30)]
    instruction = lambda r: r["prompt"].split("\n\n")[0].lower().replace("  ", " ")
    sides = split([dict(prompt=text) for text in asked])  # as in a file that says nothing
    held_out = {r["prompt"].lower() for r in sides.held_out}
    assert 0 < len(held_out) < 20
    for records in (first, *others):
        assert len({instruction(r) for r in records}) == 50
        assert {instruction(r) for r in records if r["held_out"]} == held_out
    assert len({r["prompt"] for records in (first, *others) for r in records}) > 1000
    kinds = set()
    for r in (r for records in others for r in records):
        text, (*own, length) = r["prompt"].split("\n\n")[1], r["constraints"]
        assert length["kind"] == "words" and {f"{length['at_least']}", f"{length['at_most']}"} < {
            *text.split()} and "{" not in text
        for c in own:
            assert c.get("word", c.get("text", "")) in text
        kinds.add(own[0]["kind"] if own else "words")
    assert kinds == set(instructions.KINDS)
    assert len(written_instructions(tmp_path, monkeypatch, "--records=9")) == 9
    assert "41 beyond --records=9" in capsys.readouterr().out


def test_each_request_is_one_that_an_answer_fulfils():
    """Would catch: a kind of request whose constraints contradict each other."""
    answers = dict(items="- pears are green\n- trees grow", lower_case="a pear is green and sweet",
                   include="people can help more in good time all over life and the world",
                   exclude="Pears grow green every year")
    for kind, (share, wordings, values, constraints) in instructions.KINDS.items():
        assert share > 0 and len(wordings) == len(set(wordings)) == 3
        for x in values:
            answer = answers.get(kind, "It may do so now.")
            answer = f"{x} {answer}" if kind == "begins" else answer
            answer = f"{answer}{x[0]}" if kind == "ends" else answer
            assert fulfils(answer, [*constraints(x), dict(kind="words", at_least=5, at_most=20)])


@real
def test_instructions_of_the_real_files(tmp_path, monkeypatch, capsys):
    """Would catch: a warning about the pinned checksums, too few instructions for a run."""
    out = tmp_path / "i.jsonl"
    assert run(instructions, monkeypatch, f"--source={SHARED / 'refusal_direction'}",
               f"--out={out}") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "12530 rows read, 4000 written" in printed.out
    sides = split(read_rows(out, check_answer))
    assert 300 < len(sides.held_out) < 500


# --- which files, and what is written ------------------------------------------------------------


def test_alpaca_full_set_is_preferred(tmp_path, monkeypatch, capsys):
    """Would catch: the 5,000-row part read although the full set lies beside it."""
    write_json(tmp_path / "alpaca_5000.json", [ALPACA])
    out = tmp_path / "a.jsonl"
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={out}") == 0
    printed = capsys.readouterr()
    assert "1 written" in printed.out
    assert "warning: " in printed.err and "alpaca_5000.json" in printed.err  # not the pinned file
    write_json(tmp_path / "alpaca_data.json", [ALPACA, dict(ALPACA, instruction="Name a tree.")])
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={out}",
               "--overwrite=true") == 0
    assert "2 written" in capsys.readouterr().out


def test_hh_subset_and_split(tmp_path, monkeypatch, capsys):
    """Would catch: a split or subset that is not asked for mixed in, or one that is left out."""
    for subset, split_, n in (("helpful", "train", 1), ("helpful", "test", 2), ("calm", "test", 4)):
        write_gz(tmp_path / subset / f"{split_}.jsonl.gz", [HH] * n)
    write_gz(tmp_path / "red-team-attempts" / "red_team_attempts.jsonl.gz", [dict(task="x")])
    out = tmp_path / "hh.jsonl"

    def written(source, *flags):
        assert run(hh_rlhf, monkeypatch, f"--source={source}", f"--out={out}", "--overwrite=true",
                   *flags) == 0
        return int(capsys.readouterr().out.split(" rows read")[0].split()[-1])

    assert written(tmp_path) == 7
    assert written(tmp_path, "--subset=helpful") == 3
    assert written(tmp_path, "--split=test") == 6
    assert written(tmp_path, "--subset=helpful", "--split=train") == 1
    assert written(tmp_path / "helpful") == 3
    assert written(tmp_path / "helpful", "--subset=helpful", "--split=test") == 2


def test_alpaca_eval_models(tmp_path, monkeypatch, capsys):
    """Would catch: models that are not asked for mixed in, a missing one passed over in silence."""
    for model in ("x", "y"):
        write_json(tmp_path / model / "annotations.json", [dict(EVAL, generator_2=model)])
    out = tmp_path / "e.jsonl"
    flags = (f"--source={tmp_path}", f"--out={out}", "--overwrite=true")
    assert run(alpaca_eval, monkeypatch, *flags) == 0
    assert "2 written" in capsys.readouterr().out
    assert run(alpaca_eval, monkeypatch, *flags, "--models=y") == 0
    assert [r["generator_rejected"] for r in map(json.loads, out.open())] == ["y"]
    capsys.readouterr()
    assert run(alpaca_eval, monkeypatch, *flags, "--models=y,z") == 2
    assert "z/annotations.json" in capsys.readouterr().err


def test_existing_output_is_kept(tmp_path, monkeypatch, capsys):
    """Would catch: a file of the user's overwritten without being asked to."""
    write_json(tmp_path / "alpaca_data.json", [ALPACA])
    out = tmp_path / "a.jsonl"
    out.write_text("mine")
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={out}") == 2
    assert "--overwrite=true" in capsys.readouterr().err and out.read_text() == "mine"
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={out}", "--overwrite=true") == 0
    assert json.loads(out.read_text()) == dict(prompt="Name a fruit.", completion="Pear.")
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={tmp_path}") == 2
    assert run(alpaca, monkeypatch, f"--source={tmp_path}", f"--out={out / 'b.jsonl'}") == 2
    assert capsys.readouterr().err.count("\n") == 2


def bad_inputs():
    """(adapter, how the file is made bad, what the error line must say)."""
    json_sets = [(alpaca, "alpaca_data.json", ALPACA, "output"),
                 (alpaca_eval, "x/annotations.json", EVAL, "output_2")]
    for adapter, file, good, key in json_sets:
        def make(content, file=file):
            return lambda folder: write_json(folder / file, content)

        def make_raw(content, file=file):
            def f(folder):
                write_json(folder / file, [])
                (folder / file).write_bytes(content)
            return f

        lacking = {k: v for k, v in good.items() if k != key}
        yield adapter, lambda folder: None, "is not a folder"
        pattern = file.replace("x/", "*/")
        yield adapter, lambda folder: folder.mkdir(), f"holds no {pattern}"
        broken = f'[{json.dumps(good)},\n {{"b" 2}}]'.encode()
        yield adapter, make_raw(broken), f"{file}: not JSON"
        yield adapter, make_raw(b'[{"a": "\xff"}]'), f"{file}:1: not UTF-8"
        yield adapter, make([good, 3]), f"{file}: row 2: expected a JSON object"
        yield adapter, make([good, good, lacking]), f"{file}: row 3: the field '{key}' is missing"
        yield adapter, make([good, {**good, key: None}]), f"{file}: row 2: '{key}' is NoneType"
        yield adapter, make([good, {**good, key: "\ud83d"}]), f"{file}: row 2: '{key}' holds a"
        yield adapter, make([]), "no usable row"
        yield adapter, make([{**good, key: ""}]), "no usable row of 1 read (1 with an empty output)"

    file = "s/train.jsonl.gz"

    def gz(content):
        def f(folder):
            write_gz(folder / file, [])
            (folder / file).write_bytes(content)
        return f

    line = json.dumps(HH).encode()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield hh_rlhf, lambda folder: None, "is not a folder"
    yield hh_rlhf, lambda folder: folder.mkdir(), "holds no */*.jsonl.gz"
    yield hh_rlhf, gz(b"plain text"), f"{file}:1: not JSON"
    yield hh_rlhf, gz(gzip.compress(line * 99)[:-9]), f"{file}: not a whole gzip file"
    yield hh_rlhf, gz(pointer), f"{file}: a git-lfs pointer"
    yield hh_rlhf, gz(gzip.compress(b'{"chosen": "\xff"}')), f"{file}:1: not UTF-8"
    yield hh_rlhf, gz(gzip.compress(line + b"\n{oops\n")), f"{file}:2: not JSON"
    yield hh_rlhf, gz(gzip.compress(line + b"\n\n[]")), f"{file}:3: expected a JSON object"
    yield hh_rlhf, gz(gzip.compress(line + b'\n{"chosen": "a"}')), f"{file}:2: the field 'rejected'"
    yield hh_rlhf, gz(gzip.compress(b"")), "no usable row"


@pytest.mark.parametrize("adapter, make, message", list(bad_inputs()))
def test_bad_input(adapter, make, message, tmp_path, monkeypatch, capsys):
    """Would catch: a traceback, an error that does not name file and row, half an output file."""
    out = tmp_path / "out" / "records.jsonl"
    make(tmp_path / "in")
    assert run(adapter, monkeypatch, f"--source={tmp_path / 'in'}", f"--out={out}") == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and printed.out == ""
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_bad_input_command_line(tmp_path):
    """Would catch: an exit status of 0 or 1, or a traceback, where the real command fails."""
    result = subprocess.run([sys.executable, "-m", "data.alpaca", f"--source={tmp_path / 'none'}",
                             f"--out={tmp_path / 'a.jsonl'}"],
                            cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("alpaca.py: error: --source=")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


# --- downloads -----------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves self.content; .ranges are the Range headers that came in, one per request."""
    content, honour_range, cut, status, daemon_threads = CONTENT, True, 0, None, True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.ranges.append(wanted)
        start = int(wanted[6:-1]) if wanted and server.honour_range else 0  # "bytes=N-"
        if server.status or start >= len(server.content):
            return self.send_error(server.status or 416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            whole = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.end_headers()
        if server.cut:  # the connection breaks after this many bytes, once
            body, server.cut = body[:server.cut], 0
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Loopback without a proxy, no waiting between tries, downloads below tmp_path."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(download, "DOWNLOADS", tmp_path / "downloads")


@pytest.fixture
def server(offline):
    server = Server(("127.0.0.1", 0), Handler)
    server.ranges, server.url = [], f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed_url(offline):
    """An address on which nothing listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    return f"http://127.0.0.1:{port}/file.bin"


def test_download(server, tmp_path):
    """Would catch: a lost or doubled chunk, a part left behind, a second download of a file that
    is there, a damaged file that is taken for the real one."""
    path = tmp_path / "set" / "file.bin"
    assert download.fetch(server.url, path, SHA256) == path
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    download.fetch(server.url, path, SHA256)
    assert server.ranges == [None]
    path.write_bytes(CONTENT[:-1])
    download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT and server.ranges == [None, None]


def test_download_resumes(server, tmp_path):
    """Would catch: a part that is thrown away, or continued at the wrong byte."""
    path, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    part.write_bytes(CONTENT[:100_001])
    download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT and server.ranges == ["bytes=100001-"]
    assert not part.exists()


def test_download_of_a_whole_part(server, tmp_path):
    """Would catch: status 416 taken for a failure when only the renaming was left to do."""
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download.fetch(server.url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_download_without_ranges(server, tmp_path):
    """Would catch: the whole file appended to the part when the server answers 200."""
    server.honour_range = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:100_001])
    download.fetch(server.url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == ["bytes=100001-"]


def test_download_goes_on_after_a_break(server, tmp_path):
    """Would catch: a connection that ends early taken for the end of the file."""
    server.cut = 300_000
    download.fetch(server.url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_interrupted_download_keeps_its_part(server, tmp_path, monkeypatch):
    """Would catch: a download that starts from nothing in the next run."""
    monkeypatch.setattr(download, "TRIES", 1)
    server.cut = 300_000
    with pytest.raises(UserError, match="300000 of 512000 bytes"):
        download.fetch(server.url, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:300_000]
    assert not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("part", [b"", b"other bytes", CONTENT + b"more"])
def test_wrong_checksum(part, server, tmp_path):
    """Would catch: a changed file that is used, or a bad part that every later run continues."""
    path = tmp_path / "file.bin"
    if part:
        (tmp_path / "file.bin.part").write_bytes(part)
    else:
        server.content = CONTENT[::-1]
    with pytest.raises(UserError, match="SHA-256") as error:
        download.fetch(server.url, path, SHA256)
    assert server.url in str(error.value) and not list(tmp_path.iterdir())
    server.content = CONTENT
    assert download.fetch(server.url, path, SHA256).read_bytes() == CONTENT


def test_server_errors(server, tmp_path):
    """Would catch: a 404 that is asked for again and again, a 503 that is given up at once, an
    error page that is saved as data."""
    for status, requests in ((404, 1), (503, download.TRIES)):
        server.status, server.ranges = status, []
        with pytest.raises(UserError, match=f"{status}.*--source=DIR") as error:
            download.fetch(server.url, tmp_path / "file.bin", SHA256)
        assert server.url in str(error.value) and len(server.ranges) == requests
    assert not list(tmp_path.iterdir())


def adapters_at(monkeypatch, url, sha256):
    """Every adapter with its one download at url: [(adapter, path of the file in its cache)]."""
    sets = [(alpaca, "alpaca_5000.json"), (alpaca_eval, "x/annotations.json"),
            (hh_rlhf, "s/test.jsonl.gz")]
    for adapter, path in sets:
        monkeypatch.setattr(adapter, "FILES", {path: (url, sha256)})
    return sets


def test_unreachable_download(closed_url, tmp_path, monkeypatch, capsys):
    """Would catch: a traceback, or an error that does not say what to do without a network."""
    for adapter, _ in adapters_at(monkeypatch, closed_url, SHA256):
        out = tmp_path / "records.jsonl"
        assert run(adapter, monkeypatch, f"--out={out}") == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "--source=DIR" in printed and closed_url in printed
        assert not out.exists()


def test_adapters_download(server, tmp_path, monkeypatch, capsys):
    """Would catch: an adapter that cannot read what it has downloaded."""
    contents = {alpaca: json.dumps([ALPACA]).encode(), alpaca_eval: json.dumps([EVAL]).encode(),
                hh_rlhf: gzip.compress(json.dumps(HH).encode())}
    for adapter, content in contents.items():
        sets = adapters_at(monkeypatch, server.url, hashlib.sha256(content).hexdigest())
        server.content, out = content, tmp_path / f"{adapter.__name__}.jsonl"
        assert run(adapter, monkeypatch, f"--out={out}") == 0
        assert "1 rows read, 1 written" in capsys.readouterr().out
        name = adapter.__name__.split(".")[1]
        assert (tmp_path / "downloads" / name / dict(sets)[adapter]).read_bytes() == content


def test_output_is_checked_before_the_download(closed_url, tmp_path, monkeypatch, capsys):
    """Would catch: minutes of download for an output that may not be written."""
    for adapter, _ in adapters_at(monkeypatch, closed_url, SHA256):
        assert run(adapter, monkeypatch, f"--out={tmp_path}") == 2
        assert "is a folder" in capsys.readouterr().err


def test_what_cannot_be_downloaded(offline, tmp_path, monkeypatch, capsys):
    """Would catch: another part than the one asked for, downloaded in silence."""
    out = f"--out={tmp_path / 'a.jsonl'}"
    assert run(hh_rlhf, monkeypatch, out, "--subset=helpful-base") == 2
    assert "harmless-base/test.jsonl.gz" in capsys.readouterr().err
    assert run(hh_rlhf, monkeypatch, out, "--split=train") == 2
    assert "--source=DIR" in capsys.readouterr().err
    assert run(alpaca_eval, monkeypatch, out, "--models=gpt4,gpt5") == 2
    assert "gpt5 cannot" in capsys.readouterr().err


@real
def test_pinned_files():
    """Would catch: a mistyped checksum, which would refuse every download."""
    for adapter in (alpaca, hh_rlhf, alpaca_eval):
        folder = SHARED / adapter.__name__.split(".")[1]
        for path, (url, sha256) in adapter.FILES.items():
            assert download.file_hash(folder / path) == sha256
            assert url.startswith("https://raw.githubusercontent.com/") and adapter.COMMIT in url


# --- GPT-2's tokenizer, which real text is read with ---------------------------------------------


@real
def test_gpt2_tokenizer(monkeypatch):
    """Would catch: another pre-tokenisation or rank order than GPT-2's, or text that does not
    survive the way there and back."""
    monkeypatch.setenv("GPT2_RANKS", str(SHARED / "gpt2_bpe" / "gpt2.tiktoken"))
    gpt2 = data.tokenizer._by_name.__wrapped__("gpt2")  # not what another test has loaded
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert (gpt2.eos, gpt2.vocab_size) == (50256, 50304)
    records, _ = alpaca.records(SHARED / "alpaca" / "alpaca_5000.json")
    for record in records[:500]:
        assert gpt2.decode(gpt2.encode(record["completion"])) == record["completion"]


def test_gpt2_tokenizer_without_its_ranks(closed_url, tmp_path, monkeypatch):
    """Would catch: requests' own traceback where the ranks are missing or cannot be downloaded."""
    missing = str(tmp_path / "gpt2.tiktoken")
    monkeypatch.setenv("GPT2_RANKS", missing)
    with pytest.raises(UserError, match="ranks file") as error:
        data.tokenizer._by_name.__wrapped__("gpt2")
    assert missing in str(error.value) and "\n" not in str(error.value)

    monkeypatch.delenv("GPT2_RANKS", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(data.tokenizer, "GPT2_URL", closed_url)
    with pytest.raises(UserError, match="GPT2_RANKS") as error:
        data.tokenizer._by_name.__wrapped__("gpt2")  # not what another test has loaded
    assert closed_url in str(error.value) and "\n" not in str(error.value)
