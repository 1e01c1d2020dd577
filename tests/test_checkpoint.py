"""lora/checkpoint.py: folders that other programs wrote, adapters, and the checkpoints of a run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG, LLAMA3_ROPE, problems, tiny_config, tiny_folder, tiny_weights

from lora import checkpoint
from lora.config import LINEARS, LoraConfig
from lora.model import Llama3Rope, LlamaConfig

PREFIX = "base_model.model.model.layers.0."
ADAPTER = {
    f"{PREFIX}self_attn.q_proj.lora_A.weight": torch.ones(4, 64),
    f"{PREFIX}self_attn.q_proj.lora_B.weight": torch.ones(64, 4),
    f"{PREFIX}mlp.down_proj.lora_A.weight": torch.ones(4, 96),
    f"{PREFIX}mlp.down_proj.lora_B.weight": torch.ones(64, 4),
}
LORA = LoraConfig(rank=4, alpha=8, dropout=0.05, rslora=True, target_modules=("q_proj", "down_proj"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_config(folder: Path, text: str | None = None, **overrides) -> Path:
    (folder / "config.json").write_text(text or json.dumps(tiny_config(**overrides)))
    return folder


def written_adapter(folder: Path, tensors=None, **changes) -> Path:
    """ADAPTER in PEFT's format, with other tensors and changes to its adapter_config.json; None takes a key out."""
    checkpoint.save_adapter(folder, tensors or ADAPTER, LORA, "base")
    described = json.loads((folder / "adapter_config.json").read_text()) | changes
    described = {key: value for key, value in described.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


# --- config.json ---


def test_read_config(tmp_path):
    want = LlamaConfig(130, 64, 96, 2, 4, 2, 16, 1e-5, 10000.0, None, tied=True)
    assert checkpoint.read_config(write_config(tmp_path)) == want


def test_read_config_defaults(tmp_path):
    """What an old Llama's config.json leaves out: one key head a query head, head_dim from the width, untied."""
    left_out = ["num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "rms_norm_eps"]
    config = checkpoint.read_config(write_config(tmp_path, **dict.fromkeys([*left_out, "hidden_act"])))
    assert (config.num_kv_heads, config.head_dim, config.tied) == (4, 16, False)
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (10000.0, None, 1e-6)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
def test_read_config_rope(tmp_path, spelling):
    if spelling == "rope_parameters":
        written = {"rope_parameters": LLAMA3_ROPE}
    else:
        scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
        if spelling == "type":
            scaling["type"] = scaling.pop("rope_type")
        written = {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": scaling}
    config = checkpoint.read_config(write_config(tmp_path, **written))
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)


def test_read_config_problems(tmp_path):
    """Everything that this trainer has not, in one go."""
    found = problems(
        checkpoint.read_config,
        write_config(
            tmp_path,
            model_type="qwen2",
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e4},
            hidden_act="gelu",
            attention_bias=True,
            mlp_bias=True,
            vocab_size=None,
            hidden_size="big",
            num_hidden_layers=0,
        ),
    )
    wanted = ["'qwen2'", "'yarn'", "'gelu'", "attention has biases", "MLP has biases"]
    wanted += ["vocab_size", "hidden_size", "num_hidden_layers"]
    assert len(found) == len(wanted)
    for problem, word in zip(found, wanted, strict=True):
        assert word in problem
        assert str(tmp_path / "config.json") in problem


def test_read_config_rope_without_theta(tmp_path):
    config = checkpoint.read_config(write_config(tmp_path, rope_parameters={"rope_type": "default"}, rope_theta=3e4))
    assert config.rope_theta == 3e4


def test_read_config_of_a_broken_folder(tmp_path):
    """Numbers that are missing or cannot be true are told here, not met as a traceback later."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": None}
    found = problems(checkpoint.read_config, write_config(tmp_path, rope_parameters=rope, num_key_value_heads=3))
    wanted = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "num_key_value_heads"]
    assert len(found) == len(wanted)
    for problem, word in zip(found, wanted, strict=True):
        assert word in problem


# --- stop ids and weights ---


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [({"eos_token_id": [2, 3]}, 9, [2, 3]), ({"eos_token_id": 2}, 9, [2]), ({}, 9, [9]), (None, [7, 8], [7, 8])],
)
def test_stop_ids(tmp_path, generation, config, ids):
    write_config(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoint.stop_ids(tmp_path) == ids


def test_no_stop_ids(tmp_path):
    (problem,) = problems(checkpoint.stop_ids, write_config(tmp_path, eos_token_id=None))
    assert problem.startswith("no eos_token_id")


def sharded(folder: Path) -> Path:
    """The folder's tensors over three files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_weights(tmp_path, shards):
    folder = tiny_folder(tmp_path)
    weights = checkpoint.Weights(sharded(folder) if shards > 1 else folder)
    want = tiny_weights(CONFIG)
    assert set(weights) == set(want)
    assert len(weights) == len(want)
    for name, tensor in want.items():
        assert torch.equal(weights[name], tensor), name
    assert "model.nothing" not in weights


def test_broken_weights(tmp_path):
    """A file that is not there, one that is cut off, and an index that names no files."""
    folder = sharded(tiny_folder(tmp_path))
    part = folder / "model-00002-of-00003.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert str(part) in problems(checkpoint.Weights, folder)[0]
    part.unlink()
    assert str(part) in problems(checkpoint.Weights, folder)[0]
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert str(index) in problems(checkpoint.Weights, folder)[0]


# --- adapters ---


def test_adapter_round_trip(tmp_path):
    checkpoint.save_adapter(tmp_path, ADAPTER, LORA, "some/base")
    tensors, config = checkpoint.load_adapter(tmp_path)
    assert config == LORA
    assert tensors.keys() == ADAPTER.keys()
    for name, tensor in ADAPTER.items():
        assert torch.equal(tensors[name], tensor), name
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "some/base"
    assert described["r"] == 4
    assert described["use_rslora"] is True


def test_views_of_one_buffer_are_saved_alone(tmp_path):
    """The adapter's tensors share one storage; the file holds each once and no padding."""
    flat = torch.arange(1024.0)
    tensors = {name: flat[256 * i :][: 4 * 16].view(4, 16) for i, name in enumerate(ADAPTER)}
    checkpoint.save_adapter(tmp_path, tensors, LORA, "base")
    loaded, _ = checkpoint.load_adapter(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 4 * 4 * 16 + 2000


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is set"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is set"),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3', not LORA"),
        ({"bias": "all"}, "it trains biases"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_adapters(tmp_path, changes, why):
    """What would change the numbers, and this trainer has not."""
    (problem,) = problems(checkpoint.load_adapter, written_adapter(tmp_path, **changes))
    assert problem.startswith(why)
    assert str(tmp_path / "adapter_config.json") in problem


def test_refused_adapters_list_all(tmp_path):
    tensors = ADAPTER | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64), "stray": torch.ones(1)}
    folder = written_adapter(tmp_path, tensors, use_dora=True, bias="lora_only")
    found = "\n".join(problems(checkpoint.load_adapter, folder))
    for word in ("use_dora", "biases", "lm_head", "stray"):
        assert word in found


def test_missing_adapter_files(tmp_path):
    assert "adapter_config.json" in problems(checkpoint.load_adapter, tmp_path)[0]
    written_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    assert "adapter_model.safetensors" in problems(checkpoint.load_adapter, tmp_path)[0]
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in problems(checkpoint.load_adapter, tmp_path)[0]


def test_target_modules_come_from_the_tensors(tmp_path):
    """PEFT may store "all-linear" or a pattern; what the file holds is what counts, in our order."""
    _, config = checkpoint.load_adapter(written_adapter(tmp_path, target_modules="all-linear"))
    assert config.target_modules == ("q_proj", "down_proj")
    assert set(config.target_modules) <= set(LINEARS)


# --- checkpoints of a run ---


def test_checkpoints(tmp_path):
    """By step as a number; folders without meta.json, strays and other names do not count."""
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-best", ".checkpoint-7.123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    (tmp_path / "checkpoint-50").mkdir()
    found = checkpoint.checkpoints(tmp_path)
    assert list(found.items()) == [(step, tmp_path / f"checkpoint-{step}") for step in (9, 10, 100)]
    checkpoint.remove(found[10])
    assert list(checkpoint.checkpoints(tmp_path)) == [9, 100]


def test_state_round_trip(tmp_path):
    tensors = {"m": torch.arange(256, dtype=torch.uint8), "step": torch.tensor(3), "v": torch.rand(3)}
    meta = {"step": 3, "best": 0.1 + 0.2, "rng": [1, 2**40]}
    checkpoint.save_state(tmp_path, tensors, meta)
    loaded, described = checkpoint.load_state(tmp_path)
    assert described == meta
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype, name


def test_export(tmp_path):
    """The best checkpoint's adapter becomes the run's, again and again."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoint.save_adapter(folder, {name: step * tensor for name, tensor in ADAPTER.items()}, LORA, "base")
        checkpoint.export(folder, tmp_path)
        tensors, config = checkpoint.load_adapter(tmp_path)
        assert config == LORA
        assert all((tensor == step).all() for tensor in tensors.values())
    assert names(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "checkpoint-1", "checkpoint-2"]
