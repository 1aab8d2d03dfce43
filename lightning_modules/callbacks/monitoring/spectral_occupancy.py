"""SpectralOccupancy: the spectrum that each expert learns during training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fourier_moe import FourierMoEConfig, FourierMoELinear, SpectralExperts, adapters
from fourier_moe.errors import UserError
from fourier_moe.inject import adapter_config
from lightning_modules.callbacks.any_module import adapted_model
from lightning_modules.callbacks.monitoring.logged import (
    log_now,
    logged_step,
    rendered,
    show_images,
    takes_images,
    tensorboards,
    write_images,
)
from lightning_modules.callbacks.monitoring.model_spectra import ModelSpectra
from lightning_modules.callbacks.monitoring.spectral_figures import overlap, radial_occupancy, rings
from lightning_modules.callbacks.monitoring.token_ranks import LoadReader, TokenRanks
from lightning_modules.run_directory import run_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = {
    "spectrum/rings": "spectral_rings",
    "spectrum/radial_occupancy": "radial_occupancy",
    "spectrum/overlap": "spectral_overlap",
    "spectrum/token_rank": "token_rank",
}
IMAGES_EVERY = 10  # measurements between two pictures
TIME_BUDGET = 0.01  # share of the time that measurements at the end of an interval may take


class SpectralOccupancy(L.Callback):
    """Log where each expert's update lies in the frequency plane, and how many of its coefficients are in use.

    Means over the adapted projections (`fourier_moe.analysis.spectra` has the formulas), as `spectrum/{measure}/expert_{e}`,
    and `spectrum/{measure}/shared` of the expert that `shared_coefficients` makes:

    - `energy`, the squared Frobenius norm of the update; `center` and `radius_std`, mean and standard deviation of its
      radius;
    - `in_band`, share of the energy inside the expert's band, and `band_inner` and `band_outer`, the radii at its edges (not
      of the shared expert, which has no band);
    - `effective_coefficients`, 1 to P complex coefficients in use, and `effective_rank`, 1 to 2P, with every picture.

    With every picture also `spectrum/token_rank/all`, the sum of the ranks of the updates that serve a token (Corollary H.3),
    mean over all tokens of training since the last picture and over the projections, and `spectrum/token_rank/{task}` where
    batches name their task. They are left out if no tokens were counted, as without `recording`.

    TensorBoard also shows histograms of the coefficients' moduli (`spectrum/magnitude/expert_{e}`) and pictures: coefficients
    on the frequency plane, colored by expert (`spectrum/rings`), energy by radius (`spectrum/radial_occupancy`), the overlap
    between experts (`spectrum/overlap`) and the tokens' ranks by layer and task (`spectrum/token_rank`). At the end of training
    these are in the run directory as spectral_rings.png, radial_occupancy.{png,csv}, spectral_overlap.{png,csv},
    token_rank.{png,csv}, and the measures of every layer as spectral_occupancy.csv.
    Models without FourierMoE adapters are ignored.

    Args:
        every_n_steps: optimizer steps between two measurements; null for validations and ends of epochs, but so few that
            they take at most 1 % of the time.
        images_every_n_steps: optimizer steps between two pictures in TensorBoard; null for every tenth measurement.
        detailed: also log `spectrum_layers/{layer}/{measure}/expert_{e}` of every layer.
        layers: names of the projections in the picture of rings; null for the first, the middle and the last.

    Raises:
        UserError: at the start of training, if `layers` names a projection that is not adapted.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        images_every_n_steps: int | None = None,
        detailed: bool = False,
        layers: Sequence[str] | None = None,
    ) -> None:
        for name, steps in (("every_n_steps", every_n_steps), ("images_every_n_steps", images_every_n_steps)):
            if steps is not None and steps < 1:
                raise UserError(f"{name}={steps} must be 1 or more, or null")
        if layers is not None and (isinstance(layers, str) or not layers):
            raise UserError(f"layers={layers!r} must be a list of names, or null for the first, the middle and the last")
        self.every_n_steps = every_n_steps
        self.images_every_n_steps = images_every_n_steps
        self.detailed = detailed
        self.layers = layers
        self._experts: dict[str, SpectralExperts] = {}
        self._reader: LoadReader | None = None  # during training
        self._ranks: TokenRanks | None = None  # at the last picture
        self._shown: list[str] = []  # layers in the picture of rings
        self._measured = self._drawn = self._seen = -1  # optimizer steps
        self._num_measured = 0
        self._not_before = 0.0  # time.monotonic()

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = adapters(adapted_model(pl_module, self)).items()
        layers = {name: layer for name, layer in found if isinstance(layer, FourierMoELinear)}
        self._experts = {name: layer.experts for name, layer in layers.items()}
        self._measured = self._drawn = -1
        self._num_measured, self._not_before = 0, 0.0
        if not self._experts:
            rank_zero_info("SpectralOccupancy: this model has no FourierMoE adapters, so there is nothing to log")
            return
        names = list(self._experts)
        unknown = [layer for layer in self.layers or () if layer not in names]
        if unknown:
            known = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
            raise UserError(f"layers names {unknown[0]!r}, which is not adapted; adapted are: {known}")
        self._shown = list(self.layers or dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step
        if self._experts:
            model = adapted_model(pl_module, self)
            found = {name: layer for name, layer in adapters(model).items() if isinstance(layer, FourierMoELinear)}
            if any(layer.router is not None for layer in found.values()):
                self._reader = LoadReader(model, found)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self._experts or step == self._seen:  # gradients are being accumulated
            return
        self._seen = step
        measure = self.every_n_steps is not None and step % self.every_n_steps == 0
        draw = self.images_every_n_steps is not None and step % self.images_every_n_steps == 0
        if measure or draw:
            self._report_and_show(trainer, pl_module, measure, draw or (measure and self._is_picture_due()))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_of_interval(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_of_interval(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._experts:
            return
        step = trainer.global_step
        drawn = self._drawn == step
        spectra = self._report(trainer, pl_module, measure=self._measured != step, draw=not drawn)
        self._stop()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer)  # asks all processes
        if trainer.is_global_zero:
            images = rendered(self._figures(spectra, step))
            if not drawn:
                show_images(trainer, images)
            directory.mkdir(parents=True, exist_ok=True)
            spectra.write(directory)
            assert self._ranks is not None
            if self._ranks.by_task:
                self._ranks.write(directory / "token_rank.csv")
            write_images(directory, {FILES[tag]: image for tag, image in images.items()})
            rank_zero_info(f"Spectral occupancy written: {directory / 'spectral_occupancy.csv'}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    # ---------------------------------------------------------------- what

    def _end_of_interval(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure at most once per step, as epochs often end with a validation, and skip some of short intervals."""
        due = self._experts and self.every_n_steps is None and self._measured != trainer.global_step
        if due and (trainer.world_size > 1 or time.monotonic() >= self._not_before):  # processes must agree
            started = time.monotonic()
            self._report_and_show(trainer, pl_module, measure=True, draw=self._is_picture_due())
            self._not_before = started + (time.monotonic() - started) / TIME_BUDGET

    def _is_picture_due(self) -> bool:
        return self.images_every_n_steps is None and (self._num_measured + 1) % IMAGES_EVERY == 0

    def _report_and_show(self, trainer: L.Trainer, pl_module: L.LightningModule, measure: bool, draw: bool) -> None:
        spectra = self._report(trainer, pl_module, measure, draw)
        if draw and takes_images(trainer):
            show_images(trainer, rendered(self._figures(spectra, trainer.global_step)))

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, measure: bool, draw: bool) -> ModelSpectra:
        """Log the values of a measurement or a picture, without the picture itself."""
        config = adapter_config(adapted_model(pl_module, self))
        assert isinstance(config, FourierMoEConfig)
        spectra = ModelSpectra.of(self._experts, config)
        metrics: dict[str, float] = {}
        if measure:
            self._measured, self._num_measured = trainer.global_step, self._num_measured + 1
            for name, values in spectra.measures.items():
                metrics |= self._by_expert(spectra, name, values)
            for expert, edges in enumerate(spectra.bands):
                metrics |= {
                    f"spectrum/band_{side}/expert_{expert}": e for side, e in zip(("inner", "outer"), edges, strict=True)
                }
            self._show_histograms(trainer, spectra)
        if draw:
            self._drawn = trainer.global_step
            metrics |= self._by_expert(spectra, "effective_rank", spectra.effective_rank)
            loads = {} if self._reader is None else self._reader.read(trainer)  # a single expert gives all tokens the same rank
            self._ranks = TokenRanks.of(spectra, loads)
            metrics |= self._ranks.metrics()
        if metrics:
            log_now(trainer, metrics)
        return spectra

    def _by_expert(self, spectra: ModelSpectra, name: str, values: Tensor) -> dict[str, float]:
        """Return a measure (layers, E) by tag; it may lack the shared expert."""
        rows = {f"spectrum/{name}": values.mean(0)}
        if self.detailed:
            rows |= {f"spectrum_layers/{layer}/{name}": row for layer, row in zip(self._experts, values, strict=True)}
        metrics: dict[str, float] = {}
        for tag, row in rows.items():
            metrics |= {f"{tag}/{expert}": float(value) for expert, value in zip(spectra.names, row, strict=False)}
        return metrics

    def _show_histograms(self, trainer: L.Trainer, spectra: ModelSpectra) -> None:
        for board in tensorboards(trainer):
            for expert, magnitude in zip(spectra.names, spectra.magnitudes, strict=True):
                board.add_histogram(f"spectrum/magnitude/{expert}", magnitude, logged_step(trainer))

    def _figures(self, spectra: ModelSpectra, step: int) -> dict[str, Figure]:
        """Draw figures by tag."""
        title = f"step {step}"
        assert self._ranks is not None
        figures = {
            "spectrum/rings": rings(spectra, self._shown, title),
            "spectrum/radial_occupancy": radial_occupancy(spectra, title),
            "spectrum/overlap": overlap(spectra, title),
        }
        if self._ranks.by_task:
            figures["spectrum/token_rank"] = self._ranks.figure(title)
        return figures
