"""LoRA and other methods with one adapter per projection, computed by the peft library.

Trained from the same start on the same data, a model gets the same losses as one from `peft.get_peft_model`. peft is imported
inside of functions, when a layer is built: importing it takes seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, ParameterKind, layer_of
from fourier_moe.config import (
    ProjectionAdapterConfig,
    at_least_one,
    dropout,
    not_negative,
    positive,
    rank_problem,
)
from fourier_moe.errors import UserError
from fourier_moe.models.known_output import KnownOutput, known_output
from fourier_moe.models.projection import check_takes_update, device_of, is_transposed, with_update

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True, kw_only=True)
class PeftConfig(ProjectionAdapterConfig):
    """Base of the methods that peft computes: a subclass implements `to_peft`.

    Adapters start as `torch.manual_seed(seed)` before `peft.get_peft_model` would start them.
    """

    def to_peft(self, target: str) -> peft.PeftConfig:
        """Return the same settings as peft's config, for the module called `target`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LoRASettings(ProjectionAdapterConfig):
    """What LoRA and its relatives are told.

    Args:
        r: rank.
        alpha: the update's factor is alpha / r.
        dropout: dropout on the input of A.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    size_field = "r"

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "r"), *positive(self, "alpha"), *dropout(self)]

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.r * (in_features + out_features)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(PeftConfig, LoRASettings):
    """LoRA (arXiv 2106.09685): y = base(x) + alpha/r B A x, with A (r x in) random and B (out x r) zero at the start."""

    normalizes_input = True
    _options: ClassVar[dict[str, Any]] = {}  # what a variant changes in peft's LoraConfig

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import LoraConfig

        options = {"lora_alpha": self.alpha, "lora_dropout": self.dropout, **self._options}
        return LoraConfig(r=self.r, target_modules=[target], **options)


@dataclass(frozen=True, kw_only=True)
class RsLoRAConfig(LoRAConfig):
    """rsLoRA (arXiv 2312.03732): LoRA with the factor alpha / sqrt(r)."""

    _options = {"use_rslora": True}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv 2402.09353): LoRA gives the direction of each row of the weight, a trained magnitude per row its length."""

    normalizes_input = False  # the magnitudes are those of W + dW, which reads x itself
    _options = {"use_dora": True}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(PeftConfig):
    """FourierFT (arXiv 2405.03003): the update is the inverse Fourier transform of a few trained real coefficients.

    Their positions are the same in all projections of one shape and do not depend on the seed.

    Args:
        num_coefficients: n, trained coefficients of one projection, standard normal at the start: the update begins at random.
        scaling: factor of the update; with the inverse transform's 1/(in out) its effect depends on the projection's size.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_coefficients: int = 1000
    scaling: float = 150.0

    normalizes_input = True
    size_field = "num_coefficients"

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "num_coefficients"), *positive(self, "scaling")]

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import FourierFTConfig

        return FourierFTConfig(n_frequency=self.num_coefficients, scaling=self.scaling, target_modules=[target])

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        most = in_features * out_features
        return f"num_coefficients={self.num_coefficients} must be at most {most}" if self.num_coefficients > most else None

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.num_coefficients


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(PeftConfig):
    """PEANuT, first called NEAT (arXiv 2410.01870): the update is a small ReLU network of the pretrained weight.

    Args:
        r: width of the network.
        depth: its hidden layers beside the first and the last, in pairs of encoder and decoder.
        scaling: factor of the update.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    r: int = 32
    depth: int = 0
    scaling: float = 1.0

    reads_weights = True
    size_field = "r"

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "r"), *positive(self, "scaling"), *not_negative(self, "depth")]

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import PeanutConfig

        return PeanutConfig(r=self.r, depth=self.depth, scaling=self.scaling, target_modules=[target])

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return 2 * self.r * out_features + 2 * self.depth * self.r**2


@layer_of(PeftConfig)
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
        if hasattr(peft_config, "fan_in_fan_out"):
            peft_config.fan_in_fan_out = is_transposed(base)
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
        if self.input_moments is None:
            return self.layer(x)
        layer: Any = self.layer
        if not isinstance(layer.base_layer, KnownOutput):
            layer.__dict__["base_layer"] = KnownOutput(self.base)
        with known_output(self.base(x)):  # peft's layer computes projection and update of one input
            return layer(self.reads(x))

    def rebase(self, base: nn.Module) -> None:
        super().rebase(base)
        self.layer.__dict__["base_layer"] = base

    def merged(self) -> nn.Module:
        check_takes_update(self.base)
        layer: Any = self.layer
        if self.input_moments is not None:
            delta = layer.get_delta_weight("default")  # in the layout of the weight
            return with_update(self.base, *self.input_moments.as_affine(delta.T if is_transposed(self.base) else delta))
        layer = copy.deepcopy(layer)
        layer.merge()
        return layer.get_base_layer()

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"adapter": list(self.layer.parameters())}


@layer_of(FourierFTConfig)
class FourierFTLinear(PeftLinear):
    """The positions of FourierFT's coefficients are in no state dict: they are drawn even on the meta device."""

    def __init__(self, base: nn.Module, config: FourierFTConfig, name: str) -> None:
        with torch.device("cpu"):
            super().__init__(base, config, name)
