"""Models that read a projection's weight instead of calling it: every method refuses them, in training and evaluation."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support.models import Transformer
from torch import nn
from torch.nn import functional as F

from fourier_moe import (
    DoRAConfig,
    FFTMoEConfig,
    FourierMoEConfig,
    LoRAConfig,
    MiLoRAConfig,
    MoLoRAConfig,
    TopLoRAConfig,
    adapters,
    balance_loss,
    inject,
    recording,
)
from fourier_moe.models import pretrained_weight
from fourier_moe.models.pretrained_weight import PretrainedWeight

METHODS = [
    FourierMoEConfig(targets=["p"], num_coefficients=16, num_experts=4, bandwidth=0.5),
    MoLoRAConfig(targets=["p"], r=4, num_experts=4),
    FFTMoEConfig(targets=["p"], num_experts=2),
    LoRAConfig(targets=["p"], r=2),
    DoRAConfig(targets=["p"], r=2),
    MiLoRAConfig(targets=["p"], r=2),
    TopLoRAConfig(targets=["p"], r=2),
]
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """Multiplies with the weight of `p`, in one of several ways, and calls `q`."""

    WAYS = {  # noqa: RUF012
        "linear": lambda x, w: F.linear(x, w),
        "keywords": lambda x, w: F.linear(input=x, weight=w),
        "operator": lambda x, w: x @ w.T,
        "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
        "cast": lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)),
        "data": lambda x, w: F.linear(x, w.data),
        "fused": lambda x, w: F.linear(x, torch.cat([w, w])),
        "part": lambda x, w: F.linear(x, w.chunk(2)[1]),
        "scaled": lambda x, w: F.linear(x, 0.5 * w),
        "aten": lambda x, w: torch.ops.aten.mm(x.flatten(0, 1), w.t()),
    }

    def __init__(self, way="linear"):
        super().__init__()
        self.p, self.q, self.way = nn.Linear(16, 16), nn.Linear(16, 16), way

    def forward(self, x):
        return self.WAYS[self.way](self.q(x), self.p.weight)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_every_method_refuses_a_projection_that_is_not_called(config, training):
    model = Reader().train(training)
    inject(model, config)
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=r"the weight of 'p' itself \(linear\)"):
        model(X)


@pytest.mark.parametrize("way", Reader.WAYS)
def test_whatever_is_multiplied_with(way):
    model = Reader(way)
    model(X)
    inject(model, METHODS[3])
    with pytest.raises(ValueError, match="does not call the projection"):
        model(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_is_refused_too_and_may_look_at_the_weight(fullgraph):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Linear(16, 16)

        def forward(self, x):
            return self.p(x.to(self.p.weight.dtype) if self.p.weight.dtype != torch.int8 else x)

    model = Looks()
    inject(model, METHODS[0])
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(X.double()), model(X.double()))
    reader = Reader()
    inject(reader, METHODS[0])
    with pytest.raises(Exception, match=r"does not call the projection|Observed exception"):
        torch.compile(reader, fullgraph=fullgraph, backend="aot_eager")(X)


def test_weight_may_be_looked_at_compared_and_copied():
    model = Reader()
    original = model.p.weight.detach().clone()
    inject(model, METHODS[0])
    weight = model.p.weight
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (
        (16, 16),
        torch.float32,
        original.device,
        False,
    )
    assert torch.equal(weight, original)
    assert type(weight.norm()) is torch.Tensor
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, original)
    weight.zero_()  # a view
    assert not model.p.base.weight.any()
    assert "p.base.weight" in model.state_dict()


@pytest.mark.parametrize(
    "made_like",
    [
        lambda x, w: x.to(w),
        lambda x, w: x.type_as(w),
        lambda x, w: x.view_as(w),
        lambda x, w: x.mul(torch.ones_like(w)),
        lambda x, w: x + w.new_zeros(16, 16),
        lambda x, w: x + w.new_zeros((16, 16))[:1],
    ],
)
def test_inputs_made_like_the_weight_are_no_weight(made_like):
    """Also where a batch happens to have as many numbers as the weight."""
    model, x = nn.ModuleDict({"p": nn.Linear(16, 16)}), torch.ones(16, 16)
    inject(model, METHODS[0])
    x = made_like(x, model["p"].weight)
    assert type(x) is torch.Tensor
    model["p"](x)


class Subclass(nn.Parameter):
    pass


def test_weight_of_a_class_of_its_own_is_handed_out_as_it_is():
    weight = torch.Tensor._make_subclass(Subclass, torch.zeros(2, 2))
    assert PretrainedWeight.of(weight, "p") is weight


# ---------------------------------------------------------------- real models


def swin(version):
    family = pytest.importorskip("torchvision").models.swin_transformer
    block, merging = (
        (family.SwinTransformerBlock, family.PatchMerging)
        if version == 1
        else (family.SwinTransformerBlockV2, family.PatchMergingV2)
    )
    settings = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": [2, 2], "stochastic_depth_prob": 0.0}
    return family.SwinTransformer([4, 4], **settings, num_classes=3, block=block, downsample_layer=merging), torch.randn(
        1, 3, 16, 16
    )


def timm_model(kind):
    timm = pytest.importorskip("timm")
    settings = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
        "qkv_bias": True,
    }
    model = timm.models.beit.Beit(**settings) if kind == "beit" else timm.models.eva.Eva(**settings, qkv_fused=True)
    return model, torch.randn(1, 3, 16, 16)


def wavlm():
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolution = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embedding_groups": 2}
    config = transformers.WavLMConfig(**settings, **convolution, num_conv_pos_embeddings=4, layerdrop=0, mask_time_prob=0)
    return transformers.WavLMModel(config), torch.randn(1, 200)


def clip_resnet():
    open_clip = pytest.importorskip("open_clip")
    return open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, 2, image_size=32, width=8), torch.randn(2, 3, 32, 32)


SEEN = {
    "swin": (lambda: swin(1), "qkv"),
    "swin_proj": (lambda: swin(1), r".*\.attn\.proj"),
    "swin_v2": (lambda: swin(2), "qkv"),
    "wavlm": (wavlm, "v_proj"),
    "open_clip_resnet": (clip_resnet, "q_proj"),
}
NOT_SEEN = {"beit": (lambda: timm_model("beit"), "qkv"), "eva02": (lambda: timm_model("eva"), "qkv")}
LORA, SPECTRAL = METHODS[3], METHODS[0]


def settings_for(config, target):
    return replace(config, targets=[target])


@pytest.mark.parametrize("config", [LORA, SPECTRAL], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", SEEN)
def test_known_modules_are_refused_at_injection_and_the_model_stays_as_it_was(name, config):
    make, target = SEEN[name]
    model, _ = make()
    with pytest.raises(ValueError, match=r"targets match '.*', but \w+ reads that projection's weight and does not call it"):
        inject(model, settings_for(config, target))
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", SEEN | NOT_SEEN)
def test_unknown_ones_in_the_first_forward_pass(name, monkeypatch):
    monkeypatch.setattr(pretrained_weight, "_READERS", {})
    make, target = (SEEN | NOT_SEEN)[name]
    model, x = make()
    inject(model, settings_for(LORA, target))
    with pytest.raises(ValueError, match=rf"the weight of '{next(iter(adapters(model)))}' itself"):
        model(x)


def test_subclass_with_a_forward_of_its_own_is_not_refused_beforehand():
    pool = type(clip_resnet()[0].attnpool)

    class Calls(pool):
        def forward(self, x):
            return self.q_proj(x)

    model = nn.Sequential(Calls(2, 16, 2, 8))
    inject(model, settings_for(LORA, "q_proj"))
    model(X)


# ---------------------------------------------------------------- layers that a forward pass leaves out


class Drops(Transformer):
    """LayerDrop: only the layers in `kept` are called."""

    kept = (0, 1)

    def forward(self, x):
        for index in self.kept:
            x = self.layers[index](x)
        return self.classifier(self.norm(x.mean(1)))


def test_layers_left_out_by_design_add_no_balance_loss_and_are_no_error():
    model = Drops()
    inject(model, FourierMoEConfig(targets=["q_proj"], num_coefficients=16, num_experts=4, bandwidth=0.5))
    with recording(model):
        model(X)
        both = balance_loss(model)
    expected = []
    for kept in ((0,), (1,)):
        model.kept = kept
        with recording(model):
            model(X)
            expected.append((balance_loss(model), adapters(model)[f"layers.{kept[0]}.attention.q_proj"].balance_loss()))
    assert all(torch.equal(total, own) for total, own in expected)
    torch.testing.assert_close(expected[0][0], adapters_first(model, both))
    model.kept = ()
    with recording(model):
        model(X)
        with pytest.raises(RuntimeError, match=r"has used layers.0.attention.q_proj, layers.1.attention.q_proj; read"):
            balance_loss(model)


def adapters_first(model, both):
    """The first layer's part of a loss of both layers."""
    model.kept = (0, 1)
    with recording(model):
        model(X)
        second = adapters(model)["layers.1.attention.q_proj"].balance_loss()
    return both - second
