"""NF4 weights on a GPU, expanded into a buffer for a GEMM.

Weight number e of a matrix [out, in], counted row by row, is

    w_e = table[code_e] * absmax_{e // 64},     absmax_b = table2[code2_b] * absmax2_{b // 256} + mean

(reference.NF4). Everything is computed in fp32 and rounded once, as bitsandbytes does. Half a byte is read and two are
written (in 16 bits), so writing is what takes the time. The target may be a slice of wider rows, so that B or A of an
adapter can stand beside W and one GEMM does both.

For a few tokens, too: a GEMM that expands the codes as it reads them moves 0.5 bytes a weight where this moves 4.5 and
the GEMM after it 2, but in Triton it took 5 to 10 times as long, in each of the shapes tried (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import NF4


@triton.jit
def _expand(
    codes,  # the six tensors of an NF4: uint8
    table,  # fp32 [16]
    code2,  # uint8
    table2,  # fp32 [256]
    absmax2,  # fp32
    mean,  # fp32 []
    out,  # [n / IN, IN], its rows STRIDE apart
    n,
    STRIDE: tl.constexpr,
    IN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    index = block * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(codes + index, mask=index * 2 < n, other=0).to(tl.int32)
    there = block * 64 < n
    second = tl.load(table2 + tl.load(code2 + block, mask=there, other=0).to(tl.int32))
    absmax = second * tl.load(absmax2 + block // 256, mask=there, other=0.0) + tl.load(mean)
    high, low = tl.load(table + (byte >> 4)) * absmax, tl.load(table + (byte & 15)) * absmax
    weights = tl.interleave(high, low).to(out.dtype.element_ty)
    # IN and STRIDE are constants, so these two divisions are multiplications, and eight weights are seen to be one
    # store.
    element = block * 64 + tl.arange(0, 64)[None, :]
    row, column = element // IN, element % IN
    tl.store(out + row.to(tl.int64) * STRIDE + column, weights, mask=element < n)


def expand_nf4(weight: NF4, out: Tensor) -> Tensor:
    """See reference.expand_nf4."""
    # 16 bytes a thread of 32, and many small programs: the fastest of 12 layouts on an H200.
    n, blocks = out.numel(), 16
    constants = {"STRIDE": out.stride(0), "IN": out.shape[1], "BLOCKS": blocks}
    # Product and sum of absmax are rounded one after the other, as bitsandbytes does: no fused multiply-add.
    _expand[(triton.cdiv(n, 64 * blocks),)](*weight, out, n, **constants, num_warps=1, enable_fp_fusion=False)
    return out
