"""The trainer's ops by name. Callers never ask which implementation they get.

Each op is defined in `reference.py`, in plain PyTorch that runs on any device. `fused/` has them for CUDA: Triton
kernels, and PyTorch's flash attention. The kernels pass the same tests in Triton's interpreter, in fp32 and fp16, and
compile for compute capability 7.5, 8.0 and 9.0; but no GPU has run any of it yet, so they are taken only where the
environment says LORA_KERNELS=fused, on a GPU of capability 8.0 or more.
"""

import os
from collections.abc import Callable
from functools import wraps
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import NF4, LowRank, mix_keys


def implementation(x: Tensor) -> ModuleType:
    """Where the ops on this tensor, and others on its device, come from."""
    # Asked for every op, so a CPU must not go through the environment each time.
    if not x.is_cuda or os.environ.get("LORA_KERNELS") != "fused":
        return reference
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return reference
    from kernels import fused  # needs Triton

    return fused


def _op(name: str) -> Callable:
    """The op of that name; its first argument decides which one."""

    @wraps(getattr(reference, name))
    def op(x: Tensor, *rest, **named):
        return getattr(implementation(x), name)(x, *rest, **named)

    return op


add_rms_norm = _op("add_rms_norm")
attention = _op("attention")
linear_cross_entropy = _op("linear_cross_entropy")
projections = _op("projections")
rms_norm = _op("rms_norm")
rope = _op("rope")
swiglu = _op("swiglu")
token_losses = _op("token_losses")

__all__ = [
    "NF4",
    "LowRank",
    "add_rms_norm",
    "attention",
    "implementation",
    "linear_cross_entropy",
    "mix_keys",
    "projections",
    "rms_norm",
    "rope",
    "swiglu",
    "token_losses",
]
