"""Adapter: what every adapted projection offers to trainers, callbacks and files, whatever its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from fourier_moe.config import ProjectionAdapterConfig
from fourier_moe.errors import UserError
from fourier_moe.models.input_moments import InputMoments
from fourier_moe.models.pretrained_weight import PretrainedWeight
from fourier_moe.models.projection import device_of, projection_shape

ParameterKind = Literal["experts", "router", "adapter", "head", "backbone"]

_LAYERS: dict[type[ProjectionAdapterConfig], type[Adapter]] = {}
_Layer = TypeVar("_Layer", bound="type[Adapter]")


class Adapter(nn.Module, ABC):
    """A frozen projection `base` with trained additions. Found in a model by `adapters(model)`.

    A subclass is constructed as `Layer(base, config, name)`; `name` is the projection's name in its model.

    Attributes:
        named_generator: whether the layer draws from a generator of its own. If not, `inject` seeds PyTorch's global one while
            it builds the layers, and puts it back.
        changes_base: whether `base` is a changed copy of the model's projection and not that projection itself.
        projection_name: the projection's name in its model, for messages; `inject` sets it.
        input_moments: mean and std of the input, for `normalize_input: moments`, else None; `inject` sets them.
        reminders: what warns a training loop that leaves out `regularization` or `after_step`, by method.
    """

    named_generator = False
    changes_base = False
    projection_name = "the adapted projection"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.reminders: dict[str, Any] = {}
        self.base = base
        self.input_moments: InputMoments | None = None
        self.in_features, self.out_features = projection_shape(base)

    @classmethod
    def connect(cls, adapters: Mapping[str, Any], config: Any) -> None:
        """Let the adapters of a model share what they share; called once, when `inject` has built all of them.

        Args:
            adapters: all adapters of the model, by name; they are of this class.
            config: what they were built with.
        """

    def reads(self, x: Tensor) -> Tensor:
        """What the method computes its update from: x, centered and scaled where the config has `normalize_input: moments`.

        A method whose config has `normalizes_input` passes its input through here.
        """
        return x if self.input_moments is None else self.input_moments(x)

    @abstractmethod
    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        """Trained parameters by kind: `experts` and `router`, or `adapter` for a method without experts."""

    def num_replaced(self) -> int:
        """Number of the projection's own parameters that are gone, because the method trains others in their place."""
        return 0

    def balance_loss(self) -> Tensor | None:
        """Load-balancing loss of the recorded forward, already times its weight; None for a method without routing."""
        return None

    def regularization(self) -> Tensor | None:
        """Return a loss on the adapter's own parameters, already times its weight; None for a method without one."""
        return None

    def after_step(self) -> None:
        """Update the adapter after an optimizer step. By default does nothing."""

    def rebase(self, base: nn.Module) -> None:
        """Call `base`, another module with the same weight, from now on."""
        self.base = base

    def merged(self) -> nn.Module:
        """Return a copy of `base` with the update in its weight, W0 + dW: no longer an adapter.

        Raises:
            UserError: if the method has no merge, as no method that routes tokens has, or the weight cannot take an update
                (quantized, sharded).
        """
        raise UserError(f"{type(self).__name__} cannot be merged into one weight; serve it with its adapter")

    # Code around a projection (dtype look-ups, fused kernels' checks) may look at its weight, but not multiply with it.
    @property
    def weight(self) -> Tensor:
        return PretrainedWeight.of(self.base.weight, self.projection_name)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


def layer_of(*configs: type[ProjectionAdapterConfig]) -> Callable[[_Layer], _Layer]:
    """Decorate the layer that `inject` builds for configs of these classes, and of subclasses without a layer of their own.

    @layer_of(MyConfig)
    class MyLinear(Adapter):
        def __init__(self, base: nn.Module, config: MyConfig, name: str) -> None: ...
    """

    def register(layer: _Layer) -> _Layer:
        _LAYERS.update(dict.fromkeys(configs, layer))
        return layer

    return register


def layer_class(config: ProjectionAdapterConfig) -> type[Adapter]:
    """Return the layer that is registered for a config.

    Raises:
        UserError: if there is none.
    """
    for kind in type(config).__mro__:
        if kind in _LAYERS:
            return _LAYERS[kind]
    raise UserError(f"{type(config).__name__} has no layer; decorate one with @layer_of({type(config).__name__})")


def build_layer(base: nn.Module, config: ProjectionAdapterConfig, name: str) -> Adapter:
    """Return the adapter that takes the place of projection `base`, known in its model as `name`."""
    make: Any = layer_class(config)
    layer: Adapter = make(base, config, name)
    if config.normalize_input == "moments":
        layer.input_moments = InputMoments(layer.in_features, device_of(base))
    return layer


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return all adapted projections of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
