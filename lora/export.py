"""From an adapter to a model that stands alone: fold, write, read back, and prove that it still says the same.

The adapter is folded into the base's *16-bit* weights. Folding into the 4-bit weights that it was trained on and
rounding again would write a third model, neither the base nor the one trained. How the sum is rounded to 16 bits is
the subject of `adapter.round_unbiased`; what that loses is measured: the written folder is read back and compared,
token by token in fp32 arithmetic, with the base plus the adapter unmerged.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.data import Pack
from lora.files import read_json, write_json
from lora.model import Llama, packed

SHARD_BYTES = 5 * 10**9
MAX_KL, MIN_TOP1 = 5e-3, 0.98
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in order, cut into groups of at most `limit` bytes (or one tensor)."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def write_model(model: Llama, source: Path, files: Sequence[Path], out: Path, limit: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face folder into `out`, which is there and empty.

    model: plain weights in the dtype to write; a tied head is one tensor and is written once. source: the folder whose
    config.json and generation_config.json come along; files: the tokenizer's files, template included.
    """
    config = read_json(source / "config.json")
    for stale in ("quantization_config", "torch_dtype"):
        config.pop(stale, None)
    config |= {"dtype": _DTYPE_NAMES[model.head.dtype], "tie_word_embeddings": model.config.tied}
    groups = shards(dict(model.named_parameters()), limit)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        size = sum(tensor.nbytes for group in groups for tensor in group.values())
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    for name, group in zip(names, groups, strict=True):
        save_file({key: tensor.data.contiguous() for key, tensor in group.items()}, out / name, {"format": "pt"})
    write_json(out / "config.json", config)
    for file in (source / "generation_config.json", *files):
        if file.is_file():
            shutil.copyfile(file, out / file.name)


@dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens: mean KL(reference || other) in nats, and how often their first choice agrees."""

    kl: float
    top1: float
    tokens: int

    @property
    def good(self) -> bool:
        return self.kl <= MAX_KL and self.top1 >= MIN_TOP1


def first_of_their_kind(packs: Sequence[Pack]) -> list[Tensor]:
    """bool [T] for each pack: the tokens whose context, all tokens up to them, no earlier example has had.

    Examples often begin alike, with a system turn and the same instruction. The prediction there is one prediction, and
    counting it once for every example would let a handful of near-ties decide.
    """
    seen: set[int] = set()
    marks = []
    for pack in packs:
        mark = []
        for ids in pack.ids.split(pack.lengths):
            # A context is named by the hash of its last token and of the name of the context before.
            contexts = list(accumulate(ids.tolist(), lambda context, token: hash((context, token)), initial=0))[1:]
            mark += [context not in seen for context in contexts]
            seen.update(contexts)
        marks.append(torch.tensor(mark))
    return marks


@torch.no_grad()
def hidden_states(model: Llama, packs: Sequence[Pack]) -> list[Tensor]:
    """The model's normalised hidden states of each pack, [tokens, hidden]: small, where logits would fill the memory.
    Only of the tokens that are `first_of_their_kind`."""
    device = model.head.device
    states = (model(pack.ids.to(device), pack.positions.to(device), packed(pack.lengths)) for pack in packs)
    return [state[mark.to(device)] for state, mark in zip(states, first_of_their_kind(packs), strict=True)]


@torch.no_grad()
def agreement(reference: Sequence[Tensor], other: Sequence[Tensor], head: Tensor, rows: int = 128) -> Agreement:
    """Compares two models' hidden states, [T, hidden] each, through the head that they share, a few rows at a time."""
    kl = top1 = tokens = 0
    wide = head.float()
    for ours, theirs in zip(reference, other, strict=True):
        for start in range(0, len(ours), rows):
            p, q = (torch.log_softmax(x[start : start + rows].float() @ wide.t(), dim=1) for x in (ours, theirs))
            kl += (p.exp() * (p - q)).sum().item()
            top1 += (p.argmax(dim=1) == q.argmax(dim=1)).sum().item()
            tokens += len(p)
    return Agreement(kl / tokens, top1 / tokens, tokens)
