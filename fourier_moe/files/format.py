"""The layout of an adapter directory: what is in its files, and how a damaged one is noticed.

adapter.safetensors is the truth: the tensors, and in its metadata the description as JSON, which begins with a SHA-256 over the
file. adapter.json is a copy of that description for people and tools. See docs/reference/adapter_files.md for the guarantees.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor

from fourier_moe.config import AdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.files.stored_values import mapping_of, of_type, parse_json, sequence_of, settings_of
from fourier_moe.files.version import __version__
from fourier_moe.files.writing import FileParts
from fourier_moe.models.module_names import ModuleNames

FORMAT_VERSION = 2
LARGEST_HEADER = 2**23  # bytes; a hundred times what a large model with a thousand classes needs
TENSORS, DESCRIPTION, CARD = "adapter.safetensors", "adapter.json", "README.md"

_METADATA = "fourier_moe"  # the only entry, since several would be written in any order
_BLANK = "0" * 64  # in the place of the checksum while it is computed
_NONE = type(None)
_FORMER_SETTINGS = ("init_std",)  # of files by older versions: the start, without effect on a trained adapter


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
        task: what trained it, by the trainer: `class`, `pipeline_tag`, `main_metric`, `data`, `data_revision`, its
            commit on the Hugging Face hub, `prompt`, a style of prompt, and `chat_template`, the Jinja text of one that the run
            gave; empty for a plain model.
        trained_parameters: counts by kind, as in InjectionReport.
        modules: what is adapted and what is trained in full, None where an older version left it to the config's patterns.
        written_by: version of fourier_moe, None where the file does not tell.
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
    modules: ModuleNames | None = None


def encode(description: AdapterDescription, state: Mapping[str, Tensor]) -> tuple[FileParts, bytes]:
    """Contents of adapter.safetensors, in parts, and of adapter.json: the same for the same adapter.

    Args:
        state: contiguous tensors on the CPU, no two of one memory.

    Raises:
        UserError: if the description could not be read again, because of its size or of a value of a wrong type.
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
    if description.modules is not None:
        fields["modules"] = asdict(description.modules)
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    description_of(parse_json(text), "what save_adapter was given")
    data = serialize_safetensors(dict(state), metadata={_METADATA: text})
    if int.from_bytes(data[:8], "little") > LARGEST_HEADER:
        raise UserError(f"names and description take more than the {LARGEST_HEADER:,} bytes that an adapter file has for them")
    checksum = hashlib.sha256(data).hexdigest()
    start = data.index(_BLANK.encode())
    parts: FileParts = [memoryview(data)[:start], checksum.encode(), memoryview(data)[start + len(_BLANK) :]]
    return parts, text.replace(_BLANK, checksum, 1).encode()


def read(directory: Path) -> tuple[AdapterDescription, bytes]:
    """Read and check an adapter directory.

    Returns:
        What it says, and the contents of adapter.safetensors, for `tensors`.

    Raises:
        UserError: naming the file, if there is none, it is damaged, or of another version.
    """
    path = directory / TENSORS
    if not path.is_file():
        incomplete = f"; {DESCRIPTION} is there, so it is incomplete" if (directory / DESCRIPTION).is_file() else ""
        raise UserError(
            f"no adapter in {directory}: {TENSORS} not found{incomplete}; give the directory that save_adapter wrote"
        )
    data, text = _read_tensors(path)
    raw = _parse(text, path)
    checksum = raw["sha256"]
    start = data.find(checksum.encode())
    digest = hashlib.sha256(data[:start] + _BLANK.encode())
    digest.update(memoryview(data)[start + len(_BLANK) :])
    if start < 0 or digest.hexdigest() != checksum:
        raise UserError(f"{path} is damaged: its checksum differs from the one written in it")
    _check_copy(directory / DESCRIPTION, text.encode())
    return description_of(raw, path), data


def tensors(data: bytes, directory: Path) -> dict[str, Tensor]:
    """Return the tensors in what `read` gave.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        return parse_safetensors(data)
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError) as error:  # of unknown dtypes too
        raise UserError(f"{directory / TENSORS} is no valid safetensors file: {error}") from error


def _read_tensors(path: Path) -> tuple[bytes, str]:
    """Return the contents of adapter.safetensors, and the description in its metadata.

    A safetensors file is 8 bytes of the header's length, the header as JSON, and the tensors. The rest is read if the header
    makes sense.
    """
    try:
        with path.open("rb") as file:
            length = file.read(8)
            size = int.from_bytes(length, "little")
            if len(length) < 8 or size > min(LARGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise UserError(f"its header would have {size:,} bytes")
            header = file.read(size)
            metadata = of_type(parse_json(header), dict).get("__metadata__", {})
            text: str | None = of_type(of_type(metadata, dict).get(_METADATA), str, _NONE)
            if text is not None:
                return length + header + file.read(), text
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is no safetensors file ({error})") from error
    raise UserError(f"{path} is damaged or no adapter: there is no description in it")


def _parse(content: str, path: Path) -> dict[str, Any]:
    """JSON with a checksum and a version that this package can read."""
    try:
        raw = of_type(parse_json(content), dict)
        version, checksum = of_type(raw["format_version"], int), of_type(raw["sha256"], str)
        if version < FORMAT_VERSION:
            raise UserError(f"format_version is {version}, and the first is {FORMAT_VERSION}")
        if not checksum.isascii() or len(checksum) != len(_BLANK):
            raise UserError(f"sha256 is {checksum!r}")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: it cannot be read as an adapter description: {error!r}") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, newer than this package reads ({FORMAT_VERSION}); upgrade fourier_moe"
        )
    return raw


def _check_copy(path: Path, expected: bytes) -> None:
    """Refuse an adapter.json with another description. It may be missing."""
    if path.is_file() and _read_bytes(path, LARGEST_HEADER) != expected:
        raise UserError(
            f"{path} is damaged or edited: it is no copy of the description in {TENSORS}; delete it, and the adapter loads"
        )


def description_of(raw: Mapping[str, Any], source: str | Path) -> AdapterDescription:
    """Return what the fields of a stored description say.

    Args:
        source: where they are from, for the message.

    Raises:
        UserError: if a field is missing, of another type, or impossible.
    """
    try:
        fingerprint = mapping_of(raw["backbone_fingerprint"], float, int)
        if not all(map(math.isfinite, fingerprint.values())):
            raise UserError("backbone_fingerprint has values that are not finite")
        return AdapterDescription(
            config=config_of(of_type(raw["config"], dict)),
            backbone=of_type(raw["backbone"], str, _NONE),
            fingerprint=fingerprint,
            class_names=None if raw["class_names"] is None else sequence_of(raw["class_names"], str),
            metrics=mapping_of(raw["metrics"], float, int),
            backbone_revision=of_type(raw.get("backbone_revision"), str, _NONE),
            task=mapping_of(raw.get("task", {}), str, _NONE),
            trained_parameters=mapping_of(raw.get("trained_parameters", {}), int),
            written_by=of_type(raw.get("fourier_moe_version"), str, _NONE),
            modules=_modules(raw.get("modules")),
        )
    except (KeyError, ValueError) as error:
        writer = str(raw.get("fourier_moe_version", __version__))[:20]
        by = f" written by fourier_moe {writer}, this is {__version__}" if writer != __version__ else ""
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{source} cannot be read as an adapter description{by}: {reason}") from error


def _modules(raw: Any) -> ModuleNames | None:
    if raw is None:
        return None
    names = {key: tuple(sequence_of(value, str)) for key, value in mapping_of(raw, list).items()}
    return settings_of(ModuleNames, names)


def _read_bytes(path: Path, largest: int) -> bytes:
    """Read a file that has at most `largest` bytes if it is valid."""
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > largest:
        raise UserError(f"{path} is damaged: it has more than {largest:,} bytes")
    return content


def config_of(values: Mapping[str, Any]) -> AdapterConfig:
    """Inverse of `AdapterConfig.to_dict`; the class is looked up among those imported: a file never makes us import code.

    Raises:
        UserError: for an unknown class, or values that it refuses.
    """
    known: dict[str, type[AdapterConfig]] = {kind.__name__: kind for kind in _subclasses(AdapterConfig)}
    name = values.get("class") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in known:
        raise UserError(f"config class {name!r} is unknown; known: {', '.join(known)}; import the package that defines it")
    return settings_of(known[name], {key: value for key, value in values.items() if key not in ("class", *_FORMER_SETTINGS)})


def _subclasses(root: type[AdapterConfig]) -> Iterator[type[AdapterConfig]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)
