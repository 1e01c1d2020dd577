"""Answers from a model: a cache of keys and values, and sampling that repeats.

Attention is causal, so a token never changes what came before it: the keys and values of the past are computed once and
kept. An answer is then made in two phases. *Prefill* runs all tokens of all prompts in one packed row, as training
does, and fills the cache. *Decoding* runs one token a sequence, which attends to the cache; where a row without a cache
would be computed anew for every token, this costs one token's work a token. What decoding waits for is reading the
weights, and a batch shares that: the batch is the unit of work, and a finished sequence leaves it.

The next token is the most probable one (temperature 0, greedy), or it is drawn. Divided by a temperature t, the logits
z give p = softmax(z / t): below 1 sharper than the model, above 1 flatter. Top-p (nucleus sampling, Holtzman et al.
2020, "The Curious Case of Neural Text Degeneration", section 3.1) then keeps the smallest set of most probable tokens
whose p sums to top_p or more, and draws from these in proportion to p: the long tail, each token unlikely but together
not, is where sampled text goes astray.

To draw is to invert the cumulative distribution: c_i = p_0 + ... + p_i is a staircase up to the sum of what was kept,
and a uniform number u in [0, 1) times that sum falls on exactly one step. u is a pure function of (seed, prompt,
position in the answer), so an answer depends neither on the batch size nor on what else is in the batch. (Logits do, in
their last bits: a matmul of another shape adds up in another order. Two tokens that close may swap.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from lora.build import free_bytes
from lora.model import Llama

# Attention without cuDNN's: it plans anew for every length, and each token makes a new length (H200, Llama 1B: 45 to
# 50 ms a token with it, 13 without).
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class Answer(NamedTuple):
    """What the model wrote after a prompt."""

    ids: list[int]  # without the stop id
    stopped: bool  # by a stop id; False if max_new_tokens ended it


class Cache:
    """Keys and values of a batch of sequences; `prefill` and `decode` are what attention means in the two phases.

    k, v       model's dtype [layers, B, kv_heads, capacity, D]
    lengths    tokens of each sequence so far
    rows       int64 [B]: 0, 1, 2, ...
    positions  int64 [B]: where the newest token of each sequence stands
    past       bool [B, longest]: the places it attends to, its own included

    The last three are there once `advance` was called.
    """

    def __init__(self, model: Llama, lengths: Sequence[int], max_new_tokens: int):
        """For prompts of these lengths."""
        config, device = model.config, model.head.device
        # The last new token is never run through the model.
        capacity = max(lengths) + max_new_tokens - 1
        shape = (2, config.num_layers, len(lengths), config.num_kv_heads, capacity, config.head_dim)
        # Zeros, since a place that is masked out still counts with weight 0, and 0 * NaN is NaN.
        self.k, self.v = torch.zeros(shape, dtype=model.dtype, device=device)
        self.lengths = list(lengths)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The prompts back to back. q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads, D]."""
        for cached, new in ((self.k, k), (self.v, v)):
            for row, prompt in zip(cached[layer], new.split(self.lengths)):
                row[:, : len(prompt)] = prompt.transpose(0, 1)
        return kernels.attention(q, k, v, self.lengths)

    def advance(self) -> None:
        """Moves on by one token in each sequence."""
        device = self.k.device
        self.rows = torch.arange(len(self.lengths), device=device)
        self.positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self.past = torch.arange(max(self.lengths), device=device) <= self.positions[:, None]

    @sdpa_kernel(_BACKENDS)
    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a sequence. q [B, heads, D], k and v [B, kv_heads, D] -> [B, heads, D]."""
        longest = self.past.shape[1]
        for cached, new in ((self.k, k), (self.v, v)):
            cached[layer, self.rows, :, self.positions] = new
        # The queries that share a key head stand under each other as rows of one matrix: [B, kv_heads, group, D].
        out = torch.nn.functional.scaled_dot_product_attention(
            q.unflatten(1, (k.shape[1], -1)),
            self.k[layer, :, :, :longest],
            self.v[layer, :, :, :longest],
            attn_mask=self.past[:, None, None],
        )
        return out.flatten(1, 2)

    def drop(self, row: int) -> None:
        """Forgets one sequence; the last one takes its row."""
        for cached in (self.k, self.v):
            cached[:, row] = cached[:, -1]
        self.k, self.v = self.k[:, :-1], self.v[:, :-1]
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) that belongs to these three: Python hashes a string seed alike on every machine."""
    return random.Random(f"{seed} {prompt} {position}").random()


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """One draw a row, as the module's docstring derives it. logits fp32 [B, vocabulary], u fp64 [B] -> int64 [B]."""
    p = torch.softmax(logits / temperature, dim=-1).double()
    if top_p < 1:
        falling, tokens = p.sort(descending=True, stable=True)
        # A token is in the nucleus if those before it do not fill it; the first always is.
        outside = falling.cumsum(-1) - falling >= top_p
        p = p.masked_fill(torch.zeros_like(outside).scatter_(1, tokens, outside), 0)
    # In double precision u * sum, with u at most 1 - 2^-53, is less than the sum, so there is always a step to fall on.
    staircase = p.cumsum(-1)
    target = u[:, None] * staircase[:, -1:]
    return torch.searchsorted(staircase, target, right=True).squeeze(1)


# What a larger batch shares, reading and expanding weights, is little by then (SmolLM2 in NF4 on one core: 4.7 ms a
# token in batches of 16, 2.2 in batches of 60).
_LARGEST_BATCH = 64


def choose_batch_size(model: Llama, tokens: int) -> int:
    """How many sequences of so many tokens to make at a time: their caches may take half of the free memory."""
    free, config = free_bytes(model.head.device), model.config
    if free is None:
        return _LARGEST_BATCH
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens * model.dtype.itemsize
    return max(1, min(_LARGEST_BATCH, free // 2 // cache))


@torch.no_grad()
def generate(
    model: Llama,
    prompts: list[list[int]],
    stop: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    on_token: Callable[[int, int], None] = lambda prompt, token: None,
) -> list[Answer]:
    """Continues each prompt until one of the `stop` ids or `max_new_tokens` (a stop id counts as one of them).

    batch_size: sequences at a time; None: as many as memory holds, at most 64. `on_token(prompt, token)` hears every
    token of every answer as it is made; `prompt` is its place in `prompts`.
    """
    if not prompts or not all(prompts):
        raise ValueError("no prompts, or an empty one")
    batch_size = choose_batch_size(model, max(map(len, prompts)) + max_new_tokens) if batch_size is None else batch_size
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"{max_new_tokens=}, {batch_size=}, {temperature=}, {top_p=}")
    head = model.head.to(model.dtype)
    device = head.device
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)

    def choose(hidden: Tensor, batch: list[int]) -> list[int]:
        """The next token of each sequence, from its last hidden state [B, hidden]."""
        logits = (hidden @ head.t()).float()
        if temperature == 0:
            return logits.argmax(-1).tolist()
        u = [uniform(seed, prompt, len(answers[prompt])) for prompt in batch]
        return sample(logits, torch.tensor(u, dtype=torch.float64, device=device), temperature, top_p).tolist()

    # Longest first: a batch holds prompts of like length, and one that does not fit into memory fails at once.
    waiting = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    while waiting:
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        lengths = [len(prompts[prompt]) for prompt in batch]
        cache = Cache(model, lengths, max_new_tokens)
        ids = torch.tensor([token for prompt in batch for token in prompts[prompt]], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden = model(ids, positions, cache.prefill)[last]
        while True:
            for prompt, token in zip(batch, choose(hidden, batch)):
                stopped[prompt] = token in stop
                if not stopped[prompt]:
                    answers[prompt].append(token)
                    on_token(prompt, token)
            # Backwards, so that the last sequence, which takes a freed row, is one that was looked at.
            for row in reversed(range(len(batch))):
                if stopped[batch[row]] or len(answers[batch[row]]) == max_new_tokens:
                    cache.drop(row)
                    batch[row] = batch[-1]
                    batch.pop()
            if not batch:
                break
            cache.advance()
            newest = torch.tensor([answers[prompt][-1] for prompt in batch], device=device)
            hidden = model(newest, cache.positions, cache.decode)
    return [Answer(*answer) for answer in zip(answers, stopped)]
