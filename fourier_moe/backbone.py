"""Which pretrained model an adapter belongs to: a name for people and a fingerprint of the frozen weights."""

from __future__ import annotations

import math

from torch import nn

from fourier_moe.inject import adapter_config, adapters, head_modules, is_adapted

_SAMPLES, _VALUES = 8, 16  # parameters, and values of each: over whole matrices all initialisations look alike
_TOLERANCE = 4e-3  # relative; rounding a backbone to bfloat16 changes a value by less than 2^-8


def backbone_name(model: nn.Module) -> str | None:
    """The model's own `backbone_name`, or the name a Hugging Face model was loaded by; None if it has neither."""
    name = getattr(model, "backbone_name", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def backbone_fingerprint(model: nn.Module) -> dict[str, float]:
    """Root mean squares of the first values of a few pretrained parameters, by the parameter's name before adaptation.

    Sampled evenly over the model's floating-point parameters outside of head and adapters. Empty on the meta device, and
    where the pretrained weights themselves are trained.
    """
    if is_adapted(model) and adapter_config(model).trains_backbone():
        return {}
    own: set[int] = set()
    if is_adapted(model):
        for adapter in adapters(model).values():
            own.update(id(p) for group in adapter.parameter_groups().values() for p in group)
        for module in head_modules(model, adapter_config(model)).values():
            own.update(map(id, module.parameters()))
    frozen = [
        (name.replace(".base.", "."), parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in own and parameter.is_floating_point() and not parameter.is_meta
    ]
    step = max(1, len(frozen) // _SAMPLES)
    sample = sorted(frozen, key=lambda pair: pair[0])[::step]
    return {name: float(parameter.detach().flatten()[:_VALUES].double().square().mean().sqrt()) for name, parameter in sample}


def check_backbone(model: nn.Module, name: str | None, fingerprint: dict[str, float], source: str) -> None:
    """Refuse what was trained on other weights than `model` has, whatever these are called.

    Args:
        name: backbone name that was stored with the adapter.
        fingerprint: fingerprint that was stored with it; where it cannot be compared, names must be equal.
        source: what it was stored in, for the message.

    Raises:
        ValueError: naming both backbones.
    """
    present = backbone_fingerprint(model)
    common = present.keys() & fingerprint.keys()
    if common:
        same = all(math.isclose(present[key], fingerprint[key], rel_tol=_TOLERANCE, abs_tol=1e-12) for key in common)
    else:
        same = None in (name, backbone_name(model)) or name == backbone_name(model)
    if not same:
        weights = "whose weights are others" if name == backbone_name(model) else f"this model is {backbone_name(model)!r}"
        raise ValueError(f"{source} was trained on backbone {name!r}, {weights}; load the same pretrained weights")
