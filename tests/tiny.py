"""A tiny random Llama as a Hugging Face folder, and what several test files do with it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.build import build_model
from lora.errors import UserError
from lora.model import Llama, packed

CPU = torch.device("cpu")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_config(**overrides) -> dict:
    """CONFIG with changes; None takes a key out."""
    return {name: value for name, value in (CONFIG | overrides).items() if value is not None}


def tiny_weights(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random fp32 weights under their Hugging Face names; each is large enough to matter in the logits."""
    n, mlp, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = d * config["num_attention_heads"], d * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], n), "model.norm.weight": (n,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], n)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (n,),
            "self_attn.q_proj": (q, n),
            "self_attn.k_proj": (kv, n),
            "self_attn.v_proj": (kv, n),
            "self_attn.o_proj": (n, q),
            "post_attention_layernorm": (n,),
            "mlp.gate_proj": (mlp, n),
            "mlp.up_proj": (mlp, n),
            "mlp.down_proj": (n, mlp),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=draw)
        weights[name] = 1 + drawn / 10 if len(shape) == 1 else drawn / shape[1] ** 0.5
    return weights


def tiny_folder(path: Path, **overrides) -> Path:
    """Writes config.json, generation_config.json and model.safetensors; overrides are those of `tiny_config`."""
    config = tiny_config(**overrides)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    save_file(tiny_weights(config), path / "model.safetensors", {"format": "pt"})
    return path


def load(folder: Path, quant: str = "none", dtype: torch.dtype = torch.float32) -> Llama:
    return build_model(folder, quant, dtype, CPU)


def random_ids(lengths: Sequence[int], vocabulary: int = CONFIG["vocab_size"], seed: int = 0) -> Tensor:
    """Packed token ids [sum of lengths]."""
    return torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def run(model: Llama, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Normalised hidden states [T, hidden] of packed examples."""
    return model(ids, torch.cat([torch.arange(n) for n in lengths]), packed(lengths))


def logits(model: Llama, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, vocabulary], without gradients."""
    with torch.no_grad():
        return run(model, ids, lengths) @ model.head.t()


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal shapes, and no element further off than `tolerance` times the largest wanted one."""
    assert got.shape == want.shape, f"{name} is {list(got.shape)}, not {list(want.shape)}"
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name} is off by {error:.1e} of its largest element, {tolerance:.0e} is allowed"


def problems(call: Callable, *args) -> list[str]:
    """The lines of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*args)
    return caught.value.problems
