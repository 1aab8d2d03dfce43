"""A loss or weight that is not finite ends the run at once, and no checkpoint is replaced by a bad one."""

import lightning as L
import pytest
import torch
from support.killed_runs import fit, in_two_processes

from lightning_modules import AdaptationModule
from lightning_modules.cli import user_error
from lightning_modules.interruption import read_checkpoint


class Spoil(L.Callback):
    """Make one trained weight nan before the batch with this number."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            with torch.no_grad():
                pl_module.task.model.head.bias[0] = float("nan")


class SpoilImage(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            batch["image"][0, 0, 0, 0] = float("inf")


def mistake(tmp_path, *callbacks):
    with pytest.raises(ValueError) as error:
        fit(tmp_path, *callbacks, num_workers=0, accumulate_grad_batches=1, max_epochs=1)
    assert user_error(error.value) is error.value
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_nan_weight_is_named_at_its_step_with_the_learning_rates(tmp_path):
    message = mistake(tmp_path, Spoil(2))
    assert "the loss is not finite at step 2 of epoch 0: task loss nan, balance loss 0.01" in message
    assert "these trained weights are not finite: task.model.head.bias" in message
    assert "now at most: experts 0.05, router 0.05, head 0.01" in message
    assert read_checkpoint(tmp_path / "newest.ckpt")["global_step"] == 2


@pytest.mark.filterwarnings("ignore")
def test_bad_example_is_named_where_the_weights_are_well(tmp_path):
    message = mistake(tmp_path, SpoilImage())
    assert "at step 2 of epoch 0: task loss nan" in message
    assert "all trained weights are finite, so look at the batch (ids train/" in message
    assert all(bool(value.isfinite().all()) for value in read_checkpoint(tmp_path / "newest.ckpt")["state_dict"].values())


def test_bad_example_of_one_of_two_processes_ends_both_before_a_weight_is_touched(tmp_path):
    statuses, _ = in_two_processes(tmp_path, SpoilImage(), accumulate_grad_batches=1, max_epochs=1)
    logs = [(tmp_path / f"log_{rank}.txt").read_text() for rank in range(2)]
    assert statuses == [70, 70], logs
    assert "UserError: the loss is not finite at step 2 of epoch 0 on another process; see its message for the cause" in logs[0]
    assert "at step 2 of epoch 0: task loss nan" in logs[1]
    state = read_checkpoint(tmp_path / "newest.ckpt")
    assert state["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())


@pytest.mark.filterwarnings("ignore")
def test_step_that_breaks_the_weights_does_not_replace_the_good_checkpoint(tmp_path, monkeypatch):
    def break_weights(self, *_):
        if self.global_step == 2:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(AdaptationModule, "on_before_optimizer_step", break_weights)
    message = mistake(tmp_path)
    assert "no checkpoint is written at step 3 of epoch 0, since these trained weights are not finite: " in message
    assert " and " in message
    assert read_checkpoint(tmp_path / "newest.ckpt")["global_step"] == 2
