"""`python train.py sweep`: one config with one thing varied, ending in a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from torch import nn

from fourier_moe import FourierMoEConfig, adapters
from fourier_moe.adapter import Adapter, build_layer
from fourier_moe.errors import UserError
from lightning_modules.callbacks import RouterLoad
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.command_line import CommandLine
from lightning_modules.experiments.grid import require_named_logger, resolved_config, run_grid
from lightning_modules.experiments.kept_runs import require_own_directories
from lightning_modules.experiments.preflight import for_each, parse_grid, parse_run, require_metric, settings_of
from lightning_modules.experiments.report import partial_runs, publish
from lightning_modules.experiments.results import Result
from lightning_modules.experiments.studies.option import OptionStudy, split_values
from lightning_modules.experiments.studies.paper import STUDIES, choose_settings
from lightning_modules.experiments.studies.study import Setting, Study, study_frame, study_table


def sweep(
    line: CommandLine,
    study: str,
    *,
    values: str | float | list[Any] | None = None,
    seeds: PositiveInt = 3,
    metric: str | None = None,
    output: str | None = None,
) -> list[Result]:
    """Train and test one config with one thing varied, and write a table and a plot.

    A run that fails is reported, and the others continue. Results in `output` are kept: repeat the command after an
    interruption. Further arguments are those of fit, for example `--trainer.max_epochs 5`.

    Args:
        line: the config and the arguments of fit.
        study: one of the paper's (coefficients, experts, active_experts, bandwidth, balance_weight, ablations), which vary
            FourierMoE, or any argument of fit, for example `model.optimization.adapter.lr`.
        values: separated by commas. A study of the paper has the paper's, or some around the config's own, by default; those of
            `ablations` are overlays.
        seeds: number of seeds: 0, 1, ...
        metric: test metric of table and plot, as for compare; the task's main metric by default.
        output: directory of the results; `runs/sweep/<configs' names>/<study>` by default, as in `runs/sweep/demo+lora/...`.

    Raises:
        SystemExit: with status 1, at the end, if a run failed.
        UserError: before any run, if there is no such study, or a value does not fit config or model.
    """
    texts = None if values is None else split_values(values)
    directory = Path(output or f"runs/sweep/{line.names}/{study}")
    plan = (_plan_of_the_paper if study in STUDIES else _plan_of_an_option)(study, texts, line.words, metric)
    for reason in plan.left_out:
        print(f"left out: {reason}")

    results, failures = run_grid({setting.name: [*plan.words, *setting.words] for setting in plan.settings}, seeds, directory)
    parts, frame = [f"{plan.study.title}: {', '.join(Path(path).name for path in line.files)}"], None
    if results:
        frame = study_frame(study, plan.settings, results, metric)
        parts += [study_table(plan.study, plan.settings, frame, plan.unchanged)]
        parts += [f"Note: {note}" for note in partial_runs(frame)]
    parts += [f"left out: {reason}" for reason in plan.left_out]

    def plot(path: Path) -> None:
        from lightning_modules.experiments.plots import plot_study  # here, since matplotlib is slow to import

        assert frame is not None
        plot_study(path, plan.study, frame, plan.unchanged)

    publish(directory, parts, results, frame, plot, failures)
    return results


@dataclass(frozen=True)
class _Plan:
    """What will be run.

    Attributes:
        study: what is varied.
        settings: its settings that fit config and model.
        left_out: one reason for each that does not.
        words: the arguments of `fit` that all runs share.
        unchanged: name of the setting that the config has by itself, if it is among them.
    """

    study: Study
    settings: Sequence[Setting]
    left_out: Sequence[str]
    words: Sequence[str]
    unchanged: str | None


def _plan_of_the_paper(name: str, values: Sequence[str] | None, words: Sequence[str], metric: str | None) -> _Plan:
    """Choose the settings of a study of FourierMoE that fit config and model."""
    study = STUDIES[name]
    if values is not None:
        require_own_directories(f"--values {','.join(values)}", values)
    cli = AdaptationCLI([*words], run=False)
    require_named_logger(resolved_config(cli))
    own = cli.model.adapter
    if not isinstance(own, FourierMoEConfig):
        raise UserError(
            f"the study {name} varies FourierMoE, and the config's adapter is {type(own).__name__}; leave its overlay out, or "
            "sweep an argument of fit, such as model.optimization.adapter.lr"
        )
    if name == "bandwidth" and not own.frequency_bias:
        raise UserError("bandwidth has no effect with frequency_bias=False; set frequency_bias to true")
    if name == "experts" and (own.densities is not None or isinstance(own.bandwidth, Sequence)):
        raise UserError(
            f"densities={own.densities} and bandwidth={own.bandwidth} are for num_experts={own.num_experts}, which this study "
            "varies; set densities to null and bandwidth to one number"
        )
    cli.model.configure_model()
    require_metric(cli.model.task, metric)
    settings, left_out = choose_settings(study, values, own, _trial(adapters(cli.model.model)))
    if not any(isinstance(callback, RouterLoad) for callback in cli.trainer.callbacks):  # type: ignore[attr-defined]
        words = [*words, "--trainer.callbacks+=lightning_modules.callbacks.RouterLoad"]
    unchanged = next((one.name for one in settings if one.adapter(own) == own), None)
    return _Plan(study, settings, left_out, words, unchanged)


def _plan_of_an_option(option: str, values: Sequence[str] | None, words: Sequence[str], metric: str | None) -> _Plan:
    """Parse every setting, and try its adapter on an outline of the model."""
    if "." not in option:
        raise UserError(f"sweep {option}: no such study; known: {', '.join(STUDIES)}, and arguments of fit with a dot")
    if values is None:
        raise UserError(f"sweep {option}: give --values, separated by commas")
    study = OptionStudy(option, option, values)
    settings = study.settings
    require_own_directories(f"--values {','.join(values)}", [setting.name for setting in settings])
    variants = parse_grid({setting.name: [*words, *setting.words] for setting in settings}, metric)
    for_each(variants, lambda _, variant: variant.try_out(variant.adapter))
    resolved = {name: settings_of(variant.config) for name, variant in variants.items()}
    for name, other in combinations(resolved, 2):
        if resolved[name] == resolved[other]:
            raise UserError(f"sweep {option}: {name} and {other} are the same run (the logger is each run's own)")
    return _Plan(study, settings, [], words, _unchanged(resolved, words))


def _unchanged(resolved: Mapping[str, Mapping[str, Any]], words: Sequence[str]) -> str | None:
    """Return the name of the setting that the config has by itself; None if there is none or the config lacks this option."""
    try:
        own = settings_of(resolved_config(parse_run(words)))
    except UserError:
        return None
    return next((name for name, found in resolved.items() if found == own), None)


def _trial(layers: dict[str, Adapter]) -> Callable[[FourierMoEConfig], None]:
    """Return a check that builds a layer for each shape of projection: bands may be too small for the coefficients."""
    shapes: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        shapes.setdefault((layer.in_features, layer.out_features), name)

    def build(adapter: FourierMoEConfig) -> None:
        for (in_features, out_features), name in shapes.items():
            build_layer(nn.Linear(in_features, out_features, device="meta"), adapter, name)

    return build
