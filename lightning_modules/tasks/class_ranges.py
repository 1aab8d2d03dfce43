"""Classes of several tasks under one head: an example chooses among those of its own task.

A batch of a mixture has `classes`, int64 (B, 2): the first class of each example's task, and the one after its last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.tasks.base import Batch, Evaluation


def own_classes_only(logits: Tensor, batch: Batch) -> Tensor:
    """Return logits (B, classes) with -infinity for classes of other tasks than the example's."""
    if "classes" not in batch:
        return logits
    classes = torch.arange(logits.shape[-1], device=logits.device)
    first, end = batch["classes"].split(1, -1)
    return logits.masked_fill((classes < first) | (classes >= end), -torch.inf)


def evaluate_classes(logits: Tensor, batch: Batch) -> Evaluation:
    """Score logits (B, classes) that `own_classes_only` gave; metrics count a task's classes from 0."""
    loss = F.cross_entropy(logits, batch["label"], reduction="none")
    every = torch.tensor([[0, logits.shape[-1]]], device=logits.device).expand(len(logits), 2)
    first, end = batch.get("classes", every).unbind(-1)
    prediction, target, num_classes = logits.argmax(-1) - first, batch["label"] - first, end - first
    inputs = {"preds": prediction, "target": target, "num_classes": num_classes}
    return Evaluation(inputs, loss, prediction=prediction, target=target, num_classes=num_classes)
