"""FourierMoEConfig: the settings of the paper's method and its ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fourier_moe.config import (
    ProjectionAdapterConfig,
    StoredProjection,
    at_least_one,
    dropout,
    multiple,
    not_negative,
    top_k,
)

_MANY_SEGMENTS = 8  # of the smallest expert; with 16 the product takes 1.4 times as long


@dataclass(frozen=True, kw_only=True)
class FourierMoEConfig(ProjectionAdapterConfig):
    """FourierMoE (arXiv 2604.01762): per projection a token router and experts in separate frequency bands of the update.

    Args:
        num_coefficients: n, trained spectral scalars of one projection, summed over its routed experts. Each expert gets
            P = n / (2 num_experts) conjugate pairs, a complex coefficient (two scalars) each.
        shared_coefficients: trained scalars of a further expert, which serves every token with a gate of 1, at positions that
            are drawn uniformly from the whole plane; 0 for none.
        num_experts: E. A single expert is always on: no router, and it can be merged into the weight.
        top_k: K, experts active per token.
        densities: one whole number for each expert, from DC outwards: [4, 2, 1, 1] gives the first expert half of the n
            coefficients and the last an eighth, so that routing chooses the rank of a token's update (Corollary H.3). None:
            all have equally many.
        bandwidth: B, width of an expert's band in units of the normalized radius (0 = DC, 1 = corner of the plane); one for
            all, or one for each expert.
        band_layout: where the bands lie. `cover`: centers (e + 1/2)/E, spread over all frequencies. `stack`: centers
            (e + 1/2) B, side by side from DC outwards (the paper's bandwidth sweep).
        scaling: alpha, the factor of the update. A number is the paper's. `relative` sets it from each projection's shape and
            each expert's pair count such that coefficients of root mean square modulus 1 give an update of Frobenius norm
            sqrt(out_features), the norm of a typical pretrained weight: one learning rate then serves all widths, models and
            coefficient counts.
        dropout: dropout on the experts' input.
        balance_weight: lambda, weight of the load-balancing loss, which is summed over the adapted projections.
        router_scope: `projection`: every projection has its own router. `input`: projections that read the same input (q, k
            and v; gate and up) share one. `block`: the adapted projections of a transformer block share one for each width
            of input.
        router_features: `all`: a router reads the whole input. An even number k: it reads the real and imaginary parts of the
            k/2 lowest frequencies of the input's own spectrum, DC aside, and has k weights per expert.
        normalize_gates: divide the K gates of a token by their sum (always off for top_k = 1).
        coefficients: `complex`, or an ablation: `real` or `imaginary` trains that part only (n/2 scalars, same positions).
        frequency_bias: draw positions by band; off (ablation): uniformly over the plane.
        conjugate_symmetry: every position implies its conjugate partner; off (ablation): free single positions drawn from the
            full plane, of whose inverse transform the real part is taken.
        permute: a control that the paper lacks: rows and columns of the update are put in a fixed random order, so that near
            in frequency no longer means near in the weight.

    Raises:
        UserError: for an impossible value, naming it and what would be valid.
    """

    num_coefficients: int
    shared_coefficients: int = 0
    num_experts: int = 8
    top_k: int = 2
    densities: Sequence[int] | None = None
    bandwidth: float | Sequence[float] = 0.12
    band_layout: Literal["cover", "stack"] = "cover"
    scaling: float | Literal["relative"] = "relative"
    dropout: float = 0.0
    balance_weight: float = 1e-3
    router_scope: Literal["projection", "input", "block"] = "projection"
    router_features: int | Literal["all"] = "all"
    normalize_gates: bool = True
    coefficients: Literal["complex", "real", "imaginary"] = "complex"
    frequency_bias: bool = True
    conjugate_symmetry: bool = True
    permute: bool = False

    size_field = "num_coefficients"
    normalizes_input = True

    def __post_init__(self) -> None:
        for field in ("densities", "bandwidth"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        super().__post_init__()

    def problems(self) -> list[str]:
        problems = [*super().problems(), *at_least_one(self, "num_experts"), *top_k(self), *self._band_problems()]
        if self.densities is not None and (len(self.densities) != self.num_experts or any(d < 1 for d in self.densities)):
            problems.append(f"densities={self.densities} must be num_experts={self.num_experts} positive whole numbers")
        else:
            meaning = "2 * num_experts" if self.densities is None else "2 * sum(densities)"
            problems += multiple(self, "num_coefficients", self.size_step, meaning)
        if self.shared_coefficients < 0 or self.shared_coefficients % 2:
            problems.append(f"shared_coefficients={self.shared_coefficients} must be 0 or a positive even number")
        if isinstance(self.scaling, str):
            if self.scaling != "relative":
                problems.append(f"scaling={self.scaling!r} must be a positive number or 'relative'")
        elif not (self.scaling > 0 and math.isfinite(self.scaling)):
            problems.append(f"scaling={self.scaling} must be a positive number or 'relative'")
        k = self.router_features
        if k != "all" and (isinstance(k, str) or k < 2 or k % 2):
            problems.append(f"router_features={k!r} must be 'all' or a positive even number, two for each frequency")
        return [*problems, *dropout(self), *not_negative(self, "balance_weight")]

    def _band_problems(self) -> list[str]:
        if isinstance(self.bandwidth, Sequence):
            bandwidths, count = self.bandwidth, self.num_experts
            expected = f"num_experts={count} positive numbers, or one for all"
        else:
            bandwidths, count, expected = [self.bandwidth], 1, "a positive number, 0.12 in the paper"
        if len(bandwidths) == count and all(b > 0 and math.isfinite(b) for b in bandwidths):
            return []
        return [f"bandwidth={self.bandwidth} must be {expected}"]

    def check_fit(self, in_features: int, out_features: int) -> str | None:
        largest = (in_features - 1) // 2 * 2  # without DC and Nyquist, which are real
        if self.router_features != "all" and self.router_features > largest:
            return f"router_features={self.router_features} must be 'all' or at most {largest}"
        return None

    @property
    def size_step(self) -> int:
        return 2 * (self.num_experts if self.densities is None else sum(self.densities))

    def describe_size(self) -> str | None:
        shared = f", shared_coefficients={self.shared_coefficients}" if self.shared_coefficients else ""
        return f"{super().describe_size()}{shared}"

    @property
    def expert_pairs(self) -> tuple[int, ...]:
        """Frequency positions of each expert (E,), and of the shared one if there is one."""
        routed = self._routed_pairs if self.densities is not None else self._routed_pairs * self.num_experts
        return (*routed, self.shared_coefficients // 2) if self.shared_coefficients else routed

    @property
    def _routed_pairs(self) -> tuple[int, ...]:
        """Positions of each routed expert; one number for all if they are equal, whose number a file may exaggerate."""
        return tuple(share * self.num_coefficients // self.size_step for share in self.densities or (1,))

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """B of each expert (E,)."""
        return tuple(self.bandwidth) if isinstance(self.bandwidth, Sequence) else (self.bandwidth,) * self.num_experts

    @property
    def segment_pairs(self) -> int:
        """P, positions of one segment: experts are made of whole segments of equal size, equal experts of one each."""
        return math.gcd(*self._routed_pairs, self.shared_coefficients // 2)

    def advice(self) -> str | None:
        routed, shared = self._routed_pairs, self.shared_coefficients // 2
        P, common, smallest = self.segment_pairs, math.gcd(*routed), min(routed)
        if smallest <= _MANY_SEGMENTS * P:
            return None
        remedy = "give smaller densities, such as [4, 2, 1, 1]"
        if _MANY_SEGMENTS * common >= smallest:
            good = (p for p in range(1, shared + common + 1) if _MANY_SEGMENTS * math.gcd(p, common) >= smallest)
            remedy = f"set shared_coefficients={2 * min(good, key=lambda p: abs(p - shared))}"
        return (
            f"num_coefficients={self.num_coefficients} and shared_coefficients={self.shared_coefficients} divide the smallest "
            f"expert into {smallest // P} segments of P={P}, the greatest common divisor of all, which is slow; {remedy}"
        )

    def check_stored(self, projections: Mapping[str, StoredProjection]) -> list[str]:
        """Find tensors of other shapes, positions outside of the plane, and orders that are no permutation.

        A position outside of the plane would be an index outside of a tensor in the first forward pass.
        """
        problems = []
        routed = {stored.in_features for stored in projections.values() if "router.weight" in stored.tensors}
        for name, (in_features, out_features, tensors) in projections.items():
            if not tensors:  # the whole projection is missing
                continue
            shapes = self._stored_shapes(in_features, out_features)
            if self.router_scope != "projection" and in_features in routed and "router.weight" not in tensors:
                shapes.pop("router.weight", None)  # another projection's
            problems += [f"missing {name}.{key}" for key in shapes if key not in tensors]
            problems += [
                f"{name}.{key} is {tuple(tensors[key].shape)} in the file, {shape} in the model"
                for key, shape in shapes.items()
                if key in tensors and tensors[key].shape != shape
            ]
            if not problems:
                problems += _wrong_values(name, (out_features, in_features), tensors)
        return problems

    def ignores(self, key: str) -> bool:
        return self.num_experts == 1 and key.endswith(".router.weight")

    def _stored_shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        P = self.segment_pairs
        S = (self.num_coefficients + self.shared_coefficients) // (2 * P)
        shapes: dict[str, tuple[int, ...]] = {
            "experts.frequencies": (S, P, 2),
            "experts.coefficients": (S, P, 2 if self.coefficients == "complex" else 1),
        }
        if self.num_experts > 1:
            width = in_features if self.router_features == "all" else self.router_features
            shapes["router.weight"] = (self.num_experts, width)
        if self.normalize_input != "none":
            shapes |= {"input_moments.mean": (in_features,), "input_moments.scale": (in_features,)}
        if self.permute:
            shapes |= {"experts.input_order": (in_features,), "experts.output_order": (out_features,)}
        return shapes


def _wrong_values(name: str, plane: tuple[int, int], tensors: Mapping[str, Tensor]) -> list[str]:
    """Find impossible integers; files are checked to hold integers there."""
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
