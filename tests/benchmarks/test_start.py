"""Memory of a start, at a size that says nothing but that it runs."""

import multiprocessing

import pytest

from benchmarks import start


@pytest.mark.slow
def test_every_process_is_measured_in_both_ways_of_loading(monkeypatch, capsys):
    fork = multiprocessing.get_context("fork")  # imports nothing again
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    rows = start.main(["--layers", "2", "--width", "512"])
    assert [row["loaded by"] for row in rows] == ["the first process", "every process"]
    for row in rows:
        assert row["process 0: peak, MB"] >= row["process 0: end, MB"]
        assert row["process 1: peak, MB"] >= row["process 1: end, MB"]
        assert row["peak of all, MB"] > 0
    table = capsys.readouterr().out
    assert "one copy" in table
    assert table.count("\n|") == 4
