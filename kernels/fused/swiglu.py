"""SwiGLU, elementwise: y = silu(g) u with silu(g) = g sigma(g), in fp32 between one read and one write.

    dg = dy u sigma (1 + g (1 - sigma))        du = dy silu(g)

Only g and u are kept, which the two projections made: backward has them in registers, so it makes sigma again, for an
exponential is cheaper than memory, and y too where the linear after it wants its input back. Forward moves three
numbers an element, backward five, or six with y.
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
    y,  # [n], written if AGAIN
    n,
    AGAIN: tl.constexpr,
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
    if AGAIN:
        tl.store(y + i, (g * sigma * u).to(y.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, n] -> silu(gate) * up [T, n]."""
    y = torch.empty_like(gate)
    _forward[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK)
    return y


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """d_gate, d_up, and y if it is wanted again; all [T, n]."""
    d_gate, d_up, y = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(dy) if again else None
    tensors = (gate, up, dy, d_gate, d_up, dy if y is None else y)
    _backward[(triton.cdiv(dy.numel(), BLOCK),)](*tensors, dy.numel(), again, BLOCK)
    return d_gate, d_up, y
