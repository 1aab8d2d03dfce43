"""Load and save open_clip models."""

from __future__ import annotations

import copy
import difflib
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_checkpoint, load_state_dict
from safetensors.torch import save_file
from torch import nn

from fourier_moe.errors import UserError
from fourier_moe.files.hub_files import HubError
from lightning_modules.tasks.backbones.hub_models import fetch_open_clip
from lightning_modules.tasks.backbones.image_library import UNTRAINED_SEED
from lightning_modules.tasks.backbones.quiet import quiet
from lightning_modules.tasks.base import without_weights


def check_model(model: str, pretrained: str | None) -> None:
    """Check a model's name and weights without loading anything.

    Args:
        model: an open_clip model name, or the path of an open_clip model config (.json).
        pretrained: an open_clip tag of that model, the path of a weights file, or None for an untrained model.

    Raises:
        UserError: for an unknown name, tag or path, or weights made for another activation function.
    """
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise UserError(f"model={model!r} looks like the path of an open_clip model config, but there is no such file")
    elif model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=5, cutoff=0.4)
        raise UserError(
            f"model={model!r} is not an open_clip model; near names: {', '.join(near) or 'none'}; open_clip.list_models() has "
            "all. Other models: the path of an open_clip config (.json), timm:NAME, owner/name on the hub, or a directory"
        )
    if pretrained is None or Path(pretrained).is_file():
        return
    tags = [] if model.endswith(".json") else open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        near = difflib.get_close_matches(pretrained, tags, n=5, cutoff=0.3)
        raise UserError(
            f"pretrained={pretrained!r} is neither a file nor a tag of open_clip model {model!r}; "
            f"tags: {', '.join(near + [tag for tag in tags if tag not in near]) or 'none'}"
        )
    _check_activation(model, pretrained)


def _check_activation(model: str, tag: str) -> None:
    """Refuse weights trained with QuickGELU for a GELU model and vice versa, which cost accuracy; open_clip only warns."""
    weights_quick = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    model_quick = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    if weights_quick == model_quick:
        return
    other = f"{model}-quickgelu" if weights_quick else model.removesuffix("-quickgelu")
    if other != model and other in open_clip.list_models():
        raise UserError(
            f"pretrained={tag!r} of model={model!r} was trained with {'QuickGELU' if weights_quick else 'GELU'}, but this "
            f"model uses {'QuickGELU' if model_quick else 'GELU'}; use model={other!r}"
        )


def image_settings(model: str, pretrained: str | None) -> dict[str, Any]:
    """Return `image_size`, `mean` and `std` of the images that a tower reads, without loading it; see `check_model`."""
    tags = [] if model.endswith(".json") else open_clip.list_pretrained_tags_by_model(model)
    weights = open_clip.get_pretrained_cfg(model, pretrained) if pretrained in tags else {}
    return {
        "image_size": _register(model)[1]["vision_cfg"].get("image_size", 224),
        "mean": weights.get("mean", open_clip.OPENAI_DATASET_MEAN),
        "std": weights.get("std", open_clip.OPENAI_DATASET_STD),
    }


def load_open_clip(
    model: str, pretrained: str | None, *, image_size: int | None = None, tiny: bool = False, needs_text: bool = False
) -> nn.Module:
    """Load an open_clip model (both towers).

    Args:
        model: see `check_model`.
        pretrained: see `check_model`.
        image_size: side of the input image in pixels; None for the model's own.
        tiny: load an untrained model of the same architecture with 2 layers of width 256.
        needs_text: refuse a weights file with only the vision tower.

    Raises:
        UserError: as `check_model`, or if the weights cannot be fetched.
    """
    check_model(model, pretrained)
    name, config = _register(model)
    overrides = _tiny(config, model) if tiny else {}
    # open_clip warns of random initialization even if weights are loaded afterwards; the run's report names the weights.
    with torch.random.fork_rng(devices=[]), quiet(logging.ERROR):
        torch.manual_seed(UNTRAINED_SEED)
        if without_weights():
            return open_clip.create_model(name, force_image_size=image_size, pretrained_text=False, device="meta", **overrides)
        if tiny or pretrained is None:
            return open_clip.create_model(name, force_image_size=image_size, pretrained_text=False, **overrides)
        if Path(pretrained).is_file():
            clip = open_clip.create_model(name, force_image_size=image_size, pretrained_text=False)
            return _load_file(clip, pretrained, needs_text)
        fetch_weights(model, pretrained, look_up=False)
        return open_clip.create_model(name, pretrained=pretrained, force_image_size=image_size)


def fetch_weights(model: str, pretrained: str | None, *, look_up: bool = True) -> None:
    """Fetch the weights of a tag; do nothing for files and untrained models.

    Args:
        model: see `check_model`.
        pretrained: see `check_model`.
        look_up: ask the hub for the newest version, not only for files that the cache does not have.

    Raises:
        UserError: as `check_model`, or if the weights cannot be fetched.
    """
    check_model(model, pretrained)
    if pretrained is None or Path(pretrained).is_file():
        return
    try:
        fetch_open_clip(model, pretrained, look_up=look_up)
    except HubError as error:
        raise UserError(
            f"the weights pretrained={pretrained!r} of model={model!r} cannot be fetched ({error}). "
            "Without a network: give the path of a weights file as model.task.init_args.pretrained, or fill the Hugging "
            "Face cache (HF_HOME) on a machine that has one and copy it"
        ) from error


def save_open_clip(clip: Any, model: str, directory: Path, *, image_size: int | None = None, tiny: bool = False) -> None:
    """Write a whole CLIP for `open_clip.create_model("local-dir:DIRECTORY")`; arguments as for `load_open_clip`."""
    _, config = _register(model)
    config = {**copy.deepcopy(config), **(_tiny(config, model) if tiny else {})}
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    preprocess = {"mean": clip.visual.image_mean, "std": clip.visual.image_std}
    preprocess |= {
        name: value for name, value in clip.visual.preprocess_cfg.items() if name in ("interpolation", "resize_mode")
    }
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")


def _register(model: str) -> tuple[str, dict[str, Any]]:
    """Return open_clip's name and config of a model."""
    if model.endswith(".json"):
        open_clip.add_model_config(Path(model))
        return Path(model).stem, json.loads(Path(model).read_text(encoding="utf-8"))
    return model, open_clip.get_model_config(model)


def _tiny(config: dict[str, Any], model: str) -> dict[str, Any]:
    vision, text = copy.deepcopy(config["vision_cfg"]), copy.deepcopy(config["text_cfg"])
    if not isinstance(vision.get("layers"), int) or "hf_model_name" in text:
        raise UserError(f"tiny=True needs a CLIP with a plain vision transformer, and model={model!r} has none")
    vision.update(layers=2, width=256, head_width=64)
    text.update(layers=1, width=64, heads=2)
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}


def _load_file(clip: nn.Module, path: str, needs_text: bool) -> nn.Module:
    """Load a checkpoint of the whole CLIP, or only of its vision tower."""
    try:
        state = load_state_dict(path)
    except Exception as error:  # every file format has its own errors
        raise UserError(f"pretrained={path!r} cannot be read as a weights file: {_first_line(error)}") from error
    try:
        if any(key.startswith("visual.") for key in state):
            load_checkpoint(clip, path)
        elif needs_text:
            raise UserError(f"pretrained={path!r} has only a vision tower; head='zero_shot' also needs CLIP's text tower")
        else:
            clip.visual.load_state_dict(state)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise UserError(f"pretrained={path!r} does not fit the model: {_first_line(error, lines=3)}") from error
    return clip


def _first_line(error: BaseException, lines: int = 1) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:lines])
