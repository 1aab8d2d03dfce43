"""The counts that the paper's tables prove, to the last scalar."""

import pytest
import torch
from torch import nn

from fourier_moe import (
    AdaMoLEConfig,
    FFTMoEConfig,
    FourierMoEConfig,
    GOATConfig,
    HydraLoRAConfig,
    MoLoRAConfig,
    inject,
)


def roberta_large():
    transformers = pytest.importorskip("transformers")
    settings = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
    )
    with torch.device("meta"):
        return transformers.RobertaForSequenceClassification(settings)


def test_roberta_large():
    model = roberta_large()
    report = inject(model, FourierMoEConfig(targets=["self.query", "self.value"], head=["classifier"], num_coefficients=1008))
    assert len(report.projections) == 48
    assert report.trained == {"experts": 48_384, "router": 393_216, "head": 1_051_650, "backbone": 0}
    assert report.total == 1_493_250
    assert report.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(report.percent, 2) == 0.42


@pytest.mark.parametrize(
    ("config_class", "r", "total", "published"),  # Table 4 counts without the head, in percent of the model without it
    [
        (GOATConfig, 32, 16_976_898, 4.50),  # the total is GOAT's own
        (MoLoRAConfig, 32, 16_976_898, 4.50),
        (AdaMoLEConfig, 32, 17_198_226, 4.56),
        (HydraLoRAConfig, 4, 10_783_746, 2.75),
        (FFTMoEConfig, None, 2_472_608_770, 698),
    ],
)
def test_other_mixtures_on_all_projections_of_roberta_large(config_class, r, total, published):
    model = roberta_large()
    projections = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    targets = [*projections, "intermediate.dense", r".*\d\.output\.dense"]
    pretrained = sum(p.numel() for p in model.parameters()) - 1_051_650
    report = inject(model, config_class(targets=targets, head=["classifier"], **({"r": r} if r else {})))
    assert len(report.projections) == 144
    assert report.total == total
    assert report.trained["head"] == 1_051_650
    assert report.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 100 * (total - 1_051_650) / pretrained == pytest.approx(published, abs=0.5 if published > 100 else 0.01)


def test_clip_vit_b_32():
    open_clip = pytest.importorskip("open_clip")
    settings = open_clip.get_model_config("ViT-B-32")
    vision = settings["vision_cfg"]
    with torch.device("meta"):
        visual = open_clip.transformer.VisionTransformer(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            output_dim=settings["embed_dim"],
        )
    visual.proj = None  # the head reads the pooled 768 features
    model = nn.ModuleDict({"visual": visual, "head": nn.Linear(768, 196, device="meta")})
    report = inject(model, FourierMoEConfig(targets=["q_proj", "v_proj"], head=["head"], num_coefficients=3008))
    assert len(report.projections) == 24
    assert report.trained == {"experts": 72_192, "router": 147_456, "head": 150_724, "backbone": 0}
    assert report.total == 370_372
    assert round(report.percent, 2) == 0.42
