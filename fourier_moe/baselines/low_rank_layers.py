"""Layers of LoRA's relatives.

What is trained is float32 whatever the base, and starts such that the adapted model is the pretrained one. Shape legend:
N in_features, M out_features, R rank, K directions, b blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourier_moe.adapter import Adapter, device_of
from fourier_moe.baselines.singular_layers import pretrained_matrix
from fourier_moe.spectral.frequencies import named_generator

if TYPE_CHECKING:
    from fourier_moe.baselines.low_rank_methods import LoRADashConfig, LowRankConfig, MELoRAConfig, TopLoRAConfig


class LowRankLinear(Adapter):
    """y = base(x) + update(x), (..., N) -> (..., M) in the dtype of the base's output.

    Args:
        base: the frozen projection.
        config: the method's hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes the start.
    """

    def __init__(self, base: nn.Module, config: LowRankConfig, name: str) -> None:
        super().__init__(base)
        self.scaling = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)

    def update(self, x: Tensor) -> Tensor:
        """What is added, (..., N) -> (..., M)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        dtype = self.parameter_groups()["adapter"][0].dtype
        return y + self.update(x.to(dtype)).to(y.dtype)

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"adapter": list(self.parameters(recurse=False))}


class LoRADashLinear(LowRankLinear):
    """LoRA and, once chosen, the directions of the weight that it changes most; see LoRADashConfig.

    Attributes:
        steps: int64 buffer (), optimiser steps so far.
        U, V: float32 buffers (M, K) and (K, N), the chosen directions, zero before.
    """

    steps: Tensor
    U: Tensor
    V: Tensor

    def __init__(self, base: nn.Module, config: LoRADashConfig, name: str) -> None:
        super().__init__(base, config, name)
        M, N, K, device = self.out_features, self.in_features, config.num_directions, device_of(base)
        self.start = config.start
        self.A = random_parameter(config.r, N, device=device, generator=named_generator(config.seed or 0, name))
        self.B = zero_parameter(M, config.r, device=device)
        self.t = zero_parameter(K, device=device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("U", torch.zeros(M, K, device=device))
        self.register_buffer("V", torch.zeros(K, N, device=device))

    def update(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return self.scaling * F.linear(F.linear(x, self.A), self.B) + F.linear(self.t * F.linear(x, self.V), self.U)

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        if int(self.steps) == self.start:
            self.choose_directions()

    @torch.no_grad()
    def choose_directions(self) -> None:
        """Make U and V the singular vectors of the weight along which the update is largest beside the singular value."""
        U, S, Vh = torch.linalg.svd(pretrained_matrix(self.base), full_matrices=False)
        change = self.scaling * ((U.T @ self.B.to(U)) * (self.A.to(U) @ Vh.T).T).sum(1)
        chosen = (change.abs() / S.clamp(min=torch.finfo(S.dtype).tiny)).topk(len(self.t)).indices
        self.U.copy_(U[:, chosen])
        self.V.copy_(Vh[chosen])


class TopLoRALinear(LowRankLinear):
    """LoRA whose directions every token weighs; see TopLoRAConfig."""

    def __init__(self, base: nn.Module, config: TopLoRAConfig, name: str) -> None:
        super().__init__(base, config, name)
        generator, device = named_generator(config.seed or 0, name), device_of(base)
        self.A = random_parameter(config.r, self.in_features, device=device, generator=generator)
        self.B = zero_parameter(self.out_features, config.r, device=device)
        self.Q = random_parameter(config.r, self.in_features, device=device, generator=generator)
        self.gain = nn.Parameter(torch.ones(config.r, device=device))

    def update(self, x: Tensor) -> Tensor:
        weights = F.rms_norm(F.linear(x, self.Q).to(self.gain.dtype), self.gain.shape, self.gain).exp()
        return self.scaling * F.linear(weights * F.linear(self.dropout(x), self.A), self.B)


class MELoRALinear(LowRankLinear):
    """Small LoRAs side by side, A (b, R, N/b) and B (b, M/b, R); see MELoRAConfig."""

    def __init__(self, base: nn.Module, config: MELoRAConfig, name: str) -> None:
        super().__init__(base, config, name)
        b, device, generator = config.num_blocks, device_of(base), named_generator(config.seed or 0, name)
        self.A = random_parameter(b, config.r, self.in_features // b, device=device, generator=generator)
        self.B = zero_parameter(b, self.out_features // b, config.r, device=device)

    def update(self, x: Tensor) -> Tensor:
        slices = self.dropout(x).unflatten(-1, (len(self.A), -1))
        low = torch.einsum("...bn,brn->...br", slices, self.A)
        return self.scaling * torch.einsum("...br,bmr->...bm", low, self.B).flatten(-2)


def random_parameter(*shape: int, device: torch.device, generator: torch.Generator) -> nn.Parameter:
    """Kaiming-uniform as LoRA's A: uniform up to 1 / sqrt(last size), drawn on the CPU."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator).to(device))


def zero_parameter(*shape: int, device: torch.device) -> nn.Parameter:
    """What keeps the update at 0 until it is trained."""
    return nn.Parameter(torch.zeros(shape, device=device))
