"""lora/model.py by itself: rope's stretch by hand, packing, what is called with what. Numbers: parity/test_model.py."""

import math

import pytest
import torch
from tiny import CONFIG, LLAMA3_ROPE, assert_close, load, logits, random_ids, run, tiny_folder

from lora.adapter import Adapter
from lora.config import LoraConfig
from lora.model import Llama, Llama3Rope, LlamaConfig, packed, project, rope_frequencies

LENGTHS = (1, 7, 7, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Llama:
    return load(tiny_folder(tmp_path_factory.mktemp("model")))


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
    rest = {"num_kv_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": None}
    return LlamaConfig(**shape | rest | {"tied": True} | changes)


def test_rope_frequencies():
    want = [500_000 ** (-2 * j / 64) for j in range(32)]
    assert_close("frequencies", rope_frequencies(config()), torch.tensor(want), 1e-6)


def test_llama3_rope():
    """Planes that turn more than 4 times in 8,192 positions are kept, under once slowed 32 times, else blended."""
    got = rope_frequencies(config(rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192))).tolist()
    seen = set()
    for j, frequency in enumerate(got):
        plain = 500_000 ** (-2 * j / 64)
        turns = 8192 / (2 * math.pi / plain)
        if turns > 4:
            want, case = plain, "kept"
        elif turns < 1:
            want, case = plain / 32, "slowed"
        else:
            share = (turns - 1) / (4 - 1)
            want, case = share * plain + (1 - share) * plain / 32, "blended"
        seen.add(case)
        assert frequency == pytest.approx(want, rel=1e-5), f"plane {j} ({case})"
    assert seen == {"kept", "slowed", "blended"}


def test_packed_equals_one_by_one(model):
    ids = random_ids(LENGTHS)
    whole = logits(model, ids, LENGTHS).split(LENGTHS)
    for i, example in enumerate(ids.split(LENGTHS)):
        assert_close(f"example {i}", whole[i], logits(model, example, (len(example),)), 1e-5)


def test_neighbours_do_not_matter(model):
    """Equal to the bit with other examples of the same lengths around, to rounding with other lengths and orders."""
    ids, others = random_ids(LENGTHS), random_ids(LENGTHS, seed=1)
    alone = logits(model, ids, LENGTHS)[8:15]
    others[8:15] = ids[8:15]
    assert torch.equal(logits(model, others, LENGTHS)[8:15], alone)
    moved = logits(model, torch.cat([ids[15:20], ids[8:15]]), (5, 7))[5:]
    assert_close("the moved example", moved, alone, 1e-5)


def test_positions_count(model):
    """Attention sees distances only, so a shift of all positions changes nothing and a gap changes much."""
    ids = random_ids((12,))
    at = [torch.arange(12), torch.arange(12) + 300, torch.arange(12) * 3]
    start, shifted, spread = (model(ids, positions, packed((12,))) for positions in at)
    assert_close("hidden states at shifted positions", shifted, start, 1e-4)
    assert not torch.allclose(spread, start, atol=1e-2), "positions are not used"


def test_tied_and_untied_head(model, tmp_path):
    assert model.lm_head is None
    assert model.head is model.model.embed_tokens.weight
    untied = load(tiny_folder(tmp_path, tie_word_embeddings=False))
    assert untied.head is untied.lm_head.weight
    assert "lm_head.weight" in dict(untied.named_parameters())


def test_nothing_learns(model):
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_in_its_dtype(tmp_path, dtype):
    ids = random_ids(LENGTHS)
    folder = tiny_folder(tmp_path)
    hidden = run(load(folder, dtype=dtype), ids, LENGTHS)
    assert hidden.dtype == dtype
    assert_close("hidden states", hidden, run(load(folder), ids, LENGTHS), 5e-2)


def test_linears_that_share_an_input_are_called_together(model, monkeypatch):
    calls = []

    def listen(x, *linears, **rest):
        calls.append([names[linear] for linear in linears])
        return project(x, *linears, **rest)

    names = {module: name for name, module in model.named_modules()}
    for block in model.model.layers:
        monkeypatch.setattr(block.self_attn, "project", listen)
        monkeypatch.setattr(block.mlp, "project", listen)
    run(model, random_ids((3,)), (3,))
    groups = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    layers = range(CONFIG["num_hidden_layers"])
    assert calls == [[f"model.layers.{layer}.{name}" for name in group] for layer in layers for group in groups]


def test_each_layer_attends_as_itself(model):
    calls = []

    def attend(layer, q, k, v):
        calls.append((layer, q.shape, k.shape, v.shape))
        return q

    model(random_ids((5,)), torch.arange(5), attend)
    assert calls == [(layer, (5, 4, 16), (5, 2, 16), (5, 2, 16)) for layer in range(CONFIG["num_hidden_layers"])]


def test_recompute_changes_nothing_but_memory(tmp_path):
    """Loss and every gradient, dropout included, are equal to the bit whatever runs again in the backward pass."""
    model = load(tiny_folder(tmp_path, rope_parameters=LLAMA3_ROPE))
    adapter = Adapter(model, LoraConfig(rank=4, dropout=0.2), seed=0)
    adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    adapter.wrap(model)
    ids, results, kept = random_ids(LENGTHS), [], []
    for recompute in ("none", "mlp", "block"):
        model.recompute = recompute
        adapter.grad.zero_()
        saved: dict[int, int] = {}

        def save(x: torch.Tensor, saved=saved) -> torch.Tensor:
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return x

        with adapter.dropping(torch.arange(len(ids), dtype=torch.int32)):
            with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
                hidden = run(model, ids, LENGTHS)
            kept.append(sum(saved.values()))
            hidden.square().sum().backward()
        results.append((hidden.detach(), adapter.grad.clone()))
    for hidden, gradient in results[1:]:
        assert torch.equal(hidden, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert results[0][1].abs().max() > 0
    assert kept[1] < 0.75 * kept[0] and kept[2] < 0.75 * kept[1], kept
