"""Files in and out: base weights, adapters in PEFT's format, and what a run needs to go on after it was stopped.

Everything is safetensors and JSON: loading a file never runs code. A checkpoint appears whole or not at all (files.py).

    checkpoint-<step>/
      adapter_model.safetensors    every A and B, fp32, under PEFT's names
      adapter_config.json
      training_state.safetensors   the optimiser's tensors
      meta.json                    step, best score, counts, loss scale (`State` in loop.py)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.config import LINEARS, LoraConfig
from lora.errors import UserError
from lora.files import read_json, replace_file
from lora.model import Llama3Rope, LlamaConfig

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Settings of PEFT's LoRA that change what an adapter computes, and that this trainer has not.
_EXTRAS = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication", "lora_bias",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
    "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip


# --- base weights -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> LlamaConfig:
    """config.json of a Hugging Face folder -> the shape of the model; UserError lists all that this trainer has not."""
    where = folder / "config.json"
    raw = read_json(where)
    # Two spellings: `rope_parameters` holds all since transformers 5, `rope_theta` and `rope_scaling` before.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []

    def need(what: str, holds: bool) -> None:
        if not holds:
            problems.append(UserError(what, str(where), "give a Llama model: Llama 2 to 3.3, SmolLM2, TinyLlama, ..."))

    need(f"the model is of type {raw.get('model_type')!r}, not llama", raw.get("model_type") == "llama")
    need(f"rope of type {kind!r} is not known here", kind in ("default", "llama3"))
    need(f"activation {raw.get('hidden_act')!r}, not silu", raw.get("hidden_act", "silu") == "silu")
    method = (raw.get("quantization_config") or {}).get("quant_method")
    need(f"its weights are quantised by {method}", method in (None, "bitsandbytes"))
    need("its attention has biases", not raw.get("attention_bias"))
    need("its MLP has biases", not raw.get("mlp_bias"))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in sizes:
        need(f"{name} is missing", isinstance(raw.get(name), int) and raw[name] > 0)
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in stretch if kind == "llama3" else ():
        need(f"{name} is missing from its rope", isinstance(rope.get(name), int | float))
    heads = raw.get("num_attention_heads")
    kv_heads = raw.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads:
        need(f"num_key_value_heads {kv_heads} does not divide {heads} heads", heads % kv_heads == 0)
    UserError.raise_all(problems)
    scaling = Llama3Rope(*(rope[name] for name in stretch)) if kind == "llama3" else None
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        tied=raw.get("tie_word_embeddings", False),
    )


def stop_ids(folder: Path) -> list[int]:
    """The ids that end an answer, by the model's own generation_config.json, else its config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (ids := read_json(folder / name).get("eos_token_id")) is not None:
            return ids if isinstance(ids, list) else [ids]
    raise UserError("no eos_token_id", str(folder / "generation_config.json"), "add the id that ends an answer")


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, one safetensors file or many, each read from disk when it is asked for."""

    def __init__(self, folder: Path, device: str = "cpu"):
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file() and not (folder / names[0]).is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not names:
                raise UserError("no weight_map", str(index), "fetch the file again")
        self._files: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(folder / name, framework="pt", device=device)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot be read: {error}", str(folder / name), "fetch the file again") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


# --- adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: LoraConfig, base: str) -> None:
    """Writes what PEFT's `PeftModel.from_pretrained` reads. tensors: fp32, by PEFT's names; base: its model."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER, {"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": False,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and config of an adapter, ours or PEFT's; UserError lists everything in it that this trainer has not."""
    where = str(folder / ADAPTER_CONFIG)
    raw = read_json(folder / ADAPTER_CONFIG)
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", str(folder / ADAPTER), "give a whole adapter") from None
    problems = [f"{name} is set" for name in _EXTRAS if raw.get(name)]
    problems += [f"{name} is missing" for name in ("r", "lora_alpha") if not isinstance(raw.get(name), int | float)]
    if raw.get("peft_type") != "LORA":
        problems.append(f"an adapter of type {raw.get('peft_type')!r}, not LORA")
    if raw.get("bias", "none") != "none":
        problems.append("it trains biases")
    found, strange = set(), []
    for name in tensors:
        linear = re.fullmatch(rf"{re.escape(_PREFIX)}.*\.({'|'.join(LINEARS)})\.lora_[AB]\.weight", name)
        found.add(linear[1]) if linear else strange.append(name)
    problems += [f"it holds {name}, which is no lora_A or lora_B of a linear" for name in sorted(strange)]
    how = "train plain LoRA on q, k, v, o, gate, up and down"
    UserError.raise_all(UserError(problem, where, how) for problem in problems)
    config = LoraConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        rslora=raw.get("use_rslora", False),
        target_modules=tuple(name for name in LINEARS if name in found),
    )
    return tensors, config


# --- checkpoints of a run ---------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> dict[int, Path]:
    """The whole checkpoints of a run by step, oldest first."""
    found = {}
    for folder in run.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdecimal() and (folder / "meta.json").is_file():
            found[int(step)] = folder
    return dict(sorted(found.items()))


def save_state(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """The part of a checkpoint that only this trainer reads."""
    save_file(tensors, folder / "training_state.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote."""
    path = folder / "training_state.safetensors"
    try:
        return load_file(path), read_json(folder / "meta.json")
    except (OSError, SafetensorError) as error:
        how = "delete that checkpoint to go on from the one before"
        raise UserError(f"cannot be read: {error}", str(path), how) from None


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; it stops counting as one before the first of its files goes."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def export(checkpoint: Path, run: Path) -> None:
    """Makes a checkpoint's adapter the run's adapter, each file in one step."""
    for name in (ADAPTER, ADAPTER_CONFIG):
        replace_file(run / name, checkpoint / name)
