"""`python train.py analyze`: which frequencies model and data ask for, before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_modules.callbacks.sensitivity.sensitivity_report import SensitivityReport
from lightning_modules.callbacks.sensitivity.spectral_sensitivity import SpectralSensitivity
from lightning_modules.cli import AdaptationCLI


def analyze(args: list[str]) -> SensitivityReport:
    """Measure the spectral sensitivity of a config's model on its training data, print and write it, and train nothing.

    Raises:
        SystemExit: with status 2 for a wrong command line.
        UserError: see SpectralSensitivity.
    """
    parser = argparse.ArgumentParser(
        prog="train.py analyze",
        description="Which frequencies the loss asks the adapted projections for: the radial spectrum of the gradient with "
        "respect to their dense update, against that of permuted rows and columns. Suggests a band layout. Further arguments "
        "are handed to fit, for example --data.directory DIR or --model.adapter_path DIR for a trained adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="as for fit; repeat for overlays")
    parser.add_argument("--batches", type=int, default=16, help="batches of training data (default 16)")
    parser.add_argument("--permutations", type=int, default=20, help="random reorderings, the control (default 20)")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for gradients; less takes more passes (default 4)")
    parser.add_argument("--weights", help="fully fine-tuned weights of the same model: W1 - W0 is measured too")
    parser.add_argument("--output", help="directory of the results (default runs/analyze/<config's name>)")
    options, fit_args = parser.parse_known_args(args)
    callback = SpectralSensitivity(
        num_batches=options.batches,
        permutations=options.permutations,
        memory_gib=options.memory,
        full_weights=options.weights,
        directory=options.output or f"runs/analyze/{Path(options.config[0]).stem}",
        stop=True,
    )
    configs = [word for path in options.config for word in ("--config", path)]
    # A minimum in the config would be trained, whoever asks to stop.
    no_steps = ("num_sanity_val_steps=0", "limit_val_batches=0", "min_epochs=null", "min_steps=null")
    cli = AdaptationCLI([*configs, *fit_args, *(f"--trainer.{word}" for word in no_steps)], run=False)
    cli.trainer.callbacks = [callback]  # type: ignore[attr-defined] # nothing of a training run is to be written
    cli.trainer.loggers = []
    cli.model.task.fetch()
    cli.trainer.fit(cli.model, cli.datamodule)
    assert callback.report is not None
    return callback.report
