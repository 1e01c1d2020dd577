"""Frozen weights in NF4: four bits a weight, with double quantisation (Dettmers et al. 2023, QLoRA).

Each block of 64 weights is divided by its largest magnitude (absmax) and every quotient is rounded to the nearest of 16
values, the quantiles of a normal distribution, since trained weights are nearly normal. The absmax numbers are
quantised too, to 8 bits in blocks of 256 after their mean is taken off. That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a
weight.

The codes and both tables are bitsandbytes', so a folder that bitsandbytes wrote loads as it is. Only the quantise and
dequantise functions are called: the matmul is ours. A weight is expanded right before it is multiplied and dropped
right after, on a CPU too: what is kept are the codes.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import kernels

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK = 64


@cache
def bnb() -> ModuleType:
    """bitsandbytes' functions. They take seconds to load, which --help or a mistyped flag should not wait for."""
    # It looks for a package called `kernels` to fetch a matmul that is not used here, and warns that ours is not it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


class NF4Linear(nn.Module):
    """x W^T with W [out, in] kept as NF4 codes: uint8, two weights a byte, and bitsandbytes' state beside them.

    shape: (out, in)
    """

    def __init__(self, codes: Tensor, state: QuantState):
        super().__init__()
        self.codes, self.state, self.shape = codes, state, state.shape
        block, n = state.blocksize, self.shape.numel()
        if self.shape[1] % block:
            # On a CPU bitsandbytes 0.50 expands row by row and begins a block with every row, though quantising does
            # not: where rows do not end with a block, weights come out wrong. So it is shown one row per block, which
            # threads share, or a single row where blocks do not divide the weights.
            state.shape = torch.Size((n // block, block) if n % block == 0 else (1, n))

    @classmethod
    def quantise(cls, weight: Tensor) -> NF4Linear:
        """weight [out, in], 16 or 32 bit, on the device where it stays."""
        codes, state = bnb().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        return cls(codes, state)

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> NF4Linear:
        """From the tensors of one linear in a bnb-4bit folder: `weight`, `weight.absmax`, `weight.quant_map`, ..."""
        codes = parts["weight"]
        rest = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
        return cls(codes, bnb().QuantState.from_dict(rest, device=codes.device))

    @property
    def nf4(self) -> kernels.NF4 | None:
        """The tensors themselves, for kernels that expand them their own way. None if the folder they are from has
        other blocks than 64, or no double quantisation."""
        state, second = self.state, self.state.state2
        if second is None or (state.blocksize, second.blocksize) != (BLOCK, 256):
            return None
        return kernels.NF4(self.codes.view(-1), state.code, state.absmax, second.code, second.absmax, state.offset)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], expanded to `dtype`."""
        # bitsandbytes takes the output's dtype from the state.
        self.state.dtype = dtype
        return bnb().dequantize_4bit(self.codes, self.state).view(self.shape)


def nf4_of(parts: dict[str, Tensor]) -> str | None:
    """Why these tensors of one linear are not NF4 (a few words), or None if they are."""
    kinds = [name.split("__")[-1] for name in parts if "bitsandbytes__" in name]
    if kinds != ["nf4"]:
        return f"quantised as {kinds or 'something unknown'}, not nf4"
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    return None if {"shape", "blocksize"} <= state.keys() else "its quant_state names no shape and block size"
