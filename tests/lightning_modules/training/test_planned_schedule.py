"""Learning rates over the steps that a run takes: accumulation that changes, resumed and extended runs, uneven epochs."""

import math
import warnings

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from support.token_task import TokenData, token_batch, token_module, token_trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.optimization import Optimization, ParameterGroup

COSINE = Optimization(experts=ParameterGroup(1.0), head=ParameterGroup(0.01), schedule="cosine", warmup_ratio=0.0)
ACCUMULATION = {0: 1, 1: 4, 2: 2}


class Batches(L.LightningDataModule):
    """As many batches in each epoch as it is told."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers

    def train_dataloader(self):
        number = self.numbers[min(self.trainer.current_epoch, len(self.numbers) - 1)]
        return DataLoader([token_batch(4, seed=seed) for seed in range(number)], batch_size=None)

    val_dataloader = TokenData.val_dataloader
    _loader = TokenData._loader


class Rates(L.Callback):
    """The experts' rate in every step, and how many batches it was of."""

    def __init__(self):
        self.values, self.batches, self.frozen = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.frozen.append(not module.model.norm.training)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append(optimizer.param_groups[0]["lr"])
        self.batches.append(trainer.accumulate_grad_batches)


def fit(directory, data, *callbacks, checkpoint=None, **options):
    rates = Rates()
    trainer = token_trainer(directory, rates, *callbacks, **options)
    trainer.fit(token_module(optimization=COSINE), data, ckpt_path=checkpoint)
    return rates


def cosine(*steps, of):
    return pytest.approx([(1 + math.cos(math.pi * step / of)) / 2 for step in steps], abs=1e-9)


def test_accumulation_that_changes_between_epochs_ends_the_schedule_at_the_last_step(tmp_path):
    """6 batches an epoch: 6 steps, 2 (4 batches and 2) and 3."""
    scheduler = GradientAccumulationScheduler(dict(ACCUMULATION))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(epoch|learning rates|When using)")
        rates = fit(tmp_path, Batches(6), scheduler, max_epochs=3)
    assert rates.batches == [1] * 6 + [4] * 2 + [2] * 3
    assert rates.values == cosine(*range(11), of=11)


def test_resumed_run_accumulates_and_freezes_as_the_uninterrupted_one_also_within_an_epoch(tmp_path):
    """Lightning calls on_train_epoch_start, which sets both, at the beginning of an epoch alone."""

    def scheduler():
        return GradientAccumulationScheduler(dict(ACCUMULATION))

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, Batches(6), scheduler(), saving, max_epochs=3, enable_checkpointing=True)
    for stop in (2, 6, 7, 9):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(epoch|learning rates)")
            rest = fit(tmp_path, Batches(6), scheduler(), max_epochs=3, checkpoint=tmp_path / f"step={stop}.ckpt")
        assert rest.values == pytest.approx(whole.values[stop:], abs=1e-12)
        assert rest.batches == whole.batches[stop:]
        assert all(rest.frozen)


def test_finished_run_that_is_extended_takes_its_first_step_at_the_longer_schedules_rate(tmp_path):
    saving = ModelCheckpoint(tmp_path, "finished", save_on_train_epoch_end=True)
    fit(tmp_path, Batches(3), saving, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"continue at 0\.25 of their peaks, not at 0 as .* covers 9 .*, of which 6"):
        rates = fit(tmp_path, Batches(3), max_epochs=3, checkpoint=tmp_path / "finished.ckpt")
    assert rates.values == cosine(6, 7, 8, of=9)


def test_run_resumed_with_other_batches_ends_its_schedule_at_its_last_step(tmp_path):
    """Half of the batches from the second epoch on, as on twice as many processes: 6 steps are done, 3 and 3 are to come."""
    saving = ModelCheckpoint(tmp_path, "first", save_on_train_epoch_end=True, every_n_epochs=1)
    fit(tmp_path, Batches(6), saving, max_epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="covers 12 optimizer steps, of which 6 are done"):
        rates = fit(tmp_path, Batches(3), max_epochs=3, checkpoint=tmp_path / "first.ckpt")
    assert rates.values == cosine(*range(6, 12), of=12)


def test_epochs_of_different_sizes_are_said_and_the_schedule_ends_at_the_last_step(tmp_path):
    with pytest.warns(UserWarning, match="epoch 1 has another number .* now covers 8 optimizer steps, before 12"):
        rates = fit(tmp_path, Batches(4, 2), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert rates.values == [*cosine(0, 1, 2, 3, of=12).expected, *cosine(4, 5, 6, 7, of=8).expected]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 8}, 8),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
        ({"max_epochs": 2, "val_check_interval": 2}, 12),
    ],
    ids=str,
)
def test_whatever_limits_a_run_its_schedule_ends_with_it(tmp_path, options, steps):
    rates = fit(tmp_path, Batches(6), **options)
    assert rates.values == cosine(*range(steps), of=steps)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(token_batch(4, seed=seed) for seed in range(6))


class StreamedBatches(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=None)


def test_training_set_without_length_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match=r"number of optimizer steps is unknown.* set trainer\.max_steps"):
        fit(tmp_path, StreamedBatches(), max_epochs=2)
    assert fit(tmp_path, StreamedBatches(), max_epochs=2, max_steps=9).values == cosine(*range(9), of=9)
