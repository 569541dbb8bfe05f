"""data/convert.py and the adapters dolly, ultrafeedback and tldr: every documented shape, the real
files, every container, bad input.

The real files are read in place from ../shared/data and skipped where that is missing. No test
needs the network.
"""

import copy
import gzip
import json
import os
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
from cli import UserError
from conftest import ROOT, read_rows, run_script
from data import convert, dolly, tldr, ultrafeedback
from data.records import (check_answer, check_demonstration, check_prompt, check_ranking,
                          check_ranking_or_label, prompt_key, split)

SHARED = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def run(folder, content, **flags):
    """The records that convert.py makes of a file with this content (bytes, or rows)."""
    path, out = folder / "in", folder / "out.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else lines(content))
    convert.main(convert.Config(**dict(file=str(path), out=str(out), overwrite=True) | flags))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]


def user(text):
    return dict(role="user", content=text)


def assistant(text, **more):
    return dict(role="assistant", content=text, **more)


# --- shapes --------------------------------------------------------------------------------------

Q, A, B = "Name a fruit.", "A pear.", "A chair."
TURNS = [user("Hi."), assistant("Hello."), user(Q)]
HH = [f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {Q}\n\nAssistant: {x}" for x in (A, B)]


def message(key, text, *replies, **more):
    role = "assistant" if key[0] == "a" else "prompter"
    return dict(message_id=key, text=text, role=role, lang="en", replies=list(replies)) | more


TREE = dict(message_tree_id="p1", prompt=message(
    "p1", "Hi.",
    message("a1", "Hey.", message("p2", "Bye.", message("a2", "See you.", rank=None)), rank=1),
    message("a3", "Hello.", message("p3", Q, message("a4", B, rank=2), message("a5", A, rank=0),
                                    message("a6", "Rude.", rank=1, deleted=True),
                                    message("a7", "A plum.", rank=1), message("a8", "Unranked."),
                                    ), rank=0),
    message("a9", "No.", message("p4", "Why?"), review_result=False, rank=2)))


def flat(node, parent=None):
    yield {k: v for k, v in dict(node, parent_id=parent).items() if k != "replies"}
    for reply in node["replies"]:
        yield from flat(reply, node["message_id"])


DEMONSTRATIONS = [
    dict(messages=[user("Hi."), assistant("Hello.")]),
    dict(messages=[user("Hi."), assistant("Hey.", weight=0), user("Bye."), assistant("See you.")]),
    dict(messages=[user("Hi."), assistant("Hello.", weight=0), user(Q), assistant(A)])]
RANKINGS = [
    dict(prompt=[user("Hi.")], completions=["Hey.", "Hello."], ranks=[2, 1]),
    dict(prompt=TURNS, completions=[B, A, "A plum."], ranks=[3, 1, 2])]
ULTRA = dict(source="x", instruction=Q, models=["a", "b", "c"], completions=[
    dict(model="a", response=B, overall_score=9.0, **{"fine-grained_score": 2}),
    dict(model="b", response=A, overall_score=1.0, **{"fine-grained_score": 4.5}),
    dict(model="c", response="A plum.", overall_score=5, **{"fine-grained_score": 4.5}),
    dict(model="d", response="", overall_score=5, **{"fine-grained_score": 3.0}),
    dict(model="e", response="Mute.", overall_score=5, **{"fine-grained_score": None})])
WITHOUT_FINE = dict(ULTRA, completions=[dict(c, **{"fine-grained_score": float(score)})
                                        for c, score in zip(ULTRA["completions"],
                                                            ("nan", "-inf", "inf"))])
PAIR = dict(prompt=Q, chosen=A, rejected=B)
DEMO = dict(prompt=Q, completion=A)

# name: (rows, flags, records, check)
SHAPES = dict(
    sharegpt=([dict(id="1", conversations=[
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Hello."}, {"from": "User", "value": Q},
        {"from": "bard", "value": A}])], {},
        [dict(messages=[dict(role="system", content="Be brief."), *TURNS, assistant(A)])],
        check_demonstration),
    sharegpt_chatgpt=([dict(conversations=[{"from": "user", "value": Q},
                                           {"from": "chatgpt", "value": A}], system="Be brief.")],
                      {}, [dict(messages=[user(Q), assistant(A)], system="Be brief.")],
                      check_demonstration),
    conversations_of_roles=([dict(conversations=[user(Q), assistant(A)])], {},
                            [dict(messages=[user(Q), assistant(A)])], check_demonstration),
    messages_of_from=([dict(messages=[{"from": "human", "value": Q}, {"from": "gpt", "value": A}])],
                      {}, [dict(messages=[user(Q), assistant(A)])], check_demonstration),
    sharegpt_pair=([dict(conversations=[{"from": "human", "value": Q}],
                         chosen={"from": "gpt", "value": A}, rejected={"from": "gpt", "value": B})],
                   {}, [dict(PAIR, prompt=[user(Q)])], check_ranking),
    labelled_dialogue=([dict(messages=[*TURNS, assistant(A)], label=True),
                        dict(messages=[*TURNS, assistant(B)], label=False)], {},
                       [dict(prompt=TURNS, completion=[assistant(A)], label=True),
                        dict(prompt=TURNS, completion=[assistant(B)], label=False)],
                       check_ranking_or_label),
    labelled_sharegpt=([dict(conversations=[{"from": "human", "value": Q},
                                            {"from": "gpt", "value": A}], label=True)], {},
                       [dict(prompt=[user(Q)], completion=[assistant(A)], label=True)],
                       check_ranking_or_label),
    alpaca=([dict(instruction="Sort.", input="b a", output="a b", held_out=True),
             dict(instruction=Q, input="No input", output=A),
             dict(instruction=Q, input=None, output=A, system="Be brief."),
             dict(instruction=Q, input="", output="<nooutput>")], {},
            [dict(prompt="Sort.\n\nb a", completion="a b", held_out=True), DEMO,
             dict(DEMO, system="Be brief.")], check_demonstration),
    alpaca_without_input=([dict(instruction=Q, input="", output=A)], {}, [DEMO],
                          check_demonstration),
    dolly=([dict(instruction="Who?", context="The Ada sailed.\n", response=" Ada.", category="qa"),
            dict(instruction=Q, context="", response=A, category="qa"),
            dict(instruction=Q, context="", response=" ", category="qa")], {},
           [dict(prompt="Who?\n\nThe Ada sailed.", completion="Ada."), DEMO], check_demonstration),
    dolly_labels=([dict(instruction=Q, context="", response=A, label=True),
                   dict(instruction=Q, context="Ripe.", response=B, label="0")], {},
                  [dict(DEMO, label=True),
                   dict(prompt=f"{Q}\n\nRipe.", completion=B, label=False)],
                  check_ranking_or_label),
    self_instruct=([dict(id="1", instruction=Q, instances=[dict(input="Red.", output="A cherry."),
                                                           dict(input="", output=A)])], {},
                   [dict(prompt=f"{Q}\n\nRed.", completion="A cherry."), DEMO],
                   check_demonstration),
    gsm8k=([dict(question="1+1?", answer="1+1=<<1+1=2>>2\n#### 2")], {},
           [dict(prompt="1+1?", completion="1+1=2\n#### 2", answer="2")], check_answer),
    oasst_trees=([TREE], {}, DEMONSTRATIONS, check_demonstration),
    oasst_trees_ranked=([TREE], dict(kind="rankings"), RANKINGS, check_ranking),
    oasst_messages=([*reversed(list(flat(TREE["prompt"])))], {}, [
        DEMONSTRATIONS[0], DEMONSTRATIONS[2], DEMONSTRATIONS[1]], check_demonstration),
    oasst_messages_ranked=([*flat(TREE["prompt"])], dict(kind="rankings"), RANKINGS, check_ranking),
    ultrafeedback=([ULTRA], {}, [dict(prompt=Q, completions=[B, A, "A plum."], ranks=[3, 1, 1])],
                   check_ranking),
    ultrafeedback_overall=([WITHOUT_FINE], {}, [
        dict(prompt=Q, completions=[B, A, "A plum."], ranks=[1, 3, 2])], check_ranking),
    ultrafeedback_pairs=([WITHOUT_FINE], dict(min_margin=4.0), [
        dict(prompt=Q, chosen=B, rejected=A), dict(prompt=Q, chosen=B, rejected="A plum.")],
        check_ranking),
    ultrafeedback_clear_pairs=([WITHOUT_FINE], dict(min_margin=4.1), [
        dict(prompt=Q, chosen=B, rejected=A)], check_ranking),
    binarized=([dict(prompt=Q, prompt_id="x", chosen=[user(Q), assistant(A)], score_chosen=9.0,
                     rejected=[user(Q), assistant(B)], messages=[user(Q), assistant(A)])], {},
               [dict(prompt=Q, chosen=[user(Q), assistant(A)], rejected=[user(Q), assistant(B)])],
               check_ranking),
    pair_with_and_without_prompt=([PAIR, dict(chosen=[user(Q), assistant(A)],
                                              rejected=[user(Q), assistant(B)])], {},
                                  [PAIR, dict(prompt=[user(Q)], chosen=[user(Q), assistant(A)],
                                              rejected=[user(Q), assistant(B)])], check_ranking),
    pair_without_prompt=([dict(chosen=[*TURNS, assistant(A)], rejected=[*TURNS, assistant(B)],
                               split="test")], {},
                         [dict(prompt=TURNS, chosen=[*TURNS, assistant(A)],
                               rejected=[*TURNS, assistant(B)], split="test")], check_ranking),
    pair_with_system=([dict(chosen=[user(Q), assistant(A)], rejected=[user(Q), assistant(B)],
                            system="Be brief.")], {},
                      [dict(prompt=[dict(role="system", content="Be brief."), user(Q)],
                            chosen=[user(Q), assistant(A)], rejected=[user(Q), assistant(B)])],
                      check_ranking),
    hh=([dict(chosen=HH[0], rejected=HH[1]), dict(chosen=HH[0], rejected=HH[0])], {},
        [dict(prompt=TURNS, chosen=A, rejected=B)], check_ranking),
    pairs=([dict(PAIR, held_out=False, weight=None)], {}, [dict(PAIR, held_out=False)],
           check_ranking),
    preferred=([dict(Question=Q, Preferred=A, Worse=B)], {}, [PAIR], check_ranking),
    better=([dict(query=Q, better=A, rejected=B, context="Ripe.")], {},
            [dict(PAIR, prompt=f"{Q}\n\nRipe.")], check_ranking),
    alpaca_pairs=([dict(instruction=Q, input="Ripe.", output=A, chosen=A, rejected=B)], {},
                  [dict(PAIR, prompt=f"{Q}\n\nRipe.")], check_ranking),
    rankings=([dict(prompt=Q, completions=[A, B], ranks=[1, 2], gold=[1.5, 0], world="synthetic",
                    noise=1.0, policy="x", second=[1, 1], family="advice")], {},
              [dict(prompt=Q, completions=[A, B], ranks=[1, 2], gold=[1.5, 0], world="synthetic",
                    noise=1.0, policy="x", second=[1, 1], family="advice")], check_ranking),
    labels=([dict(prompt=Q, completion=A, label="True"), dict(prompt=Q, completion=B, label=0)],
            {}, [dict(DEMO, label=True), dict(prompt=Q, completion=B, label=False)],
            check_ranking_or_label),
    messages=([dict(messages=[*TURNS, assistant(A, weight=1)], prompt=Q, prompt_id="x")], {},
              [dict(messages=[*TURNS, assistant(A, weight=1)])], check_demonstration),
    own=([dict(prompt=[user(Q)], completion=[assistant(A)], system="Be brief.", split="train")], {},
         [dict(prompt=[user(Q)], completion=[assistant(A)], system="Be brief.", split="train")],
         check_demonstration),
    weights=([dict(DEMO, weight=1), dict(DEMO, weight=0), dict(DEMO, train="false")], {},
             [dict(DEMO, weight=True)], check_demonstration),
    query=([dict(query=Q, response=A, system_prompt="Be brief."), dict(query=Q, response=A)], {},
           [dict(DEMO, system="Be brief."), DEMO], check_demonstration),
    problem=([dict(problem=Q, target=A)], {}, [DEMO], check_demonstration),
    no_input=([dict(question=Q, input=x, answer=A) for x in ("No input", " ", None, "Ripe.")], {},
              [DEMO] * 3 + [dict(prompt=f"{Q}\n\nRipe.", completion=A)], check_demonstration),
    nulls=([dict(conversations=[{"from": "human", "value": Q, "role": None, "content": None},
                                {"from": None, "value": None, "role": "gpt", "content": A}])], {},
           [dict(messages=[user(Q), assistant(A)])], check_demonstration),
    input_output=([dict(input=Q, output=A)], {}, [DEMO], check_demonstration),
    input_context=([dict(input=Q, context="Ripe.", solution=A)], {},
                   [dict(prompt=f"{Q}\n\nRipe.", completion=A)], check_demonstration),
    text_answer=([dict(question=Q, answer="7"), dict(question=Q, answer=A)], {},
                 [dict(prompt=Q, completion="7"), DEMO], check_demonstration),
    answers=([dict(question="1+1?", answer="2"), dict(question="2+2?", answer=4)], {},
             [dict(prompt="1+1?", answer="2"), dict(prompt="2+2?", answer=4)], check_answer),
    solved=([dict(problem="1+1?", solution="It is 2.", answer="2")], {},
            [dict(prompt="1+1?", completion="It is 2.", answer="2")], check_answer),
    solved_in_text=([dict(problem="x?", solution="x = 1/2", answer="1/2")], {},
                    [dict(prompt="x?", completion="x = 1/2")], check_demonstration),
    prompts=([dict(instruction=Q, category=None)], {}, [dict(prompt=Q)], check_prompt),
    named=([dict(prompt="no", q=Q, good=A, bad=B, input="no", held_out=True)],
           dict(prompt="q", chosen="good", rejected="bad"), [dict(PAIR, held_out=True)],
           check_ranking),
    named_label=([dict(q=Q, a=A, ok="1", s="Be brief.")],
                 dict(prompt="q", completion="a", label="ok", system="s"),
                 [dict(DEMO, label=True, system="Be brief.")], check_ranking_or_label),
    named_answer=([dict(q="1+1?", a="$2", long="It is 2.")],
                  dict(prompt="q", answer="a", completion="long"),
                  [dict(prompt="1+1?", answer="$2", completion="It is 2.")], check_answer),
    named_text=([dict(message_id="1", text=Q, role="prompter")], dict(prompt="text"),
                [dict(prompt=Q)], check_prompt),
    named_without_prompt=([dict(c=[user(Q), assistant(A)])], dict(completion="c"),
                          [dict(prompt=[user(Q)], completion=[user(Q), assistant(A)])],
                          check_demonstration),
    named_turns=([dict(q=[{"from": "human", "value": Q}], a=A)], dict(prompt="q", completion="a"),
                 [dict(prompt=[user(Q)], completion=A)], check_demonstration),
)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name, tmp_path):
    """Would catch: a shape that is taken for another, a field that is lost or mixed up, a record
    that its stage refuses."""
    rows, flags, expected, check = SHAPES[name]
    assert run(tmp_path, rows, **flags) == expected
    assert len(read_rows(tmp_path / "out.jsonl", check)) == len(expected)  # a stage reads them all
    again = run(tmp_path, expected)  # our own formats pass as they are
    assert again == expected


def test_what_is_told(tmp_path, capsys):
    """Would catch: a guess that is not shown, a field dropped in silence, counts that do not add
    up."""
    run(tmp_path, [dict(question=Q, response=A, id=7), dict(question=Q, response=A, train=0)])
    assert capsys.readouterr().out == (
        f"{tmp_path}/in: 2 rows, read as demonstrations: prompt = question, completion = response\n"
        "fields that are not used: id\n"
        "  from question: 'Name a fruit.', response: 'A pear.', id: 7\n"
        "  to   prompt: 'Name a fruit.', completion: 'A pear.'\n"
        f"convert: 2 rows read, 1 written to {tmp_path}/out.jsonl, 1 distinct prompts, "
        "1 dropped: 1 of weight 0\n")


@pytest.mark.parametrize("kind, counts", [
    ("demonstrations", ("3 written", "2 dropped: 2 messages deleted or refused in review, each")),
    ("rankings", ("2 written", "4 dropped: 2 messages deleted", ", 1 replies without a rank",
                  ", 1 user turns with too few replies"))])
def test_counts_of_trees(kind, counts, tmp_path, capsys):
    """Would catch: replies that vanish without being counted."""
    run(tmp_path, [TREE], kind=kind)
    out = capsys.readouterr().out
    assert all(count in out for count in counts)
    assert "1 rows, read as OpenAssistant's messages: prompt; a row gives several records" in out


def test_messages_without_their_parents(tmp_path, capsys):
    """Would catch: orphans that are taken for roots, or lost uncounted; a circle that hangs."""
    rows = list(flat(TREE["prompt"]))
    circle = [message("a20", "x"), message("p21", "y")]
    rows += [dict(circle[0], parent_id="p21"), dict(circle[1], parent_id="a20")]
    rows += [dict(message("a10", A), parent_id="gone"), dict(message("p11", Q), parent_id="a10")]
    assert run(tmp_path, rows) == DEMONSTRATIONS
    assert "4 messages below one that is not in the file" in capsys.readouterr().out
    with pytest.raises(UserError, match=":2: a message needs a 'message_id' of its own"):
        run(tmp_path, rows[:1] * 2)


def test_a_deep_tree(tmp_path):
    """Would catch: a long dialogue that ends in a RecursionError."""
    rows = [dict(message(f"{'pa'[n % 2]}{n}", str(n)), parent_id=f"{'ap'[n % 2]}{n - 1}" * (n > 0))
            for n in range(4000)]
    records = run(tmp_path, rows[:1200])
    assert len(records) == 600 and len(records[-1]["messages"]) == 1200


def test_counts_of_scores(tmp_path, capsys):
    """Would catch: answers and instructions without a use that are not counted."""
    tie = dict(ULTRA, completions=[dict(c, **{"fine-grained_score": 3})
                                   for c in ULTRA["completions"][:2]])
    run(tmp_path, [ULTRA, tie, dict(ULTRA, completions=[])])
    assert "4 dropped: 2 answers without text or score, 2 instructions without a better and a " \
           "worse" in capsys.readouterr().out


# --- containers ----------------------------------------------------------------------------------

ROWS = [dict(question='He said "hi", then:\n\nwhy; not\tyet?', answer="Because.\u2028 Ünder"),
        dict(question=Q, answer="x" * 200_000)]
EXPECTED = [dict(prompt=r["question"], completion=r["answer"]) for r in ROWS]


def table(delimiter, end="\n"):
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    return end.join(delimiter.join(map(quoted, cells)) for cells in (
        ROWS[0], *(row.values() for row in ROWS))).encode()


LIST = json.dumps(ROWS, indent=1).encode()
CONTAINERS = dict(
    lines=lines(ROWS), list=LIST, lines_gz=gzip.compress(lines(ROWS)), list_gz=gzip.compress(LIST),
    bom=b"\xef\xbb\xbf" + lines(ROWS), csv=table(","), tsv=table("\t"), semicolons=table(";"),
    csv_gz=gzip.compress(table(",")), csv_bom=b"\xef\xbb\xbf" + table(","),
    csv_late=b"\n\xef\xbb\xbf" + table(",") + b"\n\n", crlf=table(",", "\r\n"))


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(name, tmp_path):
    """Would catch: a container told by its name, a line break in a cell that is lost, a byte order
    mark in the first name, a long cell that is refused."""
    assert run(tmp_path, CONTAINERS[name]) == EXPECTED


def test_pipe(tmp_path):
    """Would catch: a pipe that is read twice, and empty the second time."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[CONTAINERS["csv_gz"]])
    writer.start()
    assert run(tmp_path, b"", file=str(tmp_path / "pipe")) == EXPECTED
    writer.join()


def test_parquet(tmp_path, monkeypatch):
    """Would catch: turns or lists that do not come through, a second batch that is lost."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rows = [dict(prompt=Q, chosen=[user(Q), assistant(A)], rejected=[user(Q), assistant(B)],
                 score=1.5, id=n, note=None) for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p", row_group_size=2)
    content = (tmp_path / "p").read_bytes()
    assert run(tmp_path, content) == [
        dict(prompt=Q, chosen=[user(Q), assistant(A)], rejected=[user(Q), assistant(B)])] * 3
    with pytest.raises(UserError, match="in: not a whole parquet file"):
        run(tmp_path, content[:-9])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UserError, match="in is a parquet file; to read it: pip install pyarrow"):
        run(tmp_path, content)


def test_flags_of_a_table(tmp_path):
    """Would catch: "false" in a table, which is text, taken for true; an empty cell for a value."""
    content = b"prompt,completion,label,held_out,system\nQ,A,false,TRUE,\nQ,B,1,,Brief.\n"
    assert run(tmp_path, content) == [
        dict(prompt="Q", completion="A", label=False, held_out=True, system=""),
        dict(prompt="Q", completion="B", label=True, system="Brief.")]
    assert run(tmp_path, b"prompt\nOne.\n\nTwo.\n") == [dict(prompt="One."), dict(prompt="Two.")]


# --- bad input -----------------------------------------------------------------------------------

BAD = [  # (content, flags, what the error says); contents are test names: no time of day in them
    (b"", {}, "in: holds no rows"),
    (b"\n\n", {}, "in: holds no rows"),
    (b"[]", {}, "in: holds no rows"),
    (b"[{}]", {}, "in: holds no rows"),
    (b"[1, 2]", {}, "in: holds no rows"),
    (b'{"oops', {}, "in:1: not JSON"),
    (b"[{}", {}, "in: not JSON"),
    (b"\xff\xfe\x00", {}, "is UTF-16"),
    (b"a,b\n\xff,2", {}, "in:2: not UTF-8"),
    (gzip.compress(b"a,b\n1,2", mtime=0)[:-5], {}, "not a whole gzip"),
    (b"PAR1 and no more", {}, "not a whole parquet file"),
    (b"prompt,prompt\n1,2", {}, "two columns have the same name: prompt, prompt"),
    (b'prompt,completion\n"a,b', {}, "neither JSON nor a table (behind row 0: unexpected end"),
    (b"prompt,completion\na,b\na,b,c\n", {}, "in: row 2: 3 cells, 2 columns"),
    (b"Once upon a time\nthere was.", {}, "not clear from their fields, Once upon a time: name"),
    ([dict(behavior=Q, category="x")], {}, "fields, behavior, category: name those to take, as in "
     "--prompt=NAME --completion=NAME"),
    ([dict(chosen=A, rejected=B)], {}, "not clear"),
    ([dict(text=Q)], {}, "not clear"),
    ([dict(q=Q)], dict(prompt="p"), "--prompt=p: no such column, or nothing in it; there are q"),
    ([dict(q=Q, p=None)], dict(prompt="p"), "--prompt=p: no such column, or nothing in it"),
    ([dict(q=Q)], dict(completion="q"), "in:1: the field 'prompt' is missing"),
    ([dict(q=Q, a=A)], dict(prompt="q", chosen="a"), "in:1: the field 'rejected' is missing"),
    ([dict(q=Q, a=A)], dict(prompt="q", label="a"), "in:1: the field 'completion' is missing"),
    ([dict(q=Q, a="1/4")], dict(prompt="q", answer="a"), "in:1: 'answer' is '1/4'"),
    ([DEMO, dict(DEMO, completion=" ")], {}, "in:2: 'completion' is empty"),
    ([DEMO, dict(prompt=Q)], {}, "in:2: the field 'completion' is missing"),
    ([DEMO, 3], {}, "in:2: a row must be a JSON object"),
    ([DEMO, dict(DEMO, prompt="\ud83d")], {}, "in:2: holds a broken character"),
    ([DEMO, dict(DEMO, weight=0.5)], {}, "in:2: 'weight' is 0.5"),
    ([DEMO, dict(DEMO, split="first")], {}, "in:2: 'split' is 'first'"),
    ([dict(DEMO, label="good")], {}, "in:1: 'label' must be true or false"),
    ([dict(prompt=[user(Q)], input="x", completion=A)], {}, "in:1: 'input' can only go behind"),
    ([dict(instruction=Q, context=[1], response=A)], {}, "in:1: 'context' is list"),
    ([dict(conversations=[{"from": "human", "value": Q}])], {}, "does not end with an assistant"),
    ([dict(conversations=[{"from": "tool", "value": Q}])], {}, "not 'tool'"),
    ([dict(instruction=Q, input="x", output=["a"])], {}, "in:1: 'output' is list"),
    ([dict(prompt=dict(text="x"))], {}, "in:1: a message needs a text, a role"),
    ([dict(message_id="1", text="x", role="narrator")], {}, "in:1: a message needs a text, a role"),
    ([dict(prompt=dict(text="x", role="prompter", replies=3))], {}, "in:1: a message needs"),
    ([dict(message_id=1, text="x", role="prompter")], {}, "in:1: a message needs a 'message_id'"),
    ([ULTRA], dict(kind="rankings"), "--kind=rankings is for OpenAssistant's messages"),
    ([TREE], dict(min_margin=1.0), "--min_margin is for UltraFeedback's scores"),
    ([TREE], dict(kind="best"), "--kind=best: expected demonstrations or rankings"),
    ([dict(DEMO, weight=0)], {}, "no usable row of 1 read (1 of weight 0)"),
    ([DEMO], dict(file=""), "name a file"),
    ([DEMO], dict(file="none"), "there is no file none"),
    ([DEMO], dict(out="/"), "--out=/ is a folder"),
]


@pytest.mark.parametrize("content, flags, message", BAD)
def test_bad_input(content, flags, message, tmp_path):
    """Would catch: a traceback, an error that does not say what and where, half an output file."""
    with pytest.raises(UserError) as error:
        run(tmp_path, content, **flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_skip_bad(tmp_path, capsys):
    """Would catch: bad rows that vanish, are not all counted, or stop the run for good."""
    content = lines([DEMO]) + b"oops\n" + lines([dict(prompt=Q)] * 10)
    with pytest.raises(UserError) as error:
        run(tmp_path, content)
    first, *listed = str(error.value).split("\n")
    assert first == f"{tmp_path}/in: 11 bad rows of 12; --skip_bad=true goes on without them:"
    assert len(listed) == 11 and "in:2: not JSON" in listed[0] and listed[-1].strip() == "..."
    assert run(tmp_path, content, skip_bad=True) == [DEMO]
    out = capsys.readouterr().out
    assert "12 rows read, 1 written" in out and "11 dropped: 11 bad" in out
    assert "in:2: not JSON" in cli.NOTES[0] and cli.NOTES[0].count("\n") == 11
    with pytest.raises(UserError, match="in:1: 'prompt' is empty"):  # nothing would be left
        run(tmp_path, [dict(DEMO, prompt=" ")], skip_bad=True)


NAMES = sorted({name for names in convert.ROLES.values() for name in names} | set(convert.BESIDE)
               | {"message_id", "parent_id", "text", "role", "replies", "instances", "rank",
                  "response", "overall_score", "fine-grained_score", "from", "value", "content"})
LEAVES = st.sampled_from([None, True, False, 0, 1, 2.5, float("nan"), 10**400, "", " ", "x", "7",
                          "user", "human", "assistant", "prompter", "train", "\ud83d", "#### 3",
                          "\n\nHuman: a\n\nAssistant: b"])
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)),
    max_leaves=8)
SETTINGS = settings(max_examples=400, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw):
    """Rows and flags of a shape, with up to three values, anywhere inside, lost or replaced."""
    rows, flags, *_ = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    rows = copy.deepcopy(rows * 2)
    for _ in range(draw(st.integers(0, 3))):
        places = [(rows, n) for n in range(len(rows))]
        for container, key in places:  # the list grows while it is read
            inner = container[key]
            places += [(inner, k) for k in inner] if isinstance(inner, dict) else \
                [(inner, n) for n in range(len(inner))] if isinstance(inner, list) else []
        container, key = draw(st.sampled_from(places))
        if isinstance(container, dict) and draw(st.booleans()):
            del container[key]
        else:
            container[key] = draw(VALUES)
    return rows, flags


@SETTINGS
@given(st.one_of(damaged(), st.tuples(st.lists(st.dictionaries(
    st.sampled_from(NAMES), VALUES, max_size=6), min_size=1, max_size=4), st.just({}))),
    st.booleans())
def test_any_rows(tmp_path, rows_and_flags, skip_bad):
    """Would catch: rows that end in a traceback, or in a record that no stage reads."""
    rows, flags = rows_and_flags
    try:
        records = run(tmp_path, rows, skip_bad=skip_bad, **flags)
    except UserError:
        return
    for record in records:
        has = record.keys()
        if has & {"chosen", "completions", "label"}:
            check_ranking_or_label(record)
        if "answer" in has:
            check_answer(record)
        if has & {"completion", "messages"} and "label" not in has:
            check_demonstration(record)
        check_prompt(record)


@SETTINGS
@given(st.one_of(st.binary(max_size=60), st.text('a,"\n\r\t;{}[]\x00\ufeff', max_size=40).map(
    lambda text: f"prompt,completion\n{text}".encode())))
def test_any_bytes(tmp_path, content):
    """Would catch: a file that ends in a traceback."""
    try:
        run(tmp_path, content)
    except UserError:
        pass


# --- the command ---------------------------------------------------------------------------------


def test_command_line(tmp_path):
    """Would catch: a FILE that is only found as --file=, help without its groups, a traceback."""
    (tmp_path / "rows.csv").write_text("q,a\nHi.,Hello.\n")
    flags = ("--prompt=q", "--completion=a", "--out=out.jsonl")
    for n, arguments in enumerate((("rows.csv", *flags), (*flags, "rows.csv"),
                                   ("--file=rows.csv", *flags))):
        more = ["--overwrite=true"] * (n > 0)
        done = run_script("data/convert.py", *arguments, *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert json.loads((tmp_path / "out.jsonl").read_text()) == dict(prompt="Hi.",
                                                                        completion="Hello.")
    for arguments, message in (((), "name a file"), (("rows.csv", "b.csv"), "cannot read 'b.csv'"),
                               (("rows.csv", *flags), "exists already"),
                               (("rows.cvs",), "did you mean rows.csv?"),
                               (("rows.csv", "--propmt=q"), "did you mean --prompt?")):
        done = run_script("data/convert.py", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    help_text = run_script("data/convert.py", "--help", cwd=tmp_path).stdout
    for part in ("python -m data.convert FILE --kind=rankings", "columns to take", "--skip_bad=",
                 "what is made of ranked and scored answers:"):
        assert part in help_text


# --- the real files ------------------------------------------------------------------------------

REAL = [  # (file, flags, check, records, distinct prompts)
    ("llama_factory/alpaca_en_demo.json", {}, check_demonstration, 999, 985),
    ("llama_factory/dpo_en_demo.json", {}, check_ranking, 300, 295),
    ("llms_from_scratch/instruction-data-with-preference.json", {}, check_ranking, 1100, 1075),
    ("self_instruct/seed_tasks.jsonl", {}, check_demonstration, 175, 175),
    ("self_instruct/user_oriented_instructions.jsonl", {}, check_demonstration, 252, 252),
    ("safety_tuned_llamas/safety_only_data_Instructions.json", {}, check_demonstration, 2483, 2479),
    ("alpaca/alpaca_5000.json", {}, check_demonstration, 4993, 4993),
    ("hh_rlhf/harmless-base/test.jsonl.gz", {}, check_ranking, 2299, 2297),
    ("gsm8k/test.jsonl", {}, check_answer, 1319, 1319),
    ("refusal_direction/harmful_test.json", {}, check_prompt, 572, 562),
    ("harmbench/harmbench_behaviors_text_all.csv", dict(prompt="Behavior"), check_prompt, 400, 393),
    ("truthfulqa/TruthfulQA.csv", dict(prompt="Question", completion="Best Answer"),
     check_demonstration, 817, 817),
    ("xstest/xstest_prompts.csv", dict(prompt="prompt"), check_prompt, 450, 450),
]


@real
@pytest.mark.parametrize("name, flags, check, n, n_prompts", REAL, ids=[row[0] for row in REAL])
def test_real_file(name, flags, check, n, n_prompts, tmp_path):
    """Would catch: rows lost or gained, a record that a stage refuses."""
    records = run(tmp_path, b"", file=str(SHARED / name), **flags)
    assert len(records) == len(read_rows(tmp_path / "out.jsonl", check)) == n
    assert len({prompt_key(record) for record in records}) == n_prompts


# --- adapters ------------------------------------------------------------------------------------


def adapt(adapter, folder, *flags):
    """The records of an adapter's own command line, or its error."""
    done = run_script(f"data/{adapter.__name__.split('.')[1]}.py", *flags, cwd=folder)
    if done.returncode:
        assert done.returncode == 2 and done.stdout == ""
        return done.stderr.splitlines()[-1]
    path = folder / "out" / "data" / f"{adapter.__name__.split('.')[1]}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()], done


def test_dolly(tmp_path):
    """Would catch: a context that is lost, empty rows that are kept, another file taken in
    silence."""
    (tmp_path / "databricks-dolly-15k.jsonl").write_bytes(lines(SHAPES["dolly"][0]))
    records, done = adapt(dolly, tmp_path, "--source=.")
    assert records == SHAPES["dolly"][2]
    assert "3 rows read, 2 written" in done.stdout and "1 with an empty response" in done.stdout
    assert "is not the file that this adapter was written for" in done.stderr
    assert dolly.convert(dict(instruction="", context="x", response=A))[1]
    (tmp_path / "databricks-dolly-15k.jsonl").write_bytes(lines([dict(instruction=Q)]))
    assert "jsonl:1: the field 'context' is missing" in adapt(
        dolly, tmp_path, "--source=.", "--overwrite=true")


BINARIZED = dict(prompt=Q, prompt_id="x", chosen=[user(Q), assistant(f" {A}\n")], score_chosen=8.0,
                 rejected=[user(Q), assistant(B)], score_rejected=6.5, messages=[])


def test_ultrafeedback(tmp_path):
    """Would catch: sides that are mixed up or overlap, ties that make pairs, a flag that does
    nothing."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    other = [dict(BINARIZED, prompt=q, chosen=[user(q), assistant(A)],
                  rejected=[user(q), assistant(B)]) for q in ("name a  fruit.", "Name a tree.")]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", other), ("test", [BINARIZED])):
        parquet.write_table(pyarrow.Table.from_pylist(rows),
                            folder / f"{name}_prefs-00000-of-00001.parquet")
    records, done = adapt(ultrafeedback, tmp_path, "--source=data")
    assert records == [dict(prompt="Name a tree.", chosen=A, rejected=B, held_out=False),
                       dict(PAIR, held_out=True)]
    assert "3 rows read, 2 written" in done.stdout
    assert "1 of the training part whose prompt is tested" in done.stdout
    sides = split(records)
    assert [len(sides.train), len(sides.held_out)] == [1, 1]
    assert "no usable row of 3 read (3 with a gap below 2)" in adapt(
        ultrafeedback, tmp_path, "--source=data", "--min_margin=2", "--overwrite=true")
    assert "--source=DIR is missing: `hf download" in adapt(ultrafeedback, tmp_path,
                                                            "--overwrite=true")


@pytest.mark.parametrize("change, reason", [
    (dict(score_rejected=8), "better score"), (dict(score_rejected=9), "better score"),
    (dict(score_chosen=float("nan")), "better score"),
    (dict(rejected=[user("Other."), assistant(B)]), "questions differ"),
    (dict(rejected=[user(Q), assistant(" ")]), "empty turn"),
    (dict(rejected=[user(Q), assistant(A)]), "same answer"),
    (dict(rejected=[assistant(A)]), None), (dict(chosen=None), None), (dict(prompt=None), None),
    (dict(rejected=[user(Q), "no"]), None), (dict(score_chosen="8"), None)])
def test_ultrafeedback_drops(change, reason):
    """Would catch: a row of another kind made into a pair."""
    if reason:
        record, why = ultrafeedback.convert(dict(BINARIZED, **change))
        assert record is None and reason in why
    else:
        with pytest.raises(UserError, match="row 7"):
            ultrafeedback.convert(dict(BINARIZED, **change), "row 7")


TLDR = dict(info=dict(id="t3_1", post="My cat plays.\n", title="Cat", subreddit="pets"),
            summaries=[dict(text=" A piano.", policy="a", note=None), dict(text=" A cat plays.")],
            choice=1, split="train", worker="w", batch="batch3", extra={})
TLDR_PAIR = dict(prompt="SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat plays.\n\nTL;DR:",
                 chosen="A cat plays.", rejected="A piano.", held_out=False)


def test_tldr(tmp_path):
    """Would catch: the choice turned round, validation posts among those to train on."""
    dog = dict(TLDR["info"], post="My dog sings.")
    (tmp_path / "batch3.json").write_bytes(lines([TLDR, dict(TLDR, info=dog),
                                                  dict(TLDR, choice=0)]))
    (tmp_path / "batch9.json").write_bytes(lines([dict(TLDR, info=dog, split="valid2")]))
    (tmp_path / "batch0_cnndm.json").write_bytes(lines([
        dict(TLDR, info=dict(id="x", title="y", article="z", site="s"))]))
    records, done = adapt(tldr, tmp_path, "--source=.")
    assert records == [TLDR_PAIR, dict(TLDR_PAIR, chosen="A piano.", rejected="A cat plays."),
                       dict(TLDR_PAIR, prompt=TLDR_PAIR["prompt"].replace("cat plays", "dog sings"),
                            held_out=True)]
    assert "5 rows read, 3 written" in done.stdout and "1 without a post" in done.stdout
    assert "1 of the training part whose post is tested" in done.stdout
    assert "--source=DIR is missing: `curl" in adapt(tldr, tmp_path, "--overwrite=true")


@pytest.mark.parametrize("change, reason", [
    (dict(info=dict(TLDR["info"], post="")), "without a post"),
    (dict(summaries=[dict(text="a"), dict(text="")]), "empty summary"),
    (dict(summaries=[dict(text="a"), dict(text="a ")]), "same summary"),
    (dict(choice=2), None), (dict(choice=True), None), (dict(choice=None), None),
    (dict(split="test"), None), (dict(summaries=[dict(text="a")] * 3), None), (dict(info=3), None),
    (dict(summaries=[dict(text="a"), dict()]), None)])
def test_tldr_drops(change, reason):
    """Would catch: a comparison of another kind made into a pair."""
    if reason:
        record, why = tldr.convert(dict(TLDR, **change))
        assert record is None and reason in why
    else:
        with pytest.raises(UserError, match="row 7"):
            tldr.convert(dict(TLDR, **change), "row 7")
