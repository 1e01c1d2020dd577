"""RMSNorm, alone and with the residual added on the way, one row of the residual stream a program.

    t = x + d                                  d: what attention adds to the stream; alone, t = x
    y = w * t * rho,  rho = 1 / sqrt(mean(t^2) + eps)

With g = w * dy, and dt what reaches t by the stream itself:

    dx = dd = dt + rho * (g - t * rho^2 * mean(g * t))            (reference.RMSNorm has the derivation)

Saved: t, which the stream keeps anyway, and rho, one number a row. In 16 bits a row of n moves 2n bytes for each of
x, d, t, y forward and t, dy, dt, dx backward; as two operations each way it would move 6n more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x,  # [T, n]
    d,  # [T, n], read if ADDED
    weight,  # [n]
    t,  # [T, n], written if ADDED
    y,  # [T, n]
    rho,  # fp32 [T]
    n,
    eps,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        total = wide + tl.load(d + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(t.dtype.element_ty)
        tl.store(t + row + column, rounded, mask=inside)
        # The norm is of the numbers that the stream carries on, not of those before rounding.
        wide = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    tl.store(rho + tl.program_id(0), r)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + column, (wide * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    t,  # [T, n]
    weight,  # [n]
    rho,  # fp32 [T]
    dy,  # [T, n]
    dt,  # [T, n], read if ADDED
    dx,  # [T, n]
    n,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(t + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g = w * tl.load(dy + row + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rho + tl.program_id(0))
    out = r * (g - wide * (r * r * tl.sum(g * wide) / n))
    if ADDED:
        out += tl.load(dt + row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row + column, out.to(dx.dtype.element_ty), mask=inside)


def _layout(n: int) -> dict[str, int]:
    """A row in one block, and warps enough that a thread holds at most 16 of its numbers."""
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rho = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        # Not ADDED, so the places of d and t are never touched.
        _forward[(len(x),)](x, x, weight, x, y, rho, x.shape[1], eps, ADDED=False, **_layout(x.shape[1]))
        ctx.save_for_backward(x, weight, rho)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rho = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        # Nor is that of dt.
        _backward[(len(x),)](x, weight, rho, dy, dy, dx, x.shape[1], ADDED=False, **_layout(x.shape[1]))
        return dx, None, None


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, d: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, d = x.contiguous(), d.contiguous()
        t, y, rho = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        _forward[(len(x),)](x, d, weight, t, y, rho, x.shape[1], eps, ADDED=True, **_layout(x.shape[1]))
        ctx.save_for_backward(t, weight, rho)
        return t, y

    @staticmethod
    def backward(ctx, dt: Tensor, dy: Tensor):
        t, weight, rho = ctx.saved_tensors
        dt, dy, dx = dt.contiguous(), dy.contiguous(), torch.empty_like(t)
        _backward[(len(t),)](t, weight, rho, dy, dt, dx, t.shape[1], ADDED=True, **_layout(t.shape[1]))
        return dx, dx, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, d: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See reference.add_rms_norm."""
    return AddRMSNorm.apply(x, d, weight, eps)
