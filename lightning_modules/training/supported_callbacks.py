"""Refuse Lightning's callbacks that do not work here."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info

from fourier_moe.errors import UserError

_REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies the module before its model is built, and would average nothing; use "
    "lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging",
    LearningRateFinder: "finds one learning rate, but experts, router and head have one each; find them with "
    "`compare --adapters config --tune 8`",
    BatchSizeFinder: "changes the batch size after the steps of the schedule are counted; set data.init_args.batch_size",
    ModelPruning: "looks for weights before the model is built, and finds none",
    BaseFinetuning: "freezes weights before the model is built; model.adapter says what is trained",
}
_NEED_LOGGER = (LearningRateMonitor, DeviceStatsMonitor)


def check_callbacks(trainer: L.Trainer) -> None:
    """Refuse callbacks that would fail or do nothing.

    Raises:
        UserError: with the reason, and what to use.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, reason in _REFUSED.items():
            if isinstance(callback, refused):
                raise UserError(f"trainer.callbacks has {type(callback).__name__}, which {reason}")


def check_monitors(trainer: L.Trainer) -> None:
    """Refuse callbacks that monitor a value of validation that nothing logs; called at the end of the sanity check.

    Values of training, and those of a user's callbacks, may come later.

    Raises:
        UserError: naming the callback, the value, and what is logged.
    """
    logged = sorted(trainer.callback_metrics)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor in logged:
            continue
        if monitor.startswith(("val", "test")) or any(name.endswith(f"/{monitor}") for name in logged):
            raise UserError(f"{_name(callback)}: monitor={monitor!r} is not logged; logged: {', '.join(logged)}")


def without_use(callbacks: list[Callback], logger: bool, checkpointing: bool) -> list[Callback]:
    """Return the callbacks without those that need a logger or checkpoints, if the run has none; log which are left out."""
    needless = [
        callback
        for callback in callbacks
        if (not logger and isinstance(callback, _NEED_LOGGER)) or (not checkpointing and isinstance(callback, Checkpoint))
    ]
    if needless:
        rank_zero_info(f"left out, since the run has no logger or no checkpoints: {', '.join(map(_name, needless))}")
    return [callback for callback in callbacks if callback not in needless]


def _name(callback: Callback) -> str:
    return type(callback).__name__
