"""Pretrained models on the Hugging Face hub: choose the files to fetch, and fetch them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import open_clip
from lightning.pytorch.utilities import rank_zero_info

from datamodules.shared.tokenizers import SMALL_FILE
from fourier_moe.files.hub_files import HubError, Repository

# A repository's weights in transformers' formats, best first. Other files belong to other libraries.
_WEIGHTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"model\.safetensors",
        r"model-\d+-of-(\d+)\.safetensors",
        r"pytorch_model\.bin",
        r"pytorch_model-\d+-of-(\d+)\.bin",
    )
)


def model_files(sizes: Mapping[str, int]) -> list[str]:
    """Choose the weights, configs and tokenizer of a transformers model.

    Raises:
        HubError: if there are no weights, or some of their parts are missing.
    """
    for pattern in _WEIGHTS:
        found = {path: match for path in sizes if (match := pattern.fullmatch(path))}
        if not found:
            continue
        match = next(iter(found.values()))
        count = int(match[1]) if pattern.groups else 1
        if len(found) != count:
            raise HubError(f"{len(found)} of {count} parts of its weights are present")
        return [*(path for path in sizes if SMALL_FILE.fullmatch(path)), *found]
    raise HubError("it has no weights, model.safetensors or pytorch_model.bin", "give a transformers model")


def fetch_open_clip(model: str, tag: str, *, look_up: bool) -> None:
    """Fetch the weights of an open_clip tag into the hub's cache, where open_clip finds them.

    open_clip's own download takes any error for a missing safetensors file, and then reports the name of the next file.

    Raises:
        HubError: if they cannot be fetched.
    """
    location = open_clip.get_pretrained_cfg(model, tag).get("hf_hub")
    if location:  # all tags of open_clip 3
        name, _, file = location.rpartition("/")
        select = functools.partial(weights_file, file or "open_clip_pytorch_model.bin")
        Repository(name).fetch(select, rank_zero_info, look_up=look_up)


def weights_file(file: str, sizes: Mapping[str, int]) -> list[str]:
    """Choose the safetensors twin of a weights file, or else the file itself.

    Raises:
        HubError: if there is neither.
    """
    twins = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", "pytorch_model.bin": "model.safetensors"}
    safe = twins.get(file, f"{file.rpartition('.')[0]}.safetensors")
    found = next((path for path in (safe, file) if path in sizes), None)
    if found is None:
        raise HubError(f"it has neither {safe} nor {file}")
    return [found]
