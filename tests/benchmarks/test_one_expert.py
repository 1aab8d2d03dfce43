"""benchmarks.one_expert on tiny sizes. No test of speed."""

import json
import math

import pytest

from benchmarks import one_expert


def test_every_size_has_a_row_with_both_times_and_the_way_that_is_taken(tmp_path, capsys):
    sizes = [word for size in ((8, 4, 8), (16, 400, 64)) for word in ("--sizes", *map(str, size))]
    rows = one_expert.main([*sizes, "--repeats", "3", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert [(row["width"], row["tokens"], row["coefficients"], row["taken"]) for row in rows] == [
        (8, 4, 8, "positions"),
        (16, 400, 64, "matrix"),
    ]
    assert all(math.isfinite(row[way]["median"]) and row[way]["median"] > 0 for row in rows for way in one_expert.WAYS)
    table = (tmp_path / "results.md").read_text()
    assert len(table.splitlines()) == 4
    assert table in capsys.readouterr().out


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        one_expert.main(["--repeats", "0"])
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err
