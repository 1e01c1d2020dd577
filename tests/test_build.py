"""lora/build.py: from a folder to a model, and everything that does not fit told at once."""

import json
import os
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CONFIG,
    CPU,
    assert_close,
    load,
    logits,
    problems,
    random_ids,
    run,
    tiny_config,
    tiny_folder,
    tiny_weights,
)

import kernels
from lora import build
from lora.adapter import Adapter
from lora.checkpoint import save_adapter
from lora.config import LoraConfig
from lora.model import Linear, Llama
from lora.quant import NF4Linear

LENGTHS = (3, 8)
IDS = random_ids(LENGTHS)
QUERY = "model.layers.0.self_attn.q_proj"


def with_weights(folder: Path, **changes) -> Path:
    """The folder with some tensors changed, added, or (None) taken out."""
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")
    return folder


def prequantised(folder: Path, quant_type: str = "nf4") -> Path:
    """tiny_folder with the blocks' linears in 4 bits, laid out as transformers does."""
    changes = {}
    for name, weight in load_file(tiny_folder(folder) / "model.safetensors").items():
        if "_proj" in name:
            codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=True)
            changes[name] = codes
            changes |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return with_weights(folder, **changes)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_model(tmp_path, tied, dtype):
    """Every weight under its name, in its dtype; nothing left on the meta device."""
    model = load(tiny_folder(tmp_path, tie_word_embeddings=tied), dtype=dtype)
    weights = tiny_weights(tiny_config(tie_word_embeddings=tied))
    assert dict(model.named_parameters()).keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight.to(dtype)), name
    assert model.dtype == dtype


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_quantised_model(tmp_path, tied):
    model = load(tiny_folder(tmp_path, tie_word_embeddings=tied), "nf4", torch.bfloat16)
    weights = tiny_weights(tiny_config(tie_word_embeddings=tied))
    plain = {name for name, _ in model.named_parameters()}
    assert plain == {name for name in weights if "_proj" not in name}
    for name in weights.keys() - plain:
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(linear.dense(torch.float32), NF4Linear.quantise(weights[name]).dense(torch.float32)), name


def test_kept_in_another_dtype(tmp_path):
    """bf16 weights, fp32 arithmetic: as a model whose weights were rounded to bf16 and widened again."""
    folder = tiny_folder(tmp_path)
    model = build.build_model(folder, "none", torch.float32, CPU, kept=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = load(with_weights(folder, **{name: w.bfloat16().float() for name, w in tiny_weights(CONFIG).items()}))
    mine, want = (kernels.token_losses(run(m, IDS, LENGTHS), m.head, IDS) for m in (model, rounded))
    assert torch.equal(mine, want)


def test_head_of_a_tied_folder(tmp_path):
    """Some folders store the tied head a second time; that is no unknown weight, nor are old rotary buffers."""
    folder = tiny_folder(tmp_path)
    head = tiny_weights(CONFIG)["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert load(with_weights(folder, **{"lm_head.weight": head}, **buffer)).lm_head is None


def test_all_problems_at_once(tmp_path):
    changes = {
        "model.norm.weight": None,
        f"{QUERY}.weight": None,
        "model.layers.2.mlp.up_proj.weight": torch.ones(96, 64),
        f"{QUERY}.bias": torch.ones(64),
        "model.embed_tokens.weight": torch.ones(131, 64),
        "model.layers.1.mlp.down_proj.weight": torch.ones(96, 64),
    }
    wanted = [
        "model.norm.weight is missing",
        f"{QUERY}.weight is missing",
        "model.layers.2.mlp.up_proj.weight is not part of a Llama",
        f"{QUERY}.bias is not part of a Llama",
        "model.embed_tokens.weight is [131, 64], config.json says [130, 64]",
        "model.layers.1.mlp.down_proj.weight is [96, 64], config.json says [64, 96]",
    ]
    folder = with_weights(tiny_folder(tmp_path), **changes)
    for quant in ("none", "nf4"):
        found = problems(load, folder, quant)
        assert sorted(problem.split(" (")[0] for problem in found) == sorted(wanted), quant
        assert all(str(folder) in problem for problem in found)


def test_untied_folder_without_head(tmp_path):
    folder = with_weights(tiny_folder(tmp_path, tie_word_embeddings=False), **{"lm_head.weight": None})
    (problem,) = problems(load, folder)
    assert problem.startswith("lm_head.weight is missing")


# --- 4-bit folders ---


def test_is_quantised(tmp_path):
    assert not build.is_quantised(tiny_folder(tmp_path / "plain"))
    assert build.is_quantised(prequantised(tmp_path / "4-bit"))


def test_prequantised(tmp_path):
    """Taken as it is: the codes of the file, not codes of codes. "none" expands them."""
    folder = prequantised(tmp_path / "4-bit")
    stored = load_file(folder / "model.safetensors")
    model, plain = load(folder, "nf4"), load(folder, "none")
    ours = load(tiny_folder(tmp_path / "plain"), "nf4")
    assert torch.equal(model.get_submodule(QUERY).codes, stored[f"{QUERY}.weight"])
    assert isinstance(plain.get_submodule(QUERY), Linear)
    want = logits(ours, IDS, LENGTHS)
    assert torch.equal(logits(model, IDS, LENGTHS), want)
    assert_close("logits of the expanded model", logits(plain, IDS, LENGTHS), want, 1e-6)


def test_half_quantised(tmp_path):
    """Linears that the folder keeps in 16 bits (llm_int8_skip_modules) are quantised like any other, or kept."""
    folder = prequantised(tmp_path)
    parts = dict.fromkeys(name for name in load_file(folder / "model.safetensors") if name.startswith(f"{QUERY}."))
    weight = tiny_weights(CONFIG)[f"{QUERY}.weight"]
    with_weights(folder, **parts | {f"{QUERY}.weight": weight})
    assert isinstance(load(folder, "nf4").get_submodule(QUERY), NF4Linear)
    assert torch.equal(load(folder, "none").get_submodule(QUERY).weight, weight)


def test_other_quantisations_are_refused(tmp_path):
    found = problems(load, prequantised(tmp_path / "fp4", "fp4"), "nf4")
    assert len(found) == 14
    assert found[0].startswith(f"{QUERY}.weight is quantised as ['fp4'], not nf4")

    folder = tiny_folder(tmp_path / "int8")
    int8 = {f"{QUERY}.weight": torch.ones(64, 64, dtype=torch.int8), f"{QUERY}.SCB": torch.ones(64)}
    assert f"{QUERY}.SCB" in "\n".join(problems(load, with_weights(folder, **int8), "nf4"))


def test_misshapen_prequantised(tmp_path):
    folder = prequantised(tmp_path)
    (folder / "config.json").write_text(json.dumps(tiny_config(intermediate_size=128)))
    found = problems(load, folder, "nf4")
    assert len(found) == 6
    assert found[0].startswith("model.layers.0.mlp.gate_proj.weight is [96, 64], config.json says [128, 64]")


# --- adapter, device, dtype ---


@pytest.fixture
def model(tmp_path) -> Llama:
    return load(tiny_folder(tmp_path / "base"))


def test_load_into(model, tmp_path):
    config = LoraConfig(rank=3, alpha=5, target_modules=("v_proj", "up_proj"))
    adapter = Adapter(model, config, seed=0)
    adapter.load({name: torch.randn(tensor.shape) for name, tensor in adapter.tensors().items()})
    adapter.wrap(model)
    want = logits(model, IDS, LENGTHS)
    save_adapter(tmp_path, adapter.tensors(), config, "base")
    adapter.unwrap(model)
    loaded = build.load_into(model, tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.flat, adapter.flat)
    assert torch.equal(logits(model, IDS, LENGTHS), want)


def test_adapter_that_does_not_fit(model, tmp_path):
    """Missing, surplus and misshapen tensors in one list; the model stays as it was."""
    before = logits(model, IDS, LENGTHS)
    config = LoraConfig(rank=3, target_modules=("v_proj",))
    tensors = dict(Adapter(model, config, seed=0).tensors())
    first, second, third = sorted(tensors)[:3]
    del tensors[first]
    tensors[second] = torch.ones(5, 3)
    tensors[third.replace("layers.1", "layers.9")] = torch.ones(3, 64)
    save_adapter(tmp_path, tensors, config, "base")
    found = "\n".join(problems(build.load_into, model, tmp_path))
    assert f"{first} is missing" in found
    assert f"{second} is [5, 3], this model needs [32, 3]" in found
    assert f"{third.replace('layers.1', 'layers.9')} fits no linear of this model" in found
    assert torch.equal(logits(model, IDS, LENGTHS), before)


def test_choose_device(monkeypatch):
    assert build.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert build.choose_device("auto") == CPU
    for name in ("cuda", "cuda:1"):
        (problem,) = problems(build.choose_device, name)
        assert problem.startswith("CUDA GPUs that are there: 0 (")
    for name in ("tpu", "cuda:", "cuda:x", "cpu:", ""):
        (problem,) = problems(build.choose_device, name)
        assert problem.startswith("there is no such device")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert build.choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_choose_dtype_on_cuda(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert build.choose_dtype("auto", torch.device("cuda")) == dtype


def test_choose_dtype():
    assert build.choose_dtype("auto", CPU) in (torch.bfloat16, torch.float32)
    assert build.choose_dtype("fp16", CPU) == torch.float16
    assert build.choose_dtype("fp32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(
    ("before", "after"), [({}, "expandable_segments:True"), ({"CUDA_": "a:b"}, None), ({"": "a:b"}, "a:b")], ids=str
)
def test_a_setting_of_the_users_is_kept(monkeypatch, before, after):
    for name in ("CUDA_", ""):
        monkeypatch.delenv(f"PYTORCH_{name}ALLOC_CONF", raising=False)
    for name, value in before.items():
        monkeypatch.setenv(f"PYTORCH_{name}ALLOC_CONF", value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    build.let_memory_grow()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == after
