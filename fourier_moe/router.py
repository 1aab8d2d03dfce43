"""TopKRouter: which experts serve a token, and the load-balancing loss.

Shape legend: T tokens, N in_features, E experts, K active experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Recorded(NamedTuple):
    """What the balance loss needs of one forward. Sums are left to `balance_loss`: under activation checkpointing an operation
    here would belong to the recomputed region, which must be the same with and without recording."""

    probabilities_TE: Tensor  # p_e, carries the gradient
    active_TK: Tensor  # experts in the top-K
    mask_T: Tensor  # 1 for real tokens, 0 for padding


class Routing(NamedTuple):
    """Which experts serve each token, and with what gate.

    Attributes:
        gates: (..., K).
        experts: int64 (..., K).
    """

    gates: Tensor
    experts: Tensor

    @classmethod
    def to_all(cls, gates: Tensor) -> Routing:
        """Every expert serves every token: K = E, gates (..., E) in the order of the experts."""
        return cls(gates, torch.arange(gates.shape[-1], device=gates.device).expand(gates.shape))

    def dense(self, num_experts: int) -> Tensor:
        """Gates (..., E) of all experts, 0 for the inactive ones."""
        shape = (*self.gates.shape[:-1], num_experts)
        return self.gates.new_zeros(shape).scatter_add(-1, self.experts, self.gates)


class TopKRouter(nn.Module):
    """Softmax router without bias that keeps the K most probable experts of a token (paper Eq. 2).

    p = softmax(R x) in float32; the gate of an expert in the top-K is p_e divided by the sum over the top-K, or p_e itself if
    `normalize_gates` is off or K = 1 (a renormalised single gate is the constant 1 and would give R no gradient).

    Args:
        in_features: N.
        num_experts: E.
        top_k: K.
        normalize_gates: divide the gates of a token by their sum.
        generator: source of the Kaiming-uniform initialisation.
        device: where the weight is made.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_gates: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize_gates = normalize_gates and top_k > 1
        # Device and dtype are named: Trainer.configure_model sets other defaults, which must not change what is drawn.
        weight_EN = torch.empty(num_experts, in_features, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(weight_EN, a=math.sqrt(5), generator=generator)
        self.weight = nn.Parameter(weight_EN.to(device))
        self._recording = False
        self._token_mask: Tensor | None = None
        self._recorded: list[_Recorded] = []

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Routing:
        """Route the tokens of an input (..., N); gates in float32 (float64 for a float64 weight)."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            probabilities = torch.softmax(nn.functional.linear(x.to(dtype), self.weight.to(dtype)), -1)
        gates, experts = torch.topk(probabilities, self.top_k, -1)
        if self._recording:
            self._record(probabilities, experts)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routing(gates, experts)

    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e over the tokens recorded so far (paper Eq. 13-14); K when the load is perfectly even.

        f_e is the share of tokens whose top-K holds e (so sum f = K), P_e the mean of p_e; the gradient flows through P_e.
        Padding counts in neither. Zero when every token is padding.

        Raises:
            RuntimeError: outside of `recording`, or when no forward has run in it.
        """
        if not self._recorded:
            raise RuntimeError(
                "this router saw no tokens: read balance_loss() inside `with recording(model): ...`, after a forward pass that "
                "uses the adapted projection"
            )
        probabilities_TE, active_TK, mask_T = (torch.cat(parts) for parts in zip(*self._recorded, strict=True))
        num_tokens = mask_T.sum().clamp(min=1)
        load_E = mask_T.new_zeros(self.num_experts).index_add(0, active_TK.flatten(), mask_T.repeat_interleave(self.top_k))
        probability_E = (probabilities_TE * mask_T.unsqueeze(-1)).sum(0)
        return self.num_experts * (load_E / num_tokens * (probability_E / num_tokens)).sum()

    def _record(self, probabilities: Tensor, active: Tensor) -> None:
        probabilities_TE, active_TK = probabilities.reshape(-1, self.num_experts), active.reshape(-1, self.top_k)
        if self._token_mask is None:
            mask_T = probabilities_TE.new_ones(len(probabilities_TE))
        else:
            if self._token_mask.shape != probabilities.shape[:-1]:
                raise ValueError(
                    f"token_mask has shape {tuple(self._token_mask.shape)}, but the adapted projection sees tokens of shape "
                    f"{tuple(probabilities.shape[:-1])}; give one true/false per token of the projection's input"
                )
            mask_T = self._token_mask.flatten().to(probabilities_TE)
        self._recorded.append(_Recorded(probabilities_TE, active_TK, mask_T))


@contextmanager
def recording(model: nn.Module, token_mask: Tensor | None = None) -> Iterator[None]:
    """While open, every router of `model` records its tokens for `balance_loss`; on exit it forgets them.

    Open it around the forward pass only: activation checkpointing runs the forward a second time during backward, which must
    not be counted again. Read `balance_loss` before it closes.

    Args:
        token_mask: true for real tokens, false for padding, in the leading shape of every adapted projection's input, for
            example (batch, length). None counts all.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        router._recording, router._token_mask, router._recorded = True, token_mask, []
    try:
        yield
    finally:
        for router in routers:
            router._recording, router._token_mask, router._recorded = False, None, []
