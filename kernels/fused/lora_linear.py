"""The LoRA linear on a GPU: where an update can ride along in the GEMM of its base weight, it does.

    y_i = x W_i^T + u_i B_i^T          u_i = s m(x) A_i^T            m: dropout
    dx  = sum_i dy_i W_i + m(sum_i v_i A_i)          v_i = s dy_i B_i          dA_i += v_i^T m(x)    dB_i += dy_i^T u_i

(reference.Projections has the derivation.) The skinny products u and v cost little; adding u B^T to a y that is there
already costs a read and a write of y. It can be had inside the GEMM,

    y = [x | u] [W | B]^T,      dx = [dy | v] [W ; A]

for the price of copying x (or dy) to where u has room beside it; a W in NF4 costs nothing extra, since it must be
expanded anyway and may as well be expanded beside B (a W in 16 bits is copied). So the wide side decides:

    out > in  (gate, up)     forward rides along: x is copied, the wide y is written once
    in > out  (down)         backward rides along: dy is copied, the wide dx is written once (not under dropout, whose
                             mask comes between v A and dx)
    elsewhere                GEMMs that add to what is there (beta = 1): what they read again is narrow

Two linears that ride along share one copy of x: with [u_0 | x | u_1], the first reads the left columns and [B_0 | W_0],
the second the right ones and [W_1 | B_1]. That copy is saved for dA in the place of x, so it takes no memory.

Dropout masks the input of A alone. The mask is a hash of (token's key, channel), so backward draws it again, inside the
small GEMM that adds m(v A) to a dx that is there already. And m(x) is saved in the place of x: dA needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import nf4
from kernels.reference import FrozenLinear, LowRank, add_product, scaled_product, wide_product

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
def _kept(keys, pair, threshold):
    """reference.dropout_mask of channels 2 pair and 2 pair + 1: keys uint32 [..., 1], pair [..., P] -> [..., 2 P]."""
    bits = _mix(keys ^ (pair.to(tl.uint32) * 0x9E3779B9))
    return tl.interleave(bits & 0xFFFF, bits >> 16) >= threshold


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
        kept = _kept(tl.load(keys + row).to(tl.uint32, bitcast=True), pair, threshold)
        value = tl.where(kept, value.to(tl.float32) * scale, 0.0).to(y.dtype.element_ty)
    tl.store(y + row * y_stride + column, value, mask=inside)


def copy(x: Tensor, y: Tensor, keys: Tensor | None = None, p: float = 0.0) -> Tensor:
    """y = m(x): each input stays with probability 1 - p (reference.dropout_mask), and is scaled by 1 / (1 - p).

    Rows of x and y [T, n] may lie apart, for which PyTorch's copy takes twice as long. Returns y.
    """
    masked, grid = p > 0, (len(x), triton.cdiv(x.shape[1], BLOCK))
    keys = keys if masked else x
    launch = {"MASKED": masked, "PAIRS": BLOCK // 2}
    _copy[grid](x, keys, y, x.shape[1], x.stride(0), y.stride(0), round(p * 2**16), 1 / (1 - p), **launch)
    return y


@triton.jit
def _add_masked(
    v,  # [T, r]
    a,  # [r, n]
    keys,  # int32 [T]
    dx,  # [T, n], added to
    tokens,
    rank,
    n,
    threshold,
    scale,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    there, inside = (token < tokens)[:, None], (column < n)[None, :]
    total = tl.zeros((TOKENS, 2 * PAIRS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        left = tl.load(v + token[:, None].to(tl.int64) * rank + r[None, :], mask=there & (r < rank)[None, :], other=0.0)
        right = tl.load(a + r[:, None].to(tl.int64) * n + column[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    key = tl.load(keys + token, mask=token < tokens, other=0).to(tl.uint32, bitcast=True)
    kept = _kept(key[:, None], pair[None, :], threshold)
    at = dx + token[:, None].to(tl.int64) * n + column[None, :]
    before = tl.load(at, mask=there & inside, other=0.0).to(tl.float32)
    after = before + tl.where(kept, total * scale, 0.0)
    tl.store(at, after.to(dx.dtype.element_ty), mask=there & inside)


def add_masked(dx: Tensor, v: Tensor, a: Tensor, keys: Tensor | None, p: float) -> None:
    """dx += m(v a), for dx [T, n], v [T, r] and a [r, n]."""
    if p == 0:
        dx.addmm_(v, a)
        return
    (tokens, rank), n = v.shape, a.shape[1]
    rows, columns = (64, 128) if dx.itemsize == 2 else (32, 32)  # fp32 products take many registers
    blocks = {"TOKENS": rows, "PAIRS": columns // 2, "RANK": min(64, max(16, triton.next_power_of_2(rank)))}
    grid = (triton.cdiv(tokens, rows), triton.cdiv(n, columns))
    _add_masked[grid](v, a, keys, dx, tokens, rank, n, round(p * 2**16), 1 / (1 - p), **blocks, num_warps=8)


def _expanded(linear: FrozenLinear, out: Tensor) -> Tensor:
    """The weight of a frozen linear, written to `out` [out, in]."""
    return out.copy_(linear.dense(out.dtype)) if linear.nf4 is None else nf4.expand_nf4(linear.nf4, out)


def _dense(linear: FrozenLinear, like: Tensor) -> Tensor:
    """The weight [out, in] in the dtype of `like`."""
    return linear.dense(like.dtype) if linear.nf4 is None else _expanded(linear, like.new_empty(linear.shape))


def _pays(linear: FrozenLinear, update: LowRank, tokens: int) -> bool:
    """Whether an update should ride along. Not if W then stands where a GEMM cannot read 16 bytes at a time; and a W in
    16 bits must be copied, which costs in * out, for tokens * (out - in) saved."""
    n_out, n_in = linear.shape
    copied = 0 if linear.nf4 is not None else n_in * n_out
    return len(update.a) % 8 == 0 and tokens * abs(n_out - n_in) > copied


def _stacked(updates: Sequence[LowRank]) -> tuple[Tensor, list[int]]:
    """Every A under the one before, and their ranks."""
    rows = [update.a_shadow for update in updates]
    return rows[0] if len(rows) == 1 else torch.cat(rows), [len(a) for a in rows]


class Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen, updates, scale: float, p: float, keys: Tensor | None, *leaves: Tensor):
        ctx.frozen, ctx.updates, ctx.scale, ctx.p = frozen, updates, scale, p
        x = x.contiguous()
        n_in, dropped = x.shape[1], copy(x, x.new_empty(x.shape), keys, p) if p else x
        ys: list[Tensor | None] = [None] * len(frozen)
        us: list[Tensor | None] = [None] * len(frozen)
        held = [i for i, update in enumerate(updates) if update is not None]
        # Two at most: a copy of x has two sides.
        riding = [i for i in held if frozen[i].shape[0] > n_in and _pays(frozen[i], updates[i], len(x))][:2]
        if riding:
            left, *right = (len(updates[i].a) for i in riding)
            room = x.new_empty(len(x), left + n_in + sum(right))
            x = copy(x, room[:, left : left + n_in])
            # Where an update rides: its columns of `room`, and where in them (and in its weight) u and x stand.
            sides = (
                (room[:, : left + n_in], slice(0, left), slice(left, None)),  # [u_0 | x]
                (room[:, left:], slice(n_in, None), slice(0, n_in)),  # [x | u_1]
            )
            for i, (both, beside, base) in zip(riding, sides, strict=False):
                us[i] = scaled_product(dropped, updates[i].a_shadow.t(), scale, both[:, beside])
                weight = x.new_empty(frozen[i].shape[0], both.shape[1])
                weight[:, beside] = updates[i].b_shadow
                _expanded(frozen[i], weight[:, base])
                ys[i] = both @ weight.t()
        for i in range(len(frozen)):
            if i not in riding:
                ys[i] = x @ _dense(frozen[i], x).t()
        if adding := [i for i in held if i not in riding]:
            a, ranks = _stacked([updates[i] for i in adding])
            u = scaled_product(dropped, a.t(), scale, x.new_empty(len(x), len(a)))
            for i, u_i in zip(adding, u.split(ranks, dim=1), strict=True):
                us[i] = u_i
                ys[i].addmm_(u_i, updates[i].b_shadow.t())
        if p:
            # Views of `room` would keep all of it.
            us = [u if u is None else u.contiguous() for u in us]
        ctx.save_for_backward((dropped if p else x) if held else None, keys, *us)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, keys, *us = ctx.saved_tensors
        frozen, p, want_dx = ctx.frozen, ctx.p, ctx.needs_input_grad[0]
        dys = [dy.contiguous() for dy in dys]
        held = [i for i, update in enumerate(ctx.updates) if update is not None]
        rides = False
        if held:
            updates = [ctx.updates[i] for i in held]
            a, ranks = _stacked(updates)
            n_out, n_in = frozen[0].shape
            rides = want_dx and p == 0 and len(frozen) == 1 and n_in > n_out and _pays(frozen[0], updates[0], len(x))
            if rides:
                room = x.new_empty(len(x), n_out + len(a))  # [dy | v]
                copy(dys[0], room[:, :n_out])
                v = room[:, n_out:]
            else:
                v = x.new_empty(len(x), len(a))
            for i, update, v_i in zip(held, updates, v.split(ranks, dim=1), strict=True):
                scaled_product(dys[i], update.b_shadow, ctx.scale, v_i)
                add_product(update.b.grad, dys[i].t(), us[i])
            for update, da_i in zip(updates, wide_product(v.t(), x).split(ranks), strict=True):
                update.a.grad += da_i
        dx = None
        if rides:
            weight = x.new_empty(n_out + len(a), n_in)  # [W ; A]
            _expanded(frozen[0], weight[:n_out])
            weight[n_out:] = a
            dx = room @ weight
        elif want_dx:
            for dy, linear in zip(dys, frozen, strict=True):
                weight = _dense(linear, dy)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if held:
                add_masked(dx, v, a, keys, p)
        return dx, *[None] * (5 + 2 * len(held))


def projections(
    x: Tensor,
    frozen: Sequence[FrozenLinear],
    updates: Sequence[LowRank | None],
    scale: float = 1.0,
    p: float = 0.0,
    keys: Tensor | None = None,
) -> list[Tensor]:
    """See reference.projections."""
    leaves = [leaf for update in updates if update is not None for leaf in (update.a, update.b)]
    return list(Projections.apply(x, frozen, updates, scale, p, keys, *leaves))
