"""The LoRA linear on a GPU: where an update can ride along in the GEMM of its base weight, it does.

    y_i = x W_i^T + u_i B_i^T [+ residual]          u_i = s m(x) A_i^T            m: dropout
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

Where W is narrow (out <= in: q, k, v) the linears on one x are one GEMM, if they are in NF4: expanded under each other
they are one W, and the outputs stand side by side. (k and v alone are too narrow to fill a GPU: 128 us for the three
where one by one they take 165, with 7,680 tokens on an H200.) Backward, too, if the gradients come side by side.

Two linears that ride along share one copy of x: with [u_0 | x | u_1], the first reads the left columns and [B_0 | W_0],
the second the right ones and [W_1 | B_1]. A norm before them writes x there itself.

A residual is added on the way: for o and down, residual + u B^T is one pass of a small GEMM in Triton, and the large
one adds to that (PyTorch would copy the residual first).

Of an x that is the normalised stream or the gated product (reference.Normed, Gated) nothing is saved: the kernel that
takes the gradient back through those has all in hand that x is made of, so it writes m(x) once more, for dA. A plain x
is saved.

Dropout masks the input of A alone (dropout.py): where x is made, m(x) is written beside it; and where dx is read next,
m(v A) is added to it, by the kernel that draws the mask for m(x) at that moment. (Of a plain x, by the small GEMM.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.fused import nf4
from kernels.fused.dropout import copy
from kernels.fused.low_rank import add_low_rank
from kernels.fused.rms_norm import normalise, normalise_backward
from kernels.fused.swiglu import swiglu, swiglu_backward
from kernels.reference import (
    FrozenLinear,
    Gated,
    LowRank,
    Normed,
    Source,
    add_product,
    scaled_product,
)


def _expanded(linear: FrozenLinear, out: Tensor) -> Tensor:
    """The weight of a frozen linear, written to `out` [out, in]."""
    return out.copy_(linear.dense(out.dtype)) if linear.nf4 is None else nf4.expand_nf4(linear.nf4, out)


def _dense(frozen: Sequence[FrozenLinear], like: Tensor) -> Tensor:
    """The weights under each other, [sum of out, in], in the dtype of `like`."""
    if len(frozen) == 1 and frozen[0].nf4 is None:
        return frozen[0].dense(like.dtype)
    outs = [linear.shape[0] for linear in frozen]
    weight = like.new_empty(sum(outs), frozen[0].shape[1])
    for linear, rows in zip(frozen, weight.split(outs), strict=True):
        _expanded(linear, rows)
    return weight


def _pays(linear: FrozenLinear, update: LowRank, tokens: int) -> bool:
    """Whether an update should ride along. Not if W then stands where a GEMM cannot read 16 bytes at a time; and a W in
    16 bits must be copied, which costs in * out, for tokens * (out - in) saved."""
    n_out, n_in = linear.shape
    copied = 0 if linear.nf4 is not None else n_in * n_out
    return len(update.a) % 8 == 0 and tokens * abs(n_out - n_in) > copied


def _joined(matrices: list[Tensor], dim: int) -> list[Tensor]:
    """The same as one matrix, if each stands under (dim 0) or beside (dim 1) the one before in memory; else as they
    are. So stand the A of linears that read one input (adapter.py), and the gradients of q, k and v (attention.py)."""
    first = matrices[0]
    where, alike = first.data_ptr(), (first.untyped_storage().data_ptr(), first.stride())
    for matrix in matrices:
        if matrix.data_ptr() != where or (matrix.untyped_storage().data_ptr(), matrix.stride()) != alike:
            return matrices
        where += matrix.shape[dim] * matrix.stride(dim) * matrix.itemsize
    size = list(first.shape)
    size[dim] = sum(matrix.shape[dim] for matrix in matrices)
    return [first.as_strided(size, first.stride())]


def contiguous_rows(x: Tensor) -> Tensor:
    """x [T, n] with each row in one piece, as GEMMs take it."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _all_a(updates: Sequence[LowRank]) -> Tensor:
    """Every A under the one before."""
    matrices = _joined([update.a_shadow for update in updates], 0)
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _input(
    kind: type, first: Tensor, second: Tensor | None, eps: float, keys: Tensor | None, p: float, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The value of a source [T, in], in `x` if that is given, whose rows may lie apart; and m of it, which without
    dropout is the same tensor."""
    dropped = torch.empty_like(first) if p else None
    if kind is Normed:
        x = normalise(first, second, eps, torch.empty_like(first) if x is None else x, dropped, keys, p)
    else:
        value = swiglu(first, second, dropped, keys, p) if kind is Gated else first
        if kind is not Gated and p:
            copy(first, dropped, keys, p)
        x = value if x is None else copy(value, x)
    return x, x if dropped is None else dropped


def _ridden(
    both: Tensor, base: slice, beside: slice, linear: FrozenLinear, update: LowRank, u: Tensor, residual: Tensor | None
) -> Tensor:
    """[x | u] [W | B]^T [+ residual]: in `both`, x stands in the columns `base`, and u has room in those `beside`."""
    weight = both.new_empty(linear.shape[0], both.shape[1])
    copy(u, both[:, beside])
    copy(update.b_shadow, weight[:, beside])
    _expanded(linear, weight[:, base])
    return both @ weight.t() if residual is None else torch.addmm(residual, both, weight.t())


def _added(
    x: Tensor,
    frozen: list[FrozenLinear],
    updates: list[LowRank | None],
    us: list[Tensor | None],
    residual: Tensor | None,
) -> list[Tensor]:
    """x W_i^T [+ u_i B_i^T], as columns of one matrix; or, for one linear, residual + x W^T [+ u B^T]."""
    if residual is not None:
        (update,), (u,) = updates, us  # only a linear alone has one
        if update is None:
            return [torch.addmm(residual, x, _dense(frozen, x).t())]
        y = add_low_rank(residual, u, update.b_shadow.t(), torch.empty_like(residual))
        return [y.addmm_(x, _dense(frozen, x).t())]
    ys = (x @ _dense(frozen, x).t()).split([linear.shape[0] for linear in frozen], dim=1)
    for y, update, u in zip(ys, updates, us, strict=True):
        if update is not None:
            y.addmm_(u, update.b_shadow.t())
    return [*ys]


def _ridden_back(dy: Tensor, linear: FrozenLinear, v: Tensor, a: Tensor) -> Tensor:
    """[dy | v] [W ; A]."""
    n_out, n_in = linear.shape
    both, weight = dy.new_empty(len(dy), n_out + len(a)), dy.new_empty(n_out + len(a), n_in)
    copy(dy, both[:, :n_out])
    copy(v, both[:, n_out:])
    _expanded(linear, weight[:n_out])
    weight[n_out:] = a
    return both @ weight


def _summed(dys: list[Tensor], frozen: Sequence[FrozenLinear]) -> Tensor:
    """sum_i dy_i W_i."""
    if all(linear.nf4 is not None for linear in frozen) and len(joined := _joined(dys, 1)) == 1:
        return joined[0] @ _dense(frozen, joined[0])
    dx = None
    for dy, linear in zip(dys, frozen, strict=True):
        # Not named, so that no weight outlives its product: they are the largest tensors around.
        dx = dy @ _dense([linear], dy) if dx is None else dx.addmm_(dy, _dense([linear], dy))
    return dx


class Projections(torch.autograd.Function):
    """kind: the class of the source; first and second: its tensors; eps: its number."""

    @staticmethod
    def forward(ctx, first, second, residual, kind, eps, frozen, updates, scale, p, keys, hollow, *leaves):
        held = [i for i, update in enumerate(updates) if update is not None]
        p = p if held else 0.0
        ctx.kind, ctx.eps, ctx.frozen, ctx.updates, ctx.scale, ctx.p = kind, eps, frozen, updates, scale, p
        first, second, residual = (x if x is None else x.contiguous() for x in (first, second, residual))
        tokens, n_in = first.shape
        ys: list[Tensor | None] = [None] * len(frozen)
        us: list[Tensor | None] = [None] * len(frozen)
        # Two at most: a copy of x has two sides.
        riding = [i for i in held if frozen[i].shape[0] > n_in and _pays(frozen[i], updates[i], tokens)][:2]
        if hollow:
            ys, riding = [first.new_empty(tokens, linear.shape[0]) for linear in frozen], []
        x = None
        if riding:
            left, *right = (len(updates[i].a) for i in riding)
            room = first.new_empty(tokens, left + n_in + sum(right))
            x = room[:, left : left + n_in]
        x, masked = _input(kind, first, second, eps, keys, p, x)
        if held:
            a, ranks = _all_a([updates[i] for i in held]), [len(updates[i].a) for i in held]
            u = scaled_product(masked, a.t(), scale, x.new_empty(tokens, len(a)))
            for i, u_i in zip(held, u.split(ranks, dim=1), strict=True):
                us[i] = u_i
        if riding:
            # Where an update rides: its columns of `room`, and where in them (and in its weight) x and u stand.
            sides = (
                (room[:, : left + n_in], slice(left, None), slice(0, left)),  # [u_0 | x]
                (room[:, left:], slice(0, n_in), slice(n_in, None)),  # [x | u_1]
            )
            for i, side in zip(riding, sides, strict=False):
                ys[i] = _ridden(*side, frozen[i], updates[i], us[i], residual)
        rest = [i for i, y in enumerate(ys) if y is None]
        narrow = [i for i in rest if frozen[i].nf4 is not None and frozen[i].shape[0] <= n_in]
        for group in filter(None, [*([i] for i in rest if i not in narrow), narrow]):
            parts = ([every[i] for i in group] for every in (frozen, updates, us))
            for i, y in zip(group, _added(x, *parts, residual), strict=True):
                ys[i] = y
        if second is None and not held:  # a plain input is needed for dA alone
            first = None
        ctx.save_for_backward(first, second, keys, *us)
        return (first, *ys) if kind is Normed else tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        first, second, keys, *us = ctx.saved_tensors
        kind, frozen, p, want_dx = ctx.kind, ctx.frozen, ctx.p, ctx.needs_input_grad[0]
        dt, dys = (dys[0].contiguous(), dys[1:]) if kind is Normed else (None, dys)
        dys = [contiguous_rows(dy) for dy in dys]
        held = [i for i, update in enumerate(ctx.updates) if update is not None]
        updates = [ctx.updates[i] for i in held]
        if held:
            a, ranks = _all_a(updates), [len(update.a) for update in updates]
            v = dys[0].new_empty(len(dys[0]), len(a))
            for i, update, v_i in zip(held, updates, v.split(ranks, dim=1), strict=True):
                scaled_product(dys[i], update.b_shadow, ctx.scale, v_i)
                add_product(update.b.grad, dys[i].t(), us[i])
        # dx, and what of it is still to be masked and added.
        dx, low, (n_out, n_in) = None, None, frozen[0].shape
        alone = want_dx and held and p == 0 and len(frozen) == 1
        if alone and n_in > n_out and _pays(frozen[0], updates[0], len(v)):
            dx = _ridden_back(dys[0], frozen[0], v, a)
        elif want_dx:
            dx = _summed(dys, frozen)
            if held and p == 0:
                dx.addmm_(v, a)
            elif held and second is None:
                add_low_rank(dx, v, a, dx, keys, p)
            elif held:
                low = v @ a
        # From the gradient of the input to that of its source; on the way m(x) is made again, for dA.
        d_first, d_second, x = dx, None, None
        if want_dx and kind is Normed:
            d_first, x = normalise_backward(first, second, ctx.eps, dx, dt, bool(held), low, keys, p)
        elif want_dx and kind is Gated:
            d_first, d_second, x = swiglu_backward(first, second, dx, bool(held), low, keys, p)
        elif held:
            _, x = _input(kind, first, second, ctx.eps, keys, p)
        if held:
            totals = _joined([update.a.grad for update in updates], 0)
            for total, v_i in zip(totals, v.split([len(total) for total in totals], dim=1), strict=True):
                add_product(total, v_i.t(), x)
        d_residual = dys[0] if ctx.needs_input_grad[2] else None
        return d_first, d_second, d_residual, *[None] * (8 + 2 * len(held))


def projections(
    source: Source,
    frozen: Sequence[FrozenLinear],
    updates: Sequence[LowRank | None],
    scale: float = 1.0,
    p: float = 0.0,
    keys: Tensor | None = None,
    residual: Tensor | None = None,
    hollow: bool = False,
) -> list[Tensor]:
    """See reference.projections."""
    leaves = [leaf for update in updates if update is not None for leaf in (update.a, update.b)]
    first, second, eps = (source, None, 0.0) if isinstance(source, Tensor) else (*source, 0.0)[:3]
    rest = (frozen, updates, scale, p, keys, hollow, *leaves)
    return list(Projections.apply(first, second, residual, type(source), eps, *rest))
