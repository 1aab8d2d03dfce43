"""AdaptiveBalance: as much load balancing as a layer needs, and no more."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from fourier_moe import Adapter, RouterStatistics, StatisticsReader, adapters


class AdaptiveBalance(L.Callback):
    """Raise a layer's `balance_weight` while its experts are used unevenly, lower it while they are used evenly.

    Even is what `RouterStatistics.load_entropy` says: 1 for an even load. The balancing loss pulls every router to the same
    even load, which specialized experts do not have; a weight that falls where balance holds by itself leaves them free. The
    mean weight is logged as `adaptive_balance/weight`. A model without routers is ignored.

    Args:
        target: load entropy to hold.
        factor: by how much a weight changes at a time.
        every_n_steps: optimizer steps between two changes.
        limits: smallest and largest weight.
    """

    def __init__(
        self,
        target: float = 0.95,
        factor: float = 1.5,
        every_n_steps: int = 20,
        limits: tuple[float, float] = (1e-5, 1.0),
    ) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target={target} must be more than 0 and at most 1")
        if not factor > 1:
            raise ValueError(f"factor={factor} must be more than 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more")
        if not 0 < limits[0] <= limits[1]:
            raise ValueError(f"limits={limits} must be above 0 and in order")
        self.target, self.factor, self.every_n_steps, self.limits = target, factor, every_n_steps, limits
        self._weights: dict[str, float] = {}  # by layer
        self._projections: dict[str, Adapter] = {}
        self._reader: StatisticsReader | None = None
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reader, self._projections = StatisticsReader(pl_module), adapters(pl_module)
        self._last_step = trainer.global_step
        for layer, weight in self._weights.items():  # of the checkpoint that the run resumes from
            self._projections[layer].balance_weight = weight

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step != self._last_step and step % self.every_n_steps == 0
        self._last_step = step
        if not due or self._reader is None or not self._reader.routers:
            return
        low, high = self.limits
        for layer, statistics in self._reader.read().items():
            sums = trainer.strategy.reduce(statistics.sums, reduce_op="sum")  # all processes change the weight alike
            even = RouterStatistics(sums).load_entropy >= self.target
            weight = self._projections[layer].balance_weight * (1 / self.factor if even else self.factor)
            self._projections[layer].balance_weight = self._weights[layer] = min(max(weight, low), high)
        mean = torch.tensor([*self._weights.values()]).mean()
        for logger in trainer.loggers:
            logger.log_metrics({"adaptive_balance/weight": float(mean)}, step=max(step - 1, 0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._weights = dict(state_dict["weights"])

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader, self._projections = None, {}
