"""Layers of the methods that start from the singular value decomposition of the pretrained weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fourier_moe.baselines.peft_layer import PeftLinear

if TYPE_CHECKING:
    from fourier_moe.baselines.singular_methods import KaSAConfig, MiLoRAConfig


def pretrained_matrix(base: nn.Module) -> Tensor:
    """W (out_features, in_features) of a projection in float32 (float64 stays); a view where nothing is to convert."""
    weight: Any = base.weight
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()  # sharded over processes, which all ask
    matrix = weight.detach().T if hasattr(base, "nf") else weight.detach()  # transformers' Conv1D stores (in, out)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


class MiLoRALinear(PeftLinear):
    """LoRA that starts as the smallest singular triplets of its weight; see MiLoRAConfig."""

    @torch.no_grad()
    def __init__(self, base: nn.Module, config: MiLoRAConfig, name: str) -> None:
        super().__init__(base, config, name)
        weight, scaling, layer = pretrained_matrix(base), config.alpha / config.r, cast(Any, self.layer)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[-config.r :] / scaling).sqrt()
        A, B = root[:, None] * Vh[-config.r :], U[:, -config.r :] * root
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
        rest = weight - scaling * B @ A
        cast(Tensor, base.weight).copy_(rest.T if hasattr(base, "nf") else rest)


class KaSALinear(PeftLinear):
    """peft's KaSA layer with the authors' penalties; see KaSAConfig.

    Attributes:
        num_projections: how many projections of the model have such a layer; the penalty is divided by it.
    """

    num_projections = 1

    def __init__(self, base: nn.Module, config: KaSAConfig, name: str) -> None:
        super().__init__(base, config, name)
        self.beta, self.gamma = config.beta, config.gamma
        if cast(
            Tensor, base.weight
        ).is_meta:  # peft would take the triplets out at the first forward, from a weight that has lost them
            cast(Any, self.layer)._lora_kasa_truncation_deferred.clear()

    def regularization(self) -> Tensor:
        layer = cast(Any, self.layer)
        A, B, d = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
        identity = torch.eye(len(d), device=d.device)
        # |A^T A - I|_F^2 = |A A^T - I|_F^2 + N - r: the large Gram matrix's distance without the matrix.
        orthogonality = sum(
            ((gram - identity).square().sum() + size - len(d)).sqrt()
            for gram, size in ((A @ A.T, self.in_features), (B.T @ B, self.out_features))
        )
        return (self.beta * d.square().sum() + self.gamma * orthogonality) / self.num_projections
