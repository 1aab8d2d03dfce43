"""FFT MoE: the pretrained model upcycled to a mixture of experts, and trained in full.

Shape legend: T tokens, N in_features, M out_features, E experts, K active experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourier_moe.adapter import Adapter, ParameterKind, layer_of
from fourier_moe.config import ProjectionAdapterConfig, at_least_one, not_negative, top_k
from fourier_moe.models.pretrained_weight import PretrainedWeight
from fourier_moe.models.projection import device_of, projection_shape, weight_matrix
from fourier_moe.routing.record import Routing
from fourier_moe.routing.router import TopKRouter
from fourier_moe.spectral.frequencies import named_generator


@dataclass(frozen=True, kw_only=True)
class FFTMoEConfig(ProjectionAdapterConfig):
    """FFT MoE: every target becomes E trained copies of itself behind a top-K router, and all else is trained, too.

    The reference that GOAT (arXiv 2502.16894) and FourierMoE's paper set their methods against. It has E times the parameters
    of its targets, AdamW keeps two more numbers for each, all in float32, and files have the size of the model. The gates of a
    token sum to 1, so that the model starts as the pretrained one.

    Args:
        num_experts: E.
        top_k: K, experts active per token; at least 2, since the gate of a single one is either no function of the router or
            scales the output down from the start.
        balance_weight: lambda, weight of the load-balancing loss, which is summed over the adapted projections.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_experts: int = 8
    top_k: int = 2
    balance_weight: float = 1e-3

    trains_backbone = True

    def problems(self) -> list[str]:
        count, active = at_least_one(self, "num_experts"), top_k(self, least=2)
        return [*super().problems(), *count, *active, *not_negative(self, "balance_weight")]

    def num_stored(self, in_features: int, out_features: int) -> int:
        return self.num_experts * in_features * (1 + out_features)


@layer_of(FFTMoEConfig)
class FFTMoELinear(Adapter):
    """y = sum_e g_e(x) (W_e x + b_e), (..., N) -> (..., M), with every W_e, b_e a trained copy of the projection's.

    The projection itself is gone: `base` only tells its shape.

    Args:
        base: the pretrained projection.
        config: the hyper-parameters.
        name: the projection's name in its model; with config.seed it fixes the router's start.
    """

    named_generator = True

    def __init__(self, base: nn.Module, config: FFTMoEConfig, name: str) -> None:
        super().__init__(_Upcycled(base))
        self.balance_weight = config.balance_weight
        self.router = TopKRouter(
            self.in_features,
            config.num_experts,
            config.top_k,
            generator=named_generator(config.seed or 0, name),
            device=device_of(base),
        )
        weight_MN, bias_M = weight_matrix(base), base.bias
        assert bias_M is None or isinstance(bias_M, Tensor)
        self.experts = UpcycledExperts(weight_MN, bias_M, config.num_experts)

    @property
    def weight(self) -> Tensor:
        """Of the first expert: for its type and device, and the pretrained projection's until training starts."""
        return PretrainedWeight.of(self.experts.weight[0], self.projection_name)

    @property
    def bias(self) -> Tensor | None:
        return None if self.experts.bias is None else self.experts.bias[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))

    def parameter_groups(self) -> Mapping[ParameterKind, list[nn.Parameter]]:
        return {"experts": list(self.experts.parameters()), "router": list(self.router.parameters())}

    def num_replaced(self) -> int:
        return sum(parameter[0].numel() for parameter in self.experts.parameters())

    def balance_loss(self) -> Tensor | None:
        return self.balance_weight * self.router.balance_loss()


class UpcycledExperts(nn.Module):
    """E copies of a projection, float32: weight (E, M, N), bias (E, M) or None."""

    def __init__(self, weight_MN: Tensor, bias_M: Tensor | None, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_MN.float().repeat(num_experts, 1, 1))
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach().float().repeat(num_experts, 1))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Let every expert read the tokens that it serves, in one product; an expert without tokens costs nothing."""
        num_experts, num_out, num_in = self.weight.shape
        top_k = routing.experts.shape[-1]
        served = routing.experts.flatten()  # expert of assignment i, which is token i // K
        order = served.argsort(stable=True)
        if not torch.compiler.is_compiling() and not _has_values(served):
            raise NotImplementedError(
                "FFT MoE reads how many tokens every expert serves, and there are no values to read on the meta device "
                "and under torch.func.vmap"
            )
        rows = x.reshape(-1, num_in)[order // top_k].split(served.bincount(minlength=num_experts).tolist())
        biases = [None] * num_experts if self.bias is None else self.bias.unbind()
        outputs = [  # unbind: its backward pass fills one gradient, that of an index would add up E of full size
            nn.functional.linear(own, weight_MN, bias_M)
            for own, weight_MN, bias_M in zip(rows, self.weight.unbind(), biases, strict=True)
            if len(own)
        ]
        y = torch.cat(outputs) if outputs else x.new_zeros(0, num_out)
        y_of_gates = y[order.argsort()].view(*routing.gates.shape, num_out)
        return (routing.gates.unsqueeze(-1) * y_of_gates).sum(-2).to(y.dtype)


def _has_values(tensor: Tensor) -> bool:
    """Return whether Python can read the numbers in a tensor: not on the meta device, and not inside of a vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not tensor.is_meta


class _Upcycled(nn.Module):
    """In the place of a projection whose weights have moved to the experts."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = projection_shape(base)
