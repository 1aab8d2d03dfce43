"""EvaluationSets: the results of the sets of one split (val or test)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from fourier_moe.errors import UserError
from lightning_modules.tasks import Evaluation


@dataclass(frozen=True)
class SetResult:
    """The result of a set: its number of scored examples, and its metrics by name."""

    count: int
    values: dict[str, float]


class EvaluationSet(nn.Module):
    """Metrics and mean loss of one set, exact over uneven batches and over processes."""

    def __init__(self, metrics: MetricCollection) -> None:
        super().__init__()
        self.metrics, self.loss = metrics, MeanMetric()
        self.num_scored, self.num_with_loss = SumMetric(), SumMetric()
        self.reset()

    def update(self, evaluation: Evaluation) -> None:
        if evaluation.metric_inputs:
            self.num_scored.update(len(next(iter(evaluation.metric_inputs.values()))))
            self.metrics.update(**evaluation.metric_inputs)
        if evaluation.loss is not None:
            self.num_with_loss.update(len(evaluation.loss))
            self.loss.update(evaluation.loss)

    def compute(self) -> SetResult:
        """Return the result so far. All processes must call it together."""
        values: dict[str, float] = {}
        num_scored, num_with_loss = int(self.num_scored.compute()), int(self.num_with_loss.compute())
        if num_scored:
            values |= {key: float(value) for key, value in self.metrics.compute().items()}
        if num_with_loss:
            values["loss"] = float(self.loss.compute())
        return SetResult(max(num_scored, num_with_loss), values)

    def reset(self) -> None:
        for metric in (self.metrics, self.loss, self.num_scored, self.num_with_loss):
            metric.reset()
        for count in (self.num_scored, self.num_with_loss):
            count.update(0)  # otherwise compute warns on a process without examples of this set


class EvaluationSets(nn.Module):
    """The sets of one split. If there are several, the DataModule returns a dict of loaders, whose keys are their names.

    Attributes:
        results: the result of every set at the last `compute`.
    """

    def __init__(self, names: list[str | None], new_metrics: Callable[[], MetricCollection]) -> None:
        super().__init__()
        self.names = names
        self.results: list[SetResult] = []
        self.sets = nn.ModuleList(EvaluationSet(new_metrics()) for _ in names)

    def __getitem__(self, index: int) -> EvaluationSet:
        one = self.sets[index]
        assert isinstance(one, EvaluationSet)
        return one

    def compute(self) -> dict[str, float]:
        """Return all values by name: `accuracy`; with named sets `gsm8k/accuracy`, and `accuracy` as the mean."""
        self.results = [self[index].compute() for index in range(len(self.names))]
        by_metric: dict[str, list[float]] = {}
        named: dict[str, float] = {}
        for name, result in zip(self.names, self.results, strict=True):
            for key, value in result.values.items():
                by_metric.setdefault(key, []).append(value)
                if name is not None:
                    named[f"{name}/{key}"] = value
        return named | {key: sum(values) / len(values) for key, values in by_metric.items()}

    def reset(self) -> None:
        for index in range(len(self.names)):
            self[index].reset()


def set_names(loaders: Any) -> list[str | None]:
    """Return the names of the sets that a DataModule's loaders read; None for a single loader.

    Raises:
        UserError: if several sets have no names.
    """
    if isinstance(loaders, Mapping):
        return [str(name) for name in loaders]
    if len(each_loader(loaders)) > 1:
        raise UserError(
            f"the DataModule returns {len(loaders)} evaluation loaders in a list; return a dict, {{name of the set: loader}}"
        )
    return [None]


def each_loader(loaders: Any) -> list[Any]:
    """Return the loaders that a DataModule returned as one loader, a dict or a list."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def num_own(loader: Any, batch_idx: int, batch_size: int) -> int:
    """Return how many examples at the start of a batch belong to this process.

    The others are repetitions, which DistributedSampler appends to its interleaved order so that all processes have the same
    number of batches.
    """
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or batches is None:
        return batch_size
    total, first = len(sampler.dataset), batch_idx * batches.batch_size  # type: ignore[arg-type]
    return sum((first + row) * sampler.num_replicas + sampler.rank < total for row in range(batch_size))


def limit_of(trainer: L.Trainer, command: str, loaders: Iterable[Any]) -> str | None:
    """Return the limit that leaves examples out of a test, validation or prediction; None if none are left out."""
    split = {"test": "test", "validate": "val", "predict": "predict"}[command]
    numbers = getattr(trainer, f"num_{split}_batches")
    limit = getattr(trainer, f"limit_{split}_batches")
    try:
        whole = all(number >= len(loader) for number, loader in zip(numbers, loaders, strict=True))
    except TypeError:  # a loader without length
        whole = isinstance(limit, float) and limit == 1.0
    return None if whole else f"limit_{split}_batches={limit}"
