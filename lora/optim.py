"""AdamW over one flat buffer, with 8-bit or 32-bit state, and the learning rate of each step.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p - lr (m^ / (sqrt(v^) + eps) + decay p)           m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)

(Loshchilov and Hutter 2019.) The 8-bit form keeps m and v as one byte each: in every block of 256 elements they are
divided by the block's largest magnitude and rounded to a table whose steps are fine near zero (Dettmers et al. 2022).
The arithmetic is bitsandbytes'. Called tensor by tensor it keeps tensors under 4,096 elements in fp32; here the whole
adapter is one tensor and all of it is 8-bit.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

import kernels

BETAS, EPS, BLOCK = (0.9, 0.999), 1e-8, 256


class Optimiser(Protocol):
    """Adds one step to the numbers it was made for; `state` is everything it remembers, by name, without copies."""

    state: dict[str, Tensor]

    def step(self, lr: float, grad_scale: float) -> None:
        """One step with the gradient times grad_scale; the gradient may be scaled in place."""


class AdamW8bit:
    """8-bit state in blocks of 256: one launch over the flat buffer. flat, grad fp32 [n], n a multiple of 256."""

    def __init__(self, flat: Tensor, grad: Tensor, weight_decay: float):
        self.flat, self.grad, self.weight_decay = flat, grad, weight_decay
        self.state = {
            "step": torch.zeros((), dtype=torch.int64),
            "m": torch.zeros_like(flat, dtype=torch.uint8),
            "v": torch.zeros_like(flat, dtype=torch.uint8),
            "m_absmax": torch.zeros(len(flat) // BLOCK, device=flat.device),
            "v_absmax": torch.zeros(len(flat) // BLOCK, device=flat.device),
        }

    def step(self, lr: float, grad_scale: float) -> None:
        self.state["step"] += 1
        kernels.adamw8bit(self.flat, self.grad, self.state, lr, self.weight_decay, grad_scale, BETAS, EPS)


class AdamW:
    """fp32 state, PyTorch's fused kernel. flat, grad fp32 [n]."""

    def __init__(self, flat: Tensor, grad: Tensor, weight_decay: float):
        self.flat, self.grad, self.weight_decay = flat, grad, weight_decay
        self.state = {
            "step": torch.zeros((), device=flat.device),
            "m": torch.zeros_like(flat),
            "v": torch.zeros_like(flat),
        }

    def step(self, lr: float, grad_scale: float) -> None:
        s = self.state
        s["step"] += 1
        # PyTorch divides by its grad_scale, within the same pass.
        torch._fused_adamw_(
            [self.flat], [self.grad], [s["m"]], [s["v"]], [], [s["step"]],
            lr=lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=self.weight_decay, eps=EPS, amsgrad=False,
            maximize=False, grad_scale=torch.tensor(1 / grad_scale, device=self.flat.device),
        )  # fmt: skip


def choose_optimiser(name: str, flat: Tensor) -> str:
    """`--optimizer`; auto is 8-bit on a GPU, for its memory, and 32-bit on a CPU, where it is 40 times as fast."""
    if name != "auto":
        return name
    return "adamw8bit" if flat.is_cuda else "adamw"


def build_optimiser(name: str, flat: Tensor, grad: Tensor, weight_decay: float) -> Optimiser:
    """name: adamw8bit or adamw."""
    return {"adamw8bit": AdamW8bit, "adamw": AdamW}[name](flat, grad, weight_decay)


def learning_rate(step: int, steps: int, warmup: int, schedule: str, peak: float) -> float:
    """The learning rate of step 0 <= step < steps.

    It rises linearly over `warmup` steps and is at its peak right after them; then it falls along half a cosine or a
    line, or stays. No step is spent on a rate of zero: the first is peak / (warmup + 1), the last is still above
    nothing.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
