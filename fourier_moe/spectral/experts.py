"""SpectralExperts: the frequency positions and coefficients of one projection's experts.

An expert is one or several segments of P positions, so that experts of different sizes share a tensor and the product, which
knows segments only: a token gives each segment of an expert the expert's gate. Experts of equal size are one segment each.

Shape legend: E routed experts, S segments, P positions of a segment, L segments of the largest routed expert, T tokens, K
active experts per token, M out_features, N in_features.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fourier_moe.routing.record import Routing
from fourier_moe.spectral.config import FourierMoEConfig
from fourier_moe.spectral.dense import dense_delta_weight, dense_spectrum, update_factors
from fourier_moe.spectral.frequencies import band_centers, draw_frequencies
from fourier_moe.spectral.product import routed_spectral_product


class SpectralExperts(nn.Module):
    """E experts, each a few complex coefficients in its own frequency band of an M x N weight update.

    With `shared_coefficients` there is one more, the last, which serves every token with a gate of 1.

    Attributes:
        frequencies: int32 buffer (S, P, 2), signed (u, v) of every position; saved, never re-derived from a seed.
        coefficients: float32 parameter (S, P, 2), real and imaginary part; (S, P, 1) in the real-only and imaginary-only
            ablations.
        segments: which segments each expert has; the shared expert's are the last.
        segment_table: int64 buffer (E, L), in no file: the same for the routed experts, filled up with -1; None where segments
            are experts.
        input_order: int32 buffer (N,), and output_order (M,), of a permuted control, else None: the spectral update acts on
            x[input_order] and gives z, of which the output is z[output_order].
        scaling: alpha of one segment; see `scaling_of`.

    Raises:
        UserError: if an expert's band has too few positions in a plane of this shape.
    """

    frequencies: Tensor
    segment_table: Tensor | None
    input_order: Tensor | None
    output_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: FourierMoEConfig,
        *,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.part = config.coefficients
        self.hermitian = config.conjugate_symmetry
        self.relative = config.scaling == "relative"
        self.scaling = self._scaling(config)
        E, P = config.num_experts, config.segment_pairs
        centers = band_centers(E, config.bandwidth, config.band_layout)
        draw = partial(
            draw_frequencies,
            out_features=out_features,
            in_features=in_features,
            generator=generator,
            half_plane=config.conjugate_symmetry,
        )
        frequencies = [
            draw(pairs, center=center if config.frequency_bias else None, bandwidth=bandwidth, alone=E == 1)
            for pairs, center, bandwidth in zip(config.expert_pairs, centers, config.bandwidths, strict=False)
        ]
        for order, size in (("input_order", in_features), ("output_order", out_features)):
            drawn = torch.randperm(size, generator=generator, dtype=torch.int32, device="cpu") if config.permute else None
            self.register_buffer(order, drawn if drawn is None else drawn.to(device))
        if config.shared_coefficients:  # drawn last: the others are those of the same config without it
            frequencies.append(draw(config.expert_pairs[-1], center=None, bandwidth=1.0, setting="shared_coefficients"))
        self.register_buffer("frequencies", torch.cat(frequencies).view(-1, P, 2).to(device))
        shape = (len(self.frequencies), P, 2 if self.part == "complex" else 1)
        # Zero: the adapted model starts exactly at the pretrained one.
        self.coefficients = nn.Parameter(torch.zeros(shape, device=device or "cpu", dtype=torch.float32))
        ends = list(accumulate(pairs // P for pairs in config.expert_pairs))
        self.segments = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        table = None
        if len(self.frequencies) > E:
            routed = [torch.tensor([*own], device="cpu") for own in self.segments[:E]]
            table = pad_sequence(routed, batch_first=True, padding_value=-1).to(device)
        self.register_buffer("segment_table", table, persistent=False)
        self.num_routed = E

    def _scaling(self, config: FourierMoEConfig) -> float:
        """alpha; under relative scaling the one for which rms|c| = 1 gives ||dW||_F = sqrt(M), from Parseval's theorem.

        ||dW||_F = alpha sqrt(2P/(MN)) rms|c| with conjugate symmetry. Without it the real part of a single entry is taken,
        which is a conjugate pair of half the size.
        """
        if config.scaling != "relative":
            return float(config.scaling)
        M, N, P = self.out_features, self.in_features, config.segment_pairs
        norm_per_unit = math.sqrt(2 * P / (M * N)) * (1.0 if config.conjugate_symmetry else 0.5)
        return math.sqrt(M) / norm_per_unit

    def scaling_of(self, expert: int) -> float:
        """alpha of an expert: under relative scaling each has its own, by its number of positions."""
        return self.scaling / math.sqrt(len(self.segments[expert])) if self.relative else self.scaling

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """sum_e gates_e dW_e x: (..., N) -> (..., M) in the dtype of the coefficients (never lower than float32)."""
        coefficients = self.complex_coefficients()
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        gates_TK, experts_TK = (part.reshape(-1, part.shape[-1]) for part in (routing.gates, routing.experts))
        y = routed_spectral_product(
            x.reshape(-1, self.in_features),
            *self._by_segment(gates_TK, experts_TK),
            coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)),
            self.frequencies,
            self.out_features,
            self._factor(self.scaling),
        )
        if self.output_order is not None:
            y = y.index_select(-1, self.output_order)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def names(self) -> list[str]:
        """Return the experts' names: expert_0, expert_1, ..., and shared where there is one."""
        return [f"expert_{e}" if e < self.num_routed else "shared" for e in range(len(self.segments))]

    def _by_segment(self, gates_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and numbers of the segments that serve each token, the shared expert's among them.

        Every active expert has L of them, as many as the largest; where it has fewer itself, its first one again, with gate 0.
        """
        if self.segment_table is None:
            return gates_TK, experts_TK
        own_EL = self.segment_table >= 0
        weight_EL = own_EL.to(gates_TK.dtype)
        if self.relative:
            weight_EL = weight_EL * weight_EL.sum(1, keepdim=True).rsqrt()
        gates_TKL = gates_TK.unsqueeze(-1) * weight_EL[experts_TK]
        segments_TKL = torch.where(own_EL, self.segment_table, self.segment_table[:, :1])[experts_TK]
        gates_TS, segments_TS = gates_TKL.flatten(1), segments_TKL.flatten(1)
        for expert in range(self.num_routed, len(self.segments)):
            own = self.segments[expert]
            shape = (gates_TS.shape[0], len(own))  # torch.export would take len for a constant
            gates_TS = torch.cat([gates_TS, gates_TS.new_full(shape, self.scaling_of(expert) / self.scaling)], 1)
            shared_S = torch.arange(own.start, own.stop, device=segments_TS.device)
            segments_TS = torch.cat([segments_TS, shared_S.expand(shape)], 1)
        return gates_TS, segments_TS

    def _factor(self, scaling: float) -> float:
        """Factor of Re sum_j c_j a_j b_j^T; without conjugate symmetry a position stands for itself alone."""
        return (2.0 if self.hermitian else 1.0) * scaling / (self.out_features * self.in_features)

    def complex_coefficients(self) -> Tensor:
        """Real and imaginary part of every coefficient (S, P, 2); the untrained part of an ablation is 0."""
        if self.part == "complex":
            return self.coefficients
        pad = (0, 1) if self.part == "real" else (1, 0)
        return nn.functional.pad(self.coefficients, pad)

    def of_expert(self, expert: int, coefficients_SPC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the coefficients of one expert, real and imaginary part, and its frequencies, both (positions, 2)."""
        own = slice(self.segments[expert].start, self.segments[expert].stop)
        coefficients_SPC = self.complex_coefficients() if coefficients_SPC is None else coefficients_SPC
        return coefficients_SPC[own].flatten(0, 1), self.frequencies[own].flatten(0, 1)

    def spectrum(self, expert: int) -> Tensor:
        """F_e, the complex spectrum (M, N) of one expert in the order of torch.fft, without alpha and permutation."""
        return dense_spectrum(*self.of_expert(expert), self.out_features, self.in_features, hermitian=self.hermitian)

    def delta_weight(self, expert: int) -> Tensor:
        """alpha dW_e (M, N), built densely: for analysis and tests, never used in the forward pass."""
        delta_MN = dense_delta_weight(
            *self.of_expert(expert),
            self.out_features,
            self.in_features,
            scaling=self.scaling_of(expert),
            hermitian=self.hermitian,
        )
        return self._permuted(delta_MN)

    @torch.no_grad()
    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the same as a product, left (M, r) @ right (r, N), float64, r <= 2P: the expert as an exact LoRA."""
        factor = self._factor(self.scaling_of(expert))
        left, right = update_factors(*self.of_expert(expert), self.out_features, self.in_features, factor)
        if self.input_order is None or self.output_order is None:
            return left, right
        return left[self.output_order], right[:, self.input_order.argsort()]

    def _permuted(self, delta_MN: Tensor) -> Tensor:
        """Rows and columns in the order of a permuted control."""
        if self.input_order is None or self.output_order is None:
            return delta_MN
        return delta_MN[self.output_order][:, self.input_order.argsort()]

    def extra_repr(self) -> str:
        pairs = [len(own) * self.frequencies.shape[1] for own in self.segments]
        routed, shared = pairs[: self.num_routed], pairs[self.num_routed :]
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, experts={self.num_routed}"
        sizes += f", pairs={routed[0] if len(set(routed)) == 1 else routed}" + "".join(f", shared_pairs={n}" for n in shared)
        return f"{sizes}, scaling={self.scaling:.4g}"
