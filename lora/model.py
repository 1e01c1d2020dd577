"""Llama, plain: parameters under their Hugging Face names, one forward pass, and nothing about how it is trained.

A block adds to the residual stream twice:

    x = x + W_o attention(rope(W_q h), rope(W_k h), W_v h)      h = rms_norm(x)
    x = x + W_down (silu(W_gate h) * W_up h)                    h = rms_norm(x)

Three things come from outside, so that this file stays a leaf:

- `attend(layer, q, k, v)` is what attention means here: examples packed in one row (`packed`), or a cache of earlier
  keys and values (generate.py).
- `project(source, *linears)` calls the projections that read the same input: q/k/v, gate/up, and o and down alone.
  Plain by default; an adapter puts its own in place (adapter.py), and no module is renamed or wrapped. What they read
  goes in unmade, as `Normed` or `Gated`, so that it need not be kept; and the residual is added on the way out.
- what a linear is: `Linear` here, or another frozen weight with the same members (quant.py).

Tokens come as one row, ids [T] and positions [T]. The model ends in normalised hidden states [T, hidden]: whoever needs
logits multiplies just the rows that matter by `head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Llama3Rope:
    """The long-context stretch of Llama 3.1 and later: slow frequencies are divided by `factor`, fast ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, in the words of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied: bool


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle a position adds to each plane of a head, fp32 [head_dim / 2]: theta^(-2j / head_dim).

    With Llama 3's scaling, a plane that turns fewer than low_freq_factor times within the original context is slowed
    down by `factor`, one that turns more than high_freq_factor times is kept, and between them the two are blended
    linearly.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if (scaling := config.rope_scaling) is None:
        return frequency
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def packed(lengths: Sequence[int] | Tensor) -> Attend:
    """Attention for examples of these lengths, back to back in one row: causal, and never across a border."""
    return lambda layer, q, k, v: kernels.attention(q, k, v, lengths)


def project(source: kernels.Source, *linears: nn.Module, **rest) -> list[Tensor]:
    """Several linears on one input, see kernels.projections: source [T, in] -> a list of [T, out_i]."""
    return kernels.projections(source, linears, [None] * len(linears), **rest)


class Linear(nn.Module):
    """x W^T with a frozen W [out, in]; Llama has no biases."""

    nf4 = None  # see kernels.reference.FrozenLinear

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """(out, in)"""
        return self.weight.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return self.weight.to(dtype)


class RMSNorm(nn.Module):
    """x [T, n] -> [T, n]; see kernels.rms_norm."""

    def __init__(self, n: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def source(self, x: Tensor) -> kernels.Normed:
        """The same, as what linears read."""
        return kernels.Normed(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: query head h reads key head h // (num_heads / num_kv_heads)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        n, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        self.q_proj = Linear(n, config.num_heads * self.head_dim)
        self.k_proj = Linear(n, config.num_kv_heads * self.head_dim)
        self.v_proj = Linear(n, config.num_kv_heads * self.head_dim)
        self.o_proj = Linear(config.num_heads * self.head_dim, n)
        self.project = project

    def forward(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, hidden], cos and sin fp32 [T, head_dim / 2] -> [T, hidden]: x and what attention adds to it."""
        x, *qkv = self.project(norm.source(x), self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in qkv)
        q, k = kernels.rope(q, k, cos, sin)
        (x,) = self.project(attend(self.layer, q, k, v).flatten(1), self.o_proj, residual=x)
        return x


class MLP(nn.Module):
    """x + W_down (silu(W_gate h) * W_up h) with h = norm(x), x [T, hidden] -> [T, hidden]."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.project = project

    def forward(self, x: Tensor, norm: RMSNorm, hollow: bool = False) -> Tensor:
        x, gate, up = self.project(norm.source(x), self.gate_proj, self.up_proj)
        (x,) = self.project(kernels.Gated(gate, up), self.down_proj, residual=x, hollow=hollow)
        return x


class Recomputed(torch.autograd.Function):
    """run(x, hollow), of which only x is kept: the backward pass runs it again.

    That time its own output is not needed, only what led to it; so with `hollow`, the last product is left out: a
    quarter of a block's forward pass. (Otherwise this is torch.utils.checkpoint; Chen et al. 2016.)
    """

    @staticmethod
    def forward(ctx, leaf: Tensor, x: Tensor, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x, False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            y = ctx.run(x, True)
        y.backward(dy)
        return None, x.grad, None


def recomputed(run: Callable[[Tensor, bool], Tensor], x: Tensor) -> Tensor:
    """See Recomputed. x [T, n] -> [T, n]."""
    # A leaf that asks for a gradient, since in the first block x does not, but what learns inside `run` must.
    return Recomputed.apply(torch.zeros((), requires_grad=True), x, run)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream x [T, hidden]."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, recompute_mlp: bool = False, hollow: bool = False
    ) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, cos, sin, attend)
        norm = self.post_attention_layernorm
        if recompute_mlp:
            return recomputed(lambda x, hollow: self.mlp(x, norm, hollow), x)
        return self.mlp(x, norm, hollow)


class Embedding(nn.Module):
    """ids, integers [T] -> rows of the table, [T, n]."""

    def __init__(self, vocab_size: int, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Decoder(nn.Module):
    """Everything between ids and the head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """ids -> normalised hidden states; `head` turns rows of them into logits.

    dtype      what is computed in; weights kept in another one are converted where they are used
    recompute  trades time for memory: "block" keeps only each block's input and runs it again in the backward pass,
               "mlp" does so with the MLPs alone, "none" keeps what each op needs
    """

    def __init__(self, config: LlamaConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size)
        self.recompute = "none"
        self.frequencies = rope_frequencies(config)

    @property
    def head(self) -> Tensor:
        """[vocabulary, hidden]; a tied model has one matrix for both ends, and here it is one tensor."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids and positions, integers [T] -> [T, hidden]."""
        x = self.model.embed_tokens(ids).to(self.dtype)
        self.frequencies = self.frequencies.to(ids.device)  # copied once, on the first call
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for block in self.model.layers:
            if recompute == "block":
                x = recomputed(lambda x, hollow, block=block: block(x, cos, sin, attend, hollow=hollow), x)
            else:
                x = block(x, cos, sin, attend, recompute == "mlp")
        return self.model.norm(x)
