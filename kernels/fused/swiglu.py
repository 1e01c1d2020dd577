"""SwiGLU, elementwise: y = silu(g) u with silu(g) = g sigma(g), in fp32 between one read and one write.

    dg = dy u sigma (1 + g (1 - sigma))        du = dy silu(g)

Saved: g and u, which the two projections made; sigma is made again, for an exponential is cheaper than memory. Forward
moves three numbers an element, backward five.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(
    gate,  # [n]
    up,  # [n]
    y,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate,  # [n]
    up,  # [n]
    dy,  # [n]
    d_gate,  # [n]
    d_up,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(d_gate + i, (d * u * sigma * (1 + g * (1 - sigma))).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + i, (d * g * sigma).to(d_up.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _forward[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dy, d_gate, d_up = dy.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _backward[(triton.cdiv(dy.numel(), BLOCK),)](gate, up, dy, d_gate, d_up, dy.numel(), BLOCK)
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See reference.swiglu."""
    return SwiGLU.apply(gate, up)
