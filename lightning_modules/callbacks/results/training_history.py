"""TrainingHistory: what a run has learned, in files that need no logger."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from fourier_moe.errors import UserError
from fourier_moe.files.writing import write_file
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
        self._begin()

    def _begin(self) -> None:
        self.rows: list[Row] = []
        self._losses: list[float] = []  # logged since the last row
        self._step = 0  # the newest whose loss was looked at
        self._seconds = 0.0  # before `_start`
        self._start: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin()  # a checkpoint's rows come after this

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "losses": self._losses, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._losses, self._seconds = state_dict["rows"], state_dict["losses"], state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        is_new, self._step = step != self._step, step  # several batches of a step have the same number
        if is_new and every and step % every == 0 and TRAIN_LOSS in trainer.logged_metrics:
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
            self._write(trainer, {"metrics.csv": _csv(self.rows)})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rows = [row for row in self.rows if not math.isnan(row.get(self.monitor, math.nan))]
        choose = max if self.mode == "max" else min
        results = {
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 3),
            "trained_parameters": sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad),
            "monitor": self.monitor,
            "best": choose(rows, key=lambda row: row[self.monitor]) if rows else None,
            "last": self.rows[-1] if self.rows else None,
        }
        files: dict[str, str | bytes] = {"results.json": json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n"}
        if len(self.rows) > 1 and trainer.is_global_zero:
            files["metrics.png"] = _png(curves(self.rows, self.monitor))
        self._write(trainer, files)
        self._seconds, self._start = self._elapsed(), None

    def _elapsed(self) -> float:
        return self._seconds + (time.monotonic() - self._start if self._start is not None else 0.0)

    def _write(self, trainer: L.Trainer, files: Mapping[str, str | bytes]) -> None:
        """Write files of the run; an error ends all processes, which would otherwise wait for the first."""
        directory, problem, cause = run_directory(trainer), None, None
        if trainer.is_global_zero:
            try:
                for name, content in files.items():
                    write_file(directory / name, content)
            except OSError as error:
                problem, cause = f"the history of step {trainer.global_step} was not written: {error}", error
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise UserError(problem) from cause


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


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since matplotlib is slow to import

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has_csv_logger(trainer: L.Trainer) -> bool:
    return any(isinstance(logger, CSVLogger) for logger in trainer.loggers)


def _csv(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
