"""Task: the model to adapt, its loss and its scores. One subclass per kind of problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fourier_moe.errors import UserError

Batch = Mapping[str, Any]  # `id`, a list of B strings that are unique in their set, and what the task reads


class TaskData(Protocol):
    """What tasks and callbacks read from a DataModule. `datamodules.BaseDataModule` has all of it.

    Its loaders yield batches: mappings with `id`, a list of B strings that are unique in their set, and what the task reads.
    Several evaluation sets are returned as a dict of loaders by name.

    Attributes:
        dataset_name: name of the data in model cards; None if it has none.
        num_classes: outputs of a head; None if there are no classes, or before they are known.
        class_names: name of each class, by label; empty if there are none, or before they are known.
        evaluation_notes: what a reader of the results must know, by name of the test set; a single set is called `test`.
        data_revision: commit of the data set on the hub; None for other data.
        num_train_examples: examples per epoch; None if unknown before `setup`.
        batch_size: training examples per batch and process.
    """

    @property
    def dataset_name(self) -> str | None: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def evaluation_notes(self) -> Mapping[str, str]: ...
    @property
    def data_revision(self) -> str | None: ...
    @property
    def num_train_examples(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...


_FIELDS = [name for name in vars(TaskData) if not name.startswith("_")]


@dataclass(frozen=True)
class _UnknownData:
    """The TaskData of loaders without a DataModule, or of a DataModule without any of its fields."""

    dataset_name: str | None
    num_classes: None = None
    class_names: Sequence[str] = ()
    evaluation_notes: Mapping[str, str] = field(default_factory=dict)
    data_revision: None = None
    num_train_examples: None = None
    batch_size: int = 1


def task_data(data: L.LightningDataModule | None) -> TaskData:
    """Return a DataModule as TaskData; an empty one for None, or if it has none of the fields.

    Raises:
        UserError: if it has only some of the fields.
    """
    missing = [name for name in _FIELDS if not (hasattr(type(data), name) or name in getattr(data, "__dict__", ()))]
    present = set(_FIELDS) - set(missing) - {"batch_size"}
    if not present:
        return _UnknownData(None if data is None else type(data).__name__)
    if missing:
        raise UserError(
            f"{type(data).__name__} has {', '.join(sorted(present))} but not {', '.join(missing)}; derive it from "
            "datamodules.BaseDataModule, which has all of them"
        )
    return cast(TaskData, data)


def run_data(trainer: L.Trainer | None) -> TaskData:
    """Return the DataModule of a run as TaskData; see `task_data`."""
    return task_data(data_module(trainer))


def data_module(trainer: L.Trainer | None) -> L.LightningDataModule | None:
    """Return the DataModule of a run; None if it has only loaders."""
    return getattr(trainer, "datamodule", None)  # set by Lightning only if there is one


@dataclass(frozen=True)
class Evaluation:
    """The result of a batch of B examples.

    Attributes:
        metric_inputs: keyword arguments of the metrics' `update`, each with one entry per example.
        loss: loss of each example (B,); None if unknown.
        rows: one row per example for reports, with `id` as its first entry; or no rows.
        prediction: predicted class of each example (B,); for a task without classes 1 if its answer is correct, else 0. None
            if nothing is graded.
        target: correct class of each example (B,); for a task without classes 1. None together with `prediction`.
        num_classes: number of classes to choose from, for each example (B,); None if no score needs it.
    """

    metric_inputs: Mapping[str, Tensor]
    loss: Tensor | None = None
    rows: Sequence[dict[str, Any]] = field(default_factory=list)
    prediction: Tensor | None = None
    target: Tensor | None = None
    num_classes: Tensor | None = None

    def first(self, count: int) -> Evaluation:
        """Return the result of the first `count` examples."""
        inputs = {name: values[:count] for name, values in self.metric_inputs.items()}
        by_example = (self.loss, self.prediction, self.target, self.num_classes)
        loss, *graded = (None if values is None else values[:count] for values in by_example)
        return Evaluation(inputs, loss, self.rows[:count], *graded)


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return a batch of the chosen examples."""
    if len(rows) == len(batch["id"]):
        return batch
    return {name: v[list(rows)] if isinstance(v, Tensor) else [v[row] for row in rows] for name, v in batch.items()}


class Task(nn.Module, ABC):
    """A pretrained model with a head, its loss, its metrics and its predictions.

    Cheap to construct; `build` loads the model. Adapters are injected into `model`, and adapter files belong to it.

    Attributes:
        head_names: modules in `model` that are trained in full, in addition to the adapters; known after `build`.
        main_metric: the metric that progress bars and tables show.
        monitor: the logged value that selects the best adapter and checkpoint, and whether its `max` or `min` is best: what
            `monitor: task` in a config stands for.
        pipeline_tag: the Hugging Face hub's name of this kind of task.
        prediction_columns: keys of `predict`'s rows that become columns of the predictions file; None for all of them, and for
            a classifier, whose rows have `id`, `label`, `probabilities` and perhaps `text`.
        batch_keys: what the loss reads of a batch; data whose batches lack one of them are refused.
        model: None until `build`.
        split: the current split, `val`, `test` or `predict`; a task may do less in validation.
    """

    head_names: tuple[str, ...] = ()
    main_metric: ClassVar[str]
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/loss", "min")
    pipeline_tag: ClassVar[str | None] = None
    prediction_columns: ClassVar[tuple[str, ...] | None] = None
    batch_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self.split: Literal["val", "test", "predict"] = "test"

    @property
    def works_untrained(self) -> bool:
        """Whether the model predicts sensibly before any training (a zero-shot head, a language model)."""
        return False

    @abstractmethod
    def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> nn.Module:
        """Load the pretrained model, add the head, keep the result as `model` and return it.

        Under `torch.device("meta")` (see `without_weights`) build the same model without reading any weights, which another
        process broadcasts.
        """

    def fetch(self) -> None:
        """Fetch what `build` reads from a network, so that a failure comes before the data are fetched. By default nothing.

        Raises:
            UserError: if it cannot be fetched.
        """
        return

    def forward_flops(self) -> int | None:
        """Count the floating-point operations of one example's forward pass without loading anything; None if unknown."""
        return None

    def arguments(self) -> dict[str, Any] | None:
        """Return the constructor arguments that determine `model`, for model cards; None if the card should not have them."""
        return None

    def check_data(self, data: TaskData) -> None:
        """Check the kind of the data, before model and data are loaded and again before `build`.

        Raises:
            UserError: if a batch lacks one of `batch_keys`. A DataModule without `batch_keys` is not checked.
        """
        keys = getattr(data, "batch_keys", ())
        missing = [key for key in self.batch_keys if keys and key not in keys]
        if missing:
            raise UserError(
                f"{type(self).__name__} needs batches with {', '.join(missing)}, and those of {type(data).__name__} have "
                f"{', '.join(keys)}; choose a model.task.class_path and a data.class_path of one kind"
            )

    def tell_data(self, data: L.LightningDataModule | None) -> None:
        """Tell a run's DataModule what the model reads, before its `prepare_data` and `setup`. By default nothing."""
        return

    def check(self, loaders: Sequence[Any]) -> None:
        """Check the sets of this split, one loader each, before anything is read.

        Raises:
            UserError: if this task cannot score one of them.
        """

    def check_training(self, data: TaskData) -> None:
        """Check the built model and the data together, before the first training step. By default nothing.

        Raises:
            UserError: if this model cannot be trained on batches of this kind.
        """
        return

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a training batch, over what `loss_weight` counts."""

    def loss_weight(self, batch: Batch) -> Tensor | float:
        """Return the number that the mean in `loss` is over: the number of examples by default.

        Batches and processes of an optimizer step are weighted by it, so the step's gradient is that of one batch. Override it
        for a loss that divides by anything else: the number of label tokens, or the sum of the class weights of the labels
        (`F.cross_entropy` with `weight`).
        """
        return len(batch["id"])

    @abstractmethod
    def new_metrics(self) -> MetricCollection:
        """Return new metrics for one split; their names become TensorBoard tags (`val/accuracy`)."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> Evaluation:
        """Score a batch of validation or test."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """Return one row of the predictions file per example, with `id` as its first entry."""

    def save_model(self, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the whole model, without adapters, as a directory that the model's own library loads without this package.

        Raises:
            UserError: if the task has no such format.
        """
        raise UserError(f"{type(self).__name__} has no format for a whole model; implement Task.save_model")

    def token_mask(self, batch: Batch) -> Tensor | None:
        """Return a mask (B, T), true for real tokens and false for padding; None if the task does not pad."""
        return None


def without_weights() -> bool:
    """Return whether models are currently built on the meta device, with shapes and dtypes but no values."""
    return torch.get_default_device().type == "meta"
