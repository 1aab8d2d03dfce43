"""PeftLinear: a layer of the peft library behind our Adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fourier_moe.adapter import Adapter, device_of
from fourier_moe.errors import UserError
from fourier_moe.serving.merge import check_takes_update

if TYPE_CHECKING:
    from fourier_moe.baselines.peft_methods import PeftConfig


class PeftLinear(Adapter):
    """y = layer(x), (..., in_features) -> (..., out_features), with the `layer` that peft makes of frozen projection `base`.

    What is trained is float32 whatever the base, as in a model that `peft.get_peft_model` returns.

    Args:
        base: the frozen projection.
        config: the method and its hyper-parameters.
        name: the projection's name in its model, for messages.

    Raises:
        UserError: if peft has no such adapter for this kind of projection.
    """

    def __init__(self, base: nn.Module, config: PeftConfig, name: str) -> None:
        from peft import inject_adapter_in_model

        super().__init__(base)
        holder = nn.ModuleDict({"projection": base})  # peft replaces the children of a module
        peft_config = config.to_peft("projection")
        if isinstance(getattr(base, "nf", None), int) and hasattr(peft_config, "fan_in_fan_out"):
            peft_config.fan_in_fan_out = True  # transformers' Conv1D holds its weight as (in, out)
        try:
            # Of a projection on the meta device (to count parameters) peft would otherwise make layers with memory.
            inject_adapter_in_model(peft_config, holder, low_cpu_mem_usage=device_of(base).type == "meta")
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"{name}: {type(config).__name__} cannot adapt a {type(base).__name__}: {error}") from error
        self.layer = holder["projection"]
        # The projection is our child `base`. For peft's layer it is a plain attribute, so that the state dict has it once.
        del self.layer._modules["base_layer"]
        self.layer.__dict__["base_layer"] = base
        self.layer.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def rebase(self, base: nn.Module) -> None:
        super().rebase(base)
        self.layer.__dict__["base_layer"] = base

    def merged(self, gates: Tensor | None = None) -> nn.Module:
        check_takes_update(self.base)
        layer: Any = copy.deepcopy(self.layer)
        layer.merge()
        return layer.get_base_layer()

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"adapter": list(self.layer.parameters())}
