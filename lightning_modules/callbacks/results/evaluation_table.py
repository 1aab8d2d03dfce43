"""The results of evaluated sets as numbers and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.tables import markdown_table

Results = Mapping[str, Mapping[str, Any]]  # by set: count, metrics, note


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return accuracy by the benchmark's rule and by its stricter one, and the mean loss if it is known."""
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return {
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "strict_accuracy": sum(row["strict_correct"] for row in rows) / len(rows),
        **({"loss": statistics.fmean(losses)} if losses else {}),
    }


def metric_names(results: Results) -> list[str]:
    """Return the metrics of all sets, the loss last."""
    names = dict.fromkeys(key for result in results.values() for key in result if key not in ("count", "note"))
    return sorted(names, key=lambda name: name == "loss")


def average(results: Results) -> dict[str, float]:
    """Average every metric over the sets that have it, with equal weights, as papers average benchmarks."""
    return {
        name: statistics.fmean(result[name] for result in results.values() if name in result) for name in metric_names(results)
    }


def format_results(results: Results, plain: Sequence[str] = ()) -> str:
    """Return a Markdown table with a row per set, and an average below several sets.

    Args:
        results: by set.
        plain: metrics that are not shown in percent, beside the loss and correlations.
    """
    plain = ("loss", "matthews", *plain)
    names = metric_names(results)
    rows = [[name, f"{r['count']:,}", *_cells(r, names, plain), r["note"]] for name, r in results.items()]
    if len(results) > 1:
        total = sum(result["count"] for result in results.values())
        rows.append(["average", f"{total:,}", *_cells(average(results), names, plain), ""])
    header = ["set", "count", *(name.replace("_", " ") for name in names), "note"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return markdown_table(header, rows)


def _cells(values: Mapping[str, Any], names: Sequence[str], plain: Sequence[str]) -> list[str]:
    return ["" if name not in values else f"{values[name]:.4f}" if name in plain else f"{values[name]:.1%}" for name in names]
