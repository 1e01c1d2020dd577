"""Causal attention inside packed examples, grouped heads as they are: flash attention (Dao 2023), no atomics.

With c = log2(e) / sqrt(D), so that exp is a power of two, every query row i keeps one number, L_i:

    S = Q K^T      L_i = log2 sum_{j <= i} 2^(c S_ij)      P_ij = 2^(c S_ij - L_i)      O = P V

    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta),  delta_i = sum_j P_ij dP_ij = dO_i . O_i
    dQ = dS K / sqrt(D)           dK = dS^T Q / sqrt(D)

Saved: q, k, v, O, L; P is made again, tile by tile. Forward meets its keys tile by tile, too, and rescales what it has
whenever a row's maximum grows (online softmax, Milakov and Gimelshein 2018).

Rows. The G query heads that share a key head are rows of one matrix: row r of it is position r / G, head r mod G. So a
tile of 128 rows spans only 32 positions of 4 heads, which leaves little of the square at the diagonal to mask, and a
program that holds keys sums dK and dV over its heads by itself. L and delta are stored in this order, [kv_heads, T, G].
A tile spans SPAN = ROWS / G positions, rounded down: if G does not divide ROWS, its last rows idle.

Places. A program has a tile of one example, and it must find which one: lengths are known on the device only. Example e
that begins at s_e gets the tiles numbered from s_e / SPAN + e on (rounded down), and never needs more than there are up
to the next one: ceil(length / SPAN) <= floor(s_{e+1} / SPAN) - floor(s_e / SPAN) + 1. So T / SPAN + n tiles are enough
whatever the lengths, at most one an example is empty, and e is the number of first tiles up to one's own, less one.
Tiles with the most work go first: the latest rows of an example, but the earliest keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.fused.rope import contiguous_heads


class Launch(NamedTuple):
    """How a kernel is launched: rows (of queries) and keys a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


# Of the three kernels, for heads of up to 64 and up to 128: the fastest of six each on an H200, and what fits the 99 KB
# of shared memory of other GPUs.
_HOPPER = {
    "forward": {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 3)},
    "queries": {64: Launch(64, 64, 4, 2), 128: Launch(64, 64, 4, 2)},
    "keys": {64: Launch(64, 64, 4, 3), 128: Launch(32, 64, 4, 3)},
}
_OTHERS = {
    "forward": {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 2)},
    "queries": {64: Launch(128, 64, 8, 2), 128: Launch(128, 32, 8, 2)},
    "keys": {64: Launch(32, 64, 4, 3), 128: Launch(32, 64, 4, 2)},
}


@cache
def _launches(device: torch.device) -> dict[str, dict[int, Launch]]:
    cuda = device.type == "cuda"
    return (
        _HOPPER
        if cuda and torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 200_000
        else _OTHERS
    )


@triton.jit
def _place(starts, n, tile, SPAN: tl.constexpr, EXAMPLES: tl.constexpr):
    """Where the example of this tile begins, its length, and the first position of the tile inside it."""
    e = tl.arange(0, EXAMPLES)
    first = tl.load(starts + e, mask=e < n, other=0) // SPAN + e
    example = tl.sum(((e < n) & (first <= tile)).to(tl.int32)) - 1
    start = tl.load(starts + example)
    return start, tl.load(starts + example + 1) - start, (tile - start // SPAN - example) * SPAN


@triton.jit
def _load(x, at, row, rows, D: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """x[at + column] for at [R] -> [R, WIDTH]; zero beyond D and, if BOUNDED, where row [R] is not below `rows`."""
    column = tl.arange(0, WIDTH)[None, :]
    where = x + (at[:, None] + column)
    if BOUNDED:
        inside = (row < rows)[:, None]
        if D < WIDTH:
            inside = inside & (column < D)
        tile = tl.load(where, mask=inside, other=0.0)
    elif D < WIDTH:
        tile = tl.load(where, mask=column < D, other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def _store(x, at, row, rows, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None]
    if D < WIDTH:
        inside = inside & (column < D)
    tl.store(x + (at[:, None] + column), tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _meet(
    top, total, o, q, k, v, k_stride, v_stride, position, begin, length,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: KEYS keys from `begin` on. top, total fp32 [ROWS], o fp32 [ROWS, WIDTH]."""
    key = tl.arange(0, KEYS)
    ks = _load(k + begin * k_stride, key * k_stride, begin + key, length, D, WIDTH, MASKED)
    s = tl.dot(q, tl.trans(ks), input_precision="ieee")
    if MASKED:
        s = tl.where((begin + key)[None, :] <= position[:, None], s, -float("inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * C - (higher * C)[:, None])
    shrink = tl.exp2((top - higher) * C)
    vs = _load(v + begin * v_stride, key * v_stride, begin + key, length, D, WIDTH, MASKED)
    o = tl.dot(p.to(vs.dtype), vs, o * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), o


@triton.jit(do_not_specialize=["n"])
def _forward(
    q,  # [T, kv_heads * G, D], tokens q_stride apart
    k,  # [T, kv_heads, D], tokens k_stride apart
    v,  # [T, kv_heads, D], tokens v_stride apart
    starts,  # int32 [n + 1]
    out,  # [T, kv_heads * G, D]
    lse,  # fp32 [kv_heads, T, G]: L
    n,
    tokens,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    C: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    EXAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIAGONAL: tl.constexpr,  # tiles of keys that meet the diagonal, at most
):
    head = tl.program_id(0) % kv_heads
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    SPAN: tl.constexpr = ROWS // G
    start, length, first = _place(starts, n, tile, SPAN, EXAMPLES)
    if first >= length:
        return
    token = start.to(tl.int64)
    k += token * k_stride + head * D
    v += token * v_stride + head * D
    token += first
    end = tl.minimum(first + SPAN, length)
    row = tl.arange(0, ROWS)
    position = first + row // G
    qs = _load(q + token * q_stride + head * (G * D), row // G * q_stride + row % G * D, position, end, D, WIDTH, True)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, WIDTH), tl.float32)
    # The tiles at the diagonal are masked, those before it are not. Whichever is first, every row may see the first key
    # of it, so `top` is finite from there on.
    whole = first // KEYS * KEYS
    for i in tl.static_range(DIAGONAL):
        top, total, o = _meet(
            top, total, o, qs, k, v, k_stride, v_stride, position, whole + i * KEYS, length, C, D, WIDTH, KEYS, True
        )
    for begin in range(0, whole, KEYS):
        top, total, o = _meet(
            top, total, o, qs, k, v, k_stride, v_stride, position, begin, length, C, D, WIDTH, KEYS, False
        )
    out += (token * kv_heads + head) * (G * D)
    _store(out, row // G * (kv_heads * G * D) + row % G * D, position, end, o / total[:, None], D, WIDTH)
    tl.store(lse + (head.to(tl.int64) * tokens + token) * G + row, top * C + tl.log2(total), mask=position < end)


@triton.jit
def _add_dq(
    dq, q, do, k, v, ls, deltas, k_stride, v_stride, position, begin, length,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq plus what KEYS keys from `begin` on give, not yet scaled."""
    key = tl.arange(0, KEYS)
    ks = _load(k + begin * k_stride, key * k_stride, begin + key, length, D, WIDTH, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(ks), input_precision="ieee") * C - ls[:, None])
    if MASKED:
        p = tl.where((begin + key)[None, :] <= position[:, None], p, 0.0)
    vs = _load(v + begin * v_stride, key * v_stride, begin + key, length, D, WIDTH, MASKED)
    ds = p * (tl.dot(do, tl.trans(vs), input_precision="ieee") - deltas[:, None])
    return tl.dot(ds.to(ks.dtype), ks, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["n"])
def _backward_queries(
    q,  # [T, kv_heads * G, D], tokens q_stride apart
    k,  # [T, kv_heads, D], tokens k_stride apart
    v,  # [T, kv_heads, D], tokens v_stride apart
    starts,  # int32 [n + 1]
    out,  # [T, kv_heads * G, D]
    d_out,  # like out
    lse,  # fp32 [kv_heads, T, G]
    delta,  # fp32 [kv_heads, T, G], written
    dq,  # [T, kv_heads * G, D], tokens d_stride apart
    n,
    tokens,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    d_stride,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    EXAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    SPAN: tl.constexpr = ROWS // G
    start, length, first = _place(starts, n, tile, SPAN, EXAMPLES)
    if first >= length:
        return
    token = start.to(tl.int64)
    k += token * k_stride + head * D
    v += token * v_stride + head * D
    token += first
    end = tl.minimum(first + SPAN, length)
    row = tl.arange(0, ROWS)
    position = first + row // G
    base, at = (token * kv_heads + head) * (G * D), row // G * (kv_heads * G * D) + row % G * D
    do = _load(d_out + base, at, position, end, D, WIDTH, True)
    deltas = tl.sum(do.to(tl.float32) * _load(out + base, at, position, end, D, WIDTH, True).to(tl.float32), 1)
    number = (head.to(tl.int64) * tokens + token) * G + row
    tl.store(delta + number, deltas, mask=position < end)
    ls = tl.load(lse + number, mask=position < end, other=0.0)
    qs = _load(q + token * q_stride + head * (G * D), row // G * q_stride + row % G * D, position, end, D, WIDTH, True)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    whole = first // KEYS * KEYS
    for i in tl.static_range(DIAGONAL):
        total = _add_dq(
            total, qs, do, k, v, ls, deltas, k_stride, v_stride, position, whole + i * KEYS, length,
            C, D, WIDTH, KEYS, True,
        )  # fmt: skip
    for begin in range(0, whole, KEYS):
        total = _add_dq(
            total, qs, do, k, v, ls, deltas, k_stride, v_stride, position, begin, length, C, D, WIDTH, KEYS, False
        )
    dq += token * d_stride + head * (G * D)
    _store(dq, row // G * d_stride + row % G * D, position, end, total * SCALE, D, WIDTH)


@triton.jit
def _add_dkv(
    dk, dv, ks, vs, q, d_out, lse, delta, q_stride, do_stride, first, begin, length,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dk (not yet scaled) and dv plus what the rows of SPAN positions from `begin` on give; all tiles transposed.

    Rows that are not there are zero in q, dO, L and delta, so P is one and adds nothing.
    """
    row = tl.arange(0, ROWS)
    position = begin + row // G
    end = tl.minimum(begin + ROWS // G, length)
    qs = _load(q + begin * q_stride, row // G * q_stride + row % G * D, position, end, D, WIDTH, True)
    ls = tl.load(lse + begin * G + row, mask=position < end, other=0.0)
    p = tl.exp2(tl.dot(ks, tl.trans(qs), input_precision="ieee") * C - ls[None, :])
    if MASKED:
        p = tl.where((first + tl.arange(0, KEYS))[:, None] <= position[None, :], p, 0.0)
    do = _load(d_out + begin * do_stride, row // G * do_stride + row % G * D, position, end, D, WIDTH, True)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    deltas = tl.load(delta + begin * G + row, mask=position < end, other=0.0)
    ds = p * (tl.dot(vs, tl.trans(do), input_precision="ieee") - deltas[None, :])
    return tl.dot(ds.to(qs.dtype), qs, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["n"])
def _backward_keys(
    q,  # [T, kv_heads * G, D], tokens q_stride apart
    k,  # [T, kv_heads, D], tokens k_stride apart
    v,  # [T, kv_heads, D], tokens v_stride apart
    starts,  # int32 [n + 1]
    d_out,  # [T, kv_heads * G, D]
    lse,  # fp32 [kv_heads, T, G]
    delta,  # fp32 [kv_heads, T, G]
    dk,  # [T, kv_heads, D], tokens d_stride apart
    dv,  # [T, kv_heads, D], tokens d_stride apart
    n,
    tokens,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    d_stride,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    EXAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(0) % kv_heads
    start, length, first = _place(starts, n, tl.program_id(0) // kv_heads, KEYS, EXAMPLES)
    if first >= length:
        return
    SPAN: tl.constexpr = ROWS // G
    token = start.to(tl.int64)
    do_stride = kv_heads * G * D
    q += token * q_stride + head * (G * D)
    d_out += token * do_stride + head * (G * D)
    lse += (head.to(tl.int64) * tokens + token) * G
    delta += (head.to(tl.int64) * tokens + token) * G
    token += first
    key = tl.arange(0, KEYS)
    ks = _load(k + token * k_stride + head * D, key * k_stride, first + key, length, D, WIDTH, True)
    vs = _load(v + token * v_stride + head * D, key * v_stride, first + key, length, D, WIDTH, True)
    dks, dvs = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    # From `clear` on, every row sees every key, and a loop without masks is faster; but in wide heads two loops take
    # too many registers.
    SPLIT: tl.constexpr = WIDTH <= 64
    clear = tl.minimum(first + (KEYS + SPAN - 1) // SPAN * SPAN, length) if SPLIT else length
    for begin in range(first, clear, SPAN):
        dks, dvs = _add_dkv(
            dks, dvs, ks, vs, q, d_out, lse, delta, q_stride, do_stride, first, begin, length,
            C, D, G, WIDTH, ROWS, KEYS, True,
        )  # fmt: skip
    if SPLIT:
        for begin in range(clear, length, SPAN):
            dks, dvs = _add_dkv(
                dks, dvs, ks, vs, q, d_out, lse, delta, q_stride, do_stride, first, begin, length,
                C, D, G, WIDTH, ROWS, KEYS, False,
            )  # fmt: skip
    base, at = token * d_stride + head * D, key * d_stride
    _store(dk + base, at, first + key, length, dks * SCALE, D, WIDTH)
    _store(dv + base, at, first + key, length, dvs, D, WIDTH)


def _constants(q: Tensor, k: Tensor, starts: Tensor, kernel: str) -> dict[str, int]:
    width, group = q.shape[2], q.shape[1] // k.shape[1]
    rows, keys, warps, stages = _launches(q.device)[kernel][64 if width <= 64 else 128]
    return {
        "C": width**-0.5 * 1.4426950408889634,  # log2(e)
        "D": width,
        "G": group,
        "WIDTH": triton.next_power_of_2(max(width, 16)),
        "EXAMPLES": triton.next_power_of_2(max(len(starts) - 1, 128)),  # few kernels for all n
        "ROWS": max(rows, triton.next_power_of_2(group)),
        "KEYS": keys,
        "num_warps": warps,
        "num_stages": stages,
    }


def _arguments(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[int, ...]:
    return len(starts) - 1, len(q), k.shape[1], q.stride(0), k.stride(0), v.stride(0)


def _grid(q: Tensor, k: Tensor, starts: Tensor, span: int) -> tuple[int]:
    """A program for each key head of each place (see above), a tile being `span` positions."""
    return ((len(q) // span + len(starts) - 1) * k.shape[1],)


def _diagonal(constants: dict[str, int]) -> int:
    """The tiles of keys that SPAN positions from a multiple of SPAN on can touch."""
    span, keys = constants["ROWS"] // constants["G"], constants["KEYS"]
    return -(-(keys - gcd(span, keys) + span) // keys)


def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """O like q, and L fp32 [kv_heads, T, G]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(k.shape[1], len(q), q.shape[1] // k.shape[1], dtype=torch.float32, device=q.device)
    constants = _constants(q, k, starts, "forward")
    grid, arguments = _grid(q, k, starts, constants["ROWS"] // constants["G"]), _arguments(q, k, v, starts)
    _forward[grid](q, k, v, starts, out, lse, *arguments, DIAGONAL=_diagonal(constants), **constants)
    return out, lse


def backward_queries(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, dq: Tensor
) -> Tensor:
    """dQ, written to dq, whose tokens may lie apart; returns delta, like lse."""
    delta = torch.empty_like(lse)
    constants = _constants(q, k, starts, "queries")
    grid = _grid(q, k, starts, constants["ROWS"] // constants["G"])
    constants |= {"SCALE": q.shape[-1] ** -0.5, "DIAGONAL": _diagonal(constants)}
    tensors = q, k, v, starts, out, d_out, lse, delta, dq
    _backward_queries[grid](*tensors, *_arguments(q, k, v, starts), dq.stride(0), **constants)
    return delta


def backward_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """dK and dV, written to dk and dv [T, kv_heads, D]; both have the same stride from token to token."""
    constants = _constants(q, k, starts, "keys") | {"SCALE": q.shape[-1] ** -0.5}
    tensors, grid = (q, k, v, starts, d_out, lse, delta, dk, dv), _grid(q, k, starts, constants["KEYS"])
    _backward_keys[grid](*tensors, *_arguments(q, k, v, starts), dk.stride(0), **constants)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
        out, lse = forward(q, k, v, starts)
        ctx.save_for_backward(q, k, v, starts, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, starts, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        # Side by side, as one GEMM of the projections reads them.
        heads = [x.shape[1] for x in (q, k, v)]
        dq, dk, dv = q.new_empty(len(q), sum(heads), q.shape[2]).split(heads, dim=1)
        delta = backward_queries(q, k, v, starts, out, d_out, lse, dq)
        backward_keys(q, k, v, starts, d_out, lse, delta, dk, dv)
        return dq, dk, dv, None


@lru_cache(maxsize=8)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each example begins, and the end, int32 [n + 1]; all layers of a pass ask for the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def flash_takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether these kernels run there, in this dtype and with heads of this width. In 32 bits they would need too many
    registers, but the interpreter has plenty."""
    return width <= 128 and (dtype != torch.float32 or device.type == "cpu")


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    """See reference.attention."""
    if not flash_takes(q.device, q.dtype, q.shape[-1]):
        return reference.attention(q, k, v, lengths)
    starts = lengths if isinstance(lengths, Tensor) else _starts(tuple(lengths), q.device)
    return Attention.apply(q, k, v, starts)
