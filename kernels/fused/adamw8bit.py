"""bitsandbytes' blockwise 8-bit AdamW on one flat buffer: the same numbers to the last bit, in a fifth of the time.

In every block of 256 elements, each line rounded where bitsandbytes' CUDA kernel rounds:

    s1 = b1 (table[m] M) + (1 - b1) g          s2 = b2 (table[v] V) + ((1 - b2) g) g           g = grad_scale grad
    flat = (flat - lr c2 / c1 (s1 / (sqrt(s2) + c2 eps))) (1 - lr decay)        c1 = 1 - b1^t, c2 = sqrt(1 - b2^t)
    M = max |s1|, V = max |s2|, m and v = the nearest of the table to s1 / M and s2 / V

Where the gradient is not finite, s1 = s2 = 0 and flat stays. A tie goes to the even code. A negative s1 never becomes
the code of +0, and in a block of nothing but zeros m is 255 (0 for -0) and v 0.

bitsandbytes finds the nearest code by eight look-ups that wait for one another, which is what takes its time. Here it
is one. For x > 0 the code is the number of thresholds below x (the middles between neighbours in the table). The upper
bits of x as a float, those of the exponent and the first 6 or 7 of the fraction, name a bucket that holds at most one
threshold. Its entry is code * 2^24 + 2^24 - 1 - threshold, both in bits; the bits of x added carry into the code if,
and only if, x is above the threshold.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import dynamic_map

ONE = 0x3F800000  # the bits of 1.0
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _inverse(x):
    """1 / x in one instruction, as bitsandbytes takes it (x / y in Triton takes several)."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    """Here, too, tl.log2 is more exact: at 0.999, on which 1 - b2^t depends, by 1 in 10,000."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _nearest(x, buckets, SHIFT: tl.constexpr, FIRST: tl.constexpr):
    """x in [the start of bucket FIRST, 1] -> how many codes above that of 0 the nearest is, int32."""
    bits = x.to(tl.int32, bitcast=True)
    entry = tl.load(buckets + ((bits >> SHIFT) - FIRST))
    return ((entry + bits).to(tl.uint32, bitcast=True) >> 24).to(tl.int32)


@triton.jit
def _step(
    flat,  # fp32 [n]
    grad,  # fp32 [n]
    m,  # uint8 [n]
    v,  # uint8 [n]
    m_absmax,  # fp32 [n / 256]
    v_absmax,  # fp32 [n / 256]
    m_table,  # fp32 [256]
    v_table,  # fp32 [256]
    m_buckets,  # int32
    v_buckets,  # int32
    blocks,  # n / 256
    step,  # these in fp32
    lr,
    weight_decay,
    grad_scale,
    b1,
    b2,
    eps,
    M_SHIFT: tl.constexpr,
    M_FIRST: tl.constexpr,
    M_LOWEST: tl.constexpr,
    V_SHIFT: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_LOWEST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # The approximate power, root and quotient of the GPU, as bitsandbytes takes them.
    c2 = tl.sqrt(1 - tl.exp2(step * _log2(b2)))
    size = c2 * lr * -_inverse(1 - tl.exp2(step * _log2(b1)))
    kept = tl.fma(-lr, weight_decay, 1.0)

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    there = block < blocks
    # Four elements a thread and access, bytes too: one layout for all, and none is converted into another.
    i = tl.max_contiguous(block.to(tl.int64) * 256 + tl.arange(0, 256)[None, :], [1, 4])
    raw = tl.load(grad + i, mask=there, other=0.0)
    m_code = tl.load(m + i, mask=there, other=0).to(tl.int32)
    v_code = tl.load(v + i, mask=there, other=0).to(tl.int32)
    old = tl.load(flat + i, mask=there, other=0.0)
    s1 = tl.load(m_table + m_code) * tl.load(m_absmax + block, mask=there, other=0.0)
    s2 = tl.load(v_table + v_code) * tl.load(v_absmax + block, mask=there, other=0.0)

    finite = tl.abs(raw) < float("inf")
    g = raw * grad_scale
    s1 = tl.where(finite, tl.fma(g, 1 - b1, s1 * b1), 0.0)
    s2 = tl.where(finite, tl.fma(g, (1 - b2) * g, s2 * b2), 0.0)
    new = tl.fma(size, s1 * _inverse(tl.fma(c2, eps, tl.sqrt(s2))), old) * kept
    new = tl.where(finite, new, old)
    tl.store(flat + i, new, mask=there)

    m_most = tl.max(tl.abs(s1), axis=1, keep_dims=True)
    v_most = tl.max(s2, axis=1, keep_dims=True)
    tl.store(m_absmax + block, m_most, mask=there)
    tl.store(v_absmax + block, v_most, mask=there)
    # 0 / 0 is nan, of which minimum and maximum take the other: 1 for m, nearly 0 for v.
    x1 = tl.maximum(tl.minimum(tl.abs(s1 * _inverse(m_most)), 1.0), M_LOWEST)
    x2 = tl.minimum(tl.maximum(s2 * _inverse(v_most), V_LOWEST), 1.0)
    # +0 is code 127 of m; 127 codes are below it and 128 above.
    up = _nearest(x1, m_buckets, M_SHIFT, M_FIRST)
    down = tl.minimum(tl.maximum(up, 1), 127)
    m_code = 127 + tl.where(s1.to(tl.int32, bitcast=True) < 0, -down, up)
    v_code = _nearest(x2, v_buckets, V_SHIFT, V_FIRST)
    tl.store(m + i, m_code.to(tl.uint8), mask=there)
    tl.store(v + i, v_code.to(tl.uint8), mask=there)


def buckets(table: Tensor, shift: int) -> tuple[Tensor, int, float]:
    """An ascending table -> the entries (int32), the number of the first bucket and the float it starts at."""
    zero = int((table == 0).nonzero())
    middle = (table[zero + 1 :] + table[zero:-1]) * 0.5
    # The float before the middle below an odd code, so that a tie goes up to the even one.
    threshold = middle.view(torch.int32).long() - torch.arange(zero, 255) % 2
    first = (int(threshold[0]) >> shift) - 1
    start = torch.arange(first, (ONE >> shift) + 1) << shift
    end = start + (1 << shift) - 1
    code = torch.searchsorted(threshold, start)
    assert (torch.searchsorted(threshold, end) - code).max() == 1, "two thresholds in one bucket"
    threshold = torch.cat([threshold, end[-1:]])[code].minimum(end)  # at its end: never crossed
    entry = (code << 24) + (1 << 24) - 1 - threshold
    return entry.to(torch.int32), first, float(start[:1].int().view(torch.float32))


@cache
def _tables(device: torch.device) -> dict[str, object]:
    """The tables, and the buckets for them: narrow enough to hold one threshold, and v's table is twice as dense."""
    found = {}
    for name, signed, shift in (("m", True, 17), ("v", False, 16)):
        table = dynamic_map(signed, device)
        entries, first, lowest = buckets(table.cpu(), shift)
        found |= {f"{name}_table": table, f"{name}_buckets": entries.to(device)}
        found |= {f"{name.upper()}_SHIFT": shift, f"{name.upper()}_FIRST": first, f"{name.upper()}_LOWEST": lowest}
    return found


def adamw8bit(
    flat: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    lr: float,
    weight_decay: float,
    grad_scale: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """See reference.adamw8bit."""
    m_absmax, blocks = state["m_absmax"], 2
    numbers = {"step": float(state["step"]), "lr": lr, "weight_decay": weight_decay, "grad_scale": grad_scale}
    _step[(triton.cdiv(len(m_absmax), blocks),)](
        flat, grad, state["m"], state["v"], m_absmax, state["v_absmax"], blocks=len(m_absmax), **numbers, b1=betas[0],
        b2=betas[1], eps=eps, **_tables(flat.device), BLOCKS=blocks, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
