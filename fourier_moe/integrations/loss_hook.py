"""add_balance_loss: the methods' own losses in `output.loss`, for trainers that take the loss from the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fourier_moe.adapter import adapters
from fourier_moe.errors import UserError
from fourier_moe.inject import balance_loss, is_adapted, regularization
from fourier_moe.routing.recording import recording


def add_balance_loss(model: nn.Module, accumulation_steps: int = 1) -> Callable[[], None]:
    """Add the balance loss and the regularization of an adapted model to the loss that its forward pass returns in training.

    For a trainer that cannot be subclassed. `AdapterTrainerMixin` does more, so prefer it for `transformers.Trainer`.

    Args:
        model: a model adapted by `inject` or by peft, whose output has `loss`, as all heads of transformers return it for
            `labels`.
        accumulation_steps: micro-batches per optimizer step, of all processes together, where the trainer sums their losses
            instead of dividing them (transformers' Trainer does that if the model's forward takes `num_items_in_batch`, as
            language models do).

    Returns:
        A function that takes the hook away again.

    Raises:
        UserError: if the model is not adapted, has the hook already, or accumulation_steps is less than 1; in the first
            training step, if the output has no loss or the trainer ignores it, as those of TRL do.
    """
    if not (is_adapted(model) or adapters(model)):
        raise UserError(f"{type(model).__name__} is not adapted; call inject(model, config), or peft's get_peft_model, first")
    if accumulation_steps < 1:
        raise UserError(f"accumulation_steps={accumulation_steps} must be 1 or more")
    if "forward" in vars(model) and hasattr(model.forward, "without_balance_loss"):
        raise UserError(f"{type(model).__name__} adds its balance loss already")
    forward = model.forward

    @functools.wraps(forward)  # trainers look at the names of its arguments
    def with_balance_loss(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return forward(*args, **kwargs)
        with recording(model, token_mask(kwargs)):
            output = forward(*args, **kwargs)
            extra = own_losses(model) / accumulation_steps
        loss = getattr(output, "loss", None)
        if loss is None or "fused_lm_head" in kwargs:  # TRL's trainers compute their loss of what this returns
            raise UserError(
                f"add_balance_loss: the trainer does not take the loss from the output of {type(model).__name__}, so that the "
                "balance loss would have no effect; call remove() and use AdapterTrainerMixin"
            )
        output.loss = loss + extra.to(loss.device, loss.dtype)
        return output

    with_balance_loss.without_balance_loss = forward  # type: ignore[attr-defined]
    model.forward = with_balance_loss

    def remove() -> None:
        if vars(model).get("forward") is with_balance_loss:
            del model.forward

    return remove


def own_losses(model: nn.Module) -> Tensor:
    """Return what the adapters add to the task's loss, (): balance loss and regularization. Read it inside `recording`."""
    return balance_loss(model) + regularization(model)


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return true for real tokens (B, L), from `attention_mask` where it has this shape; None counts all tokens.

    Packed sequences have no mask, or one of their blocks (B, 1, L, L): they have no padding either.
    """
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
