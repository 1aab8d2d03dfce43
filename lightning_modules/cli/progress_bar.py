"""A progress bar that fits 80 columns."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning_utilities.core.imports import RequirementCache


def progress_bar() -> ProgressBar:
    """Return Lightning's own choice of a bar, with short metrics."""
    return RichBar() if RequirementCache("rich>=10.2.2") else TQDMBar()


class _ShortMetrics(ProgressBar):
    """Without the version of the logger, and without `val/` where the name is then not another's."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        short = {name: name.removeprefix("val/") for name in metrics}
        return {name if short[name] in metrics else short[name]: value for name, value in metrics.items()}


class RichBar(_ShortMetrics, RichProgressBar):
    """Lightning's RichProgressBar with short metrics and a short bar."""

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        columns: list[Any] = super().configure_columns(trainer)
        for column in columns:
            if hasattr(column, "bar_width"):
                column.bar_width = 6
        return columns


class TQDMBar(_ShortMetrics, TQDMProgressBar):
    """Lightning's TQDMProgressBar with short metrics."""
