"""lora/export.py, and the rounding of adapter.py: what is written, and how far it may be from what was trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import LLAMA3_ROPE, load, tiny_folder
from tiny_chat import random_examples, tiny_chat_folder, wrapped_adapter

from lora.adapter import round_unbiased
from lora.checkpoint import Weights, read_config
from lora.config import LoraConfig
from lora.data import Example, make_pack, pack_examples
from lora.export import Agreement, agreement, first_of_their_kind, hidden_states, shards, write_model
from lora.tokenizer import Tokenizer

PACKS = pack_examples(range(5), random_examples([40, 9, 30, 9, 12]), 64)
HALVES = [torch.bfloat16, torch.float16]


# --- writing ---


def written(source: Path, out: Path, limit: int = 10**9, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model of `source` as `write_model` writes it."""
    out.mkdir()
    write_model(load(source, dtype=dtype), source, Tokenizer.load(source).files, out, limit)
    return out


def test_shards():
    """In order, at most the limit each, unless one tensor alone is more."""
    tensors = {name: torch.zeros(n, dtype=torch.uint8) for name, n in zip("abcdef", (4, 4, 3, 20, 1, 9), strict=True)}
    assert [list(group) for group in shards(tensors, 10)] == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert [list(group) for group in shards(tensors, 1000)] == [list("abcdef")]
    assert [list(group) for group in shards(tensors, 1)] == list(map(list, "abcdef"))


@pytest.mark.parametrize("tied", [True, False])
def test_one_file(tmp_path, tied):
    """A tied head is one tensor and stands there once; an untied one stands there, too."""
    base = tiny_chat_folder(tmp_path / "base", tie_word_embeddings=tied)
    out = written(base, tmp_path / "out")
    tensors, given = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert tensors.keys() == given.keys()
    assert ("lm_head.weight" in tensors) is not tied
    for name, tensor in given.items():
        assert torch.equal(tensors[name], tensor.bfloat16()), name
    assert not (out / "model.safetensors.index.json").exists()


def test_sharded(tmp_path):
    """The index names every tensor once, with the file that holds it, and the size of all."""
    base = tiny_chat_folder(tmp_path / "base", tie_word_embeddings=False)
    whole, limit = load_file(base / "model.safetensors"), 20_000
    out = written(base, tmp_path / "out", limit)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(out / file)}
    assert index["weight_map"] == held
    assert held.keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in whole.values())
    for file in files:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    read = Weights(out)
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in whole.items())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_files_beside_the_weights(tmp_path, dtype):
    """The same architecture in config.json, with the new dtype and no quantisation; tokenizer and stop ids as given."""
    base = tiny_chat_folder(
        tmp_path / "base", rope_parameters=LLAMA3_ROPE, torch_dtype="float64", quantization_config={"bits": 4}
    )
    out = written(base, tmp_path / "out", dtype=dtype)
    assert read_config(out) == read_config(base)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert not config.keys() & {"torch_dtype", "quantization_config"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


# --- comparing ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), vocab_size=300)


def test_a_model_agrees_with_itself(base):
    model = load(base)
    states = hidden_states(model, PACKS)
    result = agreement(states, hidden_states(model, PACKS), model.head)
    assert (result.kl, result.top1, result.tokens) == (0.0, 1.0, 100)
    assert result.good


def test_agreement_by_hand(base):
    model = load(base)
    ours = hidden_states(model, PACKS)
    theirs = [states + 0.3 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) for states in ours]
    p, q = (torch.log_softmax(torch.cat(states).double() @ model.head.double().t(), dim=1) for states in (ours, theirs))
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    for rows in (1, 7, 128):
        result = agreement(ours, theirs, model.head, rows)
        assert result.kl == pytest.approx(want, rel=1e-4)
        assert result.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert not result.good


@pytest.mark.parametrize(
    ("kl", "top1", "good"), [(5e-3, 0.98, True), (5.1e-3, 1.0, False), (0.0, 0.979, False), (float("nan"), 1.0, False)]
)
def test_limits(kl, top1, good):
    assert Agreement(kl, top1, 100).good is good


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fold_agrees_with_the_adapter(base, dtype):
    """The whole of merge.py's comparison, in memory; with one linear forgotten it fails."""
    for forgotten in (None, "model.layers.1.mlp.down_proj"):
        model = load(base, dtype=dtype)
        model.dtype = torch.float32
        adapter = wrapped_adapter(model, LoraConfig(rank=4, alpha=8))
        unmerged = hidden_states(model, PACKS)
        if forgotten:
            adapter.updates[forgotten].b.data.zero_()
        adapter.fold(model)
        assert agreement(unmerged, hidden_states(model, PACKS), model.head).good is (forgotten is None)


# --- rounding ---


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of `dtype` that is not above x, and the smallest that is not below."""
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    grid = grid[grid.isfinite()].unique()
    return grid[torch.searchsorted(grid, x, right=True) - 1], grid[torch.searchsorted(grid, x)]


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    """fp32 numbers of both signs between 1e-9 and 1e3, powers of two and their next of kin among them."""
    draw = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(n).uniform_(-9, 3, generator=draw)
    powers = 2.0 ** torch.arange(-30, 10)
    kin = [powers * (1 + shift) for shift in (0.0, 1e-6, -1e-6, 1e-4, -1e-4, 3e-3)]
    positive = torch.cat([sizes, *kin, torch.zeros(1)])
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_to_a_neighbour(dtype):
    x = drawn(20_000)
    lower, upper = neighbours(x, dtype)
    generator = torch.Generator().manual_seed(0)
    went = {"down": 0, "up": 0}
    for _ in range(20):
        rounded = round_unbiased(x, dtype, generator)
        assert rounded.dtype == dtype
        wide = rounded.float()
        wrong = x[(wide != lower) & (wide != upper)]
        assert not len(wrong), f"{len(wrong)} numbers went past their neighbours, {wrong[0].item()} among them"
        went["down"] += int((wide < x).sum())
        went["up"] += int((wide > x).sum())
    assert went["up"] == pytest.approx(went["down"], rel=0.02)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_of_the_grid_stay(dtype):
    """Every finite number of the dtype: what has no update is not touched."""
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    grid = grid[grid.isfinite()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(round_unbiased(grid.float(), dtype, generator), grid)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("at", [1.3, -1.3, 1.0, -1.0, 0.0078125, 0.9999, 3e-8, 0.0])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_small_updates_survive_on_average(dtype, at, share):
    """A weight plus a part of a step: the mean over many draws is that sum, within five standard errors."""
    weight = torch.tensor(at).to(dtype).float()
    upper = neighbours(weight * (1 + 1e-4) + 1e-12, dtype)[1]
    x, n = weight + share * (upper - weight), 40_000
    lower, upper = (value.item() for value in neighbours(x, dtype))
    rounded = round_unbiased(x.repeat(n), dtype, torch.Generator().manual_seed(1)).double()
    error = abs(rounded.mean().item() - x.double().item())
    assert error <= 5 * (upper - lower) * (share * (1 - share) / n) ** 0.5 + 1e-7 * abs(x.item())


def test_fp32_is_not_rounded():
    x = drawn(100)
    assert torch.equal(round_unbiased(x, torch.float32, torch.Generator()), x)


def test_fold_is_reproducible(base):
    """The same adapter gives the same bytes; different linears do not share their draws."""
    folded = []
    for _ in range(2):
        model = load(base, dtype=torch.bfloat16)
        wrapped_adapter(model, LoraConfig(rank=4, alpha=8)).fold(model)
        folded.append(dict(model.named_parameters()))
    assert all(torch.equal(folded[1][name], tensor) for name, tensor in folded[0].items())
    x = torch.full((1000,), 1.001)
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(*(round_unbiased(x, torch.bfloat16, generator) for _ in range(2)))


def test_contexts_that_repeat_count_once():
    """Examples that begin alike give one prediction for the common beginning, wherever they are packed."""
    rows = ([5, 6, 7, 8], [5, 6, 9, 8], [6, 7], [5, 6, 7, 8])
    examples = [Example(str(i), ids, [True] * len(ids)) for i, ids in enumerate(rows)]
    packs = [make_pack([0, 1], examples), make_pack([2, 3], examples)]
    marks = [mark.tolist() for mark in first_of_their_kind(packs)]
    assert marks == [[True] * 4 + [False, False, True, True], [True, True] + [False] * 4]
