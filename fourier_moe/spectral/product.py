"""The routed spectral product on activations, its backward pass, and the dense definition that it must equal.

Shape legend: T tokens, N in_features, M out_features, E experts, K active experts per token, P positions per expert, C = 2
(real and imaginary part), F a half spectrum (N//2 + 1 or M//2 + 1).

The update of expert e is dW_e = scale * Re sum_j c_j a_j b_j^T with a_j[p] = exp(2 pi i u_j p/M), b_j[q] = exp(2 pi i v_j q/N)
(Theorem 3.2; with conjugate symmetry scale = 2 alpha/(MN)). Hence, with X = FFT_N(x),

    y = sum_e g_e dW_e x = scale * Re sum_j a_j [ g_e(j) c_j conj(X[v_j]) ],

where the bracket is accumulated into one half spectrum along the output axis and one inverse FFT ends it. No M x N matrix is
held. The gradient with respect to x has the same form with the roles of (u, M) and (v, N) exchanged. Complex numbers exist
only in this file, in low_rank.py and in kernels/.

The product is registered with torch as the operator `fourier_moe::routed_spectral_product`, so that torch.compile takes it
whole, without a graph break and without looking into its complex arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fourier_moe.routing.forward_mode import has_tangent, in_transform
from fourier_moe.spectral.kernels import use_triton

# Token-position pairs in flight: bounds what the product holds beside its arguments and results. On a CPU fewer of them for few
# threads, so that what one thread works on stays in its cache (docs/evidence/performance.md).
_POSITIONS_AT_ONCE = 2**19
_POSITIONS_PER_THREAD = 2**17


def routed_spectral_product(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """sum_k gates[t, k] dW_experts[t, k] x[t], exact, without building any dW_e.

    Cost per token: one FFT of length N, K*P complex multiply-adds, one inverse FFT of length M; the number of experts does not
    enter. Saved for the backward pass: the arguments, nothing else. First derivatives only, in reverse and in forward mode;
    torch.func's grad, vjp, jvp and vmap work, vmap as a loop over its examples.

    Args:
        x_TN: input, any floating dtype; half precisions are computed in float32.
        gates_TK: gates of the active experts.
        experts_TK: int64, which experts these are, none twice for a token.
        coefficients_EPC: real and imaginary part of every coefficient c_j, float32 or float64.
        frequencies_EPC: signed integer (u_j, v_j), |u| <= M/2, |v| <= N/2.
        out_features: M.
        scale: factor of every update, 2 alpha/(MN) with conjugate symmetry.

    Returns:
        y_TM in the dtype of the coefficients.

    Raises:
        NotImplementedError: in the backward pass, if a second derivative is asked for.
    """
    rest = (frequencies_EPC, out_features, scale)
    if not has_tangent(x_TN, gates_TK, coefficients_EPC):
        product = _Product.apply if in_transform() else _product
        return product(x_TN, gates_TK, experts_TK, coefficients_EPC, *rest)
    # Linear in each of the three, so that its tangent is the sum of three products with one of them replaced by its tangent.
    (x, dx), (gates, dgates), (c, dc) = map(forward_ad.unpack_dual, (x_TN, gates_TK, coefficients_EPC))
    changes = [(dx, gates, c), (x, dgates, c), (x, gates, dc)]
    dy = sum(
        routed_spectral_product(x, gates, experts_TK, c, *rest)
        for x, gates, c in changes
        if x is not None and gates is not None and c is not None
    )
    return forward_ad.make_dual(routed_spectral_product(x, gates, experts_TK, c, *rest), dy)


@torch.library.custom_op("fourier_moe::routed_spectral_product", mutates_args=())
def _product(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    path = _path(x_TN, coefficients_EPC)
    return path.product_forward(x_TN, gates_TK, experts_TK, coefficients_EPC, frequencies_EPC, out_features, scale)


@_product.register_fake
def _(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    return coefficients_EPC.new_empty(x_TN.shape[0], out_features)


@torch.library.custom_op("fourier_moe::routed_spectral_product_backward", mutates_args=())
def _product_backward(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    path = _path(x_TN, coefficients_EPC)
    return path.product_backward(grad_TM, x_TN, gates_TK, experts_TK, coefficients_EPC, frequencies_EPC, scale, needs)


@_product_backward.register_fake
def _(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x_TN, gates_TK, coefficients_EPC)
    x, gates, coefficients = (t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True))
    return x, gates, coefficients


def _path(x_TN: Tensor, coefficients_EPC: Tensor) -> ModuleType:
    """The module whose `product_forward` and `product_backward` compute this input: the Triton path, or this one."""
    if len(x_TN) and use_triton(x_TN) and coefficients_EPC.dtype == torch.float32:  # a kernel cannot start on no tokens
        from fourier_moe.spectral.kernels import triton_product

        return triton_product
    return sys.modules[__name__]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TM: Tensor, product_backward: Callable[..., Any] = _product_backward) -> tuple[Tensor | None, ...]:
    needs_x, needs_gates, _, needs_coefficients, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_gates, needs_coefficients]
    grads = product_backward(grad_TM, *ctx.saved_tensors, ctx.scale, needs)
    x, gates, coefficients = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return x, gates, None, coefficients, None, None, None


_product.register_autograd(_backward, setup_context=_setup_context)


class _Product(torch.autograd.Function):
    """The operator under torch.func, which refuses the derivative that is registered with an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _product(*inputs)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_TM, _ProductBackward.apply)


class _ProductBackward(torch.autograd.Function):
    """The backward operator, which has no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _product_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "routed_spectral_product_backward has no derivative: the product has first derivatives only, and a second one was "
            "asked for"
        )


def _loop(operator: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    """torch.func.vmap of an operator: one example after the other."""

    def example(index: int) -> list[Any]:
        return [
            value if dim is None or not isinstance(value, Tensor) else value.select(dim, index)
            for value, dim in zip(inputs, in_dims, strict=True)
        ]

    outputs = [operator(*example(index)) for index in range(info.batch_size)]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


for _operator in (_product, _product_backward):
    _operator.register_vmap(partial(_loop, _operator))


class Positions(NamedTuple):
    """Where each position reads and writes in half spectra, frequencies with u < 0 replaced by their conjugate partner."""

    rows_EP: Tensor  # |u|: row of the output half spectrum
    columns_EP: Tensor  # |v|: row of the input half spectrum
    conjugate_c_EP: Tensor  # +1, or -1 where u < 0: Re(c a b) = Re(conj(c) conj(a) conj(b))
    negative_v_EP: Tensor  # after that replacement: +1 for v < 0, else -1, the sign of Im conj(X[v]) read at |v|

    @classmethod
    def of(cls, frequencies_EPC: Tensor, dtype: torch.dtype) -> Positions:
        u_EP, v_EP = frequencies_EPC.long().unbind(-1)
        mirrored_EP = u_EP < 0
        negative_EP = torch.where(mirrored_EP, -v_EP, v_EP) < 0
        return cls(u_EP.abs(), v_EP.abs(), 1 - 2 * mirrored_EP.to(dtype), 2 * negative_EP.to(dtype) - 1)


class _Active(NamedTuple):
    """The positions of every token's active experts, side by side: K*P per token."""

    rows_TKP: Tensor
    columns_TKP: Tensor
    negative_v_TKP: Tensor
    c_TKP: Tensor  # complex coefficients, conjugated where the position was replaced by its partner

    @classmethod
    def of(cls, positions: Positions, experts_TK: Tensor, coefficients_EPC: Tensor) -> _Active:
        real_EP, imaginary_EP = coefficients_EPC.unbind(-1)
        c_EP = torch.complex(real_EP, imaginary_EP * positions.conjugate_c_EP)
        picked = (t[experts_TK] for t in (positions.rows_EP, positions.columns_EP, positions.negative_v_EP, c_EP))
        return cls(*picked)


def product_forward(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """The product itself, without its place in torch's operators and autograd; see `routed_spectral_product`."""
    dtype = coefficients_EPC.dtype
    positions = Positions.of(frequencies_EPC, dtype)
    y_parts = []
    for part in _parts(experts_TK, positions):
        active = _Active.of(positions, experts_TK[part], coefficients_EPC)
        values_TKP = _read(_rfft(x_TN[part].to(dtype)), active.columns_TKP, active.negative_v_TKP)
        values_TKP.mul_(active.c_TKP).mul_(gates_TK[part].to(dtype).unsqueeze(-1))
        y_parts.append(_accumulate(values_TKP, active.rows_TKP, out_features, scale))
    return _join(y_parts)


def product_backward(
    grad_TM: Tensor,
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, gates and coefficients; an empty tensor for each that is not needed."""
    needs_x, needs_gates, needs_coefficients = needs
    dtype = coefficients_EPC.dtype
    positions = Positions.of(frequencies_EPC, dtype)
    x_parts, gates_parts = [], []
    sums_EP = torch.zeros_like(positions.conjugate_c_EP, dtype=dtype.to_complex())
    for part in _parts(experts_TK, positions):
        active = _Active.of(positions, experts_TK[part], coefficients_EPC)
        gates_TK1 = gates_TK[part].to(dtype).unsqueeze(-1)
        # h_j = sum_p grad[p] exp(2 pi i u_j p/M): what an increment of position j's bracket earns.
        h_TKP = _read(_rfft(grad_TM[part].to(dtype)), active.rows_TKP, None)
        if needs_gates or needs_coefficients:
            x_TF = _rfft(x_TN[part].to(dtype))
            products_TKP = _read(x_TF, active.columns_TKP, active.negative_v_TKP).mul_(h_TKP)
            if needs_gates:
                gates_parts.append((scale * (products_TKP * active.c_TKP).real.sum(-1)).to(gates_TK.dtype))
            if needs_coefficients:
                sums_EP.index_add_(0, experts_TK[part].flatten(), products_TKP.mul_(gates_TK1).flatten(0, 1))
        if needs_x:
            h_TKP.mul_(active.c_TKP).mul_(gates_TK1)
            # Re(q exp(-i|v|t)) = Re(conj(q) exp(i|v|t)): positions with v < 0 are accumulated at |v|.
            torch.view_as_real(h_TKP)[..., 1].mul_(-active.negative_v_TKP)
            x_parts.append(_accumulate(h_TKP, active.columns_TKP, x_TN.shape[1], scale).to(x_TN.dtype))
    sums_EPC = torch.stack([sums_EP.real, -sums_EP.imag * positions.conjugate_c_EP], -1)
    return (
        _join(x_parts) if needs_x else x_TN.new_empty(0),
        _join(gates_parts) if needs_gates else gates_TK.new_empty(0),
        scale * sums_EPC if needs_coefficients else coefficients_EPC.new_empty(0),
    )


def _parts(experts_TK: Tensor, positions: Positions) -> list[slice]:
    """Tokens in parts whose positions, a few numbers each, take tens of megabytes at the most."""
    num_tokens, top_k = experts_TK.shape
    at_once = _POSITIONS_AT_ONCE
    if experts_TK.device.type == "cpu":
        at_once = min(at_once, _POSITIONS_PER_THREAD * torch.get_num_threads())
    size = max(1, at_once // max(1, top_k * positions.rows_EP.shape[1]))
    return [slice(start, start + size) for start in range(0, max(1, num_tokens), size)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(spectrum_TF: Tensor, rows_TKP: Tensor, signs_TKP: Tensor | None) -> Tensor:
    """spectrum[t, rows] with the imaginary part times `signs`, or conjugated if there are none, as a new tensor (T, K, P)."""
    values_TKP = spectrum_TF.gather(1, rows_TKP.flatten(1)).view(rows_TKP.shape)
    if signs_TKP is None:
        return values_TKP.conj_physical_()
    torch.view_as_real(values_TKP)[..., 1].mul_(signs_TKP)
    return values_TKP


def _rfft(x_TN: Tensor) -> Tensor:
    """torch.fft.rfft, also of no tokens at all, which torch 2.10 on a CPU refuses."""
    return torch.fft.rfft(x_TN) if len(x_TN) else x_TN.new_zeros(0, x_TN.shape[1] // 2 + 1, dtype=x_TN.dtype.to_complex())


def _accumulate(values_TKP: Tensor, rows_TKP: Tensor, size: int, scale: float) -> Tensor:
    """scale * Re sum_r values[r] exp(2 pi i rows[r] p / size) for p = 0..size-1, as (T, size)."""
    if not len(values_TKP):
        return values_TKP.real.new_zeros(0, size)
    spectrum_TF = values_TKP.new_zeros(len(values_TKP), size // 2 + 1)
    spectrum_TF.scatter_add_(1, rows_TKP.flatten(1), values_TKP.flatten(1))
    # irfft counts every inner frequency twice (itself and its conjugate), but DC and Nyquist once and only their real part.
    edges = [0, size // 2] if size % 2 == 0 else [0]
    for row in set(edges):
        spectrum_TF[:, row] = 2 * spectrum_TF[:, row].real
    return torch.fft.irfft(spectrum_TF, n=size).mul_(scale * size / 2)


def dense_spectrum(
    coefficients_PC: Tensor, frequencies_PC: Tensor, out_features: int, in_features: int, *, hermitian: bool
) -> Tensor:
    """The spectrum F (M, N) of one expert, complex, in numpy order: F[u, v] += c and, if `hermitian`, F[-u, -v] += conj(c)."""
    c_P = torch.view_as_complex(coefficients_PC.contiguous())
    u_P, v_P = frequencies_PC.long().unbind(-1)
    spectrum_MN = c_P.new_zeros(out_features, in_features)
    spectrum_MN = spectrum_MN.index_put((u_P % out_features, v_P % in_features), c_P, accumulate=True)
    if hermitian:
        spectrum_MN = spectrum_MN.index_put((-u_P % out_features, -v_P % in_features), c_P.conj(), accumulate=True)
    return spectrum_MN


def dense_delta_weight(
    coefficients_PC: Tensor,
    frequencies_PC: Tensor,
    out_features: int,
    in_features: int,
    *,
    scaling: float,
    hermitian: bool = True,
) -> Tensor:
    """dW = alpha Re IDFT2(F) (M, N): the paper's definition (Eq. 1), kept as the reference and for analysis."""
    spectrum_MN = dense_spectrum(coefficients_PC, frequencies_PC, out_features, in_features, hermitian=hermitian)
    return scaling * torch.fft.ifft2(spectrum_MN).real
