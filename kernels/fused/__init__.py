"""The ops of reference.py for CUDA GPUs, as Triton kernels: the same names and signatures."""

from kernels.fused.adamw8bit import adamw8bit
from kernels.fused.attention import attention, flash_takes
from kernels.fused.cross_entropy import linear_cross_entropy, token_losses
from kernels.fused.dropout import input_keys
from kernels.fused.lora_linear import projections
from kernels.fused.nf4 import expand_nf4
from kernels.fused.rms_norm import rms_norm
from kernels.fused.rope import rope

__all__ = [
    "adamw8bit",
    "attention",
    "expand_nf4",
    "flash_takes",
    "input_keys",
    "linear_cross_entropy",
    "projections",
    "rms_norm",
    "rope",
    "token_losses",
]
