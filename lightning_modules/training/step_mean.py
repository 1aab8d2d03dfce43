"""StepMean: give every label token, or example, of an optimizer step the same weight in all batches and processes."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer


class StepMean:
    """Make the gradient of an optimizer step equal to that of one batch with all its examples.

    A batch's loss is a mean over the label tokens of a language model, or over examples. Lightning weights the batches and
    processes of a step equally, so a token in a batch with few label tokens counts more than one in a batch with many. It also
    divides by `accumulate_grad_batches` if an epoch ends with fewer batches. Here each loss is multiplied by its weight, the
    number that the batch's mean is over. The sum of the weights is known after the last batch; the gradients are then divided
    by it in one operation, before anything reads them. transformers' Trainer does the same with `num_items_in_batch`, which it
    knows in advance because it reads all batches of a step at once.

    With a single batch on a single process the loss is not changed at all.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # of the batches of this step so far, on this process
        self._unit: float | None = None  # a power of 2, so that dividing by it is exact

    def reset(self) -> None:
        """Forget an unfinished step."""
        self._total = None

    def weigh(self, loss: Tensor, weight: Tensor, trainer: L.Trainer) -> Tensor:
        """Return the loss for the backward pass.

        Args:
            loss: the loss of a batch, divided by `accumulate_grad_batches`.
            weight: what its mean is over, a scalar of 0 or more.
            trainer: the trainer, which knows whether the step has other batches.
        """
        if trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            return loss
        if self._unit is None:  # keeps float16 gradients of a large batch from overflowing
            first = trainer.strategy.broadcast(float(weight))
            self._unit = 2.0 ** round(math.log2(first)) if first > 0 else 1.0
        own = weight.to(loss.device, torch.float32) / self._unit
        self._total = own if self._total is None else self._total + own
        return loss * own

    def divide(self, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Divide the gradients, which by now are a mean over the processes, by the weight of the whole step."""
        if self._total is None:
            return
        total = trainer.strategy.reduce(self._total, reduce_op="sum")
        assert isinstance(total, Tensor)
        shares = trainer.accumulate_grad_batches * trainer.world_size  # Lightning has divided the sum by this
        factor = torch.where(total > 0, shares / total, 0.0)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        self._total = None
