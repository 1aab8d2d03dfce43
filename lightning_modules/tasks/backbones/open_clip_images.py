"""open_clip's vision towers with a classifier on their pooled output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fourier_moe.errors import UserError
from fourier_moe.models.attention import fuse_attention, is_split_attention
from fourier_moe.routing.logits import without_autocast
from lightning_modules.tasks.backbones.image_library import (
    DEFAULT,
    ImageInput,
    ImageLibrary,
    channels,
    count_flops,
    feature_size,
    require_size,
)
from lightning_modules.tasks.backbones.open_clip import (
    check_model,
    fetch_weights,
    image_settings,
    load_open_clip,
    save_open_clip,
)


class ImageClassifier(nn.Module):
    """Backbone: images (B, 3, H, W) -> features (B, D); head: features -> logits (B, classes), always in float32."""

    def __init__(self, backbone: nn.Module, head: nn.Module, backbone_name: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.backbone_name = backbone_name

    def forward(self, images: Tensor) -> Tensor:
        size = getattr(self.backbone, "image_size", None)  # open_clip's ResNets have a single number
        if size is not None:
            require_size(images, size, self.backbone_name)
        features = self.backbone(images)
        with without_autocast(features.device):  # bfloat16 logits have 3 digits: a zero-shot head would tie 1 example in 20
            return self.head(features.float())


class CosineHead(nn.Module):
    """CLIP's zero-shot classifier: the scaled cosine between image features (B, D) and one text embedding per class."""

    logit_scale: Tensor

    def __init__(self, text_features: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(text_features)
        self.register_buffer("logit_scale", logit_scale, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class OpenClipImages(ImageLibrary):
    """open_clip's towers, by their name or the path of a model config (.json).

    Args:
        arguments: of ImageLibrary; `default` weights are OpenAI's.
        templates: prompts of a zero-shot head; None for a linear one.
    """

    def __init__(self, *arguments: Any, templates: Sequence[str] | None) -> None:
        super().__init__(*arguments)
        if self.pretrained == DEFAULT:
            self.pretrained = "openai"
        check_model(self.model, self.pretrained)
        self.templates = templates

    def fetch(self, *, look_up: bool = True) -> None:
        if not self.tiny:
            fetch_weights(self.model, self.pretrained, look_up=look_up)

    def input(self) -> ImageInput:
        settings = image_settings(self.model, self.pretrained)
        size = self.image_size or settings["image_size"]
        single = size if isinstance(size, int) else size[0] if len(set(size)) == 1 else None
        return ImageInput(single, channels(settings["mean"]), channels(settings["std"]))

    def forward_flops(self) -> int:
        with torch.device("meta"):
            clip: Any = load_open_clip(self.model, self.pretrained, image_size=self.image_size, tiny=self.tiny)
            size = clip.visual.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return count_flops(clip.visual, torch.empty(1, 3, height, width))

    def build(self, num_classes: int, class_names: Sequence[str] | None = None) -> ImageClassifier:
        """Load tower and head.

        Raises:
            UserError: if class names are missing for the zero-shot head, or the weights cannot be loaded.
        """
        clip = load_open_clip(
            self.model, self.pretrained, image_size=self.image_size, tiny=self.tiny, needs_text=self.templates is not None
        )
        backbone: Any = clip.visual
        head: nn.Module
        if self.templates is not None:
            if class_names is None:
                raise UserError("head='zero_shot' needs class names, and neither data nor adapter file has them")
            head = self._zero_shot_head(clip, class_names, self.templates)
        elif isinstance(getattr(backbone, "proj", None), nn.Parameter):
            head = nn.Linear(backbone.proj.shape[0], num_classes)
            backbone.proj = None
        else:  # a tower without CLIP's projection returns its pooled output
            head = nn.Linear(feature_size(backbone, backbone.image_size), num_classes)
        weights = "tiny" if self.tiny else Path(self.pretrained).name if self.pretrained else "untrained"
        return ImageClassifier(backbone, head, f"{Path(self.model).stem}/{weights}")

    @torch.no_grad()
    def _zero_shot_head(self, clip: Any, class_names: Sequence[str], templates: Sequence[str]) -> CosineHead:
        tokenizer = open_clip.get_tokenizer(Path(self.model).stem)
        training = clip.training
        clip.eval()
        features = []
        for name in class_names:
            prompts = tokenizer([template.replace("{}", name.replace("_", " ")) for template in templates])
            features.append(F.normalize(clip.encode_text(prompts, normalize=True).mean(0), dim=-1))
        clip.train(training)
        return CosineHead(torch.stack(features), clip.logit_scale.exp())

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images)

    def save(self, model: Any, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the whole CLIP, with its unchanged text tower, and the head beside it.

        A linear head takes the tower's pooled output: `clip.visual.proj = None`, then `head(clip.visual(images))`. A zero-shot
        head takes the projected one; its logits are `logit_scale` of head.json times the cosines to the rows of `weight`.
        """
        clip: Any = load_open_clip(self.model, self.pretrained, image_size=self.image_size, tiny=self.tiny)
        split = {name: module for name, module in model.backbone.named_modules() if is_split_attention(module)}
        for name, module in split.items():
            fuse_attention(module, clip.visual.get_submodule(name))
        inside = tuple(f"{name}." for name in split)
        state = {key: value for key, value in model.backbone.state_dict().items() if not key.startswith(inside)}
        unknown = clip.visual.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown
        save_open_clip(clip, self.model, directory, image_size=self.image_size, tiny=self.tiny)
        kind = "linear" if self.templates is None else "zero_shot"
        save_head(model.head, directory, {"kind": kind, "class_names": class_names and list(class_names)})


def save_head(head: nn.Module, directory: Path, description: dict[str, Any]) -> None:
    """Write head.safetensors, and head.json with the description."""
    save_file({key: value.detach().cpu().clone() for key, value in head.state_dict().items()}, directory / "head.safetensors")
    if isinstance(head, CosineHead):
        description["logit_scale"] = float(head.logit_scale)
    (directory / "head.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
