"""Slips that nobody chose: random small edits of the source, and how many of them the tests notice.

    python tests/mutate.py --sample=300 --seed=1                # the tests against 300 mutants
    python tests/mutate.py --sample=30 --files=ppo.py --list    # only print them
    python tests/mutate.py --measure                            # only make the map: line to tests

Changed are the stages, trace.py, and what they import. A place is a node of a syntax tree to
which an operator (`Source.edits`) applies; the sample is uniform over places. For each mutant
those tests run that execute the changed line: whole runs (test_naive.py) first, then the shortest
first, as many as fit into --budget seconds. Which they are comes from one run of all tests under
coverage, which is made where --map does not exist yet or is older than the source; the ordinary
run of the tests makes it too, when it is started like this:

    PYTHONPATH=$PWD/tests COVERAGE_FILE=$PWD/out/coverage.sqlite \\
    PYTEST_ADDOPTS="-p mutate --cov=. --cov-context=test --cov-report=" python -m pytest

Prints a line for each mutant, a table by file, the survivors, and last `killed K/N`; exit status 1
when the share of the killed is below --at_least. On 2 cores the map takes 7 minutes, the tests
without a mutant up to 4, and a mutant 20 seconds; two run at a time. What a stage does as a process
of its own is not seen by the map: for lines that run nowhere else the tests count that start the
script. A survivor is a missing test, or code without effect, or no bug because the edit changes
nothing that anyone could see: such edits go to EQUIVALENT, with the reason.
"""

import argparse
import ast
import collections
import itertools
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import mutants
from mutants import ROOT

STAGES = ("pretrain", "sft", "label", "reward", "ppo", "dpo", "grpo", "evaluate", "trace")
FIRST = "tests/test_naive.py::test_script_and_twin_agree"  # whole runs, every number compared
# they look at the source itself
TEXT_TESTS = ("tests/test_mutants.py", "tests/test_mutate.py", "tests/test_docs.py")

# (file, old, new, reason), old and new as printed: mutants that no test could tell
FLOAT, MEMORY = "the log writes a tensor of one number as the number", "memory only"
EQUIVALENT = [
    ("data/synthetic/facts.py",
     'table = {k: {c[0]: c[i].replace("-", " ") for c in COUNTRIES} for k, i in countries.items()}',
     "table = {k: {c[0]: c[i] for c in COUNTRIES} for k, i in countries.items()}",
     "no name in the table has a hyphen"),
    ("ppo.py", 'info["value_loss"] = v_loss.detach()', 'info["value_loss"] = v_loss', MEMORY),
    ("ppo.py", 'info["policy_loss"] = loss.detach()', 'info["policy_loss"] = loss', MEMORY),
    ("ppo.py", "explained_variance=(1 - error / spread.clamp(min=1e-8)).item())",
     "explained_variance=1 - error / spread.clamp(min=1e-8))", FLOAT),
    ("evaluate.py", "row = dict(objective=score.mean().item(), kl=None, kl_se=None, "
     "kl_per_token=None)", "row = dict(objective=score.mean(), kl=None, kl_se=None, "
     "kl_per_token=None)", FLOAT),
    ("reward.py", "sums += torch.stack([loss, right.sum()]).detach()",
     "sums += torch.stack([loss, right.sum()])", MEMORY),
    ("reward.py", "/ member.scale.item()))", "/ member.scale))", FLOAT),
    ("model.py", "if len(active) == 0:", "if len(active) == -1:",
     "time only: an empty batch goes on"),
    ("model.py", "def generate(model, prompts, max_new_tokens, eos, temperature=1.0, "
     "uniforms=None, check_every=8,", "def generate(model, prompts, max_new_tokens, eos, "
     "temperature=1.0, uniforms=None, check_every=9,", "read on a GPU only"),
    *(("model.py", "if len(active) <= len(rows) // 2:", new,
        "time only: a row that has ended is padded")
      for new in ("if len(active) < len(rows) // 2:", "if len(active) > len(rows) // 2:",
                  "if len(active) <= len(rows) // 3:", "if len(active) <= len(rows) // 1:",
                  "if len(active) <= len(rows) / 2:")),
    ("model.py", "for i in range(0, max(N, 1), size):", "for i in range(0, max(N, 2), size):",
     "one more chunk, of nothing, where there is one row"),
    ("data/batches.py",
     "for i, row, m, finished in zip(rows, tokens.tolist(), mask.bool().tolist(), done.tolist()):",
     "for i, row, m, finished in zip(rows, tokens, mask.bool().tolist(), "
     "done.tolist()):", "ids as tensors of one number: the same ids, slower"),
    ("data/batches.py",
     "for i, row, m, finished in zip(rows, tokens.tolist(), mask.bool().tolist(), done.tolist()):",
     "for i, row, m, finished in zip(rows, tokens.tolist(), mask.bool(), "
     "done.tolist()):", "true and false as tensors of one number"),
    ("common.py", "return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))",
     "return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(2, steps - warmup)))",
     "only in a run of a single step, where the numerator is 0"),
    ("grpo.py", "optimizer.zero_grad(set_to_none=True)", "optimizer.zero_grad(set_to_none=False)",
     "every weight has a gradient in every step"),
    ("grpo.py", "step += torch.stack([(weight * x).sum().detach() for x in (loss, kl)])",
     "step += torch.stack([(weight * x).sum() for x in (loss, kl)])", MEMORY),
    ("grpo.py", "if check and not steps:", "if check:", "it is set to False behind the first one"),
    ("data/synthetic/people.py", "def demonstrations(prompts, seed, quality=0.5):",
     "def demonstrations(prompts, seed, quality=-0.5):", "no stage leaves it out"),
]

# --- what can be changed -------------------------------------------------------------------------

# an operator's symbol, and what it becomes
SWAPS = dict(Add="+ -", Sub="- +", Mult="* /", Div="/ *", FloorDiv="// /", Mod="% //", Pow="** *",
             BitOr="| &", BitAnd="& |", And="and or", Or="or and", Lt="< <= >", LtE="<= < >=",
             Gt="> >= <", GtE=">= > <=", Eq="== !=", NotEq="!= ==", In="in not_in",
             NotIn="not_in in", Is="is is_not", IsNot="is_not is")
OPERATIONS = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp, ast.Lambda, ast.NamedExpr)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.Lambda)
AXES = {"sum", "mean", "std", "var", "cumsum", "argmax", "argmin", "amax", "amin", "max", "min",
        "any", "all", "softmax", "log_softmax", "unsqueeze", "squeeze", "flip", "size", "cat",
        "stack", "argsort", "sort", "logsumexp"}  # f(..., axis)
# f(x) that is nothing like x: dropping the call is no slip, it only crashes
MAKERS = {"len", "range", "isinstance", "type", "open", "next", "iter", "zip", "enumerate", "id",
          "super", "cat", "stack", "tensor", "zeros", "ones", "arange", "empty", "device", "load",
          "from_numpy", "default_rng", "Path", "getattr", "map", "autocast"}
# whose arguments may change places
SYMMETRIC = {"min", "max", "minimum", "maximum", "isinstance", "transpose", "logaddexp"}
MOVES = {"to", "cpu", "cuda"}  # nothing, on a CPU
MESSAGES = re.compile(r"(print|_fail|warnings\.warn|sys\.exit)\(")
TIMING = re.compile(r"[^,\n]*time\.(perf_counter|time)\(\).*")  # nothing else in it
SPEED = re.compile(r"\b(clock|\w*_per_s)\b")


class Scope(NamedTuple):
    """What an edit has to know of the function around it."""
    names: dict  # of parameters and variables: the line on which they get a value, 0 a parameter
    uses: dict  # {name, name.attribute or "string": the ways in which it is used}
    returns: int
    name: str


def children(node):
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield field, child


def is_text(node):
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


class Source:
    """A file and its places: [(node, {operator: [(start, end, new text)]})], offsets in bytes."""

    def __init__(self, file, text):
        self.file, self.data, self.tree = file, text.encode(), ast.parse(text)
        self.dump = ast.dump(self.tree)
        self.starts = [0, *itertools.accumulate(map(len, self.data.splitlines(keepends=True)))]
        self.up = {id(child): (node, field) for node in ast.walk(self.tree)
                   for field, child in children(node)}
        self.imported = {(a.asname or a.name).split(".")[0] for node in ast.walk(self.tree)
                         if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
        self.places, self.left_out, self.outside = [], collections.Counter(), {}
        for _, node in children(self.tree):
            self.visit(node, None, None)

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)

    def code(self, node, at=None):
        """Its text; where it is to stand at the place of another node, in brackets if need be."""
        start, end = self.span(node)
        text = self.data[start:end].decode()
        if at and isinstance(node, OPERATIONS) and ("\n" in text or isinstance(
                self.up[id(at)][0], (*OPERATIONS, ast.Attribute, ast.Subscript, ast.Call))):
            return f"({text})"
        return text

    def enclosing(self, node, *kinds):
        """The first of these kinds from the node upwards; the module if there is none."""
        while not isinstance(node, (*kinds, ast.Module)):
            node = self.up[id(node)][0]
        return node

    def lines(self, node):
        """The lines whose tests run: those of the statement, of a compound one its head; for a head
        of a function those of the function; for what runs on import all of the class or file."""
        statement = self.enclosing(node, ast.stmt)
        if not isinstance(statement, ast.FunctionDef):
            above = self.up[id(statement)][0]
            if isinstance(self.enclosing(above, ast.FunctionDef), ast.FunctionDef):
                body = getattr(statement, "body", None)
                end = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
                return range(statement.lineno, end + 1)
            statement = self.enclosing(above, ast.ClassDef)
        if isinstance(statement, ast.Module):
            return range(1, len(self.starts))
        return range(statement.lineno, statement.end_lineno + 1)

    def visit(self, node, scope, reason):
        scope = self.outside.pop(id(node), scope)
        reason = reason or self.reason(node)
        found = collections.defaultdict(list)
        for operator, text, *span in self.edits(node, scope):
            found[operator].append((*(span or self.span(node)), text))
        if found and reason:
            self.left_out[reason] += 1
        elif found:
            self.places.append((node, found))
        if isinstance(node, FUNCTIONS):
            scope = self.inside(node, scope)
        elif isinstance(node, COMPREHENSIONS) and scope:
            self.outside[id(node.generators[0].iter)] = scope  # runs before the variables exist
            scope = scope._replace(names=scope.names | {
                n.id: 0 for g in node.generators for n in ast.walk(g.target)
                if isinstance(n, ast.Name)})
        for field, child in children(node):
            if field not in ("annotation", "returns", "decorator_list"):
                self.visit(child, scope, reason)

    def inside(self, function, outer):
        names, body = dict(outer.names) if outer else {}, list(ast.walk(function))[1:]
        for node in body:
            if isinstance(node, ast.arg) and self.up[id(node)][0] is function.args:
                names[node.arg] = 0
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and \
                    self.enclosing(node, *FUNCTIONS, *COMPREHENSIONS) is function:
                statement = self.enclosing(node, ast.stmt)
                simple = isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign))
                line = statement.end_lineno if simple else node.end_lineno
                names[node.id] = min(line, names.get(node.id, line))
        if outer:
            return outer._replace(names=names)
        uses = collections.defaultdict(set)
        for node in body:
            for use in self.uses(node):
                uses[self.word(node)].add(use)
        returns = sum(isinstance(n, ast.Return) for n in body)
        return Scope(names, uses, returns, getattr(function, "name", "lambda"))

    def word(self, node):
        return json.dumps(node.value) if isinstance(node, ast.Constant) else self.code(node)

    def uses(self, node):
        """The ways in which a name, an attribute of a name or a string is used here; [] for other
        nodes. Only a word with the same use takes the place of one whose use begins with a sign."""
        parent, field = self.up[id(node)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if isinstance(parent, ast.Subscript) or getattr(getattr(parent, "func", None), "attr",
                                                            "") in ("get", "pop"):
                return ["[key]"]
            while isinstance(parent, (ast.Tuple, ast.List, ast.Set)):
                parent = self.up[id(parent)][0]
            return ["[choice]"] * isinstance(parent, ast.Compare)
        name = node.value if isinstance(node, ast.Attribute) else node
        if not isinstance(name, ast.Name) or not isinstance(node.ctx, ast.Load):
            return []
        match parent:
            case ast.Attribute():
                return ["." + parent.attr]
            case ast.Subscript() if field == "value":
                return ["[]"]
            case ast.keyword():
                return [parent.arg or "**", "argument"]
            case ast.Call() if field == "func":
                return ["()"] * isinstance(node, ast.Name)
            case ast.Call():
                return ["argument", f"{self.code(parent.func)} {parent.args.index(node)}"]
        return [type(parent).__name__]

    def reason(self, node):
        """Why nothing in here is changed, if so."""
        parent, field = self.up[id(node)]
        if isinstance(node, ast.JoinedStr):
            return "in an f-string: no exact positions before Python 3.12"
        text = self.code(node) if isinstance(node, (ast.expr, ast.stmt, ast.keyword)) else ""
        if isinstance(node, ast.Raise) or field == "msg" or text.startswith("print(") or \
                isinstance(node, ast.Call) and MESSAGES.match(text):
            return "a message"
        if isinstance(node, ast.If) and "__name__" in self.code(node.test):
            return "the entry of a script"
        if isinstance(node, ast.AnnAssign) and getattr(parent, "name", "").endswith("Config"):
            return "a default of a Config"
        if isinstance(node, ast.Expr) and ".set_postfix(" in text or isinstance(parent, ast.Call) \
                and self.code(parent.func) == "tqdm" and node is not parent.args[0]:
            return "the look of a progress bar"
        if isinstance(parent, (ast.If, ast.IfExp)) and field == "body" and \
                "cuda" in self.code(parent.test):
            return "runs on a GPU only"
        if isinstance(node, (ast.Expr, ast.Assign, ast.BinOp)) and TIMING.fullmatch(text) or \
                isinstance(node, ast.keyword) and SPEED.search(text):
            return "timing"
        return None

    # --- the operators: (name, new text of the node), or (name, new text, start, end) -------------

    def edits(self, node, scope):
        parent, field = self.up[id(node)]
        if (field == "ifs" or field == "test" and isinstance(parent, (ast.If, ast.IfExp))) and \
                not isinstance(node, ast.UnaryOp):
            text = self.code(node)
            yield "negate", f"not ({text})" if isinstance(node, OPERATIONS) else f"not {text}"
        match node:
            case ast.Name() | ast.Attribute() | ast.Constant(value=str()):
                yield from self.other_words(node, scope)
            case ast.Constant(value=bool(value)):
                yield "constant", str(not value)
            case ast.Constant(value=int(value)) if self.is_axis(node):
                yield "axis", "1" if value == 0 else "0"
            case ast.Constant(value=int(value) | float(value)):
                near = (value + 1, value - 1) if type(value) is int else (2 * value, value / 2, 0.0)
                yield from (("constant", repr(n)) for n in near if n != value)
                if value and not isinstance(parent, ast.UnaryOp):
                    yield "sign", f"-{self.code(node)}"
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()) if self.is_axis(node):
                yield "axis", "0"
            case ast.UnaryOp():
                name = "sign" if isinstance(node.op, ast.USub) else "drop not"
                yield name, self.code(node.operand, node)
            case ast.BinOp(left=left, right=right) if not (is_text(left) or is_text(right)):
                yield from self.operators(node.op, left, right)
                yield "drop operand", self.code(left, node)
                if isinstance(node.op, (ast.Add, ast.Mult, ast.BitOr, ast.BitAnd)):
                    yield "drop operand", self.code(right, node)
            case ast.BoolOp():
                for left, right in itertools.pairwise(node.values):
                    yield from self.operators(node.op, left, right)
                    yield "drop operand", "", self.span(left)[0], self.span(right)[0]
                yield "drop operand", "", self.span(left)[1], self.span(right)[1]
            case ast.Compare(comparators=others):
                for operator, left, right in zip(node.ops, [node.left, *others], others):
                    yield from self.operators(operator, left, right)
            case ast.Call():
                yield from self.calls(node, parent)
            case ast.List(ctx=ast.Load()) | ast.Tuple(ctx=ast.Load()) | ast.Set():
                unpacked = isinstance(parent, (ast.Subscript, ast.Return)) or \
                    isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
                for element in node.elts if len(node.elts) >= 3 and not unpacked else ():
                    yield "drop element", *self.without(*self.span(element))
            case ast.Dict(keys=[_, _, _, *_]) if None not in node.keys:
                for key, value in zip(node.keys, node.values):
                    yield "drop element", *self.without(self.span(key)[0], self.span(value)[1])
            case ast.Slice():
                yield from (("slice", text) for text in self.slices(node))
            case ast.AugAssign():
                yield "skip statement", "pass"
                yield from self.operators(node.op, node.target, node.value)
                yield "operator", " = ", self.span(node.target)[1], self.span(node.value)[0]
            case ast.Expr() if not isinstance(node.value, ast.Constant):
                yield "skip statement", "pass"
            case ast.Assign() if scope:  # of what has a value without it
                targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
                if not any(isinstance(t, ast.Name) and scope.names.get(t.id, 0) >= node.lineno or
                           isinstance(t, ast.Attribute) and scope.name == "__init__"
                           for t in targets):
                    yield "skip statement", "pass"
            case ast.Return(value=ast.expr()) if scope.returns > 1:  # else every caller crashes
                yield "return None", "return None"

    def operators(self, operation, left, right):
        old, *new = SWAPS.get(type(operation).__name__, "@").split()
        old, *new = (text.replace("_", " ") for text in (old, *new))
        at = self.data.find(old.encode(), self.span(left)[1], self.span(right)[0])
        if at >= 0:
            yield from (("operator", text, at, at + len(old)) for text in new)

    def without(self, start, end):
        """The edit that cuts out an element between brackets, with one of the commas beside it."""
        before = re.search(rb",\s*$", self.data[:start])
        if before:
            return "", before.start(), end
        behind = re.match(rb"\s*,\s*", self.data[end:])
        return "", start, end + (behind.end() if behind else 0)

    def is_axis(self, node):
        parent, field = self.up[id(node)]
        if isinstance(parent, ast.keyword):
            return parent.arg in ("dim", "axis")
        return field == "args" and isinstance(parent, ast.Call) and node is parent.args[-1] and \
            getattr(parent.func, "attr", "") in AXES

    def other_words(self, node, scope):
        """The three words of the function that are used most like this one."""
        kind = lambda word: '"' if word[0] == '"' else word.rpartition(".")[0]
        here, word = self.uses(node), self.word(node) if self.uses(node) else "self"
        if not scope or word == "self" or word.isidentifier() and word not in scope.names:
            return
        found = []
        for other, uses in scope.uses.items():
            seen = not other.isidentifier() or scope.names.get(other, 1e9) < node.lineno
            if other not in (word, "self") and kind(other) == kind(word) and seen and \
                    all(u in uses for u in here if not u[0].isalpha()):
                mine = scope.uses[word]
                found.append((-len(mine & uses) / len(mine | uses), other))
        yield from (("name", other) for _, other in sorted(found)[:3])

    def calls(self, node, parent):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "tqdm":
            return
        values = [a for a in node.args if not isinstance(a, ast.Starred)]
        named = [k for k in node.keywords if k.arg]
        pairs = *itertools.pairwise(values), *itertools.pairwise(k.value for k in named)
        for a, b in pairs if name not in SYMMETRIC else ():
            (start, end), (start2, end2) = self.span(a), self.span(b)
            between = self.data[end:start2].decode()
            yield "swap arguments", self.code(b) + between + self.code(a), start, end2
        for k in named:
            if k.arg != "device":  # without one, or on the CPU: the same here
                yield "drop keyword", *self.without(*self.span(k))
        if isinstance(parent, ast.Expr):
            return
        root = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        of_a_value = getattr(root, "id", "") not in self.imported | {"self"}  # no module's function
        if isinstance(node.func, ast.Attribute) and of_a_value:
            if not is_text(node.func.value) and name not in MOVES:  # ", ".join
                yield "drop call", self.code(node.func.value, node)
        elif len(node.args) == len(values) == 1 and name not in MAKERS and not name[:1].isupper():
            yield "drop call", self.code(node.args[0], node)

    def slices(self, node):
        lower, upper = (self.code(b) if b else "" for b in (node.lower, node.upper))
        step = f":{self.code(node.step)}" if node.step else ""
        yield from [f":{upper}{step}"] * bool(lower) + [f"{lower}:{step}"] * bool(upper)
        if (lower, upper) in (("1", ""), ("", "-1")):
            yield ":-1" if lower else "1:"
        for by in (" + 1", " - 1"):  # numbers are changed as such
            if lower and not re.fullmatch(r"-?\d+", lower):
                yield f"{lower}{by}:{upper}{step}"
            if upper and not re.fullmatch(r"-?\d+", upper):
                yield f"{lower}:{upper}{by}{step}"


class Mutant(NamedTuple):
    file: str
    line: int  # the first and the last one of the edit
    last: int
    operator: str
    old: str  # the changed lines as one, white space as single spaces
    new: str
    source: str  # the whole file
    lines: range  # whose tests run


def mutant(source, node, operator, edit):
    """The Mutant, or None where the edit does not compile or changes nothing."""
    start, end, text = edit
    data, text = source.data, text.encode()
    changed = (data[:start] + text + data[end:]).decode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # 1() and the like
            compile(changed, source.file, "exec")
        if ast.dump(ast.parse(changed)) == source.dump:
            return None
    except (SyntaxError, ValueError):
        return None
    first, last = data.rfind(b"\n", 0, start) + 1, (data + b"\n").find(b"\n", end)
    one_line = lambda b: " ".join(b.decode().split())
    return Mutant(source.file, data.count(b"\n", 0, start) + 1, data.count(b"\n", 0, end) + 1,
                  operator, one_line(data[first:last]),
                  one_line(data[first:start] + text + data[end:last]), changed, source.lines(node))


def sample(sources, n, seed):
    """n distinct mutants: a place, an operator there, then one of its edits. Fewer if there are no
    more."""
    rng, found = random.Random(seed), {}
    places = [(source, node, {k: list(v) for k, v in edits.items()})
              for source in sources for node, edits in source.places]
    while len(found) < n and places:
        i = rng.randrange(len(places))
        source, node, edits = places[i]
        operator = rng.choice(sorted(edits))
        edit = edits[operator].pop(rng.randrange(len(edits[operator])))
        if not edits[operator]:
            del edits[operator]
        if not edits:
            del places[i]
        made = mutant(source, node, operator, edit)
        if made:
            found.setdefault((made.file, made.source), made)
    return list(found.values())


def files_of_the_stages(root=ROOT):
    """The stages and all files of the repository that they import, directly or not."""
    found, todo = [], [f"{stage}.py" for stage in STAGES]
    while todo:
        file = todo.pop(0)
        if file in found or not (root / file).is_file():
            continue
        found.append(file)
        for node in ast.walk(ast.parse((root / file).read_text())):
            if isinstance(node, ast.Import):
                todo += [a.name.replace(".", "/") + ".py" for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                base = node.module.replace(".", "/")
                todo += [base + ".py", *(f"{base}/{a.name}.py" for a in node.names)]
    return found


# --- which tests run a line: this file as a plugin of pytest writes what coverage does not know --

# shared: tests with a fixture that others use too; scripts: those that tests run as processes
SEEN = dict(seconds={}, shared=[], failed=[], scripts={})


def pytest_configure():
    Path(os.environ["COVERAGE_FILE"]).parent.mkdir(parents=True, exist_ok=True)

    def started(event, arguments):
        if event == "subprocess.Popen":
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
            for argument in map(str, arguments[1]):
                if test and argument.endswith(".py"):
                    SEEN["scripts"].setdefault(Path(argument).name, []).append(test)

    sys.addaudithook(started)


def pytest_runtest_setup(item):
    # what a cached function runs would be seen in the first test that calls it, and in no other
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None)).startswith(str(ROOT)):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    if any(f[-1].scope == "module" for f in item._fixtureinfo.name2fixturedefs.values()):
        SEEN["shared"].append(item.nodeid)


def pytest_runtest_logreport(report):
    SEEN["seconds"].setdefault(report.nodeid, {})[report.when] = report.duration
    if report.failed:
        SEEN["failed"].append(report.nodeid)


def pytest_sessionfinish():
    Path(os.environ["COVERAGE_FILE"] + ".json").write_text(json.dumps(SEEN))


def measure(path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT / "tests"), COVERAGE_FILE=str(path))
    subprocess.run([sys.executable, "-m", "pytest", "-p", "mutate", "--cov=.", "--cov-report=",
                    "--cov-context=test", *(f"--ignore={t}" for t in TEXT_TESTS)],
                   cwd=ROOT, env=environment)


class Map:
    """The tests that run a line, and how long they take."""

    def __init__(self, path, files):
        from coverage import CoverageData
        seen = json.loads(Path(f"{path}.json").read_text())
        if seen["failed"]:
            sys.exit(f"{path} is of a run with failed tests: {', '.join(seen['failed'][:5])}")
        self.seconds = {t: sum(phases.values()) for t, phases in seen["seconds"].items()}
        self.shared, self.setup = collections.defaultdict(set), collections.Counter()  # by file
        for test in seen["shared"]:
            file, setup = test.split("::")[0], seen["seconds"][test]["setup"]
            self.shared[file].add(test)
            self.setup[file] = max(self.setup[file], setup)  # that of the test which came first
            self.seconds[test] -= setup
        self.scripts = {file: {other for test in tests for other in self.with_its_fixture(test)}
                        for file, tests in seen["scripts"].items()}
        data, self.tests, self.fixtures, self.imports = CoverageData(str(path)), {}, {}, {}
        data.read()
        for file in files:
            self.tests[file], self.fixtures[file], self.imports[file] = \
                lines, fixtures, on_import = {}, {}, set()
            measured = [f for f in data.measured_files() if f.endswith(f"/{file}")]
            measured = data.contexts_by_lineno(min(measured, key=len, default=""))
            for line, contexts in measured.items():
                for test, _, phase in (c.rpartition("|") for c in contexts):
                    if test and phase == "setup":
                        fixtures.setdefault(line, set()).update(self.with_its_fixture(test))
                    elif test:
                        lines.setdefault(line, set()).add(test)
                    else:
                        on_import.add(line)

    def with_its_fixture(self, test):
        others = self.shared[test.split("::")[0]]
        return others if test in others else {test}

    def of(self, file, lines):
        """The tests that run one of the lines. Where none does: those whose fixture does; all of
        the file if a line runs on import; else those that run the file as a process of its own."""
        tests = set().union(*(self.tests[file].get(n, ()) for n in lines))
        tests = tests or set().union(*(self.fixtures[file].get(n, ()) for n in lines))
        if not tests and self.imports[file] & {*lines}:
            tests = set().union(*self.tests[file].values())
        if not tests:
            tests = self.scripts.get(file) or set().union(*self.scripts.values())
        return tests

    def plan(self, mutant, budget):
        """(the tests to run, in order; their seconds), within the budget: the whole runs of the
        stage that was changed, other whole runs for half of the budget, then the shortest first.
        Tests that share a fixture stay together, or it would be made again and again."""
        groups, own = collections.defaultdict(list), f"{FIRST}[{mutant.file[:-3]}-"
        for test in self.of(mutant.file, mutant.lines):
            if not test.startswith(TEXT_TESTS):
                file, cost = test.split("::")[0], (self.seconds[test], test)
                group = file if test in self.shared[file] else test
                groups[FIRST if test.startswith(FIRST) else group].append(cost)
        self.setup[FIRST] = self.setup[FIRST.split("::")[0]]
        start = lambda g: (g != FIRST, self.setup[g] + min(groups[g])[0], g)
        chosen, total = [], 0.0
        for group in sorted(groups, key=start):
            setup = self.setup[group]
            for seconds, test in sorted(groups[group], key=lambda t: (not t[1].startswith(own), t)):
                limit = budget / 2 if test.startswith(FIRST) else budget
                if not chosen or total + setup + seconds <= limit:
                    chosen, total, setup = [*chosen, test], total + setup + seconds, 0.0
        return chosen, total


# --- running them --------------------------------------------------------------------------------

def run_group(folder, tests, output):
    """mutants.run_pytest, in a process group of its own: an edit may start what never ends."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    for name in ("PYTEST_ADDOPTS", "COVERAGE_FILE"):  # would write over the map
        os.environ.pop(name, None)
    mutants.run_pytest(folder, tests, output)


def run(folder, tests, seconds):
    """Exit status and output of pytest in folder; status None if not done after these seconds."""
    output = folder / "output.txt"
    process = mutants.FORKS.Process(target=run_group, args=(
        folder, [t.removeprefix("tests/") for t in tests], output))
    with mutants.STATUS:
        process.start()
    done = wait([process.sentinel], seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with mutants.STATUS:
        status = process.exitcode if done else None
    shutil.rmtree(folder / ".hypothesis", ignore_errors=True)  # no memory of the mutant before
    return status, output.read_text(errors="replace")


def verdict(mutant, folder, tests, seconds):
    """("killed", "crash", "timeout", "SURVIVED" or "ERROR", the test that failed or the output).

    killed: by what a test asserts; crash: by any other exception.
    """
    if not tests:
        return "SURVIVED", "no test runs this line"
    path = folder / mutant.file
    before = path.read_text()
    mutants.put(path, mutant.source)
    try:
        status, output = run(folder, tests, seconds)
    finally:
        mutants.put(path, before)
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", output, re.MULTILINE)
    test = failed[1] if failed else ""
    if status is None:
        return "timeout", ""
    if status == 0:
        return "SURVIVED", f"{len(tests)} tests"
    if status == 1 and re.search(r"^E +(assert\b|AssertionError|Failed\b)", output, re.MULTILINE):
        return "killed", test
    if status in (1, 2, 4) or status < 0:  # 2 and 4: not even collected
        return "crash", test or "not even collected"
    return "ERROR", f"pytest exits with {status}\n{output[-3000:]}"


def one_by_one(chosen, line_map, budget):
    """[(verdict, Mutant)], printed as they come."""
    plans = {m: line_map.plan(m, budget) for m in chosen}
    os.environ |= dict(OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as scratch, \
            ThreadPoolExecutor(mutants.PROCESSES) as pool:
        copies = queue.Queue()
        for i in range(mutants.PROCESSES):
            copies.put(Path(scratch, str(i)))
            shutil.copytree(ROOT, Path(scratch, str(i)),
                            ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))

        def fault(tests):
            if tests:
                folder = copies.get()
                status, output = run(folder, tests, 3 * sum(map(line_map.seconds.get, tests)) + 300)
                copies.put(folder)
                return status != 0 and f"pytest exits with {status}\n{output[-5000:]}"

        def judge(mutant):
            folder, start = copies.get(), time.time()
            tests, seconds = plans[mutant]
            result, why = verdict(mutant, folder, tests, 3 * seconds + 60)
            copies.put(folder)
            print(f"{result:8s} {mutant.file}:{mutant.line}: {mutant.operator}: {mutant.old} -> "
                  f"{mutant.new}  {time.time() - start:.1f} s  {why}", flush=True)
            return result, mutant

        # the copy as it is has to pass, or a failure below would say nothing
        tests = sorted(set().union(*(plan for plan, _ in plans.values())))
        files = sorted({t.split("::")[0] for t in tests})
        halves = [[t for t in tests if t.split("::")[0] in files[i::2]] for i in range(2)]
        for why in filter(None, pool.map(fault, halves)):
            sys.exit(f"the tests fail without any mutant: {why}")
        return list(pool.map(judge, chosen))


def report(results, equivalent, at_least):
    kinds = ("killed", "crash", "timeout", "SURVIVED", "ERROR")
    count = lambda rows: [sum(r == k for r, _ in rows) for k in kinds]
    rate = lambda c: f"{sum(c[:3]) / max(1, sum(c)):.0%}"
    print(f"\n{'file':28s} mutants   killed    crash  timeout survived    error  rate")
    for file in [*sorted({m.file for _, m in results}), "all"]:
        c = count([r for r in results if file in (r[1].file, "all")])
        print(f"{file:28s} {sum(c):7d} " + " ".join(f"{n:8d}" for n in c) + f"  {rate(c)}")
    for _, m in filter(lambda r: r[0] == "SURVIVED", results):
        lines = (ROOT / m.file).read_text().splitlines()
        print(f"\n{m.file}:{m.line}: {m.operator}")
        print("\n".join(f"  {line}" for line in lines[max(0, m.line - 3):m.line - 1]))
        print(f"- {m.old}\n+ {m.new}")
        print("\n".join(f"  {line}" for line in lines[m.last:m.last + 2]))
    found, *crashes, survived, _ = count(results)
    killed, n = found + sum(crashes), len(results)
    print(f"\n{equivalent} equivalent ones left out" * bool(equivalent))
    print(f"crashes and timeouts aside, {found}/{found + survived} by what a test asserts")
    print(f"killed {killed}/{n}")
    return int(killed < at_least * n or any(r == "ERROR" for r, _ in results))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", default="", help="only these, separated by commas")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for one mutant")
    parser.add_argument("--at_least", type=float, default=0.9)
    parser.add_argument("--map", type=Path, default=ROOT / "out" / "coverage.sqlite")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--list", action="store_true")
    flags = parser.parse_args(argv)
    files = files_of_the_stages()
    unknown = set(flags.files.split(",")) - {"", *files}
    if unknown:
        sys.exit(f"no stage imports {', '.join(sorted(unknown))}")
    measured, changed = Path(f"{flags.map}.json"), max((ROOT / f).stat().st_mtime for f in files)
    fresh = measured.exists() and measured.stat().st_mtime > changed
    if flags.measure or not (flags.list or fresh):
        measure(flags.map)
        if flags.measure:
            return 0
    sources = [Source(f, (ROOT / f).read_text()) for f in files
               if not flags.files or f in flags.files.split(",")]
    print(f"{sum(len(s.places) for s in sources)} places in {len(sources)} files; left out:")
    for reason, n in sum((s.left_out for s in sources), collections.Counter()).most_common():
        print(f"  {n:5d}  {reason}")
    chosen = sample(sources, flags.sample, flags.seed)
    same = {e[:3] for e in EQUIVALENT}
    kept = [m for m in chosen if (m.file, m.old, m.new) not in same]
    if flags.list:
        for m in kept:
            print(f"{m.file}:{m.line}: {m.operator}: {m.old} -> {m.new}")
        return 0
    results = one_by_one(kept, Map(flags.map, files), flags.budget)
    return report(results, len(chosen) - len(kept), flags.at_least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
