"""The files of a run that need no logger, images in loggers other than TensorBoard, and the metrics beside the bar."""

import csv
import json
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger
from support.token_task import ADAPTER, TokenModel, token_batch
from torch.utils.data import DataLoader

from fourier_moe import inject
from fourier_moe.errors import UserError
from lightning_modules.callbacks import TrainingHistory
from lightning_modules.callbacks.monitoring.logged import show_images, takes_images
from lightning_modules.callbacks.results import training_history
from lightning_modules.callbacks.results.training_history import curves
from lightning_modules.cli.progress_bar import TQDMBar, progress_bar

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs


class Own(L.LightningModule):
    def __init__(self, scores):
        super().__init__()
        self.model = TokenModel(2)
        inject(self.model, ADAPTER)
        self.scores = iter(scores)

    def training_step(self, batch, batch_idx):
        loss = self.model(batch["tokens"], batch["mask"]).square().mean()
        self.log("train/loss", float(self.trainer.fit_loop.epoch_loop.total_batch_idx))
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val/score", next(self.scores))
        self.log("train/other", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(directory, history, ckpt_path=None, scores=(0.5, 0.75, 0.25, 0.5), num_batches=4, log_every_n_steps=2, **options):
    data = DataLoader([token_batch(2)] * num_batches, batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        default_root_dir=directory,
        callbacks=[history],
        accelerator="cpu",
        log_every_n_steps=log_every_n_steps,
        **quiet,
        **options,
    )
    module = Own(scores)
    if ckpt_path:
        next(module.scores), next(module.scores)
    trainer.fit(module, data, DataLoader([token_batch(2)], batch_size=None), ckpt_path=ckpt_path)
    return trainer


def rows(directory):
    with open(directory / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_per_validation_that_a_resumed_run_continues(tmp_path):
    history = TrainingHistory("val/score")
    trainer = fit(tmp_path, history, max_epochs=2)
    first = rows(tmp_path)
    assert [(row["epoch"], row["step"], row["train/loss"], row["val/score"]) for row in first] == [
        ("1", "4", "2.0", "0.5"),  # the losses logged at steps 2 and 4 are 1 and 3
        ("2", "8", "6.0", "0.75"),
    ]
    assert "train/other" not in first[0]
    trainer.save_checkpoint(tmp_path / "two.ckpt")

    fit(tmp_path, TrainingHistory("val/score"), tmp_path / "two.ckpt", max_epochs=3)
    assert rows(tmp_path)[:2] == first
    assert [row["val/score"] for row in rows(tmp_path)] == ["0.5", "0.75", "0.25"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["steps"], results["best"]["epoch"], results["last"]["epoch"]) == (12, 2, 3)
    assert results["seconds"] >= results["last"]["seconds"] >= float(first[1]["seconds"])
    assert results["trained_parameters"] > 0
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_no_validation_one_row_and_fast_dev_run(tmp_path):
    history = TrainingHistory("val/score", "min")
    fit(tmp_path / "none", history, max_epochs=1, limit_val_batches=0)
    assert json.loads((tmp_path / "none/results.json").read_text())["best"] is None
    fit(tmp_path / "one", TrainingHistory("val/score", "min"), max_epochs=1)
    assert not (tmp_path / "one/metrics.png").exists()
    fit(tmp_path / "fast", TrainingHistory("val/score", "min"), fast_dev_run=True)
    assert not (tmp_path / "fast").exists() or not list((tmp_path / "fast").iterdir())
    with pytest.raises(UserError, match="mode='best'"):
        TrainingHistory(mode="best")


def test_a_score_that_is_not_a_number_is_not_the_best(tmp_path):
    fit(tmp_path, TrainingHistory("val/score", "min"), max_epochs=2, scores=[0.5, math.nan])
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["best"]["val/score"], results["last"]["val/score"]) == (0.5, None)


def test_only_logged_steps_count_under_accumulation_and_a_second_run_begins_anew(tmp_path):
    history = TrainingHistory("val/score")
    for directory, every, loss in (("two", 2, "7.0"), ("one", 1, "5.0"), ("none", 0, "7.0")):  # of batches 0 to 7
        fit(tmp_path / directory, history, max_epochs=1, num_batches=8, accumulate_grad_batches=4, log_every_n_steps=every)
        assert [row["train/loss"] for row in rows(tmp_path / directory)] == [loss]
    assert history.state_dict()["seconds"] == history.state_dict()["seconds"]  # the clock has stopped


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(training_history, "write_file", full)
    with pytest.raises(UserError, match="the history of step 4 was not written: No space left"):
        fit(tmp_path, TrainingHistory("val/score"), max_epochs=1)


@pytest.mark.parametrize(("monitor", "panels"), [("val/loss", [2]), ("val/score", [2, 1])])
def test_curves(monitor, panels):
    points = [{"step": step, "train/loss": 1.0, "val/loss": 1.0, "val/score": 1.0} for step in (1, 2)]
    figure = curves([*points, {"step": 3, "train/loss": 2.0}], monitor)
    assert [len(axes.lines) for axes in figure.axes] == panels
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 2, 3]


def test_images_go_to_mlflow(monkeypatch):
    shown = []
    logger = MLFlowLogger.__new__(MLFlowLogger)
    experiment = type("Client", (), {"log_image": staticmethod(lambda *arguments: shown.append(arguments))})
    monkeypatch.setattr(MLFlowLogger, "experiment", experiment)
    monkeypatch.setattr(MLFlowLogger, "run_id", "abc")
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    assert not takes_images(trainer)
    trainer.loggers = [logger]
    assert takes_images(trainer)
    image = np.zeros((2, 2, 4), np.uint8)
    show_images(trainer, {"router/load_map": image})
    assert shown == [("abc", image, "router/load_map/step_000000.png")]


def test_images_go_to_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer = L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False)
    show_images(trainer, {"router/load_map": np.zeros((2, 2, 4), np.uint8)})
    logger.experiment.finish()
    assert list(tmp_path.rglob("media/images/router/load_map*.png"))


def test_metrics_beside_the_bar_are_short(monkeypatch):
    metrics = {"v_num": 3, "loss": 1.0, "val/loss": 2.0, "val/accuracy": 0.5}
    monkeypatch.setattr(L.pytorch.callbacks.ProgressBar, "get_metrics", lambda *_: dict(metrics))
    for bar in (progress_bar(), TQDMBar()):
        assert bar.get_metrics(None, None) == {"loss": 1.0, "val/loss": 2.0, "accuracy": 0.5}
