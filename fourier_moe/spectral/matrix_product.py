"""Forward and backward of the product for one expert that serves every token, through its update as a matrix.

The matrix depends on no token, so with many tokens and coefficients it costs less than to read and accumulate every position of
every token (`cheaper`). It is built again in the backward pass: saved are the arguments, as on the other paths. product.py has
the equations.

Shape legend: T tokens, N in_features, M out_features, P positions, C = 2 (real and imaginary part), F = M//2 + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourier_moe.spectral.torch_product import Positions, real_from_half

# Costs on a CPU in multiply-adds of a matrix product (docs/evidence/performance.md).
_POSITION = 400  # to read, multiply and accumulate one position of one token
_BUILDING = 300  # one element of the matrix, through its transforms


def cheaper(x_TN: Tensor, coefficients_EPC: Tensor, out_features: int) -> bool:
    """Return whether this path is there for an input, and costs less than torch_product.py's; timed on CPUs alone."""
    experts, pairs = coefficients_EPC.shape[:2]
    if x_TN.device.type != "cpu" or experts != 1:
        return False
    if coefficients_EPC.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return False  # matrix products would be rounded to fewer bits than transforms are
    num_tokens, in_features = x_TN.shape
    return _POSITION * num_tokens * pairs > (num_tokens + _BUILDING) * in_features * out_features


def update_matrix(coefficients_PC: Tensor, frequencies_PC: Tensor, out_features: int, in_features: int, scale: float) -> Tensor:
    """scale * Re sum_j c_j a_j b_j^T, (M, N): the sum over v by a transform of columns, the sum over u by one of rows."""
    positions = Positions.of(frequencies_PC.unsqueeze(0), coefficients_PC.dtype)
    c_P = torch.complex(coefficients_PC[:, 0], coefficients_PC[:, 1] * positions.conjugate_c_EP[0])
    spectrum_NF = c_P.new_zeros(in_features, out_features // 2 + 1)
    spectrum_NF.index_put_(_places(positions, in_features), c_P, accumulate=True)
    return real_from_half(torch.fft.ifft(spectrum_NF, dim=0, norm="forward"), out_features, scale).T


def _places(positions: Positions, in_features: int) -> tuple[Tensor, Tensor]:
    """Where each position is in the spectrum (N, F) of a real matrix (N, M): v from 0 to N - 1, and |u|."""
    v_P = -positions.negative_v_EP[0].long() * positions.columns_EP[0]
    return v_P % in_features, positions.rows_EP[0]


def product_forward(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """As in torch_product.py, with E = 1."""
    dtype = coefficients_EPC.dtype
    with torch.autocast(x_TN.device.type, enabled=False):
        matrix_MN = update_matrix(coefficients_EPC[0], frequencies_EPC[0], out_features, x_TN.shape[1], scale)
        return (x_TN.to(dtype) @ matrix_MN.T).mul_(_gate(gates_TK, dtype))


def product_backward(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As in torch_product.py, with E = 1."""
    needs_x, needs_gates, needs_coefficients = needs
    dtype, input_dtype, M, N = coefficients_EPC.dtype, x_TN.dtype, grad_TM.shape[1], x_TN.shape[1]
    grad_x, grad_gates, grad_coefficients = x_TN.new_empty(0), gates_TK.new_empty(0), coefficients_EPC.new_empty(0)
    with torch.autocast(x_TN.device.type, enabled=False):
        x_TN, grad_TM = x_TN.to(dtype), grad_TM.to(dtype)
        gated_TM = grad_TM * _gate(gates_TK, dtype)
        if needs_x or needs_gates:
            matrix_MN = update_matrix(coefficients_EPC[0], frequencies_EPC[0], M, N, scale)
        if needs_x:
            grad_x = (gated_TM @ matrix_MN).to(input_dtype)
        if needs_gates:
            grad_T1 = (grad_TM * (x_TN @ matrix_MN.T)).sum(-1, keepdim=True)
            grad_gates = grad_T1.repeat(1, gates_TK.shape[1]).to(gates_TK.dtype)
        if needs_coefficients:
            # S, the spectrum of dL/dW = sum_t g_t grad_t x_t^T: dL/dRe c_j = scale Re S_j and dL/dIm c_j = scale Im S_j.
            positions = Positions.of(frequencies_EPC, dtype)
            spectrum_EP = torch.fft.rfft2(x_TN.T @ gated_TM)[_places(positions, N)].unsqueeze(0)
            grad_coefficients = scale * torch.stack([spectrum_EP.real, spectrum_EP.imag * positions.conjugate_c_EP], -1)
    return grad_x, grad_gates, grad_coefficients


def _gate(gates_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, 1): K gates of the same expert add up; all but one of them are 0."""
    return gates_TK.to(dtype).sum(-1, keepdim=True)
