"""AdapterCheckpoint: the adapter files of a run."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fourier_moe import save_adapter
from fourier_moe.errors import UserError
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adapted_model
from lightning_modules.run_directory import run_directory


class AdapterCheckpoint(L.Callback):
    """Write the adapter to `<run directory>/adapter` whenever validation improves, and to `adapter_last` beside it at the end.

    The values of both are printed at the end. If an adapter cannot be written, or holds NaN, the run ends with an error that
    names the step and the cause, and the previous adapter is kept.

    If the best adapter disappears during the run (someone deletes or moves the run directory), the run continues, keeps the
    best from then on, and ends with an error that says so.

    Without validation only `adapter_last` is written, with fast_dev_run nothing. A run that resumes in another directory
    starts its own record, as ModelCheckpoint does.

    Args:
        monitor: the logged value that selects the best adapter.
        mode: whether `max` or `min` is best.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise UserError(f"mode={mode!r} must be 'max' or 'min'")
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None
        self._last: tuple[int, float] | None = None  # step and value of the newest validation
        self._written = False  # whether this run, or the one that it resumes, wrote the best adapter
        self._lost: int | None = None  # step at which the best adapter was found to be missing

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adapted_model(pl_module, self)  # or an error before training
        self._written = self._is_there(trainer)
        if not self._written:
            self.best = None
        self._last = self._lost = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"AdapterCheckpoint: monitor={self.monitor!r} is not logged; logged: {known}")
        self._check(trainer)
        value = float(trainer.callback_metrics[self.monitor])
        self._last = trainer.global_step, value
        better = self.best is None or math.isnan(self.best) or (value > self.best if self.mode == "max" else value < self.best)
        if better:
            self._save(trainer, pl_module, "adapter")
            self.best = value

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module, "adapter_last")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._check(trainer)
        directory = run_directory(trainer)
        best = f"best {self.monitor} {self.best:.4f}: {directory / 'adapter'}; " if self.best is not None else ""
        validated = self._last is not None and self._last[0] == trainer.global_step
        last = f"last {self.monitor} {self._last[1]:.4f}" if self._last and validated else "last, not validated"
        rank_zero_info(f"Adapter written: {best}{last}: {directory / 'adapter_last'}")
        if self._lost is not None:
            raise UserError(
                f"the best adapter of the first {self._lost} steps is lost: {directory} was deleted or moved during the run; "
                "only the files named above were written since"
            )

    def _is_there(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.broadcast((run_directory(trainer) / "adapter").is_dir())

    def _check(self, trainer: L.Trainer) -> None:
        if self._written and not self._is_there(trainer):
            self.best, self._written, self._lost = None, False, trainer.global_step
            rank_zero_warn(f"{run_directory(trainer)} was deleted or moved during the run: its best adapter is gone")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer) / name
        problem, cause = None, None
        if trainer.is_global_zero:
            logged = trainer.callback_metrics.items()
            metrics = {key: float(value) for key, value in logged if key.startswith(("train/", "val/"))}
            try:
                if isinstance(pl_module, AdaptationModule):
                    pl_module.save_adapter(directory, metrics)
                else:
                    save_adapter(adapted_model(pl_module, self), directory, metrics=metrics)
            except (ValueError, OSError) as error:
                problem, cause = f"the adapter of step {trainer.global_step} was not written: {error}", error
        problem = trainer.strategy.broadcast(problem)  # all processes stop; otherwise the others would wait for one
        if problem:
            raise UserError(problem) from cause
        self._written |= name == "adapter"
