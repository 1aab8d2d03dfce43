"""`python train.py analyze`: the frequencies at which the loss is sensitive, before training."""

from __future__ import annotations

from jsonargparse.typing import PositiveFloat, PositiveInt

from lightning_modules.callbacks.sensitivity.sensitivity_report import SensitivityReport
from lightning_modules.callbacks.sensitivity.spectral_sensitivity import SpectralSensitivity
from lightning_modules.cli import AdaptationCLI
from lightning_modules.commands.command_line import CommandLine


def analyze(
    line: CommandLine,
    *,
    batches: PositiveInt = 16,
    permutations: PositiveInt = 20,
    memory: PositiveFloat = 4.0,
    weights: str | None = None,
    output: str | None = None,
) -> SensitivityReport:
    """Measure at which frequencies the loss is sensitive to the adapted projections, before training.

    The radial spectrum of the gradient with respect to their dense update is compared with that of permuted rows and columns.
    Further arguments are those of fit: `--data.directory DIR`, or `--model.adapter_path DIR` for a trained adapter.

    Args:
        line: the config and the arguments of fit.
        batches: number of batches of training data.
        permutations: number of random reorderings, the control.
        memory: GiB for gradients; less memory takes more passes over the data.
        weights: fully fine-tuned weights of the same model: W1 - W0 is measured too.
        output: directory of the results; `runs/analyze/<config's name>` by default.

    Raises:
        UserError: see SpectralSensitivity.
    """
    callback = SpectralSensitivity(
        num_batches=batches,
        permutations=permutations,
        memory_gib=memory,
        full_weights=weights,
        directory=output or f"runs/analyze/{line.name}",
        stop=True,
    )
    # Lightning trains a minimum of the config even if should_stop is set.
    no_steps = ("num_sanity_val_steps=0", "limit_val_batches=0", "min_epochs=null", "min_steps=null")
    cli = AdaptationCLI([*line.words, *(f"--trainer.{word}" for word in no_steps)], run=False)
    cli.trainer.callbacks = [callback]  # type: ignore[attr-defined] # writes nothing of a training run
    cli.trainer.loggers = []
    cli.model.task.fetch()
    cli.trainer.fit(cli.model, cli.datamodule)
    assert callback.report is not None
    return callback.report
