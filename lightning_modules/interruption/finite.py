"""A run ends at once when its loss or a weight is not finite. Uses the private `_trainer` of LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from fourier_moe.errors import UserError


def require_finite_loss(module: L.LightningModule, losses: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
    """Stop all processes before a loss that is nan or infinite reaches a weight.

    Args:
        losses: the parts of the loss by name.
        batch: its examples' ids are named.

    Raises:
        UserError: on every process, with step, cause and advice.
    """
    own = not all(bool(loss.isfinite()) for loss in losses.values())
    trainer = module._trainer  # None where someone calls training_step alone
    if not (own if trainer is None else trainer.strategy.reduce_boolean_decision(own, all=False)):
        return
    place = f"the loss is not finite at step {module.global_step} of epoch {module.current_epoch}"
    if not own:
        raise UserError(f"{place} on another process, whose message names the cause")
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
    """Keep the last good checkpoint: one with weights that are nan or infinite is not written.

    Raises:
        UserError: naming step and weights.
    """
    names = _not_finite(state.items())
    if names:
        raise UserError(
            f"no checkpoint is written at step {trainer.global_step} of epoch {trainer.current_epoch}, since these trained "
            f"weights are not finite: {names}; {_advice(trainer.optimizers)}"
        )


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    names = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _advice(optimizers: list[Optimizer]) -> str:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = ", ".join(f"{group['name']} {group['initial_lr']:g}" for group in groups)
    return (
        f"lower the learning rates (now at most: {rates}) or set --trainer.gradient_clip_val 1, and go on from the newest good "
        "checkpoint with --ckpt_path RUN_DIRECTORY"
    )
