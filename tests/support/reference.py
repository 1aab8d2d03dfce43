"""Naive definitions, written independently of the package: explicit sums of cosines and sines in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def idft2_by_loops(spectrum: Tensor) -> Tensor:
    """dW[p,q] = 1/(MN) sum_{u,v} F[u,v] exp(2 pi i (up/M + vq/N)), real and imaginary part (M, N, 2), by four loops."""
    M, N = spectrum.shape
    result = torch.zeros(M, N, 2, dtype=torch.float64)
    for p in range(M):
        for q in range(N):
            for u in range(M):
                for v in range(N):
                    angle = 2 * math.pi * ((u * p % M) / M + (v * q % N) / N)
                    a, b = float(spectrum[u, v].real), float(spectrum[u, v].imag)
                    result[p, q, 0] += (a * math.cos(angle) - b * math.sin(angle)) / (M * N)
                    result[p, q, 1] += (a * math.sin(angle) + b * math.cos(angle)) / (M * N)
    return result


def cosine_sum(coefficients: Tensor, frequencies: Tensor, M: int, N: int, scale: float) -> Tensor:
    """scale * sum_j (a_j cos t - b_j sin t), t = 2 pi (u_j p/M + v_j q/N): (M, N), differentiable in the coefficients."""
    p, q = torch.arange(M).unsqueeze(1), torch.arange(N).unsqueeze(0)
    total = torch.zeros(M, N, dtype=torch.float64)
    for (a, b), (u, v) in zip(coefficients.double(), frequencies.tolist(), strict=True):
        angle = 2 * math.pi * ((u * p % M).double() / M + (v * q % N).double() / N)
        total = total + scale * (a * angle.cos() - b * angle.sin())
    return total


def routed_product(x: Tensor, gates: Tensor, coefficients: Tensor, frequencies: Tensor, M: int, scale: float) -> Tensor:
    """sum_e gates[t, e] dW_e x[t] with every dW_e built by `cosine_sum`."""
    total = torch.zeros(x.shape[0], M, dtype=torch.float64)
    for e in range(coefficients.shape[0]):
        update = cosine_sum(coefficients[e], frequencies[e], M, x.shape[1], scale)
        total = total + gates[:, e : e + 1].double() * (x.double() @ update.T)
    return total


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape
    if expected.numel():
        difference = (actual.double() - expected.double()).abs().max().item()
        size = expected.abs().max().item()
        assert math.isfinite(difference), "not finite"
        assert difference <= tolerance * max(size, 1e-30), f"relative difference {difference / max(size, 1e-30):.2e}"
