"""The methods in the table: each makes the head and the adapters of a frozen Classifier trainable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.dense import DenseFourierMoEConfig
from benchmarks.models import Classifier, ModelEntry
from benchmarks.routing import balance_routing
from fourier_moe import FourierMoEConfig, SpectralExperts, TopKRouter, inject


def _head_only(model: Classifier, entry: ModelEntry) -> None:
    """The floor: nothing before the head needs a gradient, so the backward pass ends at the head."""


def _lora(model: Classifier, entry: ModelEntry) -> None:
    from peft import LoraConfig

    _adapt_with_peft(model, LoraConfig(r=entry.lora_rank, target_modules=list(entry.targets)))


def _fourierft(model: Classifier, entry: ModelEntry) -> None:
    from peft import FourierFTConfig

    _adapt_with_peft(model, FourierFTConfig(n_frequency=entry.num_coefficients, target_modules=list(entry.targets)))


def _adapt_with_peft(model: Classifier, config: Any) -> None:
    """Use PEFT's public interface, including float32 adapters over half-precision weights; it changes `model` in place."""
    from peft import get_peft_model

    get_peft_model(model, config)


def _fourier_moe(model: Classifier, entry: ModelEntry, config_class: type[FourierMoEConfig] = FourierMoEConfig) -> None:
    inject(
        model,
        config_class(
            targets=entry.targets,
            head=["head"],
            num_coefficients=entry.num_coefficients,
            num_experts=entry.num_experts,
            top_k=entry.top_k,
        ),
    )
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, SpectralExperts):  # not zero, as after some training
            module.coefficients.data.copy_(0.01 * torch.randn(module.coefficients.shape, generator=generator))


def _dense(model: Classifier, entry: ModelEntry) -> None:
    _fourier_moe(model, entry, DenseFourierMoEConfig)


METHODS: dict[str, Callable[[Classifier, ModelEntry], None]] = {
    "head_only": _head_only,
    "lora": _lora,
    "fourierft": _fourierft,
    "dense": _dense,
    "fourier_moe": _fourier_moe,
    "fourier_moe_triton": _fourier_moe,  # the same through the fused kernels; see steps.Trial
}
FLOOR, LORA, DENSE, OURS, TRITON = "head_only", "lora", "dense", "fourier_moe", "fourier_moe_triton"


def usable_methods(device: str) -> list[str]:
    """Return the methods that this device runs: Triton's kernels need a GPU."""
    return [method for method in METHODS if method != TRITON or (device != "cpu" and importlib.util.find_spec("triton"))]


def product_paths(device: str) -> dict[str, str]:
    """Return the paths of the product that this device runs, each with the value of kernels.OPT_IN that chooses it."""
    return {"PyTorch": "0", **({"Triton": "1"} if TRITON in usable_methods(device) else {})}


def adapt(model: Classifier, method: str, entry: ModelEntry, *, balanced: bool) -> Classifier:
    """Adapt `model` in place; `balanced` forces balanced routing if the method routes."""
    METHODS[method](model, entry)
    model.head.requires_grad_(True)
    if balanced:
        balance_routing(model)
    return model


def trained_parameters(model: Classifier) -> dict[str, int]:
    """Count trained scalars by kind: adapters (or experts), router, head."""
    head = {id(parameter) for parameter in model.head.parameters()}
    routers = {id(p) for module in model.modules() if isinstance(module, TopKRouter) for p in module.parameters()}
    counts = {"adapters": 0, "router": 0, "head": 0}
    for parameter in trainable(model):
        kind = "head" if id(parameter) in head else "router" if id(parameter) in routers else "adapters"
        counts[kind] += parameter.numel()
    return counts


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters for an optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
