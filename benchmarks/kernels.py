"""The fused ops on a GPU against their floors, the reference and other people's kernels.

    python benchmarks/kernels.py                     8,192 tokens in the shapes of Llama-3.2-1B
    python benchmarks/kernels.py --device cpu --tokens 8         a dry run in Triton's interpreter, of small shapes

A floor is the yardstick: the bytes that an op must read and write, at the speed of a copy of as many bytes; or its
matmuls alone, one by one, by the same GEMM library. Both are measured here, in the same run. The GPU's L2 is flushed
before each repeat, and a time is the median of the repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if any("cpu" in argument for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.throughput import SHAPES, VOCABULARY, Shape
from kernels import fused, reference
from kernels.fused.rms_norm import normalise, normalise_backward
from kernels.fused.swiglu import swiglu, swiglu_backward
from kernels.reference import Gated, LowRank, Normed
from lora.quant import NF4Linear

Work = Callable[[], object]


class Clock:
    """Times work on a device, each time with nothing of it left in the L2."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.repeats = 20 if self.cuda else 2
        self.flush = torch.empty(256 * 2**20 if self.cuda else 1, dtype=torch.uint8, device=device)

    def ms(self, work: Work) -> float:
        for _ in range(3 if self.cuda else 1):
            work()
        times = []
        for _ in range(self.repeats):
            self.flush.sum()
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(15_000_000)  # eight milliseconds, in which Python can launch everything
                start.record()
                work()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                work()
                times.append(1000 * (time.perf_counter() - begun))
        return statistics.median(times)

    def copy_ms(self, moved: int) -> float:
        """Of the faster of two copies that read and write this many bytes together."""
        source = torch.zeros(moved // 4, dtype=torch.int16, device=self.flush.device)
        target = torch.empty_like(source)
        return min(self.ms(lambda: target.copy_(source)), self.ms(lambda: torch.add(source, 0, out=target)))


class Row(NamedTuple):
    """One line of the table; floor: its milliseconds, by that clock; apart: what ours does besides, to be taken off."""

    name: str
    ours: Work
    floor: Callable[[Clock], float]
    peers: dict[str, Work]
    apart: Work | None = None


def copying(moved: int) -> Callable[[Clock], float]:
    """The floor of an op that reads and writes so many bytes together."""
    return lambda clock: clock.copy_ms(moved)


def passes_of(op: Callable, *inputs: Tensor) -> tuple[Work, Work]:
    """op forward; and its backward alone, on outputs that stay."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    upstream = [torch.randn_like(y) for y in outputs]
    return lambda: op(*inputs), lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16, but for Triton's interpreter, whose bf16 is wrong."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def elementwise(shape: Shape, tokens: int, device: torch.device) -> Iterator[Row]:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype_on(device))

    n, mlp, heads, kv, d = shape.hidden, shape.mlp, shape.heads, shape.kv_heads, shape.head_dim
    x, dy, dt, y, weight = draw(tokens, n), draw(tokens, n), draw(tokens, n), draw(tokens, n), draw(n)
    gate, up, wide = (draw(tokens, mlp) for _ in range(3))
    angles = torch.randn(tokens, d // 2, device=device)
    q, k = draw(tokens, heads, d), draw(tokens, kv, d)
    norm = passes_of(lambda x: reference.rms_norm(x, weight, 1e-5), x)
    gated = passes_of(reference.SwiGLU.apply, gate, up)
    ours, turned = (passes_of(lambda q, k, ops=ops: ops.rope(q, k, angles, angles), q, k) for ops in (fused, reference))
    turn = 2 * (q.nbytes + k.nbytes + angles.nbytes)
    # Backward as a linear's input has it: with the stream's gradient, and the output made again.
    work = (
        ("RMSNorm, forward", lambda: normalise(x, weight, 1e-5, y), 2 * x.nbytes, norm[0]),
        ("RMSNorm, backward", lambda: normalise_backward(x, weight, 1e-5, dy, dt, True), 5 * x.nbytes, norm[1]),
        ("SwiGLU, forward", lambda: swiglu(gate, up), 3 * gate.nbytes, gated[0]),
        ("SwiGLU, backward", lambda: swiglu_backward(gate, up, wide, True), 6 * gate.nbytes, gated[1]),
        ("RoPE, forward", ours[0], turn, turned[0]),
        ("RoPE, backward", ours[1], turn, turned[1]),
    )
    for name, mine, moved, theirs in work:
        yield Row(name, mine, copying(moved), {"reference": theirs})


def nf4(shape: Shape, device: torch.device) -> Iterator[Row]:
    """The expansion, alone and beside room for an update."""
    dtype = dtype_on(device)
    for out, into in ((shape.hidden, shape.hidden), (shape.mlp, shape.hidden)):
        linear = NF4Linear.quantise(torch.randn(out, into, device=device))
        weight, codes = linear.nf4, out * into // 2 + out * into // 64
        for beside in (0, 128):
            room = torch.empty(out, into + beside, device=device, dtype=dtype)[:, beside:]
            yield Row(
                f"NF4 {into} -> {out}, rows {into + beside} apart",
                lambda weight=weight, room=room: fused.expand_nf4(weight, room),
                copying(codes + out * into * dtype.itemsize),
                {"bitsandbytes": lambda linear=linear: linear.dense(dtype)},
            )


def loss(shape: Shape, vocabulary: int, tokens: int, device: torch.device) -> Iterator[Row]:
    dtype = dtype_on(device)
    hidden = torch.randn(tokens, shape.hidden, device=device, dtype=dtype).requires_grad_()
    head = 0.02 * torch.randn(vocabulary, shape.hidden, device=device, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    rows = min(tokens, 1024)
    logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)

    def matmuls() -> None:
        for start in range(0, tokens, rows):
            some = hidden.detach()[start : start + rows]
            torch.mm(some, head.t(), out=logits[: len(some)])
            logits[: len(some)] @ head

    def theirs() -> None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        Liger.apply(hidden, head, targets)

    yield Row(
        "linear + cross-entropy, loss and gradient",
        lambda: fused.linear_cross_entropy(hidden, head, targets),
        lambda clock: clock.ms(matmuls),
        {"reference": lambda: reference.linear_cross_entropy(hidden, head, targets), "Liger": theirs},
    )


def layer(shape: Shape, tokens: int, p: float, device: torch.device) -> Row:
    """The seven LoRA linears as a block calls them, forward and backward, NF4 included: after a norm, a gate or
    attention, and with the residual. The norms and the gate have rows of their own, so here they are taken off."""
    dtype = dtype_on(device)
    rank = 128 if device.type == "cuda" else 8
    keys = torch.arange(tokens, dtype=torch.int32, device=device)
    q, k, v, o, *gate_and_up, down = shape.linears
    n, weight = shape.hidden, torch.ones(shape.hidden, device=device, dtype=dtype)

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()

    sources = (
        Normed(draw(n), weight, 1e-5),
        draw(o[1]),
        Normed(draw(n), weight, 1e-5),
        Gated(draw(shape.mlp), draw(shape.mlp)),
    )
    groups, all_as = [], []
    for source, sizes in zip(sources, ([q, k, v], [o], gate_and_up, [down]), strict=True):
        frozen = [NF4Linear.quantise(0.02 * torch.randn(size, device=device)) for size in sizes]
        # As in an adapter, the A of linears that read the same input are one matrix.
        all_a = torch.randn(len(sizes) * rank, sizes[0][1], device=device)
        all_as.append(all_a.to(dtype))
        matrices = [x.split(rank) for x in (all_a, all_as[-1], torch.zeros_like(all_a))]
        updates = []
        for (out, _), a, a_shadow, a_grad in zip(sizes, *matrices, strict=True):
            a, b = a.requires_grad_(), torch.randn(out, rank, device=device).requires_grad_()
            a.grad, b.grad = a_grad, torch.zeros_like(b)
            updates.append(LowRank(a, b, a_shadow, b.detach().to(dtype)))
        widths = [out for out, _ in sizes]
        upstream = [draw(out).detach() for out in widths]
        if len(sizes) == 3:  # attention leaves those of q, k and v side by side
            upstream = [*torch.cat(upstream, dim=1).split(widths, dim=1)]
        if isinstance(source, Normed):
            upstream.insert(0, draw(n).detach())
        residual = draw(n) if len(sizes) == 1 else None
        inputs = (source, residual) if isinstance(source, Tensor) else (*source, residual)
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        groups.append((source, frozen, updates, residual, leaves, upstream))

    def run(ops) -> None:
        for source, frozen, updates, residual, leaves, upstream in groups:
            if isinstance(source, Gated):  # which are given away
                source = Gated(*(x.clone() for x in source))
            outputs = ops.projections(source, frozen, updates, 2.0, p, keys, residual)
            torch.autograd.grad(outputs, leaves, upstream)

    dense = [[linear.dense(dtype) for linear in group[1]] for group in groups]
    xs = [draw(weights[0].shape[1]).detach() for weights in dense]

    def base() -> None:
        for x, weights, group in zip(xs, dense, groups, strict=True):
            for weight, dy in zip(weights, group[-1][-len(weights) :], strict=True):
                x @ weight.t()
                dy @ weight

    def skinny() -> None:
        for x, (_, _, updates, _, _, upstream), a in zip(xs, groups, all_as, strict=True):
            u = x @ a.t()
            reference.wide_product(u.t(), x)
            for dy, update, u_i in zip(upstream[-len(updates) :], updates, u.split(rank, dim=1), strict=True):
                dy @ update.b_shadow
                reference.wide_product(dy.t(), u_i)

    x, dy, dt, y = (draw(n).detach() for _ in range(4))
    gate, up, wide = (draw(shape.mlp).detach() for _ in range(3))

    def apart() -> None:
        for _ in range(2):
            normalise(x, weight, 1e-5, y)
            normalise_backward(x, weight, 1e-5, dy, dt, again=False)
        gated = gate.clone(), up.clone()
        swiglu(*gated)
        swiglu_backward(*gated, wide, again=False)

    # What must be done with A and B: u = x A^T, v = dy B, dA and dB read wide tensors and write skinny ones, so they
    # are timed as they are. u B^T and v A would write wide ones, which the base writes anyway: they count at the base's
    # rate.
    low = rank * sum(out + into for out, into in shape.linears)
    ridden = low / (2 * sum(out * into for out, into in shape.linears))
    name = f"the LoRA linears of a block, dropout {p}, forward + backward"
    floor = lambda clock: (1 + ridden) * clock.ms(base) + clock.ms(skinny)  # noqa: E731
    return Row(name, lambda: run(fused), floor, {"reference, with norms and gate": lambda: run(reference)}, apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    device, tokens = torch.device(arguments.device), arguments.tokens
    shape, vocabulary = (SHAPES["1b"], VOCABULARY) if device.type == "cuda" else (SHAPES["tiny"], 1000)
    clock = Clock(device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted"
    print(f"{card}, torch {torch.__version__}")
    print("| op | ours ms | floor ms | floor / ours | peak MB | peers ms |\n|---|---|---|---|---|---|")

    def rows() -> Iterator[Row]:
        yield from elementwise(shape, tokens, device)
        yield from nf4(shape, device)
        yield from loss(shape, vocabulary, tokens, device)
        for p in (0.0, 0.05):
            yield layer(shape, tokens, p, device)

    for row in rows():
        apart = clock.ms(row.apart) if row.apart else 0.0
        ours = clock.ms(row.ours) - apart
        floor = row.floor(clock)
        peak = "-"
        if clock.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            row.ours()
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f}"
        peers = []
        for name, work in row.peers.items():
            try:
                peers.append(f"{name} {clock.ms(work):.3f}")
            except ImportError:
                peers.append(f"{name} is not installed")
        print(
            f"| {row.name} | {ours:.3f} | {floor:.3f} | {floor / ours:.2f} | {peak} | {', '.join(peers)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
