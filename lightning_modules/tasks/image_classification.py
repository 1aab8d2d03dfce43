"""ImageClassification: a vision model of open_clip, timm or Hugging Face with a classifier on its pooled output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from datamodules.shared.tokenizers import is_path
from fourier_moe.errors import UserError
from lightning_modules.tasks.backbones.hugging_face_images import HuggingFaceImages
from lightning_modules.tasks.backbones.image_library import DEFAULT, ImageLibrary
from lightning_modules.tasks.backbones.open_clip_images import CosineHead, ImageClassifier, OpenClipImages
from lightning_modules.tasks.backbones.timm_images import TimmImages, is_timm
from lightning_modules.tasks.base import Batch, Evaluation, Task, TaskData
from lightning_modules.tasks.class_ranges import class_rows, evaluate_classes, own_classes_only, require_two_classes
from lightning_modules.tasks.scores import BalancedAccuracy

__all__ = ["CosineHead", "ImageClassification", "ImageClassifier"]


class ImageClassification(Task):
    """Classify images with a frozen vision model of open_clip, timm or Hugging Face.

    Of several tasks at once (a batch with `classes`, see `datamodules.mixture`) each image is classified among the classes of
    its own task, as with an output layer per task. The data's `image_size`, `mean` and `std` follow the model where they are
    null.

    Args:
        model: open_clip model name (`ViT-B-32-quickgelu`) or path of an open_clip model config (.json); `timm:NAME` or
            `timm/NAME` (`timm:vit_small_patch14_dinov2`); name on the Hugging Face hub (`google/vit-base-patch16-224`); or a
            directory of timm or Hugging Face.
        pretrained: `default` for the weights that belong to the name (OpenAI's for open_clip); an open_clip tag (`openai`);
            path of a weights file (whole CLIP or vision tower; a timm model's); or null for an untrained model (always from
            the same seed, so that its adapters can be loaded again).
        head: `linear` for a linear layer on the pooled output. For open_clip that is before CLIP's projection (768 numbers for
            ViT-B/32), as in the paper; other models pool as their library's classifier does. `zero_shot` for a cosine
            classifier that starts from CLIP's text embeddings of the class names (learning rate 0 keeps them).
        templates: prompts of the zero-shot head; `{}` stands for the class name.
        image_size: side of the input in pixels; null for the model's own. Position embeddings are interpolated.
        tiny: use an untrained model with 2 layers of width 256 (configs/smoke.yaml).

    Raises:
        UserError: for an unknown model, tag or path, or a template without `{}`.
    """

    main_metric = "accuracy"
    monitor = ("val/accuracy", "max")
    pipeline_tag = "image-classification"
    batch_keys = ("image", "label")

    def __init__(
        self,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str | None = DEFAULT,
        head: Literal["linear", "zero_shot"] = "linear",
        templates: Sequence[str] = ("a photo of a {}.",),
        image_size: int | None = None,
        tiny: bool = False,
    ) -> None:
        super().__init__()
        if head not in ("linear", "zero_shot"):
            raise UserError(f"head={head!r} must be 'linear' or 'zero_shot'")
        if not templates or any("{}" not in template for template in templates):
            raise UserError(f"templates={list(templates)!r} must be prompts with {{}} for the class name")
        self.model_name, self.pretrained = model, pretrained
        self.head_kind, self.templates = head, tuple(templates)
        self.image_size, self.tiny = image_size, tiny
        self.num_classes = 0  # outputs of the head
        self.library = self._library()

    def _library(self) -> ImageLibrary:
        arguments = (self.model_name, self.pretrained, self.image_size, self.tiny)
        timm, config = is_timm(self.model_name), self.model_name.endswith(".json")
        if not timm and (config or not ("/" in self.model_name or is_path(self.model_name))):
            return OpenClipImages(*arguments, templates=self.templates if self.works_untrained else None)
        if self.works_untrained:
            raise UserError(f"head='zero_shot' needs an open_clip model, for its text tower; model={self.model_name!r} is none")
        return (TimmImages if timm else HuggingFaceImages)(*arguments)

    @property
    def head_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.library.head_names

    @property
    def works_untrained(self) -> bool:
        return self.head_kind == "zero_shot"

    def fetch(self) -> None:
        self.library.fetch()

    def forward_flops(self) -> int | None:
        return self.library.forward_flops()

    def check_data(self, data: TaskData) -> None:
        super().check_data(data)
        require_two_classes(data)
        if self.head_kind == "zero_shot" and "classes" in getattr(data, "batch_keys", ()):
            raise UserError(
                "head='zero_shot' makes prompts of class names, which in a mixture have their task's name; use linear"
            )

    def tell_data(self, data: L.LightningDataModule | None) -> None:
        """Tell an ImageDataModule the size, mean and std of the images that the model reads."""
        follow = getattr(data, "follow_model", None)
        for note in follow(**self.library.input()._asdict()) if follow is not None else ():
            rank_zero_info(note)

    def build(self, num_classes: int | None, class_names: Sequence[str] | None = None) -> nn.Module:
        """Load model and head; see Task.

        Raises:
            UserError: if the number of classes is unknown, or class names are missing for the zero-shot head.
        """
        self.num_classes = num_classes or len(class_names or ())
        if not self.num_classes:
            raise UserError("num_classes is unknown; give data with classes, or the adapter file that keeps them")
        self.model = self.library.build(self.num_classes, class_names)
        return self.model

    def arguments(self) -> dict[str, Any]:
        prompts = {"templates": self.templates} if self.head_kind == "zero_shot" else {}
        names = {"model": self.model_name, "pretrained": self.pretrained, "head": self.head_kind}
        return {**names, **prompts, "image_size": self.image_size, "tiny": self.tiny}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for preprocessed images (B, 3, H, W)."""
        assert self.model is not None, "build() comes first"
        return self.library.logits(self.model, images)

    def save_model(self, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the whole model in its library's own format.

        open_clip's is the whole CLIP with its unchanged text tower, and head.safetensors and head.json beside it.
        """
        self.library.save(self.model, directory, class_names)

    def _logits(self, batch: Batch) -> Tensor:
        return own_classes_only(self(batch["image"]), batch)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(batch), batch["label"])

    def new_metrics(self) -> MetricCollection:
        accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        return MetricCollection({"accuracy": accuracy, "balanced_accuracy": BalancedAccuracy(self.num_classes)})

    def evaluate(self, batch: Batch) -> Evaluation:
        return evaluate_classes(self._logits(batch), batch)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return class_rows(self._logits(batch), batch)
