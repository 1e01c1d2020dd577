"""Every op of the trainer in plain PyTorch (8-bit AdamW is bitsandbytes'): the definition that kernels are tested
against, and the path that a CPU takes.

Tokens are *packed*: a micro-batch is one row of T tokens, whole examples back to back, and no padding anywhere. So x is
[T, hidden], q is [T, heads, head_dim], and `lengths` says where one example ends and the next begins.

Each op is a `torch.autograd.Function`, for two reasons. The base is frozen, so a backward pass that knows it never
makes a weight gradient; and autograd would save every intermediate, where these save little and make the rest again:
each says what and why. Sums and softmax run in fp32 whatever the dtype of x; what leaves a matmul is in x's dtype.
Under each derivation, d_ means the gradient of the loss with respect to _.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """y = w * x^ with x^ = x * rho and rho = 1 / sqrt(mean(x^2) + eps), over the last dimension; x passes through.

    x is the residual stream, so its gradient is dt, which comes back along the stream, and what y's gradient adds. With
    g = w * dy:  dx = dt + rho * (g - x^ * mean(g * x^)) = dt + rho * (g - x * rho^2 mean(g * x)), since
    d rho / dx_j = -rho^3 x_j / n.
    Saved: x and rho (one number a row). w is frozen.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rho = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rho)
        return x, (x * rho).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dt: Tensor | None, dy: Tensor):
        x, weight, rho = ctx.saved_tensors
        wide, g = x.float(), dy.float() * weight
        inner = torch.linalg.vecdot(g, wide).unsqueeze(-1) * rho.square() / x.shape[-1]
        dx = g.addcmul_(wide, inner, value=-1).mul_(rho)
        return (dx if dt is None else dx.add_(dt)).to(dy.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation (Zhang and Sennrich 2019). x [T, n], weight [n] (frozen) -> [T, n]."""
    return RMSNorm.apply(x, weight, eps)[1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the plane (x_j, x_{j + D/2}) of every head by the angle of its row. x [T, H, D], cos and sin [T, D/2]."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]
    return (x * cos).addcmul_(torch.cat((right, left), dim=-1).float(), sin).to(x.dtype)


class RoPE(torch.autograd.Function):
    """A rotation is orthogonal, so its backward is the rotation by the opposite angle: only angles are saved."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) on queries and keys, in Hugging Face's half-split layout.

    q [T, heads, D], k [T, kv_heads, D], cos and sin fp32 [T, D/2] -> q and k rotated, same shapes. Whoever hands
    over q and k gives them away, and so does whoever hands back their gradients: all may be rotated where they stand.
    """
    return RoPE.apply(q, k, cos, sin)


class SwiGLU(torch.autograd.Function):
    """The gated activation of Llama's MLP (Shazeer 2020): y = silu(g) * u with silu(g) = g * sigma(g).

    dg = dy * u * sigma (1 + g (1 - sigma)),  du = dy * silu(g). Saved: g and u; sigma is made again.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        d_up = torch.nn.functional.silu(gate).mul_(dy)
        d_gate = dy * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


# A tile of queries meets only the keys up to its last row, so a causal mask saves work and not only hides it, and a
# long example never needs all its scores at once.
_TILE = 64
# Probabilities of examples up to this length are kept for backward, at most a quarter of what a block keeps anyway;
# those of longer ones, which grow with the square of the length, are made again.
_KEPT = 256


class _Batch(NamedTuple):
    """Neighbouring examples as `n` of one `length`; shorter ones have zeros at their end."""

    rows: slice  # of the packed row
    n: int
    length: int
    # Where there is padding, int64:
    taken: Tensor | None = None  # [n * length]: the row (of `rows`) at each place, any row at padding
    places: Tensor | None = None  # the place of each row
    padding: Tensor | None = None  # the places of none


# Examples go together while padding is at most this much of their batch: 16 lists of 110 to 180 tokens take 12 ms as
# one batch and 22 ms one after the other (SmolLM2's heads, two cores, forward and backward).
_PADDING = 0.2


@lru_cache(maxsize=8)
def _batches(lengths: tuple[int, ...], device: torch.device) -> list[_Batch]:
    """The packed row in batches; every layer asks for the same."""
    groups: list[list[int]] = []
    for length in lengths:
        together = [*groups[-1], length] if groups else []
        if together and sum(together) >= (1 - _PADDING) * max(together) * len(together):
            groups[-1] = together
        else:
            groups.append([length])
    found, start = [], 0
    for group in groups:
        n, length, total = len(group), max(group), sum(group)
        batch = _Batch(slice(start, start + total), n, length)
        start += total
        if total < n * length:
            places = torch.cat([torch.arange(i * length, i * length + own) for i, own in enumerate(group)])
            taken, padding = torch.zeros(n * length, dtype=torch.int64), torch.ones(n * length, dtype=torch.bool)
            taken[places], padding[places] = torch.arange(total), False
            indices = {"taken": taken, "places": places, "padding": padding.nonzero().squeeze(1)}
            batch = batch._replace(**{name: index.to(device) for name, index in indices.items()})
        found.append(batch)
    return found


def _split_heads(x: Tensor, batch: _Batch, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[T, kv_heads * G, D] -> [n * kv_heads, length * G, D]: a batch for each key head, and in it the G query heads of
    each position under each other, so that a range of positions is a range of rows."""
    x = x[batch.rows]
    if batch.taken is not None:
        x = x.index_select(0, batch.taken).index_fill_(0, batch.padding, 0)
    x = x.view(batch.n, batch.length, kv_heads, -1, x.shape[-1]).transpose(1, 2)
    return x.new_empty(x.shape, dtype=dtype).copy_(x).view(batch.n * kv_heads, -1, x.shape[-1])


def _join_heads(x: Tensor, batch: _Batch, out: Tensor) -> None:
    """The inverse of `_split_heads`, into its rows of out [T, heads, D]."""
    out = out[batch.rows]
    whole = out if batch.places is None else out.new_empty(batch.n * batch.length, *out.shape[1:])
    kv_heads = len(x) // batch.n
    whole = whole.view(batch.n, batch.length, kv_heads, -1, out.shape[-1])
    whole.copy_(x.view(batch.n, kv_heads, batch.length, -1, out.shape[-1]).transpose(1, 2))
    if batch.places is not None:
        torch.index_select(whole.view(-1, *out.shape[1:]), 0, batch.places, out=out)


def _tiles(length: int, group: int, device: torch.device) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """The query tiles of an example: its rows, the keys up to its last position, those of its own positions, and the
    mask of the latter, fp32 [rows, positions]: 0 where a query sees a key, -inf where the key comes later."""
    future = torch.full((_TILE, _TILE), float("-inf"), device=device).triu_(1).repeat_interleave(group, 0)
    for a in range(0, length, _TILE):
        b = min(a + _TILE, length)
        yield slice(a * group, b * group), slice(0, b), slice(a, b), future[: (b - a) * group, : b - a]


def _probabilities(q: Tensor, k: Tensor, own: slice, future: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q k^T) of a tile, scores in fp32, rounded once. q fp32 [b, rows, D], already divided by sqrt(D);
    k fp32 [b, keys, D] -> `dtype` [b, rows, keys]. Only the tile's own positions have a future to hide."""
    scores = q @ k.transpose(1, 2)
    scores[:, :, own] += future
    return torch.softmax(scores, dim=-1, out=scores).to(dtype)


class Attention(torch.autograd.Function):
    """P = softmax(Q K^T / sqrt(D)), O = P V, inside each example.

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D).
    Saved: q, k, v, and P of short examples. Grouped queries need no copy of keys or values: the G heads that share a
    key head are rows of one matrix. Padding needs no mask: it stands at the end, after every query of its example; and
    its dO is zero, so it adds nothing to any gradient.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.lengths = tuple(lengths)
        (_, heads, width), kv_heads = q.shape, k.shape[1]
        out, kept = torch.empty_like(q), []
        for batch in _batches(ctx.lengths, q.device):
            vs = _split_heads(v, batch, kv_heads, v.dtype)
            q_wide, k_wide = (_split_heads(x, batch, kv_heads, torch.float32) for x in (q, k))
            q_wide *= width**-0.5
            o = torch.empty_like(q_wide, dtype=q.dtype)
            for tile, past, own, future in _tiles(batch.length, heads // kv_heads, q.device):
                p = _probabilities(q_wide[:, tile], k_wide[:, past], own, future, q.dtype)
                o[:, tile] = p @ vs[:, past]
                if batch.length <= _KEPT:
                    kept.append(p)
            _join_heads(o, batch, out)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        kept = iter(kept)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        (_, heads, width), kv_heads = q.shape, k.shape[1]
        for batch in _batches(ctx.lengths, q.device):
            qs, ks, vs, do = (_split_heads(x, batch, kv_heads, q.dtype) for x in (q, k, v, d_out))
            q_wide, k_wide = (qs.float() * width**-0.5, ks.float()) if batch.length > _KEPT else (None, None)
            dqs = torch.empty_like(qs)
            dks, dvs = torch.zeros_like(ks, dtype=torch.float32), torch.zeros_like(vs, dtype=torch.float32)
            for tile, past, own, future in _tiles(batch.length, heads // kv_heads, q.device):
                if batch.length > _KEPT:
                    p = _probabilities(q_wide[:, tile], k_wide[:, past], own, future, q.dtype)
                else:
                    p = next(kept)
                dvs[:, past] += p.transpose(1, 2) @ do[:, tile]
                ds = torch._softmax_backward_data(do[:, tile] @ vs[:, past].transpose(1, 2), p, -1, p.dtype)
                dqs[:, tile] = ds @ ks[:, past]
                dks[:, past] += ds.transpose(1, 2) @ qs[:, tile]
            dqs *= width**-0.5
            dks *= width**-0.5
            for part, whole in ((dqs, dq), (dks, dk), (dvs, dv)):
                _join_heads(part, batch, whole)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention inside each packed example, grouped heads as they are.

    q [T, heads, D], k and v [T, kv_heads, D], lengths summing to T -> [T, heads, D]. Where `kernels.takes_starts` says
    so, lengths may be a tensor, int32 [n + 1]: where each example begins, and the end; equal neighbours are an empty
    example.
    """
    return Attention.apply(q, k, v, lengths)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that spreads every input bit over every output bit (Wellons' lowbias32)."""
    # PyTorch has no unsigned multiplication: int32 wraps alike, but its right shift drags the sign in, hence the masks.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def mix_keys(keys: Tensor, value: int | Tensor) -> Tensor:
    """Folds `value` into 32-bit keys: chains of it give every (seed, step, example, position, layer, input) its own.

    keys int32 [...], value an integer or int32 [...] -> int32 [...].
    """
    return _mix(keys * 0x2545F491 + value)


def input_keys(token_keys: Tensor, inputs: int) -> Tensor:
    """Every token's key at each of so many inputs: int32 [T] -> int32 [inputs, T]."""
    return mix_keys(token_keys, torch.arange(inputs, dtype=torch.int32, device=token_keys.device)[:, None])


def dropout_mask(keys: Tensor, channels: int, p: float) -> Tensor:
    """Which inputs stay, as a pure function of the token's key and the channel: no generator, nothing to store.

    keys int32 [T], one for each token -> bool [T, channels], each True with probability 1 - p (in steps of 2^-16).
    Channels 2j and 2j + 1 take the two halves of one hash.
    """
    pair = torch.arange(-(-channels // 2), dtype=torch.int32, device=keys.device) * (0x9E3779B9 - 2**32)
    bits = _mix(keys[:, None] ^ pair)
    halves = torch.stack((bits & 0xFFFF, (bits >> 16) & 0xFFFF), dim=2).flatten(1)
    return halves[:, :channels] >= round(p * 2**16)


class NF4(NamedTuple):
    """The tensors of one NF4 matrix [out, in] in blocks of 64, as bitsandbytes keeps them (lora/quant.py tells what
    they mean). Sizes that do not divide are rounded up.

    Weight number e, row by row, is table[code_e] * absmax_{e // 64}, where absmax_b = table2[code2_b] *
    absmax2_{b // 256} + mean. Two codes share a byte, the first in its high half.
    """

    codes: Tensor  # uint8 [out * in / 2]
    table: Tensor  # fp32 [16]
    code2: Tensor  # uint8 [out * in / 64]
    table2: Tensor  # fp32 [256]
    absmax2: Tensor  # fp32 [out * in / 64 / 256]
    mean: Tensor  # fp32 []


def expand_nf4(weight: NF4, out: Tensor) -> Tensor:
    """Writes the weight to `out` [out, in], whose rows may lie apart: fp32 products, rounded once. Returns `out`."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=1).view(-1)[: out.numel()]
    absmax2 = weight.absmax2.repeat_interleave(256)[: len(weight.code2)]
    absmax = weight.table2[weight.code2.int()] * absmax2 + weight.mean
    return out.copy_((weight.table[codes.int()] * absmax.repeat_interleave(64)[: len(codes)]).view(out.shape))


class FrozenLinear(Protocol):
    """A weight that never learns, however it is stored."""

    shape: torch.Size  # (out, in)
    nf4: NF4 | None  # its tensors, for a kernel that expands them itself; None: take dense()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""


class LowRank(NamedTuple):
    """The update s B A of one linear: the fp32 leaves that learn, and the same numbers in the compute dtype.

    `a.grad` and `b.grad` must be there, fp32: a backward pass adds to them where they stand, without a copy between.
    """

    a: Tensor  # fp32 [r, in]
    b: Tensor  # fp32 [out, r]
    a_shadow: Tensor  # compute dtype [r, in]
    b_shadow: Tensor  # compute dtype [out, r]


class Normed(NamedTuple):
    """rms_norm(x) as the input of linears. Who reads it can keep the stream x, which is kept anyway, in its place."""

    x: Tensor  # [T, n], the residual stream
    weight: Tensor  # [n], frozen
    eps: float


class Gated(NamedTuple):
    """silu(gate) * up as the input of a linear, made again where it is needed again. Who hands gate and up over gives
    them away: a backward pass may leave their gradients in their places."""

    gate: Tensor  # [T, n]
    up: Tensor  # [T, n]


Source = Tensor | Normed | Gated


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b to be added to an fp32 gradient: handed over in fp32 where the hardware can."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += wide_product(a, b), without a copy between where the hardware can."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale * a @ b, scaled before it is rounded."""
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


class Projections(torch.autograd.Function):
    """y_i = x W_i^T + u_i B_i^T [+ residual] with u_i = s m(x) A_i^T, for linears that read the same x; m is dropout.

    With v_i = s dy_i B_i:   dx = sum_i dy_i W_i + m(sum_i v_i A_i),   dA_i += v_i^T m(x),   dB_i += dy_i^T u_i.
    W_i is frozen: expanded when needed, used, thrown away, and never differentiated. Saved: m(x) and the skinny u_i.
    Linears without an update take part with u_i = 0. All A_i stand under each other, so one product makes every u_i
    and one makes every dA_i; and one mask serves them, since they see one input.
    """

    @staticmethod
    def forward(ctx, x, residual, frozen, updates, scale, p, keys, hollow, *leaves):
        held = [update for update in updates if update is not None]
        ctx.frozen, ctx.updates, ctx.scale, ctx.p = frozen, updates, scale, p
        if hollow:
            ys = [x.new_empty(len(x), linear.shape[0]) for linear in frozen]
        elif residual is None:
            ys = [x @ linear.dense(x.dtype).t() for linear in frozen]
        else:
            ys = [torch.addmm(residual, x, frozen[0].dense(x.dtype).t())]
        u = None
        if held:
            a, x = torch.cat([update.a_shadow for update in held]), _dropout(x, keys, p)
            u = scaled_product(x, a.t(), scale, x.new_empty(len(x), len(a)))
            parts = iter(u.split([len(update.a) for update in held], dim=1))
            for y, update in zip(ys, updates, strict=True):
                if update is not None and not hollow:
                    y.addmm_(next(parts), update.b_shadow.t())
        # Without a gradient to make, x need not outlive this call.
        ctx.save_for_backward(x if held else None, u, keys)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, u, keys = ctx.saved_tensors
        held = [(dy, update) for dy, update in zip(dys, ctx.updates, strict=True) if update is not None]
        if held:
            a = torch.cat([update.a_shadow for _, update in held])
            ranks = [update.a.shape[0] for _, update in held]
            v = torch.empty_like(u)
            for (dy, update), u_i, v_i in zip(held, u.split(ranks, dim=1), v.split(ranks, dim=1), strict=True):
                scaled_product(dy, update.b_shadow, ctx.scale, v_i)
                add_product(update.b.grad, dy.t(), u_i)
            for (_, update), da_i in zip(held, wide_product(v.t(), x).split(ranks), strict=True):
                update.a.grad += da_i
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _dropout(v @ a, keys, ctx.p) if held else None
            for dy, linear in zip(dys, ctx.frozen, strict=True):
                weight = linear.dense(dy.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        # The gradients of the leaves are where they belong already.
        return dx, dys[0] if ctx.needs_input_grad[1] else None, *[None] * (6 + 2 * len(held))


def _dropout(x: Tensor, keys: Tensor | None, p: float) -> Tensor:
    """m(x): a kept input is scaled by 1 / (1 - p); linear in x, so the same function serves backward."""
    return x if p == 0 else x * dropout_mask(keys, x.shape[1], p) / (1 - p)


def projections(
    source: Source,
    frozen: Sequence[FrozenLinear],
    updates: Sequence[LowRank | None],
    scale: float = 1.0,
    p: float = 0.0,
    keys: Tensor | None = None,
    residual: Tensor | None = None,
    hollow: bool = False,
) -> list[Tensor]:
    """The LoRA linear (Hu et al. 2021, eq. 3) for several linears that read the same input.

    source [T, in]; frozen weights [out_i, in]; updates of rank r, None where a linear has none; scale s = alpha / r;
    dropout p on the low-rank input alone, its mask drawn from keys int32 [T] -> a list of [T, out_i]. If the source is
    `Normed`, its stream stands before them in the list: who goes on with that one lets both gradients of the stream be
    added where they are made. residual [T, out] is added to the output, if there is just one linear. `hollow` outputs
    have a gradient but no values: that is enough where a forward pass is run again for the sake of backward.
    """
    leaves = [leaf for update in updates if update is not None for leaf in (update.a, update.b)]
    stream = []
    if isinstance(source, Normed):
        *stream, source = RMSNorm.apply(*source)
    elif isinstance(source, Gated):
        source = SwiGLU.apply(*source)
    return [*stream, *Projections.apply(source, residual, frozen, updates, scale, p, keys, hollow, *leaves)]


# Rows of logits held at a time: enough for a good matmul, which reads the whole head for them.
_LOGIT_ROWS = 512
# Rows of them that are in fp32 at a time: what a softmax goes over several times should stay in a CPU's cache.
_SOFTMAX_ROWS = 32


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, d_hidden: Tensor | None = None) -> Tensor:
    """-log softmax(hidden head^T)[target] for each row, in nats; logits exist for a few rows at a time.

    hidden [S, n], head [vocabulary, n], targets int64 [S] -> fp32 [S]. With d_hidden [S, n], the gradient of the sum of
    losses is written there on the way: d logits = softmax - one_hot, d hidden = d logits @ head.
    """
    head = head.to(hidden.dtype)
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    logit_rows = hidden.new_empty(min(_LOGIT_ROWS, len(targets)), len(head))
    wide_rows = torch.empty(_SOFTMAX_ROWS, len(head), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        logits = torch.mm(hidden[rows], head.t(), out=logit_rows[: len(hidden[rows])])
        parts = (x.split(_SOFTMAX_ROWS) for x in (logits, targets[rows, None], losses[rows, None]))
        for logit, target, loss in zip(*parts, strict=True):
            wide = wide_rows[: len(logit)].copy_(logit)
            target_logit, top = wide.gather(1, target), wide.amax(dim=1, keepdim=True)
            probability = torch.softmax(wide, dim=1, out=wide)
            # The largest probability is exp(top - log sum exp): no second pass over the exponentials.
            loss.copy_(top - probability.amax(dim=1, keepdim=True).log() - target_logit)
            if d_hidden is not None:
                logit.copy_(probability.scatter_add_(1, target, torch.full_like(target_logit, -1.0)))
        if d_hidden is not None:
            torch.mm(logits, head, out=d_hidden[rows])
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """The head is frozen: the only gradient is that of `hidden`, ready before the logits are thrown away.

    token_losses: this file's, or another with its signature.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, token_losses) -> Tensor:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = token_losses(hidden, head, targets, d_hidden)
        ctx.save_for_backward(d_hidden)
        return losses.sum()

    @staticmethod
    def backward(ctx, d_sum: Tensor):
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_sum.to(d_hidden.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of `token_losses`, differentiable in hidden. hidden [S, n], head [vocabulary, n], targets [S] -> fp32 []."""
    return LinearCrossEntropy.apply(hidden, head, targets, token_losses)


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that a byte of 8-bit optimiser state stands for, ascending, fp32 (Dettmers et al. 2022)."""
    from bitsandbytes.functional import create_dynamic_map  # takes seconds to load

    return create_dynamic_map(signed).to(device)


def adamw8bit(
    flat: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    lr: float,
    weight_decay: float,
    grad_scale: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step of AdamW in place, with state in 8 bits (lora/optim.py). This one is bitsandbytes' own.

    flat, grad fp32 [n], n a multiple of 256; state: step (of this step, from 1 on), m, v uint8 [n], m_absmax, v_absmax
    fp32 [n / 256]. The gradient is taken times grad_scale.
    """
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    optimizer_update_8bit_blockwise(
        "adam", grad, flat, state["m"], state["v"], *betas, 0.0, 0.0, eps, int(state["step"]), lr,
        dynamic_map(True, flat.device), dynamic_map(False, flat.device), state["m_absmax"], state["v_absmax"],
        weight_decay, grad_scale,
    )  # fmt: skip
