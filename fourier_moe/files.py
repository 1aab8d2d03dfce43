"""Adapter files: a directory of adapter.safetensors (what was trained, and the positions) and adapter.json (what it is)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor, nn

from fourier_moe.backbone import backbone_fingerprint, backbone_name, check_backbone
from fourier_moe.config import AdapterConfig
from fourier_moe.inject import adapter_config, adapters, count_parameters, head_modules, inject, is_adapted
from fourier_moe.undo import unchanged_on_error

FORMAT_VERSION = 1
_TENSORS, _DESCRIPTION = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterDescription:
    """What adapter.json says.

    Attributes:
        config: how the model was adapted.
        backbone: name of the pretrained model, None where it had none.
        fingerprint: see `backbone_fingerprint`.
        class_names: label names in the order of the head's outputs, or None.
        metrics: results at the time of saving.
    """

    config: AdapterConfig
    backbone: str | None = None
    fingerprint: dict[str, float] = field(default_factory=dict)
    class_names: list[str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapted model has beyond the pretrained one: positions, coefficients, routers, head.

    Raises:
        ValueError: if the model is not adapted.
    """
    config = adapter_config(model)
    state = model.state_dict()
    if config.trains_backbone():
        return state
    heads = tuple(f"{name}." for name in head_modules(model, config))
    owned = tuple(f"{name}." for name in adapters(model))
    bases = tuple(f"{name}base." for name in owned)
    return {
        key: value
        for key, value in state.items()
        if key.startswith(heads) or (key.startswith(owned) and not key.startswith(bases))
    }


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the adapter of `model` to `directory` (made if missing; an adapter in it is replaced).

    Args:
        class_names: label names in the order of the head's outputs.
        metrics: results to keep beside the adapter.

    Returns:
        The directory.

    Raises:
        ValueError: if the model is not adapted, or the adapter holds values that are not finite.
    """
    config = adapter_config(model)
    state: dict[str, Tensor] = {}
    stored: set[int] = set()
    for key, value in adapter_state_dict(model).items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in stored:
            tensor = tensor.clone()  # tied weights: safetensors stores no two views of one memory
        stored.add(tensor.untyped_storage().data_ptr())
        state[key] = tensor
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {', '.join(broken[:3])}; it is not saved")
    tensors = serialize_safetensors(state)
    description = {
        "format": "fourier_moe adapter",
        "format_version": FORMAT_VERSION,
        "backbone": backbone_name(model),
        "backbone_fingerprint": backbone_fingerprint(model),
        "config": config.to_dict(),
        "class_names": None if class_names is None else list(class_names),
        "metrics": dict(metrics or {}),
        "trained_parameters": count_parameters(model, config).trained,
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"  # before the first write: it may fail
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / _TENSORS, tensors)
    _write(directory / _DESCRIPTION, text.encode())
    return directory


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> AdapterDescription:
    """Put the adapter in `directory` on `model`: inject as its config says (unless it is so already) and load what was trained.

    Args:
        model: the same pretrained model, fresh or adapted with the same config.

    Raises:
        ValueError: if the directory holds no adapter, a damaged one, or one for another backbone, shape or config.
    """
    description, state = _read(Path(directory))
    source = f"adapter {directory}"
    with unchanged_on_error(model):
        if not is_adapted(model):
            inject(model, description.config)
        difference = adapter_config(model).difference(description.config)
        if difference:
            raise ValueError(f"{source} does not fit this model: file and model differ in {difference}")
        _check_fit(state, adapter_state_dict(model), source)
        check_backbone(model, description.backbone, description.fingerprint, source)
    model.load_state_dict(state, strict=False)
    return description


def describe_adapter(directory: str | os.PathLike[str]) -> AdapterDescription:
    """Read adapter.json without loading tensors or needing a model.

    Raises:
        ValueError: if the directory holds no adapter, or one of a newer format.
    """
    return _parse_description(Path(directory))[0]


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems[:5])}{more}")


def _read(directory: Path) -> tuple[AdapterDescription, dict[str, Tensor]]:
    description, checksum = _parse_description(directory)
    try:
        data = (directory / _TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{directory} has no {_TENSORS}; the adapter is incomplete") from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{directory / _TENSORS} is damaged: its checksum differs from the one in {_DESCRIPTION}")
    try:
        return description, parse_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"{directory / _TENSORS} is no valid safetensors file: {error}") from error


def _parse_description(directory: Path) -> tuple[AdapterDescription, str]:
    path = directory / _DESCRIPTION
    if not path.is_file():
        raise ValueError(f"no adapter in {directory}: {_DESCRIPTION} not found; give the directory that save_adapter wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version, checksum = raw["format_version"], raw["sha256"]
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format_version {version} is newer than this package reads ({FORMAT_VERSION}); upgrade fourier_moe"
            )
        config = AdapterConfig.from_dict(raw["config"])
        return AdapterDescription(
            config, raw["backbone"], raw["backbone_fingerprint"], raw["class_names"], raw["metrics"]
        ), checksum
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an adapter description: {error}") from error


def _write(path: Path, data: bytes) -> None:
    """Write to a neighbour first, so that an interruption leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
