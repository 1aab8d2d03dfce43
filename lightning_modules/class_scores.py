"""Scores of given against right classes, once as functions of weighted examples and once as torchmetrics.

Both read the same formulas, so that what a test logs is what a paired test resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

Score = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def accuracy(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Share of the weight on right answers."""
    return float(weights[given == right].sum() / weights.sum())


def balanced_accuracy(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Mean of the share of right answers over the classes that occur or are given."""
    hits, named, actual = _counts(given, right, weights)
    known = named + actual > 0
    return float((hits[known] / np.maximum(actual[known], 1)).mean())


def f1(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Of class 1 where no class beyond it occurs or is given, else the mean over the classes that do."""
    return _f1(*_counts(given, right, weights))


def matthews(given: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004); 0 where one class is all there is."""
    return _matthews(*_counts(given, right, weights))


SCORES: dict[str, Score] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": f1, "matthews": matthews}


class F1(MulticlassConfusionMatrix):
    """The same of all examples: a task of two classes keeps its F1 of class 1 beside tasks of more, in one head."""

    def compute(self) -> Tensor:
        return torch.tensor(_f1(*_counts_of(super().compute())))


class Matthews(MulticlassConfusionMatrix):
    """The same of all examples. torchmetrics' own gives a model that always gives one of two classes 0.03 on CoLA, not 0."""

    def compute(self) -> Tensor:
        return torch.tensor(_matthews(*_counts_of(super().compute())))


def _f1(hits: np.ndarray, named: np.ndarray, actual: np.ndarray) -> float:
    both = named + actual
    if not both[2:].any():
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
