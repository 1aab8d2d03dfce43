"""Weight averaging: what was validated is what is written, and a run continues with both sets of weights."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from support.processes import run_in_two
from support.sharded_runs import AddAsTwoProcessesDo, fit
from support.token_task import TokenData, token_module, token_trainer
from torch import nn

from fourier_moe import FullFineTuning, adapter_state_dict, describe_adapter
from lightning_modules.callbacks import AdapterCheckpoint
from lightning_modules.interruption import read_checkpoint
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.training.weight_averaging import _trained

DECAY = 0.5
FULL = {"adapter": FullFineTuning(), "optimization": Optimization(backbone=ParameterGroup(0.1), head=ParameterGroup(0.1))}


class Weights(AdapterCheckpoint):
    """Notes what is trained after every step, and what a validation begins and ends with."""

    def __init__(self):
        super().__init__()
        self.steps, self.validated, self.losses = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(weights(module))

    def on_validation_start(self, trainer, module):
        self.validated.append(weights(module))

    def on_validation_end(self, trainer, module):
        assert same(weights(module), self.validated[-1])
        self.losses.append(float(trainer.callback_metrics["val/loss"]))
        super().on_validation_end(trainer, module)


def weights(module):
    return {key: value.clone() for key, value in adapter_state_dict(module.model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def trained_in(directory, epochs=3, checkpoint=None, average=None, module=None):
    """A run of 3 steps an epoch: module, notes, and the checkpoint of every epoch."""
    module = module or token_module()
    notes = Weights()
    saving = ModelCheckpoint(directory, "{step}", save_top_k=-1, save_last=False)
    average = [average or EMAWeightAveraging(decay=DECAY)] if average is not False else []
    # The average is given last: it has to be the first to act all the same.
    trainer = token_trainer(directory, notes, saving, *average, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, TokenData(), ckpt_path=checkpoint)
    return module, notes, trainer


def expected_average(steps, decay=DECAY):
    average = copy.deepcopy(steps[0])
    for step in steps[1:]:
        for key, value in step.items():
            if value.is_floating_point() and not key.endswith(("frequencies", "num_batches_tracked")):
                average[key] = decay * average[key] + (1 - decay) * value
    return average


def read(directory):
    module = token_module(adapter_path=str(directory))
    module.configure_model()
    return weights(module)


def test_validated_written_and_final_weights_are_the_average(tmp_path):
    module, notes, trainer = trained_in(tmp_path)
    average = expected_average(notes.steps)
    assert not same(average, notes.steps[-1])
    final = weights(module)
    for key, value in average.items():
        torch.testing.assert_close(final[key], value, rtol=1e-5, atol=1e-6)
    assert same(final, notes.validated[-1])
    assert same(final, read(tmp_path / "adapter_last"))
    scored = float(trainer.callback_metrics["val/loss"])
    (again,) = trainer.validate(token_module(adapter_path=str(tmp_path / "adapter_last")), TokenData(), verbose=False)
    assert again["val/loss"] == scored
    (checkpointed,) = trainer.validate(module, TokenData(), ckpt_path=last_checkpoint(tmp_path), verbose=False)
    assert checkpointed["val/loss"] == scored


def last_checkpoint(directory):
    return str(max(directory.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2])))


def test_best_adapter_is_the_average_that_was_validated_then(tmp_path):
    _, notes, _ = trained_in(tmp_path)
    best = describe_adapter(tmp_path / "adapter").metrics["val/loss"]
    assert same(read(tmp_path / "adapter"), notes.validated[notes.losses.index(best)])
    assert len(set(notes.losses)) == len(notes.losses) == 4  # before training, and after every epoch


def test_training_itself_is_that_of_a_run_without_averaging(tmp_path):
    _, notes, _ = trained_in(tmp_path / "with")
    _, others, _ = trained_in(tmp_path / "without", average=False)
    assert len(notes.steps) == len(others.steps)
    assert all(same(one, other) for one, other in zip(notes.steps, others.steps, strict=True))


@pytest.mark.parametrize("options", [{}, FULL], ids=["FourierMoE", "FullFineTuning"])
def test_resumed_run_has_both_sets_of_weights_to_the_bit_and_no_frozen_ones(tmp_path, options):
    module, notes, _ = trained_in(tmp_path / "straight", module=token_module(**options))
    first = min((tmp_path / "straight").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    stored = read_checkpoint(first)
    assert stored["state_dict"].keys() == {f"task.model.{key}" for key in weights(module)}
    averaged = {key.removeprefix("task.model.") for key in stored["callbacks"]["WeightAverage"]["current"]}
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert averaged - trained <= {"norm.running_mean", "norm.running_var"}
    assert trained <= averaged
    assert ("norm.running_mean" in averaged) == bool(options)
    assert not {"current_model_state", "averaging_state"} & stored.keys()
    resumed, others, _ = trained_in(tmp_path / "resumed", checkpoint=str(first), module=token_module(**options))
    assert len(others.steps) == len(notes.steps) * 2 // 3
    assert all(same(one, other) for one, other in zip(notes.steps[-len(others.steps) :], others.steps, strict=True))
    assert same(weights(resumed), weights(module))


def test_run_without_averaging_does_not_go_on_from_an_average(tmp_path):
    trained_in(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"of a run with weight averaging; add its callback .*--model.adapter_path"):
        trained_in(tmp_path, average=False, checkpoint=last_checkpoint(tmp_path))


def test_average_may_begin_with_the_checkpoint_of_a_run_without(tmp_path, recwarn):
    trained_in(tmp_path / "one", epochs=1, average=False)
    module, notes, _ = trained_in(tmp_path / "two", epochs=2, checkpoint=last_checkpoint(tmp_path / "one"))
    assert any("the average starts from its weights" in str(warning.message) for warning in recwarn)
    average = expected_average(notes.steps)
    torch.testing.assert_close(weights(module)["head.weight"], average["head.weight"], rtol=1e-5, atol=1e-6)


class FromStepTwo(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 2


class Late(WeightAveraging):
    def on_train_end(self, trainer, pl_module):
        pass


def test_rule_of_one_s_own_decides_when_and_nothing_else(tmp_path):
    module, notes, _ = trained_in(tmp_path, average=FromStepTwo())
    expected = sum(step["head.weight"] for step in notes.steps[2:]) / len(notes.steps[2:])
    torch.testing.assert_close(weights(module)["head.weight"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Late overrides on_train_end; of WeightAveraging only should_update"):
        trained_in(tmp_path / "late", average=Late())
    with pytest.raises(ValueError, match="2 WeightAveraging callbacks; keep one"):
        token_trainer(tmp_path / "two", EMAWeightAveraging(), FromStepTwo()).fit(token_module(), TokenData())


def test_shared_weights_are_averaged_under_all_their_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad = False
    holder, names = _trained(model, batch_statistics=True)
    assert names == [["0.weight", "1.weight"], ["0.bias"], ["2.weight"], ["2.bias"], ["2.running_mean"], ["2.running_var"]]
    assert next(holder.parameters()) is model[0].weight
    assert len(_trained(model, batch_statistics=False)[1]) == 4


def of_two(directory, checkpoint):
    found = {kind: fit(directory / kind, kind, EMAWeightAveraging(decay=DECAY), max_epochs=2) for kind in ("ddp", "fsdp")}
    average = EMAWeightAveraging(decay=DECAY)
    return found | {"resumed": fit(directory / "resumed", "fsdp", average, max_epochs=2, checkpoint=checkpoint)}


@pytest.mark.slow
def test_ddp_and_fsdp_average_as_one_process_does_to_the_bit(tmp_path):
    every_epoch = ModelCheckpoint(tmp_path / "epochs", "{step}", save_top_k=-1)
    summing = AddAsTwoProcessesDo()
    _, one = fit(tmp_path / "one", "auto", summing, EMAWeightAveraging(decay=DECAY), every_epoch, max_epochs=2)
    first, second = run_in_two(of_two, tmp_path, tmp_path / "epochs/step=5.ckpt")
    for kind in ("ddp", "fsdp", "resumed"):
        assert same(first[kind][1], one), kind
        assert same(second[kind][1], one), kind
