"""Adapter: what every adapted projection offers to trainers, callbacks and files, whatever its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.models.pretrained_weight import PretrainedWeight

if TYPE_CHECKING:
    from fourier_moe.routing.reminders import Reminder


class Adapter(nn.Module, ABC):
    """A frozen projection `base` with trained additions. Found in a model by `adapters(model)`.

    Attributes:
        changes_base: whether `base` is a changed copy of the model's projection and not that projection itself.
        projection_name: the projection's name in its model, for messages; `inject` sets it.
        reminders: what is said to a training loop that leaves out `regularization` or `after_step`, by method.
    """

    changes_base = False
    projection_name = "the adapted projection"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.reminders: dict[str, Reminder] = {}
        self.base = base
        self.in_features, self.out_features = projection_shape(base)

    @abstractmethod
    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Trained parameters by kind: `experts` and `router`, or `adapter` for a method without experts."""

    def num_replaced(self) -> int:
        """Number of the projection's own parameters that are gone, because the method trains others in their place."""
        return 0

    def balance_loss(self) -> Tensor | None:
        """Load-balancing loss of the recorded forward, already times its weight; None for a method without routing."""
        return None

    def regularization(self) -> Tensor | None:
        """A loss on the adapter's own parameters, already times its weight; None for a method without one."""
        return None

    def after_step(self) -> None:
        """What a method does after every optimiser step, if anything."""

    def rebase(self, base: nn.Module) -> None:
        """Call `base`, another module with the same weight, from now on."""
        self.base = base

    def merged(self, gates: Tensor | None = None) -> nn.Module:
        """A copy of `base` with the update in its weight, W0 + dW: no adapter any more.

        Args:
            gates: for a method that routes, the gate (E,) of every expert, the same for all tokens.

        Raises:
            UserError: if the method has no merge, or the weight cannot take an update (quantised, sharded).
        """
        raise UserError(f"{type(self).__name__}: this method has no merge into a weight")

    # Code around a projection (dtype look-ups, fused kernels' checks) may look at its weight, but not multiply with it.
    @property
    def weight(self) -> Tensor:
        return PretrainedWeight.of(self.base.weight, self.projection_name)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters or, if it has none, its buffers are."""
    return next(chain(module.parameters(), module.buffers())).device


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear projection: torch's Linear and its quantised kin, or transformers' Conv1D.

    Raises:
        UserError: if the module is no linear projection.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    raise UserError(f"{type(module).__name__} is no linear projection; adapters replace torch.nn.Linear and its like")
