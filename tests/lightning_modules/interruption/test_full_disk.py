"""A disk that is full, whoever meets it first: the steps are kept, and the error is one line."""

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.killed_runs import At, in_process, same
from tensorboard.summary.writer.record_writer import RecordWriter

import train
from lightning_modules.cli import user_error
from lightning_modules.interruption import read_checkpoint, write_error


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        ("on_train_batch_start", 3, 1),  # where LearningRateMonitor logs; the first batch of an optimizer step
        ("on_train_batch_start", 4, 1),  # the second
        ("on_train_batch_end", 4, 2),  # before other callbacks have seen the end of the batch
        ("on_validation_end", 1, 1),  # where the adapter is written; in the middle of accumulation
        ("on_validation_end", 2, 3),
        ("on_train_epoch_end", 1, 4),
        ("on_train_epoch_start", 2, 4),
    ],
)
def test_run_goes_on_to_the_same_bits_from_wherever_the_disk_was_full(tmp_path, straight, hook, count, step):
    status, outcome = in_process(tmp_path, At(hook, count, full), without_newest=True)
    log = (tmp_path / "log.txt").read_text()
    assert status == 70, log
    assert f"No space left on device: the run ended at step {step}. Checkpoint: {tmp_path / 'interrupted.ckpt'}" in log
    assert read_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == step
    status, outcome = in_process(tmp_path, without_newest=True)
    assert status == 0
    assert same(torch.load(outcome), straight)


class FullAfter:
    """A logger that takes so many calls."""

    def __init__(self, number):
        self.number = number

    def log_metrics(self, metrics, step=None):
        self.number -= 1
        if self.number < 0:
            full()
        super().log_metrics(metrics, step)


class FullTensorBoard(FullAfter, TensorBoardLogger):
    def __init__(self, directory, number):
        FullAfter.__init__(self, number)
        TensorBoardLogger.__init__(self, directory, name="", version="")


@pytest.mark.parametrize("number", [0, 3, 7])
def test_run_goes_on_to_the_same_bits_from_whichever_value_a_logger_could_not_write(tmp_path, straight, number):
    options = {"without_newest": True, "log_every_n_steps": 1}
    status, outcome = in_process(tmp_path, logger=FullTensorBoard(tmp_path, number), **options)
    assert status == 70, (tmp_path / "log.txt").read_text()
    status, outcome = in_process(tmp_path, **options)
    assert status == 0
    assert same(torch.load(outcome), straight)


def test_checkpoint_goes_to_another_disk_if_there_is_no_room_beside_the_others(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run, replace = tmp_path / "run", os.replace

    class FullDirectory(At):
        def patch(self):
            def move(source, target):
                full() if Path(target).parent == run else replace(source, target)

            os.replace = move

    status, _ = in_process(run, FullDirectory("", 0), max_epochs=1, num_workers=0)
    log = (run / "log.txt").read_text()
    assert status == 70, log
    found = re.search(r"^No space left on device: the run ended at step 1\. Checkpoint: (.*)$", log, re.MULTILINE)
    assert found, log
    assert Path(found[1]).is_relative_to(tmp_path / "tmp")
    assert read_checkpoint(found[1])["global_step"] == 1
    assert not list(run.glob("*ckpt*"))


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_command_line_says_it_in_one_line_whichever_logger_meets_it(run, monkeypatch, tmp_path, capsys, logger):
    """TensorBoard writes in a thread, whose traceback would be printed, too."""
    writes = []

    def write(self, *args, **kwargs):
        writes.append(self)
        full() if len(writes) > 9 else kept(self, *args, **kwargs)

    owner, name = (CSVLogger, "log_metrics") if logger == "CSVLogger" else (RecordWriter, "write")
    kept = getattr(owner, name)
    monkeypatch.setattr(owner, name, write)
    words = ("--trainer.logger", f"lightning.pytorch.loggers.{logger}", "--trainer.logger.name", "demo")
    with pytest.raises(OSError, match="No space left on device") as error:
        train.main(["fit", "--config", "configs/demo.yaml", *words, "--trainer.logger.save_dir", str(tmp_path)])
    assert user_error(error.value) is error.value
    assert "Traceback" not in capsys.readouterr().err
    (interrupted,) = tmp_path.rglob("interrupted.ckpt")
    assert read_checkpoint(interrupted)["global_step"] > 0


def test_error_of_the_disk_is_found_through_whatever_was_raised_from_it():
    cause = OSError(errno.EDQUOT, "Disk quota exceeded")
    error = ValueError("not written")
    error.__cause__ = cause
    assert write_error(error) is cause
    assert write_error(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert write_error(ValueError("other")) is None
    assert write_error(None) is None
    assert user_error(FileNotFoundError(errno.ENOENT, "no such file")) is None
