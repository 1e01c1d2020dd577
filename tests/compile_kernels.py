"""Compiles the kernels of the fused ops for GPUs that are not here, and prints what each needs.

    python tests/compile_kernels.py

Triton's interpreter runs a kernel as Python would and lets pass what its compiler refuses; the compiler needs no GPU.
So every launch is caught, and its kernel compiled to machine code for the types and constants it was launched with. A
kernel that spills registers is an error, too. (Nothing is computed: outputs stay as they were.)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import fused
from kernels.reference import Gated, LowRank, Normed
from lora.optim import BETAS, EPS, AdamW8bit
from lora.quant import NF4Linear

attention = sys.modules["kernels.fused.attention"]  # in `fused` the name is the op's

# With the bytes of shared memory that a block may take there (8.9 stands for 8.6 and 12.0, too).
CAPABILITIES = {80: 166_912, 89: 101_376, 90: 232_448}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
done: set[str] = set()


def source_of(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The kernel for these arguments, specialised as a launch would: numbers that 16 divides are known to be."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(kernel: JITFunction, *values, **named) -> None:
    options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
    source = source_of(kernel, dict(zip(kernel.arg_names, values, strict=False)) | named)
    for capability, most in CAPABILITIES.items():
        if kernel.__module__ == attention.__name__ and (capability == 90) != (tables is attention._HOPPER):
            continue
        what = f"{kernel.__module__}.{kernel.__name__} sm_{capability} {source.signature} {source.constants} {options}"
        if what in done:
            continue
        done.add(what)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            listing = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
        registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", listing)[-1]
        name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
        print(f"{name:28} sm_{capability}  {registers:>3} registers, {compiled.metadata.shared:>6} bytes shared")
        # 16 bytes are four registers, to and fro: nothing.
        if int(stack) > 16 or compiled.metadata.shared > most:
            sys.exit(f"{what}: {stack} bytes of registers are spilled, {compiled.metadata.shared} bytes shared")


def launch_all(dtype: torch.dtype) -> None:
    """Each op that has a kernel of ours, forward and backward; rows as wide as Llama-3.2-1B's, and few of them."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    if dtype != torch.float32:
        for width, kv_heads in ((64, 8), (64, 32), (128, 8)):
            q, k = leaf(4, 32, width), leaf(4, kv_heads, width)
            attention.Attention.apply(q, k, k, torch.tensor([0, 4], dtype=torch.int32)).sum().backward()
    else:
        flat = torch.zeros(512)
        fused.adamw8bit(flat, flat, AdamW8bit(flat, flat, 0.0).state, 1e-3, 0.0, 1.0, BETAS, EPS)
    weight, angles = leaf(2048).detach(), torch.zeros(4, 32)
    fused.rms_norm(leaf(4, 2048), weight, 1e-5).sum().backward()
    sum(y.sum() for y in fused.rope(leaf(4, 32, 64), leaf(4, 8, 64), angles, angles)).backward()
    fused.input_keys(torch.zeros(4, dtype=torch.int32), 8)
    targets = torch.zeros(4, dtype=torch.int64)
    fused.linear_cross_entropy(leaf(4, 64), leaf(128256, 64).detach(), targets).backward()
    for tokens, rank in ((1, 16), (40, 4), (100, 128)):
        for p, (n_out, n_in) in ((0.05, (512, 2048)), (0.0, (512, 2048)), (0.0, (2048, 512))):
            a, b = torch.zeros(rank, n_in, requires_grad=True), torch.zeros(n_out, rank, requires_grad=True)
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
            update = LowRank(a, b, a.detach().to(dtype), b.detach().to(dtype))
            frozen, keys = NF4Linear.quantise(torch.ones(n_out, n_in)), torch.zeros(tokens, dtype=torch.int32)
            x, up = leaf(tokens, n_in), leaf(tokens, n_in)
            for source in (x, Normed(x, torch.zeros(n_in, dtype=dtype), 1e-5), Gated(x, up)):
                sum(y.sum() for y in fused.projections(source, [frozen], [update], 1.0, p, keys)).backward()


if __name__ == "__main__":
    JITFunction.__getitem__ = lambda kernel, grid: lambda *values, **named: compile_launch(kernel, *values, **named)
    for tables in (attention._HOPPER, attention._OTHERS):
        attention._launches = lambda device, tables=tables: tables
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            launch_all(dtype)
