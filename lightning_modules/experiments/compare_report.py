"""What a comparison found, as a Markdown table and as a CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.experiments.grid import Result, mean_and_spread
from lightning_modules.tables import markdown_table, write_table

_MIB = 2**20


def method_labels(results: Sequence[Result]) -> dict[str, str]:
    """What each cell of the grid is called: its method, and its name too where a method comes twice."""
    methods = {result.overlay: result.method for result in results}
    names = list(methods.values())
    return {name: method if names.count(method) == 1 else f"{method} ({name})" for name, method in methods.items()}


def format_table(results: Sequence[Result], metric: str) -> str:
    """Markdown table, a row per method: mean and spread of a test metric, parameters by kind, cost of training.

    `best on validation` is the same of the best checkpoints, empty (-) unless every run kept one. Seconds are means, memory is
    the largest peak.
    """
    known = max((result.parameters for result in results), key=len)  # not every method has adapters without experts
    kinds = [kind for kind in known if any(result.parameters.get(kind) for result in results)]
    seeds = len({result.seed for result in results})
    header = ["method", f"{metric} (mean of {seeds})", "best on validation", "each seed", "trained", *kinds, "seconds", "MiB"]
    rows = []
    for name, label in method_labels(results).items():
        own = [result for result in results if result.overlay == name]
        values = [100 * result.metrics[metric] for result in own]
        best = [100 * result.best_metrics[metric] for result in own if result.best_metrics]
        peaks = [result.peak_memory for result in own if result.peak_memory is not None]
        counts = own[0].parameters
        rows.append(
            [
                label,
                mean_and_spread(values),
                mean_and_spread(best) if len(best) == len(own) else "-",
                " / ".join(f"{value:.1f}" for value in values),
                f"{sum(counts.values()):,}",
                *(f"{counts.get(kind, 0):,}" for kind in kinds),
                f"{statistics.mean(result.seconds for result in own):.1f}",
                f"{max(peaks) / _MIB:,.0f}" if peaks else "-",
            ]
        )
    return markdown_table(header, rows)


def write_csv(path: Path, results: Sequence[Result], metric: str) -> None:
    """One line per run. Metrics are shares, as they are logged, not percent; memory is in bytes."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.parameters))
    header = ["method", "name", "size", "seed", "metric", "last", "best", *kinds, "seconds", "peak_memory"]
    header += ["data_order", "config_hash", "commit", *results[0].versions]
    lines = []
    for result in results:
        best = result.best_metrics[metric] if result.best_metrics else ""
        line = [result.method, result.overlay, result.size or "", result.seed, metric, result.metrics[metric], best]
        line += [result.parameters.get(kind, 0) for kind in kinds]
        line += [f"{result.seconds:.1f}", result.peak_memory if result.peak_memory is not None else ""]
        line += [result.data_order, result.config_hash, result.commit or ""]
        lines.append([*line, *(result.versions.get(name, "") for name in results[0].versions)])
    write_table(path, header, lines)


def unfair_runs(results: Sequence[Result]) -> list[str]:
    """What the runs themselves say against their comparison: another order of the data, another commit, other versions."""
    notes = []
    for seed in sorted({result.seed for result in results}):
        orders = {result.data_order for result in results if result.seed == seed}
        if len(orders) > 1:
            notes.append(f"seed {seed}: the training examples came in {len(orders)} different orders")
    commits = sorted({result.commit or "none" for result in results})
    if len(commits) > 1:
        notes.append(f"the runs are of {len(commits)} commits: {', '.join(commits)}")
    for name in dict.fromkeys(name for result in results for name in result.versions):
        found = sorted({result.versions.get(name, "none") for result in results})
        if len(found) > 1:
            notes.append(f"the runs are of {len(found)} versions of {name}: {', '.join(found)}")
    return notes
