"""Task: what is adapted and how it is scored. One subclass per kind of problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

Batch = Mapping[str, Any]


class Task(nn.Module, ABC):
    """A pretrained model with a head, its loss, its metrics and its predictions.

    Cheap to construct; `build` loads the model. `model` is the module that adapters are injected into and that adapter files
    belong to.

    Attributes:
        head_names: modules in `model` that are trained in full, beside the adapters.
        main_metric: the metric that progress bars and tables show.
        model: None until `build`.
    """

    head_names: ClassVar[tuple[str, ...]] = ()
    main_metric: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None

    @property
    def works_untrained(self) -> bool:
        """Whether the model predicts sensibly before any training (a zero-shot head, a language model)."""
        return False

    @abstractmethod
    def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> nn.Module:
        """Load the pretrained model, add the head, keep the result as `model` and return it."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a training batch."""

    @abstractmethod
    def new_metrics(self) -> MetricCollection:
        """Fresh metrics for one split; their names become TensorBoard tags (`val/accuracy`)."""

    @abstractmethod
    def evaluate(self, batch: Batch, metrics: MetricCollection) -> Tensor:
        """Update `metrics` with a batch; return the batch's mean loss."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """One row of the predictions file per example; `id` is its first entry."""

    def token_mask(self, batch: Batch) -> Tensor | None:
        """True for real tokens, false for padding, as (batch, length); None if the task pads nothing."""
        return None
