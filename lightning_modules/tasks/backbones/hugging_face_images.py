"""Hugging Face image models as classifiers: the family's own `...ForImageClassification`, or a head on the pooled output."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from datamodules.shared.tokenizers import is_path
from fourier_moe.errors import UserError
from lightning_modules.tasks.backbones.hugging_face import (
    architecture,
    build_untrained,
    check_complete,
    check_model,
    fetch_model,
    named,
    not_loaded,
    quiet_transformers,
    read_config,
    source,
)
from lightning_modules.tasks.backbones.image_library import (
    DEFAULT,
    UNTRAINED_SEED,
    Channels,
    ImageInput,
    ImageLibrary,
    channels,
)
from lightning_modules.tasks.backbones.open_clip_images import save_head
from lightning_modules.tasks.base import without_weights
from lightning_modules.tasks.heads import cast_to_float32, reading_heads

# A probe for what an image processor does to colors, and the settings by which it does more than subtract and divide.
_COLOR = (200, 100, 50)
_OTHER_SETTINGS = ("do_flip_channel_order", "include_top", "rescale_offset", "rescale_factor")


class PooledClassifier(nn.Module):
    """A model of a family without a classifier (DINOv3, a vision tower by itself), with a head on its pooled output."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        width: Any = _pooled_size(backbone.config)
        self.classifier = nn.Linear(width, num_classes)
        self.backbone_name, self.backbone_revision = backbone.config._name_or_path, backbone.config._commit_hash

    def forward(self, pixel_values: Tensor, **options: Any) -> ImageClassifierOutput:
        features = self.backbone(pixel_values=pixel_values, **options).pooler_output
        return ImageClassifierOutput(logits=self.classifier(features))


class HuggingFaceImages(ImageLibrary):
    """Models of transformers, by their name on the hub or their directory; arguments of ImageLibrary.

    The head is `classifier`, always new.
    """

    head_names = ("classifier",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        check_model(self.model, "float32")
        if self.pretrained not in (DEFAULT, None):
            raise UserError(
                f"pretrained={self.pretrained!r} is for open_clip and timm; model={self.model!r} is a Hugging Face model: set "
                "pretrained to default for its own weights, or to null for none"
            )

    def fetch(self, *, look_up: bool = True) -> None:
        if not self.tiny:
            fetch_model(self.model, look_up=look_up)

    def input(self) -> ImageInput:
        """Read the image processor's size, mean and std; without one, the config's size.

        Raises:
            UserError: if the processor changes colors in another way than by mean and std.
        """
        own = _native_size(self._config(2))
        processor = None if self.tiny and not is_path(self.model) else self._processor()
        if processor is None:
            return ImageInput(self.image_size or own)
        settings = processor.to_dict()
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        size = self.image_size or _side(crop) or _side(settings.get("size")) or own
        mean: Channels | None = (0.0, 0.0, 0.0)
        std: Channels | None = (1.0, 1.0, 1.0)
        if settings.get("do_normalize"):  # None is no
            mean, std = channels(settings.get("image_mean")), channels(settings.get("image_std"))
        if mean is not None and std is not None and not _normalizes(processor, mean, std):
            causes = [
                f"{name}={settings[name]}" for name in _OTHER_SETTINGS if settings.get(name) not in (None, False, 1 / 255)
            ]
            raise UserError(
                f"model={self.model!r} has a {type(processor).__name__} that changes colors in another way than by mean and "
                f"std ({', '.join(causes) or 'without a setting'}), which the data cannot; choose another model, such as timm's"
            )
        return ImageInput(size, mean, std)

    def _processor(self) -> Any:
        """Load the model's image processor; None if it has none."""
        try:
            with quiet_transformers():
                return AutoImageProcessor.from_pretrained(source(self.model), local_files_only=True)
        except (OSError, ValueError):
            return None

    def forward_flops(self) -> int | None:
        return super().forward_flops() if self.tiny or is_path(self.model) else None

    def build(self, num_classes: int, class_names: Sequence[str] | None = None) -> nn.Module:
        config = self._config(num_classes)
        has_classifier = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        loaded = self._load(AutoModelForImageClassification if has_classifier else AutoModel, config)
        pooled = loaded.main_input_name == "pixel_values" and _pooled_size(config) is not None
        if not (isinstance(getattr(loaded, "classifier", None), nn.Module) if has_classifier else pooled):
            raise UserError(f"model={self.model!r} is a {type(loaded).__name__}, which does not classify images")
        model = loaded if has_classifier else PooledClassifier(loaded, num_classes)
        head: Any = model.get_submodule("classifier")
        for part in head.modules() if has_classifier else ():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # by the run's seed; a head of ImageNet's classes does not stay for others
        head.register_forward_pre_hook(cast_to_float32)
        return model

    def _load(self, auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
        if self.tiny or self.pretrained is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(UNTRAINED_SEED)
                loaded = build_untrained(auto_class, self.model, config, {"dtype": torch.float32})
            loaded.config._name_or_path = f"{Path(self.model).name}/{'tiny' if self.tiny else 'untrained'}"
            loaded.config._commit_hash = None
            return loaded.train()
        commit = fetch_model(self.model, look_up=False)
        if without_weights():
            return named(build_untrained(auto_class, self.model, config, {"dtype": torch.float32}), self.model, commit)
        reading = {"config": config, "local_files_only": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        try:
            with quiet_transformers():  # transformers reports the new head as "newly initialized"
                loaded, info = auto_class.from_pretrained(source(self.model), **reading, output_loading_info=True)
        except Exception as error:  # every file format has its own errors
            raise not_loaded(self.model, error) from error
        random = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        check_complete(self.model, loaded, [name for name in random if not name.startswith("classifier.")])
        return named(loaded, self.model, commit)

    def _config(self, num_classes: int) -> PretrainedConfig:
        if self.tiny and not is_path(self.model):
            make: Any = CONFIG_MAPPING[architecture(self.model)]
            config = make(num_labels=num_classes)
        else:
            if not is_path(self.model):
                fetch_model(self.model, look_up=False)
            config = read_config(self.model, num_labels=num_classes)
        config.architectures = []  # of a family with two classifiers (DeiT, LeViT) the plain one, not that with a teacher
        vision = getattr(config, "vision_config", config)
        if config.model_type.startswith("siglip") and vision is not config:
            vision.vision_use_head = False  # its attention pooling, which the family's classifier computes and does not read
        if self.tiny:
            _shrink(vision)
        return config

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits; position embeddings are interpolated for images of another size than the model's own."""
        options = {}
        own = _native_size(model.config if isinstance(model, PreTrainedModel) else model.backbone.config)  # type: ignore[union-attr]
        if own is not None and tuple(images.shape[-2:]) != (own, own) and _interpolates(model):
            options["interpolate_pos_encoding"] = True
        with reading_heads([model.get_submodule(name) for name in self.head_names]):
            return model(pixel_values=images, **options).logits.float()

    def save(self, model: Any, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the model for AutoModelForImageClassification, with the class names, and its image processor.

        Of a family without a classifier, write the model for AutoModel and the head beside it.
        """
        if isinstance(model, PooledClassifier):
            model.backbone.save_pretrained(directory)
            save_head(model.classifier, directory, {"kind": "linear", "class_names": class_names and list(class_names)})
        else:
            if class_names:
                model.config.id2label = dict(enumerate(class_names))
                model.config.label2id = {name: index for index, name in enumerate(class_names)}
            model.save_pretrained(directory)
        processor = self._processor()
        if processor is None:
            return
        if self.image_size is not None:
            processor.size = {"height": self.image_size, "width": self.image_size}
            processor.do_center_crop = False
        processor.save_pretrained(directory)


def _normalizes(processor: Any, mean: Channels, std: Channels) -> bool:
    """Return whether a processor makes (color / 255 - mean) / std of a color, in images (3, H, W)."""
    try:
        with quiet_transformers(), torch.device("cpu"):  # forward_flops is on the meta device
            pixels = processor(Image.new("RGB", (64, 64), _COLOR), return_tensors="pt")["pixel_values"][0]
    except (KeyError, RuntimeError, TypeError, ValueError):  # it makes something else of images, or nothing
        return False
    if pixels.ndim != 3 or len(pixels) != 3:
        return False
    found = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    levels = [255 * (value * s + m) for value, m, s in zip(found.tolist(), mean, std, strict=True)]
    return all(abs(level - color) < 2 for level, color in zip(levels, _COLOR, strict=True))  # resizing rounds


def _pooled_size(config: Any) -> int | None:
    """Return the width of a model's pooled output; None if its config does not say it."""
    stages = getattr(config, "hidden_sizes", None) or [None]
    return getattr(config, "hidden_size", stages[-1])


def _native_size(config: Any) -> int | None:
    return _side(getattr(getattr(config, "vision_config", config), "image_size", None))


def _side(size: Any) -> int | None:
    """Return the side of a square from a number, a pair, or a processor's size; None for others."""
    if isinstance(size, int):
        return size
    if isinstance(size, (list, tuple)):
        return int(size[0]) if len(set(size)) == 1 else None
    sides = dict(size or {})
    if sides.get("shortest_edge"):
        return int(sides["shortest_edge"])
    return _side([sides[name] for name in ("height", "width")]) if sides.get("height") and sides.get("width") else None


def _interpolates(model: nn.Module) -> bool:
    """Return whether a module takes `interpolate_pos_encoding`; a model passes on what it does not take itself."""
    return any("interpolate_pos_encoding" in inspect.signature(type(m).forward).parameters for m in model.modules())


def _shrink(config: Any) -> None:
    """Make a vision config that of a tiny model: 2 layers of width 256, or one layer a stage."""
    if hasattr(config, "depths"):
        config.depths = [1] * len(config.depths)
        return
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
