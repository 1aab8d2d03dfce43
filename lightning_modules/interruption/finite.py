"""Stop a run as soon as its loss or a weight is not finite. Uses the private `_trainer` of LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from fourier_moe.errors import UserError, shorten


def require_finite_loss(module: L.LightningModule, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
    """Stop all processes before a loss that is nan or infinite changes a weight.

    Args:
        losses: the parts of the loss by name.
        batch: the training batch; the message names some of its ids.

    Raises:
        UserError: on every process, naming the step and the cause.
    """
    own = not all(bool(loss.isfinite()) for loss in losses.values())
    trainer = module._trainer  # None if training_step is called without a trainer
    if not (own if trainer is None else trainer.strategy.reduce_boolean_decision(own, all=False)):
        return
    place = f"the loss is not finite at step {module.global_step} of epoch {module.current_epoch}"
    if not own:
        raise UserError(f"{place} on another process; see its message for the cause")
    values = ", ".join(f"{name} loss {float(loss):g}" for name, loss in losses.items())
    ids = ", ".join(map(str, list(batch["id"])[:4]))
    weights = _not_finite((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)
    cause = (
        f"these trained weights are not finite: {weights}"
        if weights
        else f"all trained weights are finite, so look at the batch (ids {ids}, ...)"
    )
    raise UserError(f"{place}: {values}; {cause}; {_advice(trainer.optimizers if trainer else [])}")


def require_finite_weights(trainer: L.Trainer, state: Mapping[str, Tensor]) -> None:
    """Refuse to write a checkpoint with weights that are nan or infinite, so that the last good one is kept.

    Raises:
        UserError: naming the step and the weights.
    """
    names = _not_finite(state.items())
    if names:
        raise UserError(
            f"no checkpoint is written at step {trainer.global_step} of epoch {trainer.current_epoch}, since these trained "
            f"weights are not finite: {names}; {_advice(trainer.optimizers)}"
        )


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    return shorten(name for name, tensor in tensors if not bool(tensor.isfinite().all()))


def _advice(optimizers: list[Optimizer]) -> str:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = ", ".join(f"{group['name']} {group['initial_lr']:g}" for group in groups)
    return (
        f"lower the learning rates (now at most: {rates}) or set --trainer.gradient_clip_val 1, and resume from the newest "
        "good checkpoint with --ckpt_path RUN_DIRECTORY"
    )
