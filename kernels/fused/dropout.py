"""Dropout by key: which inputs stay is a hash of (token's key, channel), as in reference.dropout_mask, so that no mask
is ever stored, and whoever needs it draws it again. Two neighbouring channels take the two halves of one hash.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _mix(x):
    """reference._mix; x uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(keys, pair, threshold):
    """reference.dropout_mask of channels 2 pair and 2 pair + 1: keys int32 [..., 1], pair [..., P] -> [..., 2 P]."""
    bits = _mix(keys.to(tl.uint32, bitcast=True) ^ (pair.to(tl.uint32) * 0x9E3779B9))
    return tl.interleave(bits & 0xFFFF, bits >> 16) >= threshold


def coin(p: float) -> tuple[int, float]:
    """The threshold that `kept` compares with, and the scale of what is kept."""
    return round(p * 2**16), 1 / (1 - p)


@triton.jit
def _copy(
    x,  # [T, n], rows `stride` apart
    keys,  # int32 [T], read if MASKED
    y,  # [T, n], rows `y_stride` apart
    n,
    stride,
    y_stride,
    threshold,
    scale,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    inside = column < n
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if MASKED:
        stays = kept(tl.load(keys + row), pair, threshold)
        value = tl.where(stays, value.to(tl.float32) * scale, 0.0).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + column, value, mask=inside)


def copy(x: Tensor, y: Tensor, keys: Tensor | None = None, p: float = 0.0) -> Tensor:
    """y = m(x): each input stays with probability 1 - p (reference.dropout_mask), and is scaled by 1 / (1 - p).

    Rows of x and y [T, n] may lie apart, for which PyTorch's copy takes twice as long. Returns y.
    """
    masked, grid = p > 0, (len(x), triton.cdiv(x.shape[1], BLOCK))
    keys = keys if masked else x
    launch = {"MASKED": masked, "PAIRS": BLOCK // 2}
    _copy[grid](x, keys, y, x.shape[1], x.stride(0), y.stride(0), *coin(p), **launch)
    return y
