"""LoRA and other methods with one adapter per projection, computed by the peft library.

Trained from the same start on the same data, a model gets the same losses as one from `peft.get_peft_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fourier_moe.baselines.peft_layer import PeftLinear
from fourier_moe.checks import at_least_one, low_rank, not_negative, positive, rank_problem, refuse
from fourier_moe.config import ProjectionAdapterConfig

if TYPE_CHECKING:
    import peft

    from fourier_moe.adapter import Adapter
    from fourier_moe.inject import InjectionReport


@dataclass(frozen=True, kw_only=True)
class PeftConfig(ProjectionAdapterConfig):
    """Base of the methods that peft computes: a subclass implements `to_peft`.

    Args:
        seed: seed of the adapters' start: what `torch.manual_seed(seed)` before `peft.get_peft_model` gives. None is the run's
            seed_everything on the command line, and 0 in Python.
    """

    seed: int | None = None

    layer_class: ClassVar[type[PeftLinear]] = PeftLinear
    _training_only = frozenset({"dropout", "seed"})

    def to_peft(self, target: str) -> peft.PeftConfig:
        """The same settings as peft's config, for the module called `target`."""
        raise NotImplementedError

    def inject(self, model: nn.Module) -> InjectionReport:
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU; dropout and data must not depend on how much
            torch.default_generator.manual_seed(self.seed or 0)
            return super().inject(model)

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        return self.layer_class(base, self, name)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(PeftConfig):
    """LoRA (arXiv 2106.09685): y = base(x) + alpha/r B A x, with A (r x in) random and B (out x r) zero at the start.

    Args:
        r: rank.
        alpha: the update's factor is alpha / r.
        dropout: dropout on the input of A.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    size_field = "r"
    _options: ClassVar[dict[str, Any]] = {}  # what a variant changes in peft's LoraConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, low_rank(self))

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import LoraConfig

        options = {"lora_alpha": self.alpha, "lora_dropout": self.dropout, **self._options}
        return LoraConfig(r=self.r, target_modules=[target], **options)

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.r * (in_features + out_features)


@dataclass(frozen=True, kw_only=True)
class RsLoRAConfig(LoRAConfig):
    """rsLoRA (arXiv 2312.03732): LoRA with the factor alpha / sqrt(r)."""

    _options = {"use_rslora": True}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv 2402.09353): LoRA gives the direction of each row of the weight, a trained magnitude per row its length."""

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

    size_field = "num_coefficients"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, [*at_least_one(self, "num_coefficients"), *positive(self, "scaling")])

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        with torch.device("cpu"):  # the positions are in no state dict: drawn for real also on the meta device
            return super().build_layer(base, name)

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

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, [*at_least_one(self, "r"), *positive(self, "scaling"), *not_negative(self, "depth")])

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import PeanutConfig

        return PeanutConfig(r=self.r, depth=self.depth, scaling=self.scaling, target_modules=[target])

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return 2 * self.r * out_features + 2 * self.depth * self.r**2
