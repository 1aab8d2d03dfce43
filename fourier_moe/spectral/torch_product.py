"""Forward and backward of the routed spectral product in PyTorch's operations; product.py has the equations and the operator.

Shape legend: T tokens, N in_features, M out_features, E experts, K active per token, P positions per expert, C = 2 (real and
imaginary part), F a half spectrum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Token-position pairs in flight: bounds what the product holds beside its arguments and results. On a CPU fewer of them for few
# threads, so that what one thread works on stays in its cache (docs/evidence/performance.md).
_POSITIONS_PER_CHUNK = 2**19
_POSITIONS_PER_THREAD = 2**17


class Positions(NamedTuple):
    """Where each position reads and writes in half spectra, frequencies with u < 0 replaced by their conjugate partner."""

    rows_EP: Tensor  # |u|: row of the output half spectrum
    columns_EP: Tensor  # |v|: row of the input half spectrum
    conjugate_c_EP: Tensor  # +1, or -1 where u < 0: Re(c a b) = Re(conj(c) conj(a) conj(b))
    negative_v_EP: Tensor  # after that replacement: +1 for v < 0, else -1, the sign of Im conj(X[v]) read at |v|

    @classmethod
    def of(cls, frequencies_EPC: Tensor, dtype: torch.dtype) -> Positions:
        u_EP, v_EP = frequencies_EPC.long().unbind(-1)
        mirrored_EP = u_EP < 0
        negative_EP = torch.where(mirrored_EP, -v_EP, v_EP) < 0
        return cls(u_EP.abs(), v_EP.abs(), 1 - 2 * mirrored_EP.to(dtype), 2 * negative_EP.to(dtype) - 1)


class _Active(NamedTuple):
    """The positions of every token's active experts, side by side: K*P per token."""

    rows_TKP: Tensor
    columns_TKP: Tensor
    negative_v_TKP: Tensor
    c_TKP: Tensor  # complex coefficients, conjugated where the position was replaced by its partner

    @classmethod
    def of(cls, positions: Positions, experts_TK: Tensor, coefficients_EPC: Tensor) -> _Active:
        real_EP, imaginary_EP = coefficients_EPC.unbind(-1)
        c_EP = torch.complex(real_EP, imaginary_EP * positions.conjugate_c_EP)
        picked = (t[experts_TK] for t in (positions.rows_EP, positions.columns_EP, positions.negative_v_EP, c_EP))
        return cls(*picked)


def product_forward(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """Return the product itself, without its place in torch's operators and autograd; see `routed_spectral_product`."""
    dtype = coefficients_EPC.dtype
    positions = Positions.of(frequencies_EPC, dtype)
    y_parts = []
    for part in _parts(experts_TK, positions):
        active = _Active.of(positions, experts_TK[part], coefficients_EPC)
        values_TKP = _read(_rfft(x_TN[part].to(dtype)), active.columns_TKP, active.negative_v_TKP)
        values_TKP.mul_(active.c_TKP).mul_(gates_TK[part].to(dtype).unsqueeze(-1))
        y_parts.append(_accumulate(values_TKP, active.rows_TKP, out_features, scale))
    return _join(y_parts)


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
    """Gradients with respect to x, gates and coefficients; an empty tensor for each that is not needed."""
    needs_x, needs_gates, needs_coefficients = needs
    dtype = coefficients_EPC.dtype
    positions = Positions.of(frequencies_EPC, dtype)
    x_parts, gates_parts = [], []
    sums_EP = torch.zeros_like(positions.conjugate_c_EP, dtype=dtype.to_complex())
    for part in _parts(experts_TK, positions):
        active = _Active.of(positions, experts_TK[part], coefficients_EPC)
        gates_TK1 = gates_TK[part].to(dtype).unsqueeze(-1)
        # h_j = sum_p grad[p] exp(2 pi i u_j p/M): what an increment of position j's bracket earns.
        h_TKP = _read(_rfft(grad_TM[part].to(dtype)), active.rows_TKP, None)
        if needs_gates or needs_coefficients:
            x_TF = _rfft(x_TN[part].to(dtype))
            products_TKP = _read(x_TF, active.columns_TKP, active.negative_v_TKP).mul_(h_TKP)
            if needs_gates:
                gates_parts.append((scale * (products_TKP * active.c_TKP).real.sum(-1)).to(gates_TK.dtype))
            if needs_coefficients:
                sums_EP.index_add_(0, experts_TK[part].flatten(), products_TKP.mul_(gates_TK1).flatten(0, 1))
        if needs_x:
            h_TKP.mul_(active.c_TKP).mul_(gates_TK1)
            # Re(q exp(-i|v|t)) = Re(conj(q) exp(i|v|t)): positions with v < 0 are accumulated at |v|.
            torch.view_as_real(h_TKP)[..., 1].mul_(-active.negative_v_TKP)
            x_parts.append(_accumulate(h_TKP, active.columns_TKP, x_TN.shape[1], scale).to(x_TN.dtype))
    sums_EPC = torch.stack([sums_EP.real, -sums_EP.imag * positions.conjugate_c_EP], -1)
    return (
        _join(x_parts) if needs_x else x_TN.new_empty(0),
        _join(gates_parts) if needs_gates else gates_TK.new_empty(0),
        scale * sums_EPC if needs_coefficients else coefficients_EPC.new_empty(0),
    )


def _parts(experts_TK: Tensor, positions: Positions) -> list[slice]:
    """Tokens in parts whose positions, a few numbers each, take tens of megabytes at the most."""
    num_tokens, top_k = experts_TK.shape
    at_once = _POSITIONS_PER_CHUNK
    if experts_TK.device.type == "cpu":
        at_once = min(at_once, _POSITIONS_PER_THREAD * torch.get_num_threads())
    size = max(1, at_once // max(1, top_k * positions.rows_EP.shape[1]))
    return [slice(start, start + size) for start in range(0, max(1, num_tokens), size)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(spectrum_TF: Tensor, rows_TKP: Tensor, signs_TKP: Tensor | None) -> Tensor:
    """spectrum[t, rows] with the imaginary part times `signs`, or conjugated if there are none, as a new tensor (T, K, P)."""
    values_TKP = spectrum_TF.gather(1, rows_TKP.flatten(1)).view(rows_TKP.shape)
    if signs_TKP is None:
        return values_TKP.conj_physical_()
    torch.view_as_real(values_TKP)[..., 1].mul_(signs_TKP)
    return values_TKP


def _rfft(x_TN: Tensor) -> Tensor:
    """torch.fft.rfft, also of no tokens at all, which torch 2.10 on a CPU refuses."""
    return torch.fft.rfft(x_TN) if len(x_TN) else x_TN.new_zeros(0, x_TN.shape[1] // 2 + 1, dtype=x_TN.dtype.to_complex())


def _accumulate(values_TKP: Tensor, rows_TKP: Tensor, size: int, scale: float) -> Tensor:
    """scale * Re sum_r values[r] exp(2 pi i rows[r] p / size) for p = 0..size-1, as (T, size)."""
    if not len(values_TKP):
        return values_TKP.real.new_zeros(0, size)
    spectrum_TF = values_TKP.new_zeros(len(values_TKP), size // 2 + 1)
    spectrum_TF.scatter_add_(1, rows_TKP.flatten(1), values_TKP.flatten(1))
    return real_from_half(spectrum_TF, size, scale)


def real_from_half(spectrum_TF: Tensor, size: int, scale: float) -> Tensor:
    """scale * Re sum_f spectrum[f] exp(2 pi i f p / size) for p = 0..size-1, as (T, size). Overwrites `spectrum`."""
    # irfft counts every inner frequency twice (itself and its conjugate), but DC and Nyquist once and only their real part.
    edges = [0, size // 2] if size % 2 == 0 else [0]
    for row in set(edges):
        spectrum_TF[:, row] = 2 * spectrum_TF[:, row].real
    return torch.fft.irfft(spectrum_TF, n=size).mul_(scale * size / 2)
