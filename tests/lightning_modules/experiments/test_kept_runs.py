"""A kept run is read intact or not at all, and none of another config is lost."""

import json

import numpy as np
import pytest

from lightning_modules.experiments.graded_examples import GradedSet, load_examples
from lightning_modules.experiments.kept_runs import read_run, write_run

CONFIG = {"model": {"lr": 0.1}, "trainer": {"max_epochs": 3}}
RESULT = {"metrics": {"test/accuracy": 0.8125, "test/loss": 0.1234567890123}, "seconds": 12.5, "seed": 0}
EXAMPLES = {"": GradedSet(np.array(["a", "b", "c"]), np.array([0, 1, 1]), np.array([0, 1, 0]))}


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "cells/lora/seed_0.json"
    write_run(path, CONFIG, RESULT, EXAMPLES)
    return path


def changed(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_written_run_is_read(kept, capsys):
    assert read_run(kept, CONFIG) == RESULT
    assert capsys.readouterr().out == f"kept: {kept}\n"


def test_no_changed_byte_of_a_run_is_believed(kept, capsys):
    content = kept.read_bytes()
    num_refused = 0
    for position in range(len(content)):
        kept.write_bytes(changed(content, position))
        found = read_run(kept, CONFIG)
        assert found in (None, RESULT)
        num_refused += found is None
    assert num_refused > 0.7 * len(content)  # the others are spaces
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith((f"{kept} is ", f"kept: {kept}")) for line in printed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"format": 3}', b"[" * 5000])
def test_damaged_run_is_named(kept, capsys, content):
    kept.write_bytes(content)
    assert read_run(kept, CONFIG) is None
    assert capsys.readouterr().out.startswith(f"{kept} is damaged (")


def test_no_changed_byte_of_the_examples_is_believed(kept, capsys):
    path = kept.with_suffix(".npz")
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        path.write_bytes(changed(content, position))
        assert read_run(kept, CONFIG) is None
    path.unlink()
    assert read_run(kept, CONFIG) is None
    assert f"{kept} is damaged (seed_0.npz: " in capsys.readouterr().out


def test_run_of_the_format_before_is_read_as_long_as_it_can_be(kept, capsys):
    kept.write_text(json.dumps({"format": 2, "config": CONFIG, "result": RESULT}))
    assert read_run(kept, CONFIG) == RESULT
    assert capsys.readouterr().out == f"kept: {kept} (of an older version, without a checksum)\n"
    kept.write_text(json.dumps({"format": 2, "config": CONFIG, "result": {"metrics": {"test/accuracy": "0.8"}}}))
    assert read_run(kept, CONFIG) is None
    kept.write_text(json.dumps({"format": 2, "config": CONFIG, "result": RESULT}))
    kept.with_suffix(".npz").write_bytes(b"PK")
    assert read_run(kept, CONFIG) is None
    kept.write_text(json.dumps({"format": 1, "config": CONFIG, "result": RESULT}))
    assert read_run(kept, CONFIG) is None
    assert capsys.readouterr().out.splitlines()[-1] == f"{kept} is of another version: run again"


def test_run_of_another_config_is_kept_and_comes_back(kept, capsys):
    other, result = {**CONFIG, "trainer": {"limit_test_batches": 1}}, {**RESULT, "seconds": 1.0}
    assert read_run(kept, other) is None
    assert "is of another config: kept as seed_0-" in capsys.readouterr().out
    assert not kept.exists()
    write_run(kept, other, result, {})
    assert read_run(kept, CONFIG) == RESULT
    assert load_examples(kept.with_suffix(".npz")).keys() == EXAMPLES.keys()
    assert read_run(kept, other) == result
    assert len(list(kept.parent.iterdir())) == 4


def test_run_of_a_comparison_that_was_moved_is_read(kept):
    moved = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": {"init_args": {"save_dir": "elsewhere"}}}}
    assert read_run(kept, moved) == RESULT
    assert read_run(kept, {**CONFIG, "trainer": {}}) is None
    assert read_run(kept, moved) == RESULT


def test_only_the_first_process_moves_runs(kept):
    other = {**CONFIG, "model": {}}
    assert read_run(kept, other, first_process=False) is None
    assert read_run(kept, CONFIG, first_process=False) == RESULT
    assert read_run(kept, other) is None
    assert read_run(kept, CONFIG, first_process=False) == RESULT
    assert not kept.exists()
