"""PredictionsWriter: rows on disk as they come, an interrupted prediction that goes on, and several processes."""

import csv
import json
import os
import resource

import lightning as L
import pytest
import torch
from support.processes import run_in_two
from support.token_task import TokenTask, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader

from datamodules.shared.sampling import evaluation_sampler
from lightning_modules.callbacks import PredictionsWriter
from lightning_modules.callbacks.results.predictions import UNFINISHED
from lightning_modules.callbacks.results.unfinished_predictions import UnfinishedPredictions
from lightning_modules.strategies.sharding import ShardedBaseStrategy

NUM_EXAMPLES, BATCH_SIZE = 9, 2  # five batches of one process; three and two of two processes


@pytest.fixture(autouse=True)
def _own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Examples(L.LightningDataModule):
    """Examples in batches; `offset` makes other ones of it."""

    def __init__(self, offset=0, size=NUM_EXAMPLES):
        super().__init__()
        batch = token_batch(size)
        batch["tokens"] = (batch["tokens"] + offset) % 20
        self.examples = [{name: values[row] for name, values in batch.items()} for row in range(size)]

    def predict_dataloader(self):
        return DataLoader(self.examples, batch_size=BATCH_SIZE, sampler=evaluation_sampler(self.examples, self.trainer))


class Interrupted(L.Callback):
    """Ends the process's work before a batch."""

    def __init__(self, before):
        self.before = before

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.before:
            raise RuntimeError("killed")


class Counted(TokenTask):
    """Remembers what it predicted."""

    def __init__(self, bias):
        super().__init__()
        self.predicted, self.bias = [], bias

    def build(self, num_classes, class_names=None):
        torch.nn.init.constant_(super().build(num_classes, class_names).head.bias, self.bias)
        return self.model

    def predict(self, batch):
        self.predicted += batch["id"]
        return super().predict(batch)


def predict(path, *callbacks, run=None, data=None, bias=0.0, class_names=None, **options):
    """The ids that were computed; rows go to `path`, the run's other files to `run`, else beside them."""
    module = token_module()
    module.task, module.class_names = Counted(bias), class_names
    module._require_trained = lambda: None
    trainer = token_trainer(run or path.parent, *callbacks, PredictionsWriter(str(path)), **options)
    trainer.predict(module, data or Examples(), return_predictions=False)
    return module.task.predicted


def ids(first, end=NUM_EXAMPLES):
    return [f"row {row}" for row in range(first, end)]


def interrupt(path, before=3, **options):
    with pytest.raises(RuntimeError, match="killed"):
        predict(path, Interrupted(before), **options)
    (file,) = (path.parent / UNFINISHED).iterdir()
    assert not path.exists()
    return file


@pytest.fixture
def expected(tmp_path):
    """The file of a prediction that nothing interrupted."""
    predict(tmp_path / "whole/p.csv")
    return (tmp_path / "whole/p.csv").read_bytes()


def test_interrupted_prediction_goes_on_and_ends_in_the_same_file(tmp_path, expected):
    path = tmp_path / "p.csv"
    file = interrupt(path)
    assert sum(1 for _ in file.open()) == 3
    assert predict(path) == ids(6)
    assert path.read_bytes() == expected
    assert not file.parent.exists()
    assert predict(path) == ids(0), "what is complete is not resumed"


def test_prediction_that_stopped_after_its_last_batch_computes_nothing(tmp_path, expected, monkeypatch):
    path = tmp_path / "p.csv"
    with monkeypatch.context() as patch:
        patch.setattr(PredictionsWriter, "on_predict_end", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            predict(path)
    assert predict(path) == []
    assert path.read_bytes() == expected


@pytest.mark.parametrize("damage", ["torn", "flipped", "copied", "planted"])
def test_rows_that_are_damaged_are_computed_again(damage, tmp_path, expected):
    path = tmp_path / "p.csv"
    file = interrupt(path)
    lines = file.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        lines[2] = lines[2][:-5]
    elif damage == "flipped":
        lines[2] = lines[2].replace(b"0.", b"1.", 1)
    elif damage == "copied":
        lines[2] = lines[1]
    else:
        lines[2] = json.dumps(["0" * 64, json.loads(lines[2])[1]]).encode() + b"\n"
    file.write_bytes(b"".join(lines))
    assert predict(path) == ids(4)
    assert path.read_bytes() == expected


def test_inputs_that_changed_are_computed_again(tmp_path):
    path = tmp_path / "p.csv"
    interrupt(path)
    data = Examples()
    data.examples[3]["tokens"] = (data.examples[3]["tokens"] + 1) % 20  # neither the first nor the last
    assert predict(path, data=data) == ids(2)
    predict(tmp_path / "whole/p.csv", data=data)
    assert path.read_bytes() == (tmp_path / "whole/p.csv").read_bytes()


@pytest.mark.parametrize("options", [{"bias": 1.0}, {"data": Examples(offset=1)}, {"data": Examples(size=8)}])
def test_another_prediction_in_the_same_place_starts_over_and_leaves_the_first_alone(options, tmp_path, expected):
    path = tmp_path / "p.csv"
    file = interrupt(path)
    assert predict(tmp_path / "other.csv", **options) == ids(0, len(options.get("data", Examples()).examples))
    assert (tmp_path / "other.csv").read_bytes() != expected
    assert file.exists()
    assert predict(path) == ids(6)


def test_two_processes_do_not_make_the_same_predictions(tmp_path):
    path = tmp_path / "p.csv"
    file = interrupt(path)
    other = UnfinishedPredictions(file, b"key", "about")
    with pytest.raises(ValueError, match="another process is making the same predictions"):
        predict(path)
    other.close()
    assert predict(path) == ids(6)


def test_rows_lie_beside_the_adapter_where_no_path_is_given(tmp_path):
    (tmp_path / "run").mkdir()
    writer = PredictionsWriter()
    trainer, module = token_trainer(tmp_path), token_module()
    assert writer._directory(trainer, module) == tmp_path
    module.adapter_path = str(tmp_path / "run/adapter")
    assert writer._directory(trainer, module) == tmp_path / "run"
    module.adapter_path = "hf://owner/name"
    assert writer._directory(trainer, module) == tmp_path
    module.adapter_path = str(tmp_path / "gone/adapter")  # cannot be written to
    assert writer._directory(trainer, module) == tmp_path


def test_path_that_cannot_be_written_is_refused_before_the_first_batch(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(TokenTask, "predict", lambda *_: pytest.fail("predicted"))
    with pytest.raises(ValueError, match=r"file' cannot be written \(.*\); give PredictionsWriter another path"):
        predict(tmp_path / "file/p.csv", run=tmp_path / "run")


def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch, expected):
    path = tmp_path / "p.csv"
    write, calls = os.pwrite, []

    def full(descriptor, content, offset):
        calls.append(offset)
        if len(calls) < 4:
            return write(descriptor, content, offset)
        if len(calls) == 4:
            return write(descriptor, content[:10], offset)  # what just fits
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_modules.callbacks.results.unfinished_predictions.os.pwrite", full)
        with pytest.raises(ValueError, match=r"be written \(No space left on device\); free some space and repeat the command"):
            predict(path)
    assert predict(path) == ids(6)
    assert path.read_bytes() == expected


def test_file_that_is_full_is_closed_without_another_error(tmp_path):
    rows = UnfinishedPredictions(tmp_path / "rows", b"key", "about")
    rows.append(0, "inputs", ["a"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            rows.append(0, "inputs", ["b" * 4000])
        assert list(rows.batches_of(0)) == [["a"]]
        rows.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_names_of_strangers_are_written_as_text(tmp_path):
    data = Examples()
    for row, name in enumerate(["=1+1", "caf\udce9.jpg", "\x1b[2J", "a\nb", "-1"]):
        data.examples[row]["id"] = name
    predict(tmp_path / "p.csv", data=data, class_names=["=cmd|'/c'!A0", "b"])
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[-2:] == ["p(=cmd|'/c'!A0)", "p(b)"]
    assert [row[0] for row in rows[:5]] == ["'=1+1", r"caf\xe9.jpg", r"\x1b[2J", r"a\x0ab", "-1"]
    assert {row[2] for row in rows} <= {"'=cmd|'/c'!A0", "b"}


# ---------------------------------------------------------------- several processes

STRATEGIES = {"ddp": lambda: "ddp", "fsdp": ShardedBaseStrategy}


def predict_in_two(path, strategy, before=None):
    """The ids that this process computed."""
    options = {"strategy": STRATEGIES[strategy](), "devices": 2}
    if before is None:
        return predict(path, **options)
    with pytest.raises(RuntimeError, match="killed"):
        predict(path, Interrupted(before), **options)
    return None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_write_the_rows_of_one_and_go_on_where_they_stopped(strategy, tmp_path, expected):
    path = tmp_path / "p.csv"
    run_in_two(predict_in_two, path, strategy)
    _compare(path, expected)
    path.unlink()
    assert run_in_two(predict_in_two, path, strategy, 1) == [None, None]
    first, second = run_in_two(predict_in_two, path, strategy)
    assert (first[:3], second[:2]) == (ids(0)[4::2], ids(0)[5::2])
    _compare(path, expected)
    assert not (tmp_path / UNFINISHED).exists()


class WithoutSampler(Examples):
    def predict_dataloader(self):
        return DataLoader(self.examples, batch_size=BATCH_SIZE)


def predict_without_sampler(path):
    with pytest.raises(ValueError, match=r"different numbers of predict batches.*DistributedSampler") as caught:
        predict(path, data=WithoutSampler(), strategy=ShardedBaseStrategy(), devices=2)
    return str(caught.value)


def test_sharded_processes_with_different_numbers_of_batches_are_refused(tmp_path):
    """Lightning deals out predict examples without repetition, and the last forward would wait forever."""
    run_in_two(predict_without_sampler, tmp_path / "p.csv")


def _compare(path, expected):
    rows, own = (list(csv.reader(content.decode().splitlines())) for content in (path.read_bytes(), expected))
    assert [row[:3] for row in rows] == [row[:3] for row in own]
    for row, other in zip(rows[1:], own[1:], strict=True):
        assert [float(p) for p in row[3:]] == pytest.approx([float(p) for p in other[3:]], rel=1e-4)
