"""The documents say what the code says."""

import re

import pytest
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
    assert (config.beta, config.missing_eos, config.temperature) == (0.05, -3.0, 1.0)
    assert (config.minibatches, config.epochs, config.warmup) == (2, 2, 5)
    assert config.whiten and config.kl_in == "reward" and config.kl_target == 0
    assert (config.adam_eps, config.entropy_coef, config.ptx_coef) == (1e-5, 0.0, 0.0)
    assert not config.score_scaling


def test_the_numbers_of_grpo_quoted_as_ours_are_the_defaults():
    # catches a default that was changed in the code only
    from grpo import METHODS, Config
    config = Config()
    assert (config.k, config.minibatches, config.epochs, config.warmup) == (8, 2, 1, 5)
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
