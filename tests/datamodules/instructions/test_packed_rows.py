"""Packed rows: whole examples of one task, each from position 0, in every epoch and after an interruption."""

import json
import random
from collections import Counter

import pytest

from datamodules import InstructionDataModule
from datamodules.instructions import data_module as instructions
from datamodules.instructions.arithmetic import ArithmeticDataModule
from datamodules.instructions.dataset import IGNORED
from datamodules.instructions.packing import pack


@pytest.fixture
def make(tmp_path):
    """Makes DataModules of two sets, one of which comes twice in an epoch."""
    for name in ("short", "long"):
        rows = [{"instruction": f"{name} " * (1 + number % 9), "output": str(number)} for number in range(20)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    weights = {str(tmp_path / "short.json"): 2.0, str(tmp_path / "long.json"): 1.0}

    def module(packing=True, **arguments):
        given = {"tokenizer": "bytes", "prompt": "plain", "num_workers": 0, "batch_size": 2, "validation_size": 3}
        data = InstructionDataModule(weights, **given, packing=packing, max_length=120, **arguments)
        data.setup("fit")
        return data

    return module


def examples(batch, row):
    """The examples of a packed row, as (ids, labels)."""
    length = int(batch["attention_mask"][row].sum())
    positions = batch["position_ids"][row].tolist()
    starts = [place for place, position in enumerate(positions[:length]) if position == 0]
    found = []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        assert positions[start:end] == list(range(end - start))
        found.append((tuple(batch["input_ids"][row, start:end].tolist()), tuple(batch["labels"][row, start:end].tolist())))
    if length < len(positions):
        assert positions[length:] == list(range(len(positions) - length))
    return found


def test_every_length_is_in_one_row_and_rows_are_full():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    rows = pack(lengths, 100)
    assert sorted(place for row in rows for place in row) == list(range(500))
    assert all(sum(lengths[place] for place in row) <= 100 for row in rows)
    assert sum(lengths) > 0.97 * 100 * len(rows)
    assert pack([], 10) == []
    assert pack([10, 10, 3, 7], 10) == [[0], [1], [3, 2]]


def test_rows_hold_the_unpacked_examples_of_one_task(make, monkeypatch):
    told = []
    monkeypatch.setattr(instructions, "rank_zero_info", told.append)
    expected, found = Counter(), Counter()
    for batch in make(packing=False).train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            expected[tuple(ids[mask == 1].tolist()), tuple(labels[mask == 1].tolist())] += 1
    data = make()
    assert data.batch_keys == ("input_ids", "attention_mask", "labels", "position_ids")
    for batch in data.train_dataloader():
        for row, task in enumerate(batch["task"]):
            inside = examples(batch, row)
            found.update(inside)
            many = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
            assert batch["id"][row].startswith(f"{task}/")
            assert batch["id"][row].endswith(many)
    assert found == expected
    assert "packed into" in told[-1]
    assert "position_ids" not in next(iter(data.val_dataloader()))


def test_nothing_predicts_the_first_token_of_an_example(make):
    batch = next(iter(make(train_on_prompt=True).train_dataloader()))
    starts = (batch["position_ids"] == 0) & (batch["attention_mask"] == 1)
    assert (batch["labels"][starts] == IGNORED).all()
    assert (batch["labels"] != IGNORED).sum() == batch["attention_mask"].sum() - starts.sum()


def test_an_interrupted_epoch_goes_on_with_the_next_rows(make):
    loader, other = make().train_dataloader(), make().train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    other.load_state_dict(loader.state_dict())
    assert [batch["id"] for batch in other] == [batch["id"] for batch in batches]


@pytest.mark.parametrize("arguments", [{"packing": True}, {"train": {"recall": 2.0}}, {"train": "addition"}])
def test_what_cannot_be_streamed_is_refused(arguments):
    with pytest.raises(ValueError, match=r"packing and streaming cannot|streaming reads one set of your own, without a weight"):
        ArithmeticDataModule(tokenizer="bytes", streaming=True, **arguments)
