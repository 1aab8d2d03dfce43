"""Logits of classifiers: scores, rows of predictions, and the classes of several tasks under one head.

A batch of a mixture has `classes`, int64 (B, 2): the first class of each example's task, and the one after its last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fourier_moe.errors import UserError
from lightning_modules.tasks.base import Batch, Evaluation, TaskData


def require_two_classes(data: TaskData) -> None:
    """Refuse data of a single class, which would teach nothing.

    Raises:
        UserError: naming the class.
    """
    if data.num_classes == 1:
        raise UserError(f"the data has one class ({', '.join(data.class_names) or 'without a name'}); a classifier needs two")


def own_classes_only(logits: Tensor, batch: Batch) -> Tensor:
    """Return logits (B, classes) with -infinity for classes of other tasks than the example's."""
    if "classes" not in batch:
        return logits
    classes = torch.arange(logits.shape[-1], device=logits.device)
    first, end = batch["classes"].split(1, -1)
    return logits.masked_fill((classes < first) | (classes >= end), -torch.inf)


def evaluate_classes(logits: Tensor, batch: Batch) -> Evaluation:
    """Score the logits (B, classes) of `own_classes_only`; metrics count a task's classes from 0."""
    loss = F.cross_entropy(logits, batch["label"], reduction="none")
    every = torch.tensor([[0, logits.shape[-1]]], device=logits.device).expand(len(logits), 2)
    first, end = batch.get("classes", every).unbind(-1)
    prediction, target, num_classes = logits.argmax(-1) - first, batch["label"] - first, end - first
    inputs = {"preds": prediction, "target": target, "num_classes": num_classes}
    return Evaluation(inputs, loss, prediction=prediction, target=target, num_classes=num_classes)


def class_rows(logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
    """Return the rows of `Task.predict` for logits (B, classes).

    They have `id`, `text` if the batch has it, `label` (None if unknown) and `probabilities`.
    """
    labels = batch["label"].tolist() if "label" in batch else [None] * len(logits)
    names = [name for name in ("id", "text") if name in batch]
    inputs = [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
    results = zip(labels, logits.softmax(-1).tolist(), strict=True)
    return [{**row, "label": label, "probabilities": p} for row, (label, p) in zip(inputs, results, strict=True)]
