"""Kept runs: what one run of a comparison or sweep leaves on disk.

`seed_<s>.json` has the run's resolved config and its result, `seed_<s>.npz` beside it the graded test examples. The JSON file
has a checksum of both. A damaged file is not used; the files of another config are kept under another name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourier_moe.errors import UserError
from fourier_moe.files.writing import write_file
from lightning_modules.experiments.graded_examples import GradedSet, load_examples, save_examples
from lightning_modules.experiments.provenance import config_hash, without_logger

_FORMAT = 3
_WITHOUT_CHECKSUM = 2  # an older format, still read


def variant_directory(variant: str) -> str:
    """Return the directory name of a variant: an overlay's file name if it is given by its path, else the variant itself."""
    return Path(variant).name.removesuffix(".yaml")


def require_own_directories(argument: str, variants: Sequence[str]) -> None:
    """Refuse variants of which two would have one directory.

    Raises:
        UserError: beginning with the argument and its value, as given here.
    """
    owners: dict[str, str] = {}
    for variant in variants:
        directory = variant_directory(variant)
        if directory in owners:
            raise UserError(
                f"{argument}: the results of {owners[directory]} and {variant} would both go to {directory}/; leave one out"
            )
        owners[directory] = variant


def kept_file(output: Path, variant: str, seed: int) -> Path:
    """Return the file of a run's result and resolved config; beside it, as .npz, are its graded test examples."""
    return output / "cells" / variant_directory(variant) / f"seed_{seed}.json"


def write_run(path: Path, config: Mapping[str, Any], result: Mapping[str, Any], examples: dict[str, GradedSet]) -> None:
    """Write a run's files; the examples go first, so that a result never exists without them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_examples(path.with_suffix(".npz"), examples)
    content = {"format": _FORMAT, "config": config, "result": result, "examples": _file_checksum(path.with_suffix(".npz"))}
    write_file(path, json.dumps(content | {"sha256": _checksum(content)}, indent=2))


def read_run(path: Path, config: Mapping[str, Any], first_process: bool = True) -> dict[str, Any] | None:
    """Return the result of a run with this config, None if it has to be made; print what is kept, and what cannot be used.

    A comparison that was moved, or is named in another way, keeps its runs: the logger does not count.

    Args:
        path: see `kept_file`.
        config: the resolved config.
        first_process: whether this process may move the files of other configs aside, and back.
    """
    own = _aside(path, config)
    for candidate in (path, own, path):  # the first process may move one of them meanwhile
        stored = _usable(candidate)
        if stored is None:
            continue
        if without_logger(stored["config"]) == without_logger(config):
            if candidate == own and first_process:
                _move(own, path)
            print(f"kept: {path}" + ("" if "sha256" in stored else " (of an older version, without a checksum)"))
            return stored["result"]
        if first_process:
            other = _aside(path, stored["config"])
            _move(path, other)
            print(f"{path} is of another config: kept as {other.name}; run again")
    return None


def _usable(path: Path) -> dict[str, Any] | None:
    """Return the content of a file if it is intact; print what is wrong otherwise."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}): run again")
        return None
    try:
        stored = json.loads(content)
        if stored["format"] not in (_FORMAT, _WITHOUT_CHECKSUM):
            print(f"{path} is of another version: run again")
            return None
        problem = _problem(path, stored)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        print(f"{path} is damaged ({problem}): run again")
        return None
    return stored


def _problem(path: Path, stored: dict[str, Any]) -> str | None:
    checksum = stored.get("sha256")
    if checksum is None and stored["format"] == _FORMAT:
        return "it has no checksum"
    if checksum is not None and checksum != _checksum({key: value for key, value in stored.items() if key != "sha256"}):
        return "its checksum differs"
    if not all(isinstance(value, (int, float)) for value in stored["result"]["metrics"].values()):
        return "its metrics are not numbers"
    examples = path.with_suffix(".npz")
    try:
        if checksum is not None and _file_checksum(examples) != stored["examples"]:
            return f"the checksum of {examples.name} differs"
        load_examples(examples)
    except Exception as error:  # zipfile, zlib and numpy raise different errors for damage
        return f"{examples.name}: {error}"
    return None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _aside(path: Path, config: Mapping[str, Any]) -> Path:
    return path.with_name(f"{path.stem}-{config_hash(config)}.json")


def _move(path: Path, to: Path) -> None:
    for suffix in (".npz", ".json"):
        if path.with_suffix(suffix).exists():
            os.replace(path.with_suffix(suffix), to.with_suffix(suffix))
