"""UnfinishedEvaluation: the rows of a running evaluation on disk, so that an interrupted one can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from fourier_moe import adapter_state_dict
from fourier_moe.inject import adapter_config
from fourier_moe.models.backbone import backbone_fingerprint, backbone_name
from fourier_moe.models.projection import whole
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.results.evaluation_place import data_of
from lightning_modules.callbacks.results.sealed_rows import Row, SealedRows

_FIELDS = ("id", "prompt", "answer", "output", "loss")  # fields of a row; grades are never loaded from a file


class UnfinishedEvaluation:
    """A directory with `about.json` (what is evaluated, and how) and `<set>/<rank>.jsonl` (sealed rows, one per line).

    Args:
        directory: created by `open`; call `remove` when the evaluation is complete.
        rank: rank of this process, which appends to its own files.
        about: everything that the rows depend on.
        key: seals the rows; the same in all processes.
    """

    def __init__(self, directory: Path, rank: int, about: Mapping[str, Any], key: bytes) -> None:
        self.directory = directory
        self.rank = rank
        self._about = json.dumps(about, indent=2)
        self._rows = SealedRows(key, self._about)

    def open(self, sets: Iterable[str]) -> tuple[dict[str, dict[str, Row]], str | None]:
        """Load the finished rows of the same evaluation; start over if they belong to another one. One process calls it.

        Returns:
            Rows by set and id, and a note to the user, if any. Lines that are damaged, or that another user or machine wrote,
            are left out and counted.

        Raises:
            OSError: if the directory cannot be written.
        """
        description = self.directory / "about.json"
        note = None
        if self.directory.is_dir():
            note = self._difference(description)
            if note is None:
                return self._read(sets)
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        description.write_text(self._about, encoding="utf-8")
        return {name: {} for name in sets}, note

    def append(self, set_name: str, rows: Iterable[Row]) -> None:
        """Write rows so that they outlive this process."""
        directory = self.directory / file_name(set_name)
        directory.mkdir(parents=True, exist_ok=True)
        kept = ({name: row[name] for name in _FIELDS} for row in rows)
        with open(directory / f"{self.rank}.jsonl", "a", encoding="utf-8") as file:
            # The newline comes first, so that a line cut off by an interruption does not run into the next.
            file.write("".join("\n" + self._rows.line(set_name, row) for row in kept))

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def _difference(self, description: Path) -> str | None:
        """Return a note on how the interrupted evaluation differs; None if it is this one."""
        try:
            other = json.loads(description.read_bytes())
        except (OSError, ValueError, RecursionError):
            other = None
        if not isinstance(other, dict):
            return f"the interrupted evaluation in {self.directory} has no readable about.json; starting over"
        own = json.loads(self._about)
        differ = sorted(key for key in own.keys() | other.keys() if other.get(key) != own.get(key))
        problem = f"the interrupted evaluation in {self.directory} differs in {', '.join(differ)}; starting over"
        return problem if differ else None

    def _read(self, sets: Iterable[str]) -> tuple[dict[str, dict[str, Row]], str | None]:
        """Load rows of all processes, even if there were more of them."""
        found: dict[str, dict[str, Row]] = {}
        num_refused = 0
        for name in sets:
            found[name] = {}
            for path in sorted((self.directory / file_name(name)).glob("*.jsonl")):
                for line in path.read_bytes().split(b"\n") if path.is_file() else ():
                    if row := self._rows.read(name, line):
                        found[name][row["id"]] = row
                    else:
                        num_refused += bool(line)
        note = (
            f"{num_refused:,} line(s) in {self.directory} are damaged, or were not written by you on this machine; their "
            "examples are answered again"
        )
        return found, note if num_refused else None


def about(trainer: L.Trainer, module: AdaptationModule, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that rows depend on, except their inputs; `settings` are the task's."""
    return {
        "command": str(trainer.state.fn),
        "backbone": backbone_name(module.model),
        "backbone_fingerprint": backbone_fingerprint(module.model),
        "adapter": adapter_config(module.model).to_dict(),
        "weights": _checksum(module.model),
        "precision": str(trainer.precision),
        "data": data_of(trainer),
        **settings,
    }


def _checksum(model: nn.Module) -> str:
    """Return the SHA-256 of everything in an adapter file, wherever it was loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_state_dict(model).items()):
        digest.update(name.encode())
        digest.update(whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_name(set_name: str) -> str:
    """Return a set's name without path separators."""
    return set_name.replace("/", "_").replace("\\", "_")
