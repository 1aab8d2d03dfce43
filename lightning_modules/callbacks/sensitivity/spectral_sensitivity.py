"""SpectralSensitivity: the frequencies at which the loss is sensitive to each adapted projection, before training."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from fourier_moe import Adapter, FourierMoEConfig, adapters, is_quantized
from fourier_moe.analysis.sensitivity import Sensitivity, dense_gradients, measure
from fourier_moe.errors import UserError
from fourier_moe.models.projection import weight_matrix
from lightning_modules.adaptation import AdaptationModule
from lightning_modules.callbacks.any_module import adaptation_module
from lightning_modules.callbacks.sensitivity.sensitivity_report import FROZEN, GRADIENT, UPDATE, SensitivityReport, gradient_of
from lightning_modules.run_directory import run_directory

Batch = Mapping[str, Any]


class SpectralSensitivity(L.Callback):
    """When training starts, measure the spectrum of the loss's gradient with respect to each adapted projection's dense update.

    The spectra of the frozen weights, and of each task's gradient if batches name several tasks, are measured too. A table,
    curves and a verdict are written to `<run directory>/sensitivity`. The model is in evaluation mode then.
    Training does not change, except that workers of the DataLoader (`num_workers` above 0) advance their random augmentation.
    `python train.py analyze` is this callback without the training.

    Args:
        num_batches: number of training batches over which the gradient is summed.
        permutations: number of random reorderings of rows and columns, the control.
        num_bins: number of bins of the radius.
        memory_gib: memory for gradients in GiB. If it does not hold those of all projections and tasks at once, the same
            batches are read several times, for one projection at a time if necessary.
        full_weights: file of a fully fine-tuned model of the same architecture, whose W1 - W0 is measured too: a checkpoint or
            an `adapter.safetensors` of FullFineTuning, or any state dict.
        directory: output directory; null for `<run directory>/sensitivity`.
        stop: whether to end before training.

    Raises:
        UserError: for an impossible value, a missing file, several devices, or an adapter other than FourierMoE.
    """

    def __init__(
        self,
        num_batches: int = 16,
        permutations: int = 20,
        num_bins: int = 32,
        memory_gib: float = 4.0,
        full_weights: str | None = None,
        directory: str | None = None,
        stop: bool = False,
    ) -> None:
        for name, value, least in (
            ("num_batches", num_batches, 1),
            ("permutations", permutations, 2),
            ("num_bins", num_bins, 2),
        ):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if not memory_gib > 0:
            raise UserError(f"memory_gib={memory_gib} must be positive")
        if full_weights is not None and not Path(full_weights).is_file():
            raise UserError(f"full_weights={full_weights!r} does not exist; give a checkpoint or a safetensors file")
        self.num_batches, self.permutations, self.num_bins = num_batches, permutations, num_bins
        self.memory_gib, self.full_weights, self.directory, self.stop = memory_gib, full_weights, directory, stop
        self.report: SensitivityReport | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        adapter = adaptation_module(pl_module, self).adapter
        if not isinstance(adapter, FourierMoEConfig):
            raise UserError(f"SpectralSensitivity needs a FourierMoEConfig adapter, got {type(adapter).__name__}")
        if trainer.world_size > 1:
            raise UserError(f"SpectralSensitivity runs on one device, got {trainer.world_size}; set trainer.devices to 1")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = adaptation_module(pl_module, self)
        config = module.adapter
        assert isinstance(config, FourierMoEConfig)
        projections = adapters(module.model)
        full_weights = None if self.full_weights is None else _full_weights(self.full_weights, projections)
        with isolate_rng():
            batches = list(islice(iter(trainer.train_dataloader), self.num_batches))  # type: ignore[arg-type]
        modes = {part: part.training for part in module.modules()}
        module.eval()
        results: dict[tuple[str, str], Sensitivity] = {}
        for (source, name), matrix in self._matrices(trainer, module, projections, batches, full_weights):
            results[source, name] = measure(
                matrix, strongest=config.num_coefficients, permutations=self.permutations, num_bins=self.num_bins
            )
        for part, mode in modes.items():
            part.training = mode
        self.report = SensitivityReport(results, config)
        directory = Path(self.directory) if self.directory else run_directory(trainer) / "sensitivity"
        self.report.write(directory)
        print(f"\n{self.report}\n\nWritten to {directory}")
        trainer.should_stop = self.stop

    def _matrices(
        self,
        trainer: L.Trainer,
        module: AdaptationModule,
        projections: Mapping[str, Adapter],
        batches: Sequence[Batch],
        full_weights: Mapping[str, Tensor] | None,
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield every matrix (M, N) to measure with (source, name of the projection), few at a time."""
        by_task: dict[str, list[tuple[Batch, float]]] = {}
        for batch in batches:
            for task, part in split_by_task(batch).items():
                by_task.setdefault(task, []).append((part, float(len(part["id"]))))

        def loss(batch: Batch) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return module.task.loss(trainer.strategy.batch_to_device(batch))

        for group in group_by_memory(projections, self.memory_gib * 2**30 / (len(by_task) + 1)):
            gradients = {task: dense_gradients(group, loss, parts) for task, parts in by_task.items()}
            for name in group:
                matrices = {task: gradients[task].pop(name) for task in by_task}
                yield (GRADIENT, name), functools.reduce(torch.add, matrices.values())
                if len(matrices) > 1:
                    yield from (((gradient_of(task), name), matrix) for task, matrix in matrices.items())
        for name, adapter in projections.items():
            frozen = _frozen_weight(adapter)
            if frozen is not None:
                yield (FROZEN, name), frozen
                if full_weights is not None:
                    yield (UPDATE, name), _update(name, full_weights[name].to(frozen), frozen)


def split_by_task(batch: Batch) -> dict[str, Batch]:
    """Split a batch into one per task; a batch that names no tasks stays one, called ''."""
    tasks = batch.get("task")
    if tasks is None:
        return {"": batch}
    size = len(tasks)
    parts: dict[str, Batch] = {}
    for task in dict.fromkeys(tasks):
        rows = [row for row, other in enumerate(tasks) if other == task]
        parts[task] = {key: _rows(value, rows) if len(value) == size else value for key, value in batch.items()}
    return parts


def _rows(values: Any, rows: list[int]) -> Any:
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]


def group_by_memory(projections: Mapping[str, Adapter], num_bytes: float) -> Iterator[dict[str, Adapter]]:
    """Yield projections in their order, in groups whose float32 gradients fit in `num_bytes`, at least one in each."""
    group: dict[str, Adapter] = {}
    used = 0.0
    for name, adapter in projections.items():
        size = 4.0 * adapter.out_features * adapter.in_features
        if group and used + size > num_bytes:
            yield group
            group, used = {}, 0.0
        group[name] = adapter
        used += size
    yield group


def _frozen_weight(adapter: Adapter) -> Tensor | None:
    """Return W0 (M, N) in float32; None if it is quantized."""
    return None if is_quantized(adapter.base) else weight_matrix(adapter.base).float()


def _update(name: str, full: Tensor, frozen: Tensor) -> Tensor:
    if full.shape != frozen.shape or torch.equal(full, frozen):
        problem = "is unchanged" if full.shape == frozen.shape else f"is {tuple(full.shape)}, not {tuple(frozen.shape)}"
        raise UserError(f"full_weights: the weight of {name} {problem}; give the weights after full fine-tuning of this model")
    return full - frozen


def _full_weights(path: str, projections: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Load W1 of every projection, by name, from a state dict in which attention may still be fused."""
    from safetensors.torch import load_file

    state: Mapping[str, Any]
    if path.endswith(".safetensors"):
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    state = {key.removeprefix("task.model."): value for key, value in state.items()}
    weights = {}
    for name in projections:
        parent, _, last = name.rpartition(".")
        fused = state.get(f"{parent}.in_proj_weight")
        if f"{name}.weight" in state:
            weights[name] = state[f"{name}.weight"]
        elif fused is not None and last in ("q_proj", "k_proj", "v_proj"):
            weights[name] = fused.chunk(3)[("q_proj", "k_proj", "v_proj").index(last)]
        else:
            raise UserError(f"full_weights={path!r} has no {name}.weight; give the weights of a fully fine-tuned model")
    return weights
