"""The routed spectral product on activations, its backward pass, and the dense definition that it must equal.

Shape legend: T tokens, N in_features, M out_features, E experts, P positions per expert, C = 2 (real and imaginary part),
R = E*P rows (one per position), F a half spectrum (N//2 + 1 or M//2 + 1).

The update of expert e is dW_e = scale * Re sum_j c_j a_j b_j^T with a_j[p] = exp(2 pi i u_j p/M), b_j[q] = exp(2 pi i v_j q/N)
(Theorem 3.2; with conjugate symmetry scale = 2 alpha/(MN)). Hence, with X = FFT_N(x),

    y = sum_e g_e dW_e x = scale * Re sum_j a_j [ g_e(j) c_j conj(X[v_j]) ],

where the bracket is accumulated into one half spectrum along the output axis and one inverse FFT ends it. No M x N matrix is
held. The gradient with respect to x has the same form with the roles of (u, M) and (v, N) exchanged. Complex numbers exist
only in this file and in kernels/.

The product is registered with torch as the operator `fourier_moe::routed_spectral_product`, so that torch.compile takes it
whole, without a graph break and without looking into its complex arithmetic.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourier_moe.kernels import use_triton


def routed_spectral_product(
    x_TN: Tensor,
    gates_TE: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """sum_e gates[t, e] dW_e x[t], exact, without building any dW_e.

    Cost per token: one FFT of length N, E*P complex multiply-adds, one inverse FFT of length M. Saved for the backward pass:
    the arguments, nothing else.

    Args:
        x_TN: input, any floating dtype; half precisions are computed in float32.
        gates_TE: gate of every expert, 0 where the expert is not active.
        coefficients_EPC: real and imaginary part of every coefficient c_j, float32 or float64.
        frequencies_EPC: signed integer (u_j, v_j), |u| <= M/2, |v| <= N/2.
        out_features: M.
        scale: factor of every update, 2 alpha/(MN) with conjugate symmetry.

    Returns:
        y_TM in the dtype of the coefficients.
    """
    return _product(x_TN, gates_TE, coefficients_EPC, frequencies_EPC, out_features, scale)


@torch.library.custom_op("fourier_moe::routed_spectral_product", mutates_args=())
def _product(
    x_TN: Tensor, gates_TE: Tensor, coefficients_EPC: Tensor, frequencies_EPC: Tensor, out_features: int, scale: float
) -> Tensor:
    return _path(x_TN).product_forward(x_TN, gates_TE, coefficients_EPC, frequencies_EPC, out_features, scale)


@_product.register_fake
def _(
    x_TN: Tensor, gates_TE: Tensor, coefficients_EPC: Tensor, frequencies_EPC: Tensor, out_features: int, scale: float
) -> Tensor:
    return coefficients_EPC.new_empty(x_TN.shape[0], out_features)


@torch.library.custom_op("fourier_moe::routed_spectral_product_backward", mutates_args=())
def _product_backward(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TE: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _path(x_TN).product_backward(grad_TM, x_TN, gates_TE, coefficients_EPC, frequencies_EPC, scale, needs)


@_product_backward.register_fake
def _(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TE: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x_TN, gates_TE, coefficients_EPC)
    x, gates, coefficients = (torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    return x, gates, coefficients


def _path(x_TN: Tensor) -> ModuleType:
    """The module whose `product_forward` and `product_backward` compute this input: the Triton path, or this one."""
    if use_triton(x_TN):
        from fourier_moe.kernels import triton_product

        return triton_product
    return sys.modules[__name__]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = _product_backward(grad_TM, *ctx.saved_tensors, ctx.scale, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None)


_product.register_autograd(_backward, setup_context=_setup_context)


class Positions(NamedTuple):
    """Where each position reads and writes in half spectra, frequencies with u < 0 replaced by their conjugate partner."""

    rows_R: Tensor  # |u|: row of the output half spectrum
    columns_R: Tensor  # |v|: row of the input half spectrum
    conjugate_c_R1: Tensor  # +1, or -1 where u < 0: Re(c a b) = Re(conj(c) conj(a) conj(b))
    negative_v_R1: Tensor  # after that replacement: +1 for v < 0, else -1, the sign of Im conj(X[v]) read at |v|

    @classmethod
    def of(cls, frequencies_EPC: Tensor, dtype: torch.dtype) -> Positions:
        u_R, v_R = frequencies_EPC.reshape(-1, 2).long().unbind(-1)
        mirrored_R = u_R < 0
        negative_R = torch.where(mirrored_R, -v_R, v_R) < 0
        return cls(
            u_R.abs(),
            v_R.abs(),
            (1 - 2 * mirrored_R.to(dtype)).unsqueeze(-1),
            (2 * negative_R.to(dtype) - 1).unsqueeze(-1),
        )


def product_forward(
    x_TN: Tensor, gates_TE: Tensor, coefficients_EPC: Tensor, frequencies_EPC: Tensor, out_features: int, scale: float
) -> Tensor:
    """The product itself, without its place in torch's operators and autograd; see `routed_spectral_product`."""
    dtype = coefficients_EPC.dtype
    positions = Positions.of(frequencies_EPC, dtype)
    c_EP1 = as_complex(coefficients_EPC, positions)
    values_RT = _read_conjugate(_half_spectrum(x_TN, dtype), positions)
    _weigh(values_RT, c_EP1, gates_TE)
    return _accumulate(values_RT, positions.rows_R, out_features, scale)


def product_backward(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TE: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, gates and coefficients; an empty tensor for each that is not needed."""
    needs_x, needs_gates, needs_coefficients = needs
    dtype = coefficients_EPC.dtype
    E, P, _ = coefficients_EPC.shape
    positions = Positions.of(frequencies_EPC, dtype)
    c_EP1 = as_complex(coefficients_EPC, positions)
    grad_x, grad_gates, grad_coefficients = x_TN.new_empty(0), gates_TE.new_empty(0), coefficients_EPC.new_empty(0)
    # h_j = sum_p grad[p] exp(2 pi i u_j p/M): what an increment of position j's bracket earns.
    h_RT = _half_spectrum(grad_TM, dtype)[positions.rows_R].conj_physical_()
    if needs_gates or needs_coefficients:
        products_EPT = _read_conjugate(_half_spectrum(x_TN, dtype), positions).mul_(h_RT).view(E, P, -1)
        if needs_coefficients:
            # A product of batched matrices, (P, T) with (T, 1) for every expert: no tensor of the size of products_EPT.
            gates_ET1 = torch.complex(gates_TE.to(dtype), torch.zeros_like(gates_TE, dtype=dtype)).T.unsqueeze(-1)
            sums_EP = torch.bmm(products_EPT, gates_ET1).squeeze(-1)
            signs_EP = positions.conjugate_c_R1.view(E, P)
            grad_coefficients = scale * torch.stack([sums_EP.real, -sums_EP.imag * signs_EP], -1)
        if needs_gates:
            weighted_ET = torch.bmm(c_EP1.transpose(1, 2), products_EPT).squeeze(1)
            grad_gates = (scale * weighted_ET.real.T).to(gates_TE.dtype).contiguous()
    if needs_x:
        _weigh(h_RT, c_EP1, gates_TE)
        # Re(q exp(-i|v|t)) = Re(conj(q) exp(i|v|t)): positions with v < 0 are accumulated at |v|.
        torch.view_as_real(h_RT)[..., 1].mul_(-positions.negative_v_R1)
        grad_x = _accumulate(h_RT, positions.columns_R, x_TN.shape[1], scale).to(x_TN.dtype)
    return grad_x, grad_gates, grad_coefficients


def _half_spectrum(x_TN: Tensor, dtype: torch.dtype) -> Tensor:
    """FFT along features, frequency first, so that one position is one contiguous row over tokens: (F, T)."""
    return torch.fft.rfft(x_TN.to(dtype)).T.contiguous()


def _accumulate(values_RT: Tensor, rows_R: Tensor, size: int, scale: float) -> Tensor:
    """scale * Re sum_r values[r] exp(2 pi i rows[r] p / size) for p = 0..size-1, as (T, size)."""
    spectrum_FT = values_RT.new_zeros(size // 2 + 1, values_RT.shape[1]).index_add_(0, rows_R, values_RT)
    # irfft counts every inner frequency twice (itself and its conjugate), but DC and Nyquist once and only their real part.
    edges = [0, size // 2] if size % 2 == 0 else [0]
    for row in set(edges):
        spectrum_FT[row] = 2 * spectrum_FT[row].real
    return torch.fft.irfft(spectrum_FT.T, n=size).mul_(scale * size / 2)


def as_complex(coefficients_EPC: Tensor, positions: Positions) -> Tensor:
    """(E, P, 1) complex coefficients, conjugated where the position was replaced by its partner."""
    E, P, _ = coefficients_EPC.shape
    real, imaginary = coefficients_EPC.unbind(-1)
    return torch.complex(real, imaginary * positions.conjugate_c_R1.view(E, P)).unsqueeze(-1)


def _read_conjugate(spectrum_FT: Tensor, positions: Positions) -> Tensor:
    """conj(X[v_j]) for every position from the half spectrum of a real signal, as a new tensor (R, T)."""
    values_RT = spectrum_FT[positions.columns_R]
    torch.view_as_real(values_RT)[..., 1].mul_(positions.negative_v_R1)
    return values_RT


def _weigh(values_RT: Tensor, c_EP1: Tensor, gates_TE: Tensor) -> None:
    """Multiply every row by its coefficient and by its expert's gate, in place."""
    E, P, _ = c_EP1.shape
    values_RT.view(E, P, -1).mul_(c_EP1).mul_(gates_TE.to(c_EP1.real.dtype).T.unsqueeze(1))


def dense_spectrum(
    coefficients_PC: Tensor, frequencies_PC: Tensor, out_features: int, in_features: int, *, hermitian: bool
) -> Tensor:
    """The spectrum F (M, N) of one expert, complex, in numpy order: F[u, v] += c and, if `hermitian`, F[-u, -v] += conj(c)."""
    c_P = torch.view_as_complex(coefficients_PC.contiguous())
    u_P, v_P = frequencies_PC.long().unbind(-1)
    spectrum_MN = c_P.new_zeros(out_features, in_features)
    spectrum_MN = spectrum_MN.index_put((u_P % out_features, v_P % in_features), c_P, accumulate=True)
    if hermitian:
        spectrum_MN = spectrum_MN.index_put((-u_P % out_features, -v_P % in_features), c_P.conj(), accumulate=True)
    return spectrum_MN


def dense_delta_weight(
    coefficients_PC: Tensor,
    frequencies_PC: Tensor,
    out_features: int,
    in_features: int,
    *,
    scaling: float,
    hermitian: bool = True,
) -> Tensor:
    """dW = alpha Re IDFT2(F) (M, N): the paper's definition (Eq. 1), kept as the reference and for analysis."""
    spectrum_MN = dense_spectrum(coefficients_PC, frequencies_PC, out_features, in_features, hermitian=hermitian)
    return scaling * torch.fft.ifft2(spectrum_MN).real
