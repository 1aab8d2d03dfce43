"""Which frequencies an expert owns: radius, band weights and the drawing of conjugate pairs.

A position (u, v) is an integer frequency along the output axis (u) and the input axis (v) of an M x N weight update, signed,
with 0 = DC. Positions (u, v) and (-u, -v) form a conjugate pair; one member stands for both.

Source: FourierMoE (arXiv 2604.01762) Eq. 3 for the band-pass weight; drawing and centers are our choices, see
docs/reference/method.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fourier_moe.errors import UserError

# Up to this many positions the whole plane is enumerated; above it positions are proposed and accepted one by one.
_ENUMERATION_LIMIT = 2**18
_POSITIONS_PER_CHUNK = 2**18  # positions whose weights are held at once when a band is measured, in whole rows


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU random generator that depends on (seed, module name) only, not on device or order of modules."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def band_centers(num_experts: int, bandwidth: float | Sequence[float], layout: str) -> list[float]:
    """Return the center f_e of each expert's band, in units of the normalized radius.

    `cover` spreads the centers evenly over the radius, f_e = (e + 1/2) / E. `stack` puts bands of the given width side by
    side from DC outwards, f_e = (e + 1/2) B, so with a small B no band covers the high frequencies.

    Args:
        bandwidth: B, one for all or one for each expert.
    """
    if layout == "stack" and isinstance(bandwidth, Sequence):
        return [sum(bandwidth[:expert]) + bandwidth[expert] / 2 for expert in range(num_experts)]
    spacing = bandwidth if layout == "stack" and not isinstance(bandwidth, Sequence) else 1.0 / num_experts
    return [(expert + 0.5) * spacing for expert in range(num_experts)]


def normalized_radius(frequencies: Tensor, out_features: int, in_features: int) -> Tensor:
    """Distance from DC, rho = sqrt(((2u/M)^2 + (2v/N)^2) / 2): 0 at DC, 1 at the corner of the plane.

    Args:
        frequencies: integer tensor (..., 2) of signed (u, v).

    Returns:
        float64 tensor (...).
    """
    u, v = frequencies.double().unbind(-1)
    return (((2 * u / out_features) ** 2 + (2 * v / in_features) ** 2) / 2).sqrt()


def band_weight(radius: Tensor, center: float, bandwidth: float) -> Tensor:
    """Band-pass weight exp(-((rho^2 - f^2) / (rho B))^2) (paper Eq. 3), in [0, 1] and finite everywhere.

    At DC (rho = 0), where the formula reads 0/0 or -f^2/0, its limit is returned: 1 for a band centered on DC, else 0.
    """
    return _log_band_weight(radius, center, bandwidth).exp()


def _log_band_weight(radius: Tensor, center: float, bandwidth: float) -> Tensor:
    """Return the same as a logarithm, which tells positions apart whose weight underflows to 0."""
    ratio = (radius.square() - center**2) / (radius * bandwidth)
    return torch.where(radius > 0, -ratio.square(), 0.0 if center == 0 else -torch.inf)


def signed_frequency(index: Tensor, size: int) -> Tensor:
    """DFT index 0..size-1 as signed frequency; for even sizes the Nyquist index size/2 stays positive."""
    return torch.where(index > size // 2, index - size, index)


def _is_self_conjugate(u: Tensor, v: Tensor, out_features: int, in_features: int) -> Tensor:
    """(u, v) equals its own conjugate partner when both are 0 or Nyquist; its coefficient would hold one real scalar only."""
    return ((2 * u) % out_features == 0) & ((2 * v) % in_features == 0)


def _admissible(u: Tensor, v: Tensor, out_features: int, in_features: int, half_plane: bool) -> Tensor:
    """Mask of the positions that may be drawn: no self-conjugate one, and one member of each pair if `half_plane`."""
    keep = ~_is_self_conjugate(u, v, out_features, in_features)
    if half_plane:
        own_row = (2 * u) % out_features == 0  # in rows 0 and M/2 a pair lies within the row: keep v in (0, N/2)
        keep &= torch.where(own_row, (v > 0) & (2 * v < in_features), u > 0)
    return keep


def count_positions(out_features: int, in_features: int, *, half_plane: bool = True) -> int:
    """Number of positions that may be drawn from an M x N plane: conjugate pairs if `half_plane`, else single positions."""
    self_conjugate = (2 - out_features % 2) * (2 - in_features % 2)
    return (out_features * in_features - self_conjugate) // (2 if half_plane else 1)


@lru_cache(maxsize=1024)
def band_capacity(
    out_features: int, in_features: int, center: float, bandwidth: float, half_plane: bool = True, *, enough: float = math.inf
) -> float:
    """Return how many positions a band holds: the sum of their weights. A larger draw would take the positions of other bands.

    Walks from both ends of the rows, |u| = 0 and |u| = M/2, where every band inside the plane has positions, and in every row
    over those columns only whose weight counts. A plane of 32768 x 32768 takes no longer than a small one, unless the band
    itself has hundreds of millions of positions and they are all to be counted.

    Args:
        enough: stop when this many are counted; then the sum is that so far.
    """
    total, members = 0.0, 2 if half_plane else 1  # of a conjugate pair one or both are counted
    num_rows, num_columns = out_features // 2 + 1, in_features // 2 + 1
    chunk = max(1, _POSITIONS_PER_CHUNK // num_columns)
    chunks = list(torch.arange(num_rows, device="cpu").split(chunk))
    low, high = _radii_that_count(center, bandwidth)
    while chunks and total / members < enough:
        u = chunks.pop(0 if len(chunks) % 2 else -1)
        # rho^2 = ((2u/M)^2 + (2v/N)^2) / 2 is between low^2 and high^2 somewhere in these rows only for |v| from first to last.
        near, far = ((2 * int(row) / out_features) ** 2 for row in (u[0], u[-1]))
        first = math.floor(math.sqrt(max(0.0, 2 * low**2 - far)) * in_features / 2)
        last = min(math.ceil(math.sqrt(max(0.0, 2 * high**2 - near)) * in_features / 2), num_columns - 1)
        if 2 * high**2 < near or first > last:
            continue
        v = torch.arange(first, last + 1, device="cpu")
        frequencies = torch.stack(torch.meshgrid(u, v, indexing="ij"), -1)
        weights = band_weight(normalized_radius(frequencies, out_features, in_features), center, bandwidth)
        weights[_is_self_conjugate(frequencies[..., 0], frequencies[..., 1], out_features, in_features)] = 0
        counts_u, counts_v = (  # signed frequencies of this size
            1 + ((index > 0) & (2 * index != size)).double() for index, size in ((u, out_features), (v, in_features))
        )
        total += float(counts_u @ weights @ counts_v)
    return total / members


def _radii_that_count(center: float, bandwidth: float) -> tuple[float, float]:
    """Between these radii the band weight is above exp(-36): |rho^2 - f^2| < 6 rho B."""
    reach = 6 * bandwidth
    root = math.hypot(reach, 2 * center)
    return max(0.0, (root - reach) / 2), min(1.0, (root + reach) / 2)


def draw_frequencies(
    count: int,
    out_features: int,
    in_features: int,
    generator: torch.Generator,
    *,
    center: float | None,
    bandwidth: float,
    half_plane: bool = True,
    alone: bool = False,
    setting: str = "num_coefficients",
) -> Tensor:
    """Draw `count` different positions, each next one with probability proportional to its band weight.

    Args:
        count: number of positions.
        center: band center in units of rho; None draws uniformly (the ablation without frequency bias).
        half_plane: draw one member of each conjugate pair (Theorem 3.2); False draws single positions from the full plane.
        alone: there is no other band, so that this one may take every position of the plane.
        setting: what asks for `count`, for the messages.

    Returns:
        int32 tensor (count, 2) of signed (u, v), ordered by (u, v).

    Raises:
        UserError: if the plane or the band has fewer positions than asked for.
    """
    total = count_positions(out_features, in_features, half_plane=half_plane)
    where = f"a {out_features} x {in_features} projection"
    if count > total:
        alternative = ", raise num_experts" if setting == "num_coefficients" else ""
        raise UserError(
            f"{setting} asks for {count} frequencies per expert, but {where} has only {total}; "
            f"lower {setting}{alternative} or leave this projection out of targets"
        )
    shape = (out_features, in_features)
    capacity = None if center is None or alone else band_capacity(*shape, center, bandwidth, half_plane, enough=count)
    if capacity is not None and count > capacity:
        raise UserError(
            f"num_coefficients asks for {count} frequencies per expert, but the band of center {center:.4g} and "
            f"bandwidth={bandwidth} holds only {int(capacity)} in {where}; lower num_coefficients, widen bandwidth, leave this "
            "projection out of targets, or use band_layout='cover', whose centers stay inside the plane"
        )
    drawn = None
    if out_features * in_features > _ENUMERATION_LIMIT:
        drawn = _draw_by_rejection(count, shape, generator, center, bandwidth, half_plane)
    if drawn is None:
        drawn = _draw_by_enumeration(count, shape, generator, center, bandwidth, half_plane)
    u, v = drawn.unbind(-1)
    return drawn[torch.argsort(u * (2 * in_features) + v)].to(torch.int32)


def _log_weights(frequencies: Tensor, shape: tuple[int, int], center: float | None, bandwidth: float) -> Tensor:
    radius = normalized_radius(frequencies, *shape)
    return torch.zeros_like(radius) if center is None else _log_band_weight(radius, center, bandwidth)


def _draw_by_enumeration(
    count: int,
    shape: tuple[int, int],
    generator: torch.Generator,
    center: float | None,
    bandwidth: float,
    half_plane: bool,
) -> Tensor:
    """Exponential race over all positions: arrival Exp(1)/w, as a logarithm; the first `count` arrivals are the draw."""
    rows = torch.arange(shape[0] // 2 + 1 if half_plane else shape[0], device="cpu")
    columns = torch.arange(shape[1], device="cpu")
    u, v = torch.meshgrid(signed_frequency(rows, shape[0]), signed_frequency(columns, shape[1]), indexing="ij")
    frequencies = torch.stack([u, v], -1)[_admissible(u, v, *shape, half_plane)]
    log_weights = _log_weights(frequencies, shape, center, bandwidth)
    arrivals = torch.empty_like(log_weights).exponential_(generator=generator).log() - log_weights
    return frequencies[torch.topk(arrivals, count, largest=False).indices]


def _draw_by_rejection(
    count: int,
    shape: tuple[int, int],
    generator: torch.Generator,
    center: float | None,
    bandwidth: float,
    half_plane: bool,
) -> Tensor | None:
    """Same distribution without touching every position: propose uniformly, accept with probability w, drop repeats.

    None when the band is so thin or so full that enumeration is the better way.
    """
    out_features, in_features = shape
    seen: dict[int, None] = {}  # insertion-ordered: the first `count` different positions are the draw
    proposals = max(64 * count, 4096)
    for _ in range(max(1, out_features * in_features // proposals)):
        flat = torch.randint(out_features * in_features, (proposals,), generator=generator, device="cpu")
        frequencies = _signed_positions(flat, shape)
        u, v = frequencies.unbind(-1)
        accept = torch.rand(proposals, generator=generator, dtype=torch.float64, device="cpu")
        keep = _admissible(u, v, *shape, half_plane) & (accept < _log_weights(frequencies, shape, center, bandwidth).exp())
        seen.update(dict.fromkeys(flat[keep].tolist()))
        if len(seen) >= count:
            flat = torch.tensor(list(seen)[:count], device="cpu")
            return _signed_positions(flat, shape)
    return None


def _signed_positions(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """Row-major indices (...) into an M x N plane as signed (u, v), (..., 2)."""
    out_features, in_features = shape
    return torch.stack(
        [signed_frequency(flat // in_features, out_features), signed_frequency(flat % in_features, in_features)], -1
    )
