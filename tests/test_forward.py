"""lora/forward.py: graphs give the gradient that the same model gives op by op."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_ops import CUDA
from tiny_chat import random_examples, tiny_chat_folder, wrapped_adapter
from torch import Tensor

from lora import loop
from lora.build import build_model
from lora.config import LoraConfig
from lora.data import Pack, make_pack, pack_examples
from lora.forward import Eager, Forward, Graphs, Size, choose_forward

LENGTHS = (7, 20, 3, 20, 70, 1, 33)
EXAMPLES = random_examples(LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((64,), Size(64, 32)),
        ((65,), Size(128, 32)),
        ((1,) * 31, Size(64, 32)),
        ((1,) * 32, Size(64, 64)),
        ((2048, 2048), Size(4096, 32)),
        ((300,) * 14, Size(4224, 32)),
    ],
    ids=str,
)
def test_sizes(lengths, size):
    examples = random_examples(lengths)
    pack = make_pack(range(len(examples)), examples)
    assert Size.of(pack) == size
    starts = size.starts(pack)
    assert starts.dtype == torch.int32 and len(starts) == size.examples + 1
    places = starts.diff().tolist()
    assert tuple(places[: len(lengths)]) == lengths
    assert places[len(lengths)] == size.tokens - sum(lengths) and not any(places[len(lengths) + 1 :])


def gradient(forward: Forward, adapter, packs: list[Pack], step: int) -> Tensor:
    keys = [loop.token_keys(0, step, pack) for pack in packs]
    loop.accumulate(forward, adapter, packs, keys, 1.0)
    return adapter.grad.clone()


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_graphs(tmp_path, device, recompute):
    """Packs of one size and of another, alone and together, with dropout: a new step draws anew, a step made again
    draws the same. The first pack of all runs op by op, later ones are captured, or replayed."""
    model = build_model(tiny_chat_folder(tmp_path, head_dim=16), "nf4", torch.bfloat16, torch.device(device))
    model.recompute = recompute
    adapter = wrapped_adapter(model, LoraConfig(rank=8, alpha=16, dropout=0.3))
    assert Graphs.possible(model)
    graphs, eager = Graphs(model, adapter), Eager(model)
    all_packs = [make_pack(indices, EXAMPLES) for indices in ([0, 1, 2, 3], [4, 5, 6], [6, 5, 2], [4, 6, 5])]
    seen = {}
    for step in (1, 1, 2, 1):
        for some in ([0], [1], [2], [0, 1, 2, 3], [3, 0]):
            packs = [all_packs[i] for i in some]
            wanted, found = (gradient(forward, adapter, packs, step) for forward in (eager, graphs))
            error = ((found - wanted).norm() / wanted.norm()).item()
            assert error < 0.01, f"packs {some} of step {step} are off by {error:.1e}"
            for other, before in seen.items():
                assert torch.equal(found, before) == (other == (tuple(some), step)), f"{some}, {step} against {other}"
            seen[tuple(some), step] = found
    assert len(graphs.captured) == len({Size.of(pack) for pack in all_packs})
    assert graphs.clear() and not graphs.captured and not graphs.clear()
    again = gradient(graphs, adapter, [all_packs[0]], 1)
    assert torch.equal(again, seen[(0,), 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_a_gpu_runs_out_of_memory(tmp_path, device, dtype):
    """The step is made again in smaller packs, with the same examples and dropout, and goes on so: by graphs in 16
    bits,
    op by op in 32."""
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 64}
    model = build_model(tiny_chat_folder(tmp_path, **wide), "nf4", dtype, torch.device(device))
    adapter = wrapped_adapter(model, LoraConfig(rank=8, alpha=16, dropout=0.3))
    examples, budget, events = random_examples([200] * 80), 16000, []
    forward = choose_forward(model, adapter)
    state, log = loop.State(budget), SimpleNamespace(event=lambda step, message: events.append(message))

    def step() -> Tensor:
        def work(packs: list[Pack]) -> Tensor:
            return gradient(forward, adapter, packs, 1)

        return loop.in_packs(work, partial(pack_examples, range(len(examples)), examples), state, log, forward.clear)

    for _ in range(3):
        whole = step()
    assert not events
    forward.clear()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = torch.cuda.memory_reserved() + 300 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        parts = [step() for _ in range(3)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert events and state.micro_batch_tokens < budget
    for part in parts:
        error = ((part - whole).norm() / whole.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"off by {error:.1e}"
