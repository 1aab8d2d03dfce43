"""What a sweep found, as a Markdown table and as a CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.experiments.grid import Result, mean_and_spread
from lightning_modules.experiments.studies import Setting
from lightning_modules.tables import markdown_table, write_table

LOAD = {"load imbalance": "router/load_imbalance", "dead experts": "router/dead_experts"}


@dataclass(frozen=True)
class Row:
    """One setting and its runs, at least one."""

    setting: Setting
    results: list[Result]

    @property
    def percents(self) -> list[float]:
        """The main test metric of the last weights, a value per seed, in percent."""
        return [100 * result.metrics[result.main_metric] for result in self.results]

    @property
    def best_percents(self) -> list[float]:
        """The same of the checkpoints that were best on validation; empty unless every run kept one."""
        best = [100 * result.best_metrics[result.main_metric] for result in self.results if result.best_metrics]
        return best if len(best) == len(self.results) else []

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(self.results[0].parameters.values())

    def load(self, measure: str) -> float | None:
        """Mean over the seeds of a measure of LOAD at the end of training; None unless every run has it."""
        values = [result.router.get(LOAD[measure]) for result in self.results]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if len(known) == len(values) else None

    def differences(self, other: Row) -> list[float]:
        """This row's percents less the other's, for each seed that both have."""
        others = {result.seed: percent for result, percent in zip(other.results, other.percents, strict=True)}
        pairs = zip(self.results, self.percents, strict=True)
        return [percent - others[result.seed] for result, percent in pairs if result.seed in others]


def format_rows(axis: str, rows: Sequence[Row], own: str | None) -> str:
    """Markdown table, a row per setting.

    Spreads are standard deviations over the seeds. `against own` is the difference to setting `own`, seed by seed; the column
    is left out where that setting has no runs.
    """
    baseline = next((row for row in rows if row.setting.name == own), None)
    series = any(row.setting.series for row in rows)
    fewest, most = (extreme(len(row.results) for row in rows) for extreme in (min, max))
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    header = [
        axis,
        *(["layout"] if series else []),
        f"{rows[0].results[0].main_metric} (mean of {seeds})",
        "best on validation",
    ]
    header += [
        *([f"against {baseline.setting.label}"] if baseline else []),
        "each seed",
        "trained",
        "experts",
        *LOAD,
        "seconds",
    ]
    lines = []
    for row in rows:
        parameters = row.results[0].parameters
        line = [row.setting.label, *([row.setting.series] if series else [])]
        line += [mean_and_spread(row.percents), mean_and_spread(row.best_percents) if row.best_percents else "-"]
        if baseline:
            line.append("-" if row is baseline else _signed(row.differences(baseline)))
        line += [" / ".join(f"{percent:.1f}" for percent in row.percents), f"{row.trained:,}", f"{parameters['experts']:,}"]
        line += [_number(row.load(measure)) for measure in LOAD]
        lines.append([*line, f"{statistics.mean(result.seconds for result in row.results):.1f}"])
    return markdown_table(header, lines)


def write_csv(path: Path, study: str, rows: Sequence[Row]) -> None:
    """One line per run. Metrics are shares, as they are logged, not percent; `best` is empty where no checkpoint was kept."""
    kinds = list(rows[0].results[0].parameters)
    header = ["study", "series", "value", "seed", "metric", "last", "best", *kinds]
    header += [*(measure.replace(" ", "_") for measure in LOAD), "seconds"]
    lines = []
    for row in rows:
        for result in row.results:
            metric = result.main_metric
            best = result.best_metrics[metric] if result.best_metrics else ""
            values = [study, row.setting.series, row.setting.label, result.seed, metric, result.metrics[metric], best]
            values += [result.parameters.get(kind, 0) for kind in kinds]
            values += [result.router.get(name, "") for name in LOAD.values()]
            lines.append([*values, f"{result.seconds:.1f}"])
    write_table(path, header, lines)


def _signed(differences: list[float]) -> str:
    spread = f" ± {statistics.stdev(differences):.1f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.1f}{spread}" if differences else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
