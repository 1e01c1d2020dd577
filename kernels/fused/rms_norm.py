"""RMSNorm, one row of the residual stream a program.

    y = w * x * rho,  rho = 1 / sqrt(mean(x^2) + eps)

With g = w * dy, and dt what reaches x by the stream itself:

    dx = dt + rho * (g - x * rho^2 * mean(g * x))            (reference.RMSNorm has the derivation)

Nothing is saved but x, which the stream keeps anyway: backward has x in registers, so it makes rho again, and y too
where a linear wants its input back. In 16 bits a row of n moves 2n bytes for each of x, y forward and x, dy, dt, dx, y
backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x,  # [T, n]
    weight,  # [n]
    y,  # [T, n], rows `stride` apart
    n,
    stride,
    eps,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(x + row * n + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    tl.store(y + row * stride + column, (wide * rho * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x,  # [T, n]
    weight,  # [n]
    dy,  # [T, n]
    dt,  # [T, n], read if ADDED
    dx,  # [T, n]
    y,  # [T, n], written if AGAIN
    n,
    eps,
    ADDED: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
    inside = column < n
    wide = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g = w * tl.load(dy + row + column, mask=inside, other=0.0).to(tl.float32)
    rho = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    out = rho * (g - wide * (rho * rho * tl.sum(g * wide) / n))
    if ADDED:
        out += tl.load(dt + row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row + column, out.to(dx.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(y + row + column, (wide * rho * w).to(y.dtype.element_ty), mask=inside)


def _layout(n: int) -> dict[str, int]:
    """A row in one block, and warps enough that a thread holds at most 16 of its numbers."""
    block = triton.next_power_of_2(n)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def normalise(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """Writes rms_norm(x) [T, n] to y, whose rows may lie apart. Returns y."""
    _forward[(len(x),)](x, weight, y, x.shape[1], y.stride(0), eps, **_layout(x.shape[1]))
    return y


def normalise_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, dt: Tensor | None, again: bool
) -> tuple[Tensor, Tensor | None]:
    """dx, and y if it is wanted again; all [T, n]."""
    dx, y = torch.empty_like(x), torch.empty_like(x) if again else None
    # What is neither read nor written may be any tensor.
    tensors = (x, weight, dy, dy if dt is None else dt, dx, dx if y is None else y)
    flags = {"ADDED": dt is not None, "AGAIN": again}
    _backward[(len(x),)](*tensors, x.shape[1], eps, **flags, **_layout(x.shape[1]))
    return dx, y


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
