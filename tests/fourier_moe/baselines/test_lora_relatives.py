"""LoRA-Dash, TopLoRA and MELoRA against their equations in float64, token by token where a token matters."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from support.method_configs import DASH, MELORA, MILORA, TOP
from support.method_configs import LORA_RELATIVES as CONFIGS
from support.models import Transformer
from support.one_projection import SIZES, assert_equal, layer_of, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourier_moe import (
    adapter_state_dict,
    after_step,
    inject,
    regularization,
)

X = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def of_each(configs=CONFIGS):
    return pytest.mark.parametrize("config", configs, ids=lambda config: type(config).__name__)


@of_each([MILORA, DASH, TOP, MELORA])
def test_other_methods_have_no_penalty(config):
    model = Transformer()
    inject(model, config)
    assert regularization(model) == 0
    assert not regularization(model).requires_grad


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_lora_dash_is_lora_and_then_scales_the_directions_that_change_most(M, N):
    layer, W, bias, (A, B, t) = layer_of(DASH, M, N)
    x = tokens(N).double()
    assert t.shape == (5,)
    lora = x @ (W + 2 * B @ A).T + bias
    for _ in range(2):
        layer.after_step()
    assert_equal(layer(tokens(N)), lora)
    layer.after_step()  # the third optimizer step

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    change = [abs(float(U[:, i] @ (2 * B @ A) @ Vh[i])) / float(S[i]) for i in range(len(S))]
    chosen = sorted(range(len(S)), key=change.__getitem__, reverse=True)[:5]
    assert chosen != sorted(chosen)
    extra = sum(t[k] * torch.outer(U[:, i], Vh[i]) for k, i in enumerate(chosen))
    assert_equal(layer(tokens(N)), lora + x @ extra.T)
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer.B.data += 1.0
    layer.after_step()
    assert {name: torch.equal(value, before[name]) for name, value in layer.named_buffers()} == {
        "steps": False,
        "U": True,
        "V": True,
    }


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_toplora_weighs_its_directions_for_every_token(M, N):
    layer, W, bias, (A, B, Q, gain) = layer_of(TOP, M, N)
    x = tokens(N).double().flatten(0, 1)
    expected = []
    for token in x:
        scores = Q @ token
        normalized = scores / (scores.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        weights = torch.exp(gain * normalized)
        expected.append(W @ token + bias + 2 * B @ (weights * (A @ token)))
    assert_equal(layer(tokens(N)).flatten(0, 1), torch.stack(expected))
    assert A.shape == Q.shape == (4, N)
    assert gain.shape == (4,)


@pytest.mark.parametrize(("M", "N"), SIZES)
def test_melora_is_a_block_diagonal_update(M, N):
    layer, W, bias, (A, B) = layer_of(MELORA, M, N)
    update = torch.block_diag(*(4 * B[i] @ A[i] for i in range(4)))
    assert update.shape == (M, N)
    assert torch.linalg.matrix_rank(update) == 8  # r times the blocks
    assert_equal(layer(tokens(N)), tokens(N).double() @ (W + update).T + bias)


@of_each([TOP, DASH, MELORA])
def test_random_start_is_kaiming_uniform_as_that_of_lora_s_a(config):
    layer, _, _, (A, B, *_) = layer_of(replace(config, r=8, alpha=8), 64, 1024, moved=False)
    assert torch.count_nonzero(B) == 0
    for start in (A, layer.Q) if config is TOP else (A,):
        bound = start.shape[-1] ** -0.5
        assert 0.99 * bound < start.abs().max() <= bound
        assert float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@of_each([DASH, TOP, MELORA])
def test_dropout_acts_on_the_input_of_a_in_training_only(config):
    layer, _, _, _ = layer_of(replace(config, dropout=0.5), 16, 16)
    plain, _, _, _ = layer_of(config, 16, 16)
    x = tokens(16)
    assert torch.equal(layer.eval()(x), plain(x))
    torch.manual_seed(0)
    found = layer.train()(x) - layer.base(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    if config is TOP:  # the weights of the directions see the whole token
        low = nn.functional.rms_norm(x @ layer.Q.T, (4,), layer.gain).exp() * (dropped @ layer.A.T)
        expected = 2 * low @ layer.B.T
    else:
        expected = plain(dropped) - plain.base(dropped)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4, 7])
def test_lora_dash_resumes_at_any_step_as_if_it_had_not_stopped(interrupted):
    def steps(model, number):
        for _ in range(number):
            model.zero_grad()
            nn.functional.cross_entropy(model(X), LABELS).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
            after_step(model)
        model(X)  # evaluation counts nothing
        return adapter_state_dict(model)

    whole, first, second = Transformer().eval(), Transformer().eval(), Transformer().eval()
    for model in (whole, first, second):
        inject(model, DASH)
    expected = steps(whole, 8)
    second.load_state_dict(steps(first, interrupted), strict=False)
    found = steps(second, 8 - interrupted)
    assert {name: torch.equal(value, found[name]) for name, value in expected.items()} == dict.fromkeys(found, True)
    assert expected["layers.0.attention.q_proj.steps"] == 8
    assert expected["layers.0.attention.q_proj.t"].abs().max() > 0


def test_lora_dash_reads_a_weight_that_is_sharded_over_processes(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    sharded, _, _, _ = layer_of(DASH, 12, 20)
    whole, _, _, _ = layer_of(DASH, 12, 20)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded.base.weight = nn.Parameter(distribute_tensor(sharded.base.weight.detach(), mesh, [Shard(0)]))
        for layer in (sharded, whole):
            layer.choose_directions()
    finally:
        dist.destroy_process_group()
    assert torch.equal(sharded.U, whole.U)
    assert whole.U.abs().max() > 0


def test_lora_dash_reads_the_transposed_weight_of_a_conv1d():
    model = nn.Sequential(Conv1D(8, 16))
    inject(model, replace(DASH, targets=["0"], head=[]))
    model[0].B.data.normal_()
    for _ in range(3):
        after_step(model)
    W = model[0].base.weight.detach().T
    torch.testing.assert_close((model[0].U.T @ W @ model[0].V.T), torch.diag((model[0].U.T @ W @ model[0].V.T).diag()))
