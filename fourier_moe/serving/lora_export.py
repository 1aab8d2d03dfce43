"""Every expert as a LoRA, exact or of a smaller rank, and the router beside them, in the layout that the peft library reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fourier_moe.adapter import adapters
from fourier_moe.errors import UserError
from fourier_moe.inject import adapter_config
from fourier_moe.models.attention import is_split_attention
from fourier_moe.models.backbone import backbone_name
from fourier_moe.models.input_moments import InputMoments
from fourier_moe.models.module_names import head_modules
from fourier_moe.models.projection import is_transposed
from fourier_moe.spectral.experts import SpectralExperts
from fourier_moe.spectral.layer import FourierMoELinear

LARGEST_DIFFERENCE = 1e-5  # relative; float32 rounding leaves some 1e-7
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True)
class ExpertLoRA:
    """lora_B @ lora_A = alpha dW_e of one expert of one projection, or the nearest matrix of a smaller rank.

    Attributes:
        lora_A: (r, in_features), float32.
        lora_B: (out_features, r), float32.
        bias: (out_features,), float32, of lora_B, where the expert reads centered input; else None.
        difference: relative error, ||lora_B @ lora_A - alpha dW_e|| / ||alpha dW_e|| as measured, Frobenius norms; 0 where
            both are zero.
        truncated: whether the rank is smaller than the update's.
    """

    lora_A: Tensor
    lora_B: Tensor
    difference: float
    bias: Tensor | None = None
    truncated: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, experts: SpectralExperts, expert: int, rank: int | None = None) -> ExpertLoRA:
        left, right = experts.factors(expert)
        truncated = False
        if rank is not None and left.shape[1] > rank:
            truncated = True
            left, right = _truncated(left, right, rank)
        lora_A, lora_B = right.float().contiguous(), left.float().contiguous()
        expected = experts.delta_weight(expert).to(lora_A.dtype)
        distance, norm = torch.linalg.norm(lora_B @ lora_A - expected), torch.linalg.norm(expected)
        return cls(lora_A, lora_B, float(distance / norm) if distance > 0 else 0.0, truncated=truncated)

    def reading(self, moments: InputMoments | None) -> ExpertLoRA:
        """The same update of an input that is centered and scaled: lora_B (lora_A diag(scale) x - lora_A diag(scale) mean)."""
        if moments is None:
            return self
        lora_A, shift = moments.as_affine(self.lora_A)
        bias = self.lora_B.double() @ shift
        return replace(self, lora_A=lora_A.float().contiguous(), bias=bias.float())

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the nearest matrix to left @ right of at most this rank (Eckart and Young)."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, S, V = torch.linalg.svd(R_left @ R_right.T)
    roots = S[:rank].sqrt()
    return Q_left @ U[:, :rank] * roots, (Q_right @ V[:rank].T * roots).T


@dataclass(frozen=True)
class ProjectionExport:
    """What `export_loras` wrote for one projection: rank and measured difference of each expert's LoRA, the shared one's last.

    See ExpertLoRA.
    """

    name: str
    out_features: int
    in_features: int
    ranks: list[int]
    differences: list[float]


def export_loras(model: nn.Module, directory: Path, rank: int | None = None) -> list[ProjectionExport]:
    """Write `expert_0/`, `expert_1/`, ... (a peft adapter each, with the head), `router.safetensors` and `router.json`.

    `peft.PeftModel.from_pretrained(base, directory / "expert_3")` adds expert 3 to every adapted projection, with gate 1. The
    expert of `shared_coefficients` is in `shared/`. The routed model is y = base(x) + LoRA_shared(x) + sum_e g_e LoRA_e(x):
    p = softmax(R x + b) with R (E, N) under the projection's name in router.safetensors, b (E,) under its name and `.bias`
    where the adapter has `normalize_input: moments`, else 0; g_e = p_e for the `top_k` largest, divided by their sum where
    `normalize_gates` is true, else 0. This is the form base(x) + sum_i gate_i(x) LoRA_i(x) that vLLM's RFC #49705 names for
    routed LoRAs. router.json has `router` (the file), `experts` (directories in the order of R's rows),
    `shared` (a directory, or null), `top_k`, `normalize_gates` and, as `split_attention`, the modules that have to be replaced
    by `fourier_moe.models.attention.split_attention` of themselves before peft can find the projections inside.

    Args:
        directory: made if missing.
        rank: at most this rank for each LoRA, by the nearest matrix (servers have limits; vLLM takes 512); None is exact.

    Returns:
        One line per projection.

    Raises:
        UserError: if the adapter has no spectral experts, or a LoRA that was not truncated differs from its expert by more
            than rounding.
    """
    layers = {name: layer for name, layer in adapters(model).items() if isinstance(layer, FourierMoELinear)}
    if not layers or len(layers) < len(adapters(model)):
        method = type(adapter_config(model)).__name__
        raise UserError(f"{method} has no spectral experts to write as LoRAs; FourierMoEConfig has")
    exports = [ProjectionExport(name, layer.out_features, layer.in_features, [], []) for name, layer in layers.items()]
    for expert, folder in enumerate(next(iter(layers.values())).experts.names):
        loras = {
            name: ExpertLoRA.of(layer.experts, expert, rank).reading(layer.input_moments) for name, layer in layers.items()
        }
        for export in exports:
            lora = loras[export.name]
            if not lora.difference <= (1 if lora.truncated else LARGEST_DIFFERENCE):
                raise UserError(f"{export.name}: {folder} as LoRA differs from it by {lora.difference:.1e}, more than rounding")
            export.ranks.append(lora.rank)
            export.differences.append(lora.difference)
        _write_expert(model, loras, directory / folder)
    _write_router(model, layers, directory)
    return exports


def _write_expert(model: nn.Module, loras: Mapping[str, ExpertLoRA], directory: Path) -> None:
    tensors = {}
    for name, lora in loras.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = lora.lora_A, lora.lora_B
        if lora.bias is not None:
            tensors[f"{name}.lora_B.bias"] = lora.bias
    heads = head_modules(model, adapter_config(model))
    for name, head in heads.items():
        tensors |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in head.state_dict().items()}
    ranks = {f"^{name.replace('.', '[.]')}": lora.rank for name, lora in loras.items()}  # peft reads regular expressions
    largest = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": backbone_name(model),
        "inference_mode": True,
        "target_modules": list(loras),
        "modules_to_save": list(heads) or None,
        "r": largest,
        "lora_alpha": largest,  # peft multiplies by alpha / r; here the factor is in the weights
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(adapters(model)[name].base) for name in loras),
    }
    if any(lora.bias is not None for lora in loras.values()):
        config["lora_bias"] = True
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {f"base_model.model.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}
    save_file(prefixed, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_router(model: nn.Module, layers: Mapping[str, FourierMoELinear], directory: Path) -> None:
    weights = {}
    for name, layer in layers.items():
        router = layer.router  # of a single expert: p = 1 with any weight
        zeros = layer.experts.coefficients.new_zeros(1, layer.in_features)
        weight = zeros if router is None else router.matrix().detach()
        if layer.input_moments is not None:
            weight, bias = layer.input_moments.as_affine(weight)
            weights[f"{name}.bias"] = bias.float().cpu()
        weights[name] = weight.float().cpu().clone()
    save_file(weights, directory / ROUTER_FILE)
    config = adapter_config(model)
    experts = next(iter(layers.values())).experts
    description = {
        "router": ROUTER_FILE,
        "experts": experts.names[: experts.num_routed],
        "shared": next(iter(experts.names[experts.num_routed :]), None),
        "top_k": config.top_k,  # type: ignore[attr-defined] # that of the layers just seen
        "normalize_gates": config.normalize_gates and config.top_k > 1,  # type: ignore[attr-defined]
        "split_attention": [name for name, module in model.named_modules() if is_split_attention(module)],
    }
    (directory / "router.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
