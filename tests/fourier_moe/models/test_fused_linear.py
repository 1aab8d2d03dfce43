"""`qkv` of timm's attention as three projections: the same output, and each part is what its name says."""

import pytest
import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models import beit, eva, hiera, metaformer, nest, swin_transformer, twins, vision_transformer_sam
from torch import nn

from fourier_moe import AdapterBank, FourierMoEConfig, adapters, inject, load_adapter, save_adapter
from fourier_moe.models.attention import fused_modules, is_split_attention
from fourier_moe.models.fused_linear import _OWNERS, PARTS, SplitLinear

TOKENS = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
# By class: an attention of width 16 with two heads, and arguments of its forward.
KINDS = {
    Attention: (lambda: Attention(16, 2, qkv_bias=True), (TOKENS,)),
    AttentionRope: (lambda: AttentionRope(16, 2, qkv_fused=True), (TOKENS,)),
    beit.Attention: (lambda: beit.Attention(16, 2, qkv_bias=False), (TOKENS,)),
    eva.EvaAttention: (lambda: eva.EvaAttention(16, 2, qkv_bias=False, norm_layer=nn.LayerNorm), (TOKENS,)),
    hiera.MaskUnitAttention: (lambda: hiera.MaskUnitAttention(16, 16, 2), (TOKENS,)),
    metaformer.Attention: (lambda: metaformer.Attention(16, head_dim=8), (TOKENS,)),
    nest.Attention: (lambda: nest.Attention(16, 2), (TOKENS[:, None],)),
    swin_transformer.WindowAttention: (lambda: swin_transformer.WindowAttention(16, 2, window_size=(2, 2)), (TOKENS,)),
    twins.LocallyGroupedAttn: (lambda: twins.LocallyGroupedAttn(16, 2, ws=2), (TOKENS, (2, 2))),
    vision_transformer_sam.Attention: (lambda: vision_transformer_sam.Attention(16, 2), (TOKENS.unflatten(1, (2, 2)),)),
}


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=3).eval()


def config(**options):
    return FourierMoEConfig(**{"targets": ["q_proj", "v_proj"], "num_coefficients": 32, "num_experts": 2, **options})


def randomize(model):
    for adapter in adapters(model).values():
        for parameter in adapter.parameter_groups()["experts"]:
            nn.init.normal_(parameter)


def test_every_known_class_is_checked_here():
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in KINDS}
    assert kinds == _OWNERS - {"timm.models.vision_transformer.Attention"}  # of older versions


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
@torch.no_grad()
def test_parts_are_query_key_and_value(kind):
    make, inputs = KINDS[kind]
    torch.manual_seed(1)
    module = make().eval()
    expected = module(*inputs)
    assert fused_modules(module) == {"qkv": PARTS}
    module.qkv = split = SplitLinear(module.qkv)
    torch.testing.assert_close(module(*inputs), expected)
    for parameter in split.q_proj.parameters():
        parameter.zero_()
    without_query = module(*inputs)
    assert not torch.allclose(without_query, expected)
    nn.init.normal_(split.k_proj.weight)  # all scores are zero without a query, whatever the keys
    torch.testing.assert_close(module(*inputs), without_query)
    for parameter in split.v_proj.parameters():
        parameter.zero_()
    outputs = module(*inputs).flatten(0, -2)
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))  # the output's bias at most


def test_attention_with_biases_of_its_own_is_left_whole():
    module = beit.Attention(16, 2, qkv_bias=True)
    assert fused_modules(module) == {}
    with pytest.raises(ValueError, match=r"'q_proj' matches no module .* called: .*qkv"):
        inject(module, config())


def test_adapter_in_the_fused_layer_is_that_of_a_separate_projection():
    torch.manual_seed(0)
    module = Attention(16, 2, qkv_bias=True).eval()
    fused, separate = module.qkv, nn.ModuleDict({"qkv": nn.ModuleDict({"q_proj": nn.Linear(16, 16)})})
    separate["qkv"]["q_proj"].load_state_dict({key: value[:16] for key, value in fused.state_dict().items()})
    for model in (module, separate):
        inject(model, config(targets=["q_proj"]))
        torch.manual_seed(2)
        randomize(model)
    with torch.no_grad():
        query, key, value = module.qkv(TOKENS).chunk(3, dim=-1)
        assert torch.equal(query, separate["qkv"]["q_proj"](TOKENS))
        whole = fused(TOKENS).chunk(3, dim=-1)
        assert not torch.allclose(query, whole[0])
        torch.testing.assert_close((key, value), whole[1:])
    restored = module.qkv
    restored.q_proj = restored.q_proj.base
    assert all(torch.equal(value, restored.fused().state_dict()[key]) for key, value in fused.state_dict().items())


def test_adapter_file_and_bank_give_the_same_and_a_bank_puts_the_fused_layer_back(tmp_path):
    images, model = torch.randn(2, 3, 32, 32), vit()
    inject(model, config(head=["head"]))
    randomize(model)
    assert [name for name, module in model.named_modules() if is_split_attention(module)][:1] == ["blocks.0.attn.qkv"]
    save_adapter(model, tmp_path)
    with torch.no_grad():
        expected = model(images)
        loaded = vit()
        load_adapter(loaded, tmp_path)
        assert torch.equal(loaded(images), expected)
        bare = vit()
        before, state = bare(images), bare.state_dict()
        bank = AdapterBank(bare)
        bank.load("a", tmp_path)
        with bank.using("a"):
            torch.testing.assert_close(bare(images), expected)
        bank.unload("a")
        assert torch.equal(bare(images), before)
        assert all(torch.equal(value, state[key]) for key, value in bare.state_dict().items())
