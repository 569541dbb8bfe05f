"""The list of known bugs fits the source; `python tests/mutants.py` runs it."""

import pytest
from conftest import ROOT
from mutants import MUTANTS, applied


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_applies(mutant):
    # catches a bug whose place was rewritten, and tests that were renamed: it would go unchecked
    source = (ROOT / mutant.file).read_text()
    assert applied(mutant, source) != source and mutant.seen
    for test in mutant.tests.split():
        file, name = test.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_the_list_is_long_enough():
    # catches mutants that were dropped, and two under one name
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40
