"""Dropout by key: which inputs stay is a hash of (token's key, channel), as in reference.dropout_mask, so that no mask
is ever stored, and whoever needs it draws it again. Two neighbouring channels take the two halves of one hash. A token
has a key of its own for every input of every block, `input_keys`.
"""

from __future__ import annotations

import torch
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


@triton.jit(do_not_specialize=["tokens"])  # else there is another kernel for lengths that 16 divides
def _input_keys(
    token_keys,  # int32 [T]
    keys,  # int32 [inputs, T]
    tokens,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(token_keys + token, mask=token < tokens, other=0).to(tl.uint32, bitcast=True)
    key = _mix(key * 0x2545F491 + tl.program_id(1).to(tl.uint32))
    at = keys + tl.program_id(1).to(tl.int64) * tokens + token
    tl.store(at, key.to(tl.int32, bitcast=True), mask=token < tokens)


def input_keys(token_keys: Tensor, inputs: int) -> Tensor:
    """See reference.input_keys. One launch where PyTorch needs a dozen, and every pack waits for it."""
    keys = torch.empty(inputs, len(token_keys), dtype=torch.int32, device=token_keys.device)
    _input_keys[(triton.cdiv(len(token_keys), BLOCK), inputs)](token_keys, keys, len(token_keys), BLOCK=BLOCK)
    return keys


def coin(p: float) -> tuple[int, float]:
    """The threshold that `kept` compares with, and the scale of what is kept."""
    return round(p * 2**16), 1 / (1 - p)


@triton.jit(do_not_specialize=["tokens"])
def _copy(
    x,  # [T, n], rows `stride` apart
    keys,  # int32 [T], read if MASKED
    y,  # [T, n], rows `y_stride` apart
    tokens,
    n,
    stride,
    y_stride,
    threshold,
    scale,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    pair = (tl.program_id(1) * PAIRS + tl.arange(0, PAIRS))[None, :]
    column = (tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS))[None, :]
    inside = (row < tokens) & (column < n)
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if MASKED:
        stays = kept(tl.load(keys + row, mask=row < tokens, other=0), pair, threshold)
        value = tl.where(stays, value.to(tl.float32) * scale, 0.0).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + column, value, mask=inside)


def copy(x: Tensor, y: Tensor, keys: Tensor | None = None, p: float = 0.0) -> Tensor:
    """y = m(x): each input stays with probability 1 - p (reference.dropout_mask), and is scaled by 1 / (1 - p).

    Rows of x and y [T, n] may lie apart, for which PyTorch's copy takes twice as long. Returns y.
    """
    masked, (tokens, n) = p > 0, x.shape
    width = min(BLOCK, max(2, triton.next_power_of_2(n)))
    rows = BLOCK // width  # few programs for narrow rows
    grid = (triton.cdiv(tokens, rows), triton.cdiv(n, width))
    launch = {"MASKED": masked, "ROWS": rows, "PAIRS": width // 2}
    _copy[grid](x, keys if masked else x, y, tokens, n, x.stride(0), y.stride(0), *coin(p), **launch)
    return y
