"""The blocks of a transformer, the units of sharding and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import Adapter
from fourier_moe.errors import UserError


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost nn.ModuleList or nn.Sequential around each adapter, in the model's order.

    For a model without adapters (head only), return those of its largest list; for a model without lists, none.
    """
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList | nn.Sequential) and name and not inside:
            lists[name] = module
    adapted = [one for one in lists.values() if any(isinstance(module, Adapter) for module in one.modules())]
    if not adapted and lists:
        adapted = [max(lists.values(), key=lambda one: sum(parameter.numel() for parameter in one.parameters()))]
    return [block for one in adapted for block in one.children() if any(True for _ in block.parameters())]


def checkpoint_activations(model: nn.Module) -> None:
    """Let every block keep only its input, and recompute the rest in the backward pass.

    Checkpointing is non-reentrant, since the reentrant kind runs the first forward without gradients, and the routers' balance
    loss would have none. Names of modules and parameters do not change.

    Raises:
        UserError: if the model has no blocks.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError(
            f"activation_checkpointing=True recomputes transformer blocks, and {type(model).__name__} has no list of them; "
            "set it to false"
        )
    for block in blocks:
        block.forward = partial(_recompute, block, block.forward)


def _recompute(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute in training only: an evaluation has no backward pass, and may fill a cache, which must happen once."""
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
