"""The low-rank update: W x becomes W x + s B A x, with A [r, in], B [out, r] and s = alpha / r (Hu et al. 2021).

B starts at zero, so training starts at the base model. With rsLoRA the scale is alpha / sqrt(r), which keeps the size
of the update the same as r grows (Kalajdzievski 2023).

Everything that learns lives in one flat fp32 buffer: every A in the model's order, then every B, each starting at a
multiple of 256 elements (the block of the 8-bit optimiser, so that no block spans two matrices). Beside it lie one flat
gradient and, if the model computes in 16 bits, one 16-bit *shadow* of the numbers, refreshed after each step. A and B
are views. So the optimiser is one launch and the gradient norm one reduction, whatever the model; and where r * in is a
multiple of 256, linears that read the same input have their A under each other, as one matrix for one product.

`wrap` puts the adapter's `project` in the place of the model's own, `unwrap` puts the model's back, and `fold` adds
s B A to the weights; no module of the model is replaced or renamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import kernels
from lora.config import LoraConfig
from lora.model import Linear, Llama, project

ALIGNMENT = 256

# The four inputs of a block that draw a dropout mask: linears that read the same input share one.
_INPUT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


def targets_of(model: Llama, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linears called `names` in every block, by their full name: "model.layers.0.self_attn.q_proj"."""
    found = {}
    for index, block in enumerate(model.model.layers):
        for part in ("self_attn", "mlp"):
            for name, module in getattr(block, part).named_children():
                if name in names:
                    found[f"model.layers.{index}.{part}.{name}"] = module
    return found


class Adapter:
    """The trainable part of a run, and the only one.

    flat     fp32 [n]: all A, then all B
    grad     fp32 [n]: the gradient, to which every backward pass adds
    shadow   compute dtype [n]: `flat` as the forward pass reads it (`flat` itself in fp32)
    updates  full name of a linear -> its `kernels.LowRank` views
    keys     int32 [4 * layers, T] inside `dropping`: a row for every input of every block; else None
    """

    def __init__(self, model: Llama, config: LoraConfig, seed: int):
        """Draws A uniformly from +-1/sqrt(in), as PEFT does, and sets B to zero; on the model's device."""
        self.config, self.scale = config, config.scale
        self.targets, self.layers = targets_of(model, config.target_modules), len(model.model.layers)
        device = model.head.device
        shapes = {}
        for side in ("A", "B"):
            for name, linear in self.targets.items():
                out, into = linear.shape
                shapes[name, side] = (config.rank, into) if side == "A" else (out, config.rank)
        self.spans: dict[tuple[str, str], tuple[int, tuple[int, int]]] = {}
        size = 0
        for key, shape in shapes.items():
            self.spans[key] = (size, shape)
            size += -(-shape[0] * shape[1] // ALIGNMENT) * ALIGNMENT
        self.flat = torch.zeros(size, device=device)
        self.grad = torch.zeros_like(self.flat)
        self.shadow = self.flat if model.dtype == torch.float32 else self.flat.to(model.dtype)
        self.updates = {name: self._update(name) for name in self.targets}
        self._by_linear = {id(linear): name for name, linear in self.targets.items()}
        self.keys: Tensor | None = None
        generator = torch.Generator().manual_seed(seed)
        for update in self.updates.values():
            bound = update.a.shape[1] ** -0.5
            drawn = torch.empty(update.a.shape).uniform_(-bound, bound, generator=generator)
            update.a.data.copy_(drawn)
        self.refresh()

    def _view(self, buffer: Tensor, name: str, side: str) -> Tensor:
        start, (rows, columns) = self.spans[name, side]
        return buffer[start : start + rows * columns].view(rows, columns)

    def _update(self, name: str) -> kernels.LowRank:
        leaves = []
        for side in ("A", "B"):
            leaf = self._view(self.flat, name, side).detach().requires_grad_()
            # Backward passes add to gradients where they stand, so every leaf fills its part of the flat one.
            leaf.grad = self._view(self.grad, name, side)
            leaves.append(leaf)
        return kernels.LowRank(*leaves, self._view(self.shadow, name, "A"), self._view(self.shadow, name, "B"))

    def __len__(self) -> int:
        """Trainable parameters, padding not counted."""
        return sum(rows * columns for _, (rows, columns) in self.spans.values())

    def refresh(self) -> None:
        """Brings the 16-bit shadow up to date after `flat` has changed."""
        if self.shadow is not self.flat:
            self.shadow.copy_(self.flat)

    def tensors(self) -> dict[str, Tensor]:
        """Every A and B under its name in a PEFT file, fp32, without copies."""
        return {
            f"base_model.model.{name}.lora_{side}.weight": self._view(self.flat, name, side)
            for name, side in sorted(self.spans)
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes the numbers of `tensors` (names and shapes as in `tensors()`, any dtype)."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
        self.refresh()

    def project(self, source: kernels.Source, *linears: nn.Module, **rest) -> list[Tensor]:
        """`model.project` with the updates of these linears added. source [T, in] -> a list of [T, out_i]."""
        names = [self._by_linear.get(id(linear)) for linear in linears]
        updates = [self.updates[name] if name else None for name in names]
        first = next(filter(None, names), None)
        keys = None
        if self.keys is not None and first is not None:
            _, _, layer, _, linear = first.split(".")
            keys = self.keys[4 * int(layer) + _INPUT[linear]]
        p = 0.0 if keys is None else self.config.dropout
        return kernels.projections(source, linears, updates, self.scale, p, keys, **rest)

    def wrap(self, model: Llama) -> None:
        """From now on the model computes with the update."""
        for block in model.model.layers:
            block.self_attn.project = block.mlp.project = self.project

    def unwrap(self, model: Llama) -> None:
        """From now on the model is its base again."""
        for block in model.model.layers:
            block.self_attn.project = block.mlp.project = project

    @contextmanager
    def off(self, model: Llama) -> Iterator[None]:
        """The base model, for as long as the `with` block lasts."""
        self.unwrap(model)
        try:
            yield
        finally:
            self.wrap(model)

    @contextmanager
    def dropping(self, token_keys: Tensor) -> Iterator[None]:
        """Dropout is on inside the `with` block (it must hold the backward pass too); token_keys int32 [T]."""
        if self.config.dropout:
            self.keys = kernels.input_keys(token_keys, 4 * self.layers)
        try:
            yield
        finally:
            self.keys = None

    @torch.no_grad()
    def fold(self, model: Llama) -> None:
        """Adds s B A to the weights, rounded by `round_unbiased`, and unwraps. They must be plain, not NF4."""
        self.unwrap(model)
        generator = torch.Generator().manual_seed(0)
        for name, linear in self.targets.items():
            if not isinstance(linear, Linear):
                raise TypeError(f"{name} is {type(linear).__name__}: fold into 16-bit weights")
            update = self.updates[name]
            folded = linear.weight.float() + self.scale * (update.b @ update.a)
            linear.weight.copy_(round_unbiased(folded, linear.weight.dtype, generator))


def round_unbiased(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds fp32 x to one of its two neighbours in `dtype`, up with the probability that makes the mean x.

    A base weight lies on the 16-bit grid, and an update is often smaller than half a step of it. Rounding to the
    nearest would then give back the base weight, every time: the update is not blurred but lost. Rounded this way each
    weight errs more, but the errors are independent, and in a sum over thousands of inputs they cancel where the update
    adds up. (SmolLM2 after 3 steps on a1: KL to the unmerged model 5e-3 nats to the nearest, 6e-5 like this, in bf16.)

    With a grid of step h around x, the upper neighbour is taken where a uniform u in [0, 1) is below (x - lower) / h.
    For x = m 2^e, 1/2 <= |m| < 1, the step of `dtype` is 2^e eps / 2. What lies on the grid stays.
    """
    if dtype == torch.float32:
        return x
    _, exponent = torch.frexp(x)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    step = torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2), exponent).clamp_min(least)
    lower = torch.floor(x / step)
    up = torch.rand(x.shape, generator=generator).to(x.device) < x / step - lower
    return ((lower + up) * step).to(dtype)
