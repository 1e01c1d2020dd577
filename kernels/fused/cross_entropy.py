"""Linear + cross-entropy with the gradient made on the way, so that all logits never exist at once.

For one token with logits z = W h and target c:

    loss = log sum_j exp(z_j) - z_c        dz = softmax(z) - one_hot(c)        dh = W^T dz

The head W is frozen, so dz is used once, for dh, right after it is made: a few rows of logits come out of one GEMM,
become dz where they stand, and go into the next one. For 128,256 words in bf16 a row is a quarter of a megabyte, and
_SCRATCH bounds what stands at a time. The kernel reads a row twice, first for max and sum together, rescaling the sum
whenever the max grows (online softmax, Milakov and Gimelshein 2018), then to turn z into dz; the second time most of
it still lies in the GPU's L2. Every eight columns of a block keep a max and a sum of their own, inside one thread, and
these meet at the end: no reduction over all warps in every block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import LinearCrossEntropy

# Bytes of logits at a time: rows enough for GEMMs at full speed, little beside a model.
_SCRATCH = 256 * 2**20
# Rows at a time are a multiple of this: whole tiles of a GEMM.
_GRAIN = 256
# Logits of a row at a time.
BLOCK = 16384


@triton.jit(do_not_specialize=["targets", "losses"])  # else there is another kernel for places that 16 bytes divide
def _losses(
    logits,  # [rows, vocabulary], with GRADIENT overwritten by softmax - one_hot
    targets,  # int64 [rows]
    losses,  # fp32 [rows]
    vocabulary,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]  # eight neighbours a thread
    target = tl.load(targets + row)
    top = tl.full((BLOCK // 8,), -3e38, tl.float32)  # finite: -inf - -inf, where there are no logits, would be NaN
    total = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + column
        z = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    highest = tl.max(top)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest)))
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    if GRADIENT:
        # The target's logit must be read by all before any of them is overwritten.
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            at = start + column
            z = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            dz = tl.exp(z - log_sum) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, dz.to(logits.dtype.element_ty), mask=at < vocabulary)


def _windows(rows: int, most: int) -> Iterator[slice]:
    """Pieces of `rows` rows, `most` each. The last is as long as its rows need, rounded up to _GRAIN, and reaches back
    for what it lacks; what it makes again is the same but for the last bits. For the number of rows differs from pack
    to pack, and the first GEMM of a shape waits milliseconds for its kernel to be loaded. Fewer than `most` rows are
    one piece, of whatever length."""
    for start in range(0, rows - most + 1, most):
        yield slice(start, start + most)
    if rest := rows % most:
        yield slice(max(0, rows - triton.cdiv(rest, _GRAIN) * _GRAIN), rows)


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, d_hidden: Tensor | None = None) -> Tensor:
    """See reference.token_losses."""
    head = head.to(hidden.dtype)
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    at_a_time = max(_GRAIN, _SCRATCH // (head.itemsize * len(head)) // _GRAIN * _GRAIN)
    buffer = hidden.new_empty(min(at_a_time, len(targets)), len(head))
    block = min(BLOCK, max(8, triton.next_power_of_2(len(head))))
    for rows in _windows(len(targets), at_a_time):
        logits = torch.mm(hidden[rows], head.t(), out=buffer[: rows.stop - rows.start])
        launch = {"GRADIENT": d_hidden is not None, "BLOCK": block, "num_warps": max(1, block // 512)}
        _losses[(len(logits),)](logits, targets[rows], losses[rows], len(head), **launch)
        if d_hidden is not None:
            torch.mm(logits, head, out=d_hidden[rows])
    return losses


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """See reference.linear_cross_entropy."""
    return LinearCrossEntropy.apply(hidden, head, targets, token_losses)
