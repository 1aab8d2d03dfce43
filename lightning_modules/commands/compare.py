"""`python train.py compare`: one config with several adapters and seeds, ending in tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from jsonargparse.typing import PositiveInt

from fourier_moe import AdapterConfig, FourierMoEConfig, InjectionReport
from fourier_moe.errors import UserError
from lightning_modules.cli.config_files import CONFIGS, find_config
from lightning_modules.commands.command_line import CommandLine
from lightning_modules.experiments.budget import Budget, adapter_parameters, match
from lightning_modules.experiments.grid import run_grid
from lightning_modules.experiments.kept_runs import require_own_directories
from lightning_modules.experiments.paired_tests import differences, format_differences
from lightning_modules.experiments.preflight import Variant, for_each, parse_grid, unfair_differences
from lightning_modules.experiments.report import format_table, method_labels, partial_runs, publish, unfair_runs
from lightning_modules.experiments.results import Result, result_frame
from lightning_modules.experiments.tuning import Trial, best_trial, own_rates, rate_words, trial_table
from lightning_modules.experiments.tuning import tune as tune_rates
from lightning_modules.tables import markdown_table

OWN = "config"  # the adapter that the config itself names
FOURIER_MOE = "fourier_moe"  # the same, which has to be FourierMoE


def compare(
    line: CommandLine,
    *,
    adapters: str | list[str],
    seeds: PositiveInt = 3,
    match_parameters: str | int | None = None,
    tune: PositiveInt | None = None,
    metric: str | None = None,
    output: str | None = None,
) -> list[Result]:
    """Train and test one config with several adapters and seeds, and write tables and a plot.

    The last weights and the checkpoint that is best on validation are tested. Everything that can be checked without training
    is checked before the first run. A run that fails is reported, and the others continue. A run whose result is in
    `output` already is not repeated, unless its resolved config has changed: repeat the command after an interruption.
    Further arguments are those of fit, for example `--trainer.max_epochs 5`.

    Args:
        line: the config and the arguments of fit.
        adapters: overlays, separated by commas: names in `configs/adapters/`, names with a folder in `configs/`
            (`ablations/real_only`, `recipes/image_tower`), paths, or `config` for the config's own adapter, `fourier_moe` if
            that is FourierMoE; the others are tested against the first.
        seeds: number of seeds: 0, 1, ...
        match_parameters: choose every adapter's size (rank, coefficients) such that it trains this many parameters beside the
            head: `150000`, or a share of the pretrained model's: `0.42%`.
        tune: number of trials over its learning rates that every adapter gets, judged on validation data with a seed of their
            own; by default the rates of the config and the overlays are used.
        metric: test metric to compare: `matthews`, `loss`, or `cola/matthews` of one of several test sets; the task's main
            metric by default.
        output: directory of the results; `runs/compare/<config's name>` by default.

    Raises:
        SystemExit: with status 1, at the end, if a run failed.
        UserError: before any run, if one does not parse, does not fit its model, or cannot have the budget.
    """
    names = adapters.split(",") if isinstance(adapters, str) else adapters
    overlays = {name: _overlay(name) for name in names}
    require_own_directories(f"--adapters {','.join(names)}", names)
    if {OWN, FOURIER_MOE} <= overlays.keys():
        raise UserError(
            f"--adapters {','.join(names)}: {OWN} and {FOURIER_MOE} are both the config's own adapter; give one of them"
        )
    budget = Budget.parse(str(match_parameters)) if match_parameters else None
    directory = Path(output or f"runs/compare/{line.name}")

    grid = {name: [*line.configs, *overlay, *line.arguments] for name, overlay in overlays.items()}
    variants = parse_grid(grid, metric)
    sized, sizes, resized = _sizes(variants, budget)
    grid = {name: [*words, *sized[name]] for name, words in grid.items()}
    notes = unfair_differences(variants)
    if resized and not tune:
        notes.append(f"--match-parameters changed the size of {', '.join(resized)}: do the rates suit it? See --tune")
    rates = own_rates(variants)
    del variants  # the runs need the memory
    print(f"\n{sizes}")

    tuned: dict[str, list[Trial]] = {}
    if tune:
        tuned = {name: tune_rates(name, grid[name], rates[name], tune, metric, directory) for name in names}
        grid = {name: [*words, *rate_words(best_trial(tuned[name]).rates)] for name, words in grid.items()}
    results, failures = run_grid(grid, seeds, directory)
    frame, labels, parts = None, {}, []
    if results:
        frame = result_frame(results, metric)
        labels = method_labels(frame)
        parts = _tables(frame, labels, next(iter(grid)), notes, directory)
        if tuned:
            parts += trial_table(tuned, labels, directory)
    if budget:
        parts.append(f"Parameters matched to {match_parameters}:\n\n{sizes}")

    def plot(path: Path) -> None:
        from lightning_modules.experiments.plots import plot_comparison  # here, since matplotlib is slow to import

        assert frame is not None
        plot_comparison(path, frame, labels)

    publish(directory, parts, results, frame, plot, failures)
    return results


def _overlay(name: str) -> list[str]:
    """Return the arguments of `fit` for a name in `--adapters`."""
    if name in (OWN, FOURIER_MOE):
        return []
    path = Path(find_config(name if "/" in name or name.endswith(".yaml") else f"adapters/{name}"))
    if not path.is_file():
        known = [file.stem for file in sorted((CONFIGS / "adapters").glob("*.yaml"))]
        for folder in ("ablations", "recipes"):
            known += [f"{folder}/{file.stem}" for file in sorted((CONFIGS / folder).glob("*.yaml"))]
        raise UserError(f"--adapters {name!r}: {path} not found; known: {', '.join([OWN, FOURIER_MOE, *known])}")
    return ["--config", str(path)]


def _sizes(variants: Mapping[str, Variant], budget: Budget | None) -> tuple[dict[str, list[str]], str, list[str]]:
    """Try every variant's adapter on its model, at the size that matches the budget.

    Returns:
        The arguments of `fit` that set the sizes, by variant, a table of what will be trained, and the variants whose size is
        not their config's.

    Raises:
        UserError: one message with all problems.
    """

    def try_out(name: str, variant: Variant) -> tuple[AdapterConfig, InjectionReport]:
        if name == FOURIER_MOE and not isinstance(variant.adapter, FourierMoEConfig):
            raise UserError(f"the config's own adapter is {type(variant.adapter).__name__}; '{OWN}' takes any")
        adapter = match(variant, budget) if budget else variant.adapter
        return adapter, variant.try_out(adapter)

    words: dict[str, list[str]] = {}
    rows, resized = [], []
    for name, (adapter, report) in for_each(variants, try_out).items():
        field = adapter.size_field if budget else None
        words[name] = [f"--model.adapter.init_args.{field}", str(getattr(adapter, field))] if field else []
        resized += [name] if field and getattr(adapter, field) != getattr(variants[name].adapter, field) else []
        count = adapter_parameters(report)
        size = adapter.describe_size() or ("as it is" if budget else "-")
        rows.append([name, type(adapter).__name__, size, f"{count:,}", f"{100 * count / report.pretrained:.3f} %"])
        rows[-1] += [f"{report.trained[kind]:,}" for kind in ("head", "backbone")]
    header = ["adapter", "class", "size", "adapter parameters", "of the model", "head", "backbone"]
    return words, markdown_table(header, rows), resized


def _tables(frame: pd.DataFrame, labels: Mapping[str, str], reference: str, notes: Sequence[str], output: Path) -> list[str]:
    """Return the paragraphs of results.md: both tables, notes, commit and versions."""
    kinds = [kind for kind in frame.attrs["kinds"] if frame[kind].any()]
    parts = [format_table(frame, {name: {"method": label} for name, label in labels.items()}, kinds, ("seconds", "MiB"))]
    found, problems = differences(frame, reference, output)
    if found:
        parts.append(format_differences(found, labels, reference, is_share=frame.attrs["is_share"]))
    parts += [f"Note: {note}" for note in (*notes, *unfair_runs(frame), *partial_runs(frame), *problems)]
    first = frame[["commit", *frame.attrs["versions"]]].fillna("unknown").iloc[0]
    versions = ", ".join(f"{name} {first[name]}" for name in frame.attrs["versions"])
    return [*parts, f"Commit {first['commit']}; {versions}"]
