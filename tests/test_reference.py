"""kernels/reference.py: outputs and every gradient of each op against plain autograd in float64, on odd shapes."""

from collections.abc import Callable

import pytest
import torch
from tiny import assert_close
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.reference import LowRank
from lora.model import Linear
from lora.quant import NF4Linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = (1, 7, 7, 30)

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


@pytest.fixture
def draw(device) -> Callable:
    """draw(*shape, dtype): normal numbers on the device, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype: torch.randn(shape, generator=generator).to(device, dtype)


def compare(op: Callable, plain: Callable, tolerance: float, **inputs: Tensor) -> None:
    """Outputs and gradients of op(**inputs) against plain(**inputs in float64), for random gradients of the outputs."""
    ours = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    theirs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    got, want = op(**ours), plain(**theirs)
    if isinstance(got, Tensor):
        got, want = [got], [want]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in got]
    torch.autograd.backward(got, upstream)
    torch.autograd.backward(want, [dy.double() for dy in upstream])
    for i, (y, wanted) in enumerate(zip(got, want, strict=True)):
        assert_close(f"output {i}", y, wanted, tolerance)
    for name in inputs:
        assert_close(f"the gradient of {name}", ours[name].grad, theirs[name].grad, tolerance)


# --- elementwise and rows ---


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (3, 576)], ids=str)
def test_rms_norm(draw, dtype, shape):
    weight = draw(shape[1], dtype=dtype)

    def plain(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight.double()

    compare(lambda x: reference.rms_norm(x, weight, 1e-2), plain, TOLERANCE[dtype], x=draw(*shape, dtype=dtype))


@dtypes
def test_rope(draw, dtype):
    t, d = 5, 14
    angles = draw(t, d // 2, dtype=torch.float32) * 100
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        """Each plane as one complex number: rotation is multiplication by cos + i sin."""
        planes = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        planes = planes * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat([planes.real, planes.imag], -1)

    inputs = {"q": draw(t, 6, d, dtype=dtype), "k": draw(t, 2, d, dtype=dtype)}
    compare(lambda q, k: reference.rope(q, k, cos, sin), lambda q, k: (turn(q), turn(k)), TOLERANCE[dtype], **inputs)


@dtypes
def test_swiglu(draw, dtype):
    inputs = {name: 4 * draw(5, 123, dtype=dtype) for name in ("gate", "up")}
    compare(reference.swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, TOLERANCE[dtype], **inputs)


# --- attention ---


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention inside each of LENGTHS, keys and values copied to every query head."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = []
    for qs, ks, vs in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", qs, ks) / q.shape[-1] ** 0.5
        future = torch.ones(len(qs), len(qs), dtype=torch.bool, device=q.device).triu(1)
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), vs))
    return torch.cat(out)


def packed_qkv(draw, dtype, heads=6, kv_heads=2, d=10) -> dict[str, Tensor]:
    return {name: draw(sum(LENGTHS), h, d, dtype=dtype) for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))}


@dtypes
@pytest.mark.parametrize("scores", [reference._TILE, 2 * 3 * 7 * 7, 1], ids="scores{}".format)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids="{0[0]}q{0[1]}kv".format)
def test_attention(draw, dtype, scores, heads, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", scores)
    inputs = packed_qkv(draw, dtype, *heads)
    compare(lambda q, k, v: reference.attention(q, k, v, LENGTHS), plain_attention, TOLERANCE[dtype], **inputs)


@dtypes
@pytest.mark.parametrize("example", range(len(LENGTHS)))
def test_attention_isolates_examples(draw, dtype, example):
    """With one example replaced, outputs and gradients of all others stay the same to the bit."""
    first = packed_qkv(draw, dtype)
    begin = sum(LENGTHS[:example])
    rows = slice(begin, begin + LENGTHS[example])
    second = {name: x.clone() for name, x in first.items()}
    for name, x in packed_qkv(draw, dtype).items():
        second[name][rows] = x[rows]
    upstream = draw(*first["q"].shape, dtype=dtype)
    results = []
    for inputs in (first, second):
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        out = reference.attention(**leaves, lengths=LENGTHS)
        out.backward(upstream)
        results.append({"output": out.detach(), **{f"gradient of {name}": x.grad for name, x in leaves.items()}})
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[rows] = False
    for name, before in results[0].items():
        assert torch.equal(before[others], results[1][name][others]), f"a neighbour changes the {name}"


@dtypes
def test_attention_is_causal(draw, dtype):
    """A token that changes leaves every earlier output the same to the bit, and changes its own."""
    inputs = packed_qkv(draw, dtype)
    before = reference.attention(**inputs, lengths=LENGTHS)
    begin, end = sum(LENGTHS[:3]), sum(LENGTHS)
    for at in (begin, begin + 11, end - 1):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[at] += 1
        after = reference.attention(**changed, lengths=LENGTHS)
        assert torch.equal(before[:at], after[:at]), f"token {at} is seen before it comes"
        assert (before[at:] != after[at:]).flatten(1).any(1).all(), f"token {at} is not seen where it should be"


# --- dropout ---

KEYS, CHANNELS = 256, 512


def keys_of(*chain: int, device="cpu") -> Tensor:
    """The keys of tokens 0 to KEYS - 1, after a chain of (seed, step, example, ...)."""
    keys = torch.zeros(KEYS, dtype=torch.int32, device=device)
    for value in chain:
        keys = reference.mix_keys(keys, value)
    return reference.mix_keys(keys, torch.arange(KEYS, dtype=torch.int32, device=device))


def correlation(one: Tensor, other: Tensor) -> float:
    """In standard deviations of what independent masks would have."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].abs() * one.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate(device, p):
    """Of all channels, of each token's and of each channel's: within 5.5 standard deviations of a coin's."""
    mask = reference.dropout_mask(keys_of(1, device=device), CHANNELS, p).double()
    for name, dim in (("all", (0, 1)), ("a token's", 1), ("a channel's", 0)):
        kept = mask.mean(dim)
        bound = 5.5 * (p * (1 - p) / (mask.numel() / kept.numel())) ** 0.5
        worst = (kept - (1 - p)).abs().max().item()
        assert worst < bound, f"{name} rate is off by {worst:.4f}, {bound:.4f} is chance"


def test_dropout_is_independent():
    """Between seeds, steps, examples, layers and inputs; between tokens and between channels near and far."""
    mask = reference.dropout_mask(keys_of(1, 2, 3, 4), CHANNELS, 0.5)
    for chain in [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 3, 68)]:
        other = reference.dropout_mask(keys_of(*chain), CHANNELS, 0.5)
        assert correlation(mask, other) < 5, f"(1, 2, 3, 4) and {chain} draw masks that are alike"
    for shift in (1, 2, 3, 16, 128):
        assert correlation(mask[shift:], mask[:-shift]) < 5, f"tokens {shift} apart draw masks that are alike"
        assert correlation(mask[:, shift:], mask[:, :-shift]) < 5, f"channels {shift} apart are alike"
    # What two tokens and two channels share must not give the fourth away.
    square = mask[1:, 1:] ^ mask[1:, :-1] ^ mask[:-1, 1:]
    assert correlation(square, mask[:-1, :-1]) < 5, "the mask is linear in token and channel"


def test_mix_keys_never_meet(device):
    """Small keys and values, such as seed and step, or layer and input: every pair has its own result."""
    small = torch.arange(256, dtype=torch.int32, device=device)
    mixed = reference.mix_keys(small[:, None], small)
    assert len(mixed.unique()) == 256 * 256
    assert torch.equal(mixed[:, 7], reference.mix_keys(small, 7))


def test_dropout_is_a_function_of_the_key(device):
    """A token's mask is the same alone, in any pack, with more channels, and on every device."""
    keys = keys_of(7)
    mask = reference.dropout_mask(keys, CHANNELS, 0.3)
    assert torch.equal(reference.dropout_mask(keys[40:41], CHANNELS, 0.3), mask[40:41])
    assert torch.equal(reference.dropout_mask(keys.flip(0), CHANNELS, 0.3), mask.flip(0))
    assert torch.equal(reference.dropout_mask(keys, CHANNELS // 2, 0.3), mask[:, : CHANNELS // 2])
    assert torch.equal(reference.dropout_mask(keys_of(7, device=device), CHANNELS, 0.3).cpu(), mask)


def test_no_dropout(device):
    assert reference.dropout_mask(keys_of(0, device=device), CHANNELS, 0.0).all()


# --- projections ---

IN, OUTS, RANKS = 122, (40, 64, 9), (8, 3, 16)
SCALE = 1.7


def frozen_linears(draw, dtype, kind: str) -> list:
    weights = [draw(out, IN, dtype=dtype) / IN**0.5 for out in OUTS]
    if kind == "nf4":
        return [NF4Linear.quantise(weight) for weight in weights]
    linears = [Linear(IN, out) for out in OUTS]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight
    return linears


def low_ranks(draw, dtype, held: tuple[bool, ...]) -> dict[str, Tensor]:
    """fp32 leaves a0, b0, a1, ... that `dtype` holds exactly, so that their shadows are the same numbers."""
    leaves = {}
    for i, (out, rank) in enumerate(zip(OUTS, RANKS, strict=True)):
        if held[i]:
            leaves[f"a{i}"] = (draw(rank, IN, dtype=dtype) / IN**0.5).float()
            leaves[f"b{i}"] = (draw(out, rank, dtype=dtype) / rank**0.5).float()
    return leaves


def updates_of(leaves: dict[str, Tensor], dtype) -> list[LowRank | None]:
    def update(a, b):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        return LowRank(a, b, a.detach().to(dtype), b.detach().to(dtype))

    return [update(leaves[f"a{i}"], leaves[f"b{i}"]) if f"a{i}" in leaves else None for i in range(len(OUTS))]


@dtypes
@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids="dropout{}".format)
@pytest.mark.parametrize(
    "held", [(True, True, True), (False, True, False), (True, False, True), (False, False, False)], ids=str
)
def test_projections(draw, device, dtype, kind, p, held):
    frozen = frozen_linears(draw, dtype, kind)
    keys = keys_of(3, device=device)[:5]
    kept = reference.dropout_mask(keys, IN, p).double() / (1 - p)

    def op(x, **leaves):
        return reference.projections(x, frozen, updates_of(leaves, dtype), SCALE, p, keys)

    def plain(x, **leaves):
        ys = [x @ linear.dense(dtype).double().t() for linear in frozen]
        for i in range(len(OUTS)):
            if held[i]:
                ys[i] = ys[i] + SCALE * (x * kept) @ leaves[f"a{i}"].t() @ leaves[f"b{i}"].t()
        return ys

    compare(op, plain, TOLERANCE[dtype], x=draw(5, IN, dtype=dtype), **low_ranks(draw, dtype, held))


def test_projections_of_an_input_without_gradient(draw):
    """The first layer's case: the updates learn as ever, and no weight is expanded a second time for it."""
    x, leaves = draw(5, IN, dtype=torch.float32), low_ranks(draw, torch.float32, (True, True, True))
    frozen = frozen_linears(draw, torch.float32, "plain")
    expanded = []
    for linear in frozen:
        linear.dense = lambda dtype, weight=linear.weight: expanded.append(1) or weight
    gradients = []
    for needs in (True, False):
        mine = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        x.requires_grad_(needs)
        ys = reference.projections(x, frozen, updates_of(mine, torch.float32), SCALE)
        expanded.clear()
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        gradients.append({name: leaf.grad for name, leaf in mine.items()})
        assert len(expanded) == (len(OUTS) if needs else 0)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), f"the gradient of {name} changes"


def test_frozen_projections_keep_nothing(draw):
    x = draw(5, IN, dtype=torch.float32).requires_grad_()
    (y, *_) = reference.projections(x, frozen_linears(draw, torch.float32, "plain"), [None] * 3)
    assert not any(isinstance(saved, Tensor) for saved in y.grad_fn.saved_tensors)


# --- loss ---


@dtypes
@pytest.mark.parametrize("rows", [1, 7, reference._LOGIT_ROWS], ids="rows{}".format)
def test_linear_cross_entropy(draw, device, dtype, rows, monkeypatch):
    monkeypatch.setattr(reference, "_LOGIT_ROWS", rows)
    head = draw(61, 24, dtype=dtype)
    targets = torch.arange(300, device=device) * 7 % 61

    def plain(hidden):
        return F.cross_entropy(hidden @ head.double().t(), targets, reduction="sum")

    hidden = draw(300, 24, dtype=dtype) / 2
    compare(
        lambda hidden: reference.linear_cross_entropy(hidden, head, targets), plain, TOLERANCE[dtype], hidden=hidden
    )

    each = F.cross_entropy(hidden.double() @ head.double().t(), targets, reduction="none")
    assert_close("token_losses", reference.token_losses(hidden, head, targets), each, TOLERANCE[dtype])
    with_gradient = reference.token_losses(hidden, head, targets, torch.empty_like(hidden))
    assert_close("token_losses with d_hidden", with_gradient, each, TOLERANCE[dtype])


def test_loss_of_huge_logits(draw, device):
    """Logits in the thousands neither overflow nor lose the loss of the likely tokens."""
    hidden, head = 100 * draw(9, 24, dtype=torch.float32), draw(61, 24, dtype=torch.float32)
    targets = torch.arange(9, device=device)

    def plain(hidden):
        return F.cross_entropy(hidden @ head.double().t(), targets, reduction="sum")

    compare(lambda hidden: reference.linear_cross_entropy(hidden, head, targets), plain, 1e-5, hidden=hidden)
