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
    adapter_state_dict,
    inject,
)
from fourier_moe.spectral import experts


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


def test_llama_2_7b_adapter_file_is_below_60_megabytes(monkeypatch):
    """What save_adapter writes for configs/commonsense_llama2_7b.yaml: float32 coefficients and routers, int32 positions."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32000, **sizes)).to(torch.bfloat16)
    targets = [f"{part}_proj" for part in ("q", "k", "v", "up", "down", "gate")]
    nowhere = torch.zeros(512, 2, dtype=torch.int32)  # their places need not be drawn to be counted
    monkeypatch.setattr(experts, "draw_frequencies", lambda *_, **__: nowhere)
    report = inject(model, FourierMoEConfig(targets=targets, num_coefficients=8192, num_experts=8, top_k=4))
    assert (len(report.projections), report.frozen) == (192, 6_738_415_616)
    state = adapter_state_dict(model).values()
    assert {tensor.dtype for tensor in state} == {torch.float32, torch.int32}
    positions = coefficients = 192 * 8192 * 4
    routers = 32 * (5 * 4096 + 11008) * 8 * 4
    assert sum(tensor.numel() * tensor.itemsize for tensor in state) == positions + coefficients + routers == 44_826_624 < 60e6
