"""Transformer blocks: found in any model; recomputed without a change of names, losses or gradients."""

import copy

import pytest
import torch
from support.language_models import ADAPTER, TinyLanguageModel, adapted_llama, collate, example, tiny_llama
from support.models import randomize
from support.token_task import TokenData, TokenModel, TokenTask, token_module, token_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from fourier_moe import FourierMoEConfig, HeadOnly, balance_loss, inject, recording, routers
from lightning_modules.strategies.blocks import check_backend, checkpoint_activations, compile_blocks, transformer_blocks
from lightning_modules.tasks import ImageClassification, SequenceClassification

BATCH = collate([example(1, 2), example(30, 4)], extra=2)


def test_blocks_of_a_language_model_are_its_layers():
    model = adapted_llama()
    assert transformer_blocks(model) == list(model.model.layers)


def test_blocks_of_clip_and_roberta_are_those_of_the_tower():
    clip = ImageClassification("ViT-B-32-quickgelu", None, tiny=True).build(2)
    inject(clip, FourierMoEConfig(targets=["q_proj"], num_coefficients=16, head=["head"]))
    assert transformer_blocks(clip) == list(clip.backbone.transformer.resblocks)
    roberta = SequenceClassification("roberta-large", tiny=True).build(2)
    inject(roberta, FourierMoEConfig(targets=["query"], num_coefficients=16, head=["classifier"]))
    assert transformer_blocks(roberta) == list(roberta.roberta.encoder.layer)


def test_blocks_without_adapters_are_those_of_the_largest_list():
    roberta = SequenceClassification("roberta-large", tiny=True).build(2)
    inject(roberta, HeadOnly(head=["classifier"]))
    assert transformer_blocks(roberta) == list(roberta.roberta.encoder.layer)
    assert transformer_blocks(nn.Sequential()) == transformer_blocks(TokenModel(2)) == []


def losses_and_gradients(model):
    task = TinyLanguageModel()
    task.model = model.train()
    with recording(model, task.token_mask(BATCH)):
        loss, balance = task.loss(BATCH), balance_loss(model)
    (loss + balance).backward()
    return loss, balance, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_neither_losses_nor_gradients_nor_names(dropout):
    found = []
    for recomputed in (False, True):
        model = tiny_llama()
        inject(model, FourierMoEConfig(**{**vars(ADAPTER), "dropout": dropout}))
        randomize(model, 0.5)
        names = list(model.state_dict())
        if recomputed:
            checkpoint_activations(model)
        assert list(model.state_dict()) == names
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        found.append(losses_and_gradients(model))
        assert len(calls) == (2 if recomputed else 1)
    (loss, balance, gradients), (other_loss, other_balance, other_gradients) = found
    assert torch.equal(loss, other_loss)
    assert torch.equal(balance, other_balance)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "router" in name)


def test_a_copy_recomputes_its_own_blocks():
    model = adapted_llama()
    checkpoint_activations(model)
    other = copy.deepcopy(model)
    _, _, gradients = losses_and_gradients(other)
    assert all(gradient is not None for gradient in gradients.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_recomputes_nothing():
    model = adapted_llama()
    checkpoint_activations(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.eval()(BATCH["input_ids"], use_cache=False).logits.sum().backward()
    model.train()
    with torch.no_grad():
        model(BATCH["input_ids"])  # with a cache
    assert len(calls) == 2


def test_a_classifier_that_is_a_decoder_fills_no_cache_while_it_recomputes():
    task = SequenceClassification("llama", tiny=True)
    model = task.build(2)
    inject(model, FourierMoEConfig(targets=["q_proj"], num_coefficients=16, head=["score"]))
    checkpoint_activations(model)
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"], "label": torch.tensor([0, 1])}
    task.loss(batch).backward()


def test_a_model_without_blocks_is_refused():
    model = TokenModel(2)
    inject(model, FourierMoEConfig(targets=["q_proj"], num_coefficients=16))
    with pytest.raises(ValueError, match="activation_checkpointing=True recomputes transformer blocks, and TokenModel has no"):
        checkpoint_activations(model)


def test_reentrant_checkpointing_is_refused():
    """transformers' own switch, as somebody's task might set it."""
    model = adapted_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"the balance loss would train no router.*use_reentrant=False"):
        losses_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, balance, _ = losses_and_gradients(model)
    assert balance.requires_grad


def test_reentrant_checkpointing_by_hand_is_refused_and_what_wants_no_gradient_is_not():
    model = adapted_llama()
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, 64, requires_grad=True)
    with recording(model):
        checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(ValueError, match="the forward pass ran without gradients"):
            layer.balance_loss()
        with torch.no_grad():
            assert layer.balance_loss() > 0
        for router in routers(model).values():
            router.requires_grad_(False)
        assert layer.balance_loss() > 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.fc(x).tanh()


def five_steps(backend):
    """Losses and weights of five steps, then an evaluation."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Block() for _ in range(2)])
    inject(model, FourierMoEConfig(targets=["fc"], num_coefficients=16, num_experts=4, balance_weight=0.5))
    names, x, losses = list(model.state_dict()), torch.randn(2, 3, 16), []
    if backend:
        compile_blocks(model, backend)
        assert list(model.state_dict()) == names
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for train in (True,) * 5 + (False,):
        optimizer.zero_grad()
        with recording(model.train(train)):
            loss = model.layers[1](model.layers[0](x)).square().mean() + balance_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_compiled_blocks_train_as_eager_ones_under_the_same_names_and_are_all_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch._dynamo.config.patch(recompile_limit=1):  # so that a second block of the same code would not be compiled
        torch.testing.assert_close(five_steps(backend), five_steps(None))
    assert len(compiled) == 2  # and none for the evaluation


def test_compilation_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"compile='inductr' must be true, false, or a backend of torch.compile: .*inductor"):
        check_backend("inductr", torch.device("cpu"))
    with pytest.raises(ValueError, match="compile=True compiles transformer blocks, and TokenModel has no list of them"):
        compile_blocks(TokenModel(2), "aot_eager")
    with pytest.raises(ValueError, match="compile and activation_checkpointing do not work together"):
        token_module(activation_checkpointing=True, compile=True)


def test_backend_is_tried_on_the_device_that_trains():
    seen = []

    def look(graph, inputs):
        seen.extend(one.device.type for one in inputs)
        return graph

    torch._dynamo.register_backend(look, name="look")
    check_backend("look", torch.device("meta"))
    assert seen == ["meta"]


def test_only_fit_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenTask, "works_untrained", True)
    module = token_module(compile="inductr")
    trainer = token_trainer(tmp_path)
    trainer.test(module, TokenData(), verbose=False)
    module.compile_backend = "aot_eager"
    with pytest.raises(ValueError, match="compile=True compiles transformer blocks"):
        trainer.fit(module, TokenData())
    with pytest.raises(ValueError, match="compile='inductr' must be true, false, or a backend"):
        trainer.fit(token_module(compile="inductr"), TokenData())
