"""The one place that knows model, frozen weights and adapter together: from a folder on disk to something that
computes.

A base weight goes from the file to its device and into its final form one at a time, so loading an 8B model in NF4
needs the memory of the 4-bit model and one weight, never that of the 16-bit model.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.adapter import Adapter, targets_of
from lora.checkpoint import Weights, load_adapter, read_config
from lora.config import LINEARS, LoraConfig
from lora.errors import UserError
from lora.model import Linear, Llama, LlamaConfig
from lora.quant import NF4Linear, nf4_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """`--device` as a device that is really there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UserError("there is no such device", f"--device {name}", "give cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"CUDA GPUs that are there: {torch.cuda.device_count()}"
        raise UserError(there, f"--device {name}", "give a device that is there, or auto")
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--dtype` as a dtype. auto: bf16 where the hardware has it natively, fp16 on GPUs without it, fp32 elsewhere."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        # Ampere (8.0) was the first with bf16; PyTorch's own test also accepts older cards, which emulate it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    native = x86 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def is_quantised(folder: Path) -> bool:
    """Whether the folder's weights are 4-bit already (a `...-bnb-4bit` model)."""
    return any(".quant_state." in name for name in Weights(folder))


def build_model(
    folder: Path, quant: str, dtype: torch.dtype, device: torch.device, kept: torch.dtype | None = None
) -> Llama:
    """The model of a Hugging Face folder, frozen, on `device`, computing in `dtype`.

    quant "nf4": the blocks' linears are kept as NF4 codes, quantised here or as the folder has them; "none": they are
    kept in `kept` (default: dtype), like embeddings, head and norms, which are never quantised. Raises UserError that
    lists all missing, unknown and misshapen weights.
    """
    kept = kept or dtype
    weights = Weights(folder, str(device))
    with torch.device("meta"):
        model = Llama(read_config(folder), dtype)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    linears = targets_of(model, LINEARS)
    parts = _parts(weights, linears)
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    known = {*wanted, "lm_head.weight", *(name for names in parts.values() for name in names)}
    problems += [f"{name} is not part of a Llama" for name in weights if name not in known and "rotary_emb" not in name]

    for name, shape in wanted.items():
        if name not in weights:
            continue
        linear = name.removesuffix(".weight")
        if len(parts.get(linear, ())) > 1:
            part = {p.removeprefix(linear + "."): weights[p] for p in parts[linear]}
            if why := nf4_of(part):
                problems.append(f"{name} is {why}")
                continue
            frozen = NF4Linear.from_parts(part)
            made = frozen if quant == "nf4" else _plain(frozen.dense(kept))
        else:
            tensor = weights[name]
            if tensor.shape != shape:
                problems.append(f"{name} is {list(tensor.shape)}, config.json says {list(shape)}")
                continue
            if tensor.dtype not in _DTYPES.values():
                problems.append(f"{name} is {tensor.dtype}, not a 16- or 32-bit number")
                continue
            if linear in linears:
                made = NF4Linear.quantise(tensor) if quant == "nf4" else _plain(tensor.to(kept))
            else:
                made = nn.Parameter(tensor.to(kept), requires_grad=False)
                linear = name
        if (got := tuple(made.shape)) != tuple(shape):
            problems.append(f"{name} is {list(got)}, config.json says {list(shape)}")
            continue
        owner, _, leaf = linear.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made)
    how = "give a complete folder of one Llama model"
    UserError.raise_all(UserError(problem, str(folder), how) for problem in problems)
    return model


def _parts(weights: Weights, linears: dict[str, nn.Module]) -> dict[str, list[str]]:
    """The names that belong to each linear: `weight` alone, or the codes and what bitsandbytes keeps beside them."""
    parts: dict[str, list[str]] = {}
    for name in weights:
        linear = name.partition(".weight")[0]
        if linear in linears:
            parts.setdefault(linear, []).append(name)
    return parts


def _plain(weight: Tensor) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def load_into(model: Llama, folder: Path) -> Adapter:
    """The adapter of a folder, made for `model` and wrapped around it; UserError lists what does not fit."""
    tensors, config = load_adapter(folder)
    adapter = Adapter(model, config, seed=0)
    mine = adapter.tensors()
    problems = [f"{name} is missing" for name in mine if name not in tensors]
    problems += [f"{name} fits no linear of this model" for name in tensors if name not in mine]
    for name in mine.keys() & tensors.keys():
        if mine[name].shape != tensors[name].shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, this model needs {list(mine[name].shape)}")
    how = "give the model that the adapter was trained on"
    UserError.raise_all(UserError(problem, str(folder), how) for problem in problems)
    adapter.load(tensors)
    adapter.wrap(model)
    return adapter


# More tokens in a pass make no GEMM faster, and a CPU's caches like fewer.
_MOST_TOKENS = {"cuda": 16384, "cpu": 4096}


def saved_bytes(config: LlamaConfig, rank: int, dtype: torch.dtype, recompute: str) -> int:
    """What one token leaves behind for the backward pass, in bytes, over all blocks.

    A block saves: the residual stream and its normalised form, twice; q, k, v and the attention's output; gate, up and
    their product; and the skinny products x A^T of its seven linears. With recompute "mlp" nothing of the MLP but its
    input, with "block" only the block's input; and one at a time the rest. Not counted: the probabilities of short
    examples, at most a quarter more. That is the reference; the fused ops keep a third less, which leaves room for what
    graphs of several sizes hold.
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp = 3 * (config.intermediate_size + rank)
    block = 4 * config.hidden_size + heads + mlp + (len(LINEARS) - 3) * rank
    kept, again = {"none": (block, 0), "mlp": (block - mlp, mlp), "block": (config.hidden_size, block)}[recompute]
    # In the backward pass one block's gradients stand beside its activations.
    return (config.num_layers * kept + again + 2 * block) * dtype.itemsize


def let_memory_grow() -> None:
    """Lets PyTorch's segments of GPU memory grow in place. To be called before CUDA starts, for PyTorch reads this
    setting once; one that the user made is kept.

    Packs differ in size, and so do graphs. A segment of fixed size that one of them leaves free is often a little too
    small for the next, which then takes a new one: half as much memory again.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Asks the C library to keep what a step frees for the next one. By default glibc hands large blocks back to the
    kernel, and the next step waits for fresh pages, zeroed one by one: 3 to 5 % of a step on lists of different
    lengths. Where there is no `mallopt` nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take, in bytes, or None where the system does not tell. A container's own limit is
    not seen: there, say --micro-batch-tokens."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def choose_micro_batch_tokens(model: Llama, lora: LoraConfig) -> int:
    """Tokens in one pass, from the memory that is free once model, adapter and optimiser are there; at least 256."""
    device = model.head.device
    most = _MOST_TOKENS[device.type]
    free = free_bytes(device)
    if free is None:
        return most
    # The rest is for 512 rows of logits, one expanded weight, and the allocator.
    fitting = int(0.7 * free / saved_bytes(model.config, lora.rank, model.dtype, model.recompute))
    return max(256, min(most, fitting // 256 * 256))
