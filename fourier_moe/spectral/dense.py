"""One expert's update as the paper defines it: its spectrum, its matrix, and the matrix as an exact product of two narrow ones.

These are the reference for the routed product, and serve analysis and export.

Shape legend: N in_features, M out_features, P positions, C = 2 (real and imaginary part), r basis vectors, W distinct
|frequencies|, L a length (M or N). The update is scale * Re sum_j c_j a_j b_j^T, see product.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_spectrum(
    coefficients_PC: Tensor, frequencies_PC: Tensor, out_features: int, in_features: int, *, hermitian: bool
) -> Tensor:
    """Return an expert's spectrum F (M, N), complex, in numpy order: F[u, v] += c and, if `hermitian`, F[-u, -v] += conj(c)."""
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


def update_factors(
    coefficients_PC: Tensor, frequencies_PC: Tensor, out_features: int, in_features: int, scale: float
) -> tuple[Tensor, Tensor]:
    """left (M, r) and right (r, N), float64, with left @ right = scale * Re sum_j c_j a_j b_j^T: one expert's update.

    Every a_j is a sum of cos(2 pi |u_j| p/M) and sin(2 pi |u_j| p/M), so one such pair for each |u| drawn spans the columns of
    the update, and r <= 2P; likewise the rows. The side with fewer basis vectors is taken, and its vectors do not depend on the
    coefficients.
    """
    c_P = scale * torch.view_as_complex(coefficients_PC.double().contiguous())
    u_P, v_P = frequencies_PC.long().unbind(-1)
    if _num_waves(u_P, out_features) <= _num_waves(v_P, in_features):
        basis_rM, mixture_rN = _waves_and_mixture(c_P, u_P, out_features, v_P, in_features)
        return basis_rM.T, mixture_rN
    basis_rN, mixture_rM = _waves_and_mixture(c_P, v_P, in_features, u_P, out_features)
    return mixture_rM.T, basis_rN


def _num_waves(frequency_P: Tensor, length: int) -> int:
    """Return a cosine for every |frequency|, and a sine where it is not zero everywhere."""
    sizes = frequency_P.abs().unique()
    return len(sizes) + int((2 * sizes % length != 0).sum())


def _waves_and_mixture(
    c_P: Tensor, frequency_P: Tensor, length: int, other_P: Tensor, other_length: int
) -> tuple[Tensor, Tensor]:
    """Basis (r, length) and mixture (r, other_length), basis^T @ mixture = Re sum_j c_j a_j b_j^T.

    With s the sign of a's frequency a = cos + i s sin, so Re(c a b) = cos Re(c b) - s sin Im(c b).
    """
    sizes_W, wave_P = frequency_P.abs().unique(return_inverse=True)
    cb_PL = c_P.unsqueeze(-1) * _exponentials(other_P, other_length)
    cosine_WL = cb_PL.real.new_zeros(len(sizes_W), other_length).index_add(0, wave_P, cb_PL.real)
    sine_WL = torch.zeros_like(cosine_WL).index_add(0, wave_P, -frequency_P.sign().unsqueeze(-1) * cb_PL.imag)
    waves_WL = _exponentials(sizes_W, length)
    has_sine_W = 2 * sizes_W % length != 0
    return torch.cat([waves_WL.real, waves_WL.imag[has_sine_W]]), torch.cat([cosine_WL, sine_WL[has_sine_W]])


def _exponentials(frequency_P: Tensor, length: int) -> Tensor:
    """exp(2 pi i frequency p / length) for p = 0..length-1, (P, length), complex128; the phase is reduced as an integer."""
    phase_PL = torch.outer(frequency_P, torch.arange(length, device=frequency_P.device)) % length
    angle_PL = phase_PL.double() * (2 * torch.pi / length)
    return torch.polar(torch.ones_like(angle_PL), angle_PL)
