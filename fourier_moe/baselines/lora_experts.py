"""Low-rank experts of one projection, all computed in two matrix products.

Shape legend: T tokens, N in_features, M out_features, E experts, R rank of an expert, S = E, or 1 where all share one A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def mixture(self, gates_E: Tensor) -> Tensor:
        """sum_e gates_e s B_e A_e (M, N) for gates that are the same for all tokens."""
        return sum(gate * self.delta_weight(expert) for expert, gate in enumerate(gates_E.to(self.B)))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        E, M, R = self.B.shape
        return f"in_features={self.A.shape[-1]}, out_features={M}, experts={E}, rank={R}, scaling={self.scaling:.4g}"


def random_start(
    num_a: int, num_experts: int, rank: int, shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A (S, R, N) Kaiming-uniform as LoRA's and B (E, M, R) zero, so that the update starts at 0; `shape` is (M, N)."""
    M, N = shape
    A_SRN = torch.empty(num_a, rank, N, device="cpu", dtype=torch.float32)
    A_SRN.uniform_(-(N**-0.5), N**-0.5, generator=generator)
    return A_SRN.to(device), torch.zeros(num_experts, M, rank, device=device, dtype=torch.float32)


def singular_start(weight_MN: Tensor, num_experts: int, rank: int, shrink: float) -> tuple[Tensor, Tensor]:
    """A (E, R, N) and B (E, M, R) from the singular triplets of a weight in E segments (GOAT, arXiv 2502.16894).

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
