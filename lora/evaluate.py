"""Losses on held-out examples: what the model gives up on each token, averaged over tokens and nothing else.

Rows are packed, so there is no padding to count by mistake; sums are divided once, by the number of tokens that were
summed, so a batch of short answers weighs no more than its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

import kernels
from lora.data import Pack
from lora.model import Llama, packed


@dataclass(frozen=True)
class Losses:
    """Means in nats: over the supervised tokens (`response`), and over every token that has one before it (`full`)."""

    response: float
    full: float
    response_tokens: int
    full_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.response)

    @property
    def perplexity_full(self) -> float:
        return math.exp(self.full)


@torch.no_grad()
def evaluate(model: Llama, packs: Iterable[Pack]) -> Losses:
    """Losses of the model as it is, adapter on or off."""
    device = model.head.device
    sums, counts = [0.0, 0.0], [0, 0]
    for pack in packs:
        hidden = model(pack.ids.to(device), pack.positions.to(device), packed(pack.lengths))
        scored = pack.scored.nonzero().squeeze(1)
        losses = kernels.token_losses(hidden[scored.to(device)], model.head, pack.targets[scored].to(device)).double()
        supervised = pack.supervised[scored].to(device)
        for i, some in enumerate((losses[supervised], losses)):
            sums[i] += some.sum().item()
            counts[i] += len(some)
    return Losses(sums[0] / counts[0], sums[1] / counts[1], counts[0], counts[1])
