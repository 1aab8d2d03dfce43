"""ImageClassification: an open_clip vision tower with a classifier on its pooled output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fourier_moe.errors import UserError
from fourier_moe.models.attention import fuse_attention, is_split_attention
from fourier_moe.routing.logits import without_autocast
from lightning_modules.tasks.backbones.open_clip import check_model, fetch_weights, load_open_clip, save_open_clip
from lightning_modules.tasks.base import Batch, Evaluation, Task, TaskData
from lightning_modules.tasks.class_ranges import class_rows, evaluate_classes, own_classes_only, require_two_classes
from lightning_modules.tasks.scores import BalancedAccuracy


class ImageClassifier(nn.Module):
    """Backbone: images (B, 3, H, W) -> features (B, D); head: features -> logits (B, classes), always in float32."""

    def __init__(self, backbone: nn.Module, head: nn.Module, backbone_name: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.backbone_name = backbone_name

    def forward(self, images: Tensor) -> Tensor:
        size = getattr(self.backbone, "image_size", None)
        size = (size, size) if isinstance(size, int) else size  # open_clip's ResNets have a single number
        if size is not None and tuple(images.shape[-2:]) != tuple(size):
            raise UserError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, {self.backbone_name} needs {size[0]} x {size[1]}; set "
                f"data.init_args.image_size={size[0]}, or model.task.init_args.image_size={images.shape[-1]}"
            )
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


class ImageClassification(Task):
    """Classify images with a frozen open_clip vision tower.

    Of several tasks at once (a batch with `classes`, see `datamodules.mixture`) each image is classified among the classes of
    its own task, as with an output layer per task.

    Args:
        model: open_clip model name (`ViT-B-32-quickgelu`) or path of an open_clip model config (.json).
        pretrained: open_clip tag of its weights (`openai`), path of a weights file (whole CLIP or vision tower), or null for an
            untrained tower (always from the same seed, so that its adapters can be loaded again).
        head: `linear` for a linear layer on the pooled output before CLIP's projection (768 numbers for ViT-B/32), as in the
            paper; `zero_shot` for a cosine classifier that starts from CLIP's text embeddings of the class names (learning
            rate 0 keeps them).
        templates: prompts of the zero-shot head; `{}` stands for the class name.
        image_size: side of the input in pixels; null for the model's own. Position embeddings are interpolated.
        tiny: use an untrained tower with 2 layers of width 256 (configs/smoke.yaml).

    Raises:
        UserError: for an unknown model, tag or path, or a template without `{}`.
    """

    head_names = ("head",)
    main_metric = "accuracy"
    monitor = ("val/accuracy", "max")
    pipeline_tag = "image-classification"
    batch_keys = ("image", "label")

    def __init__(
        self,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str | None = "openai",
        head: Literal["linear", "zero_shot"] = "linear",
        templates: Sequence[str] = ("a photo of a {}.",),
        image_size: int | None = None,
        tiny: bool = False,
    ) -> None:
        super().__init__()
        check_model(model, pretrained)
        if head not in ("linear", "zero_shot"):
            raise UserError(f"head={head!r} must be 'linear' or 'zero_shot'")
        if not templates or any("{}" not in template for template in templates):
            raise UserError(f"templates={list(templates)!r} must be prompts with {{}} for the class name")
        self.model_name, self.pretrained = model, pretrained
        self.head_kind, self.templates = head, tuple(templates)
        self.image_size, self.tiny = image_size, tiny

    @property
    def works_untrained(self) -> bool:
        return self.head_kind == "zero_shot"

    def fetch(self) -> None:
        if not self.tiny:
            fetch_weights(self.model_name, self.pretrained)

    def forward_flops(self) -> int:
        with torch.device("meta"):
            clip: Any = load_open_clip(self.model_name, self.pretrained, image_size=self.image_size, tiny=self.tiny)
            size = clip.visual.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return _count_flops(clip.visual, torch.empty(1, 3, height, width))

    def check_data(self, data: TaskData) -> None:
        super().check_data(data)
        require_two_classes(data)

    def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> ImageClassifier:
        """Load tower and head; see Task.

        Raises:
            UserError: if the number of classes is unknown, or class names are missing for the zero-shot head.
        """
        num_classes = num_classes or len(class_names or ())
        if not num_classes:
            raise UserError("num_classes is unknown; give data with classes, or the adapter file that keeps them")
        zero_shot = self.head_kind == "zero_shot"
        clip = load_open_clip(
            self.model_name, self.pretrained, image_size=self.image_size, tiny=self.tiny, needs_text=zero_shot
        )
        backbone: Any = clip.visual
        head: nn.Module
        if zero_shot:
            if class_names is None:
                raise UserError("head='zero_shot' needs class names, and neither data nor adapter file has them")
            head = self._zero_shot_head(clip, class_names)
        elif isinstance(getattr(backbone, "proj", None), nn.Parameter):
            head = nn.Linear(backbone.proj.shape[0], num_classes)
            backbone.proj = None
        else:  # a tower without CLIP's projection returns its pooled output
            head = nn.Linear(_feature_size(backbone, backbone.image_size), num_classes)
        weights = "tiny" if self.tiny else Path(self.pretrained).name if self.pretrained else "untrained"
        self.model = ImageClassifier(backbone, head, f"{Path(self.model_name).stem}/{weights}")
        return self.model

    def arguments(self) -> dict[str, Any]:
        prompts = {"templates": self.templates} if self.head_kind == "zero_shot" else {}
        names = {"model": self.model_name, "pretrained": self.pretrained, "head": self.head_kind}
        return {**names, **prompts, "image_size": self.image_size, "tiny": self.tiny}

    @torch.no_grad()
    def _zero_shot_head(self, clip: Any, class_names: Sequence[str]) -> CosineHead:
        tokenizer = open_clip.get_tokenizer(Path(self.model_name).stem)
        training = clip.training
        clip.eval()
        features = []
        for name in class_names:
            prompts = tokenizer([template.replace("{}", name.replace("_", " ")) for template in self.templates])
            features.append(F.normalize(clip.encode_text(prompts, normalize=True).mean(0), dim=-1))
        clip.train(training)
        return CosineHead(torch.stack(features), clip.logit_scale.exp())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for preprocessed images (B, 3, H, W)."""
        assert self.model is not None, "build() comes first"
        return self.model(images)

    def save_model(self, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the whole CLIP for open_clip, with its unchanged text tower, and head.safetensors and head.json beside it.

        The head takes the tower's pooled output: `clip.visual.proj = None`, then `head(clip.visual(images))`.
        """
        assert isinstance(self.model, ImageClassifier)
        clip: Any = load_open_clip(self.model_name, self.pretrained, image_size=self.image_size, tiny=self.tiny)
        split = {name: module for name, module in self.model.backbone.named_modules() if is_split_attention(module)}
        for name, module in split.items():
            fuse_attention(module, clip.visual.get_submodule(name))
        inside = tuple(f"{name}." for name in split)
        state = {key: value for key, value in self.model.backbone.state_dict().items() if not key.startswith(inside)}
        unknown = clip.visual.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown
        save_open_clip(clip, self.model_name, directory, image_size=self.image_size, tiny=self.tiny)
        head = {key: value.detach().cpu().clone() for key, value in self.model.head.state_dict().items()}
        save_file(head, directory / "head.safetensors")
        description: dict[str, Any] = {"kind": self.head_kind, "class_names": class_names and list(class_names)}
        if isinstance(self.model.head, CosineHead):
            description["logit_scale"] = self.model.head.logit_scale
        (directory / "head.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _logits(self, batch: Batch) -> Tensor:
        if "classes" in batch and self.head_kind == "zero_shot":
            raise UserError(
                "head='zero_shot' makes prompts of class names, which in a mixture have their task's name; use linear"
            )
        return own_classes_only(self(batch["image"]), batch)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(batch), batch["label"])

    def new_metrics(self) -> MetricCollection:
        accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        return MetricCollection({"accuracy": accuracy, "balanced_accuracy": BalancedAccuracy(self.num_classes)})

    @property
    def num_classes(self) -> int:
        """Number of outputs of the head."""
        assert isinstance(self.model, ImageClassifier)
        weight = self.model.head.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def evaluate(self, batch: Batch) -> Evaluation:
        return evaluate_classes(self._logits(batch), batch)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return class_rows(self._logits(batch), batch)


def _count_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Count the floating-point operations of a forward pass; a multiply-add counts as two. Free on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


@torch.no_grad()
def _feature_size(backbone: nn.Module, image_size: Any) -> int:
    """Find the width of a tower's output by running it."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    training = backbone.training
    size = backbone.eval()(torch.zeros(1, 3, height, width)).shape[-1]
    backbone.train(training)
    return size
