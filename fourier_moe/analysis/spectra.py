"""What the experts of a projection learned, read off their spectra: energy, radius, occupancy, overlap and rank.

Shape legend: E experts, P positions of the largest one, M out_features, N in_features, R bins of the radius. Everything is
computed in float64 on positions and coefficients; no M x N matrix is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fourier_moe.models.projection import whole
from fourier_moe.spectral.experts import SpectralExperts
from fourier_moe.spectral.frequencies import band_weight, normalized_radius


@dataclass(frozen=True)
class ExpertSpectra:
    """The updates of a projection's experts as sums of plane waves, one for each conjugate pair of frequencies:

        alpha dW_e[p, q] = scale * Re sum_j c_ej exp(2 pi i (u_ej p/M + v_ej q/N))

    Whatever ablation is trained is brought to this form: a coefficient without conjugate symmetry, of whose inverse transform
    the real part is taken, is a pair of half its size, and coefficients on both members of a pair are added up. Of the permuted
    control it is the update before rows and columns are put in another order, which changes neither energies nor ranks.

    Attributes:
        frequencies: int64 (E, P, 2), (u, v) of one member of each pair: 0 <= u <= M/2, and v > 0 where u is 0 or M/2.
        coefficients: complex128 (E, P), c; 0 beyond an expert's own positions. Where experts of different sizes have an alpha
            each, times its ratio to the one in `scale`.
        out_features: M.
        in_features: N.
        scale: 2 alpha/(MN), which makes c the value of the spectrum at (u, v).
        num_positions: of each expert (E,); empty if all have P.
    """

    frequencies: Tensor
    coefficients: Tensor
    out_features: int
    in_features: int
    scale: float
    num_positions: tuple[int, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, experts: SpectralExperts) -> ExpertSpectra:
        """Return the spectra as they are now, on the CPU, the shared expert's as the last one.

        If they are sharded, all processes must call it together.
        """
        coefficients_SPC = whole(experts.coefficients).detach()
        if experts.part != "complex":
            coefficients_SPC = nn.functional.pad(coefficients_SPC, (0, 1) if experts.part == "real" else (1, 0))
        coefficients_SPC = coefficients_SPC.cpu().double()
        ratios = [experts.scaling_of(expert) / experts.scaling for expert in range(len(experts.segments))]
        each = [experts.of_expert(expert, coefficients_SPC * ratio) for expert, ratio in enumerate(ratios)]
        coefficients_EPC, frequencies_EPC = (pad_sequence([*part], batch_first=True) for part in zip(*each, strict=True))
        c_EP = torch.view_as_complex(coefficients_EPC)
        M, N = experts.out_features, experts.in_features
        u_EP, v_EP = frequencies_EPC.cpu().long().unbind(-1)
        mirrored_EP = torch.where((2 * u_EP) % M == 0, v_EP < 0, u_EP < 0)
        u_EP = u_EP.abs()
        v_EP = torch.where(mirrored_EP & (2 * v_EP != N), -v_EP, v_EP)  # N/2 and -N/2 are the same
        c_EP = torch.where(mirrored_EP, c_EP.conj(), c_EP)
        if not experts.hermitian:
            place_EP = u_EP * N + v_EP % N
            first_EP = (place_EP.unsqueeze(2) == place_EP.unsqueeze(1)).int().argmax(-1)
            c_EP = torch.zeros_like(c_EP).scatter_add_(1, first_EP, c_EP / 2)
        num_positions = tuple(len(coefficients) for coefficients, _ in each)
        return cls(torch.stack([u_EP, v_EP], -1), c_EP, M, N, 2 * experts.scaling / (M * N), num_positions)

    @cached_property
    def owned(self) -> Tensor:
        """Return which of the positions are an expert's own, bool (E, P)."""
        E, P = self.coefficients.shape
        return torch.arange(P) < torch.tensor(self.num_positions or [P] * E).unsqueeze(1)

    @cached_property
    def radius(self) -> Tensor:
        """rho of every position (E, P); see `normalized_radius`."""
        return normalized_radius(self.frequencies, self.out_features, self.in_features)

    @cached_property
    def pair_energy(self) -> Tensor:
        """Energy of every conjugate pair (E, P), both members counted."""
        return self._wave_energy * self.coefficients.abs().square()

    @property
    def energy(self) -> Tensor:
        """||alpha dW_e||_F^2 (E,), by Parseval's theorem."""
        return self.pair_energy.sum(-1)

    @property
    def center(self) -> Tensor:
        """Mean radius (E,), weighted by energy."""
        return (self._share * self.radius).sum(-1)

    @property
    def radius_std(self) -> Tensor:
        """Standard deviation of the radius (E,), weighted by energy."""
        return (self._share * (self.radius - self.center.unsqueeze(-1)).square()).sum(-1).sqrt()

    def in_band(self, centers: Sequence[float], bandwidth: float | Sequence[float]) -> Tensor:
        """Return the share of the energy inside the expert's band (E,); `band_edges` says where a band begins and ends.

        Args:
            centers: of the bands; the band of an expert without any is the whole plane.
            bandwidth: B, one for all or one for each center.
        """
        bandwidths = bandwidth if isinstance(bandwidth, Sequence) else [bandwidth] * len(centers)
        weight_EP = torch.ones_like(self.radius)
        for expert, (center, width) in enumerate(zip(centers, bandwidths, strict=True)):
            weight_EP[expert] = band_weight(self.radius[expert], center, width)
        return (self._share * (weight_EP >= math.exp(-1))).sum(-1)

    @property
    def effective_coefficients(self) -> Tensor:
        """Effective number of complex coefficients in use (E,), from the shares in energy: 1 to P, and 0 without energy."""
        return effective_number(self.pair_energy)

    @property
    def effective_rank(self) -> Tensor:
        """Effective number of singular values of dW_e (E,) (Roy and Vetterli, 2007): 1 to 2P, and 0 without energy."""
        return torch.stack([effective_number(values) for values in self._singular_values])

    @property
    def rank(self) -> Tensor:
        """Rank of dW_e (E,), int64: singular values above float64's rounding, 0 to 2P."""
        rounding = max(self.out_features, self.in_features) * torch.finfo(torch.float64).eps
        return torch.stack([(values > rounding * values.max()).sum() for values in self._singular_values])

    @cached_property
    def _singular_values(self) -> list[Tensor]:
        return [self.singular_values(expert) for expert in range(len(self.coefficients))]

    def radial_occupancy(self, num_bins: int) -> Tensor:
        """Return the energy by radius (E, R): histogram over bins of equal width from rho = 0 to 1."""
        bin_EP = (self.radius * num_bins).long().clamp(max=num_bins - 1)
        return self.pair_energy.new_zeros(len(self.coefficients), num_bins).scatter_add_(1, bin_EP, self.pair_energy)

    def update_overlap(self) -> Tensor:
        """Return the cosine between the experts' updates, <dW_e, dW_f> / (||dW_e|| ||dW_f||) (E, E); 0 where one has no energy.

        By Parseval's theorem only positions that two experts have in common count.
        """
        u_EP, v_EP = self.frequencies.unbind(-1)
        places, index_EP = torch.unique(u_EP * self.in_features + v_EP % self.in_features, return_inverse=True)
        spectra = self.coefficients.new_zeros(len(self.coefficients), len(places)).scatter_add_(1, index_EP, self.coefficients)
        products_EE = self._wave_energy * (spectra @ spectra.mH).real
        norm_E = products_EE.diagonal().sqrt()
        return _ratio(products_EE, norm_E.unsqueeze(1) * norm_E)

    def singular_values(self, expert: int) -> Tensor:
        """Return all singular values of alpha dW_e that are not 0 by construction, in any order, exact.

        In the orthonormal real Fourier bases of both axes dW_e is a sparse matrix with one 2 x 2 block (cosine and sine of |u|
        by cosine and sine of |v|) for each pair. Pairs that have neither |u| nor |v| in common, not even by way of others, do
        not meet: its connected parts are decomposed one by one, parts of equal size together.
        """
        own_P = self.owned[expert]
        u_P, v_P = self.frequencies[expert, own_P].unbind(-1)
        blocks_P22 = self._blocks(expert)[own_P]
        part_P = _connected_parts(u_P, v_P.abs())
        order = torch.argsort(part_P)
        sizes = torch.unique_consecutive(part_P[order], return_counts=True)[1]
        size_P = sizes.repeat_interleave(sizes)
        values = []
        for size in sizes.unique().tolist():
            pairs = order[size_P == size].view(-1, size)  # (parts, pairs of a part)
            row, column = _local_index(u_P[pairs]), _local_index(v_P.abs()[pairs])
            part = torch.arange(len(pairs)).unsqueeze(1).expand_as(pairs)
            matrix = blocks_P22.new_zeros(len(pairs), int(row.max()) + 1, int(column.max()) + 1, 2, 2)
            matrix.index_put_((part, row, column), blocks_P22[pairs], accumulate=True)
            values.append(torch.linalg.svdvals(matrix.transpose(2, 3).flatten(3).flatten(1, 2)).flatten())
        return torch.cat(values)

    def _blocks(self, expert: int) -> Tensor:
        """(P, 2, 2): Re c exp(i (a + b)) in terms of (cos a, sin a) and (cos b, sin b), a = 2 pi u p/M, b = 2 pi |v| q/N."""
        u_P, v_P = self.frequencies[expert].unbind(-1)
        c_P = self.scale * self.coefficients[expert]
        imaginary_P, sign_P = c_P.imag, torch.where(v_P < 0, -1.0, 1.0)
        blocks = torch.stack([c_P.real, -imaginary_P * sign_P, -imaginary_P, -c_P.real * sign_P], -1).view(-1, 2, 2)
        return blocks * _wave_norms(u_P, self.out_features).unsqueeze(2) * _wave_norms(v_P, self.in_features).unsqueeze(1)

    @property
    def _wave_energy(self) -> float:
        """||scale Re c exp(...)||_F^2 of one pair with |c| = 1."""
        return self.scale**2 * self.out_features * self.in_features / 2

    @property
    def _share(self) -> Tensor:
        """Share of each pair in its expert's energy (E, P). Without any, all are equal: the expert is where it may learn."""
        total_E1, owned_EP = self.pair_energy.sum(-1, keepdim=True), self.owned.double()
        return torch.where(total_E1 > 0, _ratio(self.pair_energy, total_E1), owned_EP / owned_EP.sum(-1, keepdim=True))


def band_edges(center: float, bandwidth: float) -> tuple[float, float]:
    """Return the radii between which a band's weight is at least 1/e: sqrt(f^2 + B^2/4) -+ B/2, which are B apart.

    A draw in proportion to the weight has erf(1) = 84 % of its positions there, if the plane had equally many at all radii.
    """
    middle = math.hypot(center, bandwidth / 2)
    return middle - bandwidth / 2, middle + bandwidth / 2


def effective_number(weights: Tensor) -> Tensor:
    """exp(entropy) of shares (..., n) -> (...,): n when all are equal, 1 when one has everything, 0 when none has anything."""
    total = weights.sum(-1)
    return torch.where(total > 0, torch.special.entr(_ratio(weights, total.unsqueeze(-1))).sum(-1).exp(), 0)


def radial_overlap(occupancy_ER: Tensor) -> Tensor:
    """Share of two experts' energy that lies at the same radii, sum_r min(p_er, p_fr) (E, E): 1 same, 0 apart or no energy."""
    share_ER = _ratio(occupancy_ER, occupancy_ER.sum(-1, keepdim=True))
    return torch.minimum(share_ER.unsqueeze(1), share_ER.unsqueeze(0)).sum(-1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


def _wave_norms(frequency_P: Tensor, size: int) -> Tensor:
    """Return the norms of cos and sin of 2 pi f p/size over p = 0..size-1: (P, 2). At f = 0 and size/2 there is no sine."""
    edge_P = (2 * frequency_P) % size == 0
    cosine_P = torch.where(edge_P, size, size / 2).double().sqrt()
    return torch.stack([cosine_P, torch.where(edge_P, 0, cosine_P)], -1)


def _connected_parts(row_P: Tensor, column_P: Tensor) -> Tensor:
    """Return a label (P,) for each entry of a sparse matrix, equal for entries that a path along rows and columns connects."""
    rows, columns = (torch.unique(index, return_inverse=True)[1] for index in (row_P, column_P))
    label = torch.arange(len(rows))
    while True:
        before = label
        for index in (rows, columns):
            label = torch.full_like(label, len(label)).scatter_reduce_(0, index, label, "amin")[index]
        if torch.equal(label, before):
            return label


def _local_index(index: Tensor) -> Tensor:
    """Return numbers (parts, n) counted separately in each part: equal ones get the same number, from 0 without gaps."""
    first = (index.unsqueeze(2) == index.unsqueeze(1)).int().argmax(-1)
    is_first = first == torch.arange(index.shape[1])
    return (is_first.long().cumsum(-1) - 1).gather(1, first)
