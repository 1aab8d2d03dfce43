"""Scores of predicted against correct classes, once as functions of weighted examples and once as torchmetrics.

Both share the formulas, so paired tests resample the score that a test logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

Score = Callable[[np.ndarray, np.ndarray, np.ndarray, int | None], float]


def accuracy(predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Return the share of the weight on correct predictions."""
    return float(weights[predictions == targets].sum() / weights.sum())


def balanced_accuracy(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, num_classes: int | None = None
) -> float:
    """Return the mean recall over the classes that occur, as scikit-learn defines it."""
    hits, _, actual = _counts(predictions, targets, weights)
    return float((hits[actual > 0] / actual[actual > 0]).mean())


def f1(predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Return F1 of class 1 of two classes, otherwise the mean over the classes that occur or are predicted.

    If `num_classes` is unknown (files of an older version), two classes are assumed unless a third occurs or is predicted.
    """
    return _f1(*_counts(predictions, targets, weights), num_classes)


def matthews(predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, num_classes: int | None = None) -> float:
    """Return the Matthews correlation coefficient for any number of classes (Gorodkin 2004); 0 if there is only one class."""
    return _matthews(*_counts(predictions, targets, weights))


SCORES: dict[str, Score] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": f1, "matthews": matthews}


def lower_is_better(metrics: MetricCollection) -> list[str]:
    """Return the names of the metrics that are better when lower, as `higher_is_better` declares; the loss is one."""
    return ["loss", *(name for name, metric in metrics.items() if metric.higher_is_better is False)]


def not_shares(metrics: MetricCollection) -> list[str]:
    """Return the names of the metrics that percent cannot express: those whose `plot_upper_bound` is not 1, and the loss."""
    return ["loss", *(name for name, metric in metrics.items() if metric.plot_upper_bound != 1)]


class BalancedAccuracy(MulticlassAccuracy):
    """`balanced_accuracy` of all examples. torchmetrics' own counts a class that is predicted but never occurs as 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="macro")

    def compute(self) -> Tensor:
        hits, _, _, misses = self._final_state()
        actual = hits + misses
        return (hits[actual > 0] / actual[actual > 0]).mean()


class F1(MulticlassConfusionMatrix):
    """`f1` of all examples. Under a head shared with larger tasks, a task of two classes keeps its F1 of class 1."""

    higher_is_better = True
    plot_upper_bound = 1.0
    most_classes: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.add_state("most_classes", torch.tensor(0), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor, num_classes: Tensor | None = None) -> None:
        """Count examples.

        Args:
            preds: predicted classes (B,).
            target: correct classes (B,).
            num_classes: number of classes of each example's task (B,); None for all classes of the head.
        """
        super().update(preds, target)
        numbers = preds.new_tensor([self.num_classes]) if num_classes is None else num_classes
        self.most_classes = torch.cat([self.most_classes.view(1), numbers]).amax()

    def compute(self) -> Tensor:
        return torch.tensor(_f1(*_counts_of(super().compute()), int(self.most_classes)))


class Matthews(MulticlassConfusionMatrix):
    """`matthews` of all examples. torchmetrics' own is 0.03, not 0, on CoLA for a model that always predicts the same class."""

    higher_is_better = True
    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        return torch.tensor(_matthews(*_counts_of(super().compute())))


def _f1(hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray, num_classes: int | None) -> float:
    both = predicted + actual
    if num_classes == 2 or (num_classes is None and not both[2:].any()):
        return float(2 * hits[1] / both[1]) if both[1] else 0.0
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def _matthews(hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> float:
    total = actual.sum()
    variances = (total**2 - (predicted**2).sum()) * (total**2 - (actual**2).sum())
    return float((hits.sum() * total - (predicted * actual).sum()) / math.sqrt(variances)) if variances > 0 else 0.0


def _counts(predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the total weight of each class in correct predictions, in predictions, and in targets."""
    classes = int(max(predictions.max(), targets.max())) + 1
    hit = predictions == targets
    pairs = ((predictions[hit], weights[hit]), (predictions, weights), (targets, weights))
    hits, predicted, actual = (np.bincount(labels, weight, minlength=max(2, classes)) for labels, weight in pairs)
    return hits, predicted, actual


def _counts_of(confusion: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same as `_counts` for a confusion matrix with targets by row and predictions by column."""
    counts = confusion.cpu().double().numpy()
    return counts.diagonal(), counts.sum(0), counts.sum(1)
