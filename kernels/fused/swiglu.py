"""SwiGLU, elementwise: y = silu(g) u with silu(g) = g sigma(g), in fp32 between one read and one write.

    dg = dy u sigma (1 + g (1 - sigma))        du = dy silu(g)

Only g and u are kept, which the two projections made: backward has them in registers, so it makes sigma again, for an
exponential is cheaper than memory, and y too where the linear after it wants its input back. Forward moves three
numbers an element, backward five, or six with y. Under dropout m(y) is one more forward; and backward dy comes in two
parts, of which one, `low`, is still to be masked, by the same mask as y.

These are the widest tensors of a block, so the gradients take the places of g and u, which nobody needs any more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import coin, kept

BLOCK = 1024


@triton.jit
def _forward(
    gate,  # [T, n]
    up,  # [T, n]
    y,  # [T, n]
    dropped,  # [T, n], written if MASKED
    keys,  # int32 [T], read if MASKED
    n,
    threshold,
    scale,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    inside, i = column < n, row * n + column
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    out = g * tl.sigmoid(g) * u
    tl.store(y + i, out.to(y.dtype.element_ty), mask=inside)
    if MASKED:
        out = tl.where(kept(tl.load(keys + row), pair, threshold), out * scale, 0.0)
        tl.store(dropped + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate,  # [T, n], overwritten by its gradient
    up,  # [T, n], overwritten by its gradient
    dy,  # [T, n]; if AGAIN, overwritten by y, masked if MASKED
    low,  # [T, n], read if MASKED: m(low) is still to be added to dy
    keys,  # int32 [T], read if MASKED
    n,
    threshold,
    scale,
    AGAIN: tl.constexpr,
    MASKED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    inside, i = column < n, row * n + column
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    out = g * sigma * u
    if MASKED:
        stays = kept(tl.load(keys + row), pair, threshold)
        d += tl.where(stays, tl.load(low + i, mask=inside, other=0.0).to(tl.float32) * scale, 0.0)
        out = tl.where(stays, out * scale, 0.0)
    tl.store(gate + i, (d * u * sigma * (1 + g * (1 - sigma))).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + i, (d * g * sigma).to(up.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(dy + i, out.to(dy.dtype.element_ty), mask=inside)


def _grid(x: Tensor) -> tuple[int, int]:
    return len(x), triton.cdiv(x.shape[1], BLOCK)


def swiglu(
    gate: Tensor, up: Tensor, dropped: Tensor | None = None, keys: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """gate, up [T, n] -> y = silu(gate) * up [T, n]; and m(y) in `dropped`, if that is given."""
    y, masked = torch.empty_like(gate), dropped is not None
    tensors = (gate, up, y, dropped if masked else y, keys if masked else y)
    _forward[_grid(y)](*tensors, y.shape[1], *coin(p), MASKED=masked, PAIRS=BLOCK // 2)
    return y


def swiglu_backward(
    gate: Tensor,
    up: Tensor,
    dy: Tensor,
    again: bool,
    low: Tensor | None = None,
    keys: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up, in their places, for the gradient dy + m(low) if there is a low; and, if wanted
    again, y or m(y), in the place of dy. All [T, n]."""
    masked = low is not None
    tensors = (gate, up, dy, low if masked else dy, keys if masked else dy)
    _backward[_grid(dy)](*tensors, dy.shape[1], *coin(p), AGAIN=again, MASKED=masked, PAIRS=BLOCK // 2)
    return gate, up, dy if again else None
