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

Dropout masks the input of A alone. The mask is a hash of (token's key, channel), so backward draws it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import nf4
from kernels.reference import FrozenLinear, LowRank, scaled_product, wide_product

# Up to this many tokens the codes of a matrix are multiplied as they are read. With more, or in fp32, whose tiles do
# not fit the registers, it is expanded first. (Not measured yet.)
_FEW = 64
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
def _dropped(
    x,  # [T, n], rows `stride` apart
    keys,  # int32 [T]
    y,  # [T, n]
    n,
    stride,
    threshold,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    key = tl.load(keys + row).to(tl.uint32, bitcast=True)
    bits = _mix(key ^ (column.to(tl.uint32) * 0x9E3779B9))
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where((bits >> 8) >= threshold, value * scale, 0.0)
    tl.store(y + row * n + column, value.to(y.dtype.element_ty), mask=inside)


def dropout(x: Tensor, keys: Tensor | None, p: float) -> Tensor:
    """m(x): each input stays with probability 1 - p (reference.dropout_mask), and is scaled by 1 / (1 - p)."""
    if p == 0:
        return x
    y = x.new_empty(x.shape)
    grid = (len(x), triton.cdiv(x.shape[1], BLOCK))
    _dropped[grid](x, keys, y, x.shape[1], x.stride(0), round(p * 2**24), 1 / (1 - p), BLOCK)
    return y


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
    return len(update.a) % 8 == 0 and tokens > _FEW and tokens * abs(n_out - n_in) > copied


def _product(x: Tensor, linear: FrozenLinear) -> Tensor:
    """x W^T"""
    if linear.nf4 is not None and len(x) <= _FEW and x.itemsize == 2:
        return nf4.few_tokens(x, linear.nf4)
    return x @ _dense(linear, x).t()


def _stacked(updates: Sequence[LowRank]) -> tuple[Tensor, list[int]]:
    """Every A under the one before, and their ranks."""
    rows = [update.a_shadow for update in updates]
    return rows[0] if len(rows) == 1 else torch.cat(rows), [len(a) for a in rows]


class Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, frozen, updates, scale: float, p: float, keys: Tensor | None, *leaves: Tensor):
        ctx.frozen, ctx.updates, ctx.scale, ctx.p = frozen, updates, scale, p
        n_in, dropped = x.shape[1], dropout(x, keys, p)
        ys: list[Tensor | None] = [None] * len(frozen)
        us: list[Tensor | None] = [None] * len(frozen)
        held = [i for i, update in enumerate(updates) if update is not None]
        # Two at most: a copy of x has two sides.
        riding = [i for i in held if frozen[i].shape[0] > n_in and _pays(frozen[i], updates[i], len(x))][:2]
        if riding:
            left, *right = (len(updates[i].a) for i in riding)
            room = x.new_empty(len(x), left + n_in + sum(right))
            x = room[:, left : left + n_in].copy_(x)
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
                ys[i] = _product(x, frozen[i])
        if adding := [i for i in held if i not in riding]:
            a, ranks = _stacked([updates[i] for i in adding])
            u = scaled_product(dropped, a.t(), scale, x.new_empty(len(x), len(a)))
            for i, u_i in zip(adding, u.split(ranks, dim=1), strict=True):
                us[i] = u_i
                ys[i].addmm_(u_i, updates[i].b_shadow.t())
        ctx.save_for_backward(x if held else None, keys, *us)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, keys, *us = ctx.saved_tensors
        frozen, p, want_dx = ctx.frozen, ctx.p, ctx.needs_input_grad[0]
        held = [i for i, update in enumerate(ctx.updates) if update is not None]
        rides = False
        if held:
            updates = [ctx.updates[i] for i in held]
            a, ranks = _stacked(updates)
            n_out, n_in = frozen[0].shape
            rides = want_dx and p == 0 and len(frozen) == 1 and n_in > n_out and _pays(frozen[0], updates[0], len(x))
            if rides:
                room = x.new_empty(len(x), n_out + len(a))  # [dy | v]
                room[:, :n_out] = dys[0]
                v = room[:, n_out:]
            else:
                v = x.new_empty(len(x), len(a))
            for i, update, v_i in zip(held, updates, v.split(ranks, dim=1), strict=True):
                scaled_product(dys[i], update.b_shadow, ctx.scale, v_i)
                update.b.grad += wide_product(dys[i].t(), us[i])
            da = wide_product(v.t(), dropout(x, keys, p))
            for update, da_i in zip(updates, da.split(ranks), strict=True):
                update.a.grad += da_i
        dx = None
        if rides:
            weight = x.new_empty(n_out + len(a), n_in)  # [W ; A]
            _expanded(frozen[0], weight[:n_out])
            weight[n_out:] = a
            dx = room @ weight
        elif want_dx:
            dx = dropout(v @ a, keys, p) if held else None
            for dy, linear in zip(dys, frozen, strict=True):
                weight = _dense(linear, dy)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
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
