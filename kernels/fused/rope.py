"""Rotary position embedding on q and k in one launch, all heads of one token a program.

Every head is turned in its planes (x_j, x_{j + D/2}) by the token's angles:

    left' = left cos - right sin        right' = right cos + left sin

A rotation is orthogonal, so backward is the rotation by the opposite angle: the same kernel with SIGN = -1, and nothing
is saved but the angles, which all layers share. The angles of a token are read once for all its heads.

It happens in place, so q, k and v stay side by side where one GEMM wrote them, and their gradients where attention did.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(x, heads, c, s, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Turns the heads of one token: x [heads, 2 * half], c and s fp32 [1, HALF]."""
    head, plane = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (plane < half)
    at = head * (2 * half) + plane
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, (left * c - right * s).to(x.dtype.element_ty), mask=inside)
    tl.store(x + at + half, (right * c + left * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q,  # [T, heads, 2 * half], tokens q_stride apart
    k,  # [T, kv_heads, 2 * half], tokens k_stride apart
    cos,  # fp32 [T, half]
    sin,  # fp32 [T, half]
    q_stride,
    k_stride,
    heads,
    kv_heads,
    half,
    SIGN: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + row * half + plane, mask=plane < half, other=0.0)
    s = tl.load(sin + row * half + plane, mask=plane < half, other=0.0) * SIGN
    _turn(q + row * q_stride, heads, c, s, half, HEADS, HALF)
    _turn(k + row * k_stride, kv_heads, c, s, half, KV_HEADS, HALF)


def contiguous_heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with heads and channels side by side; only tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    q, k = contiguous_heads(q), contiguous_heads(k)
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    blocks = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": width // 2}
    blocks = {name: triton.next_power_of_2(size) for name, size in blocks.items()}
    numbers = q.stride(0), k.stride(0), heads, kv_heads, width // 2
    _rotate[(tokens,)](q, k, cos, sin, *numbers, SIGN=sign, **blocks)
    return q, k


class RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        # Unknown to autograd, which lets no function of two outputs mark its inputs as changed. So nobody may keep q
        # and k as they were before; the projections that made them do not.
        return _launch(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        return *_launch(dq, dk, *ctx.saved_tensors, -1), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.rope."""
    return RoPE.apply(q, k, cos, sin)
