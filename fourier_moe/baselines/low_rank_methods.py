"""Relatives of LoRA with one adapter per projection that the peft library has not: LoRA-Dash, TopLoRA and MELoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fourier_moe.baselines.low_rank_layers import LoRADashLinear, LowRankLinear, MELoRALinear, TopLoRALinear
from fourier_moe.checks import at_least_one, low_rank, rank_problem, refuse
from fourier_moe.config import ProjectionAdapterConfig

if TYPE_CHECKING:
    from fourier_moe.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(ProjectionAdapterConfig):
    """Base of these methods.

    Args:
        r: rank.
        alpha: the update's factor is alpha / r.
        dropout: dropout on the input of A.
        seed: seed of the adapters' start; together with a projection's name it fixes it. None is the run's seed_everything on
            the command line, and 0 in Python.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    seed: int | None = None

    size_field = "r"
    layer_class: ClassVar[type[LowRankLinear]]
    _training_only = frozenset({"dropout", "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, low_rank(self))

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        return rank_problem(self.r, min(in_features, out_features))

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.r * (in_features + out_features)

    def build_layer(self, base: nn.Module, name: str) -> Adapter:
        return self.layer_class(base, self, name)


@dataclass(frozen=True, kw_only=True)
class LoRADashConfig(LowRankConfig):
    """LoRA-Dash (arXiv 2409.01035): LoRA that, after some steps, also scales the directions of the weight that it changes most.

    y = base(x) + alpha/r B A x + U diag(t) V^T x. For the first `start` optimiser steps U = V = 0. Then, with W = sum_i s_i u_i
    v_i^T and d_i = u_i^T (alpha/r B A) v_i, they become the `num_directions` pairs (u_i, v_i) of largest |d_i| / s_i, and t,
    zero at the start, is trained with A and B.

    The authors' code counts calls of a layer, those of evaluation and of accumulated batches too, and forgets the count when it
    is interrupted. Here optimiser steps count, and count and directions are saved. In a training loop of your own call
    `after_step(model)` after `optimizer.step()`.

    Args:
        num_directions: directions of each projection.
        start: optimiser steps before they are chosen.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_directions: int = 8
    start: int = 100

    reads_weights = True
    layer_class = LoRADashLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, [*at_least_one(self, "num_directions"), *at_least_one(self, "start")])

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        largest = min(in_features, out_features)
        if self.num_directions > largest:
            return f"num_directions={self.num_directions} must be at most {largest}"
        return super().check_fit(in_features, out_features)

    def num_stored(self, in_features: int, out_features: int) -> int:
        directions = self.num_directions * (1 + in_features + out_features)
        return super().num_stored(in_features, out_features) + directions


@dataclass(frozen=True, kw_only=True)
class TopLoRAConfig(LowRankConfig):
    """TopLoRA (NeurIPS 2025): LoRA whose r directions every token weighs anew.

    y = base(x) + alpha/r B (exp(RMSNorm(Q x)) * A x), with Q (r x in) random and RMSNorm's gain (r) trained, too.
    """

    layer_class = TopLoRALinear

    def num_stored(self, in_features: int, out_features: int) -> int:
        return super().num_stored(in_features, out_features) + self.r * (in_features + 1)


@dataclass(frozen=True, kw_only=True)
class MELoRAConfig(LowRankConfig):
    """MELoRA (arXiv 2402.17263): n small LoRAs side by side, each from a slice of the input to a slice of the output.

    y_i = base(x)_i + alpha/r B_i A_i x_i for each of n equal slices i: an update of rank n r with the parameters of a LoRA of
    rank r.

    Args:
        r: rank of each small LoRA.
        num_blocks: n, which divides the projection's two sizes.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_blocks: int = 2

    layer_class = MELoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, at_least_one(self, "num_blocks"))

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        if in_features % self.num_blocks or out_features % self.num_blocks:
            return f"num_blocks={self.num_blocks} must divide both sizes"
        return rank_problem(self.r, min(in_features, out_features) // self.num_blocks)
