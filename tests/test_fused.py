"""kernels/fused: the whole training step on fused kernels, against the same step on the reference.

The ops one by one are in test_ops.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from test_ops import CUDA, fused
from tiny_chat import random_examples, tiny_chat_folder, wrapped_adapter
from torch import Tensor

import kernels
import train
from kernels import reference
from lora import loop
from lora.adapter import Adapter
from lora.build import build_model
from lora.config import LoraConfig
from lora.data import Example, pack_examples
from lora.forward import Eager
from lora.log import read_metrics
from lora.model import Llama

if fused is None:
    pytest.skip("Triton is for Linux", allow_module_level=True)

EXAMPLES = random_examples((7, 20, 3, 20, 70), vocabulary=299)


@pytest.fixture
def ops(monkeypatch) -> Callable:
    """ops(module): from now on the model takes its ops from there."""
    return lambda module: monkeypatch.setattr(kernels, "implementation", lambda x: module)


def test_who_takes_which(monkeypatch):
    """A CPU the reference, and a GPU from capability 8.0 on the fused ops."""

    class OnGPU(NamedTuple):
        is_cuda: bool = True
        device: str = "cuda"

    for capability, wanted in (((9, 0), fused), ((8, 0), fused), ((7, 5), reference)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernels.implementation(OnGPU()) is wanted
        assert kernels.implementation(torch.zeros(1)) is reference


@pytest.mark.parametrize("name", [name for name in fused.__all__ if name not in ("expand_nf4", "flash_takes")])
def test_every_op_is_dispatched(monkeypatch, name):
    calls = SimpleNamespace(**{name: lambda *arguments: arguments})
    monkeypatch.setattr(kernels, "implementation", lambda x: calls)
    assert getattr(kernels, name)(1, 2) == (1, 2)


def step(
    model: Llama, adapter: Adapter, examples: list[Example] = EXAMPLES
) -> tuple[float, dict[tuple[str, str], Tensor]]:
    """The loss of a step with dropout, and the gradient of every A and B, fp64 on the CPU."""
    packs = pack_examples(range(len(examples)), examples, 80)
    loss = loop.accumulate(Eager(model), adapter, packs, [loop.token_keys(0, 5, pack) for pack in packs], 1.0).item()
    leaves = {(name, side): getattr(update, side) for name, update in adapter.updates.items() for side in "ab"}
    return loss, {name: leaf.grad.double().cpu() for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("quant", "dropout", "recompute"), [("none", 0.3, "none"), ("nf4", 0.0, "mlp"), ("nf4", 0.3, "block")]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_step_in_fp32(tmp_path, ops, device, quant, dropout, recompute):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles its kernels for it")
    folder = tiny_chat_folder(tmp_path)
    model = build_model(folder, quant, torch.float32, torch.device(device))
    model.recompute = recompute
    adapter = wrapped_adapter(model, LoraConfig(rank=4, alpha=8, dropout=dropout))
    ops(reference)
    loss, gradient = step(model, adapter)
    ops(fused)
    fused_loss, fused_gradient = step(model, adapter)
    assert abs(fused_loss - loss) < 1e-5 * loss
    assert any((fused_gradient[name] != wanted).any() for name, wanted in gradient.items()), "it is the same code"
    for name, wanted in gradient.items():
        error = ((fused_gradient[name] - wanted).norm() / wanted.norm()).item()
        assert error < 1e-5, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids="dropout{}".format)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_step_in_16_bits(tmp_path, ops, device, dropout, dtype):
    """Against the step in fp32, no tensor's gradient is further off than 1.1 times the reference's in 16 bits.

    Both errors are sums of rounding errors, so it takes wide layers and many tokens for their ratio not to be chance.
    """
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    folder, examples, found = tiny_chat_folder(tmp_path, **wide), random_examples([60] * 40, vocabulary=299), {}
    for name, module, computed in (
        ("exact", reference, torch.float32),
        ("plain", reference, dtype),
        ("fused", fused, dtype),
    ):
        model = build_model(folder, "nf4", computed, torch.device(device))
        ops(module)
        found[name] = step(model, wrapped_adapter(model, LoraConfig(rank=8, alpha=16, dropout=dropout)), examples)[1]
    for name, wanted in found["exact"].items():
        plain, ours = ((found[kind][name] - wanted).norm().item() for kind in ("plain", "fused"))
        assert ours <= 1.1 * plain, f"the gradient of {name} is off by {ours:.2e}, the reference by {plain:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_two_hundred_steps(smollm2, tmp_path, ops, device):
    """SmolLM2 on a1 lists with dropout. In fp32 every loss is within 1 % or 0.01 nats, whichever is more, of the
    reference's. In bf16 the reference itself strays further from fp32 (benchmarks/RESULTS.md); ours may stray as far as
    it does, plus that much."""
    flags = f"--level a1 --model {smollm2} --train-lists 160 --epochs 20 --lora-dropout 0.05".split()
    flags += ["--device", device]

    def losses(module, *more: str) -> list[float]:
        ops(module)
        run = tmp_path / "-".join((module.__name__, *more))
        assert train.main([*flags, *more, "--run-dir", str(run)]) == 0
        return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]

    exact, ours_exact = (losses(module, "--dtype", "fp32") for module in (reference, fused))
    plain, ours = losses(reference, "--no-graphs"), losses(fused)
    assert [len(some) for some in (exact, ours_exact, plain, ours)] == [200] * 4
    for step, (wanted, in_fp32, in_bf16, loss) in enumerate(zip(exact, ours_exact, plain, ours, strict=True), 1):
        bound = max(0.01, 0.01 * wanted)
        assert abs(in_fp32 - wanted) <= bound, f"step {step} in fp32: {in_fp32}, on the reference {wanted}"
        bound += abs(in_bf16 - wanted)
        assert abs(loss - wanted) <= bound, f"step {step}: {loss}, exactly {wanted}, on the reference in bf16 {in_bf16}"
