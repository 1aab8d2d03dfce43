"""`python train.py compare`: one config with several adapters and seeds, ending in tables and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from fourier_moe import FourierMoEConfig
from fourier_moe.errors import UserError
from lightning_modules.experiments.budget import Budget, adapter_parameters, match
from lightning_modules.experiments.grid import run_grid
from lightning_modules.experiments.kept_runs import variant_directory
from lightning_modules.experiments.paired_tests import differences, format_differences
from lightning_modules.experiments.preflight import Variant, parse_grid, raise_together, unfair_differences
from lightning_modules.experiments.report import format_table, method_labels, partial_runs, publish, unfair_runs
from lightning_modules.experiments.results import Result, result_frame
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
    if len({variant_directory(name) for name in names}) < len(names) or {OWN, FOURIER_MOE} <= overlays.keys():
        raise UserError(f"--adapters {options.adapters}: names must differ, results go to directories of these names")
    budget = Budget.parse(options.match_parameters) if options.match_parameters else None
    output = Path(options.output or f"runs/compare/{Path(options.config[0]).stem}")

    configs = [word for path in options.config for word in ("--config", path)]
    grid = {name: [*configs, *overlay, *fit_args] for name, overlay in overlays.items()}
    variants = parse_grid(grid, options.metric)
    sized, sizes = _sizes(variants, budget)
    grid = {name: [*words, *sized[name]] for name, words in grid.items()}
    notes = unfair_differences(variants)
    del variants  # the runs need the memory
    print(f"\n{sizes}")

    results, failures = run_grid(grid, options.seeds, output)
    frame, labels, parts = None, {}, []
    if results:
        frame = _frame(results, options.metric)
        labels = method_labels(frame)
        parts = _tables(frame, labels, next(iter(grid)), notes, output)
    if budget:
        parts.append(f"Parameters matched to {options.match_parameters}:\n\n{sizes}")

    def plot(path: Path) -> None:
        from lightning_modules.experiments.plots import plot_comparison  # here: matplotlib is slow to import

        assert frame is not None
        plot_comparison(path, frame, labels)

    publish(output, parts, results, frame, plot, failures)
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
    """Return the arguments of `fit` for a name in `--adapters`."""
    if name in (OWN, FOURIER_MOE):
        return []
    path = Path(name if name.endswith(".yaml") else f"configs/{name}.yaml" if "/" in name else f"{_OVERLAYS}/{name}.yaml")
    if not path.is_file():
        known = [file.stem for file in sorted(_OVERLAYS.glob("*.yaml"))]
        known += [f"ablations/{file.stem}" for file in sorted(Path("configs/ablations").glob("*.yaml"))]
        raise UserError(f"--adapters {name!r}: {path} not found; known: {', '.join([OWN, FOURIER_MOE, *known])}")
    return ["--config", str(path)]


def _sizes(variants: Mapping[str, Variant], budget: Budget | None) -> tuple[dict[str, list[str]], str]:
    """Try every variant's adapter on its model, at the size that matches the budget.

    Returns:
        The arguments of `fit` that set the sizes, by variant, and a table of what will be trained.

    Raises:
        UserError: one message with all problems.
    """
    words: dict[str, list[str]] = {}
    rows, problems = [], []
    for name, variant in variants.items():
        try:
            if name == FOURIER_MOE and not isinstance(variant.adapter, FourierMoEConfig):
                raise UserError(f"the config's own adapter is {type(variant.adapter).__name__}; '{OWN}' takes any")
            adapter = match(variant, budget) if budget else variant.adapter
            report = variant.try_out(adapter)
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


def _frame(results: Sequence[Result], metric: str | None) -> pd.DataFrame:
    """Return the frame of a metric that `--metric` names; None for the task's main one."""
    name = f"test/{metric}" if metric else results[0].main_metric
    missing = next((result for result in results if name not in result.metrics), None)
    if missing:
        raise UserError(f"--metric {metric!r}: {missing.variant} was tested for {', '.join(missing.metrics)}")
    return result_frame(results, name)


def _tables(frame: pd.DataFrame, labels: Mapping[str, str], reference: str, notes: Sequence[str], output: Path) -> list[str]:
    """Return the paragraphs of results.md: both tables, notes, commit and versions."""
    kinds = [kind for kind in frame.attrs["kinds"] if frame[kind].any()]
    parts = [format_table(frame, {name: {"method": label} for name, label in labels.items()}, kinds, ("seconds", "MiB"))]
    found, problems = differences(frame, reference, output)
    if found:
        parts.append(format_differences(found, labels, reference))
    parts += [f"Note: {note}" for note in (*notes, *unfair_runs(frame), *partial_runs(frame), *problems)]
    first = frame.iloc[0]
    versions = ", ".join(f"{name} {first[name]}" for name in frame.attrs["versions"])
    return [*parts, f"Commit {first['commit'] or 'unknown'}; {versions}"]
