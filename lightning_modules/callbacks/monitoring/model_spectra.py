"""ModelSpectra: the spectra of all adapted projections of a model at one time, and their files.

Shape legend: L layers (adapted projections), E experts with the shared one as the last, P positions of the largest expert, R
bins of the radius.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fourier_moe import FourierMoEConfig, SpectralExperts
from fourier_moe.analysis.spectra import ExpertSpectra, band_edges, radial_overlap
from fourier_moe.spectral.frequencies import band_centers
from lightning_modules.tables import write_table

NUM_BINS = 50  # bins of the radius: six in a band of the paper's width


@dataclass(frozen=True)
class ModelSpectra:
    """All measures are on the CPU, in float64.

    Attributes:
        layers: spectra by the name of the projection.
        names: the experts' names (E,), as in `SpectralExperts.names`.
        config: what the model was adapted with; its bands are the experts'.
    """

    layers: Mapping[str, ExpertSpectra]
    names: list[str]
    config: FourierMoEConfig

    @classmethod
    def of(cls, experts: Mapping[str, SpectralExperts], config: FourierMoEConfig) -> ModelSpectra:
        """Measure the current spectra. All processes must call it together."""
        names = next(iter(experts.values())).names
        return cls({name: ExpertSpectra.of(layer) for name, layer in experts.items()}, names, config)

    @property
    def short_names(self) -> list[str]:
        """Return the experts' numbers, and `shared`."""
        return [name.removeprefix("expert_") for name in self.names]

    @property
    def centers(self) -> list[float]:
        """f_e of every expert that has a band, even without frequency bias; a shared one has none."""
        return band_centers(self.config.num_experts, self.config.bandwidth, self.config.band_layout)

    @property
    def bands(self) -> list[tuple[float, float]]:
        """Inner and outer radius of each expert's band; none without frequency bias."""
        if not self.config.frequency_bias:
            return []
        return [band_edges(center, width) for center, width in zip(self.centers, self.config.bandwidths, strict=True)]

    @cached_property
    def measures(self) -> dict[str, Tensor]:
        """Cheap measures (L, E); `in_band` without the shared expert, which has no band."""
        layers, E = self.layers.values(), self.config.num_experts
        return {
            "energy": torch.stack([layer.energy for layer in layers]),
            "center": torch.stack([layer.center for layer in layers]),
            "radius_std": torch.stack([layer.radius_std for layer in layers]),
            "in_band": torch.stack([layer.in_band(self.centers, self.config.bandwidths)[:E] for layer in layers]),
            "effective_coefficients": torch.stack([layer.effective_coefficients for layer in layers]),
        }

    @cached_property
    def effective_rank(self) -> Tensor:
        """Effective ranks (L, E); takes a second for some dozens of layers."""
        return torch.stack([layer.effective_rank for layer in self.layers.values()])

    @cached_property
    def rank(self) -> Tensor:
        """Ranks (L, E), float64; as cheap as `effective_rank` once that is known."""
        return torch.stack([layer.rank for layer in self.layers.values()]).double()

    @cached_property
    def occupancy(self) -> Tensor:
        """Energy by radius (E, R), mean over the layers."""
        return torch.stack([layer.radial_occupancy(NUM_BINS) for layer in self.layers.values()]).mean(0)

    @cached_property
    def positions(self) -> Tensor:
        """Share of all positions by radius (E, R): the `occupancy` if all coefficients were equal."""
        layers = self.layers.values()
        equal = (replace(layer, coefficients=layer.owned.to(layer.coefficients.dtype), scale=1.0) for layer in layers)
        counts = [layer.radial_occupancy(NUM_BINS) / layer.energy.sum() for layer in equal]
        return torch.stack(counts).mean(0)

    @cached_property
    def radial_overlap(self) -> Tensor:
        """Share of energy at the same radii (E, E), of all layers together."""
        return radial_overlap(self.occupancy)

    @cached_property
    def update_overlap(self) -> Tensor:
        """Cosine between updates (E, E), mean over the layers."""
        return torch.stack([layer.update_overlap() for layer in self.layers.values()]).mean(0)

    @property
    def magnitudes(self) -> list[Tensor]:
        """|c| of every expert's coefficients in all layers."""
        layers = self.layers.values()
        return [torch.cat([layer.coefficients[e, layer.owned[e]].abs() for layer in layers]) for e in range(len(self.names))]

    def write(self, directory: Path) -> None:
        """Write spectral_occupancy.csv (a row per layer and expert), radial_occupancy.csv and spectral_overlap.csv."""
        measures = {**self.measures, "effective_rank": self.effective_rank}
        names = self.short_names
        centers = [*self.centers, *[""] * len(names)]
        layers = {"all": [m.mean(0).tolist() for m in measures.values()]}
        layers |= {name: [m[index].tolist() for m in measures.values()] for index, name in enumerate(self.layers)}
        write_table(
            directory / "spectral_occupancy.csv",
            ["layer", "expert", "band_center", *measures],
            (
                [layer, name, centers[e], *(m[e] if e < len(m) else "" for m in values)]
                for layer, values in layers.items()
                for e, name in enumerate(names)
            ),
            digits=6,
        )
        shares = torch.cat([self.occupancy, self.positions]).T.tolist()
        write_table(
            directory / "radial_occupancy.csv",
            ["radius", *(f"{kind}/{name}" for kind in ("energy", "positions") for name in self.names)],
            ([(r + 0.5) / NUM_BINS, *row] for r, row in enumerate(shares)),
            digits=6,
        )
        overlaps = torch.stack([self.radial_overlap, self.update_overlap], -1).tolist()
        write_table(
            directory / "spectral_overlap.csv",
            ["expert", "other", "radial_overlap", "update_overlap"],
            ([names[e], names[f], *values] for e, row in enumerate(overlaps) for f, values in enumerate(row)),
            digits=6,
        )
