"""`python train.py sweep`: one study of the paper's analysis on any FourierMoE config, ending in a table and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fourier_moe import FourierMoEConfig, adapters
from fourier_moe.adapter import Adapter, build_layer
from fourier_moe.errors import UserError
from lightning_modules.callbacks import RouterLoad
from lightning_modules.cli import AdaptationCLI
from lightning_modules.experiments.grid import require_named_logger, resolved_config, run_grid
from lightning_modules.experiments.report import partial_runs, publish
from lightning_modules.experiments.results import Result
from lightning_modules.experiments.studies import STUDIES, choose_settings, study_frame, study_table


def sweep(args: list[str]) -> list[Result]:
    """Run every setting of a study with every seed; write tables and a plot to `--output`, as `compare` does.

    A run that fails is reported and the others go on; a run whose result is in `--output` already is not made again, as in
    `compare`.

    Raises:
        SystemExit: with status 2 for a wrong command line; with 1, at the end, if a run failed.
        UserError: before any run, if the config's adapter is not FourierMoE or a value does not fit config or model.
    """
    parser = argparse.ArgumentParser(
        prog="train.py sweep",
        description="Train and test one config under the settings of one study. Results that --output holds already are kept: "
        "repeat the command after an interruption. Further arguments are handed to fit, for example --trainer.max_epochs 5.",
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--config", action="append", required=True, help="as for fit; repeat for overlays")
    parser.add_argument(
        "--values", help="comma-separated; default: the paper's, or around the config's own. ablations: overlays"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default 3)")
    parser.add_argument("--output", help="directory of the results (default runs/sweep/<config's name>/<study>)")
    options, fit_args = parser.parse_known_args(args)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1")
    study = STUDIES[options.study]
    output = Path(options.output or f"runs/sweep/{Path(options.config[0]).stem}/{options.study}")
    words = [*(word for path in options.config for word in ("--config", path)), *fit_args]

    cli = AdaptationCLI(words, run=False)
    require_named_logger(resolved_config(cli))
    own = cli.model.adapter
    if not isinstance(own, FourierMoEConfig):
        raise UserError(f"sweep varies FourierMoE, and the config's adapter is {type(own).__name__}; leave its overlay out")
    if options.study == "bandwidth" and not own.frequency_bias:
        raise UserError("bandwidth has no effect with frequency_bias=False; set frequency_bias to true")
    cli.model.configure_model()
    values = options.values.split(",") if options.values is not None else None
    settings, left_out = choose_settings(study, values, own, _trial(adapters(cli.model.model)))
    for line in left_out:
        print(f"left out: {line}")
    if not any(isinstance(callback, RouterLoad) for callback in cli.trainer.callbacks):  # type: ignore[attr-defined]
        words += ["--trainer.callbacks+=lightning_modules.callbacks.RouterLoad"]
    del cli  # the runs need the memory

    results, failures = run_grid({setting.name: [*words, *setting.words] for setting in settings}, options.seeds, output)
    parts, frame = [f"{study.title}: {', '.join(Path(path).name for path in options.config)}"], None
    own_name = next((setting.name for setting in settings if setting.adapter(own) == own), None)
    if results:
        frame = study_frame(options.study, settings, results)
        parts += [study_table(options.study, settings, frame, own_name)]
        parts += [f"Note: {note}" for note in partial_runs(frame)]
    parts += [f"left out: {line}" for line in left_out]

    def plot(path: Path) -> None:
        from lightning_modules.experiments.plots import plot_study  # here: matplotlib takes as long to import as a small run

        assert frame is not None
        plot_study(path, study, frame, own_name)

    publish(output, parts, results, frame, plot, failures)
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
