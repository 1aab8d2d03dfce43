"""The identity of an evaluation, and the directory of its results, which never replace those of another evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.callbacks.processes import of_all_processes
from lightning_modules.tasks.base import data_module

_NOT_OF_DATA = ("cache_directory", "tokenizer")  # settings of a DataModule that do not affect what is evaluated
_SAME = ("command", "backbone", "precision", "settings", "data", "examples", "partial")


class EvaluatedExamples:
    """The evaluated examples, independent of their names in a config: ids with labels, or prompts with answers."""

    def __init__(self) -> None:
        self._seen: dict[str, set[bytes]] = {}

    def add(self, set_name: str, outputs: Any, batch: Mapping[str, Any]) -> None:
        """Add the examples of a batch, with the outputs of the test, validation or prediction step."""
        rows = outputs if isinstance(outputs, list) else outputs["rows"]
        target = None if isinstance(outputs, list) else outputs["target"]
        if rows and "prompt" in rows[0]:
            keys: Iterable[Any] = [(row["id"], row["prompt"], row["answer"]) for row in rows]
        else:
            keys = zip(batch["id"], batch["id"] if target is None else target.tolist(), strict=False)
        seen = self._seen.setdefault(set_name, set())
        seen.update(hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest() for key in keys)

    def digests(self, trainer: L.Trainer) -> dict[str, str]:
        """Return a digest by set, over all processes, which must call it together."""
        shares = of_all_processes(trainer, self._seen)
        names = dict.fromkeys(name for share in shares for name in share)
        digests_by_set = {name: sorted(set().union(*(share.get(name, ()) for share in shares))) for name in names}
        return {name: hashlib.sha256(b"".join(digests)).hexdigest()[:16] for name, digests in digests_by_set.items()}


def data_of(trainer: L.Trainer) -> dict[str, Any]:
    """Return the DataModule's class and, in a run of the command line, the settings that identify its data."""
    found: dict[str, Any] = {"class": type(data_module(trainer)).__name__}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            settings = callback.config.as_dict()["data"].get("init_args", {})
            found |= {k: v for k, v in settings.items() if isinstance(v, (str, bool)) and k not in _NOT_OF_DATA}
    return found


def place(base: Path, record: Mapping[str, Any], named: bool) -> Path:
    """Return the directory of a finished evaluation: `base`, or `base_2`, ... if results of another evaluation are there.

    Args:
        base: the preferred directory.
        record: the content of results.json.
        named: whether the user named `base`; otherwise it lies beside the weights and belongs to them alone.
    """
    keys = (*_SAME, "weights") if named else _SAME
    return _first(base, lambda path: _is_free(path / "results.json", record, keys))


def place_unfinished(base: Path, description: str, data: Mapping[str, Any]) -> Path:
    """Return where an evaluation begins: as `place`, but apart from those whose `description` names other data."""
    return _first(base, lambda path: (_read(path / description) or {}).get("data", data) == data)


def _first(base: Path, fits: Callable[[Path], bool]) -> Path:
    paths = (base if number == 1 else base.with_name(f"{base.name}_{number}") for number in count(1))
    return next(path for path in paths if fits(path))


def _is_free(file: Path, record: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Tell whether the file is missing or has the same record; a damaged file is not replaced."""
    if not file.exists():
        return True
    stored, own = _read(file), json.loads(json.dumps(record))
    return stored is not None and all(key in stored and stored[key] == own[key] for key in keys)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) else None
