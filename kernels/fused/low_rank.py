"""A low-rank product added to what is there, base + m(u A), m being dropout by key.

The rank is small, so this is bound by memory: base is read and out is written once, where PyTorch's addmm would first
copy a base that is to stay, and knows no masks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import coin, kept


@triton.jit
def _add(
    u,  # [T, r]
    a,  # [r, n], by its strides
    keys,  # int32 [T], read if MASKED
    base,  # [T, n]
    out,  # [T, n]
    tokens,
    rank,
    n,
    rank_stride,
    column_stride,
    threshold,
    scale,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    there, inside = (token < tokens)[:, None], (column < n)[None, :]
    right = a + column[None, :].to(tl.int64) * column_stride
    total = tl.zeros((TOKENS, 2 * PAIRS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        us = tl.load(u + token[:, None].to(tl.int64) * rank + r[None, :], mask=there & (r < rank)[None, :], other=0.0)
        rows = tl.load(right + r[:, None] * rank_stride, mask=(r < rank)[:, None] & inside, other=0.0)
        total = tl.dot(us, rows, total, input_precision="ieee")
    if MASKED:
        key = tl.load(keys + token, mask=token < tokens, other=0)
        total = tl.where(kept(key[:, None], pair[None, :], threshold), total * scale, 0.0)
    at = token[:, None].to(tl.int64) * n + column[None, :]
    total += tl.load(base + at, mask=there & inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there & inside)


def add_low_rank(base: Tensor, u: Tensor, a: Tensor, out: Tensor, keys: Tensor | None = None, p: float = 0.0) -> Tensor:
    """out = base + m(u a), for base and out [T, n] (which may be one), u [T, r] and a [r, n]. Returns out."""
    (tokens, rank), n = u.shape, a.shape[1]
    masked, (rows, columns) = p > 0, (64, 128) if out.itemsize == 2 else (32, 32)  # fp32 takes many registers
    blocks = {"TOKENS": rows, "PAIRS": columns // 2, "RANK": min(64, max(16, triton.next_power_of_2(rank)))}
    grid = (triton.cdiv(tokens, rows), triton.cdiv(n, columns))
    numbers = tokens, rank, n, *a.stride(), *coin(p)
    _add[grid](u, a, keys if masked else u, base, out, *numbers, MASKED=masked, **blocks)
    return out
