"""What a comparison or a sweep found: a Markdown table, notes, and the files in the output directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from fourier_moe.files.writing import write_file
from lightning_modules.experiments.results import Result
from lightning_modules.tables import markdown_table, write_table

# Columns of the table that are summaries over the seeds of a variant, beside the metric and the parameters.
COLUMNS: dict[str, Callable[[pd.DataFrame], str]] = {
    "load imbalance": lambda runs: _mean(runs["load_imbalance"], ".2f"),
    "dead experts": lambda runs: _mean(runs["dead_experts"], ".2f"),
    "seconds": lambda runs: _mean(runs["seconds"], ".1f"),
    "MiB": lambda runs: "-" if runs["peak_memory"].isna().all() else f"{runs['peak_memory'].max() / 2**20:,.0f}",
}


def method_labels(frame: pd.DataFrame) -> dict[str, str]:
    """Return what each variant is called: its method, and its own name too where several variants have the same method."""
    methods = frame.drop_duplicates("variant").set_index("variant")["method"]
    several = methods.duplicated(keep=False)
    return {name: f"{method} ({name})" if several[name] else method for name, method in methods.items()}


def format_table(
    frame: pd.DataFrame,
    labels: Mapping[str, Mapping[str, str]],
    kinds: Sequence[str],
    columns: Sequence[str],
    reference: str | None = None,
) -> str:
    """Return a Markdown table with a row per variant.

    ± is the standard deviation over the seeds. `best on validation` is `-` unless every run kept a best checkpoint. Seconds and
    loads are means, memory is the largest peak.

    Args:
        frame: see `result_frame`.
        labels: the first columns of the table, by variant, in the order of the rows.
        kinds: kinds of trained parameters that get a column.
        columns: keys of `COLUMNS`.
        reference: variant whose difference to each other one, seed by seed, gets a column; None for no such column.
    """
    seeds = frame.groupby("variant").size()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    groups = dict(list(frame.groupby("variant")))
    factor, digits, unit = scale_of(frame)
    values = {name: factor * runs.set_index("seed")["last"] for name, runs in groups.items()}
    rows = []
    for name, runs in ((name, groups[name]) for name in labels if name in groups):
        cells = [
            *labels[name].items(),
            (f"{frame['metric'].iat[0]} (mean of {count})", mean_and_std(values[name], digits, unit)),
        ]
        cells.append(
            ("best on validation", "-" if runs["best"].isna().any() else mean_and_std(factor * runs["best"], digits, unit))
        )
        if reference is not None and reference in values:
            against = (values[name] - values[reference]).dropna()
            text = "-" if name == reference or against.empty else mean_and_std(against, digits, sign="+")
            cells.append((f"against {next(iter(labels[reference].values()))}", text))
        cells.append(("each seed", " / ".join(f"{value:{digits}}" for value in values[name])))
        cells += [(kind, f"{runs[kind].iat[0]:,}") for kind in ("trained", *kinds)]
        rows.append([*cells, *((column, COLUMNS[column](runs)) for column in columns)])
    return markdown_table([title for title, _ in rows[0]], [[text for _, text in row] for row in rows])


def scale_of(frame: pd.DataFrame) -> tuple[int, str, str]:
    """Return how a metric is shown: a factor, the format of a number, and the unit. Shares are shown in percent."""
    return (100, ".1f", " %") if frame.attrs["is_share"] else (1, ".4g", "")


def mean_and_std(values: pd.Series, digits: str, unit: str = "", sign: str = "") -> str:
    """Return the mean and, of several values, the sample standard deviation."""
    std = f" ± {values.std():{digits}}" if len(values) > 1 else ""
    return f"{values.mean():{sign}{digits}}{unit}{std}"


def _mean(values: pd.Series, form: str) -> str:
    return "-" if values.isna().any() else f"{values.mean():{form}}"


def partial_runs(frame: pd.DataFrame) -> list[str]:
    """Return a note for every limit that left out a part of the test examples."""
    return [f"tested on a part of the test examples ({limit})" for limit in frame["partial"].dropna().unique()]


def unfair_runs(frame: pd.DataFrame) -> list[str]:
    """Return notes on runs that differ in what they should share: the order of the data, the commit, the versions."""
    orders = frame.groupby("seed")["data_order"].nunique()
    notes = [
        f"seed {seed}: the training examples came in {count} different orders" for seed, count in orders.items() if count > 1
    ]
    for column, what in (("commit", "commits"), *((name, f"versions of {name}") for name in frame.attrs["versions"])):
        found = sorted(frame[column].fillna("none").unique())
        if len(found) > 1:
            notes.append(f"the runs are of {len(found)} {what}: {', '.join(found)}")
    return notes


def publish(
    output: Path,
    parts: Sequence[str],
    results: Sequence[Result],
    frame: pd.DataFrame | None,
    plot: Callable[[Path], None],
    failures: Sequence[str],
) -> None:
    """Print what was found and write results.md, results.json and, if there is a frame, results.csv and plot.png.

    Args:
        output: the directory.
        parts: paragraphs of results.md.
        results: rows of results.json.
        frame: rows of results.csv; None if every run failed.
        plot: draws plot.png.
        failures: a line for each run that failed, see `run_grid`.

    Raises:
        SystemExit: with status 1, if a run failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    if frame is not None:
        write_table(output / "results.csv", list(frame), frame.astype(object).where(frame.notna(), "").values.tolist())
        plot(output / "plot.png")
    text = "\n\n".join([*parts, *(f"failed: {failure}" for failure in failures)])
    write_file(output / "results.md", text + "\n")
    write_file(output / "results.json", json.dumps([asdict(result) for result in results], indent=2))
    written = ["results.md", "results.json", *(["results.csv", "plot.png"] if frame is not None else [])]
    print(f"\n{text}\n\nWritten to {output}/: {', '.join(written)}")
    if failures:
        sys.exit(1)
