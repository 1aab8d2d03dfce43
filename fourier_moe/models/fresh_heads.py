"""Untrained classification heads that an injection would freeze."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from fourier_moe.models.quantization import is_quantized

# What transformers, torchvision and timm call the layers that they create for a task.
_HEADS = ("classifier", "pre_classifier", "classification_head", "score", "pooler", "head", "heads", "fc", "qa_outputs")
_DEPTH = 2  # a head stands in the model, or in the model inside a wrapper


def fresh_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the trainable modules that are called like a head and whose values are those of an initialization, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _HEADS and name.count(".") < _DEPTH and _is_fresh(module)
    }


def warn_of_frozen(heads: Mapping[str, nn.Module]) -> None:
    """Warn of heads that are frozen now and would keep their random values."""
    frozen = [name for name, module in heads.items() if not any(p.requires_grad for p in module.parameters())]
    if frozen:
        warnings.warn(
            f"{', '.join(frozen)} looks newly initialized and is frozen now, as it is neither adapter nor head: it would stay "
            f"random. To train and save it, name it as a head: head={frozen!r} of an adapter config, or a task's head_names",
            stacklevel=3,
        )


def _is_fresh(module: nn.Module) -> bool:
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return bool(linears) and all(map(_looks_initialized, linears))


def _looks_initialized(linear: nn.Linear) -> bool:
    """Return whether the values are what torch or transformers start a Linear with.

    torch: uniform up to 1 / sqrt(in_features), which a trained weight does not respect; transformers: a bias of zeros, which a
    trained one never is, and without a bias, a normal weight whose standard deviation is 0.02.
    """
    weight, bias = linear.weight.detach(), linear.bias
    if not linear.weight.requires_grad:
        return False  # frozen on purpose
    if weight.is_meta or is_quantized(linear) or type(weight) is not torch.Tensor or not weight.numel():
        return False
    bound = linear.in_features**-0.5
    largest = float(weight.abs().max())
    if 0.9 * bound < largest <= bound and (bias is None or float(bias.detach().abs().max()) <= bound):
        return True
    if bias is not None:
        return not bool(bias.detach().any())
    return abs(float(weight.float().std()) / 0.02 - 1) < 5 / weight.numel() ** 0.5
