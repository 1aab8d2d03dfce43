"""Throughput: the speed of training, and its peak memory."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from fourier_moe.errors import UserError
from lightning_modules.callbacks.any_module import num_examples, real_tokens
from lightning_modules.callbacks.monitoring.logged import log_now
from lightning_modules.callbacks.monitoring.peak_memory import peak_resident_bytes

GIB = 2**30


class Throughput(L.Callback):
    """Log speed and peak memory of training over all processes. Validation does not count, waiting for data does.

    Lightning's ThroughputMonitor waits for the GPU in every step, and knows neither padding nor steps of several batches.

    Every interval:

    - `speed/step_seconds`, per optimizer step; `speed/samples_per_second`; `speed/tokens_per_second`, without padding, where
      the task knows its padding (`Task.token_mask`), or batches of another LightningModule have an `attention_mask` (B, L);
    - `memory/gpu_peak_gib`, memory of tensors since training began, and `memory/process_peak_gib`, resident memory of the
      process since it began (not on Windows), each of the process that took most.

    The GPU is synchronized once per interval.

    Args:
        every_n_steps: optimizer steps in an interval; null for the trainer's log_every_n_steps.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps={every_n_steps} must be 1 or more, or null")
        self.every_n_steps = every_n_steps
        self._device = torch.device("cpu")
        self._started: float | None = None  # start of the interval, moved forward by what does not count
        self._paused = 0.0
        self._last_step = self._first_step = 0
        self._samples = 0
        self._tokens: torch.Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._started = None
        self._last_step = trainer.global_step
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._started is None:
            self._begin(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        interval = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not interval:  # log_every_n_steps: 0 logs nothing
            return
        self._samples += num_examples(batch)
        mask = real_tokens(pl_module, batch)
        if mask is not None:
            tokens = mask.sum()  # stays on its device, so that no step waits for it
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
        step = trainer.global_step
        if step != self._last_step and step % interval == 0:  # the same step: gradients are being accumulated
            self._log(trainer)
            self._begin(trainer)
        self._last_step = step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = self._now()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._started is not None:
            self._started += self._now() - self._paused

    def _begin(self, trainer: L.Trainer) -> None:
        self._started, self._first_step = self._now(), trainer.global_step
        self._samples, self._tokens = 0, None

    def _log(self, trainer: L.Trainer) -> None:
        assert self._started is not None
        seconds = self._now() - self._started
        counts = [torch.tensor(float(self._samples)), *([] if self._tokens is None else [self._tokens.float()])]
        totals = self._reduce(trainer, torch.stack([count.to(self._device) for count in counts]), "sum")
        metrics = {"speed/step_seconds": seconds / (trainer.global_step - self._first_step)}
        names = ("speed/samples_per_second", "speed/tokens_per_second")
        metrics |= {name: total / seconds for name, total in zip(names, totals, strict=False)}
        peaks = self._peaks()
        log_now(trainer, metrics | dict(zip(peaks, self._reduce(trainer, torch.tensor([*peaks.values()]), "max"), strict=True)))

    def _peaks(self) -> dict[str, float]:
        peaks = {}
        if self._device.type == "cuda":
            peaks["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
        resident = peak_resident_bytes()
        if resident is not None:
            peaks["memory/process_peak_gib"] = resident / GIB
        return peaks

    def _reduce(self, trainer: L.Trainer, values: torch.Tensor, operation: str) -> list[float]:
        reduced = trainer.strategy.reduce(values.to(self._device), reduce_op=operation)
        assert isinstance(reduced, torch.Tensor)
        return reduced.tolist()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
