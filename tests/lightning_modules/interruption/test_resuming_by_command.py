"""What --ckpt_path takes, and what is refused before anything is loaded."""

import os
import shutil
from pathlib import Path

import pytest
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from support.commands import DEMO

from lightning_modules import AdaptationModule
from lightning_modules.cli import AdaptationCLI, user_error
from lightning_modules.interruption import CheckedCheckpointIO

SAVE = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True, "every_n_train_steps": 1}}
SHORT = ("--trainer.limit_val_batches", "0", "--trainer.logger.init_args.version", "job_1", "--trainer.callbacks", str([SAVE]))


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))


@pytest.fixture
def short(run, monkeypatch):
    """Fit the demo with no other callbacks for so many steps; the trainer."""
    return lambda steps, *words: run("fit", *DEMO, *SHORT, "--trainer.max_steps", str(steps), *words).trainer


def test_directory_stands_for_its_newest_intact_checkpoint(run, short, tmp_path):
    checkpoints = tmp_path / "demo/job_1/checkpoints"
    short(2)
    good = checkpoints / "last.ckpt"
    os.utime(good, (1_900_000_000,) * 2)
    bad = shutil.copy(good, checkpoints / "newer.ckpt")
    content = bytearray(Path(bad).read_bytes())
    content[len(content) // 2] ^= 1
    Path(bad).write_bytes(content)
    os.utime(bad, (2_000_000_000,) * 2)
    with pytest.warns(UserWarning, match=r"skipped a damaged checkpoint: .*newer\.ckpt: its checksum differs"):
        trainer = short(3, "--ckpt_path", str(tmp_path / "demo"))
    assert trainer.ckpt_path == str(good)
    assert trainer.global_step == 3
    with pytest.raises(
        ValueError, match=rf"newer\.ckpt is damaged \(its checksum differs\); the newest intact checkpoint .*{good.name}"
    ):
        short(3, "--ckpt_path", str(bad))
    for path in checkpoints.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no intact checkpoint"), pytest.warns(UserWarning, match="skipped"):
        short(3, "--ckpt_path", str(tmp_path / "demo"))


def test_last_starts_from_scratch_and_then_resumes_in_the_run_s_own_directory(short, tmp_path):
    first = short(2, "--ckpt_path", "last")
    assert first.ckpt_path is None
    second = short(3, "--ckpt_path", "last")
    assert Path(second.ckpt_path).parent == tmp_path / "demo/job_1/checkpoints"
    assert second.global_step == 3


def test_last_also_finds_what_a_model_checkpoint_with_a_directory_of_its_own_has_written(short, tmp_path):
    save = {"class_path": SAVE["class_path"], "init_args": SAVE["init_args"] | {"dirpath": str(tmp_path / "elsewhere")}}
    words = ("--trainer.callbacks", str([save]), "--ckpt_path", "last")
    assert short(2, *words).ckpt_path is None
    second = short(3, *words)
    assert Path(second.ckpt_path).parent == tmp_path / "elsewhere"
    assert second.global_step == 3


def test_starting_from_scratch_or_earlier_beside_later_checkpoints_is_refused(short, tmp_path, monkeypatch):
    short(2)
    monkeypatch.setattr(AdaptationModule, "training_step", lambda *_: pytest.fail("training began"))
    first = str(next((tmp_path / "demo/job_1/checkpoints").glob("epoch=*")))
    with pytest.raises(ValueError, match="job_1 holds another run"):
        short(9)
    newer = CheckedCheckpointIO().load_checkpoint(first) | {"global_step": 5}
    CheckedCheckpointIO().save_checkpoint(newer, tmp_path / "demo/job_1/checkpoints/newer.ckpt")
    with pytest.raises(ValueError, match=r"newer\.ckpt is of step 5, and this run, which resumes from step 2"):
        short(9, "--ckpt_path", first)


def test_directory_that_cannot_be_written_is_refused_before_model_and_data(main, tmp_path, monkeypatch, no_training):
    monkeypatch.setattr(AdaptationModule, "configure_model", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to") as error:
        main("fit", *DEMO, "--trainer.logger.init_args.save_dir", str(tmp_path / "file"))
    assert user_error(error.value) is error.value


def test_loading_code_cannot_be_asked_for(run, no_training):
    with pytest.raises(ValueError, match="weights_only=false would run code"):
        run("fit", *DEMO, "--weights_only", "false")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), CheckedCheckpointIO),
        (("--trainer.strategy", "ddp", "--trainer.devices", "2"), CheckedCheckpointIO),
        (("--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"), AsyncCheckpointIO),
    ],
    ids=["one", "ddp", "plugin"],
)
def test_command_line_checks_its_files_unless_a_plugin_says_otherwise(main, words, expected):
    io = AdaptationCLI([*DEMO, *words], run=False).trainer.strategy.checkpoint_io
    assert type(io) is expected
    assert type(io) is not TorchCheckpointIO
