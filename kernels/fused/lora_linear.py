"""The LoRA linear on a GPU: where an update can ride along in the GEMM of its base weight, it does.

    y_i = x W_i^T + u_i B_i^T          u_i = s m(x) A_i^T            m: dropout
    dx  = sum_i dy_i W_i + m(sum_i v_i A_i)          v_i = s dy_i B_i          dA_i += v_i^T m(x)    dB_i += dy_i^T u_i

(reference.Projections has the derivation.) The skinny products u and v cost little; adding u B^T to a y that is there
already costs a read and a write of y. It can be had inside the GEMM,

    y = [x | u] [W | B]^T,      dx = [dy | v] [W ; A]

for the price of copying x (or dy) to where u has room beside it; W costs nothing extra, since it must be expanded
anyway and may as well be expanded beside B. So the wide side decides:

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
from kernels.reference import FrozenLinear, LowRank

# Up to this many tokens a matrix is read once and multiplied at once; from there on it is expanded first.
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


def _scaled(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, as it comes out of the GEMM, to be added to an fp32 gradient."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else (a @ b).float()


def _product(x: Tensor, linear: FrozenLinear) -> Tensor:
    """x W^T"""
    if linear.nf4 is not None and len(x) <= _FEW:
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
        riding = [i for i in held if frozen[i].shape[0] > n_in and len(x) > _FEW][:2]
        if riding:
            left, *right = (len(updates[i].a) for i in riding)
            room = x.new_empty(len(x), left + n_in + sum(right))  # [u_0 | x | u_1]
            x = room[:, left : left + n_in].copy_(x)
        for side, i in enumerate(riding):
            r = len(updates[i].a)
            both, beside, base = (
                (room[:, : r + n_in], slice(0, r), slice(r, None))
                if side == 0
                else (room[:, left:], slice(n_in, None), slice(0, n_in))
            )
            us[i] = _scaled(dropped, updates[i].a_shadow.t(), scale, both[:, beside])
            weight = x.new_empty(len(updates[i].b), n_in + r)
            weight[:, beside] = updates[i].b_shadow
            _expanded(frozen[i], weight[:, base])
            ys[i] = both @ weight.t()
        for i in range(len(frozen)):
            if i not in riding:
                ys[i] = _product(x, frozen[i])
        if adding := [i for i in held if i not in riding]:
            a, ranks = _stacked([updates[i] for i in adding])
            u = _scaled(dropped, a.t(), scale, x.new_empty(len(x), len(a)))
            for i, u_i in zip(adding, u.split(ranks, dim=1), strict=True):
                us[i] = u_i
                ys[i].addmm_(u_i, updates[i].b_shadow.t())
        ctx.save_for_backward(x if held else None, keys, *us)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, keys, *us = ctx.saved_tensors
        frozen, p, want_dx = ctx.frozen, ctx.p, ctx.needs_input_grad[0]
        dys = [dy.contiguous() for dy in dys]
        held = [i for i, update in enumerate(ctx.updates) if update is not None]
        riding = False
        if held:
            updates = [ctx.updates[i] for i in held]
            a, ranks = _stacked(updates)
            n_out, n_in = frozen[0].shape
            riding = want_dx and p == 0 and len(frozen) == 1 and n_in > n_out
            if riding:
                room = x.new_empty(len(x), n_out + len(a))  # [dy | v]
                room[:, :n_out] = dys[0]
                v = room[:, n_out:]
            else:
                v = x.new_empty(len(x), len(a))
            for i, update, v_i in zip(held, updates, v.split(ranks, dim=1), strict=True):
                _scaled(dys[i], update.b_shadow, ctx.scale, v_i)
                update.b.grad += _wide_product(dys[i].t(), us[i])
            da = _wide_product(v.t(), dropout(x, keys, p))
            for update, da_i in zip(updates, da.split(ranks), strict=True):
                update.a.grad += da_i
        dx = None
        if riding:
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
