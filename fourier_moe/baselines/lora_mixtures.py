"""Mixtures of low-rank experts (MoLoRA, AdaMoLE, HydraLoRA, GOAT), with FourierMoE's routers, losses and files."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourier_moe.adapter import layer_of
from fourier_moe.baselines.lora_experts import (
    BalancedLoRAConfig,
    LoRAExperts,
    RoutedLoRAConfig,
    RoutedLoRALinear,
    random_start,
    singular_start,
)
from fourier_moe.baselines.threshold_router import ThresholdRouter
from fourier_moe.config import at_least_one, positive, top_k
from fourier_moe.models.projection import set_weight_matrix, weight_matrix
from fourier_moe.routing.router import Router, TopKRouter


@dataclass(frozen=True, kw_only=True)
class MoLoRAConfig(BalancedLoRAConfig):
    """MoLoRA: LoRA experts behind a top-K router (arXiv 2309.05444 in the form of GOAT's comparison, arXiv 2502.16894).

    That form, the K most probable of E experts with gates that sum to 1, is what the published MoLoRA rows were made with. The
    method as first published lets every expert serve every token with its probability: `top_k` = `num_experts`; its optional
    top-K leaves the gates as they are: `normalize_gates` off.

    Args:
        top_k: K, experts active per token.
        normalize_gates: divide the K gates of a token by their sum (always off for top_k = 1).

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    top_k: int = 2
    normalize_gates: bool = True

    def problems(self) -> list[str]:
        return [*super().problems(), *top_k(self)]


@layer_of(MoLoRAConfig)
class MoLoRALinear(RoutedLoRALinear):
    """Random experts behind a top-K router; see MoLoRAConfig."""

    def make_router(self, config: Any, generator: torch.Generator, device: torch.device) -> Router:
        E, K, normalize = config.num_experts, config.top_k, config.normalize_gates
        return TopKRouter(self.in_features, E, K, normalize_gates=normalize, generator=generator, device=device)


@dataclass(frozen=True, kw_only=True)
class GOATConfig(MoLoRAConfig):
    """GOAT (arXiv 2502.16894): MoLoRA whose experts start as singular triplets of the weight, each from a segment of its own.

    W = U S V^T is cut into E segments of equal length; B_e A_e starts as the first r_e triplets of segment e over rho, and the
    base as W - (s/E) sum_e B_e A_e, computed again wherever the adapter is loaded, from the same pretrained weight. The
    adapted projection starts as W where all gates are 1/E, and near it otherwise.

    Args:
        rho: by how much the start of an expert is smaller than its triplets; the factor s is taken out beside it.
        eta: s = sqrt(3 eta in_features / r_e), the paper's closed form, in place of alpha / r_e, which then is null: eta is the
            learning rate of full fine-tuning over that of the experts. The authors' scripts use alpha.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    rho: float = 10.0
    eta: float | None = None

    normalizes_input = False  # the experts take the place of a part of the weight, which reads x itself
    reads_weights = True

    def scaling(self, in_features: int) -> float:
        if self.eta is not None:
            return math.sqrt(3 * self.eta * in_features / self.expert_rank)
        return super().scaling(in_features)

    def problems(self) -> list[str]:
        return [*super().problems(), *positive(self, "rho")]

    def _scaling_problems(self) -> list[str]:
        if self.eta is None:
            return super()._scaling_problems()
        if self.alpha is not None:
            return [f"alpha={self.alpha} has no effect beside eta={self.eta}; set one of them to null"]
        return positive(self, "eta")

    def largest_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features) // self.num_experts * self.num_experts


@layer_of(GOATConfig)
class GOATLinear(MoLoRALinear):
    """Experts from the singular triplets of the weight, around a copy of the projection without them; see GOATConfig."""

    def __init__(self, base: nn.Module, config: GOATConfig, name: str) -> None:
        super().__init__(copy.deepcopy(base), config, name)  # its weight is changed, and a failed injection must not show

    def make_experts(self, config: Any, generator: torch.Generator, device: torch.device) -> LoRAExperts:
        weight_MN, scaling = weight_matrix(self.base), config.scaling(self.in_features)
        A_ERN, B_EMR = singular_start(weight_MN, config.num_experts, config.expert_rank, scaling * config.rho)
        update_MN = torch.einsum("emr,ern->mn", B_EMR, A_ERN)
        set_weight_matrix(self.base, weight_MN - scaling / config.num_experts * update_MN)
        return LoRAExperts(A_ERN, B_EMR, scaling)


@dataclass(frozen=True, kw_only=True)
class AdaMoLEConfig(BalancedLoRAConfig):
    """AdaMoLE (arXiv 2405.00361): LoRA experts above a threshold that depends on the token; their number varies by token.

    Args:
        max_threshold: tau_max, the most that an expert's probability must reach; None is 1/E. Above 1/E a token may have no
            expert, and is then the base's alone.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    max_threshold: float | None = None

    def problems(self) -> list[str]:
        possible = self.max_threshold is None or 0 < self.max_threshold <= 1
        problem = f"max_threshold={self.max_threshold} must be above 0 and at most 1, or null for 1/num_experts"
        return [*super().problems(), *([] if possible else [problem])]


@layer_of(AdaMoLEConfig)
class AdaMoLELinear(RoutedLoRALinear):
    """Random experts behind a threshold router; see AdaMoLEConfig."""

    def make_router(self, config: Any, generator: torch.Generator, device: torch.device) -> Router:
        threshold = 1 / config.num_experts if config.max_threshold is None else config.max_threshold
        return ThresholdRouter(self.in_features, config.num_experts, threshold, generator=generator, device=device)


@dataclass(frozen=True, kw_only=True)
class HydraLoRAConfig(RoutedLoRAConfig):
    """HydraLoRA (arXiv 2404.19245): one A for all experts, a B for each, all of them active with the router's probability.

    There is no load-balancing loss: every expert serves every token.

    Args:
        r: rank of the shared A and of every B.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    r: int = 4

    @property
    def size_step(self) -> int:
        return 1

    @property
    def expert_rank(self) -> int:
        return self.r

    def _rank_problems(self) -> list[str]:
        return at_least_one(self, "r")

    def largest_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features)


@layer_of(HydraLoRAConfig)
class HydraLoRALinear(RoutedLoRALinear):
    """Experts with one A, all of them active; see HydraLoRAConfig."""

    def make_router(self, config: Any, generator: torch.Generator, device: torch.device) -> Router:
        E = config.num_experts
        return TopKRouter(self.in_features, E, E, normalize_gates=False, generator=generator, device=device)

    def make_experts(self, config: Any, generator: torch.Generator, device: torch.device) -> LoRAExperts:
        A, B = random_start(1, config.num_experts, config.r, (self.out_features, self.in_features), generator, device)
        return LoRAExperts(A, B, config.scaling(self.in_features))
