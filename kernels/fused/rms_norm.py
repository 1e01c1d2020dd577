"""RMSNorm, one row of the residual stream a program.

    y = w * x * rho,  rho = 1 / sqrt(mean(x^2) + eps)

With g = w * dy, and dt what reaches x by the stream itself:

    dx = dt + rho * (g - x * rho^2 * mean(g * x))            (reference.RMSNorm has the derivation)

Nothing is saved but x, which the stream keeps anyway: backward has x in registers, so it makes rho again, and y too
where a linear wants its input back. In 16 bits a row of n moves 2n bytes for each of x, y forward and x, dy, dt, dx, y
backward. Under dropout m(y) is one more forward; and backward dy comes in two parts, of which one, `low`, is still to
be masked, by the same mask as y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.dropout import coin, kept


@triton.jit
def _forward(
    x,  # [T, n]
    weight,  # [n]
    y,  # [T, n], rows `stride` apart
    dropped,  # [T, n], written if MASKED
    keys,  # int32 [T], read if MASKED
    n,
    stride,
    eps,
    threshold,
    scale,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(x + row * n + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    out = wide * rho * w
    tl.store(y + row * stride + column, out.to(y.dtype.element_ty), mask=inside)
    if MASKED:
        out = tl.where(kept(tl.load(keys + row), tl.arange(0, BLOCK // 2), threshold), out * scale, 0.0)
        tl.store(dropped + row * n + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x,  # [T, n]
    weight,  # [n]
    dy,  # [T, n]; if AGAIN, overwritten by y, masked if MASKED
    low,  # [T, n], read if MASKED: m(low) is still to be added to dy
    dt,  # [T, n], read if ADDED
    dx,  # [T, n]
    keys,  # int32 [T], read if MASKED
    n,
    eps,
    threshold,
    scale,
    ADDED: tl.constexpr,
    AGAIN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row + column, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        stays = kept(tl.load(keys + tl.program_id(0)), tl.arange(0, BLOCK // 2), threshold)
        d += tl.where(stays, tl.load(low + row + column, mask=inside, other=0.0).to(tl.float32) * scale, 0.0)
    g = w * d
    rho = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    out = rho * (g - wide * (rho * rho * tl.sum(g * wide) / n))
    if ADDED:
        out += tl.load(dt + row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row + column, out.to(dx.dtype.element_ty), mask=inside)
    if AGAIN:
        out = wide * rho * w
        if MASKED:
            out = tl.where(stays, out * scale, 0.0)
        tl.store(dy + row + column, out.to(dy.dtype.element_ty), mask=inside)


def _layout(n: int) -> dict[str, int]:
    """A row in one block, and warps enough that a thread holds 16 of its numbers (more beyond 8,192)."""
    block = max(2, triton.next_power_of_2(n))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def normalise(
    x: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    dropped: Tensor | None = None,
    keys: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """rms_norm(x) [T, n], written to y, whose rows may lie apart; and m of it to `dropped`, if that is given."""
    # What is neither read nor written may be any tensor.
    masked = dropped is not None
    tensors = (x, weight, y, dropped if masked else y, keys if masked else x)
    _forward[(len(x),)](*tensors, x.shape[1], y.stride(0), eps, *coin(p), MASKED=masked, **_layout(x.shape[1]))
    return y


def normalise_backward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dy: Tensor,
    dt: Tensor | None,
    again: bool,
    low: Tensor | None = None,
    keys: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """dx, for the gradient dy + m(low) if there is a low; and, if wanted again, y or m(y), in the place of dy.
    All [T, n]."""
    dx = torch.empty_like(x)
    masked = low is not None
    tensors = (x, weight, dy, low if masked else dy, dy if dt is None else dt, dx, keys if masked else x)
    flags = {"ADDED": dt is not None, "AGAIN": again, "MASKED": masked}
    _backward[(len(x),)](*tensors, x.shape[1], eps, *coin(p), **flags, **_layout(x.shape[1]))
    return dx, dy if again else None


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, ctx.eps = x.contiguous(), eps
        ctx.save_for_backward(x, weight)
        return normalise(x, weight, eps, torch.empty_like(x))

    @staticmethod
    def backward(ctx, dy: Tensor):
        return normalise_backward(*ctx.saved_tensors, ctx.eps, dy.contiguous(), None, again=False)[0], None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return RMSNorm.apply(x, weight, eps)
