"""A run that is resumed on the GPU ends with the same bits as one that was not interrupted, dropout included."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Record, unequal
from benchmarks.machine import environment
from benchmarks.methods import product_paths
from benchmarks.models import MODELS, build_model
from fourier_moe.spectral.kernels import OPT_IN

_STEPS, _SAVED = 6, 3


def measure(device: torch.device, tiny: bool, record: Record) -> None:
    """Fill the record; see benchmarks/README.md."""
    paths = product_paths(device.type)
    for path, switch in paths.items():
        with environment({OPT_IN: switch}), record.attempt(f"{path}: resumed"), tempfile.TemporaryDirectory() as directory:
            first, _ = _fit(Path(directory) / "first", device, tiny)
            again, _ = _fit(Path(directory) / "again", device, tiny)
            record.check(f"{path}: numbers that differ between two runs", unequal(first, again))
            checkpoint = next((Path(directory) / "first").rglob(f"*step={_SAVED}.ckpt"))
            resumed, steps = _fit(Path(directory) / "resumed", device, tiny, checkpoint)
            record.check(f"{path}: numbers that differ after resuming", unequal(first, resumed))
            record.check(f"{path}: resumed at the wrong step", abs(steps - (_STEPS - _SAVED)), note=f"{steps} steps")


def _fit(directory: Path, device: torch.device, tiny: bool, checkpoint: Path | None = None) -> tuple[list[Tensor], int]:
    """Train; return what was trained with the random state of the device at the end, and the number of training steps."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader
    from torchmetrics import MetricCollection

    from fourier_moe import FourierMoEConfig
    from lightning_modules import AdaptationModule  # needs the libraries of all tasks
    from lightning_modules.optimization import Optimization, ParameterGroup
    from lightning_modules.tasks import Evaluation, Task

    entry = MODELS["tiny" if tiny else "roberta-large"]
    steps: list[Any] = []

    class Classification(Task):
        """A random RoBERTa."""

        head_names = ("head",)
        main_metric = "loss"

        def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> nn.Module:
            self.model = build_model(entry, 1 if tiny else 4, torch.device("cpu"), torch.float32)
            return self.model

        def loss(self, batch: Any) -> Tensor:
            assert self.model is not None
            steps.append(batch["id"])
            return nn.functional.cross_entropy(self.model(batch["inputs"]).float(), batch["label"])

        def new_metrics(self) -> MetricCollection:
            return MetricCollection({})

        def evaluate(self, batch: Any) -> Evaluation:
            raise NotImplementedError

        def predict(self, batch: Any) -> list[dict[str, Any]]:
            raise NotImplementedError

    # Every batch is the same: only the random state and the optimizer's tell the steps apart.
    inputs = torch.randint(5, entry.vocabulary, (2, 8) if tiny else (16, 128), generator=torch.Generator().manual_seed(0))
    batch = {"id": [str(row) for row in range(len(inputs))], "inputs": inputs, "label": inputs[:, 0] % 2}
    batches: Any = [batch] * _STEPS
    L.seed_everything(0, verbose=False)
    adapter = FourierMoEConfig(
        targets=entry.targets, num_coefficients=entry.num_coefficients, num_experts=4, dropout=0.2, seed=0
    )
    group = ParameterGroup(0.02)
    module = AdaptationModule(Classification(), adapter, Optimization(experts=group, router=group, head=group), num_classes=2)
    trainer = L.Trainer(
        default_root_dir=directory,
        callbacks=[ModelCheckpoint(directory, "{step}", every_n_train_steps=_SAVED, save_top_k=-1)],
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        deterministic=True,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
    finally:
        torch.use_deterministic_algorithms(False)
    trained = [parameter.detach().cpu() for parameter in module.parameters() if parameter.requires_grad]
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return [*trained, state], len(steps)
