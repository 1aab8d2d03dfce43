"""Which frequencies the loss asks for: the radial energy spectrum of a projection's dense gradient, and its controls.

The order of neurons is arbitrary: a frequency structure that survives a random permutation of rows and columns belongs to the
values, not to frequencies. And white noise has exponentially distributed energies, so that its strongest positions, too, hold
more than their number: both are what a measured spectrum has to be held against.

Shape legend: T tokens, M out_features, N in_features, R radial bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fourier_moe.errors import UserError
from fourier_moe.spectral.frequencies import count_positions, normalized_radius, signed_frequency


@dataclass(frozen=True)
class RadialSpectrum:
    """How the energy |F[u, v]|^2 of an M x N matrix lies over the radius. Self-conjugate positions, which no expert can own, do
    not count.

    Attributes:
        energy: share of the energy in each radial bin (R,), float64.
        positions: share of the positions in each bin (R,), float64.
        mean_radius: mean of rho, weighted with energy.
        white_radius: mean of rho over all positions, what white noise is expected to have.
        strongest_share: share of the energy in the strongest positions.
        white_share: what white noise is expected to have there.
    """

    energy: Tensor
    positions: Tensor
    mean_radius: float
    white_radius: float
    strongest_share: float
    white_share: float

    @property
    def density(self) -> Tensor:
        """Energy per position over its mean (R,): 1 everywhere is white; NaN in a bin without positions."""
        return self.energy / self.positions

    @property
    def unevenness(self) -> float:
        """Root mean square of density - 1 over the positions: 0 is white."""
        filled = self.positions > 0
        return float((self.positions[filled] * (self.density[filled] - 1).square()).sum().sqrt())

    @staticmethod
    def mean(spectra: Sequence[RadialSpectrum]) -> RadialSpectrum:
        """Return the mean spectrum of several matrices, each with the same weight."""
        names = ("mean_radius", "white_radius", "strongest_share", "white_share")
        return RadialSpectrum(
            torch.stack([spectrum.energy for spectrum in spectra]).mean(0),
            torch.stack([spectrum.positions for spectrum in spectra]).mean(0),
            *(sum(getattr(spectrum, name) for spectrum in spectra) / len(spectra) for name in names),
        )


@dataclass(frozen=True)
class Sensitivity:
    """A spectrum and its controls: the same matrix with rows and columns permuted, once per seed."""

    spectrum: RadialSpectrum
    controls: tuple[RadialSpectrum, ...]

    def control(self, measure: str) -> tuple[float, float]:
        """Mean and standard deviation of a measure (`mean_radius`, `strongest_share`, `unevenness`) over the permutations."""
        values = torch.tensor([getattr(control, measure) for control in self.controls], dtype=torch.float64)
        return float(values.mean()), float(values.std())

    def deviation(self, measure: str) -> float:
        """Return how far the measure is from that of the permuted matrices, in their standard deviations."""
        mean, std = self.control(measure)
        difference = getattr(self.spectrum, measure) - mean
        return difference / std if std > 0 else math.copysign(math.inf, difference) if difference else 0.0

    @staticmethod
    def mean(sensitivities: Sequence[Sensitivity]) -> Sensitivity:
        """Return the mean over several matrices; the k-th control is the mean of the k-th controls."""
        controls = zip(*(one.controls for one in sensitivities), strict=True)
        return Sensitivity(
            RadialSpectrum.mean([one.spectrum for one in sensitivities]), tuple(map(RadialSpectrum.mean, controls))
        )


def dense_gradients(
    projections: Mapping[str, nn.Module],
    loss: Callable[[Any], Tensor],
    batches: Iterable[tuple[Any, float]],
) -> dict[str, Tensor]:
    """Return the exact gradient of sum_k weight_k loss(batch_k) with respect to each projection's dense update.

    It is summed from what goes in and what comes back, dW = sum over tokens of dy x^T, so that frozen, quantized and sharded
    weights do. No parameter's `.grad` is touched. Tokens that the loss does not depend on (padding) add exactly 0.

    Args:
        projections: adapters by name: modules from (..., N) to (..., M), whose output requires a gradient.
        loss: mean loss of a batch.
        batches: batches and their weights.

    Returns:
        (M, N) by name, float32 or the activations' float64, on their device.

    Raises:
        UserError: if the loss depends on no output of some projection.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda module, inputs, output: calls.append((name, inputs[0].detach(), output))

    for batch, weight in batches:
        handles = [module.register_forward_hook(hook(name)) for name, module in projections.items()]
        try:
            value = loss(batch)
        finally:  # before the backward pass: under activation checkpointing it runs the forward again
            for handle in handles:
                handle.remove()
        seen, calls = [call for call in calls if call[2].requires_grad], []
        gradients = torch.autograd.grad(value, [output for *_, output in seen], allow_unused=True)
        for (name, x, _), dy in zip(seen, gradients, strict=True):
            if dy is not None:
                dtype = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
                x_TN, dy_TM = x.flatten(0, -2).to(dtype), dy.flatten(0, -2).to(dtype)
                update_MN = weight * (dy_TM.T @ x_TN)
                sums[name] = sums[name].add_(update_MN) if name in sums else update_MN
        del seen, gradients, value
    silent = [name for name in projections if name not in sums or not sums[name].any()]
    if silent:
        raise UserError(f"targets {', '.join(silent[:3])} get no gradient from the loss; leave them out of targets")
    return {name: sums[name] for name in projections}


def measure(matrix: Tensor, *, strongest: int, permutations: int = 20, num_bins: int = 32, seed: int = 0) -> Sensitivity:
    """Return the spectrum of a matrix (M, N) and of `permutations` random reorderings of its rows and columns.

    Args:
        strongest: number of positions (u, v) of the whole plane whose share of the energy is taken, n for n coefficients.
    """
    generator = torch.Generator().manual_seed(seed)
    controls = []
    for _ in range(permutations):
        rows, columns = (torch.randperm(size, generator=generator).to(matrix.device) for size in matrix.shape)
        controls.append(radial_spectrum(matrix[rows][:, columns], strongest=strongest, num_bins=num_bins))
    return Sensitivity(radial_spectrum(matrix, strongest=strongest, num_bins=num_bins), tuple(controls))


def radial_spectrum(matrix: Tensor, *, strongest: int, num_bins: int = 32) -> RadialSpectrum:
    """Return the spectrum of a real matrix (M, N), over `num_bins` equally wide rings of the normalized radius rho."""
    out_features, in_features = matrix.shape
    radius, counts = _half_plane(out_features, in_features, matrix.device)
    energy = torch.fft.rfft2(matrix).abs().square().double()
    energy /= (energy * counts).sum()
    weighted = (energy * counts).flatten()
    bins = (radius * num_bins).long().clamp_(max=num_bins - 1).flatten()
    total = count_positions(out_features, in_features, half_plane=False)
    strongest = min(strongest, total)
    return RadialSpectrum(
        energy=torch.bincount(bins, weighted, num_bins).cpu(),
        positions=torch.bincount(bins, counts.flatten(), num_bins).cpu() / total,
        mean_radius=float((weighted * radius.flatten()).sum()),
        white_radius=float((counts * radius).sum() / total),
        strongest_share=_strongest_share(energy[counts > 0], counts[counts > 0], strongest),
        white_share=white_share(strongest / total),
    )


@lru_cache(maxsize=2)
def _half_plane(out_features: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """rho of every entry of rfft2's half spectrum, and how many positions it stands for: 2, 1, or 0 if self-conjugate."""
    u = signed_frequency(torch.arange(out_features, device=device), out_features)[:, None]
    v = torch.arange(in_features // 2 + 1, device=device)[None]
    frequencies = torch.stack(torch.broadcast_tensors(u, v), -1)
    own_column = (2 * v) % in_features == 0  # holds both members of its pairs
    counts = torch.where(own_column, 1.0, 2.0).double().repeat(out_features, 1)
    counts[((2 * u) % out_features == 0) & own_column] = 0
    return normalized_radius(frequencies, out_features, in_features), counts


def _strongest_share(energy: Tensor, counts: Tensor, strongest: int) -> float:
    """Sum of the `strongest` largest energies, each of which comes `counts` times."""
    values, order = torch.topk(energy, min(strongest, energy.numel()))
    counts = counts[order]
    taken = torch.minimum(counts, (strongest - (counts.cumsum(0) - counts)).clamp(min=0))
    return float((values * taken).sum())


def white_share(fraction: float) -> float:
    """Return the share of the energy that white noise has in the strongest `fraction` of its positions: p (1 + ln(1/p)).

    Its energies are exponentially distributed; the strongest p of them are those above ln(1/p) times their mean.
    """
    return fraction * (1 + math.log(1 / fraction)) if fraction > 0 else 0.0
