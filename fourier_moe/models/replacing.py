"""Replacing modules of a model, also the projections inside of fused attention and torch's encoder layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from fourier_moe.errors import UserError
from fourier_moe.models.attention import fused_modules, fused_projection, split_attention
from fourier_moe.models.projection import projection_shape


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a name, and keep a torch.nn.TransformerEncoderLayer around it from reading past it."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0  # off: its fused kernel for evaluation reads linear1.weight past the adapter
    setattr(owner, child, module)


def split_fused(model: nn.Module, matches: Collection[str]) -> dict[nn.Module, nn.Module]:
    """Split every fused attention of which a projection is a target, at all places where the module stands.

    Also the one inside a torch.nn.TransformerEncoderLayer whose other projections are targets: with it whole, torch's fused
    evaluation kernel would read their weights and silently bypass the adapters.

    Args:
        matches: names of projections to adapt.

    Returns:
        The split module of each fused one.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    fused = fused_modules(model)
    wanted = {name for name, inside in fused.items() if any(f"{name}.{projection}" in matches for projection in inside)}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(match.startswith(f"{name}.") for match in matches):
            wanted |= {f"{name}.self_attn"} & fused.keys()
    split: dict[nn.Module, nn.Module] = {}
    for name in (name for name in names if name in wanted):
        module = model.get_submodule(name)
        if module not in split:
            split[module] = split_attention(module)
        replace_module(model, name, split[module])
    return split


def projection_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return (in_features, out_features) of projections, also of those inside of a fused attention.

    Raises:
        UserError: naming what is no linear projection.
    """
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    sizes = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        try:
            split = model.get_submodule(name) if name in present else fused_projection(model.get_submodule(parent), last)
            sizes[name] = projection_shape(split)
        except ValueError as error:
            raise UserError(f"targets match {name!r}: {error}") from error
    return sizes
