"""Adapter files: what was trained, and the positions, in a directory that is also a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed
from torch import Tensor, nn

from fourier_moe.adapter_format import CARD, DESCRIPTION, TENSORS, AdapterDescription, encode, has_version_1, read, tensors
from fourier_moe.backbone import backbone_fingerprint, backbone_name, backbone_revision, check_backbone
from fourier_moe.config import AdapterConfig
from fourier_moe.file_writing import FileParts, replace_files
from fourier_moe.hub import local_directory
from fourier_moe.inject import adapter_config, adapters, count_parameters, head_modules, inject, is_adapted
from fourier_moe.model_card import is_edited, loading_code, model_card
from fourier_moe.undo import unchanged_on_error


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
    task: Mapping[str, str | None] | None = None,
    code: str | None = None,
) -> Path:
    """Write the adapter of `model` to `directory` (made if missing; an adapter in it is replaced).

    An interruption at any moment leaves the old adapter or the new one. Of several processes the first one writes.

    Args:
        class_names: label names in the order of the head's outputs.
        metrics: results to keep beside the adapter.
        task: what trained it; see AdapterDescription.
        code: Python that makes the pretrained model as `model`, for the model card.

    Returns:
        The directory.

    Raises:
        ValueError: if the model is not adapted, or the adapter holds values that are not finite.
        OSError: with the path, if it cannot be written; the old adapter is kept.
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
    description = AdapterDescription(
        config,
        backbone_name(model),
        backbone_fingerprint(model),
        None if class_names is None else list(class_names),
        dict(metrics or {}),
        backbone_revision(model),
        dict(task or {}),
        count_parameters(model, config).trained,
    )
    directory = Path(directory)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return directory
    data, text = encode(description, state)
    files: dict[str, FileParts] = {TENSORS: data, DESCRIPTION: [text]}
    if not is_edited(directory / CARD):
        files[CARD] = [model_card(description, code or loading_code(model)).encode()]
    # The old copy of the description would not fit the new tensors; version 1 needs it until then.
    replace_files(directory, files, remove_first=() if has_version_1(directory) else (DESCRIPTION,))
    return directory


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> AdapterDescription:
    """Put an adapter on `model`: inject as its config says (unless it is so already) and load what was trained.

    Args:
        model: the same pretrained model, fresh or adapted with the same config.
        path: the directory that `save_adapter` wrote, or `hf://owner/name[@revision]` on the Hugging Face hub.

    Raises:
        ValueError: if there is no adapter, a damaged one, or one for another backbone, shape or config.
    """
    directory = local_directory(path)
    description, data = read(directory)
    put_on(model, f"adapter {path}", description, tensors(data, directory))
    return description


def put_on(model: nn.Module, source: str, description: AdapterDescription, state: Mapping[str, Tensor]) -> None:
    """Put an adapter that was read from a file on `model`; see `load_adapter`.

    Args:
        source: what it was stored in, for messages.
        state: the stored tensors, by their names in `adapter_state_dict`.

    Raises:
        ValueError: if it does not fit; the model is then as it was.
    """
    with unchanged_on_error(model):
        if not is_adapted(model):
            inject(model, description.config)
        check_fit(model, source, state, description.config, description.backbone, description.fingerprint)
    model.load_state_dict(state, strict=False)


def describe_adapter(path: str | os.PathLike[str]) -> AdapterDescription:
    """What an adapter says of itself; no model is needed. `path` as in `load_adapter`.

    Raises:
        ValueError: if there is no adapter, a damaged one, or one of a newer format.
    """
    return read(local_directory(path))[0]


def check_fit(
    model: nn.Module,
    source: str,
    state: Mapping[str, Tensor],
    config: AdapterConfig,
    backbone: str | None,
    fingerprint: Mapping[str, float],
) -> None:
    """Refuse what was trained on another model, or in another way, than the adapted `model`.

    Args:
        source: what it was stored in, for the message.
        state: the stored tensors, by their names in `adapter_state_dict`.
        config: stored with them, as are the name and fingerprint of the backbone.

    Raises:
        ValueError: naming what differs.
    """
    difference = adapter_config(model).difference(config)
    if difference:
        raise ValueError(f"{source} does not fit this model: file and model differ in {difference}")
    expected = adapter_state_dict(model)
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
    check_backbone(model, backbone, fingerprint, source)
