"""Which pretrained model an adapter belongs to: a name for people and a fingerprint of the frozen weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError

_SAMPLES, _VALUES = 8, 16  # parameters, and values of each: over whole matrices all initializations look alike
_TOLERANCE = 4e-3  # relative; rounding a backbone to bfloat16 changes a value by less than 2^-8
_SMALLEST = 2**-24  # absolute; the step between float16's smallest numbers
_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # float8 is too coarse to be compared
_ATTRIBUTE = "fourier_moe_backbone_fingerprint"


@dataclass(frozen=True)
class Fingerprint:
    """Root mean squares of a few values of every pretrained parameter that is not quantized, measured before training.

    Attributes:
        values: by the parameter's name before adaptation, of its first values; of an embedding also of those of its middle
            row, as `name[row]`, since the first may be padding.
        sample: the names that files keep: evenly spread over all, and over those that stay as they are when a model is
            quantized (norms, biases, embeddings).
    """

    values: Mapping[str, float] = field(default_factory=dict)
    sample: tuple[str, ...] = ()


def backbone_name(model: nn.Module) -> str | None:
    """Return the model's own `backbone_name`, or the name a Hugging Face model was loaded by; None if it has neither."""
    name = getattr(model, "backbone_name", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def backbone_revision(model: nn.Module) -> str | None:
    """Return the model's commit on the Hugging Face hub: its own `backbone_revision`, or transformers' record; else None."""
    return getattr(model, "backbone_revision", None) or getattr(getattr(model, "config", None), "_commit_hash", None)


def measure_backbone(model: nn.Module, own: Collection[int] = ()) -> Fingerprint:
    """Measure the weights as they are now. Empty on the meta device.

    Args:
        own: ids of the parameters that are not the pretrained model's: those of adapters and head.
    """
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    values: dict[str, float] = {}
    unquantized: list[str] = []
    always: list[str] = []
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        # A quantized weight is a subclass with a type of its own, or no floating-point number.
        comparable = type(parameter) is nn.Parameter and parameter.dtype in _PRECISIONS
        if id(parameter) in own or parameter.is_meta or not comparable or not parameter.numel():
            continue
        key = name.replace(".base.", ".")
        values[key] = _root_mean_square(parameter)
        if name in embeddings:
            row = len(parameter) // 2
            values[f"{key}[{row}]"] = _root_mean_square(parameter[row])
            always += [key, f"{key}[{row}]"]
        elif parameter.ndim != 2:
            unquantized.append(key)
    sample = {*_evenly([*values]), *_evenly(unquantized), *always}
    return Fingerprint(values, tuple(name for name in values if name in sample))


def keep_fingerprint(model: nn.Module, fingerprint: Fingerprint) -> None:
    """Store a fingerprint on the model, as `inject` does.

    If the weights are on the meta device, pass the `kept_fingerprint` of the process that has them.
    """
    setattr(model, _ATTRIBUTE, fingerprint)


def kept_fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint that `inject` measured; empty if the model is not adapted."""
    return getattr(model, _ATTRIBUTE, Fingerprint())


def backbone_fingerprint(model: nn.Module) -> dict[str, float]:
    """Return the part of the kept fingerprint that goes into files.

    It is empty on the meta device, and if the pretrained weights themselves are trained.
    """
    kept = kept_fingerprint(model)
    return {name: kept.values[name] for name in kept.sample}


def check_backbone(model: nn.Module, name: str | None, fingerprint: Mapping[str, float], source: str) -> None:
    """Refuse an adapter that was trained on other weights than the model's, whatever their names.

    Parameters that only one of the two has unquantized are not compared. If nothing can be compared, or only constants of
    initialization, names must be equal.

    Args:
        model: an adapted model.
        name: backbone name that was stored with the adapter.
        fingerprint: `backbone_fingerprint` that was stored with it.
        source: what it was stored in, for the message.

    Raises:
        UserError: naming both backbones.
    """
    present, present_name = kept_fingerprint(model).values, backbone_name(model)
    common = [key for key in fingerprint if key in present]
    same = all(math.isclose(present[key], fingerprint[key], rel_tol=_TOLERANCE, abs_tol=_SMALLEST) for key in common)
    if all(fingerprint[key] in (0.0, 1.0) for key in common):
        same = same and (None in (name, present_name) or name == present_name)
    if not same:
        weights = "with other weights" if name == present_name else f"this model is {present_name!r}"
        raise UserError(f"{source} was trained on backbone {name!r}, {weights}; load the same pretrained weights")


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().flatten()[:_VALUES].double().square().mean().sqrt())


def _evenly(names: list[str]) -> list[str]:
    return names[:: max(1, math.ceil(len(names) / _SAMPLES))]
