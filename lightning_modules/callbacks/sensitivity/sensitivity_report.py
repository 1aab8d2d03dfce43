"""Spectral sensitivity on paper: table, curves and verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fourier_moe import FourierMoEConfig
from fourier_moe.analysis.sensitivity import Sensitivity
from lightning_modules.tables import markdown_table, write_table

GRADIENT, FROZEN, UPDATE = "gradient", "frozen weight", "full fine-tuning"
MEAN = "mean over layers"
MEASURES = ("mean_radius", "unevenness", "strongest_share")
SIGNIFICANT = 3.0  # standard deviations of the permuted matrices


def gradient_of(task: str) -> str:
    """Return the name of the source that is one task's gradient."""
    return f"{GRADIENT} of {task}"


class SensitivityReport:
    """The measured sensitivities as a table, curves and a verdict.

    Args:
        results: sensitivities by (source, name of the projection).
        config: config of the adapter.
    """

    def __init__(self, results: Mapping[tuple[str, str], Sensitivity], config: FourierMoEConfig) -> None:
        self.results, self.config = results, config
        by_source: dict[str, list[Sensitivity]] = {}
        for (source, _), sensitivity in results.items():
            by_source.setdefault(source, []).append(sensitivity)
        self.means = {source: Sensitivity.mean(members) for source, members in by_source.items()}

    @property
    def structured(self) -> bool:
        """Whether the gradient's radial curve, averaged over the layers, differs from that of its permutations."""
        return _deviates(self.means[GRADIENT])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per source and projection, and the mean after the projections of a source."""
        rows = []
        for source, mean in self.means.items():
            members = [(name, one) for (other, name), one in self.results.items() if other == source]
            for name, one in [*members, (MEAN, mean)]:
                row: dict[str, Any] = {"source": source, "layer": name}
                for measure in MEASURES:
                    control, std = one.control(measure)
                    values = {"": getattr(one.spectrum, measure), "/permuted": control, "/permuted_std": std}
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
            share, permuted, std, white = (
                f"{100 * row[f'strongest_share{suffix}']:.1f}" for suffix in ("", "/permuted", "/permuted_std", "/white")
            )
            cells = [*radius, f"{row['mean_radius/white']:.3f}", *unevenness, share, f"{permuted} ± {std}", white]
            rows.append([row["source"], row["layer"], *cells])
        return f"{markdown_table(header, rows)}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """Return whether the gradient has a frequency structure that its permutations do not have, as text."""
        gradient = self.means[GRADIENT]
        distances = (
            f"{name} {getattr(gradient.spectrum, measure):.4f}, permuted {gradient.control(measure)[0]:.4f} "
            f"({gradient.deviation(measure):+.1f} standard deviations)"
            for name, measure in (("mean radius", "mean_radius"), ("unevenness", "unevenness"))
        )
        members = [one for (source, _), one in self.results.items() if source == GRADIENT]
        alone = (
            f"On their own {sum(map(_deviates, members))} of {len(members)} layers are further than {SIGNIFICANT:g} of them."
        )
        if self.structured:
            conclusion = (
                f"The gradient has a frequency structure, which permuted rows and columns lose: {'; '.join(distances)}."
            )
        else:
            conclusion = f"The spectrum is white, like that of permuted rows and columns: {'; '.join(distances)}."
        return f"{conclusion} {alone}"

    def write(self, directory: Path) -> None:
        """Write layers.csv (the table), spectra.csv (the curves), report.txt and spectra.png."""
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
        (directory / "report.txt").write_text(f"{self}\n", encoding="utf-8")
        self._plot(directory / "spectra.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since importing it is slow
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        layers, sources = figure.subplots(1, 2, sharey=True)
        for (source, _), sensitivity in self.results.items():
            if source == GRADIENT:
                radius, density, *_ = zip(*_curve(sensitivity), strict=True)
                layers.plot(radius, density, color="tab:blue", alpha=0.4, linewidth=0.8)
        layers.set_title(f"{GRADIENT}, every layer")
        for source, mean in self.means.items():
            radius, density, control, std = zip(*_curve(mean), strict=True)
            (line,) = sources.plot(radius, density, label=source)
            low, high = ([c + sign * SIGNIFICANT * s for c, s in zip(control, std, strict=True)] for sign in (-1, 1))
            sources.fill_between(radius, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        sources.set_title(f"{MEAN} (shaded: permuted ± {SIGNIFICANT:g} std)")
        sources.legend(fontsize=8)
        layers.set_ylabel("energy per position / mean")
        for plot in (layers, sources):
            plot.axhline(1.0, color="black", linewidth=0.5)
            plot.set_xlabel("normalized radius")
            plot.set_yscale("log")
        figure.savefig(path, dpi=100)


def _deviates(sensitivity: Sensitivity) -> bool:
    return any(abs(sensitivity.deviation(measure)) > SIGNIFICANT for measure in ("mean_radius", "unevenness"))


def _curve(sensitivity: Sensitivity) -> list[tuple[float, float, float, float]]:
    """Return radius, density, and mean and std of the density over the permutations, for each bin with positions."""
    spectrum = sensitivity.spectrum
    controls = torch.stack([control.density for control in sensitivity.controls])
    radius = (torch.arange(len(spectrum.energy)) + 0.5) / len(spectrum.energy)
    columns = (radius, spectrum.density, controls.mean(0), controls.std(0))
    return [values for values in zip(*(c.tolist() for c in columns), strict=True) if values[1] == values[1]]
