"""Methods that start from the singular value decomposition of the pretrained weight and leave the adapter on another weight.

That weight is computed again wherever the adapter is loaded, from the same pretrained weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fourier_moe.adapter import layer_of
from fourier_moe.baselines.peft_library import LoRAConfig, PeftLinear
from fourier_moe.config import not_negative, rank_problem
from fourier_moe.models.projection import device_of, set_weight_matrix, weight_matrix

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True, kw_only=True)
class SingularLoRAConfig(LoRAConfig):
    """Base of the methods that change the pretrained weight of a projection when they adapt it."""

    normalizes_input = False  # A and B take the place of a part of the weight, which reads x itself
    reads_weights = True


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

    training_only = LoRAConfig.training_only | {"beta", "gamma"}

    def problems(self) -> list[str]:
        problems = [*super().problems(), *not_negative(self, "beta"), *not_negative(self, "gamma")]
        if tuple(map(int, version("peft").split(".")[:2])) < (0, 21):
            problems.append(f"needs peft 0.21 or newer, and {version('peft')} is installed: pip install -U peft")
        return problems

    def to_peft(self, target: str) -> peft.PeftConfig:
        from peft import KasaConfig  # see peft_library.py

        config = super().to_peft(target)
        config.kasa_config = KasaConfig(beta=self.beta, gamma=self.gamma)  # type: ignore[attr-defined]
        return config

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features) - 1)  # something of the weight must be left


@layer_of(SingularLoRAConfig)
class SingularLinear(PeftLinear):
    """peft's layer around a copy of the projection: peft changes the weight, and a failed injection must not show."""

    def __init__(self, base: nn.Module, config: SingularLoRAConfig, name: str) -> None:
        super().__init__(copy.deepcopy(base), config, name)


@layer_of(MiLoRAConfig)
class MiLoRALinear(SingularLinear):
    """LoRA that starts as the smallest singular triplets of its weight; see MiLoRAConfig."""

    @torch.no_grad()
    def __init__(self, base: nn.Module, config: MiLoRAConfig, name: str) -> None:
        super().__init__(base, config, name)
        weight, scaling, layer = weight_matrix(self.base), config.alpha / config.r, cast(Any, self.layer)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[-config.r :] / scaling).sqrt()
        A, B = root[:, None] * Vh[-config.r :], U[:, -config.r :] * root
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
        set_weight_matrix(self.base, weight - scaling * B @ A)


@layer_of(KaSAConfig)
class KaSALinear(SingularLinear):
    """peft's KaSA layer with the authors' penalties; see KaSAConfig.

    Attributes:
        num_projections: how many projections of the model have such a layer; the penalty is divided by it.
    """

    num_projections = 1

    def __init__(self, base: nn.Module, config: KaSAConfig, name: str) -> None:
        super().__init__(base, config, name)
        self.beta, self.gamma = config.beta, config.gamma
        if device_of(base).type == "meta":
            # peft would remove the triplets at the first forward, from a weight that has already lost them.
            cast(Any, self.layer)._lora_kasa_truncation_deferred.clear()

    @classmethod
    def connect(cls, adapters: Mapping[str, Any], config: KaSAConfig) -> None:
        for adapter in adapters.values():
            adapter.num_projections = len(adapters)

    def regularization(self) -> Tensor:
        layer = cast(Any, self.layer)
        A, B, d = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
        identity = torch.eye(len(d), device=d.device)
        # |A^T A - I|_F^2 = |A A^T - I|_F^2 + N - r: the large Gram matrix's distance without the matrix.
        orthogonality = sum(
            ((gram - identity).square().sum() + size - len(d)).sqrt()
            for gram, size in ((A @ A.T, self.in_features), (B.T @ B, self.out_features))
        )
        return (self.beta * d.square().sum() + self.gamma * orthogonality) / self.num_projections
