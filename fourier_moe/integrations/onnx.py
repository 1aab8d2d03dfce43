"""onnx_program: an exported model without the project's own operator, which ONNX does not know.

Shape legend: T tokens, N in_features, M out_features, E experts, K active experts per token, P positions per expert, J = E P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.export import ExportedProgram, default_decompositions

from fourier_moe.routing.record import dense_gates


def onnx_program(program: ExportedProgram) -> ExportedProgram:
    """Return an exported model with operators that ONNX has, for `torch.onnx.export`.

    FourierMoE's product becomes matrix products with cosines and sines, for all experts: exact, but of cost J (M + N) per token
    instead of a Fourier transform. Other methods need no translation.

    Args:
        program: what `torch.export.export` returned for an adapted model in evaluation mode.
    """
    decompositions = default_decompositions()
    decompositions[torch.ops.fourier_moe.routed_spectral_product.default] = real_product
    return program.run_decompositions(decompositions)


def real_product(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """Return what `routed_spectral_product` does, without complex numbers: y = scale Re sum_j a_j g_e(j) c_j conj(X[v_j])."""
    E, P, _ = coefficients_EPC.shape
    u_J, v_J = frequencies_EPC.reshape(-1, 2).long().unbind(-1)
    real_J, imaginary_J = coefficients_EPC.reshape(-1, 2).unbind(-1)
    x_TN = x_TN.to(coefficients_EPC.dtype)
    cos_JN, sin_JN = _waves(v_J, x_TN.shape[-1], x_TN)
    cos_JM, sin_JM = _waves(u_J, out_features, x_TN)
    x_real_TJ, x_imaginary_TJ = x_TN @ cos_JN.T, x_TN @ sin_JN.T  # conj(X[v_j])
    gates_TJ = dense_gates(gates_TK, experts_TK, E).repeat_interleave(P, 1).to(x_TN.dtype) * scale
    y_real_TJ = gates_TJ * (real_J * x_real_TJ - imaginary_J * x_imaginary_TJ)
    y_imaginary_TJ = gates_TJ * (real_J * x_imaginary_TJ + imaginary_J * x_real_TJ)
    return y_real_TJ @ cos_JM - y_imaginary_TJ @ sin_JM


def _waves(frequencies_J: Tensor, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2 pi f_j n / size, (J, size)."""
    steps = torch.arange(size, device=like.device)
    turns = torch.remainder(frequencies_J[:, None] * steps, size)  # exact, so that the angle has one rounding
    angles = turns.to(like.dtype) * (2 * math.pi / size)
    return angles.cos(), angles.sin()
