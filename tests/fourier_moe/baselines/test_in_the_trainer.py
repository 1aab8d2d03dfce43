"""What the trainer does for these methods: KaSA's penalty, LoRA-Dash's steps, resuming, groups of parameters, overlays."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.token_task import TokenData, token_module, token_trainer

import datamodules.images.data_module
from datamodules.images.transforms import eval_transform
from fourier_moe import FourierFTConfig, KaSAConfig, LoRAConfig, LoRADashConfig, adapter_state_dict, adapters, regularization
from lightning_modules.optimization import Optimization, ParameterGroup

RATES = Optimization(adapter=ParameterGroup(0.05), head=ParameterGroup(0.01), schedule="constant", warmup_ratio=0.0)
KASA = KaSAConfig(targets=["q_proj", "v_proj"], r=4, beta=0.3, gamma=0.2)
DASH = LoRADashConfig(targets=["q_proj", "v_proj"], r=4, num_directions=4, start=3)


def test_kasa_penalty_is_part_of_the_loss_and_is_logged(tmp_path):
    logged = {}

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})
                logged["returned"] = float(outputs["loss"])

    module = token_module(KASA, RATES)
    module.configure_model()
    expected = float(regularization(module.model))
    assert expected > 0.3
    token_trainer(tmp_path, Losses()).fit(module, TokenData())
    assert logged["train/regularization"] == pytest.approx(expected)
    assert logged["train/total_loss"] == pytest.approx(logged["train/loss"] + expected)
    assert logged["returned"] == logged["train/total_loss"]


def test_method_without_a_penalty_logs_none(tmp_path):
    trainer = token_trainer(tmp_path)
    trainer.fit(token_module(LoRAConfig(targets=["q_proj"], r=2), RATES), TokenData())
    assert {name for name in trainer.callback_metrics if name.startswith("train/")} == {"train/loss"}


def steps_of(module):
    return [int(adapter.steps) for adapter in adapters(module.model).values()]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (3, 2)])
def test_lora_dash_counts_optimizer_steps_and_no_batches_nor_evaluations(tmp_path, accumulate, steps):
    module = token_module(DASH, RATES)
    trainer = token_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)  # three batches, one of validation
    trainer.fit(module, TokenData())
    trainer.test(module, TokenData())
    assert trainer.global_step == steps
    assert steps_of(module) == [steps, steps]
    chosen = [bool(adapter.U.any()) for adapter in adapters(module.model).values()]
    assert chosen == [steps >= 3] * 2
    assert all(bool(adapter.t.any()) == (steps > 3) for adapter in adapters(module.model).values())


def test_lora_dash_resumes_from_a_checkpoint_before_and_after_its_choice(tmp_path):
    config = replace(DASH, start=5)
    whole = token_module(config, RATES)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    token_trainer(tmp_path, keep, max_epochs=3, enable_checkpointing=True).fit(whole, TokenData())
    expected = adapter_state_dict(whole.model)
    for step in (3, 6):
        resumed = token_module(config, RATES)
        token_trainer(tmp_path, max_epochs=3).fit(resumed, TokenData(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert steps_of(resumed) == [9, 9]
        found = adapter_state_dict(resumed.model)
        assert {name: torch.equal(value, found[name]) for name, value in expected.items()} == dict.fromkeys(found, True)


@pytest.mark.slow
def test_every_method_trains_the_demo_further_than_the_head_alone(run):
    losses = {}
    for overlay in ("head_only", "kasa", "milora", "lora_dash", "toplora", "melora"):
        words = ("--config", "configs/demo.yaml", "--config", f"configs/adapters/{overlay}.yaml", "--trainer.callbacks", "null")
        rate = () if overlay == "head_only" else ("--model.optimization.adapter.lr", "1e-2")
        start = ("--model.adapter.start", "5") if overlay == "lora_dash" else ()
        once = ("--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0")
        fitted = run("fit", *words, *rate, *start, *once)
        losses[overlay] = float(fitted.trainer.callback_metrics["val/loss"])
    alone = losses.pop("head_only")
    assert {overlay: loss < 0.99 * alone for overlay, loss in losses.items()} == dict.fromkeys(losses, True), (losses, alone)


def test_pissa_resumes_to_the_weights_of_an_uninterrupted_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodules.images.data_module, "train_transform", eval_transform)
    words = ("--config", "configs/demo.yaml", "--config", "configs/adapters/pissa.yaml", "--trainer.limit_train_batches", "3")
    words += ("--trainer.limit_val_batches", "1", "--model.optimization.schedule", "constant")
    whole = run("fit", *words, "--trainer.max_epochs", "2")
    assert {group["name"] for group in whole.trainer.optimizers[0].param_groups} == {"adapter", "head"}
    run("fit", *words, "--trainer.max_epochs", "1", "--trainer.logger.init_args.name", "part")
    last = tmp_path / "part/version_0/checkpoints/last.ckpt"
    resumed = run("fit", *words, "--trainer.max_epochs", "2", "--ckpt_path", str(last))
    expected = whole.model.model.state_dict()
    assert resumed.trainer.global_step == 6
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.model.state_dict().items())


def test_adapter_parameters_without_a_group_are_refused_before_training(run):
    lora = ("--config", "configs/demo.yaml", "--config", "configs/adapters/lora.yaml")
    with pytest.raises(ValueError, match=r"optimization\.adapter is missing, but LoRAConfig trains adapter parameters"):
        run("fit", *lora, "--model.optimization.adapter", "null")
    with pytest.raises(ValueError, match=r"optimization\.experts is given, but LoRAConfig trains no experts"):
        run("fit", *lora, "--model.optimization.experts.lr", "0.1")


def test_fourierft_overlay_takes_the_coefficients_and_targets_of_the_config_it_lies_on(run):
    words = ("--config", "configs/demo.yaml", "--config", "configs/adapters/fourierft.yaml", "--trainer.max_steps", "1")
    adapter = run("fit", *words, "--trainer.limit_val_batches", "0", "--seed_everything", "7").model.adapter
    assert adapter == FourierFTConfig(targets=["q_proj", "v_proj"], num_coefficients=512, scaling=150, seed=7)
