"""What a file's tensors of spectral experts must be, whoever wrote them.

Shape legend: E experts, P positions per expert, M out_features, N in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourier_moe.config import FourierMoEConfig, StoredProjection


def check_stored(config: FourierMoEConfig, projections: Mapping[str, StoredProjection]) -> list[str]:
    """The problems: tensors of other shapes, positions outside of the plane, orders that are none.

    A position outside of the plane would be an index outside of a tensor in the first forward pass.
    """
    problems = []
    routed = {stored.in_features for stored in projections.values() if "router.weight" in stored.tensors}
    for name, (in_features, out_features, tensors) in projections.items():
        if not tensors:  # the whole projection is missing
            continue
        shapes = _shapes(config, in_features, out_features)
        if config.router_scope != "projection" and in_features in routed and "router.weight" not in tensors:
            del shapes["router.weight"]  # another projection's
        problems += [f"missing {name}.{key}" for key in shapes if key not in tensors]
        problems += [
            f"{name}.{key} is {tuple(tensors[key].shape)} in the file, {shape} in the model"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ]
        if not problems:
            problems += _check_values(name, (out_features, in_features), tensors)
    return problems


def _shapes(config: FourierMoEConfig, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    E, P = config.num_experts, config.pairs_per_expert
    shapes: dict[str, tuple[int, ...]] = {
        "router.weight": (E, in_features),
        "experts.frequencies": (E, P, 2),
        "experts.coefficients": (E, P, 2 if config.coefficients == "complex" else 1),
    }
    if config.permute:
        shapes |= {"experts.input_order": (in_features,), "experts.output_order": (out_features,)}
    return shapes


def _check_values(name: str, plane: tuple[int, int], tensors: Mapping[str, Tensor]) -> list[str]:
    """Of integer tensors; that they are integers is checked for all files, see files.py."""
    problems = []
    frequencies = tensors["experts.frequencies"].long()
    for axis, letter, size in ((0, "u", plane[0]), (1, "v", plane[1])):
        largest = int(frequencies[..., axis].abs().max())
        if frequencies[..., axis].min() == torch.iinfo(torch.int64).min or largest > size // 2:
            problems.append(f"{name}.experts.frequencies has |{letter}| = {largest}, and at most {size // 2} is in the plane")
    for key in ("experts.input_order", "experts.output_order"):
        order = tensors.get(key)
        if order is not None and not torch.equal(order.long().sort().values, torch.arange(len(order), device=order.device)):
            problems.append(f"{name}.{key} is no order of {len(order)} features")
    return problems
