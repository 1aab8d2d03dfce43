"""A cell is read whole or not at all, and none of another config is lost."""

import json

import numpy as np
import pytest

from lightning_modules.experiments.cells import read_cell, write_cell
from lightning_modules.experiments.graded_examples import GradedSet, load_examples

CONFIG = {"model": {"lr": 0.1}, "trainer": {"max_epochs": 3}}
RESULT = {"metrics": {"test/accuracy": 0.8125, "test/loss": 0.1234567890123}, "seconds": 12.5, "seed": 0}
EXAMPLES = {"": GradedSet(np.array(["a", "b", "c"]), np.array([0, 1, 1]), np.array([0, 1, 0]))}


@pytest.fixture
def cell(tmp_path):
    path = tmp_path / "cells/lora/seed_0.json"
    write_cell(path, CONFIG, RESULT, EXAMPLES)
    return path


def changed(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_written_cell_is_read(cell, capsys):
    assert read_cell(cell, CONFIG) == RESULT
    assert capsys.readouterr().out == f"kept: {cell}\n"


def test_no_changed_byte_of_a_cell_is_believed(cell, capsys):
    content = cell.read_bytes()
    num_refused = 0
    for position in range(len(content)):
        cell.write_bytes(changed(content, position))
        found = read_cell(cell, CONFIG)
        assert found in (None, RESULT)
        num_refused += found is None
    assert num_refused > 0.7 * len(content)  # the others are spaces
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith((f"{cell} is ", f"kept: {cell}")) for line in said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"format": 3}', b"[" * 5000])
def test_damaged_cell_is_named(cell, capsys, content):
    cell.write_bytes(content)
    assert read_cell(cell, CONFIG) is None
    assert capsys.readouterr().out.startswith(f"{cell} is damaged (")


def test_no_changed_byte_of_the_examples_is_believed(cell, capsys):
    path = cell.with_suffix(".npz")
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        path.write_bytes(changed(content, position))
        assert read_cell(cell, CONFIG) is None
    path.unlink()
    assert read_cell(cell, CONFIG) is None
    assert f"{cell} is damaged (seed_0.npz: " in capsys.readouterr().out


def test_cell_of_the_format_before_is_read_as_long_as_it_can_be(cell, capsys):
    cell.write_text(json.dumps({"format": 2, "config": CONFIG, "result": RESULT}))
    assert read_cell(cell, CONFIG) == RESULT
    assert capsys.readouterr().out == f"kept: {cell} (of an older version, without a checksum)\n"
    cell.write_text(json.dumps({"format": 2, "config": CONFIG, "result": {"metrics": {"test/accuracy": "0.8"}}}))
    assert read_cell(cell, CONFIG) is None
    cell.write_text(json.dumps({"format": 2, "config": CONFIG, "result": RESULT}))
    cell.with_suffix(".npz").write_bytes(b"PK")
    assert read_cell(cell, CONFIG) is None
    cell.write_text(json.dumps({"format": 1, "config": CONFIG, "result": RESULT}))
    assert read_cell(cell, CONFIG) is None
    assert capsys.readouterr().out.splitlines()[-1] == f"{cell} is of another version: run again"


def test_cell_of_another_config_is_kept_and_comes_back(cell, capsys):
    other, result = {**CONFIG, "trainer": {"limit_test_batches": 1}}, {**RESULT, "seconds": 1.0}
    assert read_cell(cell, other) is None
    assert "is of another config: kept as seed_0-" in capsys.readouterr().out
    assert not cell.exists()
    write_cell(cell, other, result, {})
    assert read_cell(cell, CONFIG) == RESULT
    assert load_examples(cell.with_suffix(".npz")).keys() == EXAMPLES.keys()
    assert read_cell(cell, other) == result
    assert len(list(cell.parent.iterdir())) == 4


def test_only_the_first_process_moves_cells(cell):
    other = {**CONFIG, "model": {}}
    assert read_cell(cell, other, first_process=False) is None
    assert read_cell(cell, CONFIG, first_process=False) == RESULT
    assert read_cell(cell, other) is None
    assert read_cell(cell, CONFIG, first_process=False) == RESULT
    assert not cell.exists()
