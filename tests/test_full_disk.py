"""A full disk at some of the writes of a run; tests/full_disk.py takes all of them."""

from pathlib import Path

import full_disk
import pytest
from tiny_runs import make_inputs


@pytest.mark.parametrize("stage", ["sft", "label"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, stage):
    # catches a part of a file, a row by half, and a run that needs more room to go on than it had
    monkeypatch.chdir(make_inputs(tmp_path))
    status, said, writes = full_disk.run(stage, 10**9)
    assert status == 0, said
    expected = full_disk.result(stage)
    for n in (1, writes // 2, writes - 4):  # not the last one: times make a run a write shorter
        Path("out").rename(f"out{n}")
        assert full_disk.check(stage, n, expected) == [], n
