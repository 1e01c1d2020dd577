"""The trainer's ops by name. Callers never ask which implementation they get.

Each op is defined in `reference.py`, in plain PyTorch that runs on any device. `fused/` has them for CUDA: Triton
kernels, and PyTorch's flash attention. The kernels pass the same tests in fp32 in Triton's interpreter and compile in
16 bits for compute capability 7.5, 8.0 and 9.0; no GPU has run any of it yet, so nothing takes it.
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
