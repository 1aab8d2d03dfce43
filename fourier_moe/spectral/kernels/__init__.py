"""The routed spectral product as fused GPU kernels, with the signatures of fourier_moe/spectral/torch_product.py."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

OPT_IN = "FOURIER_MOE_TRITON"


def use_triton(x: Tensor) -> bool:
    """Return whether this input goes through the Triton kernels: with FOURIER_MOE_TRITON=1, on a GPU, in float32 or lower.

    Opt-in because they have been checked for exactness by Triton's interpreter only and never been timed on a GPU.
    """
    if os.environ.get(OPT_IN) != "1" or x.element_size() > 4:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None
