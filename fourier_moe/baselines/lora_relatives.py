"""Relatives of LoRA with one adapter per projection that the peft library does not have: LoRA-Dash, TopLoRA and MELoRA.

What is trained is float32 whatever the base, and starts such that the adapted model is the pretrained one. Shape legend:
N in_features, M out_features, R rank, K directions, b blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourier_moe.adapter import Adapter, ParameterKind, layer_of
from fourier_moe.baselines.peft_library import LoRASettings
from fourier_moe.config import at_least_one, rank_problem
from fourier_moe.models.projection import device_of, weight_matrix
from fourier_moe.spectral.frequencies import named_generator


class LoRARelativeLinear(Adapter):
    """y = base(x) + update(x), (..., N) -> (..., M) in the dtype of the base's output.

    Args:
        base: the frozen projection.
        config: the method's hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes the start.
    """

    named_generator = True

    def __init__(self, base: nn.Module, config: LoRASettings, name: str) -> None:
        super().__init__(base)
        self.scaling = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)

    def update(self, x: Tensor) -> Tensor:
        """Return what is added, (..., N) -> (..., M)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        dtype = self.parameter_groups()["adapter"][0].dtype
        return y + self.update(self.reads(x).to(dtype)).to(y.dtype)

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"adapter": list(self.parameters(recurse=False))}


@dataclass(frozen=True, kw_only=True)
class LoRADashConfig(LoRASettings):
    """LoRA-Dash (arXiv 2409.01035): LoRA that, after some steps, also scales the directions of the weight that it changes most.

    y = base(x) + alpha/r B A x + U diag(t) V^T x. For the first `start` optimizer steps U = V = 0. Then, with W = sum_i s_i u_i
    v_i^T and d_i = u_i^T (alpha/r B A) v_i, they become the `num_directions` pairs (u_i, v_i) of largest |d_i| / s_i, and t,
    zero at the start, is trained with A and B.

    The authors' code counts calls of a layer, those of evaluation and of accumulated batches too, and forgets the count when it
    is interrupted. Here optimizer steps count, and count and directions are saved. In a training loop of your own call
    `after_step(model)` after `optimizer.step()`.

    Args:
        num_directions: directions of each projection.
        start: optimizer steps before they are chosen.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_directions: int = 8
    start: int = 100

    reads_weights = True

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "num_directions"), *at_least_one(self, "start")]

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        largest = min(in_features, out_features)
        if self.num_directions > largest:
            return f"num_directions={self.num_directions} must be at most {largest}"
        return super().check_fit(in_features, out_features)

    def num_stored(self, in_features: int, out_features: int) -> int:
        directions = self.num_directions * (1 + in_features + out_features)
        return super().num_stored(in_features, out_features) + directions


@layer_of(LoRADashConfig)
class LoRADashLinear(LoRARelativeLinear):
    """LoRA and, once chosen, the directions of the weight that it changes most; see LoRADashConfig.

    Attributes:
        steps: int64 buffer (), optimizer steps so far.
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
        U, S, Vh = torch.linalg.svd(weight_matrix(self.base), full_matrices=False)
        change = self.scaling * ((U.T @ self.B.to(U)) * (self.A.to(U) @ Vh.T).T).sum(1)
        chosen = (change.abs() / S.clamp(min=torch.finfo(S.dtype).tiny)).topk(len(self.t)).indices
        self.U.copy_(U[:, chosen])
        self.V.copy_(Vh[chosen])


@dataclass(frozen=True, kw_only=True)
class TopLoRAConfig(LoRASettings):
    """TopLoRA (NeurIPS 2025): LoRA whose r directions every token weighs.

    y = base(x) + alpha/r B (exp(RMSNorm(Q x)) * A x), with Q (r x in) random and RMSNorm's gain (r) trained, too.
    """

    normalizes_input = True

    def num_stored(self, in_features: int, out_features: int) -> int:
        return super().num_stored(in_features, out_features) + self.r * (in_features + 1)


@layer_of(TopLoRAConfig)
class TopLoRALinear(LoRARelativeLinear):
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


@dataclass(frozen=True, kw_only=True)
class MELoRAConfig(LoRASettings):
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

    normalizes_input = True

    def problems(self) -> list[str]:
        return [*super().problems(), *at_least_one(self, "num_blocks")]

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        if in_features % self.num_blocks or out_features % self.num_blocks:
            return f"num_blocks={self.num_blocks} must divide both sizes"
        return rank_problem(self.r, min(in_features, out_features) // self.num_blocks)


@layer_of(MELoRAConfig)
class MELoRALinear(LoRARelativeLinear):
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
    """Return what keeps the update at 0 until it is trained."""
    return nn.Parameter(torch.zeros(shape, device=device))
