"""Linear + cross-entropy with the gradient made on the way, so that all logits never exist at once.

For one token with logits z = W h and target c:

    loss = log sum_j exp(z_j) - z_c        dz = softmax(z) - one_hot(c)        dh = W^T dz

The head W is frozen, so dz is used once, for dh, right after it is made: a few rows of logits come out of one GEMM,
become dz where they stand, and go into the next one. For 128,256 words in bf16 a row is a quarter of a megabyte, and
_SCRATCH bounds what stands at a time. The kernel reads a row twice, first for max and sum together, rescaling the sum
whenever the max grows (online softmax, Milakov and Gimelshein 2018), then to turn z into dz; the second time most of
it still lies in the GPU's L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import LinearCrossEntropy

# Bytes of logits at a time: rows enough for GEMMs at full speed, little beside a model.
_SCRATCH = 256 * 2**20
# Logits of a row at a time, over sixteen warps.
BLOCK = 8192


@triton.jit
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
    column = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    top = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        z = tl.load(logits + start + column, mask=start + column < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher))
        top = higher
    log_sum = top + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    if GRADIENT:
        # The target's logit must be read by all before any of them is overwritten.
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            at = start + column
            z = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            dz = tl.exp(z - log_sum) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, dz.to(logits.dtype.element_ty), mask=at < vocabulary)


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, d_hidden: Tensor | None = None) -> Tensor:
    """See reference.token_losses."""
    head = head.to(hidden.dtype)
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    at_a_time = max(1, min(len(targets), _SCRATCH // (head.itemsize * len(head))))
    if at_a_time > 256:
        at_a_time -= at_a_time % 256  # whole tiles of a GEMM
    buffer = hidden.new_empty(at_a_time, len(head))
    block = min(BLOCK, triton.next_power_of_2(len(head)))
    for start in range(0, len(targets), at_a_time):
        rows = slice(start, start + at_a_time)
        logits = torch.mm(hidden[rows], head.t(), out=buffer[: len(targets[rows])])
        launch = {"GRADIENT": d_hidden is not None, "BLOCK": block, "num_warps": max(1, block // 512)}
        _losses[(len(logits),)](logits, targets[rows], losses[rows], len(head), **launch)
        if d_hidden is not None:
            torch.mm(logits, head, out=d_hidden[rows])
    return losses


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """See reference.linear_cross_entropy."""
    return LinearCrossEntropy.apply(hidden, head, targets, token_losses)
