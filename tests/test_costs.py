"""studies/costs.py: each axis gives a line, a bound below it, and the picture."""

from data import tokens
from studies import bench, costs


def test_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    # catches a stage whose functions were renamed, a bound in other units than what it bounds
    monkeypatch.setattr(costs, "MODEL", costs.MODEL | dict(n_layer=1, n_head=1, n_embd=32))
    monkeypatch.setattr(costs, "FILES", (0.05, 0.1))
    monkeypatch.setattr(tokens, "CACHE", tokens.CACHE)  # what a child changes, here undone
    monkeypatch.setitem(bench.SIZES, "tiny", bench.SIZES["tiny"])
    seen = []

    def here(config, *task):  # in this process
        seen.append(costs.point(*task, config))
        return seen[-1]

    monkeypatch.setattr(costs, "child", here)
    costs.main(costs.Config(out=str(tmp_path), steps=1, points=2, device="cpu"))
    assert len(seen) == 3 * 2 * 2 + 2
    assert {path.name for path in tmp_path.iterdir()} == {"costs.md", "costs.png"}
    lines = (tmp_path / "costs.md").read_text().splitlines()
    assert len(lines) == 4 + 2 + len(seen) and lines[-1] in capsys.readouterr().out
    assert any(line.startswith("| vocabulary | 2,048 | decoding | ") for line in lines)
    for point in seen:
        assert 0 < point["bound"] < 1.2 * point["seconds"] < 10  # seconds; noise may shift both
        assert 0 < point["mib_bound"] < 200
