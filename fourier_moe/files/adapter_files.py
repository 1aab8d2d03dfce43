"""Adapter files: what was trained, and the positions, in a directory that is also a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from fourier_moe.adapter import adapters
from fourier_moe.config import AdapterConfig, ProjectionAdapterConfig, StoredProjection
from fourier_moe.errors import UserError, shorten
from fourier_moe.files.format import CARD, DESCRIPTION, TENSORS, AdapterDescription, encode, read, tensors
from fourier_moe.files.hub import local_directory
from fourier_moe.files.model_card import is_edited, loading_code, model_card
from fourier_moe.files.peft_files import PEFT_CONFIG, PEFT_TENSORS, check_replaceable, peft_files
from fourier_moe.files.writing import FileParts, replace_files
from fourier_moe.inject import adapter_config, inject, is_adapted
from fourier_moe.models.backbone import backbone_fingerprint, backbone_name, backbone_revision, check_backbone
from fourier_moe.models.module_names import ModuleNames, head_modules, kept_module_names, names_by_file
from fourier_moe.models.replacing import projection_sizes
from fourier_moe.models.snapshot import unchanged_on_error
from fourier_moe.report import count_parameters

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapted model has beyond the pretrained one: positions, coefficients, routers, head.

    Raises:
        UserError: if the model is not adapted.
    """
    config = adapter_config(model)
    state = model.state_dict()
    if config.trains_backbone:
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
        UserError: if the model is not adapted, the adapter holds values that are not finite, or another PEFT method's adapter
            is in the directory.
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
        raise UserError(f"the adapter holds NaN or infinity in {', '.join(broken[:3])}; it is not saved")
    description = AdapterDescription(
        config,
        backbone_name(model),
        backbone_fingerprint(model),
        None if class_names is None else list(class_names),
        dict(metrics or {}),
        backbone_revision(model),
        dict(task or {}),
        {str(kind): count for kind, count in count_parameters(model, config).trained.items()},
        modules=kept_module_names(model),
    )
    directory = Path(directory)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return directory
    check_replaceable(directory)
    data, text = encode(description, state)
    files: dict[str, FileParts] = {TENSORS: data, DESCRIPTION: [text]}
    if not is_edited(directory / CARD):
        files[CARD] = [model_card(description, code or loading_code(model)).encode()]
    files |= peft_files(model, description, state)
    replace_files(directory, files, remove_first=(DESCRIPTION, PEFT_CONFIG, PEFT_TENSORS))  # would not fit the new tensors
    return directory


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> AdapterDescription:
    """Put an adapter on `model`: inject as its config says (unless it is so already) and load what was trained.

    Args:
        model: the same pretrained model, fresh or adapted with the same config.
        path: the directory that `save_adapter` wrote, or `hf://owner/name[@revision]` on the Hugging Face hub.

    Raises:
        UserError: if there is no adapter, a damaged one, or one for another backbone, shape or config.
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
        UserError: if it does not fit; the model is then as it was.
    """
    check_values(source, state)
    with unchanged_on_error(model):
        if not is_adapted(model):
            names = stored_names(model, source, description, state)
            check_stored(source, description.config, projection_sizes(model, names.projections), state)
            inject(model, description.config, names=names)
        check_fit(model, source, state, description.config, description.backbone, description.fingerprint)
    model.load_state_dict(state, strict=False)


def stored_names(model: nn.Module, source: str, description: AdapterDescription, state: Mapping[str, Tensor]) -> ModuleNames:
    """Return the modules of a fresh model that a stored adapter belongs to; arguments as in `put_on`.

    Raises:
        UserError: if the model has not all of them.
    """
    try:
        return names_by_file(model, description.config, description.modules, state)
    except ValueError as error:
        raise UserError(f"{source} does not fit this model: {error}") from error


def describe_adapter(path: str | os.PathLike[str]) -> AdapterDescription:
    """Return what an adapter says of itself; no model is needed. `path` as in `load_adapter`.

    Raises:
        UserError: if there is no adapter, a damaged one, or one of a newer format.
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
        UserError: naming what differs.
    """
    difference = adapter_config(model).difference(config)
    if difference:
        raise UserError(f"{source} does not fit this model: file and model differ in {difference}")
    check_values(source, state)
    expected = adapter_state_dict(model)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected and not config.ignores(key)]
    problems += [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems += [
        f"{key} is {state[key].dtype} in the file, {expected[key].dtype} in the model"
        for key in expected
        if key in state and not _like(state[key].dtype, expected[key].dtype)
    ]
    _refuse(source, problems)
    check_stored(source, config, {name: (a.in_features, a.out_features) for name, a in adapters(model).items()}, state)
    check_backbone(model, backbone, fingerprint, source)


def check_values(source: str, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot belong to an adapter of any kind.

    Raises:
        UserError: naming the first that is not finite, or of a type that adapters do not have.
    """
    for key, value in state.items():
        if value.dtype not in (*_FLOATS, *_INTEGERS):
            raise UserError(f"{source} is damaged: {key} is {value.dtype}")
        if value.dtype in _FLOATS and not value.isfinite().all():
            raise UserError(f"{source} is damaged: {key} holds NaN or infinity")


def check_stored(source: str, config: AdapterConfig, sizes: Mapping[str, tuple[int, int]], state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of a config, before what the config asks for is built.

    Args:
        sizes: (in_features, out_features) of every projection to adapt, by name.

    Raises:
        UserError: naming what differs.
    """
    if not isinstance(config, ProjectionAdapterConfig) or not sizes:
        return
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
    for key, value in state.items():
        end = len(key)
        while (end := key.rfind(".", 0, end)) > 0:
            if key[:end] in tensors:
                tensors[key[:end]][key[end + 1 :]] = value
                break
    if not any(tensors.values()):
        _refuse(source, [f"it has no tensors of {next(iter(sizes))}"])
    _refuse(source, config.check_stored({name: StoredProjection(*sizes[name], tensors[name]) for name in sizes}))


def _refuse(source: str, problems: Sequence[str]) -> None:
    if problems:
        raise UserError(f"{source} does not fit this model: {shorten(problems, 5, '; ')}")


def _like(stored: torch.dtype, expected: torch.dtype) -> bool:
    """Floating-point numbers may come in another precision; all else is stored as it is used."""
    return stored == expected or (stored in _FLOATS and expected.is_floating_point)
