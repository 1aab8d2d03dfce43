"""Spectral sensitivity on paper: table, curves, verdict and the band layout that follows from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fourier_moe import FourierMoEConfig
from fourier_moe.analysis.sensitivity import Sensitivity, equal_energy_bands
from fourier_moe.spectral.frequencies import band_capacity, band_centers
from lightning_modules.tables import markdown_table, write_table

GRADIENT, FROZEN, UPDATE = "gradient", "frozen weight", "full fine-tuning"
MEAN = "mean over layers"
MEASURES = ("mean_radius", "unevenness", "strongest_share")
SIGNIFICANT = 3.0  # standard deviations of the permuted matrices
LEAST_STEP = 0.001  # of a suggested bandwidth, which has three decimals


def gradient_of(task: str) -> str:
    """Name of the source that is one task's gradient."""
    return f"{GRADIENT} of {task}"


class SensitivityReport:
    """What was measured, by source and projection, and what follows from it.

    Args:
        results: by (source, name of the projection).
        config: of the adapter: how many experts, and of how many pairs, a layout is suggested for.
        shapes: (M, N) of the projections; the suggested bands have to hold an expert's pairs in each.
    """

    def __init__(
        self, results: Mapping[tuple[str, str], Sensitivity], config: FourierMoEConfig, shapes: Iterable[tuple[int, int]]
    ) -> None:
        self.results, self.config, self.shapes = results, config, sorted(shapes)
        by_source: dict[str, list[Sensitivity]] = {}
        for (source, _), sensitivity in results.items():
            by_source.setdefault(source, []).append(sensitivity)
        self.means = {source: Sensitivity.mean(members) for source, members in by_source.items()}

    @property
    def structured(self) -> bool:
        """Whether the gradient's radial curve, mean over the layers, is another one than that of its permutations."""
        return _deviates(self.means[GRADIENT])

    def suggestion(self) -> dict[str, Any]:
        """Centres of equal energy and one bandwidth for all, the median of the bands' widths.

        The bandwidth is widened until every band holds an expert's pairs. `white_centers` are those of equal energy for a flat
        spectrum: equal numbers of positions.
        """
        spectrum = self.means[GRADIENT].spectrum
        centers, widths = equal_energy_bands(spectrum.energy, self.config.num_experts)
        white_centers, _ = equal_energy_bands(spectrum.positions, self.config.num_experts)
        centers = [round(center, 4) for center in centers]
        bandwidth = max(round(statistics.median(widths), 3), LEAST_STEP)
        half_plane, pairs = self.config.conjugate_symmetry, self.config.pairs_per_expert
        while any(
            band_capacity(*shape, center, bandwidth, half_plane, enough=pairs) < pairs
            for shape in self.shapes
            for center in centers
        ):
            bandwidth = round(max(1.1 * bandwidth, bandwidth + LEAST_STEP), 3)
        return {
            "band_layout": centers,
            "bandwidth": bandwidth,
            "widths": [round(width, 4) for width in widths],
            "white_centers": [round(center, 4) for center in white_centers],
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per source and projection, after those of a source their mean."""
        rows = []
        for source, mean in self.means.items():
            members = [(name, one) for (other, name), one in self.results.items() if other == source]
            for name, one in [*members, (MEAN, mean)]:
                row: dict[str, Any] = {"source": source, "layer": name}
                for measure in MEASURES:
                    control, spread = one.control(measure)
                    values = {"": getattr(one.spectrum, measure), "/permuted": control, "/permuted_std": spread}
                    row |= {f"{measure}{suffix}": value for suffix, value in values.items()}
                row |= {"mean_radius/white": one.spectrum.white_radius, "strongest_share/white": one.spectrum.white_share}
                rows.append(row)
        return rows

    def __str__(self) -> str:
        n = self.config.num_coefficients
        header = ["source", "layer", "mean radius", "permuted", "white", "unevenness", "permuted"]
        header += [f"% in strongest {n:,}", "permuted", "white"]
        rows = []
        for row in self.rows():
            radius, unevenness = (
                (f"{row[m]:.3f}", f"{row[f'{m}/permuted']:.3f} ± {row[f'{m}/permuted_std']:.3f}") for m in MEASURES[:2]
            )
            share, permuted, spread, white = (
                f"{100 * row[f'strongest_share{suffix}']:.1f}" for suffix in ("", "/permuted", "/permuted_std", "/white")
            )
            cells = [*radius, f"{row['mean_radius/white']:.3f}", *unevenness, share, f"{permuted} ± {spread}", white]
            rows.append([row["source"], row["layer"], *cells])
        return f"{markdown_table(header, rows)}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """Whether frequency structure survives the permutation, and the layout of equal energy."""
        gradient, config = self.means[GRADIENT], self.config
        distances = (
            f"{name} {getattr(gradient.spectrum, measure):.4f}, permuted {gradient.control(measure)[0]:.4f} "
            f"({gradient.deviation(measure):+.1f} standard deviations)"
            for name, measure in (("mean radius", "mean_radius"), ("unevenness", "unevenness"))
        )
        suggestion = self.suggestion()
        layout = ", ".join(f"{center:g}" for center in suggestion["band_layout"])
        option = f'--model.adapter.band_layout "[{layout}]" --model.adapter.bandwidth {suggestion["bandwidth"]:g}'
        pairs = zip(suggestion["band_layout"], suggestion["white_centers"], strict=True)
        moved = max(abs(center - white) for center, white in pairs)
        now = ", ".join(f"{c:.3g}" for c in band_centers(config.num_experts, config.bandwidth, config.band_layout))
        members = [one for (source, _), one in self.results.items() if source == GRADIENT]
        alone = (
            f"On their own {sum(map(_deviates, members))} of {len(members)} layers are further than {SIGNIFICANT:g} of them."
        )
        if self.structured:
            conclusion = f"The gradient has a frequency structure that permuted rows and columns lose: {'; '.join(distances)}."
            advice = "Bands of equal energy:"
        else:
            conclusion = f"The spectrum is white, like that of permuted rows and columns: {'; '.join(distances)}."
            advice = "The even layout is as good; bands of equal energy, for the record:"
        return "\n".join(
            [
                f"{conclusion} {alone}",
                f"Centres of equal energy differ from those of a flat spectrum by at most {moved:.3f}; the config's are {now}.",
                f"{advice} {option}",
            ]
        )

    def write(self, directory: Path) -> None:
        """layers.csv (the table), spectra.csv (the curves), suggestion.json, report.txt and spectra.png."""
        directory.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        write_table(directory / "layers.csv", list(rows[0]), [list(row.values()) for row in rows])
        means = {(source, MEAN): mean for source, mean in self.means.items()}
        curves = (
            [source, name, *values]
            for (source, name), sensitivity in {**self.results, **means}.items()
            for values in _curve(sensitivity)
        )
        header = ["source", "layer", "radius", "density", "density/permuted", "density/permuted_std"]
        write_table(directory / "spectra.csv", header, curves, digits=6)
        gradient = self.means[GRADIENT]
        facts = {"structured": self.structured} | {f"{measure}/deviation": gradient.deviation(measure) for measure in MEASURES}
        (directory / "suggestion.json").write_text(json.dumps(facts | self.suggestion(), indent=2) + "\n", encoding="utf-8")
        (directory / "report.txt").write_text(f"{self}\n", encoding="utf-8")
        self._plot(directory / "spectra.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: importing it takes as long as a small run
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        of_layers, of_sources = figure.subplots(1, 2, sharey=True)
        for (source, _), sensitivity in self.results.items():
            if source == GRADIENT:
                radius, density, *_ = zip(*_curve(sensitivity), strict=True)
                of_layers.plot(radius, density, color="tab:blue", alpha=0.4, linewidth=0.8)
        of_layers.set_title(f"{GRADIENT}, every layer")
        for source, mean in self.means.items():
            radius, density, control, spread = zip(*_curve(mean), strict=True)
            (line,) = of_sources.plot(radius, density, label=source)
            low, high = ([c + sign * SIGNIFICANT * s for c, s in zip(control, spread, strict=True)] for sign in (-1, 1))
            of_sources.fill_between(radius, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        of_sources.set_title(f"{MEAN} (shaded: permuted ± {SIGNIFICANT:g} std)")
        of_sources.legend(fontsize=8)
        of_layers.set_ylabel("energy per position / mean")
        for plot in (of_layers, of_sources):
            plot.axhline(1.0, color="black", linewidth=0.5)
            plot.set_xlabel("normalised radius")
            plot.set_yscale("log")
        figure.savefig(path, dpi=100)


def _deviates(sensitivity: Sensitivity) -> bool:
    return any(abs(sensitivity.deviation(measure)) > SIGNIFICANT for measure in ("mean_radius", "unevenness"))


def _curve(sensitivity: Sensitivity) -> list[tuple[float, float, float, float]]:
    """Radius of each bin that has positions, its density, and mean and standard deviation of it over the permutations."""
    spectrum = sensitivity.spectrum
    controls = torch.stack([control.density for control in sensitivity.controls])
    radius = (torch.arange(len(spectrum.energy)) + 0.5) / len(spectrum.energy)
    columns = (radius, spectrum.density, controls.mean(0), controls.std(0))
    return [values for values in zip(*(c.tolist() for c in columns), strict=True) if values[1] == values[1]]
