"""fit measures the adapters' inputs once, without padding, before anything runs (two processes: test_same_training.py)."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.token_task import ADAPTER, RATES, TokenData, token_batch, token_module, token_trainer

import lightning_modules.training.training_inputs as training_inputs
from fourier_moe import LoRAConfig, adapter_state_dict, adapters
from lightning_modules.optimization import Optimization, ParameterGroup

MOMENTS = replace(ADAPTER, normalize_input="moments")
LORA = LoRAConfig(targets=["q_proj", "v_proj"], r=2, normalize_input="moments")
LORA_RATES = Optimization(adapter=ParameterGroup(0.1), head=ParameterGroup(0.01), schedule="constant", warmup_ratio=0.0)


@pytest.mark.parametrize("sanity_steps", [0, 1])
@pytest.mark.parametrize(("adapter", "rates"), [(MOMENTS, RATES), (LORA, LORA_RATES)], ids=["fourier_moe", "lora"])
def test_moments_are_those_of_the_pretrained_model_on_training_tokens_without_padding(tmp_path, adapter, rates, sanity_steps):
    module = token_module(adapter, rates)
    token_trainer(tmp_path, num_sanity_val_steps=sanity_steps, max_epochs=2).fit(module, TokenData())
    batches = [token_batch(seed=seed) for seed in (0, 1, 2)]
    x = torch.cat([module.model.embedding(batch["tokens"])[batch["mask"]] for batch in batches]).double()
    moments = adapters(module.model)["q_proj"].input_moments
    torch.testing.assert_close(moments.mean.double(), x.mean(0), rtol=1e-6, atol=1e-6)
    std = x.std(0, correction=0)
    torch.testing.assert_close(moments.scale.double(), x.square().mean().sqrt() / std, rtol=1e-5, atol=0)


def test_a_resumed_run_and_one_that_starts_from_an_adapter_do_not_measure_again(tmp_path, monkeypatch):
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = token_module(MOMENTS)
    token_trainer(tmp_path, saving, max_epochs=2, enable_checkpointing=True).fit(module, TokenData())
    expected = adapter_state_dict(module.model)
    module.save_adapter(tmp_path / "adapter", {})

    monkeypatch.setattr(training_inputs, "measure_inputs", None)
    resumed = token_module(MOMENTS)
    token_trainer(tmp_path / "2", max_epochs=2).fit(resumed, TokenData(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(value, expected[key]) for key, value in adapter_state_dict(resumed.model).items())
    again = token_module(MOMENTS, adapter_path=str(tmp_path / "adapter"))
    token_trainer(tmp_path / "3").fit(again, TokenData())
    key = "q_proj.input_moments.scale"
    assert torch.equal(adapter_state_dict(again.model)[key], expected[key])
