"""The trainer's ops by name. Callers never ask which implementation they get.

Each op is defined in `reference.py`, in plain PyTorch that runs on any device (but for 8-bit AdamW, which is
bitsandbytes'). `fused/` has them as Triton kernels, for CUDA GPUs of compute capability 8.0 (Ampere) or more.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import NF4, Gated, LowRank, Normed, Source, mix_keys


def implementation(x: Tensor) -> ModuleType:
    """Where the ops on this tensor, and others on its device, come from."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        return reference
    from kernels import fused  # needs Triton

    return fused


def takes_starts(x: Tensor, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attention`, in this dtype and where x is, takes starts for lengths, so that a CUDA graph can hold it."""
    ops = implementation(x)
    return ops is not reference and ops.flash_takes(x.device, dtype, head_dim)


def _op(name: str) -> Callable:
    """The op of that name; its first argument decides which one."""

    @wraps(getattr(reference, name))
    def op(first: Source, *rest, **named):
        x = first[0] if isinstance(first, tuple) else first  # of a source, its first tensor
        return getattr(implementation(x), name)(first, *rest, **named)

    return op


adamw8bit = _op("adamw8bit")
attention = _op("attention")
input_keys = _op("input_keys")
linear_cross_entropy = _op("linear_cross_entropy")
projections = _op("projections")
rms_norm = _op("rms_norm")
rope = _op("rope")
token_losses = _op("token_losses")

__all__ = [
    "NF4",
    "Gated",
    "LowRank",
    "Normed",
    "Source",
    "adamw8bit",
    "attention",
    "implementation",
    "input_keys",
    "linear_cross_entropy",
    "mix_keys",
    "projections",
    "rms_norm",
    "rope",
    "takes_starts",
    "token_losses",
]
