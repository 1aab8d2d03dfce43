"""Router and TopKRouter: which experts serve a token.

Shape legend: N in_features, E experts, K active experts per token, k features that a spectral router reads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.routing.logits import logits, without_autocast
from fourier_moe.routing.record import Record, Routing
from fourier_moe.routing.statistics import RouterStatistics


def lowest_waves(num_features: int, in_features: int) -> Tensor:
    """Real and imaginary parts of the lowest frequencies as a matrix: waves @ x = sqrt(2/N) [Re X[v], Im X[v]], X = FFT(x).

    v = 1 ... k/2: DC is left out, whose imaginary part is always 0. The rows are orthonormal, so that features of variance 1
    give k numbers of variance 1 whatever the width, and one learning rate serves all widths.

    Args:
        num_features: k, even; k/2 < N/2.
        in_features: N.

    Returns:
        float32 (k, N): k/2 rows of cosines, then k/2 of negative sines.
    """
    frequencies, places = (torch.arange(size, device="cpu") for size in (num_features // 2 + 1, in_features))
    angle = (torch.outer(frequencies[1:], places) % in_features).double() * (2 * math.pi / in_features)
    return (math.sqrt(2 / in_features) * torch.cat([angle.cos(), -angle.sin()])).float()


class Router(nn.Module, ABC):
    """Base of the routers: one logit per expert from a matrix R without bias. A subclass implements `route`.

    Args:
        in_features: N.
        num_experts: E.
        num_features: k, of a router that reads the k/2 lowest frequencies of its input, DC aside, instead of all features; see
            `lowest_waves`. None reads all.
        generator: source of the Kaiming-uniform initialization.
        device: where the weight is made.

    Attributes:
        weight: float32 parameter (E, N), or (E, k).
        waves: float32 buffer (k, N), or None; in no file.
        record: keeps what `forward` returns, for the balance loss and statistics.
    """

    waves: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_features: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        waves = None if num_features is None else lowest_waves(num_features, in_features).to(device)
        self.register_buffer("waves", waves, persistent=False)
        # Device and dtype are named: Trainer.configure_model sets other defaults, which must not change what is drawn.
        weight = torch.empty(num_experts, num_features or in_features, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        self.weight = nn.Parameter(weight.to(device))
        self.record = Record()

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def matrix(self) -> Tensor:
        """R (E, N).

        That of a spectral router is computed from its E k weights, which is little work, and its product with the tokens less
        than another transform of them.
        """
        if self.waves is None:
            return self.weight
        with without_autocast(self.weight.device):
            return self.weight @ self.waves.to(self.weight.dtype)

    @abstractmethod
    def route(self, x: Tensor) -> Routing:
        """Route the tokens of an input (..., N); gates in float32 (float64 for a float64 weight)."""

    def forward(self, x: Tensor) -> Routing:
        """Return what `route` returns; the record keeps it while a `recording` is open."""
        routing = self.route(x)
        if self.record.open:
            self.record.keep(routing)
        return routing

    def probabilities(self, x: Tensor) -> Tensor:
        """p = softmax(R x), (..., E), in float32 (float64 for a float64 weight), autocast or not."""
        return torch.softmax(logits(x, self.matrix()), -1)

    def balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e over the tokens recorded so far (paper Eq. 13-14); K when the load is perfectly even.

        f_e is the share of tokens that e serves (so sum f = K under a top-K), P_e the mean of p_e; the gradient flows through
        P_e. Padding counts in neither. Zero when every token is padding.

        Raises:
            NoTokensError: outside of `recording`, or when no forward in it has used the projection.
            UserError: if a gradient is wanted, and the forward has run without.
        """
        return self.record.balance_loss(trains=self.weight.requires_grad)

    def statistics(self) -> RouterStatistics:
        """Statistics of all tokens recorded since the first open StatisticsReader was made, without padding, of this process.

        Raises:
            RuntimeError: if no reader is open; then nothing is counted.
        """
        if not self.record.num_readers:
            raise RuntimeError(
                "this router counts no tokens while nobody asks: make `reader = StatisticsReader(model)` before the steps that "
                "are to be counted, and keep it"
            )
        return RouterStatistics.of_tasks(*self.record.counted(self.weight))

    def _replicate_for_data_parallel(self) -> Router:
        if self.record.recording() is not None:
            raise UserError(
                "torch.nn.DataParallel runs copies of the routers in threads of its own, where `recording` sees nothing; use "
                "DistributedDataParallel"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Copy without readers, so that the copy counts nothing, and belongs to no open recording."""
        return {**self.__dict__, "record": Record()}


class TopKRouter(Router):
    """Softmax router that keeps the K most probable experts of a token (paper Eq. 2).

    p = softmax(R x) in float32; the gate of an expert in the top-K is p_e divided by the sum over the top-K, or p_e itself if
    `normalize_gates` is off or K = 1 (a renormalized single gate is the constant 1 and would give R no gradient).

    Args:
        in_features: N.
        num_experts: E.
        top_k: K.
        normalize_gates: divide the gates of a token by their sum.
        num_features: k of a spectral router; see Router.
        generator: source of the Kaiming-uniform initialization.
        device: where the weight is made.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_gates: bool = True,
        num_features: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, num_experts, num_features=num_features, generator=generator, device=device)
        self.top_k = top_k
        self.normalize_gates = normalize_gates and top_k > 1

    def route(self, x: Tensor) -> Routing:
        probabilities = self.probabilities(x)
        gates, experts = torch.topk(probabilities, self.top_k, -1)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routing(gates, experts, probabilities)


def routers(model: nn.Module) -> dict[str, Router]:
    """Return all routers of a model by the name of the adapted projection they belong to, the first of those that share one."""
    return {name.removesuffix(".router"): module for name, module in model.named_modules() if isinstance(module, Router)}
