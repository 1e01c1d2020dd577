"""Losses on held-out examples: what the model gives up on each token, averaged over tokens and nothing else.

Rows are packed, so there is no padding to count by mistake; sums are divided once, by the number of tokens that were
summed, so a batch of short answers weighs no more than its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from lora.data import Pack
from lora.forward import Eager, upload
from lora.model import Llama


@dataclass(frozen=True)
class Losses:
    """Means in nats: over the supervised tokens (`response`), and over every token that has one before it (`full`)."""

    response: float
    full: float
    response_tokens: int
    full_tokens: int


def _losses(model: Llama, pack: Pack) -> Tensor:
    """-log p of every token of the pack that has one before it (`pack.scored`), fp32, in nats."""
    device, scored = model.head.device, pack.scored.nonzero().squeeze(1)
    hidden = Eager(model)(pack)[upload(scored, device)]
    return kernels.token_losses(hidden, model.head, upload(pack.targets[scored], device))


@torch.no_grad()
def evaluate(model: Llama, packs: Iterable[Pack]) -> Losses:
    """Losses of the model as it is, adapter on or off."""
    sums, counts = [0.0, 0.0], [0, 0]
    for pack in packs:
        losses = _losses(model, pack).double()
        supervised = pack.supervised[pack.scored].to(losses.device)
        for i, some in enumerate((losses[supervised], losses)):
            sums[i] += some.sum().item()
            counts[i] += len(some)
    return Losses(sums[0] / counts[0], sums[1] / counts[1], counts[0], counts[1])


@torch.no_grad()
def token_losses(model: Llama, packs: Iterable[Pack]) -> dict[str, Tensor]:
    """The loss of each token of each example, by the example's name: fp64 [tokens] on the CPU, the first one NaN."""
    found = {}
    for pack in packs:
        row = torch.full((len(pack.ids),), torch.nan, dtype=torch.float64)
        # A loss belongs to the token it predicts, the one after its place.
        row[pack.scored.nonzero().squeeze(1) + 1] = _losses(model, pack).double().cpu()
        found |= zip(pack.names, row.split(pack.lengths), strict=True)
    return found
