"""FourierMoELinear: around any frozen projection, starting exactly at the pretrained output."""

import pytest
import torch
from support.models import Transformer, config, randomize
from torch import nn

from fourier_moe import FourierMoELinear, TopKRouter, inject, load_adapter, recording, save_adapter


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(base=None, std=0.0, **changes):
    """With coefficients of this standard deviation."""
    return randomize(FourierMoELinear(nn.Linear(24, 17) if base is None else base, config(**changes), "layer"), std)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (7, 24), (2, 3, 24)])
def test_zero_coefficients_leave_the_output_bit_identical(shape):
    base = nn.Linear(24, 17)
    x = tokens(*shape)
    assert torch.equal(layer(base)(x), base(x))


def test_zero_coefficients_leave_a_transformer_bit_identical():
    model, x = Transformer().eval(), tokens(2, 5, 16)
    before = model(x)
    inject(model, config())
    assert torch.equal(model(x), before)


def test_output_is_the_base_plus_the_gated_dense_updates():
    adapter = layer(std=1.0).double()
    x = tokens(5, 24).double()
    gates = adapter.router(x).dense(adapter.router.num_experts)
    updates = torch.stack([adapter.experts.delta_weight(e) for e in range(4)])
    expected = adapter.base(x) + torch.einsum("te,emn,tn->tm", gates, updates, x)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_the_experts_in_training_only():
    adapter, x = layer(std=1.0, dropout=0.5), tokens(9, 24)
    without = layer(adapter.base, std=1.0)
    adapter.eval()
    assert torch.equal(adapter(x), without(x))
    adapter.train()
    torch.manual_seed(0)
    dropped = adapter(x)
    assert not torch.allclose(dropped, without(x))
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, adapter.base(x) + adapter.experts(nn.functional.dropout(x, 0.5), without.router(x)))


def test_bf16_base_keeps_float32_adapter():
    base = nn.Linear(24, 17).bfloat16()
    adapter = layer(base, std=0.1)
    assert {p.dtype for name, p in adapter.named_parameters() if not name.startswith("base.")} == {torch.float32}
    x = tokens(6, 24).bfloat16()
    y = adapter(x)
    assert y.dtype == torch.bfloat16
    expected = base(x).float() + adapter.experts(x.float(), adapter.router(x.float()))
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    assert (y.float() - base(x).float()).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_input_of_several_projections_is_saved_once_and_never_as_a_float32_copy(autocast):
    adapters = [layer(nn.Linear(24, 17).bfloat16().requires_grad_(False), std=0.1) for _ in range(2)]
    x = tokens(50, 24).bfloat16().requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        outputs = [adapter(x) for adapter in adapters]
    as_large = {(tensor.data_ptr(), tensor.dtype) for tensor in saved if tensor.numel() == x.numel()}
    assert as_large == {(x.data_ptr(), torch.bfloat16)}
    sum(y.float().sum() for y in outputs).backward()
    assert x.grad.abs().sum() > 0


def test_autocast_keeps_float32_coefficients_and_result_within_bf16_tolerance():
    adapter, x = layer(std=0.1), tokens(6, 24)
    reference = adapter(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(x)
        experts = adapter.experts(x, adapter.router(x))
    assert y.dtype == torch.bfloat16
    assert experts.dtype == torch.float32
    assert adapter.experts.coefficients.dtype == torch.float32
    torch.testing.assert_close(y.float(), reference, rtol=2e-2, atol=3e-2)
    y.float().sum().backward()
    assert adapter.experts.coefficients.grad.dtype == torch.float32


class Int8Projection(nn.Module):
    """Quantized, with its weight hidden: whoever reads `weight` fails."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) / 1000).T

    @property
    def weight(self):
        raise RuntimeError("the weight was read")


def test_the_weight_of_the_base_is_never_read():
    base = Int8Projection(24, 17)
    adapter, x = layer(base, std=0.1), tokens(6, 24)
    with recording(adapter):
        y = adapter(x)
        adapter.balance_loss()
    y.sum().backward()
    torch.testing.assert_close(y, base(x) + adapter.experts(x, adapter.router(x)))
    model = nn.ModuleDict({"q_proj": Int8Projection(24, 17), "v_proj": Int8Projection(24, 17)})
    assert inject(model, config()).trained["experts"] == 64


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base, x = conv1d(17, 24), tokens(2, 3, 24)
    adapter = layer(base, std=0.1)
    assert (adapter.in_features, adapter.out_features) == (24, 17)
    torch.testing.assert_close(adapter(x), base(x) + adapter.experts(x, adapter.router(x)))
    assert torch.equal(layer(conv1d_base := conv1d(17, 24))(x), conv1d_base(x))


def test_something_that_is_no_projection_is_an_error():
    with pytest.raises(ValueError, match="LayerNorm is no linear projection"):
        layer(nn.LayerNorm(24))


def test_weight_and_bias_are_those_of_the_base():
    base = nn.Linear(24, 17)
    assert torch.equal(layer(base).weight, base.weight)
    assert layer(base).weight.data_ptr() == base.weight.data_ptr()
    assert layer(base).bias is base.bias


def test_parameter_groups_are_exactly_the_trained_parameters():
    adapter = layer()
    groups = adapter.parameter_groups()
    assert list(groups) == ["experts", "router"]
    own = {id(p) for name, p in adapter.named_parameters() if not name.startswith("base.")}
    assert {id(p) for group in groups.values() for p in group} == own


def test_balance_loss_is_weighted():
    adapter, x = layer(balance_weight=0.25), tokens(6, 24)
    with recording(adapter):
        adapter(x)
        torch.testing.assert_close(adapter.balance_loss(), 0.25 * adapter.router.balance_loss())


def test_errors_name_the_projection():
    with pytest.raises(
        ValueError, match="layer: num_coefficients asks for 4 frequencies per expert, but a 3 x 2 projection has only 2"
    ):
        layer(nn.Linear(2, 3))


def test_follows_the_device_of_the_base():
    adapter = layer(nn.Linear(24, 17, device="meta"))
    assert {t.device.type for t in (*adapter.parameters(), *adapter.buffers())} == {"meta"}


ALONE = {"num_experts": 1, "top_k": 1, "num_coefficients": 24, "frequency_bias": False}


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24)])
def test_a_single_expert_is_always_on_and_has_no_router(shape):
    adapter, x = layer(std=1.0, **ALONE).double(), tokens(*shape).double()
    assert adapter.parameter_groups()["router"] == []
    assert {name for name, _ in adapter.named_parameters()} == {"base.weight", "base.bias", "experts.coefficients"}
    torch.testing.assert_close(adapter(x), adapter.base(x) + x @ adapter.experts.delta_weight(0).T, rtol=1e-10, atol=1e-10)
    assert adapter.balance_loss() is None


def test_a_file_of_a_single_expert_with_the_router_that_it_once_had_still_loads(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 17))

    adapted, loaded, x = model(), model(), tokens(5, 24)
    inject(adapted, config(targets=["0"], router_scope="input", **ALONE))
    randomize(adapted)
    expected = adapted(x)
    adapted[0].router = TopKRouter(24, 1, 1)
    save_adapter(adapted, tmp_path)
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), expected)
