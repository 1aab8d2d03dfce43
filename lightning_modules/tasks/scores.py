"""Scores of given against right classes, once as functions of weighted examples and once as torchmetrics.

Both read the same formulas, so that what a test logs is what a paired test resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

Score = Callable[[np.ndarray, np.ndarray, np.ndarray, int | None], float]


def accuracy(given: np.ndarray, right: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Share of the weight on right answers."""
    return float(weights[given == right].sum() / weights.sum())


def balanced_accuracy(given: np.ndarray, right: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Mean over the classes that occur of the share of their examples answered right, as scikit-learn defines it."""
    hits, _, actual = _counts(given, right, weights)
    return float((hits[actual > 0] / actual[actual > 0]).mean())


def f1(given: np.ndarray, right: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Of class 1 where there are two classes, else the mean over the classes that occur or are given.

    Where `num_classes` is not known (files of an older version), two classes are assumed unless a third occurs or is given.
    """
    return _f1(*_counts(given, right, weights), num_classes)


def matthews(given: np.ndarray, right: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004); 0 where one class is all there is."""
    return _matthews(*_counts(given, right, weights))


SCORES: dict[str, Score] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": f1, "matthews": matthews}


class BalancedAccuracy(MulticlassAccuracy):
    """`balanced_accuracy` of all examples. torchmetrics' own counts a class that only occurs among the predictions as 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="macro")

    def compute(self) -> Tensor:
        hits, _, _, misses = self._final_state()
        actual = hits + misses
        return (hits[actual > 0] / actual[actual > 0]).mean()


class F1(MulticlassConfusionMatrix):
    """`f1` of all examples. A task of two classes keeps its F1 of class 1 beside tasks of more, in one head."""

    most_classes: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.add_state("most_classes", torch.tensor(0), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor, num_classes: Tensor | None = None) -> None:
        """Count examples.

        Args:
            preds: classes that were given (B,).
            target: the right ones (B,).
            num_classes: number of classes of each example's task (B,); None for all of the head.
        """
        super().update(preds, target)
        of_tasks = preds.new_tensor([self.num_classes]) if num_classes is None else num_classes
        self.most_classes = torch.cat([self.most_classes.view(1), of_tasks]).amax()

    def compute(self) -> Tensor:
        return torch.tensor(_f1(*_counts_of(super().compute()), int(self.most_classes)))


class Matthews(MulticlassConfusionMatrix):
    """`matthews` of all examples. torchmetrics' own gives a model that always gives one of two classes 0.03 on CoLA, not 0."""

    def compute(self) -> Tensor:
        return torch.tensor(_matthews(*_counts_of(super().compute())))


def _f1(hits: np.ndarray, named: np.ndarray, actual: np.ndarray, num_classes: int | None) -> float:
    both = named + actual
    if num_classes == 2 or (num_classes is None and not both[2:].any()):
        return float(2 * hits[1] / both[1]) if both[1] else 0.0
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def _matthews(hits: np.ndarray, named: np.ndarray, actual: np.ndarray) -> float:
    total = actual.sum()
    spread = (total**2 - (named**2).sum()) * (total**2 - (actual**2).sum())
    return float((hits.sum() * total - (named * actual).sum()) / math.sqrt(spread)) if spread > 0 else 0.0


def _counts(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight by class of right answers, of answers, and of examples."""
    classes = int(max(given.max(), right.max())) + 1
    hit = given == right
    pairs = ((given[hit], weights[hit]), (given, weights), (right, weights))
    hits, named, actual = (np.bincount(labels, weight, minlength=max(2, classes)) for labels, weight in pairs)
    return hits, named, actual


def _counts_of(confusion: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same from how often each right class (row) was given each class (column)."""
    counts = confusion.cpu().double().numpy()
    return counts.diagonal(), counts.sum(0), counts.sum(1)
