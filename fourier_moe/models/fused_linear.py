"""Linear layers that compute query, key and value side by side (`qkv` in timm), split into one nn.Linear for each."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

PARTS = ("q_proj", "k_proj", "v_proj")

# Attention that calls its `qkv` and reads the output's first third as query, the second as key, the last as value. Others
# order it by heads (timm's maxxvit, GPT-NeoX), and a part of their output would be something else.
_OWNERS = frozenset(
    {
        "timm.layers.attention.Attention",
        "timm.layers.attention.AttentionRope",
        "timm.models.beit.Attention",
        "timm.models.eva.EvaAttention",
        "timm.models.hiera.MaskUnitAttention",
        "timm.models.metaformer.Attention",
        "timm.models.nest.Attention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.twins.LocallyGroupedAttn",
        "timm.models.vision_transformer.Attention",  # before timm 1.0.20
        "timm.models.vision_transformer_sam.Attention",
    }
)


class SplitLinear(nn.Module):
    """Stands in for a linear layer (in, 3 * width) as three, each (in, width), whose outputs it puts side by side again."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        width = fused.out_features // 3
        for number, name in enumerate(PARTS):
            part = nn.Linear(fused.in_features, width, bias=fused.bias is not None, device="meta")
            for key, whole in fused.named_parameters():
                rows = whole.detach()[number * width : (number + 1) * width].clone()
                setattr(part, key, nn.Parameter(rows, whole.requires_grad))
            setattr(self, name, part)
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in PARTS], dim=-1)

    def copy_to(self, fused: nn.Linear) -> None:
        """Copy the weights back into the linear layer that this one was made from."""
        parts = [cast(nn.Linear, self.get_submodule(name)) for name in PARTS]
        fused.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), False)
        if fused.bias is not None:
            fused.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), False)

    def fused(self) -> nn.Linear:
        """Return one linear layer with these weights."""
        first = cast(nn.Linear, self.get_submodule(PARTS[0]))
        whole = nn.Linear(first.in_features, 3 * first.out_features, bias=first.bias is not None, device="meta")
        self.copy_to(whole)
        return whole.train(self.training)


def side_by_side(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that `SplitLinear` can stand in for, all names of one at several places."""
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        cls = type(module)
        if f"{cls.__module__}.{cls.__qualname__}" not in _OWNERS or getattr(module, "q_bias", None) is not None:
            continue  # with biases of its own, BEiT's and EVA's attention reads the weight and does not call the layer
        if type(getattr(module, "qkv", None)) is nn.Linear:
            names.append(f"{name}.qkv" if name else "qkv")
    return names
