"""TrainingHistory: what a run has learned, in files that need no logger."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from fourier_moe.errors import UserError
from fourier_moe.files.writing import replacing, write_file
from fourier_moe.inject import adapter_config
from fourier_moe.report import trained_parameters
from lightning_modules.callbacks.any_module import adapted_model
from lightning_modules.run_directory import run_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN_LOSS = "train/loss"
Row = dict[str, float]


class TrainingHistory(L.Callback):
    """Write metrics.csv at every validation; at the end also metrics.png, the curves, and results.json.

    metrics.csv has a row per validation: epoch (from 1), step, seconds of training, the mean of the training loss that was
    logged since the row before, and all that validation has logged. With CSVLogger it is that logger's own file. A resumed
    run continues its checkpoint's rows. results.json has the best and the last row, the sizes and the seconds. Runs with
    fewer than two rows have no picture, and fast_dev_run leaves nothing.

    Args:
        monitor: the logged value that selects the best row, and is drawn beside the loss.
        mode: whether `max` or `min` is best.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise UserError(f"mode={mode!r} must be 'max' or 'min'")
        self.monitor, self.mode = monitor, mode
        self.rows: list[Row] = []
        self._losses: list[float] = []
        self._seconds = 0.0  # before `_start`
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "losses": self._losses, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._losses, self._seconds = state_dict["rows"], state_dict["losses"], state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 and TRAIN_LOSS in trainer.logged_metrics:  # type: ignore[attr-defined]
            self._losses.append(float(trainer.logged_metrics[TRAIN_LOSS]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = trainer.callback_metrics
        losses = self._losses or [float(logged[name]) for name in (TRAIN_LOSS,) if name in logged]
        row: Row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "seconds": round(self._elapsed(), 3)}
        row |= {TRAIN_LOSS: sum(losses) / len(losses)} if losses else {}
        self.rows.append(row | {name: float(value) for name, value in logged.items() if name.startswith("val/")})
        self._losses = []
        if not trainer.fast_dev_run and not _has_csv_logger(trainer):  # type: ignore[attr-defined]
            self._write(run_directory(trainer) / "metrics.csv", _csv(self.rows))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer)
        if len(self.rows) > 1:
            self._draw(directory / "metrics.png")
        model = adapted_model(pl_module, self)
        trained = trained_parameters(model, adapter_config(model))
        rows = [row for row in self.rows if not math.isnan(row.get(self.monitor, math.nan))]
        choose = max if self.mode == "max" else min
        results = {
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 3),
            "trained_parameters": {kind: sum(p.numel() for p in tensors) for kind, tensors in trained.items() if tensors},
            "monitor": self.monitor,
            "best": choose(rows, key=lambda row: row[self.monitor]) if rows else None,
            "last": self.rows[-1] if self.rows else None,
        }
        self._write(directory / "results.json", json.dumps(results, indent=2) + "\n")

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._start if self._start else 0.0)

    @rank_zero_only
    def _write(self, path: Path, text: str) -> None:
        write_file(path, text)

    @rank_zero_only
    def _draw(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since matplotlib is slow to import

        buffer = io.BytesIO()
        FigureCanvasAgg(curves(self.rows, self.monitor)).print_png(buffer)
        with replacing(path) as file:
            file.write(buffer.getvalue())


def curves(rows: list[Row], monitor: str) -> Figure:
    """Draw the losses, and beside them the monitored value, over the steps."""
    from matplotlib.figure import Figure

    panels = [[TRAIN_LOSS, "val/loss"], *([] if monitor in (TRAIN_LOSS, "val/loss") else [[monitor]])]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=name)
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    return figure


def _has_csv_logger(trainer: L.Trainer) -> bool:
    return any(isinstance(logger, CSVLogger) for logger in trainer.loggers)


def _csv(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
