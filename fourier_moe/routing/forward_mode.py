"""Which transforms and forward-mode derivatives (torch.func, torch.autograd.forward_ad) a function is called under."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Return whether a transform of torch.func (grad, vmap, ...) calls. Never while torch.compile traces."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def has_tangent(*tensors: Tensor) -> bool:
    """Return whether a forward-mode derivative runs through one of the tensors. Never while torch.compile traces."""
    return not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
