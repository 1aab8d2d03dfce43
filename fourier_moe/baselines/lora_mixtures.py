"""Mixtures of low-rank experts (MoLoRA, AdaMoLE, HydraLoRA, GOAT), with FourierMoE's routers, losses and files.

s is the factor of the update, r_e the rank of one expert, E the number of experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, ParameterKind, layer_of
from fourier_moe.baselines.lora_experts import LoRAExperts, random_start, singular_start
from fourier_moe.baselines.threshold_router import ThresholdRouter
from fourier_moe.config import (
    ProjectionAdapterConfig,
    at_least_one,
    dropout,
    not_negative,
    positive,
    rank_problem,
    top_k,
)
from fourier_moe.errors import UserError
from fourier_moe.models.projection import device_of, set_weight_matrix, weight_matrix, with_update
from fourier_moe.routing.router import Router, TopKRouter
from fourier_moe.spectral.frequencies import named_generator


@dataclass(frozen=True, kw_only=True)
class RoutedLoRAConfig(ProjectionAdapterConfig):
    """Base of the mixtures of low-rank experts: y = base(x) + s sum_e g_e(x) B_e A_e x.

    Args:
        num_experts: E.
        r: rank of all experts together; each has r_e = r / num_experts.
        alpha: s = alpha / r_e.
        dropout: dropout on the experts' input, one mask for all experts. The authors of MoLoRA's form here, AdaMoLE, GOAT and
            HydraLoRA draw one for each expert: the same on average, with less noise in the sum.
    """

    num_experts: int = 8
    r: int = 32
    alpha: float | None = 16.0
    dropout: float = 0.0

    size_field = "r"

    @property
    def size_step(self) -> int:
        return self.num_experts

    @property
    def expert_rank(self) -> int:
        """r_e."""
        return self.r // self.num_experts

    def loss_weight(self) -> float:
        """Weight of the load-balancing loss; 0 for a method without one."""
        return 0.0

    def scaling(self, in_features: int) -> float:
        """s."""
        assert self.alpha is not None
        return self.alpha / self.expert_rank

    def problems(self) -> list[str]:
        return [
            *super().problems(),
            *at_least_one(self, "num_experts"),
            *self._rank_problems(),
            *self._scaling_problems(),
            *dropout(self),
        ]

    def _rank_problems(self) -> list[str]:
        E = max(self.num_experts, 1)
        if self.r >= 1 and self.r % E == 0:
            return []
        lower = max(E, self.r // E * E)
        nearest = f"{lower}" if lower >= self.r else f"{lower} or {lower + E}"
        return [
            f"r={self.r} must be a positive multiple of num_experts={self.num_experts}, who share it; nearest valid: {nearest}"
        ]

    def _scaling_problems(self) -> list[str]:
        return positive(self, "alpha")

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """The largest possible r for a projection of this size."""
        return min(in_features, out_features) * self.num_experts

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, self.largest_rank(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return (self.num_experts + self.r) * in_features + self.num_experts * self.expert_rank * out_features


class RoutedLoRALinear(Adapter):
    """y = base(x) + s sum_e g_e(x) B_e A_e x, (..., N) -> (..., M) in the dtype of the base's output.

    A subclass makes the router and, if they do not start at random, the experts. Both are random by `generator`.

    Args:
        base: the frozen projection.
        config: the hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes the start.
    """

    def __init__(self, base: nn.Module, config: RoutedLoRAConfig, name: str) -> None:
        super().__init__(base)
        self.balance_weight = config.loss_weight()
        generator, device = named_generator(config.seed or 0, name), device_of(base)
        self.router = self.make_router(config, generator, device)
        self.dropout = nn.Dropout(config.dropout)
        self.experts = self.make_experts(config, generator, device)

    def make_router(self, config: Any, generator: torch.Generator, device: torch.device) -> Router:
        """The router that gives the gates."""
        raise NotImplementedError

    def make_experts(self, config: Any, generator: torch.Generator, device: torch.device) -> LoRAExperts:
        """The low-rank experts; they may change `self.base`, which then has to be a copy."""
        num_a, shape = config.num_experts, (self.out_features, self.in_features)
        A, B = random_start(num_a, config.num_experts, config.expert_rank, shape, generator, device)
        return LoRAExperts(A, B, config.scaling(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        gates = self.router(x).dense(self.router.num_experts)
        return y + self.experts(self.dropout(x), gates).to(y.dtype)

    def merged(self, gates: Tensor | None = None) -> nn.Module:
        if gates is None:
            raise UserError("this method routes every token on its own; give the gates to freeze")
        return with_update(self.base, self.experts.mixture(gates))

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"experts": list(self.experts.parameters()), "router": list(self.router.parameters())}

    def balance_loss(self) -> Tensor | None:
        return self.balance_weight * self.router.balance_loss() if self.balance_weight else None


@dataclass(frozen=True, kw_only=True)
class BalancedLoRAConfig(RoutedLoRAConfig):
    """Base of those of them that train with a load-balancing loss.

    Args:
        balance_weight: lambda, weight of the load-balancing loss, which is summed over the adapted projections.
    """

    balance_weight: float = 1e-3

    def loss_weight(self) -> float:
        return self.balance_weight

    def problems(self) -> list[str]:
        return [*super().problems(), *not_negative(self, "balance_weight")]


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
    base as W - (s/E) sum_e B_e A_e, which is computed anew wherever the adapter is loaded, from the same pretrained weight. The
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
