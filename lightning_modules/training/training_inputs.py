"""Measures the adapters' inputs (`normalize_input: moments`) on the first training batches, before anything is trained."""

from __future__ import annotations

from itertools import islice

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from fourier_moe import measure_inputs
from fourier_moe.models.input_moments import unmeasured
from lightning_modules.tasks import Task

NUM_BATCHES = 16  # of all processes together


def measure_training_inputs(trainer: L.Trainer, task: Task) -> None:
    """Measure what has not been measured; a resumed run and one that starts from an adapter file have it.

    The moments are those of the pretrained model. Neither the order of the training data nor random numbers change.
    """
    assert task.model is not None
    if not unmeasured(task.model):
        return
    trainer.fit_loop.setup_data()
    if trainer.train_dataloader is None:  # limit_train_batches=0: there is nothing to measure, and nothing is trained
        return
    count = int(min(-(-NUM_BATCHES // trainer.world_size), trainer.num_training_batches))
    rank_zero_info(f"measuring the adapters' inputs on {count} training batches")
    with isolate_rng(), trainer.precision_plugin.forward_context():
        batches = islice(iter(trainer.train_dataloader), count)
        on_device = (trainer.strategy.batch_to_device(batch) for batch in batches)
        measure_inputs(task.model, on_device, task.loss, task.token_mask)
