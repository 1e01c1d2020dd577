"""The trainer's ops by name. Callers never ask which implementation they get.

Each op is defined in `reference.py`, in plain PyTorch that runs on any device.
"""

from kernels.reference import (
    LowRank,
    attention,
    linear_cross_entropy,
    mix_keys,
    projections,
    rms_norm,
    rope,
    swiglu,
    token_losses,
)

__all__ = [
    "LowRank",
    "attention",
    "linear_cross_entropy",
    "mix_keys",
    "projections",
    "rms_norm",
    "rope",
    "swiglu",
    "token_losses",
]
