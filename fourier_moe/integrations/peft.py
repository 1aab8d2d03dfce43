"""FourierMoE as a tuner of the peft library: `get_peft_model(model, FourierMoEPeftConfig(...))`.

Importing this module makes the method known to peft. `peft.utils.register_peft_method` takes only names that are in peft's own
enum PeftType, so this module enters the method into the three mappings that it would fill, under a string that has the `name`
and `value` of an enum member. Nothing of peft is changed or replaced. `import fourier_moe` does not import peft.

The layers are those that `inject` builds: a model has the same outputs, to the bit, either way.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from fourier_moe.adapter import build_layer
from fourier_moe.errors import UserError
from fourier_moe.inject import check_projections
from fourier_moe.models.known_output import KnownOutput
from fourier_moe.models.pretrained_weight import PretrainedWeight
from fourier_moe.models.projection import with_update
from fourier_moe.routing.reminders import attach_reminders
from fourier_moe.spectral.config import FourierMoEConfig

if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
    raise ImportError(f"fourier_moe.integrations.peft needs peft 0.21 or newer, found {peft.__version__}")


class _PeftType(str):
    """What peft expects of a PeftType: a string that has its own text as `name` and `value`."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return str(self)

    value = name


PEFT_TYPE: Any = _PeftType("FOURIER_MOE")

_SETTINGS = [setting for setting in dataclasses.fields(FourierMoEConfig) if setting.name not in ("targets", "head")]
_Settings: Any = dataclasses.make_dataclass(
    "_Settings", [(s.name, s.type, field(default=s.default)) for s in _SETTINGS], kw_only=True
)


@dataclass(kw_only=True)
class FourierMoEPeftConfig(PeftConfig, _Settings):  # type: ignore[misc] # made of FourierMoEConfig
    """What FourierMoEConfig says, for peft: all its fields but `targets` and `head`, with the same meaning and defaults.

    Args:
        target_modules: projections to adapt, as for peft's LoraConfig: ends of names, or one regular expression; null for the
            ones that peft knows for the model's architecture.
        modules_to_save: modules that are trained in full and saved.
        exclude_modules: projections to leave out, in the form of target_modules.
        layers_to_transform: numbers of the layers to adapt; null for all.
        layers_pattern: name of the list of layers, where layers_to_transform is given.

    Raises:
        UserError: for an impossible value, and for `router_scope` other than `projection`: in peft, every projection has its
            own router.
    """

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.router_scope != "projection":
            raise UserError(f"router_scope={self.router_scope!r} must be 'projection' in peft; `inject` shares routers")
        self.method()

    def method(self) -> FourierMoEConfig:
        """Return the settings of the method; its targets are peft's."""
        settings = {setting.name: getattr(self, setting.name) for setting in _SETTINGS}
        targets = self.target_modules or ["target_modules"]
        return FourierMoEConfig(targets=[targets] if isinstance(targets, str) else sorted(targets), **settings)


class FourierMoEPeftLinear(nn.Module, BaseTunerLayer):
    """y = base_layer(x), plus the update of every active adapter: (..., in_features) -> (..., out_features).

    Attributes:
        base_layer: the frozen projection.
        fourier_moe_layers: a FourierMoELinear by the name of the adapter, around what base_layer has computed.
    """

    adapter_layer_names = ("fourier_moe_layers",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fourier_moe_layers = nn.ModuleDict()
        self.merged_adapters: list[str] = []  # peft's base class has one list for all layers

    def update_layer(self, adapter_name: str, config: FourierMoEPeftConfig, name: str) -> None:
        """Add an adapter; `name` is the projection's name in its model."""
        layer = build_layer(self.base_layer, config.method(), name).train(self.base_layer.training)
        layer.rebase(KnownOutput(self.base_layer))  # no child of the layer, which would save it
        layer.projection_name = name
        self.fourier_moe_layers[adapter_name] = layer
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        for name in [] if self.disable_adapters or self.merged else self.active_adapters:
            if name in self.fourier_moe_layers:
                y = self.fourier_moe_layers[name](x, y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the updates of adapters with a single expert into the base layer; arguments as in peft.

        Raises:
            UserError: if an adapter routes tokens, or the base layer's weight cannot take an update.
            ValueError: under `safe_merge`, if a weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fourier_moe_layers]
        updates = {name: self._update(name) for name in names}  # all are refused before one is merged
        for name, update in updates.items():
            self._add(*update, name if safe_merge else None)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the updates out again; what is left is rounding."""
        while self.merged_adapters:
            update, shift = self._update(self.merged_adapters.pop())
            self._add(-update, None if shift is None else -shift)

    def _update(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer: Any = self.fourier_moe_layers[name]
        try:
            update, shift = layer.constant_update()
        except UserError as error:
            raise UserError(f"adapter {name}: {error}") from error
        return update, shift

    def _add(self, update: Tensor, shift: Tensor | None, checked: str | None = None) -> None:
        changed: Any = with_update(self.base_layer, update, shift)
        tensors = {"weight": changed.weight, **({} if shift is None else {"bias": changed.bias})}
        if checked is not None and not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"a projection's {' or '.join(tensors)} would not be finite with adapter {checked}")
        for name, tensor in tensors.items():
            setattr(self.base_layer, name, tensor)  # in the old one, a tied weight would change elsewhere, too

    @property
    def weight(self) -> Tensor:
        first: Any = next(iter(self.fourier_moe_layers.values()), None)
        return PretrainedWeight.of(self.base_layer.weight, first.projection_name if first else "the adapted projection")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, in float32 whatever the base."""
        device = device or self._get_base_layer_device_and_dtype(self.base_layer)[0]  # type: ignore[no-untyped-call]
        if device is None or adapter_name not in self.fourier_moe_layers:
            return
        layer = self.fourier_moe_layers[adapter_name]
        if not any(parameter.is_meta for parameter in layer.parameters()):
            layer.to(device)


class FourierMoEPeftModel(BaseTuner):
    """The tuner: peft makes one around the model."""

    prefix = "fourier_moe_"
    tuner_layer_cls = FourierMoEPeftLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, FourierMoEPeftLinear):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        check_projections(self.model, [current_key], peft_config.method())
        layer = FourierMoEPeftLinear(target)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        attach_reminders(model)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".fourier_moe_layers.{adapter_name}.", ".fourier_moe_layers.")


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = FourierMoEPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = FourierMoEPeftModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = FourierMoEPeftModel.prefix
