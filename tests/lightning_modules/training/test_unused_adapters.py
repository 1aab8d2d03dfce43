"""Adapters that training does not reach: none is refused in the first step, some are named after the first epoch."""

import warnings

import pytest
from support.token_task import ADAPTER, RATES, TokenData, token_module, token_trainer
from torch import nn

from fourier_moe import KaSAConfig, LoRAConfig
from lightning_modules.optimization import Optimization, ParameterGroup

LORA = LoRAConfig(targets=["q_proj", "v_proj"], r=2)
LORA_RATES = Optimization(adapter=ParameterGroup(0.1), head=ParameterGroup(0.01), schedule="constant", warmup_ratio=0.0)


class Calls(nn.Module):
    """Of the model's projections calls those in `called`, by turns if there are several."""

    def __init__(self, model, called):
        super().__init__()
        self.model, self.called, self.step = model, called, 0

    def forward(self, tokens, mask):
        x = self.model.embedding(tokens)
        if self.called:
            x = x + getattr(self.model, self.called[self.step % len(self.called)])(x)
            self.step += self.training
        return self.model.head(x.mean(1))


def fit(path, adapter, rates, called, **options):
    module = token_module(adapter, rates)
    build = module.task.build

    def partly(*args):
        module.task.model = Calls(build(*args), called)
        return module.task.model

    module.task.build = partly
    module.task.head_names = ("model.head",)
    token_trainer(path, **options).fit(module, TokenData())


def messages(path, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(path, *args, **options)
    return [str(warning.message) for warning in caught if "adapters had no gradient" in str(warning.message)]


def test_no_adapter_in_use_is_an_error_in_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter has a gradient .* did not call model.q_proj, model.v_proj"):
        fit(tmp_path, LORA, LORA_RATES, [])
    with pytest.raises(RuntimeError, match=r"has used model.q_proj, model.v_proj; read"):
        fit(tmp_path, ADAPTER, RATES, [])


@pytest.mark.parametrize(("adapter", "rates"), [(LORA, LORA_RATES), (ADAPTER, RATES)], ids=["lora", "fourier_moe"])
def test_adapter_that_a_whole_epoch_does_not_use_is_named_once(tmp_path, adapter, rates):
    (message,) = messages(tmp_path, adapter, rates, ["v_proj"], max_epochs=3)
    assert message.startswith("1 of 2 adapters had no gradient in a whole epoch: the model does not call model.q_proj; leave")


@pytest.mark.parametrize(("adapter", "rates"), [(LORA, LORA_RATES), (ADAPTER, RATES)], ids=["lora", "fourier_moe"])
def test_layers_left_out_in_some_steps_are_no_fault(tmp_path, adapter, rates):
    assert messages(tmp_path, adapter, rates, ["q_proj", "v_proj"], max_epochs=2) == []


def test_the_trainer_reminds_of_no_loss_that_it_adds_itself(tmp_path):
    kasa = KaSAConfig(targets=["q_proj", "v_proj"], r=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for adapter, rates in ((ADAPTER, RATES), (kasa, LORA_RATES)):
            module = token_module(adapter, rates)
            trainer = token_trainer(tmp_path, max_epochs=2)
            trainer.fit(module, TokenData())
            trainer.test(module, TokenData())
    assert [str(warning.message) for warning in caught if "the adapters train" in str(warning.message)] == []
