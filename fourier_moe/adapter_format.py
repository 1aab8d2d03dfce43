"""The layout of an adapter directory: what is in its files, and how a damaged one is noticed.

adapter.safetensors is the truth: the tensors, and in its metadata the description as JSON, which begins with a SHA-256 over the
file. adapter.json is a copy of that description for people and tools. docs/adapter_files.md says what this guarantees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor

from fourier_moe.config import AdapterConfig
from fourier_moe.file_writing import FileParts
from fourier_moe.version import __version__

FORMAT_VERSION = 2
TENSORS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"

_METADATA = "fourier_moe"  # the only entry, since several would be written in any order
_BLANK = "0" * 64  # in the place of the checksum while it is computed
_NONE = type(None)


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter file says of itself.

    Attributes:
        config: how the model was adapted.
        backbone: name of the pretrained model, None where it had none.
        fingerprint: see `backbone_fingerprint`.
        class_names: label names in the order of the head's outputs, or None.
        metrics: results at the time of saving.
        backbone_revision: commit of the pretrained model on the Hugging Face hub, None where it came from elsewhere.
        task: what trained it, by the trainer: `class`, `pipeline_tag`, `main_metric`, `data`, and `data_revision`, its
            commit on the Hugging Face hub; empty for a plain model.
        trained_parameters: counts by kind, as in InjectionReport.
        written_by: version of fourier_moe, None before 0.1.0's format 2.
    """

    config: AdapterConfig
    backbone: str | None = None
    fingerprint: dict[str, float] = field(default_factory=dict)
    class_names: list[str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    backbone_revision: str | None = None
    task: dict[str, str | None] = field(default_factory=dict)
    trained_parameters: dict[str, int] = field(default_factory=dict)
    written_by: str | None = __version__


def encode(description: AdapterDescription, state: Mapping[str, Tensor]) -> tuple[FileParts, bytes]:
    """Contents of adapter.safetensors, in parts, and of adapter.json: the same for the same adapter.

    Args:
        state: contiguous tensors on the CPU, no two of one memory.
    """
    fields = {
        "sha256": _BLANK,
        "format": "fourier_moe adapter",
        "format_version": FORMAT_VERSION,
        "fourier_moe_version": description.written_by,
        "backbone": description.backbone,
        "backbone_revision": description.backbone_revision,
        "backbone_fingerprint": description.fingerprint,
        "config": description.config.to_dict(),
        "task": description.task,
        "class_names": description.class_names,
        "metrics": description.metrics,
        "trained_parameters": description.trained_parameters,
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    data = serialize_safetensors(dict(state), metadata={_METADATA: text})
    checksum = hashlib.sha256(data).hexdigest()
    start = data.index(_BLANK.encode())
    parts: FileParts = [memoryview(data)[:start], checksum.encode(), memoryview(data)[start + len(_BLANK) :]]
    return parts, text.replace(_BLANK, checksum, 1).encode()


def read(directory: Path) -> tuple[AdapterDescription, bytes]:
    """Read and check an adapter directory of this version or an older one.

    Returns:
        What it says, and the contents of adapter.safetensors, for `tensors`.

    Raises:
        ValueError: naming the file, if there is none, it is damaged, or of a newer version.
    """
    path = directory / TENSORS
    if not path.is_file():
        incomplete = f"; {DESCRIPTION} is there, so it is incomplete" if (directory / DESCRIPTION).is_file() else ""
        raise ValueError(
            f"no adapter in {directory}: {TENSORS} not found{incomplete}; give the directory that save_adapter wrote"
        )
    data = _read_bytes(path)
    text = _embedded(data, path)
    if text is None:
        return _read_version_1(directory, data), data
    raw = _parse(text, path)
    checksum = raw["sha256"]
    start = data.find(checksum.encode())
    digest = hashlib.sha256(data[:start] + _BLANK.encode())
    digest.update(memoryview(data)[start + len(_BLANK) :])
    if start < 0 or digest.hexdigest() != checksum:
        raise ValueError(f"{path} is damaged: its checksum differs from the one written in it")
    _check_copy(directory / DESCRIPTION, text.encode())
    return _description(raw, path), data


def tensors(data: bytes, directory: Path) -> dict[str, Tensor]:
    """The tensors in what `read` gave.

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        return parse_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"{directory / TENSORS} is no valid safetensors file: {error}") from error


def has_version_1(directory: Path) -> bool:
    """Whether adapter.json there is that of a version 1 adapter, which cannot do without it."""
    try:
        return _is_version_1(json.loads((directory / DESCRIPTION).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False


def _is_version_1(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("format_version") == 1 and "fourier_moe_version" not in raw


def _embedded(data: bytes, path: Path) -> str | None:
    """The description in a safetensors file's metadata, None if it has none (version 1).

    A safetensors file is 8 bytes of the header's length, the header as JSON, and the tensors.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())
        text = header.get("__metadata__", {}).get(_METADATA)
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no safetensors file ({error})") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path} is damaged: its description is no text")
    return text


def _parse(content: str | bytes, path: Path) -> dict[str, Any]:
    """JSON with a checksum and a version that this package can read."""
    try:
        raw = json.loads(content)
        version, checksum = raw["format_version"], raw["sha256"]
        newer = version > FORMAT_VERSION
        if not isinstance(checksum, str) or not checksum.isascii() or len(checksum) != len(_BLANK):
            raise ValueError(f"sha256 is {checksum!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it cannot be read as an adapter description: {error!r}") from error
    if newer:
        raise ValueError(
            f"{path} has format_version {version}, newer than this package reads ({FORMAT_VERSION}); upgrade fourier_moe"
        )
    return raw


def _read_version_1(directory: Path, data: bytes) -> AdapterDescription:
    """Version 1: adapter.json alone has the description, with the SHA-256 of adapter.safetensors."""
    path, description = directory / TENSORS, directory / DESCRIPTION
    if not description.is_file():
        raise ValueError(f"{path} is damaged or no adapter: there is no description in it, and no {DESCRIPTION} beside it")
    raw = _parse(_read_bytes(description), description)
    if not _is_version_1(raw):
        raise ValueError(f"{path} is damaged: the description that format_version {raw['format_version']} has in it is missing")
    if hashlib.sha256(data).hexdigest() != raw["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum differs from the one in {DESCRIPTION}")
    return _description(raw, description)


def _check_copy(path: Path, expected: bytes) -> None:
    """adapter.json may be missing, or left of a version 1 adapter when the save that replaced it was interrupted."""
    if path.is_file() and _read_bytes(path) != expected and not has_version_1(path.parent):
        raise ValueError(
            f"{path} is damaged or edited: it is no copy of the description in {TENSORS}; delete it, and the adapter loads"
        )


def _description(raw: Mapping[str, Any], path: Path) -> AdapterDescription:
    try:
        return AdapterDescription(
            config=AdapterConfig.from_dict(raw["config"]),
            backbone=_of_type(raw["backbone"], str, _NONE),
            fingerprint=_of_type(raw["backbone_fingerprint"], dict),
            class_names=_of_type(raw["class_names"], list, _NONE),
            metrics=_of_type(raw["metrics"], dict),
            backbone_revision=_of_type(raw.get("backbone_revision"), str, _NONE),
            task=_of_type(raw.get("task", {}), dict),
            trained_parameters=_of_type(raw.get("trained_parameters", {}), dict),
            written_by=_of_type(raw.get("fourier_moe_version"), str, _NONE),
        )
    except (KeyError, TypeError, ValueError) as error:
        writer = raw.get("fourier_moe_version")
        by = f" written by fourier_moe {writer}, this is {__version__}" if writer not in (None, __version__) else ""
        raise ValueError(f"{path} cannot be read as an adapter description{by}: {error}") from error


def _of_type(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise TypeError(f"{value!r} where {' or '.join(kind.__name__ for kind in types)} was expected")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
