"""Causal attention inside packed examples, by PyTorch's own flash kernels for rows of different lengths.

Examples lie back to back in one row, and `Offsets.starts` says where each begins, so nothing is padded and no mask is
made; eight key heads serve 32 query heads as they are. The flash kernel wants 16 bits, heads of at most 256 and a
multiple of 8, and compute capability 8.0 (Ampere). What it refuses takes PyTorch's other kernels, one run of equally
long examples at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from kernels.reference import Offsets


@lru_cache(maxsize=8)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each example begins, and the end, int32 [n + 1]; all layers of a pass ask for the same."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@cache
def _grouped() -> dict[str, bool]:
    """torch 2.11 takes grouped heads as they are; from 2.12 on it wants to be told."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def flash_takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the flash kernel runs there, in this dtype and with heads of this width."""
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return modern and dtype != torch.float32 and width % 8 == 0 and width <= 256


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Offsets) -> Tensor:
    """See reference.attention."""
    if isinstance(lengths, Offsets):
        starts, longest = lengths
    elif flash_takes(q.device, q.dtype, q.shape[-1]):
        starts, longest = _starts(tuple(lengths), q.device), max(lengths)
    else:
        return _attention_in_runs(q, k, v, lengths)
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **_grouped())


def _attention_in_runs(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same without the flash kernel: [n * length, heads, D] of each run as a batch [n, heads, length, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    out = []
    for parts in zip(runs, *(x.split([length * n for length, n in runs]) for x in (q, k, v)), strict=True):
        (length, n), *qkv = parts
        batch = [x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv]
        out.append(F.scaled_dot_product_attention(*batch, is_causal=True).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)
