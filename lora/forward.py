"""A pack through the model: op by op, or as CUDA graphs that are captured once and replayed.

Forward and backward of a 1B model are some two thousand launches, and Python needs about 90 ms for them: longer than an
H200 for 8,192 tokens. A graph holds them all and is one launch, so a small pack runs as fast as a large one.

A graph repeats the same kernels on the same memory. What differs from pack to pack must be data in fixed places:

- ids, positions and dropout keys, in as many places as the graph has tokens (`Size`). A pack is filled up with an
  example of padding. Nobody learns from it, so its gradients are zeros and nothing changes but the last bits.
- where each example begins; places that are left over are empty examples.

The loss stays outside, between two graphs: how many tokens are supervised differs, and its matmuls are long anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import kernels
from lora.adapter import Adapter
from lora.data import Pack
from lora.model import Llama, packed


class Forward(Protocol):
    """model: what it runs. Called with a pack of T tokens: hidden states [T or more, hidden], the rest is padding."""

    model: Llama

    def __call__(self, pack: Pack) -> Tensor: ...

    def clear(self) -> bool:
        """Gives back what is kept from pack to pack, and says whether that was anything."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU's copy joins the queue and nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Eager:
    """A `Forward` op by op."""

    def __init__(self, model: Llama):
        self.model = model

    def __call__(self, pack: Pack) -> Tensor:
        ids, positions = (upload(tensor, self.model.head.device) for tensor in (pack.ids, pack.positions))
        return self.model(ids, positions, packed(pack.lengths))

    def clear(self) -> bool:
        return False


class Size(NamedTuple):
    """What a graph has room for."""

    tokens: int
    examples: int

    @classmethod
    def of(cls, pack: Pack) -> Size:
        """A little more than the pack takes, so that few sizes serve all packs: 32 numbers of tokens to an octave."""
        grain = max(64, _power_of_two(len(pack.ids)) // 64)
        tokens = -(-len(pack.ids) // grain) * grain
        return cls(tokens, max(32, _power_of_two(len(pack.lengths) + 1)))

    def starts(self, pack: Pack) -> Tensor:
        """int32 [examples + 1]: where the pack's examples begin, one of padding after them, and empty ones."""
        ends = torch.tensor(pack.lengths).cumsum(0)
        starts = torch.full((self.examples + 1,), self.tokens)
        starts[0], starts[1 : len(ends) + 1] = 0, ends
        return starts.int()


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


class Inputs:
    """The fixed places on the GPU.

    ids        int32 [tokens]
    positions  int32 [tokens]
    starts     int32 [examples + 1]
    keys       int32 [4 * layers, tokens], if there is dropout
    """

    def __init__(self, size: Size, keys: Tensor | None, device: torch.device):
        """All zeros; keys: of a pack."""
        self.size = size
        # The first three are one tensor, so that a pack takes one copy.
        self.places = torch.zeros(2 * size.tokens + size.examples + 1, dtype=torch.int32, device=device)
        self.ids, self.positions, self.starts = self._split(self.places)
        self.keys = None if keys is None else keys.new_zeros(len(keys), size.tokens)

    def _split(self, places: Tensor) -> tuple[Tensor, ...]:
        return places.split([self.size.tokens, self.size.tokens, self.size.examples + 1])

    def fill(self, pack: Pack, keys: Tensor | None) -> None:
        """Puts a pack there, by one copy that nobody waits for. It comes from pinned memory that is new each time, for
        the last one may still wait to be read (PyTorch gives it out again only after that)."""
        n, filled = len(pack.ids), torch.zeros(self.places.shape, dtype=torch.int32, pin_memory=True)
        ids, positions, starts = self._split(filled)
        ids[:n], positions[:n] = pack.ids, pack.positions
        starts.copy_(self.size.starts(pack))
        self.places.copy_(filled, non_blocking=True)
        if keys is not None:
            self.keys[:, :n].copy_(keys)


@dataclass
class Captured:
    """Two graphs and where they meet the rest: after the first, `hidden` [tokens, n] holds the hidden states, and when
    the second begins, their gradient."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: Tensor


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf: Tensor, captured: Captured) -> Tensor:
        ctx.captured = captured
        captured.forward.replay()
        return captured.hidden.detach()

    @staticmethod
    def backward(ctx, d_hidden: Tensor):
        ctx.captured.hidden.copy_(d_hidden)
        # The adapter's gradient grows where it stands, inside the graph.
        ctx.captured.backward.replay()
        return None, None


class Graphs:
    """A `Forward` by graphs, one pair for each size. All graphs share one pool of memory, so a pack must have gone
    forward and backward before the next one begins.

    Only the first pack of all (and the first after memory ran out) runs op by op: kernels compile then and libraries
    wake up, which no graph should hold. Later ones do not, since what op by op leaves behind in PyTorch's cache is as
    much memory again as the graphs have.
    """

    def __init__(self, model: Llama, adapter: Adapter):
        self.model, self.adapter = model, adapter
        # Autograd calls a backward pass only where something asks for a gradient.
        self.leaf = torch.zeros((), device=model.head.device, requires_grad=True)
        self.captured: dict[Size, Captured] = {}
        self.clear()

    @staticmethod
    def possible(model: Llama) -> bool:
        """Whether attention can read where examples begin from the GPU."""
        return kernels.takes_starts(model.head, model.dtype, model.config.head_dim)

    def clear(self) -> bool:
        """Gives back all graphs and their memory; whether there were any."""
        held = bool(self.captured)
        self.warm = False
        self.pool = torch.cuda.graph_pool_handle()
        self.inputs: dict[Size, Inputs] = {}
        self.captured.clear()
        return held

    def __call__(self, pack: Pack) -> Tensor:
        size, keys = Size.of(pack), self.adapter.keys
        if size not in self.inputs:
            self.inputs[size] = Inputs(size, keys, self.leaf.device)
        inputs = self.inputs[size]
        inputs.fill(pack, keys)
        # The rest of this pass, backward too, draws its masks by the keys in the fixed places.
        self.adapter.keys = inputs.keys
        if not self.warm:
            self.warm = True
            return self._run(inputs)
        if size not in self.captured:
            self.captured[size] = self._capture(inputs)
        return _Replay.apply(self.leaf, self.captured[size])

    def _run(self, inputs: Inputs) -> Tensor:
        return self.model(inputs.ids, inputs.positions, packed(inputs.starts))

    def _capture(self, inputs: Inputs) -> Captured:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Relaxed: what only this size needs may still be loaded.
        with torch.cuda.graph(forward, self.pool, capture_error_mode="relaxed"):
            hidden = self._run(inputs)
        # One place for the hidden states and their gradient: the loss has taken what it needs of the first before it
        # makes the second, and the last norm keeps its input alone.
        with torch.cuda.graph(backward, self.pool, capture_error_mode="relaxed"):
            hidden.backward(hidden.detach())
        return Captured(forward, backward, hidden.detach())


def choose_forward(model: Llama, adapter: Adapter, graphs: bool = True) -> Forward:
    """Graphs where they are wanted and possible, else op by op."""
    return Graphs(model, adapter) if graphs and Graphs.possible(model) else Eager(model)
