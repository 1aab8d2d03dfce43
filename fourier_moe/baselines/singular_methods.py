"""Methods that start from the singular value decomposition of the pretrained weight and leave the adapter on another weight.

That weight is computed anew wherever the adapter is loaded, from the same pretrained weight.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import nn

from fourier_moe.baselines.peft_methods import LoRAConfig
from fourier_moe.baselines.singular_layers import KaSALinear, MiLoRALinear
from fourier_moe.checks import not_negative, rank_problem, refuse
from fourier_moe.errors import UserError
from fourier_moe.inject import adapters

if TYPE_CHECKING:
    import peft

    from fourier_moe.adapter import Adapter
    from fourier_moe.inject import InjectionReport


@dataclass(frozen=True, kw_only=True)
class SingularLoRAConfig(LoRAConfig):
    """Base of the methods that change the pretrained weight of a projection when they adapt it."""

    reads_weights = True

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        return super().build_layer(copy.deepcopy(base), name)  # its weight is changed, and a failure must not show


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(SingularLoRAConfig):
    """PiSSA (arXiv 2404.02948): A and B start as the r largest singular triplets of the weight, which keeps the rest.

    The seed has no effect.
    """

    _options = {"init_lora_weights": "pissa"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(SingularLoRAConfig):
    """MiLoRA (arXiv 2406.09044): A and B start as the r smallest singular triplets of the weight, which keeps the rest.

    With W = U S V^T and the last r triplets of it, alpha/r B A = U_r S_r V_r^T at the start, each factor with half of S_r, and
    the weight becomes W - alpha/r B A. The authors have alpha = r. The seed has no effect.
    """

    layer_class = MiLoRALinear


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(SingularLoRAConfig):
    """KaSA (arXiv 2412.06071): the weight loses its r smallest singular triplets, and y = base(x) + alpha/r B diag(d) A x.

    A is random, B zero and d (r) standard normal at the start: the adapted model begins near the pretrained one, not at it. The
    loss gets the mean over the projections of beta |d|^2 + gamma (|B B^T - I|_F + |A^T A - I|_F), as in the authors' code. peft
    takes the sum, and the small Gram matrices: a gradient of more than the number of projections times this.

    Args:
        beta: weight of the penalty on d.
        gamma: weight of the penalty that keeps A and B orthogonal.

    Raises:
        UserError: for an impossible value, or a peft that has no KaSA.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    layer_class = KaSALinear
    _training_only = frozenset({"dropout", "seed", "beta", "gamma"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, [*not_negative(self, "beta"), *not_negative(self, "gamma")])
        if tuple(map(int, version("peft").split(".")[:2])) < (0, 21):
            raise UserError(f"KaSAConfig needs peft 0.21 or newer, and {version('peft')} is installed: pip install -U peft")

    def inject(self, model: nn.Module) -> InjectionReport:
        report = super().inject(model)
        layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, KaSALinear)]
        for layer in layers:
            layer.num_projections = len(layers)
        return report

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import KasaConfig

        config = super().to_peft(target)
        config.kasa_config = KasaConfig(beta=self.beta, gamma=self.gamma)  # type: ignore[attr-defined]
        return config

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features) - 1)  # something of the weight must be left
