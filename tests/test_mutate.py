"""tests/mutate.py makes the edits that it says, in places where they mean something."""

from collections import Counter, defaultdict

import mutate
import pytest
from conftest import ROOT

SOURCE = '''"""A docstring with 1 + 2."""
import torch
SIZES = [8, 9, 10]  # ünï


class Config:
    lr: float = 0.5


def f(x, y, mode="a", k: int = 3):
    """Not 1 either."""
    é, z = x[:, 1:], x - y
    if mode == "a" and not k:
        z = g(x, y, scale=2, shift=k).abs()
    elif mode == "b":
        raise ValueError(f"{k + 1} is bad")
    print("z", k + 2)
    z += torch.exp(z.sum(-1)) * 0.5
    h(z)
    return [v for v in z if v > 0] or sorted(é)


if __name__ == "__main__":
    print(f(1, 2))
'''


@pytest.fixture(scope="module")
def edits():
    """{(operator, new line)} of all mutants of SOURCE."""
    source = mutate.Source("f.py", SOURCE)
    return {(m.operator, m.new) for m in mutate.sample([source], 10**6, 0)}


@pytest.mark.parametrize("operator, new", [
    ("constant", "SIZES = [8, 9, 11] # ünï"), ("drop element", "SIZES = [8, 10] # ünï"),
    ("constant", 'def f(x, y, mode="a", k: int = 2):'),
    ("slice", "é, z = x[:, :-1], x - y"), ("slice", "é, z = x[:, :], x - y"),
    ("operator", "é, z = x[:, 1:], x + y"), ("drop operand", "é, z = x[:, 1:], x"),
    ("name", "é, z = x[:, 1:], y - y"),
    ("negate", 'if not (mode == "a" and not k):'), ("drop not", 'if mode == "a" and k:'),
    ("operator", 'if mode == "a" or not k:'), ("operator", 'if mode != "a" and not k:'),
    ("drop operand", 'if mode == "a":'), ("drop operand", "if not k:"),
    ("name", 'if mode == "b" and not k:'),
    ("swap arguments", "z = g(y, x, scale=2, shift=k).abs()"),
    ("swap arguments", "z = g(x, y, scale=k, shift=2).abs()"),
    ("drop keyword", "z = g(x, y, shift=k).abs()"), ("drop keyword", "z = g(x, y, scale=2).abs()"),
    ("sign", "z = g(x, y, scale=-2, shift=k).abs()"),
    ("drop call", "z = g(x, y, scale=2, shift=k)"),
    ("skip statement", "pass"), ("operator", "z -= torch.exp(z.sum(-1)) * 0.5"),
    ("operator", "z = torch.exp(z.sum(-1)) * 0.5"), ("drop call", "z += z.sum(-1) * 0.5"),
    ("axis", "z += torch.exp(z.sum(0)) * 0.5"), ("constant", "z += torch.exp(z.sum(-1)) * 0.25"),
    ("operator", "z += torch.exp(z.sum(-1)) / 0.5"), ("drop operand", "z += 0.5"),
    ("operator", "return [v for v in z if v >= 0] or sorted(é)"),
    ("negate", "return [v for v in z if not (v > 0)] or sorted(é)"),
    ("drop call", "return [v for v in z if v > 0] or é")])
def test_each_operator(edits, operator, new):
    # catches an operator that is lost, and columns counted in characters where ast counts bytes
    assert (operator, new) in edits


def test_what_is_left_out():
    # catches mutants that no test should have to tell
    source = mutate.Source("f.py", SOURCE)
    lines = {m.old for m in mutate.sample([source], 10**6, 0)}
    for text in ("docstring", "import", "lr:", "Not 1", "is bad", 'print("z"', "__main__", "f(1"):
        assert not any(text in line for line in lines), text
    assert source.left_out["a message"] >= 2 and source.left_out["a default of a Config"] == 1


def test_the_sample_is_that_of_the_seed():
    # catches an order that depends on hashes, and mutants that are no change or come twice
    sample = lambda seed: mutate.sample([mutate.Source("f.py", SOURCE)], 40, seed)
    assert sample(1) == sample(1) != sample(2)
    assert len({m.source for m in sample(1)} - {SOURCE}) == len(sample(1)) == 40
    for m in sample(1):
        compile(m.source, "f.py", "exec")


def test_the_files_are_those_that_the_stages_import():
    # catches imports that are not followed, and a search that takes in every file
    files = set(mutate.files_of_the_stages())
    assert {"ppo.py", "model.py", "common.py", "data/text.py", "data/synthetic/facts.py"} <= files
    assert not {"data/gsm8k.py", "data/download.py", "studies/frontier.py"} & files


def test_plan_puts_likely_killers_first_within_the_budget():
    # catches tests taken apart that share a fixture, and whole runs that leave no time for others
    made = object.__new__(mutate.Map)
    naive = [f"{mutate.FIRST}[{case}]" for case in ("f-0", "f-1", "a-0", "b-0", "c-0")]
    made.seconds = dict.fromkeys(naive, 2.0) | {"a": 3, "b": 0.1, "s::1": 0.2, "s::2": 4, "c": 9}
    made.shared = defaultdict(set, s={"s::1", "s::2"})
    made.setup = Counter(s=1.0)
    made.tests, made.imports = {"f.py": {7: set(made.seconds)}}, {"f.py": set()}
    made.fixtures = {"f.py": {}}
    mutant = mutate.Mutant("f.py", 7, 7, "", "", "", "", range(7, 8))
    chosen, seconds = made.plan(mutant, 20)
    assert chosen == [*naive, "b", "s::1", "s::2", "a"] and seconds == pytest.approx(18.3)
    assert made.plan(mutant, 6) == ([naive[0], "b", "s::1"], pytest.approx(3.3))


def test_verdicts(tmp_path):
    # catches a mutant that is called killed whatever happens, one that stays in the copy, and a
    # .pyc that is taken for that of another mutant: two of them are of one length, in one second
    (tmp_path / "tests").mkdir()
    text = "def f(x):\n    return x + 1\n"
    (tmp_path / "small.py").write_text(text)
    (tmp_path / "tests" / "test_small.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom small import f\n\n\n"
        "def test_f():\n    assert f(0) == 1\n")
    original = mutate.Mutant("small.py", 2, 2, "", "", "", text, range(2, 3))
    judge = lambda body, seconds=100: mutate.verdict(
        original._replace(source=f"def f(x):\n    {body}\n"), tmp_path,
        ["tests/test_small.py::test_f"], seconds)
    assert judge("return x - 1") == ("killed", "test_small.py::test_f")
    assert judge("return 1 - x") == ("SURVIVED", "1 tests")
    assert judge("return x + None") == ("crash", "test_small.py::test_f")
    assert judge("return y") == ("crash", "test_small.py::test_f")
    assert judge("while True: pass", 1) == ("timeout", "")
    assert (tmp_path / "small.py").read_text() == text


def test_equivalent_edits_still_apply():
    # catches an entry whose line was rewritten: it would be left out of nothing
    for file, old, new, reason in mutate.EQUIVALENT:
        assert old != new and reason
        assert old in " ".join((ROOT / file).read_text().split()), old
