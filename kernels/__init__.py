"""The trainer's ops by name. Callers never ask which implementation they get.

Each op is defined in `reference.py`, in plain PyTorch that runs on any device. `fused/` has most of them as Triton
kernels for CUDA. Those pass the same tests in Triton's interpreter and compile for compute capability 7.5 to 9.0, but
no GPU has run them yet, and until one has, nothing takes them.
"""

from kernels.reference import (
    NF4,
    LowRank,
    add_rms_norm,
    attention,
    expand_nf4,
    linear_cross_entropy,
    mix_keys,
    projections,
    rms_norm,
    rope,
    swiglu,
    token_losses,
)

__all__ = [
    "NF4",
    "LowRank",
    "add_rms_norm",
    "attention",
    "expand_nf4",
    "linear_cross_entropy",
    "mix_keys",
    "projections",
    "rms_norm",
    "rope",
    "swiglu",
    "token_losses",
]
