"""The documents say what the code says."""

import ast
import dataclasses
import importlib
import re

import pytest

import cli
import trace
from common import AUTO
from conftest import ROOT

CHOICES = (ROOT / "docs" / "choices.md").read_text()
ROWS = [line for line in CHOICES.splitlines()
        if line.startswith("|") and not line.startswith(("| detail", "|---"))]


def test_every_choice_names_a_line():
    # catches a row without its line, and a table that lost its columns
    assert len(ROWS) >= 30
    for row in ROWS:
        assert row.count(" | ") == 5, row
        assert re.search(r"\| `[\w/]+\.py` · `[^`]+` \|$", row), row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip().replace(" ", "_"))
def test_the_named_line_exists(row):
    # catches a quoted line that was changed or moved to another file
    for name, fragment in re.findall(r"`([\w/]+\.py)` · `([^`]+)`", row):
        assert fragment in (ROOT / name).read_text(), f"{name} has no {fragment!r}"


def test_the_numbers_quoted_as_ours_are_the_defaults():
    # catches a default that was changed in the code only
    from ppo import Config
    config = Config()
    assert (config.gamma, config.lam, config.clip, config.value_clip) == (1.0, 0.95, 0.2, 0.2)
    assert (config.beta, config.missing_eos, config.temperature) == (0.1, -3.0, 1.0)
    assert (config.minibatches, config.epochs) == (2, 2)
    assert AUTO["ppo"]["warmup"][0] == 5
    assert config.whiten and config.kl_in == "reward" and config.kl_target == 0
    assert (config.adam_eps, config.entropy_coef, config.ptx_coef) == (1e-5, 0.0, 0.0)
    assert not config.score_scaling


def test_the_numbers_of_grpo_quoted_as_ours_are_the_defaults():
    # catches a default that was changed in the code only
    from grpo import METHODS, Config
    config = Config()
    assert (config.k, config.minibatches, config.epochs) == (8, 2, 1)
    assert AUTO["grpo"]["warmup"][0] == 5
    assert (config.clip, config.missing_eos, config.ptx_coef) == (0.2, -3.0, 0.0)
    assert config.method == "rloo" and METHODS["rloo"]["beta"] == 0.05
    assert {getattr(config, name) for name in METHODS["rloo"]} == {None}
    assert METHODS["grpo"]["beta"] == 0.04 and METHODS["grpo"]["kl_estimator"] == "k3"
    assert METHODS["dapo"]["clip_high"] == 0.28


def test_the_numbers_of_dpo_quoted_as_ours_are_the_defaults():
    # catches a default that was changed in the code only
    from dpo import Config
    config = Config()
    assert (config.epochs, config.grad_clip, config.label_smoothing) == (1, 1.0, 0.1)
    assert (config.desirable, config.undesirable, config.nll) == (1.0, 1.0, 0.0)


# --- links and commands --------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "data").rglob("*.md"))]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("studies/*.py"), *ROOT.glob("data/*.py")]
COMMAND = re.compile(r"python (-m data\.\w+|[\w/]+\.py)((?: +(?:--[a-z_]+=(?:\"[^\"]*\"|[^\s`\"]+)|"
                     r"[a-z/]+(?![\w./])))*)")


def commands():
    """(page, script, flags) of every command that a page or a docstring shows."""
    for path in [*PAGES, *SOURCES]:
        text = path.read_text()
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        for script, rest in COMMAND.findall(text):
            yield path.name, script, rest.split("  #")[0]


def anchors(path):
    """What a link may name behind #: the headings, as a web page of the text names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_resolves(page):
    # catches a page that was moved, a heading that was renamed
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_command_parses():
    # catches a flag that was renamed, a value out of range, a script that is gone
    seen = set()
    for page, script, rest in commands():
        seen.add((page, script))
        flags = re.findall(r"--([a-z_]+)=(\"[^\"]*\"|\S+)", rest)
        if script.startswith("tests/"):
            assert (ROOT / script).is_file(), script
            continue
        if script == "trace.py":
            if not rest:  # `python trace.py STAGE`
                continue
            assert rest.split()[0] in trace.STAGES, (page, rest)
            script = f"{rest.split()[0]}.py"
        name = script.removeprefix("-m ").removesuffix(".py").replace("/", ".")
        config = importlib.import_module(name).Config
        for flag, value in flags:
            value = value.strip('"')
            if re.search(r"\.\.\.|^[A-Z]+$", value):  # a placeholder
                assert flag in {f.name for f in dataclasses.fields(config)}, (page, script, flag)
            else:
                cli.read_flags(config, [f"--{flag}={value}"])
    assert len(seen) > 40 and ("README.md", "ppo.py") in seen and ("grpo.py", "grpo.py") in seen
