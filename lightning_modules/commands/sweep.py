"""`python train.py sweep`: one study of the paper's analysis on any FourierMoE config, ending in a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt
from torch import nn

from fourier_moe import FourierMoEConfig, adapters
from fourier_moe.adapter import Adapter, build_layer
from fourier_moe.errors import UserError
from lightning_modules.callbacks import RouterLoad
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.command_line import CommandLine
from lightning_modules.experiments.grid import require_named_logger, resolved_config, run_grid
from lightning_modules.experiments.report import partial_runs, publish
from lightning_modules.experiments.results import Result
from lightning_modules.experiments.studies import STUDIES, choose_settings, study_frame, study_table

StudyName = Literal["coefficients", "experts", "active_experts", "bandwidth", "balance_weight", "ablations"]


def sweep(
    line: CommandLine,
    study: StudyName,
    *,
    values: str | list[str | int | float] | None = None,
    seeds: PositiveInt = 3,
    output: str | None = None,
) -> list[Result]:
    """Train and test one config under the settings of one study, and write a table and a plot.

    A run that fails is reported, and the others continue. Results in `output` are kept: repeat the command after an
    interruption. Further arguments are those of fit, for example `--trainer.max_epochs 5`.

    Args:
        line: the config and the arguments of fit.
        study: what varies.
        values: separated by commas; by default the paper's, or around the config's own; overlays for `ablations`.
        seeds: number of seeds: 0, 1, ...
        output: directory of the results; `runs/sweep/<config's name>/<study>` by default.

    Raises:
        SystemExit: with status 1, at the end, if a run failed.
        UserError: before any run, if the config's adapter is not FourierMoE or a value does not fit config or model.
    """
    chosen = STUDIES[study]
    directory = Path(output or f"runs/sweep/{line.name}/{study}")
    words = line.words

    cli = AdaptationCLI(words, run=False)
    require_named_logger(resolved_config(cli))
    own = cli.model.adapter
    if not isinstance(own, FourierMoEConfig):
        raise UserError(f"sweep varies FourierMoE, and the config's adapter is {type(own).__name__}; leave its overlay out")
    if study == "bandwidth" and not own.frequency_bias:
        raise UserError("bandwidth has no effect with frequency_bias=False; set frequency_bias to true")
    if study == "experts" and (own.densities is not None or isinstance(own.bandwidth, Sequence)):
        raise UserError(
            f"densities={own.densities} and bandwidth={own.bandwidth} are for num_experts={own.num_experts}, which this study "
            "varies; set densities to null and bandwidth to one number"
        )
    cli.model.configure_model()
    texts = values.split(",") if isinstance(values, str) else None if values is None else [str(value) for value in values]
    settings, left_out = choose_settings(chosen, texts, own, _trial(adapters(cli.model.model)))
    for reason in left_out:
        print(f"left out: {reason}")
    if not any(isinstance(callback, RouterLoad) for callback in cli.trainer.callbacks):  # type: ignore[attr-defined]
        words += ["--trainer.callbacks+=lightning_modules.callbacks.RouterLoad"]
    del cli  # the runs need the memory

    results, failures = run_grid({setting.name: [*words, *setting.words] for setting in settings}, seeds, directory)
    parts, frame = [f"{chosen.title}: {', '.join(Path(path).name for path in line.files)}"], None
    own_name = next((setting.name for setting in settings if setting.adapter(own) == own), None)
    if results:
        frame = study_frame(study, settings, results)
        parts += [study_table(study, settings, frame, own_name)]
        parts += [f"Note: {note}" for note in partial_runs(frame)]
    parts += [f"left out: {reason}" for reason in left_out]

    def plot(path: Path) -> None:
        from lightning_modules.experiments.plots import plot_study  # here, since matplotlib is slow to import

        assert frame is not None
        plot_study(path, chosen, frame, own_name)

    publish(directory, parts, results, frame, plot, failures)
    return results


def _trial(layers: dict[str, Adapter]) -> Callable[[FourierMoEConfig], None]:
    """Return a check that builds a layer for each shape of projection: bands may be too small for the coefficients."""
    shapes: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        shapes.setdefault((layer.in_features, layer.out_features), name)

    def build(adapter: FourierMoEConfig) -> None:
        for (in_features, out_features), name in shapes.items():
            build_layer(nn.Linear(in_features, out_features, device="meta"), adapter, name)

    return build
