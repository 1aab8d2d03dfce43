"""Checkpoint files: whole or absent, and never read damaged."""

import errno
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch

from fourier_moe.errors import UserError
from lightning_modules.cli import user_error
from lightning_modules.interruption import (
    CheckedCheckpointIO,
    checkpoints,
    find_checkpoint,
    newest_intact,
    read_checkpoint,
    require_nothing_ahead,
    require_writable,
)

CONTENT = {
    "global_step": 7,
    "state_dict": {"weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), "bias": torch.ones(3)},
    "random": (3, (1, 2, 3), None),
}


def save(path, content=None):
    CheckedCheckpointIO().save_checkpoint(CONTENT if content is None else content, path)
    return path


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "run/last.ckpt")


def same(content):
    return (
        content["global_step"] == 7
        and content["random"] == CONTENT["random"]
        and all(torch.equal(content["state_dict"][key], value) for key, value in CONTENT["state_dict"].items())
    )


@pytest.mark.filterwarnings("error")
def test_file_is_read_by_us_and_by_torch_itself(file):
    assert same(read_checkpoint(file))
    assert same(CheckedCheckpointIO().load_checkpoint(file, weights_only=None))
    assert same(torch.load(file, weights_only=True))
    assert same(torch.load(file, weights_only=True, mmap=True))
    assert zipfile.ZipFile(file).testzip() is None
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_no_flipped_byte_is_read_silently_and_torch_would_read_most(file):
    content = file.read_bytes()
    draw = random.Random(0)
    unnoticed_by_torch = 0
    for position in draw.sample(range(len(content)), 200):
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*this directory has no intact checkpoint") as error:
            read_checkpoint(file)
        assert user_error(error.value) is error.value
        try:
            torch.load(file, weights_only=True)
            unnoticed_by_torch += 1
        except Exception:
            continue
    assert unnoticed_by_torch > 100  # the checksum earns its place


def test_every_byte_of_the_checksum_itself_counts(file):
    content = file.read_bytes()
    for position in range(len(content) - 110, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(file)


def test_no_truncation_is_read_silently(file):
    content = file.read_bytes()
    for length in [
        0,
        1,
        21,
        22,
        64,
        *random.Random(0).sample(range(len(content)), 100),
        *range(len(content) - 120, len(content)),
    ]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(file)


@pytest.mark.parametrize("junk", [b"", b"\0" * 500, b"hello", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, junk):
    (tmp_path / "junk.ckpt").write_bytes(junk)
    with pytest.raises(ValueError, match=r"junk\.ckpt is damaged"):
        read_checkpoint(tmp_path / "junk.ckpt")


def test_damaged_file_names_the_newest_intact_one_beside_it(file):
    save(file.with_name("older.ckpt"))
    newer = save(file.with_name("newer.ckpt"))
    for age, path in ((2, file.with_name("older.ckpt")), (1, newer)):
        os.utime(path, (1_000_000 - age,) * 2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"the newest intact checkpoint in this directory: {newer}"):
        read_checkpoint(file)


def test_newest_intact_skips_damaged_ones_and_says_which(tmp_path):
    paths = [save(tmp_path / name) for name in ("version_0/checkpoints/a.ckpt", "version_1/checkpoints/b.ckpt", "c.ckpt")]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1_000_000 - age,) * 2)
    assert newest_intact(tmp_path) == (paths[2], [])
    paths[2].write_bytes(b"")
    os.utime(paths[2], (1_000_000,) * 2)
    assert newest_intact(tmp_path) == (paths[1], [f"{paths[2]}: it is empty"])
    for path in paths[:2]:
        path.unlink()
    assert newest_intact(tmp_path)[0] is None


def test_newest_is_that_of_the_greatest_step_whatever_copying_has_made_of_the_times(tmp_path):
    steps = [42, 7, 56, 49]
    for age, step in enumerate(steps):
        path = save(tmp_path / f"run/checkpoints/{step}.ckpt", {"global_step": step})
        os.utime(path, (1_000_000 - age * (step == 56),) * 2)  # as unpacked: the newest looks oldest
    torch.save({"global_step": 60, "optimizer_states": []}, tmp_path / "run/checkpoints/old_version.ckpt")
    os.utime(tmp_path / "run/checkpoints/old_version.ckpt", (1,) * 2)
    for number, expected in enumerate(["old_version", "56", "49", "42", "7"]):
        copy = tmp_path / f"copy_{number}"
        shutil.copytree(tmp_path / "run", copy, copy_function=shutil.copy if number % 2 else shutil.copy2)
        assert newest_intact(copy) == (copy / f"checkpoints/{expected}.ckpt", [])
        (tmp_path / f"run/checkpoints/{expected}.ckpt").unlink()
    assert newest_intact(tmp_path / "run") == (None, [])


def test_of_two_checkpoints_of_one_step_the_one_written_last_is_newer(tmp_path):
    for name in ("before_validation", "after_validation"):
        os.utime(save(tmp_path / f"{name}.ckpt"), (1_000_000,) * 2)
    assert newest_intact(tmp_path)[0] == tmp_path / "after_validation.ckpt"


def test_position_is_read_without_the_weights(file, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was loaded"))
    assert checkpoints.position(file).step == 7
    file.write_bytes(file.read_bytes()[-170:])
    assert checkpoints.position(file).step == 7


def test_weights_alone_are_not_resumed_from_and_files_of_other_programs_are_named(tmp_path):
    save(tmp_path / "whole.ckpt", {"global_step": 7, "optimizer_states": []})
    weights = save(tmp_path / "weights.ckpt", {"global_step": 9})
    torch.save({"global_step": 8, "state_dict": {}}, tmp_path / "old_weights.ckpt")
    torch.save({"encoder": torch.ones(2)}, tmp_path / "other.ckpt")
    (tmp_path / "link.ckpt").symlink_to("nowhere.ckpt")
    named = [f"{tmp_path / 'link.ckpt'}: not a file", f"{tmp_path / 'other.ckpt'}: no training checkpoint"]
    assert newest_intact(tmp_path, to_resume=True) == (tmp_path / "whole.ckpt", named)
    assert newest_intact(tmp_path) == (weights, named)
    assert find_checkpoint(str(weights)) == str(weights)
    with pytest.raises(ValueError, match=r"weights\.ckpt' has weights only"):
        find_checkpoint(str(weights), to_resume=True)
    (tmp_path / "whole.ckpt").unlink()
    message = r"has no intact checkpoint; it needs a whole \.ckpt file"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="skipped"):
        find_checkpoint(str(tmp_path), to_resume=True)


def test_directory_of_several_runs_is_refused_with_their_steps(tmp_path):
    for run, step in (("version_0", 312), ("version_1", 40)):
        save(tmp_path / run / "checkpoints/last.ckpt", {"global_step": step})
        (tmp_path / run / "config.yaml").touch()
    assert find_checkpoint(str(tmp_path / "version_1")) == str(tmp_path / "version_1/checkpoints/last.ckpt")
    message = rf"2 runs; choose one of them: {tmp_path}/version_0 \(step 312\), {tmp_path}/version_1 \(step 40\)"
    with pytest.raises(ValueError, match=message) as error:
        find_checkpoint(str(tmp_path))
    assert user_error(error.value) is error.value


def test_writing_beside_checkpoints_of_later_steps_is_refused(tmp_path):
    early, late = (str(save(tmp_path / f"{step}.ckpt", {"global_step": step})) for step in (7, 56))
    with pytest.raises(ValueError, match=r"56\.ckpt is of step 56, and this run, which resumes from step 7 .*7\.ckpt"):
        require_nothing_ahead([tmp_path], early)
    with pytest.raises(ValueError, match=r"56\.ckpt is of step 56, and this run, which starts from scratch"):
        require_nothing_ahead([tmp_path], None)
    require_nothing_ahead([tmp_path], late)
    require_nothing_ahead([tmp_path / "elsewhere"], early)


def test_file_without_a_checksum_is_read_with_a_warning(tmp_path):
    torch.save(CONTENT, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match=r"old\.ckpt has no checksum"):
        assert same(read_checkpoint(tmp_path / "old.ckpt"))


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Path.cwd() / "it_ran"),)


@pytest.mark.filterwarnings("ignore:.*no checksum")
@pytest.mark.parametrize("checked", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, checked):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    save(path, {"x": Code()}) if checked else torch.save({"x": Code()}, path)
    with pytest.raises(ValueError, match="contains more than tensors and plain values"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        CheckedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "it_ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "it_ran").exists()  # it would have


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_file_before_and_no_other(file, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"last\.ckpt of step 8 cannot be written: No space left on device") as error:
        save(file, {"global_step": 8})
    assert user_error(error.value) is error.value
    monkeypatch.undo()
    assert same(read_checkpoint(file))
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("parent", ["runs/demo/version_0", ""])
def test_directory_that_cannot_be_written_is_named(tmp_path, parent):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written to .*Not a directory.*save_dir"):
        require_writable(tmp_path / "file" / parent, "--save_dir")


def test_writable_directory_need_not_exist_and_is_not_made(tmp_path):
    require_writable(tmp_path / "runs/demo", "--save_dir")
    assert list(tmp_path.iterdir()) == []


def test_every_strategy_writes_through_it(tmp_path):
    trainer = L.Trainer(plugins=[CheckedCheckpointIO()], strategy="ddp", accelerator="cpu", devices=1, logger=False)
    assert isinstance(trainer.strategy.checkpoint_io, CheckedCheckpointIO)
