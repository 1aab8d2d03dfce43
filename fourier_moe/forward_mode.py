"""Forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) of functions that torch has no rule for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative runs through one of the tensors. Never while torch.compile traces."""
    return not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
