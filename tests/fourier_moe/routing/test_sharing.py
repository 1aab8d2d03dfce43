"""Routers shared by the projections of one input or one block."""

import copy

import pytest
import torch
from support.models import Transformer, randomize
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from fourier_moe import FourierMoEConfig, adapters, inject, load_adapter, recording, save_adapter
from fourier_moe.routing.sharing import SharedRouter, router_group

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
E, D, H, LAYERS = 4, 32, 48, 2


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=50, num_key_value_heads=4, attention_dropout=0.0, **sizes)).eval()


def adapted(scope, **changes):
    settings = {"num_coefficients": 16, "num_experts": E, "bandwidth": 0.5, "balance_weight": 1.0}
    model = llama()
    report = inject(model, FourierMoEConfig(targets=TARGETS, router_scope=scope, **(settings | changes)))
    return randomize(model), report


def tokens(length=7):
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scope", "inputs"),
    [("projection", 6 * D + H), ("input", 3 * D + H), ("block", D + H)],  # q k v | o | gate up | down, summed input widths
)
def test_report_shows_the_routers_that_are_left(scope, inputs):
    model, report = adapted(scope)
    assert report.trained["router"] == LAYERS * E * inputs
    assert report.trained["experts"] == LAYERS * len(TARGETS) * 16
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == report.total


@pytest.mark.parametrize(
    ("name", "scope", "group"),
    [
        ("model.layers.3.self_attn.q_proj", "projection", "model.layers.3.self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj", "block", "model.layers.3"),
        ("model.layers.3.mlp.down_proj", "block", "model.layers.3"),
        ("encoder.layer.11.attention.self.query", "block", "encoder.layer.11"),
        ("3.fc", "block", "3"),
        ("fc", "block", ""),
        ("a.up_proj", "input", "a.gate_proj+up_proj"),
        ("a.o_proj", "input", "a.o_proj"),
    ],
)
def test_groups(name, scope, group):
    assert router_group(name, scope) == group


@pytest.mark.parametrize("scope", ["input", "block"])
def test_shared_routers_equal_own_routers_with_the_same_weights(scope):
    shared, _ = adapted(scope)
    own, _ = adapted("projection")
    state = shared.state_dict()
    layers = adapters(shared)
    for name, layer in adapters(own).items():
        router = layers[name].router
        leader = router.leader if isinstance(router, SharedRouter) else router
        layer.router.weight.data.copy_(leader.weight)
        layer.experts.coefficients.data.copy_(state[f"{name}.experts.coefficients"])
    torch.testing.assert_close(shared(tokens())[0], own(tokens())[0])


@pytest.mark.parametrize("scope", ["input", "block"])
def test_projections_may_run_in_any_order_and_the_model_be_copied_afterwards(scope):
    """transformers' CLIP defines k, v, q and runs q first."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": H, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes)).eval()
    settings = {"num_coefficients": 16, "num_experts": E, "bandwidth": 0.5, "router_scope": scope}
    inject(model, FourierMoEConfig(targets=["q_proj", "v_proj"], **settings))
    randomize(model)
    assert not any(module.training for module in model.modules())
    images = torch.randn(2, 3, 8, 8)
    expected = model(images).last_hidden_state
    assert torch.equal(copy.deepcopy(model)(images).last_hidden_state, expected)


@pytest.mark.parametrize("scope", ["input", "block"])
def test_a_shared_router_is_balanced_once_and_gets_the_gradient_of_all_its_projections(scope):
    model, _ = adapted(scope)
    leaders = [layer.router for layer in adapters(model).values() if not isinstance(layer.router, SharedRouter)]
    with recording(model):
        output = model(tokens())[0]
        terms = [term for layer in adapters(model).values() if (term := layer.balance_loss()) is not None]
    assert len(terms) == len(leaders)
    output.square().sum().backward()
    assert all(leader.weight.grad.abs().sum() > 0 for leader in leaders)


def test_activation_checkpointing_gives_the_same_gradients():
    model, _ = adapted("block")
    other = copy.deepcopy(model)
    model(tokens())[0].square().sum().backward()
    embeddings = other.get_input_embeddings()(tokens())
    checkpoint(lambda x: other(inputs_embeds=x)[0], embeddings, use_reentrant=False).square().sum().backward()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(theirs.grad, mine.grad, msg=name)


@pytest.mark.parametrize("scope", ["input", "block"])
def test_files_hold_a_shared_router_once_and_load(tmp_path, scope):
    model, _ = adapted(scope)
    routers = [key for key in model.state_dict() if "router" in key]
    assert len(routers) == LAYERS * {"input": 4, "block": 2}[scope]
    save_adapter(model, tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(tokens())[0], model(tokens())[0])
    with pytest.raises(ValueError, match="router_scope"):
        load_adapter(adapted("projection")[0], tmp_path)


def test_a_group_of_one_keeps_an_ordinary_router():
    model = Transformer()
    inject(model, FourierMoEConfig(targets=["q_proj"], num_coefficients=8, num_experts=2, bandwidth=0.5, router_scope="input"))
    assert not any(isinstance(layer.router, SharedRouter) for layer in adapters(model).values())
