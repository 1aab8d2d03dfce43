"""What the mixtures of LoRA experts share: config, layer, and the experts of one projection in two matrix products.

Shape legend: T tokens, N in_features, M out_features, E experts, R = r_e, rank of an expert, S = E, or 1 where all share one A.
s is the factor of the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, ParameterKind
from fourier_moe.config import ProjectionAdapterConfig, at_least_one, dropout, multiple, not_negative, positive, rank_problem
from fourier_moe.models.projection import device_of
from fourier_moe.routing.router import Router
from fourier_moe.spectral.frequencies import named_generator


@dataclass(frozen=True, kw_only=True)
class RoutedLoRAConfig(ProjectionAdapterConfig):
    """Base of the mixtures of LoRA experts: y = base(x) + s sum_e g_e(x) B_e A_e x.

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
    normalizes_input = True

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
        return multiple(self, "r", self.num_experts, "num_experts")

    def _scaling_problems(self) -> list[str]:
        return positive(self, "alpha")

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """Return the largest possible r for a projection of this size."""
        return min(in_features, out_features) * self.num_experts

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, self.largest_rank(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return (self.num_experts + self.r) * in_features + self.num_experts * self.expert_rank * out_features


@dataclass(frozen=True, kw_only=True)
class BalancedLoRAConfig(RoutedLoRAConfig):
    """Base of the mixtures that train with a load-balancing loss.

    Args:
        balance_weight: lambda, weight of the load-balancing loss, which is summed over the adapted projections.
    """

    balance_weight: float = 1e-3

    def loss_weight(self) -> float:
        return self.balance_weight

    def problems(self) -> list[str]:
        return [*super().problems(), *not_negative(self, "balance_weight")]


class LoRAExperts(nn.Module):
    """y = s sum_e g_e B_e A_e x, with the A of all experts as one matrix and the B of all as another.

    The gates stand between the two products, so that a token's inactive experts are multiplied by 0. They cost E R (M + N) for
    every token, little beside the projection's own M N while E R is small, and need no gathering; see
    docs/reference/routed_methods.md.

    Attributes:
        A: float32 parameter (S, R, N).
        B: float32 parameter (E, M, R).
        scaling: s.
    """

    def __init__(self, A_SRN: Tensor, B_EMR: Tensor, scaling: float) -> None:
        super().__init__()
        self.A = nn.Parameter(A_SRN)
        self.B = nn.Parameter(B_EMR)
        self.scaling = scaling

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """(..., N) and gates of all experts (..., E), 0 for the inactive ones -> (..., M)."""
        num_shared, rank, _ = self.A.shape
        low = nn.functional.linear(x.to(self.A.dtype), self.A.flatten(0, 1)).unflatten(-1, (num_shared, rank))
        gated = (low * (self.scaling * gates).unsqueeze(-1)).flatten(-2)  # (..., E R)
        return nn.functional.linear(gated, self.B.transpose(0, 1).flatten(1))

    def delta_weight(self, expert: int) -> Tensor:
        """s B_e A_e (M, N)."""
        return self.scaling * self.B[expert] @ self.A[expert if len(self.A) > 1 else 0]

    def extra_repr(self) -> str:
        E, M, R = self.B.shape
        return f"in_features={self.A.shape[-1]}, out_features={M}, experts={E}, rank={R}, scaling={self.scaling:.4g}"


class RoutedLoRALinear(Adapter):
    """y = base(x) + s sum_e g_e(x) B_e A_e x, (..., N) -> (..., M) in the dtype of the base's output.

    A subclass makes the router and, where they start in another way, the experts. Both draw from `generator`.

    Args:
        base: the frozen projection.
        config: the hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes the start.
    """

    named_generator = True

    def __init__(self, base: nn.Module, config: RoutedLoRAConfig, name: str) -> None:
        super().__init__(base)
        self.balance_weight = config.loss_weight()
        generator, device = named_generator(config.seed or 0, name), device_of(base)
        self.router = self.make_router(config, generator, device)
        self.dropout = nn.Dropout(config.dropout)
        self.experts = self.make_experts(config, generator, device)

    def make_router(self, config: Any, generator: torch.Generator, device: torch.device) -> Router:
        """Return the router that gives the gates."""
        raise NotImplementedError

    def make_experts(self, config: Any, generator: torch.Generator, device: torch.device) -> LoRAExperts:
        """Return the low-rank experts; they may change `self.base`, which then has to be a copy."""
        num_a, shape = config.num_experts, (self.out_features, self.in_features)
        A, B = random_start(num_a, config.num_experts, config.expert_rank, shape, generator, device)
        return LoRAExperts(A, B, config.scaling(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        z = self.reads(x)
        gates = self.router(z).dense(self.router.num_experts)
        return y + self.experts(self.dropout(z), gates).to(y.dtype)

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"experts": list(self.experts.parameters()), "router": list(self.router.parameters())}

    def balance_loss(self) -> Tensor | None:
        return self.balance_weight * self.router.balance_loss() if self.balance_weight else None


def random_start(
    num_a: int, num_experts: int, rank: int, shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return A (S, R, N), Kaiming-uniform as in LoRA, and B = 0 (E, M, R), so that the update is 0; `shape` is (M, N)."""
    M, N = shape
    A_SRN = torch.empty(num_a, rank, N, device="cpu", dtype=torch.float32)
    A_SRN.uniform_(-(N**-0.5), N**-0.5, generator=generator)
    return A_SRN.to(device), torch.zeros(num_experts, M, rank, device=device, dtype=torch.float32)


def singular_start(weight_MN: Tensor, num_experts: int, rank: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Return A (E, R, N) and B (E, M, R) from the singular triplets of a weight in E segments (GOAT, arXiv 2502.16894).

    Ordered by size, the triplets are cut into E segments of equal length. Expert e gets the first R of segment e,
    B_e A_e = U S V^T / shrink, each factor with half of sqrt(S / shrink)'s weight.
    """
    U, S, Vh = torch.linalg.svd(weight_MN, full_matrices=False)
    length = len(S) // num_experts
    triplets_ER = length * torch.arange(num_experts).unsqueeze(1) + torch.arange(rank)
    triplets_ER = triplets_ER.to(U.device)
    root_ER = (S[triplets_ER] / shrink).sqrt()
    A_ERN = root_ER.unsqueeze(-1) * Vh[triplets_ER]
    B_EMR = (U[:, triplets_ER] * root_ER).transpose(0, 1)
    return A_ERN.float().contiguous(), B_EMR.float().contiguous()
