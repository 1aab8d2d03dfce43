"""Packed rows in a model: the logits, losses and router counts of the same examples alone."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support.language_models import ADAPTER, TinyLanguageModel, adapted_llama, language_trainer, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from datamodules import InstructionDataModule
from fourier_moe import StatisticsReader, recording
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.tasks.losses import label_losses
from lightning_modules.tasks.packing import require_packing

RATES = Optimization(experts=ParameterGroup(0.05))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sets of sums of several lengths."""
    directory = tmp_path_factory.mktemp("sums")
    for name in ("short", "long"):
        numbers = [[number] * (1 + number % 3 + 4 * (name == "long")) for number in range(20)]
        rows = [{"instruction": " + ".join(map(str, terms)), "output": str(sum(terms))} for terms in numbers]
        (directory / f"{name}.json").write_text(json.dumps(rows))
    return [str(path) for path in sorted(directory.iterdir())]


def data(files):
    return InstructionDataModule(
        files, tokenizer="bytes", prompt="plain", num_workers=0, batch_size=4, packing=True, max_length=150, validation_size=6
    )


@pytest.fixture(scope="module")
def batch(files):
    packed = data(files)
    packed.setup("fit")
    return next(iter(packed.train_dataloader()))


def alone(batch):
    """Every example of a packed batch as a batch of its own: ids, labels, row and place."""
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        starts = [*(batch["position_ids"][row, :length] == 0).nonzero()[:, 0].tolist(), length]
        for start, end in pairwise(starts):
            yield *(batch[name][row : row + 1, start:end] for name in ("input_ids", "labels")), row, slice(start, end)


def test_packed_examples_have_the_logits_losses_and_routing_of_the_same_examples_alone(batch):
    model = adapted_llama()
    task = SimpleNamespace(model=model)
    reader = StatisticsReader(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "position_ids")}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        with recording(model, TinyLanguageModel.token_mask(task, batch), batch["task"]):
            packed = label_losses(model, **inputs)
        together = reader.read()
        losses = torch.zeros(len(batch["labels"]))
        for ids, labels, row, place in alone(batch):
            mask = torch.ones_like(ids)
            with recording(model, mask.bool(), [batch["task"][row]]):
                own = label_losses(model, ids, mask, labels)
            losses[row] += own.loss[0]
            single = model(input_ids=ids, use_cache=False).logits[0]
            assert (single - logits[row, place]).abs().max() < 1e-5 * logits.abs().max()
    assert len(list(alone(batch))) > 2 * len(batch["labels"])
    torch.testing.assert_close(packed.loss, losses, rtol=1e-5, atol=1e-4)
    for name, separately in reader.read().items():
        assert together[name].tokens == separately.tokens == batch["attention_mask"].sum()
        torch.testing.assert_close(together[name].sums, separately.sums, rtol=1e-5, atol=1e-3)
        for kind, sums in separately.by_task.items():
            torch.testing.assert_close(together[name].by_task[kind].sums, sums.sums, rtol=1e-5, atol=1e-3)


def leaking(mistake):
    """A model that takes no positions, or that ignores where examples begin."""
    model = tiny_llama()
    forward = model.forward
    if mistake == "takes no position_ids":
        model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids)
    else:
        model.forward = lambda input_ids, position_ids, use_cache: forward(input_ids=input_ids)
    return model


def test_models_that_keep_examples_apart_are_accepted_in_their_own_mode():
    sizes = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    for model in (tiny_llama(), GPT2LMHeadModel(sizes).train()):
        training = model.training
        for batch_size in (1, 4):
            require_packing(model, batch_size)
        assert model.training is training


@pytest.mark.parametrize("mistake", ["takes no position_ids", "lets an example see the one before it"])
def test_models_that_do_not_are_refused(mistake):
    with pytest.raises(ValueError, match=rf"packing: LlamaForCausalLM with .* {mistake}.*; set data.packing to false"):
        require_packing(leaking(mistake), 2)


def test_a_packed_run_is_refused_before_its_first_step_by_such_a_model_and_trains_with_another(tmp_path, files):
    module = AdaptationModule(TinyLanguageModel(), ADAPTER, RATES)
    trainer = language_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data(files))
    assert trainer.global_step == 2

    class Leaking(TinyLanguageModel):
        def build(self, num_classes=None, class_names=None):
            super().build()
            forward = self.model.forward
            self.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
            return self.model

    trainer = language_trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="lets an example see the one before it"):
        trainer.fit(AdaptationModule(Leaking(), ADAPTER, RATES), data(files))
    assert trainer.global_step == 0
