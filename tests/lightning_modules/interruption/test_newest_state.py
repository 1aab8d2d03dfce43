"""After every validation the newest state is on disk, whatever a user's ModelCheckpoint keeps."""

import csv
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.token_task import TokenData, token_module, token_trainer

from fourier_moe import adapter_state_dict
from lightning_modules.callbacks import AdapterCheckpoint
from lightning_modules.interruption import CheckedCheckpointIO, newest_intact, read_checkpoint

BEST, KILLED, EPOCHS = 4, 9, 12  # epochs, counted from 0
STEPS = 3  # of an epoch


class PowerCutError(Exception):
    pass


class Score(L.Callback):
    """Logs val/score, the best of which is epoch 4's."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", -abs(float(trainer.current_epoch) - BEST))


class Epochs(L.Callback):
    """Which epochs were begun; dies at the start of one."""

    def __init__(self, killed=None):
        self.begun, self.killed = [], killed

    def on_train_epoch_start(self, trainer, pl_module):
        self.begun.append(trainer.current_epoch)
        if trainer.current_epoch == self.killed:
            raise PowerCutError


def fit(directory, checkpoints, *callbacks, resume=None, **options):
    trainer = token_trainer(
        directory,
        Score(),
        *checkpoints(),
        *callbacks,
        **{"max_epochs": EPOCHS, "plugins": [CheckedCheckpointIO()], "num_sanity_val_steps": 0, **options},
        enable_checkpointing=True,
    )
    trainer.fit(token_module(), TokenData(), ckpt_path=resume)
    return trainer


SHIPPED = {"monitor": "val/score", "mode": "max", "save_last": True}
CHECKPOINTS = {
    "shipped": [SHIPPED],
    "without save_last": [{"monitor": "val/score", "mode": "max"}],
    "link": [SHIPPED | {"save_last": "link"}],
    "weights only": [SHIPPED | {"save_weights_only": True}],
    "every 10 epochs": [SHIPPED | {"every_n_epochs": 10}],
    "at validation's end": [SHIPPED | {"save_on_train_epoch_end": False}],
    "nothing but the last": [{"save_last": True, "save_top_k": 0}],
    "two": [{"monitor": "val/score", "mode": "max", "save_last": False}, {"filename": "newest", "every_n_train_steps": 4}],
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_run_killed_in_epoch_9_with_the_best_in_epoch_4_goes_on_in_epoch_9(tmp_path, name):
    def checkpoints():
        return [ModelCheckpoint(**options) for options in CHECKPOINTS[name]]

    with pytest.raises(PowerCutError):
        fit(tmp_path, checkpoints, Epochs(KILLED))
    newest, _ = newest_intact(tmp_path, to_resume=True)
    assert read_checkpoint(newest)["global_step"] == KILLED * STEPS
    resumed = Epochs()
    trainer = fit(tmp_path, checkpoints, resumed, resume=newest)
    assert resumed.begun == [9, 10, 11]
    assert trainer.global_step == EPOCHS * STEPS
    straight = fit(tmp_path / "straight", checkpoints)
    ours, theirs = (adapter_state_dict(one.lightning_module.model) for one in (trainer, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {path.name for path in (tmp_path / "straight/checkpoints").iterdir()}
    if CHECKPOINTS[name][0].get("monitor") and name not in ("every 10 epochs", "weights only"):
        assert f"epoch={BEST}-step={(BEST + 1) * STEPS}.ckpt" in kept


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"limit_val_batches": 0}, [3, 6]),  # the monitored value never comes
        ({"val_check_interval": 2}, [2, 5, 6]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [6, 9]),  # the end, not validated
        ({"max_steps": 5}, [3, 5]),
    ],
    ids=["no validation", "two an epoch", "every other epoch", "stopped by max_steps"],
)
def test_last_is_written_after_every_validation_and_at_the_end(tmp_path, monkeypatch, options, written):
    steps = []
    save = CheckedCheckpointIO.save_checkpoint

    def record(self, checkpoint, path, storage_options=None):
        steps.append(checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckedCheckpointIO, "save_checkpoint", record)
    fit(tmp_path, lambda: [ModelCheckpoint(**SHIPPED)], **{"max_epochs": 2, **options})
    assert sorted(set(steps)) == written
    newest, _ = newest_intact(tmp_path)
    assert read_checkpoint(newest)["global_step"] == written[-1]


def test_without_a_model_checkpoint_or_with_save_last_false_nothing_is_added(tmp_path):
    fit(tmp_path, lambda: [ModelCheckpoint(monitor="val/score", mode="max", save_last=False)], max_epochs=6)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=4-step=15.ckpt"]
    trainer = token_trainer(tmp_path / "none", max_epochs=1)
    trainer.fit(token_module(), TokenData())
    assert not list((tmp_path / "none").rglob("*.ckpt"))


def test_best_file_that_a_kill_left_beside_its_successor_is_removed_on_resumption(tmp_path, monkeypatch):
    def die(*_):
        raise PowerCutError

    def checkpoints():
        return [ModelCheckpoint(**SHIPPED)]

    with monkeypatch.context() as patch:
        patch.setattr(ModelCheckpoint, "_remove_checkpoint", die)
        with pytest.raises(PowerCutError):
            fit(tmp_path, checkpoints)
    directory = tmp_path / "checkpoints"
    first, second, third = (f"epoch={epoch}-step={3 * epoch + 3}.ckpt" for epoch in range(3))
    shutil.copy(directory / first, directory / "mine.ckpt")
    assert {path.name for path in directory.iterdir()} == {first, second, "last.ckpt", "mine.ckpt"}
    newest, _ = newest_intact(tmp_path)
    assert newest.name == second
    fit(tmp_path, checkpoints, resume=newest, max_epochs=3)
    left = {path.name for path in directory.iterdir()}
    assert left == {second, third, "last.ckpt", "mine.ckpt"}  # Lightning keeps the file that it resumes from


def test_all_files_of_a_user_who_keeps_all_stay(tmp_path):
    def checkpoints():
        return [ModelCheckpoint(save_top_k=-1), ModelCheckpoint(monitor="val/score", save_top_k=-1, filename="{epoch}")]

    with pytest.raises(PowerCutError):
        fit(tmp_path, checkpoints, Epochs(2))
    newest, _ = newest_intact(tmp_path)
    fit(tmp_path, checkpoints, resume=newest, max_epochs=3)
    names = {path.name for path in tmp_path.rglob("*.ckpt")}
    stems = [stem for epoch in range(3) for stem in (f"epoch={epoch}", f"epoch={epoch}-step={3 * epoch + 3}")]
    assert names == {f"{stem}.ckpt" for stem in stems}


def rows(directory):
    with open(directory / "csv/version_0/metrics.csv", newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("error:Experiment logs directory")
def test_csv_rows_of_a_killed_and_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    def logged(directory, *callbacks, **options):
        logger = CSVLogger(directory, "csv", version=0, flush_logs_every_n_steps=2)
        options = {"max_epochs": 4, "log_every_n_steps": 1, "logger": logger} | options
        return fit(directory, lambda: [ModelCheckpoint(directory / "checkpoints", **SHIPPED)], *callbacks, **options)

    class Late(L.Callback):
        """Dies one batch and one new column after the last checkpoint."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                trainer.logger.log_metrics({"late": 1.0}, step=6)
                trainer.logger.save()
                raise PowerCutError

    logged(tmp_path / "straight")
    with pytest.raises(PowerCutError):
        logged(tmp_path / "killed", Late())
    assert rows(tmp_path / "killed")[-1]["late"] == "1.0"
    newest, _ = newest_intact(tmp_path / "killed")
    resumed = logged(tmp_path / "killed", resume=newest)
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert len(rows(tmp_path / "killed")) > 12
    evaluation = token_trainer(tmp_path, logger=CSVLogger(tmp_path / "killed", "csv", version=0))
    evaluation.validate(resumed.lightning_module, TokenData(), verbose=False)
    assert rows(tmp_path / "killed")[:-1] == rows(tmp_path / "straight")


def test_run_directory_deleted_during_the_run_is_an_error_at_the_end_and_the_adapters_since_are_kept(tmp_path):
    class Delete(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == BEST + 1:
                shutil.rmtree(tmp_path / "run")

    adapter = AdapterCheckpoint("val/score", "max")
    with (
        pytest.warns(UserWarning, match="run was deleted or moved during the run: its best adapter is gone"),
        pytest.raises(ValueError, match=r"the best adapter of the first 18 steps is lost: .*run was deleted or moved"),
    ):
        fit(tmp_path / "run", lambda: [ModelCheckpoint(**SHIPPED)], adapter, Delete(), max_epochs=7)
    assert adapter.best == -1.0
    assert {"adapter", "adapter_last", "checkpoints"} == {path.name for path in (tmp_path / "run").iterdir()}
