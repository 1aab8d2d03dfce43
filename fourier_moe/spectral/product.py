"""The routed spectral product on activations: the operator that torch knows, with its derivatives and transforms.

Shape legend: T tokens, N in_features, M out_features, E experts, K active experts per token, P positions per expert, C = 2
(real and imaginary part), F a half spectrum (N//2 + 1 or M//2 + 1).

The update of expert e is dW_e = scale * Re sum_j c_j a_j b_j^T with a_j[p] = exp(2 pi i u_j p/M), b_j[q] = exp(2 pi i v_j q/N)
(Theorem 3.2; with conjugate symmetry scale = 2 alpha/(MN)). Hence, with X = FFT_N(x),

    y = sum_e g_e dW_e x = scale * Re sum_j a_j [ g_e(j) c_j conj(X[v_j]) ],

where the bracket is accumulated into one half spectrum along the output axis and one inverse FFT ends it. No M x N matrix is
held, but for a single expert where that costs less (matrix_product.py). The gradient with respect to x has the same form with
the roles of (u, M) and (v, N) exchanged. Complex numbers exist only in torch_product.py, matrix_product.py, dense.py and
kernels/.

The product is registered with torch as the operator `fourier_moe::routed_spectral_product`, so that torch.compile takes it
whole, without a graph break and without looking into its complex arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fourier_moe.routing.forward_mode import has_tangent, in_transform
from fourier_moe.spectral import matrix_product, torch_product
from fourier_moe.spectral.kernels import use_triton


def routed_spectral_product(
    x_TN: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    coefficients_EPC: Tensor,
    frequencies_EPC: Tensor,
    out_features: int,
    scale: float,
) -> Tensor:
    """sum_k gates[t, k] dW_experts[t, k] x[t], exact, without building dW_e of routed experts.

    Cost per token: one FFT of length N, K*P complex multiply-adds, one inverse FFT of length M; the number of experts does not
    enter. Saved for the backward pass: the arguments, nothing else. First derivatives only, in reverse and in forward mode;
    torch.func's grad, vjp, jvp and vmap work, vmap as a loop over its examples.

    Args:
        x_TN: input, any floating dtype; half precisions are computed in float32.
        gates_TK: gates of the active experts.
        experts_TK: int64, which experts these are, none twice for a token but with gate 0.
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
    path = _path(x_TN, coefficients_EPC, out_features)
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
    path = _path(x_TN, coefficients_EPC, grad_TM.shape[1])
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


def _path(x_TN: Tensor, coefficients_EPC: Tensor, out_features: int) -> ModuleType:
    """Return the module whose `product_forward` and `product_backward` compute this input."""
    if len(x_TN) and use_triton(x_TN) and coefficients_EPC.dtype == torch.float32:  # a kernel cannot start on no tokens
        from fourier_moe.spectral.kernels import triton_product  # needs triton, which is optional

        return triton_product
    return matrix_product if matrix_product.cheaper(x_TN, coefficients_EPC, out_features) else torch_product


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
