"""lora/optim.py: AdamW against PyTorch's, the 8-bit state, schedules by hand. Against bitsandbytes: parity/."""

import math

import numpy as np
import pytest
import torch
from test_ops import fused
from tiny import assert_close

from kernels.reference import dynamic_map
from lora.optim import build_optimiser, choose_optimiser, learning_rate

if fused is not None:
    from kernels.fused.adamw8bit import buckets

N, DECAY = 5 * 256, 0.1
RATES = (1e-2, 3e-3, 1e-3, 2e-2, 5e-3)
ALL = range(len(RATES))


def numbers(seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)).to(device)


def run(name: str, device: torch.device, steps: range = ALL, start=None, grad_scale=1.0):
    """Takes some of the steps, from `start` = (flat, state) if given -> the optimiser."""
    optimiser = build_optimiser(name, numbers(0, device), torch.zeros(N, device=device), DECAY)
    if start is not None:
        optimiser.flat.copy_(start[0])
        for key, tensor in optimiser.state.items():
            tensor.copy_(start[1][key])
    for step in steps:
        optimiser.grad.copy_(numbers(1 + step, device) / grad_scale)
        optimiser.step(RATES[step], grad_scale)
    return optimiser


def test_adamw(device):
    parameter = numbers(0, device)
    theirs = torch.optim.AdamW([parameter], weight_decay=DECAY)
    for step, rate in enumerate(RATES):
        theirs.param_groups[0]["lr"] = rate
        parameter.grad = numbers(1 + step, device)
        theirs.step()
    mine = run("adamw", device)
    assert_close("flat", mine.flat, parameter, 1e-6)
    # On a GPU the fused kernel forms 1 - beta2 in fp32, which moves v by 1.3e-5 of itself.
    for ours, key, tolerance in (("m", "exp_avg", 1e-6), ("v", "exp_avg_sq", 2e-5), ("step", "step", 0)):
        assert_close(ours, mine.state[ours], theirs.state[parameter][key], tolerance)


def test_adamw8bit_stays_close_to_adamw(device):
    """Its state is rounded, so single elements stray; the whole update does not."""
    start = numbers(0, device)
    wide, narrow = (run(name, device).flat - start for name in ("adamw", "adamw8bit"))
    assert (wide - narrow).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_grad_scale(device, name):
    """A gradient 8 times as large with grad_scale 1/8 is the same step, to the bit."""
    plain, scaled = run(name, device), run(name, device, grad_scale=0.125)
    assert torch.equal(plain.flat, scaled.flat)
    for key, tensor in plain.state.items():
        assert torch.equal(tensor, scaled.state[key]), key


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_is_everything(device, name):
    """Flat and state copied into a new optimiser after any step: it goes on to the bit."""
    whole = run(name, device)
    for stop in range(1, len(RATES)):
        first = run(name, device, range(stop))
        rest = run(name, device, range(stop, len(RATES)), (first.flat, first.state))
        assert torch.equal(rest.flat, whole.flat), f"stopped after step {stop}"
        for key, tensor in whole.state.items():
            assert torch.equal(rest.state[key], tensor), f"{key}, stopped after step {stop}"


def test_sizes_of_the_8bit_state(device):
    state = run("adamw8bit", device).state
    assert {key: (tensor.dtype, tensor.numel()) for key, tensor in state.items()} == {
        "step": (torch.int64, 1),
        "m": (torch.uint8, N),
        "v": (torch.uint8, N),
        "m_absmax": (torch.float32, N // 256),
        "v_absmax": (torch.float32, N // 256),
    }


def test_choose_optimiser(device):
    flat = torch.zeros(256, device=device)
    assert choose_optimiser("auto", flat) == ("adamw8bit" if device.type == "cuda" else "adamw")
    assert choose_optimiser("adamw8bit", flat) == "adamw8bit"
    assert choose_optimiser("adamw", flat) == "adamw"


# --- learning rate ---


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        ("linear", [1, 2, 3, 3 * 7 / 8, 3 * 6 / 8, 3 * 5 / 8, 3 / 2, 3 * 3 / 8, 3 * 2 / 8, 3 / 8]),
        ("cosine", [1, 2, 3, *(1.5 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 8))]),
    ],
)
def test_learning_rate(schedule, rates):
    """Ten steps of which two warm up, peak 3."""
    assert [learning_rate(step, 10, 2, schedule, 3.0) for step in range(10)] == pytest.approx(rates, rel=1e-12)


def test_cosine_by_hand():
    assert learning_rate(6, 10, 2, "cosine", 2e-4) == pytest.approx(1e-4)  # half way down
    assert learning_rate(4, 10, 2, "cosine", 2e-4) == pytest.approx(2e-4 * (2 + 2**0.5) / 4)  # a quarter
    assert learning_rate(0, 10, 0, "cosine", 2e-4) == 2e-4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (1, 5), (7, 0), (7, 3), (7, 7), (300, 30)])
def test_shape_of_schedules(schedule, steps, warmup):
    """Rises, then falls or stays; never zero, never above the peak, which is reached if warmup leaves a step for it."""
    rates = [learning_rate(step, steps, warmup, schedule, 1.0) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert max(rates) == 1 or warmup >= steps


# --- the 8-bit kernel of kernels/fused, whose oracle on a GPU is bitsandbytes (parity/) ---

needs_triton = pytest.mark.skipif(fused is None, reason="Triton is for Linux")


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The number of the nearest of ascending values; the middle between two, rounded as they are, is the even one's."""
    middle = (values[1:] + values[:-1]) * values.dtype.type(0.5)
    below, tied = np.searchsorted(middle, x), np.searchsorted(middle, x, side="right")
    return np.where((tied > below) & (below % 2 == 1), below + 1, below)


@needs_triton
@pytest.mark.parametrize(("signed", "shift"), [(True, 17), (False, 16)])
def test_buckets_find_the_nearest_code(signed, shift):
    """At and beside every middle of two codes, at both ends of every bucket, and on random magnitudes."""
    table = dynamic_map(signed, torch.device("cpu"))
    entries, first, lowest = (x.numpy() if isinstance(x, torch.Tensor) else x for x in buckets(table, shift))
    values = table.numpy()
    zero = int((values == 0).nonzero()[0][0])
    middle = (values[zero + 1 :] + values[zero:-1]) * np.float32(0.5)
    ends = (np.arange(first, (0x3F800000 >> shift) + 1)[:, None] * (1 << shift) + np.arange(-1, 2)).ravel()
    near = (np.concatenate([middle, values[zero + 1 :]]).view(np.int32)[:, None] + np.arange(-2, 3)).ravel()
    random = 10 ** np.random.default_rng(0).uniform(-9, 0, 100_000)
    x = np.concatenate([near.astype(np.int32).view(np.float32), ends.astype(np.int32).view(np.float32), random])
    x = x.astype(np.float32).clip(lowest, 1)
    bits = x.view(np.int32)
    code = (entries[(bits >> shift) - first] + bits).view(np.uint32) >> 24
    assert np.array_equal(code + zero, nearest(x, values))


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles its kernels for it")
def test_fused_adamw8bit():
    """Interpreted, step by step from the same state, against the formulas in fp64."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(N, generator=generator)
    state = build_optimiser("adamw8bit", flat, torch.zeros_like(flat), DECAY).state
    tables = {name: dynamic_map(name == "m", flat.device).double() for name in "mv"}
    for number in range(1, 4):
        state["step"] += 1
        grad = torch.randn(N, generator=generator) * 10 ** (-4 * torch.rand(N, generator=generator))
        s = {name: tables[name][state[name].int()] * state[f"{name}_absmax"].repeat_interleave(256) for name in "mv"}
        g = grad.double() / 8
        s = {"m": 0.9 * s["m"] + 0.1 * g, "v": 0.999 * s["v"] + 0.001 * g * g}
        c1, c2 = 1 - 0.9**number, (1 - 0.999**number) ** 0.5
        wanted = (flat - 1e-2 * c2 / c1 * s["m"] / (s["v"].sqrt() + c2 * 1e-8)) * (1 - 1e-2 * DECAY)
        fused.adamw8bit(flat, grad, state, 1e-2, DECAY, 1 / 8, (0.9, 0.999), 1e-8)
        assert_close("flat", flat, wanted, 1e-5)
        for name in "mv":
            absmax = s[name].view(-1, 256).abs().amax(1)
            assert_close(f"{name}_absmax", state[f"{name}_absmax"], absmax, 1e-5)
            code = nearest((s[name] / absmax.repeat_interleave(256)).numpy(), tables[name].numpy())
            # Within the last bit of a middle between two codes, rounding decides.
            assert (torch.from_numpy(code) != state[name]).float().mean() < 2e-3
