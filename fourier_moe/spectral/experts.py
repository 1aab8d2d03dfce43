"""SpectralExperts: the frequency positions and coefficients of one projection's experts.

Shape legend: E experts, P positions per expert, M out_features, N in_features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fourier_moe.routing.record import Routing
from fourier_moe.spectral.config import FourierMoEConfig
from fourier_moe.spectral.dense import dense_delta_weight, dense_spectrum, update_factors
from fourier_moe.spectral.frequencies import band_centers, draw_frequencies
from fourier_moe.spectral.product import routed_spectral_product


class SpectralExperts(nn.Module):
    """E experts, each a few complex coefficients in its own frequency band of an M x N weight update.

    Attributes:
        frequencies: int32 buffer (E, P, 2), signed (u, v) of every position; saved, never re-derived from a seed.
        coefficients: float32 parameter (E, P, 2), real and imaginary part; (E, P, 1) in the real-only and imaginary-only
            ablations.
        input_order: int32 buffer (N,), and output_order (M,), of a permuted control, else None: the spectral update acts on
            x[input_order] and gives z, of which the output is z[output_order].
        scaling: alpha.

    Raises:
        UserError: if an expert's band has too few positions in a plane of this shape.
    """

    frequencies: Tensor
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
        self.scaling = self._scaling(config)
        E, P = config.num_experts, config.pairs_per_expert
        frequencies = [
            draw_frequencies(
                P,
                out_features,
                in_features,
                generator,
                center=center if config.frequency_bias else None,
                bandwidth=config.bandwidth,
                half_plane=config.conjugate_symmetry,
                alone=E == 1,
            )
            for center in band_centers(E, config.bandwidth, config.band_layout)
        ]
        self.register_buffer("frequencies", torch.stack(frequencies).to(device))
        shape = (E, P, 2 if self.part == "complex" else 1)  # zero: the adapted model starts exactly at the pretrained one
        self.coefficients = nn.Parameter(torch.zeros(shape, device=device or "cpu", dtype=torch.float32))
        for order, size in (("input_order", in_features), ("output_order", out_features)):
            drawn = torch.randperm(size, generator=generator, dtype=torch.int32, device="cpu") if config.permute else None
            self.register_buffer(order, drawn if drawn is None else drawn.to(device))

    def _scaling(self, config: FourierMoEConfig) -> float:
        """alpha; under relative scaling the one for which rms|c| = 1 gives ||dW_e||_F = sqrt(M), from Parseval's theorem.

        ||dW_e||_F = alpha sqrt(2P/(MN)) rms|c| with conjugate symmetry. Without it the real part of a single entry is taken,
        which is a conjugate pair of half the size.
        """
        if config.scaling != "relative":
            return float(config.scaling)
        M, N, P = self.out_features, self.in_features, config.pairs_per_expert
        norm_per_unit = math.sqrt(2 * P / (M * N)) * (1.0 if config.conjugate_symmetry else 0.5)
        return math.sqrt(M) / norm_per_unit

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """sum_e gates_e dW_e x: (..., N) -> (..., M) in the dtype of the coefficients (never lower than float32)."""
        coefficients = self.complex_coefficients()
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        y = routed_spectral_product(
            x.reshape(-1, self.in_features),
            routing.gates.reshape(-1, routing.gates.shape[-1]),
            routing.experts.reshape(-1, routing.experts.shape[-1]),
            coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)),
            self.frequencies,
            self.out_features,
            self._scale,
        )
        if self.output_order is not None:
            y = y.index_select(-1, self.output_order)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def _scale(self) -> float:
        """Factor of Re sum_j c_j a_j b_j^T; without conjugate symmetry a position stands for itself alone."""
        return (2.0 if self.hermitian else 1.0) * self.scaling / (self.out_features * self.in_features)

    def complex_coefficients(self) -> Tensor:
        """Real and imaginary part of every coefficient (E, P, 2); the untrained part of an ablation is 0."""
        if self.part == "complex":
            return self.coefficients
        pad = (0, 1) if self.part == "real" else (1, 0)
        return nn.functional.pad(self.coefficients, pad)

    def spectrum(self, expert: int) -> Tensor:
        """F_e, the complex spectrum (M, N) of one expert in the order of torch.fft, without alpha and permutation."""
        coefficients = self.complex_coefficients()[expert]
        return dense_spectrum(
            coefficients, self.frequencies[expert], self.out_features, self.in_features, hermitian=self.hermitian
        )

    def delta_weight(self, expert: int) -> Tensor:
        """alpha dW_e (M, N), built densely: for analysis and tests, never used in the forward pass."""
        delta_MN = dense_delta_weight(
            self.complex_coefficients()[expert],
            self.frequencies[expert],
            self.out_features,
            self.in_features,
            scaling=self.scaling,
            hermitian=self.hermitian,
        )
        return self._permuted(delta_MN)

    @torch.no_grad()
    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the same as a product, left (M, r) @ right (r, N), float64, r <= 2P: the expert as an exact LoRA."""
        coefficients = self.complex_coefficients()[expert]
        M, N, frequencies = self.out_features, self.in_features, self.frequencies[expert]
        left, right = update_factors(coefficients, frequencies, M, N, self._scale)
        if self.input_order is None or self.output_order is None:
            return left, right
        return left[self.output_order], right[:, self.input_order.argsort()]

    def _permuted(self, delta_MN: Tensor) -> Tensor:
        """Rows and columns in the order of a permuted control."""
        if self.input_order is None or self.output_order is None:
            return delta_MN
        return delta_MN[self.output_order][:, self.input_order.argsort()]

    def extra_repr(self) -> str:
        E, P, _ = self.frequencies.shape
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, experts={E}, pairs={P}"
        return f"{sizes}, scaling={self.scaling:.4g}"
