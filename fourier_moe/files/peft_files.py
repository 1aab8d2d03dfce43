"""An adapter in the layout of the peft library: a config and the tensors a second time, by the names that peft looks for.

`fourier_moe.integrations.peft` is the tuner that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save as serialize_safetensors
from torch import Tensor, nn

from fourier_moe.adapter import adapters
from fourier_moe.errors import UserError
from fourier_moe.files.format import AdapterDescription
from fourier_moe.files.writing import FileParts
from fourier_moe.models.attention import is_split_attention
from fourier_moe.models.module_names import head_modules
from fourier_moe.spectral.config import FourierMoEConfig

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_TYPE = "FOURIER_MOE"
_PREFIX = "base_model.model."


def peft_files(model: nn.Module, description: AdapterDescription, state: Mapping[str, Tensor]) -> dict[str, FileParts]:
    """Return the files of an adapter for peft; none where it has no use for them.

    It has for models of transformers, adapted by FourierMoE with a router for every projection.

    Args:
        model: the adapted model.
        description: of the adapter.
        state: its tensors, by their names in `adapter_state_dict`.
    """
    config = description.config
    if not isinstance(config, FourierMoEConfig) or config.router_scope != "projection":
        return {}
    if not hasattr(getattr(model, "config", None), "model_type") or any(map(is_split_attention, model.modules())):
        return {}  # before `inject` splits its attention, peft finds no projections in a model
    projections, heads = list(adapters(model)), list(head_modules(model, config))
    ends = tuple(f".{name}" for name in projections)  # what peft takes for the projection, too
    settings = {name: value for name, value in asdict(config).items() if name not in ("targets", "head")}
    text = {
        "peft_type": _PEFT_TYPE,
        "task_type": None,
        "base_model_name_or_path": description.backbone,
        "revision": description.backbone_revision,
        "inference_mode": True,
        "target_modules": projections,
        "exclude_modules": [n for n, _ in model.named_modules() if n.endswith(ends) and n not in projections] or None,
        "modules_to_save": heads or None,
        **settings,
    }
    tensors = {}
    for key, tensor in state.items():
        name = next((name for name in projections if key.startswith(f"{name}.")), None)
        tensors[_PREFIX + (key if name is None else f"{name}.fourier_moe_layers{key.removeprefix(name)}")] = tensor
    return {
        PEFT_TENSORS: [serialize_safetensors(tensors, {"format": "pt"})],
        PEFT_CONFIG: [(json.dumps(text, indent=2) + "\n").encode()],
    }


def check_replaceable(directory: Path) -> None:
    """Refuse a directory with an adapter of another peft method, which has files of the same names.

    Raises:
        UserError: naming it.
    """
    path = directory / PEFT_CONFIG
    try:
        peft_type = json.loads(path.read_bytes())["peft_type"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, TypeError, KeyError):
        peft_type = "unknown"
    if peft_type != _PEFT_TYPE:
        raise UserError(f"{path} is of another adapter (peft_type {peft_type}), which would be lost; save to another directory")
