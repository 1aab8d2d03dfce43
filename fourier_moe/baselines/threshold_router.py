"""ThresholdRouter: as many experts for a token as pass a threshold that depends on the token (AdaMoLE).

Shape legend: N in_features, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fourier_moe.routing.logits import logits
from fourier_moe.routing.record import Routing
from fourier_moe.routing.router import Router


class ThresholdRouter(Router):
    """Softmax router that keeps the experts above a threshold of the token's own (arXiv 2405.00361).

    p = softmax(R x), tau = tau_max sigmoid(w x + b), a_e = p_e - tau. An expert serves the token if a_e >= 0, with the gate
    a_e / sum of those kept. With tau_max <= 1/E every token has an expert, since the largest p_e is at least 1/E; with a larger
    one it may have none. The load-balancing loss and the statistics take a_e for p_e, below 0 for an expert that does not pass,
    as in the authors' code.

    Args:
        in_features: N.
        num_experts: E.
        max_threshold: tau_max.
        generator: source of the initialization: Kaiming-uniform for R, and for w and b as torch.nn.Linear's.
        device: where the weights are made.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        max_threshold: float,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, generator=generator, device=device)
        self.max_threshold = max_threshold
        start = torch.empty(in_features + 1, device="cpu", dtype=torch.float32)
        start.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
        self.threshold_weight = nn.Parameter(start[:-1].unsqueeze(0).to(device))  # w (1, N)
        self.threshold_bias = nn.Parameter(start[-1:].clone().to(device))  # b (1,)

    def route(self, x: Tensor) -> Routing:
        """Return the gates (..., E) of all experts, 0 for those that do not pass."""
        probabilities = self.probabilities(x)
        threshold = self.max_threshold * torch.sigmoid(logits(x, self.threshold_weight) + self.threshold_bias)
        margin = probabilities - threshold
        return Routing.to_all(_normalized(margin.clamp(min=0)), margin)


def _normalized(kept: Tensor) -> Tensor:
    """Divided by the sum over the experts; all 0 where none is kept."""
    total = kept.sum(-1, keepdim=True)
    return kept / torch.where(total > 0, total, 1.0)
