"""Our logits against transformers', in fp32: architectures, rope beyond its range, packing, folders that it wrote."""

from pathlib import Path

import pytest
import torch
from tiny import LLAMA3_ROPE, load, logits, random_ids, tiny_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from lora.build import is_quantised
from lora.checkpoint import Weights
from lora.model import packed

# Heads, head size and rope of the real models; fewer layers, a narrow MLP and a small vocabulary.
SHAPES = {
    "Llama-3.2-1B": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "Llama-3.2-3B": {"hidden_size": 384, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128},
    "Llama-3.1-8B": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128},
    "SmolLM2": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
}
for shape in SHAPES.values():
    shape |= {"intermediate_size": 448, "vocab_size": 517, "max_position_embeddings": 131072}
SHAPES["Llama-3.2-1B"]["rope_parameters"] = SHAPES["Llama-3.2-3B"]["rope_parameters"] = LLAMA3_ROPE
SHAPES["Llama-3.1-8B"] |= {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False}
SHAPES["SmolLM2"] |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}

LENGTHS = (1, 19, 19, 40)
IDS = random_ids(LENGTHS, 517)
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), **SHAPES[request.param])


@torch.no_grad()
def theirs(model: LlamaForCausalLM, positions: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' logits of each example of IDS by itself, one after the other [T, vocabulary]."""
    examples = IDS.split(LENGTHS)
    at = [torch.arange(length) for length in LENGTHS] if positions is None else positions.split(LENGTHS)
    return torch.cat([model(x[None], position_ids=p[None]).logits[0] for x, p in zip(examples, at, strict=True)])


def reference(folder: Path, **settings) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def test_packed(folder):
    """Examples back to back in one row here, one by one there."""
    torch.testing.assert_close(logits(load(folder), IDS, LENGTHS), theirs(reference(folder)), **CLOSE)


@pytest.mark.parametrize("start", [8_150, 100_000])
def test_beyond_the_original_range(folder, start):
    """Around and far past position 8,192, distances between tokens included."""
    model, positions = load(folder), start + torch.cat([7 * torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        mine = model(IDS, positions, packed(LENGTHS)) @ model.head.t()
    torch.testing.assert_close(mine, theirs(reference(folder), positions), **CLOSE)


def test_long_example(tmp_path):
    """Attention reaches past the original range: here 64 positions of 400."""
    rope = LLAMA3_ROPE | {"original_max_position_embeddings": 64}
    folder = tiny_folder(tmp_path, **SHAPES["Llama-3.2-1B"] | {"rope_parameters": rope})
    ids = random_ids((400,), 517)
    with torch.no_grad():
        want = reference(folder)(ids[None]).logits[0]
    torch.testing.assert_close(logits(load(folder), ids, (400,)), want, **CLOSE)


def test_old_spelling_of_rope(tmp_path):
    """`rope_theta` and `rope_scaling`, as in Llama 3.2's own config.json."""
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = {"rope_parameters": None, "rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": scaling}
    new_folder = tiny_folder(tmp_path / "new", **SHAPES["Llama-3.2-1B"])
    old_folder = tiny_folder(tmp_path / "old", **SHAPES["Llama-3.2-1B"] | old)
    mine = logits(load(old_folder), IDS, LENGTHS)
    torch.testing.assert_close(mine, theirs(reference(old_folder)), **CLOSE)
    assert torch.equal(mine, logits(load(new_folder), IDS, LENGTHS))


@pytest.mark.parametrize("shape", ["Llama-3.2-1B", "Llama-3.1-8B"])
def test_sharded_folder(tmp_path, shape):
    model = reference(tiny_folder(tmp_path / "whole", **SHAPES[shape]))
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(load(tmp_path / "shards"), IDS, LENGTHS), theirs(model), **CLOSE)


@pytest.mark.parametrize("shape", ["Llama-3.2-1B", "Llama-3.1-8B"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_bnb_4bit_folder(tmp_path, shape, double):
    """Quantised and saved by transformers: the same codes here, and logits as its own expanded weights give them."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = tiny_folder(tmp_path / "plain", **SHAPES[shape])
    model = reference(plain, quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "4bit")
    assert is_quantised(tmp_path / "4bit")
    mine = load(tmp_path / "4bit", "nf4")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(mine.get_submodule(name).codes, Weights(tmp_path / "4bit")[f"{name}.weight"])
    got = logits(mine, IDS, LENGTHS)
    # Expanded, because bitsandbytes multiplies 4-bit weights in bf16 on some CPUs, whatever the compute dtype.
    torch.testing.assert_close(got, theirs(model.dequantize(torch.float32)), **CLOSE)
    torch.testing.assert_close(logits(load(tmp_path / "4bit"), IDS, LENGTHS), got, **CLOSE)
    if double:
        assert torch.equal(logits(load(plain, "nf4"), IDS, LENGTHS), got), "our own codes are others"
