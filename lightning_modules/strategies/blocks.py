"""The blocks of a transformer: what is sharded together, and what activation checkpointing recomputes."""

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
    """The members of the outermost nn.ModuleList or nn.Sequential around each adapter, in the model's order.

    A model without adapters (head only) has those of its largest one; a model without lists has none.
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
    """Let every block keep its input only, and compute the rest again in the backward pass.

    Non-reentrant: the reentrant kind runs the first forward without gradients, and the routers' balance loss would lose its
    own. Names of modules and parameters stay as they are.

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
    """An evaluation has nothing to compute again, and may fill a cache, which must not happen twice."""
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
