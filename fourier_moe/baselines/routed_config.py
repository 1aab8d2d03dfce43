"""Bases of the methods with experts that are not spectral: what their configs share.

s is the factor of the update, r_e the rank of one expert, E the number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fourier_moe.adapter import device_of, projection_shape
from fourier_moe.checks import at_least_one, dropout, not_negative, positive, rank_problem, refuse
from fourier_moe.config import ProjectionAdapterConfig
from fourier_moe.spectral.frequencies import named_generator

if TYPE_CHECKING:
    from fourier_moe.adapter import Adapter
    from fourier_moe.baselines.lora_experts import LoRAExperts
    from fourier_moe.routing.router import Router


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(ProjectionAdapterConfig):
    """Base of the methods whose experts are not spectral.

    Args:
        num_experts: E.
        seed: seed of the routers' and the experts' start; together with a projection's name it fixes both. None is the run's
            seed_everything on the command line, and 0 in Python.
    """

    num_experts: int = 8
    seed: int | None = None

    _training_only = frozenset({"dropout", "balance_weight", "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, self.problems())

    def problems(self) -> list[str]:
        """What is impossible, each with what would be valid."""
        return at_least_one(self, "num_experts")

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.num_experts * in_features


@dataclass(frozen=True, kw_only=True)
class RoutedLoRAConfig(RoutedConfig):
    """Base of the mixtures of low-rank experts: y = base(x) + s sum_e g_e(x) B_e A_e x.

    A subclass says which router gives the gates g_e and how A and B start.

    Args:
        r: rank of all experts together; each has r_e = r / num_experts.
        alpha: s = alpha / r_e.
        dropout: dropout on the experts' input, one mask for all experts. The authors of MoLoRA's form here, AdaMoLE, GOAT and
            HydraLoRA draw one for each expert: the same on average, with less noise in the sum.
    """

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
        A, B = self.r * in_features, self.num_experts * self.expert_rank * out_features
        return super().num_stored(in_features, out_features) + A + B

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        from fourier_moe.baselines.lora_experts import RoutedLoRALinear

        in_features, _ = projection_shape(base)
        generator, device = named_generator(self.seed or 0, name), device_of(base)
        router = self.build_router(in_features, generator, device)
        base, experts = self.build_experts(base, generator, device)
        return RoutedLoRALinear(base, router, experts, dropout=self.dropout, balance_weight=self.loss_weight())

    def build_router(self, in_features: int, generator: torch.Generator, device: torch.device) -> Router:
        """The router of a projection."""
        raise NotImplementedError

    def build_experts(self, base: nn.Module, generator: torch.Generator, device: torch.device) -> tuple[nn.Module, LoRAExperts]:
        """The experts of a projection, and the projection that they are added to."""
        from fourier_moe.baselines.lora_experts import LoRAExperts, random_start

        in_features, out_features = projection_shape(base)
        shape = (out_features, in_features)
        A, B = random_start(self.num_experts, self.num_experts, self.expert_rank, shape, generator, device)
        return base, LoRAExperts(A, B, self.scaling(in_features))


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
