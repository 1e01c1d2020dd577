"""NF4 weights on a GPU: expanded into a buffer for a large GEMM, or inside the GEMM where tokens are few.

Weight number e of a matrix [out, in], counted row by row, is

    w_e = table[code_e] * absmax_{e // 64},     absmax_b = table2[code2_b] * absmax2_{b // 256} + mean

(reference.NF4). Everything is computed in fp32 and rounded once, as bitsandbytes does.

`expand_nf4` reads half a byte and writes two (in 16 bits), so writing is what takes the time. Its target may be a slice
of wider rows, so that B or A of an adapter can stand beside W and one GEMM does both.

`few_tokens` is y = x W^T for a handful of rows of x and an even `in`, where reading W is all the time there is:
expanding it first would move 0.5 + 2 + 2 bytes a weight, and here it is 0.5. A tile of codes becomes two tiles of
weights, those in even and in odd columns, and with x parted the same way

    y = x_even W_even^T + x_odd W_odd^T

so the two never need to be interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import NF4


@triton.jit
def _absmax(block, inside, code2, table2, absmax2, mean):
    """absmax of these blocks of 64 weights, fp32, in the shape of `block`."""
    second = tl.load(table2 + tl.load(code2 + block, mask=inside, other=0).to(tl.int32))
    return second * tl.load(absmax2 + block // 256, mask=inside, other=0.0) + mean


@triton.jit
def _expand(
    codes,  # the six tensors of an NF4: uint8
    table,  # fp32 [16]
    code2,  # uint8
    table2,  # fp32 [256]
    absmax2,  # fp32
    mean,  # fp32 []
    out,  # [n / IN, IN], its rows STRIDE apart
    n,
    STRIDE: tl.constexpr,
    IN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    index = block * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(codes + index, mask=index * 2 < n, other=0).to(tl.int32)
    absmax = _absmax(block, block * 64 < n, code2, table2, absmax2, tl.load(mean))
    high, low = tl.load(table + (byte >> 4)) * absmax, tl.load(table + (byte & 15)) * absmax
    weights = tl.interleave(high, low).to(out.dtype.element_ty)
    # IN and STRIDE are constants, so these two divisions are multiplications, and eight weights are seen to be one
    # store.
    element = block * 64 + tl.arange(0, 64)[None, :]
    row, column = element // IN, element % IN
    tl.store(out + row.to(tl.int64) * STRIDE + column, weights, mask=element < n)


def expand_nf4(weight: NF4, out: Tensor) -> Tensor:
    """See reference.expand_nf4."""
    # Four bytes a thread: one load of 4 bytes, one store of eight 16-bit weights.
    n, blocks = out.numel(), 16
    constants = {"STRIDE": out.stride(0), "IN": out.shape[1], "BLOCKS": blocks}
    # Product and sum of absmax are rounded one after the other, as bitsandbytes does: no fused multiply-add.
    _expand[(triton.cdiv(n, 64 * blocks),)](*weight, out, n, **constants, num_warps=4, enable_fp_fusion=False)
    return out


@triton.jit
def _few_tokens(
    x_even,  # [T, in / 2]
    x_odd,  # [T, in / 2]
    codes,  # the six tensors of an NF4: uint8
    table,  # fp32 [16]
    code2,  # uint8
    table2,  # fp32 [256]
    absmax2,  # fp32
    mean,  # fp32 []
    y,  # [T, out]
    tokens,
    n_out,
    half,  # in / 2
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    centre = tl.load(mean)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, half, BYTES):
        column = start + tl.arange(0, BYTES)
        inside = (row[:, None] < n_out) & (column[None, :] < half)
        index = row[:, None] * half + column[None, :]
        byte = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
        absmax = _absmax(index // 32, inside, code2, table2, absmax2, centre)
        high, low = tl.load(table + (byte >> 4)) * absmax, tl.load(table + (byte & 15)) * absmax
        at = token[:, None].to(tl.int64) * half + column[None, :]
        there = (token[:, None] < tokens) & (column[None, :] < half)
        even = tl.load(x_even + at, mask=there, other=0.0)
        odd = tl.load(x_odd + at, mask=there, other=0.0)
        total = tl.dot(even, tl.trans(high.to(even.dtype)), total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(low.to(odd.dtype)), total, input_precision="ieee")
    at = token[:, None].to(tl.int64) * n_out + row[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(token[:, None] < tokens) & (row[None, :] < n_out))


def few_tokens(x: Tensor, weight: NF4) -> Tensor:
    """x [T, in], T at most 64, in even -> x W^T [T, out] without ever writing W."""
    tokens, n_in = x.shape
    n_out = 2 * len(weight.codes) // n_in
    even, odd = x.view(tokens, n_in // 2, 2).permute(2, 0, 1).contiguous()
    y = x.new_empty(tokens, n_out)
    block = {"TOKENS": max(16, triton.next_power_of_2(tokens)), "ROWS": 32, "BYTES": 32}
    _few_tokens[(triton.cdiv(n_out, block["ROWS"]),)](even, odd, *weight, y, tokens, n_out, n_in // 2, **block)
    return y
