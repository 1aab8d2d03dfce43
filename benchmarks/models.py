"""The timed models: random weights of the published shapes, and the adapted projections of each.

Dropout is off everywhere: it costs every method the same and would dilute the differences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourier_moe.models.attention import is_fused_attention, split_attention


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A row of `MODELS`.

    Attributes:
        build: makes the backbone with this many layers and the trained head.
        targets: adapted projections, as suffixes of module names.
        num_coefficients: n, FourierMoE's and FourierFT's coefficients per projection.
        layers, batch, length: defaults; length 0 for a model of images.
        vocabulary: number of token ids; 0 for images.
    """

    build: Callable[[int], tuple[nn.Module, nn.Module]]
    targets: tuple[str, ...]
    num_coefficients: int
    num_experts: int
    top_k: int
    lora_rank: int
    layers: int
    batch: int
    length: int
    vocabulary: int
    classes: int = 2


class Classifier(nn.Module):
    """`head(backbone(inputs))`: the frozen part, and the part that every method trains in full."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.backbone(inputs)
        return self.head(getattr(features, "last_hidden_state", features))


class LastToken(nn.Linear):
    """Classify a sequence by its last token, as transformers' decoders do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[:, -1])


def build_model(entry: ModelEntry, layers: int, device: torch.device, frozen_dtype: torch.dtype) -> Classifier:
    """Build random weights on `device`, all frozen: the backbone in `frozen_dtype`, the head in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone, head = entry.build(layers)
    backbone.to(frozen_dtype)
    return Classifier(backbone, head).requires_grad_(False)


def copy_with_shared_backbone(model: Classifier) -> Classifier:
    """Copy modules and head but share the backbone tensors of `model`, so that any number of methods fit at once."""
    tensors = [*model.backbone.parameters(), *model.backbone.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_batch(entry: ModelEntry, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw random (inputs, labels) without padding."""
    generator = torch.Generator().manual_seed(1)
    if entry.vocabulary:
        inputs = torch.randint(5, entry.vocabulary, (batch, length), generator=generator)
    else:
        inputs = torch.randn(batch, 3, 224, 224, generator=generator)
    labels = torch.randint(entry.classes, (batch,), generator=generator)
    return inputs.to(device), labels.to(device)


def _roberta(width: int, heads: int, vocabulary: int) -> Callable[[int], tuple[nn.Module, nn.Module]]:
    def build(layers: int) -> tuple[nn.Module, nn.Module]:
        from transformers import RobertaConfig, RobertaModel
        from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

        config = RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = 2
        return RobertaModel(config, add_pooling_layer=False), RobertaClassificationHead(config)

    return build


def _clip_vit_b_32(layers: int) -> tuple[nn.Module, nn.Module]:
    """open_clip's vision tower with split attention, so that PEFT and the floor run the same modules as FourierMoE."""
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(image_size=224, patch_size=32, width=768, layers=layers, heads=12, mlp_ratio=4.0)
    tower.proj = None  # the head reads the 768 features
    for name in [name for name, module in tower.named_modules() if is_fused_attention(module)]:
        parent, _, child = name.rpartition(".")
        setattr(tower.get_submodule(parent), child, split_attention(tower.get_submodule(name)))
    return tower, nn.Linear(768, 196)


def _llama_2_7b(layers: int) -> tuple[nn.Module, nn.Module]:
    """LLaMA without the 32,000-way output layer, which would dominate a model of few layers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return LlamaModel(config), LastToken(4096, 2)


MODELS = {
    "roberta-large": ModelEntry(
        build=_roberta(1024, 16, 50265),
        targets=("query", "value"),
        num_coefficients=1008,
        num_experts=8,
        top_k=2,
        lora_rank=8,
        layers=24,
        batch=8,
        length=128,
        vocabulary=50265,
    ),
    "clip-vit-b-32": ModelEntry(
        build=_clip_vit_b_32,
        targets=("q_proj", "v_proj"),
        num_coefficients=3008,
        num_experts=8,
        top_k=2,
        lora_rank=8,
        layers=12,
        batch=32,
        length=0,
        vocabulary=0,
        classes=196,
    ),
    "llama-2-7b": ModelEntry(
        build=_llama_2_7b,
        targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"),
        num_coefficients=8192,
        num_experts=8,
        top_k=4,
        lora_rank=16,
        layers=32,
        batch=16,
        length=256,
        vocabulary=32000,
    ),
    "tiny": ModelEntry(  # for the tests of this package
        build=_roberta(64, 4, 100),
        targets=("query", "value"),
        num_coefficients=64,
        num_experts=4,
        top_k=2,
        lora_rank=8,
        layers=2,
        batch=2,
        length=16,
        vocabulary=100,
    ),
}
