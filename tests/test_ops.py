"""The ops of kernels/: outputs and every gradient against plain autograd in float64, on odd shapes.

One definition for every implementation: the reference, and the fused kernels where a GPU is or, in fp32 and fp16, in
Triton's interpreter (its bf16 is wrong). What an op leaves unwritten is NaN (`poison`).
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from tiny import assert_close
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.reference import Gated, LowRank, Normed
from lora.model import Linear
from lora.quant import NF4Linear

if sys.platform == "linux":  # where Triton is
    from kernels import fused
    from kernels.fused import cross_entropy

    IMPLEMENTATIONS = (reference, fused)
else:
    fused, IMPLEMENTATIONS = None, (reference,)

LENGTHS = (1, 7, 7, 28, 30, 25)


class Case(NamedTuple):
    """An implementation, where it runs, and what it computes in."""

    ops: ModuleType
    device: str
    dtype: torch.dtype
    tolerance: float


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]


def cases() -> Iterator:
    for ops in IMPLEMENTATIONS:
        for device in ("cpu", "cuda"):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
                interpreted = ops is fused and device == "cpu"
                if interpreted and (torch.cuda.is_available() or dtype == torch.bfloat16):
                    continue
                name = f"{ops.__name__.split('.')[-1]}-{'interpreter' if interpreted else device}-{dtype}"
                case = Case(ops, device, dtype, tolerance)
                yield pytest.param(case, id=name.replace("torch.", ""), marks=CUDA if device == "cuda" else [])


@pytest.fixture(params=cases())
def case(request) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """PyTorch fills new memory with NaN while it is deterministic: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """More than one program, and more than one block, for the short rows of these tests."""
    if fused:
        for name in ("cross_entropy", "dropout", "swiglu"):
            monkeypatch.setattr(sys.modules[f"kernels.fused.{name}"], "BLOCK", 16)


@pytest.fixture
def draw(case) -> Callable:
    """draw(*shape): normal numbers on the case's device and in its dtype, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=case.dtype: torch.randn(shape, generator=generator).to(case.device, dtype)


def compare(op: Callable, plain: Callable, tolerance: float, **inputs: Tensor) -> None:
    """Outputs and gradients of op(**inputs) against plain(**inputs in float64), for random gradients of the outputs."""
    ours = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    theirs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    got, want = op(**ours), plain(**theirs)
    if isinstance(got, Tensor):
        got, want = [got], [want]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in got]
    torch.autograd.backward(got, [dy.clone() for dy in upstream])  # which may be overwritten
    torch.autograd.backward(want, [dy.double() for dy in upstream])
    for i, (y, wanted) in enumerate(zip(got, want, strict=True)):
        assert_close(f"output {i}", y, wanted, tolerance)
    for name in inputs:
        assert_close(f"the gradient of {name}", ours[name].grad, theirs[name].grad, tolerance)


# --- elementwise and rows ---


@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (3, 576)], ids=str)
def test_rms_norm(case, draw, shape):
    weight = draw(shape[1])

    def plain(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()

    compare(lambda x: case.ops.rms_norm(x, weight, 1e-2), plain, case.tolerance, x=draw(*shape))


def test_rope(case, draw):
    t, d = 5, 14
    angles = draw(t, d // 2, dtype=torch.float32) * 100
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        """Each plane as one complex number: rotation is multiplication by cos + i sin."""
        planes = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        planes = planes * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat([planes.real, planes.imag], -1)

    inputs = {"q": draw(t, 6, d), "k": draw(t, 2, d)}
    compare(lambda q, k: case.ops.rope(q, k, cos, sin), lambda q, k: (turn(q), turn(k)), case.tolerance, **inputs)

    q, k, _ = draw(t, 10, d).split([6, 2, 2], dim=1)  # as the projections leave them
    wanted = turn(q.double()), turn(k.double())
    for x, exact in zip(case.ops.rope(q, k, cos, sin), wanted, strict=True):
        assert_close("q or k of tokens that lie apart", x, exact, case.tolerance)


# --- dropout ---


def test_input_keys(case):
    """The same numbers everywhere, so that a run may move from one machine to another."""
    tokens = torch.arange(-9, 20, dtype=torch.int32, device=case.device) * 98765432
    found = case.ops.input_keys(tokens, 7)
    assert torch.equal(found, reference.input_keys(tokens, 7))
    assert torch.equal(found[3], reference.mix_keys(tokens, 3)) and len(found.unique()) == found.numel()


# --- attention ---


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Causal softmax attention inside each example, keys and values copied to every query head."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = []
    for qs, ks, vs in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", qs, ks) / q.shape[-1] ** 0.5
        future = torch.ones(len(qs), len(qs), dtype=torch.bool, device=q.device).triu(1)
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), vs))
    return torch.cat(out)


def packed_qkv(case, draw, heads=6, kv_heads=2, d=24) -> dict[str, Tensor]:
    return {name: draw(sum(LENGTHS), h, d) for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))}


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids="{0[0]}q{0[1]}kv".format)
def test_attention(case, draw, heads):
    compare(
        lambda q, k, v: case.ops.attention(q, k, v, LENGTHS),
        plain_attention,
        case.tolerance,
        **packed_qkv(case, draw, *heads),
    )


@pytest.mark.parametrize(("heads", "width"), [((8, 2), 64), ((4, 1), 128)], ids=str)
def test_attention_by_starts(case, draw, heads, width):
    """Lengths on the device, as a graph has them: some examples span several tiles, some places are empty."""
    if case.ops is reference or not fused.flash_takes(torch.device(case.device), case.dtype, width):
        pytest.skip("takes lengths on the host")
    lengths = (1, 130, 0, 7, 65, 0, 0)
    starts = torch.tensor([0, *lengths], device=case.device).cumsum(0).int()
    inputs = {name: draw(sum(lengths), n, width) for name, n in (("q", heads[0]), ("k", heads[1]), ("v", heads[1]))}

    def plain(q, k, v):
        return plain_attention(q, k, v, [length for length in lengths if length])

    compare(lambda q, k, v: case.ops.attention(q, k, v, starts), plain, case.tolerance, **inputs)


@pytest.mark.parametrize(("tile", "kept"), [(8, 256), (8, 0), (64, 0), (1, 0)])
def test_tiles_of_the_reference(case, draw, tile, kept, monkeypatch):
    """Any height of tiles, and probabilities kept or made again."""
    if case.ops is not reference:
        pytest.skip("the flash kernel has its own")
    monkeypatch.setattr(reference, "_TILE", tile)
    monkeypatch.setattr(reference, "_KEPT", kept)
    inputs = packed_qkv(case, draw)
    compare(lambda q, k, v: reference.attention(q, k, v, LENGTHS), plain_attention, case.tolerance, **inputs)


@pytest.mark.parametrize("example", range(len(LENGTHS)))
def test_attention_isolates_examples(case, draw, example):
    """With one example replaced, outputs and gradients of all others stay the same to the bit."""
    first = packed_qkv(case, draw)
    begin = sum(LENGTHS[:example])
    rows = slice(begin, begin + LENGTHS[example])
    second = {name: x.clone() for name, x in first.items()}
    for name, x in packed_qkv(case, draw).items():
        second[name][rows] = x[rows]
    upstream = draw(*first["q"].shape)
    results = []
    for inputs in (first, second):
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        out = case.ops.attention(**leaves, lengths=LENGTHS)
        out.backward(upstream)
        results.append({"output": out.detach(), **{f"gradient of {name}": x.grad for name, x in leaves.items()}})
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[rows] = False
    for name, before in results[0].items():
        assert torch.equal(before[others], results[1][name][others]), f"a neighbour changes the {name}"


def test_attention_is_causal(case, draw):
    """A token that changes leaves every earlier output the same to the bit, and changes its own."""
    inputs = packed_qkv(case, draw)
    before = case.ops.attention(**inputs, lengths=LENGTHS)
    begin, end = sum(LENGTHS[:3]), sum(LENGTHS[:4])
    for at in (begin, begin + 11, end - 1):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[at] += 1
        after = case.ops.attention(**changed, lengths=LENGTHS)
        assert torch.equal(before[:at], after[:at]), f"token {at} is seen before it comes"
        assert (before[at:end] != after[at:end]).flatten(1).any(1).all(), f"token {at} is not seen where it should be"


# --- projections ---

# in, and the out of each linear: all narrower than their input, two wider, one alone, like down_proj, or all wider
WIDTHS = {
    "narrow": (122, (40, 64, 9)),
    "wide": (26, (40, 64, 9)),
    "down": (122, (40,)),
    "up": (26, (40,)),
    "wider": (6, (40, 64, 9)),
}
RANKS = (8, 3, 16)
SCALE = 1.7


def frozen_linears(draw, n_in: int, outs: tuple[int, ...], kind: str = "plain") -> list:
    weights = [draw(out, n_in) / n_in**0.5 for out in outs]
    if kind == "nf4":
        return [NF4Linear.quantise(weight) for weight in weights]
    linears = [Linear(n_in, out) for out in outs]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight
    return linears


def low_ranks(draw, n_in: int, outs: tuple[int, ...], held: tuple[bool, ...]) -> dict[str, Tensor]:
    """fp32 leaves a0, b0, a1, ... that the case's dtype holds exactly, so that their shadows are the same numbers."""
    leaves = {}
    for i, (out, rank) in enumerate(zip(outs, RANKS, strict=False)):
        if held[i]:
            leaves[f"a{i}"] = (draw(rank, n_in) / n_in**0.5).float()
            leaves[f"b{i}"] = (draw(out, rank) / rank**0.5).float()
    return leaves


def updates_of(leaves: dict[str, Tensor], linears: int, dtype: torch.dtype) -> list[LowRank | None]:
    def update(a, b):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        return LowRank(a, b, a.detach().to(dtype), b.detach().to(dtype))

    return [update(leaves[f"a{i}"], leaves[f"b{i}"]) if f"a{i}" in leaves else None for i in range(linears)]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids="dropout{}".format)
@pytest.mark.parametrize("tokens", [5, 20], ids="tokens{}".format)
@pytest.mark.parametrize(
    ("width", "held"),
    [
        ("narrow", (True, True, True)),
        ("narrow", (False, True, False)),
        ("narrow", (False, False, False)),
        ("wide", (True, True, True)),
        ("wider", (True, True, True)),
        ("wide", (False, True, True)),
        ("down", (True,)),
        ("up", (True,)),
    ],
    ids=str,
)
def test_projections(case, draw, width, held, tokens, p, kind):
    n_in, outs = WIDTHS[width]
    frozen = frozen_linears(draw, n_in, outs, kind)
    keys = reference.mix_keys(torch.arange(tokens, dtype=torch.int32, device=case.device), 3)
    kept = reference.dropout_mask(keys, n_in, p).double() / (1 - p)

    def op(x, **leaves):
        return case.ops.projections(x, frozen, updates_of(leaves, len(outs), case.dtype), SCALE, p, keys)

    def plain(x, **leaves):
        ys = [x @ linear.dense(case.dtype).double().t() for linear in frozen]
        for i in range(len(outs)):
            if held[i]:
                ys[i] = ys[i] + SCALE * (x * kept) @ leaves[f"a{i}"].t() @ leaves[f"b{i}"].t()
        return ys

    compare(op, plain, case.tolerance, x=draw(tokens, n_in), **low_ranks(draw, n_in, outs, held))


@pytest.mark.parametrize("p", [0.0, 0.3], ids="dropout{}".format)
@pytest.mark.parametrize("kind", ["normed", "gated"])
@pytest.mark.parametrize(
    ("width", "held"),
    [
        ("narrow", (True, True, True)),
        ("narrow", (False, False, False)),
        ("wide", (True, True, True)),
        ("wider", (False, True, True)),
        ("down", (True,)),
        ("up", (True,)),
        ("up", (False,)),
    ],
    ids=str,
)
def test_projections_of_what_is_made_on_the_way(case, draw, width, held, kind, p):
    """A norm, whose stream goes on beside its outputs, or a gate before the linears; and the residual after one."""
    n_in, outs = WIDTHS[width]
    tokens, frozen, weight = 20, frozen_linears(draw, n_in, outs, "nf4"), draw(n_in)
    keys = reference.mix_keys(torch.arange(tokens, dtype=torch.int32, device=case.device), 3)
    kept = reference.dropout_mask(keys, n_in, p).double() / (1 - p)
    inputs = {name: draw(tokens, n_in) for name in (("x",) if kind == "normed" else ("x", "up"))}
    if len(outs) == 1:
        inputs["residual"] = draw(tokens, *outs)

    def op(x, up=None, residual=None, **leaves):
        source = Normed(x, weight, 1e-2) if kind == "normed" else Gated(x, up)
        return case.ops.projections(source, frozen, updates_of(leaves, len(outs), case.dtype), SCALE, p, keys, residual)

    def plain(x, up=None, residual=0, **leaves):
        if kind == "normed":
            read = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()
        else:
            read = x / (1 + torch.exp(-x)) * up
        ys = [residual + read @ linear.dense(case.dtype).double().t() for linear in frozen]
        for i in range(len(outs)):
            if held[i]:
                ys[i] = ys[i] + SCALE * (read * kept) @ leaves[f"a{i}"].t() @ leaves[f"b{i}"].t()
        return [x, *ys] if kind == "normed" else ys

    compare(op, plain, case.tolerance, **inputs, **low_ranks(draw, n_in, outs, held))


@pytest.mark.parametrize("p", [0.0, 0.3], ids="dropout{}".format)
def test_projections_of_gradients_side_by_side(case, draw, p):
    """As attention hands them over; in the order of the linears, they may be one product."""
    n_in, outs = WIDTHS["narrow"]
    tokens, frozen = 5, frozen_linears(draw, n_in, outs, "nf4")
    keys = torch.arange(tokens, dtype=torch.int32, device=case.device)
    x, leaves = draw(tokens, n_in), low_ranks(draw, n_in, outs, (True,) * len(outs))
    apart = [draw(tokens, out) for out in outs]
    beside = torch.cat(apart, dim=1).split(outs, dim=1)
    reverse = torch.cat(apart[::-1], dim=1).split(outs[::-1], dim=1)[::-1]
    found = []
    for dys in (apart, beside, reverse):
        mine = {name: leaf.clone().requires_grad_() for name, leaf in {"x": x, **leaves}.items()}
        ys = case.ops.projections(mine["x"], frozen, updates_of(mine, len(outs), case.dtype), SCALE, p, keys)
        torch.autograd.backward(ys, [*dys])
        found.append({name: leaf.grad for name, leaf in mine.items()})
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            assert_close(f"the gradient of {name}", gradient, found[0][name].double(), case.tolerance)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("width", WIDTHS)
def test_projections_add_to_the_gradient(case, draw, width, kind):
    """A second backward pass adds to what the first one left, bit for bit; and so does a third, whose gradient is one
    number for all, as that of a sum is (that may be another GEMM, with other last bits)."""
    n_in, outs = WIDTHS[width]
    leaves = low_ranks(draw, n_in, outs, (True,) * len(outs))
    updates = updates_of({name: leaf.requires_grad_() for name, leaf in leaves.items()}, len(outs), case.dtype)
    frozen, x = frozen_linears(draw, n_in, outs, kind), draw(20, n_in).requires_grad_()
    leaves["x"], gradients = x, []
    for like in (torch.ones_like, torch.ones_like, lambda y: y.new_ones(()).expand_as(y)):
        ys = case.ops.projections(x, frozen, updates, SCALE)
        torch.autograd.backward(ys, [like(y) for y in ys])
        gradients.append({name: leaf.grad.clone() for name, leaf in leaves.items()})
    for name, once in gradients[0].items():
        assert torch.equal(gradients[1][name], 2 * once), f"the gradient of {name}"
        assert_close(f"the third gradient of {name}", gradients[2][name], 3 * once.double(), case.tolerance)


@pytest.mark.parametrize("width", WIDTHS)
def test_projections_of_an_input_without_gradient(case, draw, width):
    """The first layer's case: the updates learn as ever, and no weight is expanded a second time for it."""
    n_in, outs = WIDTHS[width]
    x, leaves = draw(5, n_in), low_ranks(draw, n_in, outs, (True,) * len(outs))
    frozen = frozen_linears(draw, n_in, outs)
    expanded = []
    for linear in frozen:
        linear.dense = lambda dtype, weight=linear.weight: expanded.append(1) or weight
    gradients = []
    for needs in (True, False):
        mine = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        x.requires_grad_(needs)
        ys = case.ops.projections(x, frozen, updates_of(mine, len(outs), case.dtype), SCALE)
        expanded.clear()
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        gradients.append({name: leaf.grad for name, leaf in mine.items()})
        assert len(expanded) == (len(outs) if needs else 0)
    for name, gradient in gradients[0].items():
        assert_close(f"the gradient of {name}", gradient, gradients[1][name], case.tolerance)


def test_frozen_projections_keep_nothing(case, draw):
    n_in, outs = WIDTHS["narrow"]
    (y, *_) = case.ops.projections(draw(5, n_in).requires_grad_(), frozen_linears(draw, n_in, outs), [None] * 3)
    assert not any(isinstance(saved, Tensor) for saved in y.grad_fn.saved_tensors)


@pytest.mark.parametrize("shape", [(3, 64), (7, 9), (9, 26), (40, 122), (64, 96), (5, 8192)], ids=str)
def test_expand_nf4(case, draw, shape):
    """As bitsandbytes expands it, into rows that lie apart, and nothing beside them."""
    linear = NF4Linear.quantise(draw(*shape))
    room = torch.full((shape[0], shape[1] + 5), 7, dtype=case.dtype, device=case.device)
    case.ops.expand_nf4(linear.nf4, room[:, 2:-3])
    assert torch.equal(room[:, 2:-3], linear.dense(case.dtype))
    assert (room[:, :2] == 7).all() and (room[:, -3:] == 7).all()


# --- loss ---


@pytest.mark.parametrize(("rows", "grain"), [(1, 1), (7, 3), (reference._LOGIT_ROWS, 256)])
def test_linear_cross_entropy(case, draw, rows, grain, monkeypatch):
    head = draw(61, 24)
    monkeypatch.setattr(reference, "_LOGIT_ROWS", rows)
    if fused:
        monkeypatch.setattr(cross_entropy, "_SCRATCH", rows * head[:, 0].nbytes)
        monkeypatch.setattr(cross_entropy, "_GRAIN", grain)
    targets = torch.arange(40, device=case.device) * 7 % 61

    def plain(hidden):
        return F.cross_entropy(hidden @ head.double().t(), targets, reduction="sum")

    hidden = draw(40, 24) / 2
    compare(lambda hidden: case.ops.linear_cross_entropy(hidden, head, targets), plain, case.tolerance, hidden=hidden)

    each = F.cross_entropy(hidden.double() @ head.double().t(), targets, reduction="none")
    assert_close("token_losses", case.ops.token_losses(hidden, head, targets), each, case.tolerance)
    with_gradient = case.ops.token_losses(hidden, head, targets, torch.empty_like(hidden))
    assert_close("token_losses with d_hidden", with_gradient, each, case.tolerance)


def test_loss_of_huge_logits(case, draw):
    """Logits in the thousands neither overflow nor lose the loss of the likely tokens."""
    if case.dtype != torch.float32:
        pytest.skip("fp32 is asked to keep them")
    hidden, head = 100 * draw(9, 24), draw(61, 24)
    targets = torch.arange(9, device=case.device)

    def plain(hidden):
        return F.cross_entropy(hidden @ head.double().t(), targets, reduction="sum")

    compare(lambda hidden: case.ops.linear_cross_entropy(hidden, head, targets), plain, 1e-5, hidden=hidden)


@pytest.mark.skipif(fused is None, reason="Triton is for Linux")
def test_kernels_compile():
    """For compute capability 8.0, 8.9 and 9.0, without spilling a register; no GPU is needed for that."""
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel in (
        "rms_norm._forward",
        "rms_norm._backward",
        "rope._rotate",
        "swiglu._forward",
        "swiglu._backward",
        "cross_entropy._losses",
        "nf4._expand",
        "attention._forward",
        "attention._backward_queries",
        "attention._backward_keys",
        "adamw8bit._step",
        "dropout._copy",
        "dropout._input_keys",
        "low_rank._add",
    ):
        compiled = re.findall(rf"{re.escape(kernel)} +sm_(\d+)", done.stdout)
        assert {*compiled} == {"80", "89", "90"} and len(compiled) >= 3, f"{kernel}: {compiled}"
