"""timm's image models as classifiers, with timm's own pooling and head."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from datamodules.shared.tokenizers import is_path
from fourier_moe.errors import UserError
from fourier_moe.files.hub_files import HubError, Repository, Select
from fourier_moe.models.fused_linear import SplitLinear
from lightning_modules.tasks.backbones.hub_models import model_files, weights_file
from lightning_modules.tasks.backbones.image_library import (
    DEFAULT,
    UNTRAINED_SEED,
    ImageInput,
    ImageLibrary,
    channels,
    require_size,
)
from lightning_modules.tasks.backbones.quiet import quiet
from lightning_modules.tasks.base import without_weights
from lightning_modules.tasks.heads import cast_to_float32, reading_heads

_PREFIX, _HUB, _OWNER = "timm:", "hf-hub:", "timm/"


def is_timm(model: str) -> bool:
    """Return whether a name or directory is one of timm's."""
    if model.startswith((_PREFIX, _HUB, _OWNER)):
        return True
    config = Path(model).expanduser() / "config.json"
    if not is_path(model) or not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "architecture" in content and "model_type" not in content


class TimmImages(ImageLibrary):
    """timm's models: `timm:NAME` or `timm:NAME.TAG`; `hf-hub:OWNER/NAME` or `timm/NAME` on the hub, or the directory of one.

    The head is timm's own classifier, always new.

    Args:
        arguments: of ImageLibrary; for `timm:NAME`, `pretrained` may be a weights file.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._registered = self.model.startswith(_PREFIX)
        self._name = self.model.removeprefix(_PREFIX).removeprefix(_HUB)
        self._revision: str | None = None
        is_file = self.pretrained is not None and Path(self.pretrained).is_file()
        if self.pretrained not in (DEFAULT, None) and not (self._registered and is_file):
            files = "the path of a weights file, " if self._registered else ""
            raise UserError(
                f"pretrained={self.pretrained!r} of model={self.model!r} must be {files}default for the model's own weights, "
                "or null for none"
            )
        if self._registered:
            self._check_name()

    def _check_name(self) -> None:
        plain, _, tag = self._name.partition(".")
        if not timm.is_model(plain):
            near = difflib.get_close_matches(plain, timm.list_models(), n=5, cutoff=0.4)
            raise UserError(f"model={self.model!r} is not a timm model; near names: {', '.join(near) or 'none'}")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{plain}.*")]
        if tag and tag not in tags:
            raise UserError(f"model={self.model!r} has a tag that timm does not know; its tags: {', '.join(tags) or 'none'}")
        if self.pretrained == DEFAULT and not self.tiny and not self._settings.get("hf_hub_id"):
            raise UserError(f"model={self.model!r} has no weights on the hub; set pretrained to a weights file, or to null")

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        """Return what timm records of the weights: mean, std, input size, classifier, where they are."""
        if self._registered:
            registered: Any = timm.get_pretrained_cfg(self._name)
            return {} if registered is None else registered.to_dict()
        content = json.loads((self._directory() / "config.json").read_text(encoding="utf-8"))
        settings: dict[str, Any] = {"num_classes": content.get("num_classes"), **content.get("pretrained_cfg", content)}
        size = content.get("model_args", {}).get("img_size")  # as timm: the size that the stored weights have
        return (
            settings if size is None else {**settings, "input_size": (3, size, size) if isinstance(size, int) else (3, *size)}
        )

    def _directory(self, *, look_up: bool = False) -> Path:
        """Return where config and weights are; fetch them if they are on the hub."""
        if is_path(self._name):
            return Path(self._name).expanduser()
        name, _, revision = self._name.partition("@")
        return self._fetch(Repository(name, revision=revision or None), model_files, look_up)[0].parent

    def _fetch(self, repository: Repository, select: Select, look_up: bool) -> list[Path]:
        try:
            files = repository.fetch(select, rank_zero_info, look_up=look_up)
        except HubError as error:
            raise UserError(
                f"model={self.model!r} cannot be fetched ({error}). Without a network: give timm:NAME with the path of a "
                "weights file as pretrained, or a directory, or fill the Hugging Face cache (HF_HOME) on a machine that has one"
            ) from error
        self._revision = files[0].parent.name
        return files

    def _weights(self, *, look_up: bool = False) -> Path:
        """Return the weights file of a registered model."""
        if self.pretrained != DEFAULT:
            return Path(str(self.pretrained))
        file = self._settings.get("hf_hub_filename") or "pytorch_model.bin"
        name, _, revision = self._settings["hf_hub_id"].partition("@")
        return self._fetch(Repository(name, revision=revision or None), partial(weights_file, file), look_up)[0]

    def fetch(self, *, look_up: bool = True) -> None:
        if not self._registered:
            self._directory(look_up=look_up)
        elif self.pretrained == DEFAULT and not self.tiny:
            self._weights(look_up=look_up)

    def input(self) -> ImageInput:
        size = self._settings.get("input_size") or (3, 0, 1)
        own = size[-1] if size[-1] == size[-2] else None
        return ImageInput(self.image_size or own, channels(self._settings.get("mean")), channels(self._settings.get("std")))

    def forward_flops(self) -> int | None:
        return super().forward_flops() if self._registered or is_path(self._name) else None

    def build(self, num_classes: int, class_names: Sequence[str] | None = None) -> nn.Module:
        has_weights = self.pretrained is not None and not self.tiny
        options: dict[str, Any] = {}
        if self.image_size is not None and self._settings.get("fixed_input_size"):
            options["img_size"] = self.image_size
        if self.tiny:
            options |= {"embed_dim": 256, "depth": 2, "num_heads": 4}
        if has_weights and not without_weights():
            options |= {"pretrained": True, **(self._reading() if self._registered else {})}
        name = self._name if self._registered else f"local-dir:{self._directory()}"
        try:
            with torch.random.fork_rng(devices=[]), quiet(logging.ERROR):
                torch.manual_seed(UNTRAINED_SEED)
                model: Any = timm.create_model(name, **options)
        except TypeError as error:
            problem = "tiny=True needs a plain vision transformer" if self.tiny else str(error)
            raise UserError(f"model={self.model!r}: {problem}") from error
        except (RuntimeError, OSError, AssertionError, KeyError) as error:  # of files that are damaged or of another model
            raise UserError(f"model={self.model!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        model.reset_classifier(num_classes)  # draws by the run's seed
        names = model.pretrained_cfg.get("classifier") or ()
        self.head_names = (names,) if isinstance(names, str) else tuple(names)
        if not self.head_names:
            raise UserError(f"model={self.model!r} has no classifier")
        for head in self.head_names:
            model.get_submodule(head).register_forward_pre_hook(cast_to_float32)
        model.backbone_name, model.backbone_revision = self._backbone_name(has_weights), self._revision if has_weights else None
        return model.train()

    def _reading(self) -> dict[str, Any]:
        """Return arguments that let timm read the weights file in full: with as many classes as the file has."""
        file = self._weights()
        num_classes = self._settings.get("num_classes", 0)
        if self.pretrained != DEFAULT and file.suffix != ".npz":
            try:
                state = timm.models.load_state_dict(str(file))
            except Exception as error:  # every file format has its own errors
                raise UserError(f"pretrained={str(file)!r} cannot be read as a weights file: {str(error)[:200]}") from error
            names = self._settings.get("classifier", "head")
            head = state.get(f"{names if isinstance(names, str) else names[0]}.weight")
            num_classes = 0 if head is None else len(head)
        overlay = {"file": str(file), "num_classes": num_classes, "custom_load": file.suffix == ".npz"}
        return {"pretrained_cfg_overlay": overlay, "num_classes": num_classes}

    def _backbone_name(self, has_weights: bool) -> str:
        if not has_weights:
            return f"{self._name.rpartition('/')[2]}/{'tiny' if self.tiny else 'untrained'}"
        if not self._registered:
            return Path(self._name).name if is_path(self._name) else self._name
        return str(self._settings["hf_hub_id"]) if self.pretrained == DEFAULT else f"{self._name}/{self._weights().name}"

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        size = self.input().image_size
        if size is not None and self._settings.get("fixed_input_size"):
            require_size(images, size, self._name)
        with reading_heads([model.get_submodule(name) for name in self.head_names]):
            return model(images).float()

    def save(self, model: Any, directory: Path, class_names: Sequence[str] | None) -> None:
        """Write the model for `timm.create_model("local-dir:DIRECTORY", pretrained=True)`, with the class names."""
        for name, module in list(model.named_modules()):
            if isinstance(module, SplitLinear):
                model.set_submodule(name, module.fused())
        labels = {"label_names": list(class_names)} if class_names else {}
        timm.models.save_for_hf(model, str(directory), model_config=labels, safe_serialization=True)
