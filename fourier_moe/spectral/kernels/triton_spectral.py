"""The spectral middle of the routed product as fused Triton kernels: gather, conjugate, weigh, gate and accumulate in one pass.

The transforms stay with the FFT library. Between them the product is a sum over positions r (expert e(r), frequency (u, v)):

    out[t, row] = sum over the positions r that end in this row:  post_r( g[t, e(r)] * c_r * pre_r( in[t, source_r] ) )

with pre and post the identity or the complex conjugate. The positions of each row are listed beforehand (`RowLists`), so that a
program owns its output rows: every output is written once, nothing is accumulated atomically, and results do not depend on the
order of execution. A position whose gate is 0 is not read.

Shape legend: T tokens, E experts, P positions per expert, R = E*P, F frequencies of a half spectrum, W longest list of a row.
Complex numbers are pairs of float32 in the last dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _ROWS, _POSITIONS = 16, 32, 32  # block sizes


class RowLists(NamedTuple):
    """Positions by the row of the half spectrum they end in.

    Attributes:
        positions_FW: int32, position index, -1 where a list is shorter than the longest.
        source_R: int32, row of the incoming half spectrum that a position reads.
        pre_R: float32, factor of the imaginary part of what is read: -1 conjugates.
        post_R: float32, factor of the imaginary part of the product.
    """

    positions_FW: Tensor
    source_R: Tensor
    pre_R: Tensor
    post_R: Tensor

    @classmethod
    def build(cls, rows_R: Tensor, source_R: Tensor, pre_R: Tensor, post_R: Tensor, num_rows: int) -> RowLists:
        """Sort positions by row; the length of the longest list is read back from the device once."""
        counts_F = torch.bincount(rows_R, minlength=num_rows)
        order_R = torch.argsort(rows_R, stable=True)
        starts_F = counts_F.cumsum(0) - counts_F
        width = triton.next_power_of_2(int(counts_F.max()))  # few different kernels for many projections
        place_R = torch.arange(len(rows_R), device=rows_R.device) - starts_F[rows_R[order_R]]
        positions_FW = torch.full((num_rows, width), -1, dtype=torch.int32, device=rows_R.device)
        positions_FW[rows_R[order_R], place_R] = order_R.to(torch.int32)
        return cls(positions_FW, source_R.to(torch.int32), pre_R.float(), post_R.float())


@triton.jit
def _accumulate_kernel(
    in_ptr,
    gates_ptr,
    coefficients_ptr,
    positions_ptr,
    source_ptr,
    pre_ptr,
    post_ptr,
    out_ptr,
    num_tokens,
    num_in,
    num_out,
    num_experts,
    experts_size,
    last_is_edge,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (token < num_tokens) & (row < num_out)[None, :]
    real = tl.zeros((TOKENS, ROWS), tl.float32)
    imaginary = tl.zeros((TOKENS, ROWS), tl.float32)
    for w in range(WIDTH):
        r = tl.load(positions_ptr + row * WIDTH + w, mask=row < num_out, other=-1)
        used = r >= 0
        r = tl.where(used, r, 0)
        source = tl.load(source_ptr + r)
        pre = tl.load(pre_ptr + r)
        post = tl.load(post_ptr + r)
        c_real = tl.load(coefficients_ptr + 2 * r)
        c_imaginary = tl.load(coefficients_ptr + 2 * r + 1)
        expert = r // experts_size
        active = inside & used[None, :]
        gate = tl.load(gates_ptr + token * num_experts + expert[None, :], mask=active, other=0.0)
        active = active & (gate != 0.0)
        address = in_ptr + 2 * (token * num_in + source[None, :])
        x_real = tl.load(address, mask=active, other=0.0)
        x_imaginary = tl.load(address + 1, mask=active, other=0.0) * pre[None, :]
        real += gate * (c_real[None, :] * x_real - c_imaginary[None, :] * x_imaginary)
        imaginary += gate * (c_real[None, :] * x_imaginary + c_imaginary[None, :] * x_real) * post[None, :]
    # irfft counts inner rows twice and the edges (DC, Nyquist) once, taking their real part only.
    edge = ((row == 0) | ((row == num_out - 1) & (last_is_edge != 0)))[None, :]
    real = tl.where(edge, 2.0 * real, real)
    imaginary = tl.where(edge, 0.0, imaginary)
    address = out_ptr + 2 * (token * num_out + row[None, :])
    tl.store(address, real, mask=inside)
    tl.store(address + 1, imaginary, mask=inside)


@triton.jit
def _gradient_kernel(
    x_ptr,
    h_ptr,
    gates_ptr,
    coefficients_ptr,
    column_ptr,
    pre_ptr,
    row_ptr,
    gates_grad_ptr,
    partial_ptr,
    num_tokens,
    num_columns,
    num_rows,
    num_experts,
    experts_size,
    TOKENS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """One expert, one block of tokens: d gates[t, e], and this block's share of d coefficients."""
    block = tl.program_id(0).to(tl.int64)  # a block's place among the partial sums may be beyond 2^31
    expert = tl.program_id(1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    gate = tl.load(gates_ptr + token * num_experts + expert, mask=inside, other=0.0)
    gate_grad = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, experts_size, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        valid = p < experts_size
        r = expert * experts_size + tl.where(valid, p, 0)
        both = inside[:, None] & valid[None, :]
        address = x_ptr + 2 * (token[:, None] * num_columns + tl.load(column_ptr + r)[None, :])
        x_real = tl.load(address, mask=both, other=0.0)
        x_imaginary = tl.load(address + 1, mask=both, other=0.0) * tl.load(pre_ptr + r)[None, :]
        address = h_ptr + 2 * (token[:, None] * num_rows + tl.load(row_ptr + r)[None, :])
        h_real = tl.load(address, mask=both, other=0.0)
        h_imaginary = -tl.load(address + 1, mask=both, other=0.0)
        real = h_real * x_real - h_imaginary * x_imaginary
        imaginary = h_real * x_imaginary + h_imaginary * x_real
        c_real = tl.load(coefficients_ptr + 2 * r)[None, :]
        c_imaginary = tl.load(coefficients_ptr + 2 * r + 1)[None, :]
        gate_grad += tl.sum(c_real * real - c_imaginary * imaginary, 1)
        address = partial_ptr + 2 * (block * num_experts * experts_size + r)
        tl.store(address, tl.sum(gate[:, None] * real, 0), mask=valid)
        tl.store(address + 1, tl.sum(gate[:, None] * imaginary, 0), mask=valid)
    tl.store(gates_grad_ptr + token * num_experts + expert, gate_grad, mask=inside)


def accumulate(spectrum_TFC: Tensor, gates_TE: Tensor, coefficients_RC: Tensor, lists: RowLists, size: int) -> Tensor:
    """Return the output half spectrum (T, size//2 + 1, 2), edges ready for irfft of length `size`."""
    num_tokens, num_in, _ = spectrum_TFC.shape
    num_out, width = lists.positions_FW.shape
    gates_TE = gates_TE.contiguous()
    num_experts = gates_TE.shape[1]
    out = spectrum_TFC.new_empty(num_tokens, num_out, 2)
    grid = (triton.cdiv(num_tokens, _TOKENS), triton.cdiv(num_out, _ROWS))
    with torch.cuda.device_of(spectrum_TFC):  # Triton starts kernels on the current device, whatever their tensors' is
        _accumulate_kernel[grid](
            spectrum_TFC,
            gates_TE,
            coefficients_RC,
            lists.positions_FW,
            lists.source_R,
            lists.pre_R,
            lists.post_R,
            out,
            num_tokens,
            num_in,
            num_out,
            num_experts,
            len(coefficients_RC) // num_experts,
            int(size % 2 == 0),
            WIDTH=width,
            TOKENS=_TOKENS,
            ROWS=_ROWS,
        )
    return out


def gradients(
    x_TFC: Tensor, grad_TFC: Tensor, gates_TE: Tensor, coefficients_RC: Tensor, forward: RowLists, rows_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Unscaled gradients: gates (T, E), and sum_t g conj(G)[u] conj(X)[v] (R, 2), whence the coefficients'."""
    num_tokens, num_columns, _ = x_TFC.shape
    num_experts = gates_TE.shape[1]
    num_blocks = triton.cdiv(num_tokens, _TOKENS)
    gates_grad_TE = torch.empty_like(gates_TE)
    partial = x_TFC.new_empty(num_blocks, len(coefficients_RC), 2)
    with torch.cuda.device_of(x_TFC):  # Triton starts kernels on the current device, whatever their tensors' is
        _gradient_kernel[(num_blocks, num_experts)](
            x_TFC,
            grad_TFC,
            gates_TE,
            coefficients_RC,
            forward.source_R,
            forward.pre_R,
            rows_R,
            gates_grad_TE,
            partial,
            num_tokens,
            num_columns,
            grad_TFC.shape[1],
            num_experts,
            len(coefficients_RC) // num_experts,
            TOKENS=_TOKENS,
            POSITIONS=_POSITIONS,
        )
    return gates_grad_TE, partial.sum(0)
