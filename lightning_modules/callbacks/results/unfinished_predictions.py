"""UnfinishedPredictions: the predictions of one process on disk, so that an interrupted `predict` can resume."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from torch import Tensor

from fourier_moe.errors import UserError
from lightning_modules.callbacks.results.sealed_rows import SealedRows
from lightning_modules.evaluation_sets import each_loader

_VALUES_HASHED = 1024  # of each tensor of an example
_RECORD = "batch"  # set name of the seals


@dataclass(frozen=True)
class _Place:
    """Position of a batch in the file, and the fingerprint of its inputs."""

    set_index: int
    inputs: str
    start: int
    end: int


class UnfinishedPredictions:
    """A file with one sealed record per batch, in the order of the batches.

    A record counts if it and all before it are intact. Memory holds only their positions.

    Args:
        path: the file; it is created or continued.
        key: seals the records, see `sealed_rows.user_key`.
        about: everything that the predictions depend on, except the inputs.

    Raises:
        OSError: if the file cannot be written.
        UserError: if another process is writing it.
    """

    def __init__(self, path: Path, key: bytes, about: str) -> None:
        self._path = path
        self._records = SealedRows(key, about)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file: BinaryIO = os.fdopen(descriptor, "r+b")
        try:
            _lock(self._file, path)
            self._places = list(self._find())
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._places)

    def inputs(self, index: int) -> str:
        """Return the fingerprint of the inputs of batch `index`."""
        return self._places[index].inputs

    def keep(self, count: int) -> None:
        """Forget all but the first `count` batches."""
        del self._places[count:]
        self._file.truncate(self._end)

    def append(self, set_index: int, inputs: str, lines: Sequence[str]) -> None:
        """Write a batch so that it outlives this process.

        Args:
            set_index: index of its set.
            inputs: fingerprint of its inputs.
            lines: its rows.

        Raises:
            OSError: if the disk is full; earlier batches are kept.
        """
        record = {"set": set_index, "inputs": inputs, "lines": list(lines)}
        content = self._records.line(_RECORD, record).encode() + b"\n"
        start = end = self._end
        while end < start + len(content):  # a buffered file would write the rest again on close if the disk is full
            end += os.pwrite(self._file.fileno(), content[end - start :], end)
        self._places.append(_Place(set_index, inputs, start, end))

    def count(self, set_index: int) -> int:
        """Return the number of batches of a set."""
        return sum(place.set_index == set_index for place in self._places)

    def batches_of(self, set_index: int) -> Iterator[list[str]]:
        """Yield the rows of each batch of a set."""
        for place in self._places:
            if place.set_index == set_index:
                record = self._records.read(_RECORD, os.pread(self._file.fileno(), place.end - place.start - 1, place.start))
                if record is None:
                    raise OSError(5, "changed while it was in use", str(self._path))
                yield record["lines"]

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, and its directory if nothing else is in it."""
        self._path.unlink(missing_ok=True)
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()

    @property
    def _end(self) -> int:
        return self._places[-1].end if self._places else 0

    def _find(self) -> Iterator[_Place]:
        """Yield the intact records at the start of the file; the rest is overwritten."""
        start = 0
        self._file.seek(0)
        for line in self._file:
            record = self._records.read(_RECORD, line.removesuffix(b"\n")) if line.endswith(b"\n") else None
            if record is None:
                return
            yield _Place(record["set"], record["inputs"], start, start + len(line))
            start += len(line)


def describe_data(trainer: L.Trainer) -> Any:
    """Describe the data before the first batch by sizes, first and last examples.

    A difference that this misses shows in a batch's own fingerprint before the batch is skipped.
    """
    sets = []
    for loader in each_loader(trainer.predict_dataloaders):
        dataset, batches = loader.dataset, loader.batch_sampler
        size = len(dataset) if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") else 0
        ends = [dataset[index] for index in (0, size - 1)] if size else []
        ends = ends if batches is None else [loader.collate_fn([example]) for example in ends]
        sets.append([size, getattr(batches, "batch_size", None), [fingerprint(end) for end in ends]])
    return {"sets": sets, "processes": trainer.world_size, "limit": trainer.limit_predict_batches}


def fingerprint(batch: Mapping[str, Any]) -> str:
    """Return a fingerprint of the ids and of (a part of) all tensors, the same for the same inputs on one kind of device."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().reshape(len(value) if value.ndim > 1 else 1, -1)
            part = flat[:, :: max(1, flat.shape[1] // _VALUES_HASHED)].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().tobytes())
        elif name == "id":
            digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:32]


def _lock(file: BinaryIO, path: Path) -> None:
    """Refuse a file that another process has locked; the lock ends with the process. Some file systems have none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is making the same predictions, in '{path}'; wait for it or stop it") from error
    except OSError:
        return
