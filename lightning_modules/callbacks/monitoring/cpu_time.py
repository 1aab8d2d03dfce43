"""Duration of training on a CPU: a lower bound before anything is downloaded, an estimate after the first steps."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.nn import functional as F

from lightning_modules.tasks import Task
from lightning_modules.tasks.base import task_data

MIN_REPORTED_SECONDS = 1800.0
_TOKENS, _WIDTH, _HIDDEN = 512, 768, 3072  # shape of the measured product, the largest of ViT-B's blocks
_REPEATS = 3
_MIN_FLOP = 1e14  # less takes minutes on any machine, so nothing is measured


def bound_cpu_time(trainer: L.Trainer, task: Task, data: L.LightningDataModule | None) -> None:
    """Print the minimum duration of `fit` on this CPU, if it is long, and what to change.

    The bound counts the products of the frozen model, forward and backward to its activations, at the measured rate of one
    product. Tasks and data whose sizes are unknown before loading are left to `StepTime`.
    """
    told = task_data(data)
    num_examples = told.num_train_examples
    per_example = task.forward_flops() if num_examples else None
    if num_examples is None or per_example is None:
        return
    per_example *= 2
    batch_size = told.batch_size * trainer.world_size
    steps = num_steps(trainer, math.ceil(num_examples / batch_size))
    per_step = min(batch_size * trainer.accumulate_grad_batches, num_examples)
    if steps is None or steps * per_step * per_example < _MIN_FLOP:
        return
    rate = _flops_per_second(trainer.precision_plugin.forward_context)
    seconds = steps * per_step * per_example / rate / trainer.num_nodes
    if seconds < MIN_REPORTED_SECONDS:
        return
    epoch = readable_time(num_examples * per_example / rate)
    advice = f"For a first look: configs/demo.yaml (minutes), or --trainer.max_epochs 1 --data.batch_size 32 (at least {epoch})"
    if "16" in str(trainer.precision):
        faster = _flops_per_second(torch.no_grad) / rate
        if faster > 1.5:
            advice = f"--trainer.precision 32-true is {faster:.0f} times as fast on this CPU. {advice}"
    rank_zero_info(
        f"This run has no GPU: {steps:,} steps of {per_step:,} take at least {readable_time(seconds)} on this CPU "
        f"({per_example / 1e9:.1f} GFLOP an example, {rate / 1e9:.0f} GFLOP/s measured in {trainer.precision}). {advice}"
    )


class StepTime(L.Callback):
    """Estimate after the first steps on a CPU how long the rest will take, and print it if that is long."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if len(self._ends) > _REPEATS:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) > _REPEATS:  # the first batch warms up
            seconds = (self._ends[-1] - self._ends[0]) / _REPEATS * trainer.accumulate_grad_batches
            left = trainer.estimated_stepping_batches - trainer.global_step
            if MIN_REPORTED_SECONDS < left * seconds < math.inf:
                rank_zero_info(
                    f"A step takes {seconds:.1f} s on this CPU ({_REPEATS} batches measured): the {int(left):,} to go take "
                    f"about {readable_time(left * seconds)}, validation aside"
                )


def num_steps(trainer: L.Trainer, batches: int) -> int | None:
    """Return the optimizer steps of `fit` with this many batches in an epoch; None if it has no end."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * steps)
    return min(bounds, default=None)


def readable_time(seconds: float) -> str:
    """Format a duration, such as 40 min, 3.5 h or 2.1 days."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _flops_per_second(context: Any) -> float:
    x, weight = torch.ones(_TOKENS, _WIDTH), torch.ones(_HIDDEN, _WIDTH)  # draws no random numbers of the run
    with torch.no_grad(), context():
        F.linear(x, weight)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            F.linear(x, weight)
        return _REPEATS * 2 * _TOKENS * _WIDTH * _HIDDEN / (time.perf_counter() - start)
