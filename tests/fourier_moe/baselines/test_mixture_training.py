"""Other mixtures of experts: precision, the load-balancing loss, statistics, and files of other settings."""

from dataclasses import replace

import pytest
import torch
from support.models import Transformer
from support.routed_cases import CONFIGS, ONE_EACH, X, gates_by_the_equations, moved_layer, of_each, tokens, trained
from torch.utils.checkpoint import checkpoint

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    HydraLoRAConfig,
    StatisticsReader,
    adapters,
    balance_loss,
    inject,
    load_adapter,
    recording,
    save_adapter,
)

# ---------------------------------------------------------------- training


@of_each(ONE_EACH)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_and_autocast_keep_the_trained_parameters_in_float32(config, autocast):
    model = Transformer() if autocast else Transformer().bfloat16()
    inject(model, config)
    assert {p.dtype for a in adapters(model).values() for group in a.parameter_groups().values() for p in group} == {
        torch.float32
    }
    x = X if autocast or isinstance(config, FFTMoEConfig) else X.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        layer = adapters(model)["layers.0.attention.q_proj"]
        assert layer(x).dtype == (torch.bfloat16 if autocast else x.dtype)
        y = model.eval()(x)
    torch.testing.assert_close(y.float(), Transformer().eval()(X), rtol=0.1, atol=0.1)


def test_dropout_acts_on_the_experts_and_not_on_router_and_base():
    layer, _ = moved_layer(replace(CONFIGS[0], dropout=0.5), 7, 5)
    x = tokens(6, 5)
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    noisy = layer(x)
    assert torch.equal(seen[0], x)
    assert not torch.equal(noisy, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# ---------------------------------------------------------------- balance loss and statistics


@of_each([config for config in ONE_EACH if not isinstance(config, HydraLoRAConfig)])
def test_balance_loss_is_that_of_the_tokens_that_are_no_padding(config):
    layer, _ = moved_layer(config, 5, 7)
    x, mask = tokens(2, 5, 7), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    with recording(layer, mask):
        layer(x)
        loss = layer.balance_loss()
    f, P = torch.zeros(2, 4, dtype=torch.float64)
    for token in x[mask]:
        p = torch.softmax(layer.router.weight @ token, -1).detach()
        if isinstance(config, AdaMoLEConfig):
            tau = torch.sigmoid(layer.router.threshold_weight[0] @ token + layer.router.threshold_bias) / 4
            p = p - tau.detach()
        gates = torch.tensor(gates_by_the_equations(config, layer, token), dtype=torch.float64)
        f, P = f + (gates > 0).double() / 7, P + p / 7
    torch.testing.assert_close(loss, config.balance_weight * 4 * (f * P).sum(), rtol=1e-9, atol=1e-12)
    (gradient, *_) = torch.autograd.grad(loss, list(layer.router.parameters()))
    assert gradient.abs().max() > 0


def test_hydralora_has_no_balance_loss_and_its_load_is_even():
    layer, _ = moved_layer(CONFIGS[6], 5, 7)
    reader = StatisticsReader(layer)
    with recording(layer):
        layer(tokens(6, 7))
        assert layer.balance_loss() is None
    statistics = reader.read()["router"]
    assert statistics.counts.tolist() == [6] * 4
    assert (float(statistics.active), float(statistics.balance)) == (4, 1)
    assert float(statistics.gate.sum()) == pytest.approx(1)


def test_statistics_of_a_threshold_count_however_many_experts_a_token_has():
    layer, _ = moved_layer(CONFIGS[5], 5, 7)
    x, mask = tokens(2, 9, 7), torch.ones(2, 9).bool()
    mask[0, 4:] = False
    reader = StatisticsReader(layer)
    with recording(layer, mask, ["a", "b"]):
        layer(x)
        loss = layer.balance_loss() / layer.balance_weight
    gates = torch.tensor([gates_by_the_equations(CONFIGS[5], layer, token) for token in x[mask]])
    served = (gates > 0).double()
    assert set(served.sum(-1).tolist()) >= {0, 1, 2}
    statistics = reader.read()["router"]
    assert statistics.tokens == 13
    assert {task: int(own.tokens) for task, own in statistics.by_task.items()} == {"a": 4, "b": 9}
    assert statistics.counts.tolist() == served.sum(0).tolist()
    assert float(statistics.active) == pytest.approx(float(served.sum(-1).mean()))
    torch.testing.assert_close(statistics.gate, gates.sum(0) / served.sum(0).clamp(min=1), rtol=1e-6, atol=1e-8)
    assert float(statistics.balance_loss) == pytest.approx(float(loss))
    assert float(statistics.load_imbalance) == pytest.approx(float(served.sum(0).max() / served.sum(0).mean()))


def test_token_without_an_expert_gets_the_base_s_output_and_the_dead_are_seen():
    layer, base = moved_layer(replace(CONFIGS[5], max_threshold=1.0), 5, 7)
    layer.router.threshold_bias.data.fill_(50.0)  # tau = 1
    x = tokens(6, 7)
    reader = StatisticsReader(layer)
    with recording(layer):
        y = layer(x)
        loss = layer.balance_loss()
    assert torch.equal(y, base(x))
    (y.sum() + loss).backward()
    assert all(p.grad.isfinite().all() for group in layer.parameter_groups().values() for p in group)
    statistics = reader.read()["router"]
    assert (int(statistics.tokens), float(statistics.active), float(loss)) == (6, 0, 0)
    assert statistics.dead(0.01).all()
    assert not statistics.dead(0).any()
    assert float(statistics.balance) < 0.3


@pytest.mark.parametrize("checkpointed", [False, True])
@of_each(ONE_EACH)
def test_activation_checkpointing_counts_once_and_keeps_all_gradients(config, checkpointed):
    model = trained(config)
    expected, plain = losses_and_gradients(model, False), losses_and_gradients(model, checkpointed)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-6)
    assert plain["tokens"].tolist() == [40] * 4


def losses_and_gradients(model, checkpointed):
    model.zero_grad()
    reader = StatisticsReader(model)
    with recording(model):
        hidden = X
        for block in model.layers:
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
        balance = balance_loss(model)
        loss = model.classifier(model.norm(hidden.mean(1))).square().mean() + 10 * balance
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tokens = torch.stack([statistics.tokens for statistics in reader.read().values()])
    return {**gradients, "balance": balance.detach(), "tokens": tokens}


# ---------------------------------------------------------------- files


@of_each(ONE_EACH)
def test_file_of_other_experts_is_refused(config, tmp_path):
    save_adapter(trained(config), tmp_path)
    model = Transformer()
    inject(model, replace(config, num_experts=2))
    with pytest.raises(ValueError, match="num_experts: 4 against 2"):
        load_adapter(model, tmp_path)


@of_each(ONE_EACH)
def test_file_goes_on_with_another_seed_dropout_and_balance_weight_but_no_other_value(config):
    other = {"seed": 99, "dropout": 0.5, "balance_weight": 0.5}
    other = {name: value for name, value in other.items() if hasattr(config, name)}
    assert config.difference(replace(config, **other)) is None
    for name in ("r", "alpha", "top_k", "max_threshold", "rho"):
        if value := getattr(config, name, None):
            changed = replace(config, **{name: value * 2 if name in ("r", "alpha", "rho") else value + 1})
            assert config.difference(changed).startswith(f"{name}: ")
