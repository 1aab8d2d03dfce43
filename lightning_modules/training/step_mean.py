"""StepMean: every label token, or example, of an optimizer step weighs the same, whatever batch and process it came in."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer


class StepMean:
    """Make the gradient of an optimizer step that of one batch of all its examples.

    A batch's loss is a mean, over the label tokens of a language model or over examples. Lightning gives the batches of a step
    and the processes equal shares of its gradient, so that a token of a batch with few label tokens counts for more than one of
    a batch with many, and it divides by `accumulate_grad_batches` also where an epoch ends with fewer batches. Here each loss
    counts by its weight: what the batch's mean is over. The sum of the weights is known after the last batch, so the gradients
    are divided by it then, in one operation, before anything reads them. transformers' Trainer does the same with
    `num_items_in_batch`, which it knows beforehand because it reads all batches of a step at once.

    A single batch on a single process needs none of this and is left as it is, to the bit.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # of the batches of this step so far, on this process
        self._unit: float | None = None  # a power of 2, which rounds nothing

    def reset(self) -> None:
        """Forget an unfinished step."""
        self._total = None

    def weigh(self, loss: Tensor, weight: Tensor, trainer: L.Trainer) -> Tensor:
        """The loss as it goes into the backward pass.

        Args:
            loss: of a batch, divided by `accumulate_grad_batches`.
            weight: what its mean is over, a scalar of 0 or more.
            trainer: knows whether the step has other batches.
        """
        if trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            return loss
        if self._unit is None:  # without one, float16 gradients of a large batch would overflow
            first = trainer.strategy.broadcast(float(weight))
            self._unit = 2.0 ** round(math.log2(first)) if first > 0 else 1.0
        own = weight.to(loss.device, torch.float32) / self._unit
        self._total = own if self._total is None else self._total + own
        return loss * own

    def divide(self, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Divide the gradients, which are a mean over the processes by now, by the weight of the whole step."""
        if self._total is None:
            return
        total = trainer.strategy.reduce(self._total, reduce_op="sum")
        assert isinstance(total, Tensor)
        shares = trainer.accumulate_grad_batches * trainer.world_size  # what the sum has been divided by
        factor = torch.where(total > 0, shares / total, 0.0)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        self._total = None
