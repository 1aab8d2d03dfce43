"""Forward and backward of the routed spectral product around the Triton kernels: FFT, one kernel, inverse FFT.

Shape legend: T tokens, N in_features, M out_features, E experts, K active per token, P positions per expert, R = E*P, C = 2.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fourier_moe.routing.record import dense_gates
from fourier_moe.spectral.kernels.triton_spectral import RowLists, accumulate, gradients
from fourier_moe.spectral.torch_product import Positions


class _Lists(NamedTuple):
    """What the kernels need to know of the positions, made once per projection."""

    version: int | None  # of the frequencies' content; None if torch does not count it
    shape: tuple[int, int]
    forward: RowLists  # by output row |u|, reading |v|
    backward: RowLists  # by input row |v|, reading |u|
    signs_R: Tensor  # -1 where a coefficient is conjugated


# By tensor of frequencies. Not an attribute of it: saving or copying a model would take the lists along.
_LISTS: MutableMapping[Tensor, _Lists] = WeakTensorKeyDictionary()


def product_forward(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """As fourier_moe.spectral.torch_product.product_forward."""
    lists = _lists_of(frequencies_EPC, out_features, x_TN.shape[1])
    gates_TE = _all_gates(gates_TK, experts_TK, len(coefficients_EPC))
    spectrum_TFC = _half_spectrum(x_TN)
    out_TFC = accumulate(spectrum_TFC, gates_TE, _coefficients(coefficients_EPC, lists), lists.forward, out_features)
    return _inverse(out_TFC, out_features, scale)


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
    """As fourier_moe.spectral.torch_product.product_backward."""
    needs_x, needs_gates, needs_coefficients = needs
    N = x_TN.shape[1]
    lists = _lists_of(frequencies_EPC, grad_TM.shape[1], N)
    c_RC = _coefficients(coefficients_EPC, lists)
    gates_TE = _all_gates(gates_TK, experts_TK, len(coefficients_EPC))
    grad_TFC = _half_spectrum(grad_TM)
    grad_x, grad_gates, grad_coefficients = x_TN.new_empty(0), gates_TK.new_empty(0), coefficients_EPC.new_empty(0)
    if needs_gates or needs_coefficients:
        raw_gates_TE, sums_RC = gradients(
            _half_spectrum(x_TN), grad_TFC, gates_TE, c_RC, lists.forward, lists.backward.source_R
        )
        if needs_gates:
            grad_gates = (scale * raw_gates_TE.gather(1, experts_TK)).to(gates_TK.dtype)
        if needs_coefficients:
            signed = torch.stack([sums_RC[:, 0], -sums_RC[:, 1] * lists.signs_R], -1)
            grad_coefficients = (scale * signed).view_as(coefficients_EPC)
    if needs_x:
        grad_x = _inverse(accumulate(grad_TFC, gates_TE, c_RC, lists.backward, N), N, scale).to(x_TN.dtype)
    return grad_x, grad_gates, grad_coefficients


def _all_gates(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return (T, E): the kernels look a gate up by its expert and skip those that are 0."""
    return dense_gates(gates_TK.detach().float(), experts_TK, num_experts)


def _half_spectrum(x_TN: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.rfft(x_TN.float())).contiguous()


def _inverse(spectrum_TFC: Tensor, size: int, scale: float) -> Tensor:
    return torch.fft.irfft(torch.view_as_complex(spectrum_TFC), n=size).mul_(scale * size / 2)


def _coefficients(coefficients_EPC: Tensor, lists: _Lists) -> Tensor:
    """Return (R, 2), contiguous, conjugated where the position was replaced by its partner."""
    real_R, imaginary_R = coefficients_EPC.detach().reshape(-1, 2).unbind(-1)
    return torch.stack([real_R, imaginary_R * lists.signs_R], -1)


def _lists_of(frequencies_EPC: Tensor, out_features: int, in_features: int) -> _Lists:
    """Return the lists, kept as long as the tensor of frequencies, and made again if its content changes (a file is loaded)."""
    version = None if frequencies_EPC.is_inference() else frequencies_EPC._version
    shape = (out_features, in_features)
    lists = _LISTS.get(frequencies_EPC)
    if lists is None or version is None or (lists.version, lists.shape) != (version, shape):
        positions = Positions.of(frequencies_EPC, torch.float32)
        negative_v_R = positions.negative_v_EP.flatten()
        ones_R = torch.ones_like(negative_v_R)
        rows_R, columns_R = positions.rows_EP.flatten(), positions.columns_EP.flatten()
        lists = _LISTS[frequencies_EPC] = _Lists(
            version,
            shape,
            RowLists.build(rows_R, columns_R, negative_v_R, ones_R, out_features // 2 + 1),
            RowLists.build(columns_R, rows_R, -ones_R, -negative_v_R, in_features // 2 + 1),
            positions.conjugate_c_EP.flatten(),
        )
    return lists
