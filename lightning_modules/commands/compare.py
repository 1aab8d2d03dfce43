"""`python train.py compare`: one config under several adapters and seeds, ending in tables and a plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fourier_moe import FourierMoEConfig
from fourier_moe.errors import UserError
from fourier_moe.files.writing import write_file
from lightning_modules.experiments.budget import Budget, adapter_parameters, match
from lightning_modules.experiments.compare_report import format_table, method_labels, unfair_runs, write_csv
from lightning_modules.experiments.grid import Result, cell_name, partial_runs, run_grid
from lightning_modules.experiments.paired_tests import differences, format_differences
from lightning_modules.experiments.preflight import Cell, parse_grid, raise_together, unfair_differences
from lightning_modules.tables import markdown_table

OWN = "config"  # the adapter that the config itself names
FOURIER_MOE = "fourier_moe"  # the same, which has to be FourierMoE
_OVERLAYS = Path("configs/adapters")


def compare(args: list[str]) -> list[Result]:
    """Run every adapter with every seed, print the table and write it to `--output`.

    Everything that can be checked without training is checked before the first run. A run that fails is reported and the others
    go on. A run whose result is in `--output` already is not made again, unless its resolved config has changed: repeat the
    command to go on after an interruption.

    Raises:
        SystemExit: with status 2 for a wrong command line; with 1, at the end, if a run failed.
        UserError: before any run, if one does not parse, does not fit its model, or cannot have the budget.
    """
    options, fit_args = _parse(args)
    names = options.adapters.split(",")
    overlays = {name: _overlay(name) for name in names}
    if len({cell_name(name) for name in names}) < len(names) or {OWN, FOURIER_MOE} <= overlays.keys():
        raise UserError(f"--adapters {options.adapters}: names must differ, results go to directories of these names")
    budget = Budget.parse(options.match_parameters) if options.match_parameters else None
    output = Path(options.output or f"runs/compare/{Path(options.config[0]).stem}")

    configs = [word for path in options.config for word in ("--config", path)]
    grid = {name: [*configs, *overlay, *fit_args] for name, overlay in overlays.items()}
    cells = parse_grid(grid, options.metric)
    sized, sizes = _sizes(cells, budget)
    grid = {name: [*words, *sized[name]] for name, words in grid.items()}
    notes = unfair_differences(cells)
    del cells
    print(f"\n{sizes}")

    results, failures = run_grid(grid, options.seeds, output)
    output.mkdir(parents=True, exist_ok=True)
    parts = [f"failed: {failure}" for failure in failures]
    if results:
        metric = f"test/{options.metric}" if options.metric else results[0].main_metric
        missing = next((result for result in results if metric not in result.metrics), None)
        if missing:
            raise UserError(f"--metric {options.metric!r}: {missing.overlay} was tested for {', '.join(missing.metrics)}")
        parts = [*_report(results, metric, next(iter(grid)), notes, output), *parts]
    if budget:
        parts.append(f"Parameters matched to {options.match_parameters}:\n\n{sizes}")
    text = "\n\n".join(parts)
    write_file(output / "results.md", text + "\n")
    write_file(output / "results.json", json.dumps([asdict(result) for result in results], indent=2))
    written = ["results.md", "results.json", *(["results.csv", "plot.png"] if results else [])]
    print(f"\n{text}\n\nWritten to {output}/: {', '.join(written)}")
    if failures:
        sys.exit(1)
    return results


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="train.py compare",
        description="Train and test one config with several adapters and seeds; tested are the last weights and the checkpoint "
        "that is best on validation. Results that --output holds already are kept: repeat the command after an interruption. "
        "Further arguments are handed to fit, for example --trainer.max_epochs 5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="as for fit; repeat for overlays")
    parser.add_argument(
        "--adapters",
        required=True,
        help=f"comma-separated overlays: names in {_OVERLAYS}/, names with a folder in configs/ (ablations/real_only), paths, "
        f"or '{OWN}' for the config's own adapter, '{FOURIER_MOE}' if that is FourierMoE; the others are tested against the "
        "first",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default 3)")
    parser.add_argument(
        "--match-parameters",
        metavar="BUDGET",
        help="choose every adapter's size (rank, coefficients) such that it trains this many parameters beside the head: "
        "150000, or a share of the pretrained model's: 0.42%%",
    )
    parser.add_argument(
        "--metric",
        help="test metric to compare: matthews, or cola/matthews of one of several test sets (default: the task's main metric)",
    )
    parser.add_argument("--output", help="directory of the results (default runs/compare/<config's name>)")
    options, fit_args = parser.parse_known_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1")
    return options, fit_args


def _overlay(name: str) -> list[str]:
    """The words for `fit` that a name of `--adapters` stands for."""
    if name in (OWN, FOURIER_MOE):
        return []
    path = Path(name if name.endswith(".yaml") else f"configs/{name}.yaml" if "/" in name else f"{_OVERLAYS}/{name}.yaml")
    if not path.is_file():
        known = [file.stem for file in sorted(_OVERLAYS.glob("*.yaml"))]
        known += [f"ablations/{file.stem}" for file in sorted(Path("configs/ablations").glob("*.yaml"))]
        raise UserError(f"--adapters {name!r}: {path} not found; known: {', '.join([OWN, FOURIER_MOE, *known])}")
    return ["--config", str(path)]


def _sizes(cells: Mapping[str, Cell], budget: Budget | None) -> tuple[dict[str, list[str]], str]:
    """Try every adapter on its model, at the size that the budget asks for.

    Returns:
        The words for `fit` that set the sizes, and a table of what will be trained.

    Raises:
        UserError: one message with what does not fit.
    """
    words: dict[str, list[str]] = {}
    rows, problems = [], []
    for name, cell in cells.items():
        try:
            if name == FOURIER_MOE and not isinstance(cell.adapter, FourierMoEConfig):
                raise UserError(f"the config's own adapter is {type(cell.adapter).__name__}; '{OWN}' takes whatever it is")
            adapter = match(cell, budget) if budget else cell.adapter
            report = cell.try_out(adapter)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        field = adapter.size_field if budget else None
        words[name] = [f"--model.adapter.init_args.{field}", str(getattr(adapter, field))] if field else []
        count = adapter_parameters(report)
        size = adapter.describe_size() or ("as it is" if budget else "-")
        rows.append([name, type(adapter).__name__, size, f"{count:,}", f"{100 * count / report.pretrained:.3f} %"])
        rows[-1] += [f"{report.trained[kind]:,}" for kind in ("head", "backbone")]
    raise_together(problems)
    header = ["adapter", "class", "size", "adapter parameters", "of the model", "head", "backbone"]
    return words, markdown_table(header, rows)


def _report(results: Sequence[Result], metric: str, reference: str, notes: Sequence[str], output: Path) -> list[str]:
    """Write results.csv and plot.png; returns the parts of results.md."""
    from lightning_modules.experiments.compare_plots import (
        plot_methods,  # here: matplotlib takes as long to import as a small run
    )

    labels = method_labels(results)
    write_csv(output / "results.csv", results, metric)
    plot_methods(output / "plot.png", results, labels, metric)
    found, problems = differences(results, metric, reference, output)
    parts = [format_table(results, metric)]
    if found:
        parts.append(format_differences(found, labels, reference))
    parts += [f"Note: {note}" for note in (*notes, *unfair_runs(results), *partial_runs(results), *problems)]
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items())
    return [*parts, f"Commit {results[0].commit or 'unknown'}; {versions}"]
