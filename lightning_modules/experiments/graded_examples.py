"""The predictions of all test examples, which paired tests between variants need."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from fourier_moe.files.writing import replacing
from lightning_modules.callbacks.processes import of_all_processes
from lightning_modules.tasks.base import Batch

_FORMER_NAMES = {"given": "predictions", "right": "targets"}  # fields in older files


@dataclass(frozen=True)
class GradedSet:
    """The N examples of one test set, ordered by id.

    Attributes:
        ids: (N,) strings.
        predictions: (N,) predicted classes; for a task without classes 1 if the answer is correct, else 0.
        targets: (N,) correct classes; for a task without classes 1.
        num_classes: number of classes to choose from; None if no score needs it, and in older files.
    """

    ids: np.ndarray
    predictions: np.ndarray
    targets: np.ndarray
    num_classes: int | None = None


class GradedExamples(L.Callback):
    """Collect the predictions of every test, and a digest of the order of the training examples.

    Attributes:
        data_order: SHA-256 of the ids of the training examples in the order in which this process saw them.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._graded: dict[str, dict[str, tuple[int, int, int]]] = {}

    @property
    def data_order(self) -> str:
        return self._digest.hexdigest()[:12]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._digest.update("\n".join(map(str, batch["id"])).encode())
        self._digest.update(b"\n\n")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._graded = {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        prediction, target, num_classes = outputs["prediction"], outputs["target"], outputs["num_classes"]
        if prediction is None:
            return
        num_classes = torch.zeros_like(prediction) if num_classes is None else num_classes
        graded = zip(prediction.tolist(), target.tolist(), num_classes.tolist(), strict=True)
        examples = self._graded.setdefault(outputs["set"] or "", {})
        examples.update(zip(map(str, batch["id"]), graded, strict=False))  # this process's own examples come first

    def gather(self, trainer: L.Trainer) -> dict[str, GradedSet]:
        """Return the examples of the last test by name of the set ("" for a single one), of all processes together."""
        shares = of_all_processes(trainer, self._graded)
        sets = dict.fromkeys(name for share in shares for name in share)
        return {name: _graded_set({i: one for share in shares for i, one in share.get(name, {}).items()}) for name in sets}


def _graded_set(examples: dict[str, tuple[int, int, int]]) -> GradedSet:
    ids = sorted(examples)
    predictions, targets, num_classes = np.array([examples[id_] for id_ in ids], dtype=np.int32).reshape(-1, 3).T
    return GradedSet(np.array(ids), predictions, targets, int(num_classes.max(initial=0)) or None)


def save_examples(path: Path, examples: dict[str, GradedSet]) -> None:
    """Replace the file with these sets."""
    fields = [(name, field, value) for name, graded in examples.items() for field, value in vars(graded).items()]
    arrays = {f"{name}/{field}": value for name, field, value in fields if value is not None}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def load_examples(path: Path) -> dict[str, GradedSet]:
    """Read what `save_examples` wrote, now or under the former names of the fields."""
    with np.load(path, allow_pickle=False) as arrays:
        sets: dict[str, dict[str, Any]] = {}
        for key in arrays.files:
            name, _, field = key.rpartition("/")
            value = int(arrays[key]) if field == "num_classes" else arrays[key]
            sets.setdefault(name, {})[_FORMER_NAMES.get(field, field)] = value
        return {name: GradedSet(**fields) for name, fields in sets.items()}
