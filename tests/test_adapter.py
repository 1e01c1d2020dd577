"""lora/adapter.py: the flat buffers, and an update that comes and goes without a trace on the base."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CONFIG, assert_close, load, logits, random_ids, run, tiny_folder, tiny_weights

import kernels
from lora.adapter import ALIGNMENT, Adapter, round_unbiased
from lora.config import LINEARS, LoraConfig
from lora.model import Llama

LENGTHS = (3, 8, 8)
IDS = random_ids(LENGTHS)
CONFIGS = {
    "all": LoraConfig(rank=5, alpha=8),
    "rslora": LoraConfig(rank=5, alpha=8, rslora=True),
    "subset": LoraConfig(rank=3, alpha=12, target_modules=("down_proj", "q_proj", "v_proj")),
}

configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(folder) -> Llama:
    return load(folder)


def adapter_of(model: Llama, config: LoraConfig) -> Adapter:
    """An adapter whose B is not zero."""
    adapter = Adapter(model, config, seed=0)
    for update in adapter.updates.values():
        update.b.data.normal_(std=0.3, generator=torch.Generator().manual_seed(update.b.numel()))
    adapter.refresh()
    return adapter


def gradients(adapter: Adapter, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The flat gradient of loss()."""
    adapter.grad.zero_()
    loss().backward()
    return adapter.grad.clone()


# --- layout ---


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flat_layout(folder, config, dtype):
    """All A in the model's order, then all B, each at the next multiple of 256, and views of one buffer."""
    model = load(folder, dtype=dtype)
    adapter = adapter_of(model, config)
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in config.target_modules]
    assert list(adapter.updates) == names
    shapes = {name: model.get_submodule(name).shape for name in names}
    places = [(name, "a", (config.rank, shapes[name][1])) for name in names]
    places += [(name, "b", (shapes[name][0], config.rank)) for name in names]
    start, used = 0, torch.zeros(len(adapter.flat), dtype=torch.bool)
    for name, side, shape in places:
        leaf = getattr(adapter.updates[name], side)
        shadow = getattr(adapter.updates[name], f"{side}_shadow")
        size = shape[0] * shape[1]
        assert leaf.shape == shadow.shape == leaf.grad.shape == shape, f"{side} of {name}"
        for view, buffer in ((leaf, adapter.flat), (leaf.grad, adapter.grad), (shadow, adapter.shadow)):
            assert view.data_ptr() == buffer[start:].data_ptr(), f"{side} of {name} lies elsewhere"
        assert leaf.is_leaf
        assert leaf.requires_grad
        used[start : start + size] = True
        start += -(-size // 256) * 256
    assert start == len(adapter.flat) == len(adapter.grad) == len(adapter.shadow)
    assert adapter.flat.dtype == adapter.grad.dtype == torch.float32
    assert adapter.shadow.dtype == dtype
    assert len(adapter) == used.sum()
    assert not adapter.flat[~used].any(), "the padding is not zero"
    assert len(adapter.flat) % ALIGNMENT == 0


def test_start(model):
    """B is zero, A uniform within 1 / sqrt(in), as PEFT draws it; the seed decides; the model starts as its base."""
    before = logits(model, IDS, LENGTHS)
    adapter = Adapter(model, LoraConfig(rank=64), seed=1)
    for name, update in adapter.updates.items():
        bound = update.a.shape[1] ** -0.5
        assert not update.b.any(), name
        assert 0.98 * bound < update.a.abs().max() <= bound, name
        assert update.a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    assert torch.equal(adapter.flat, Adapter(model, LoraConfig(rank=64), seed=1).flat)
    assert not torch.equal(adapter.flat, Adapter(model, LoraConfig(rank=64), seed=2).flat)
    adapter.wrap(model)
    assert torch.equal(logits(model, IDS, LENGTHS), before)


@configs
def test_peft_names(model, config):
    """PEFT's names for exactly the targets; `load` is the inverse of `tensors`, whatever the dtype of the file."""
    adapter = adapter_of(model, config)
    want = {
        f"base_model.model.model.layers.{layer}.{part}.{name}.lora_{side}.weight"
        for layer in range(CONFIG["num_hidden_layers"])
        for part, linears in (("self_attn", LINEARS[:4]), ("mlp", LINEARS[4:]))
        for name in set(linears) & set(config.target_modules)
        for side in "AB"
    }
    tensors = adapter.tensors()
    assert tensors.keys() == want
    for name, update in adapter.updates.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], update.a)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], update.b)
    other = Adapter(model, config, seed=5)
    other.load(tensors)
    assert torch.equal(other.flat, adapter.flat)
    other.load({name: tensor.half() for name, tensor in tensors.items()})
    assert_close("the adapter from fp16", other.flat, adapter.flat, 1e-3)


def test_shadow(folder):
    """The forward pass reads the 16-bit shadow, which follows `flat` on refresh and on load."""
    model = load(folder, dtype=torch.bfloat16)
    adapter = adapter_of(model, CONFIGS["all"])
    adapter.wrap(model)
    before = logits(model, IDS, LENGTHS)
    adapter.flat.mul_(2)
    assert torch.equal(logits(model, IDS, LENGTHS), before)
    adapter.refresh()
    assert torch.equal(adapter.shadow, adapter.flat.bfloat16())
    assert not torch.equal(logits(model, IDS, LENGTHS), before)
    adapter.load({name: torch.zeros_like(tensor) for name, tensor in adapter.tensors().items()})
    assert not adapter.shadow.any()


# --- wrap, unwrap, fold ---


@configs
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_base_is_untouched(folder, config, quant):
    """wrap, off and unwrap: the base's logits come back to the bit, its modules keep their names, its weights stay."""
    model = load(folder, quant)
    before, names = logits(model, IDS, LENGTHS), [name for name, _ in model.named_modules()]
    adapter = adapter_of(model, config)
    adapter.wrap(model)
    tuned = logits(model, IDS, LENGTHS)
    assert not torch.allclose(tuned, before, atol=0.1)
    gradients(adapter, lambda: run(model, IDS, LENGTHS).sum())
    with adapter.off(model):
        assert torch.equal(logits(model, IDS, LENGTHS), before)
    assert torch.equal(logits(model, IDS, LENGTHS), tuned)
    with pytest.raises(ZeroDivisionError), adapter.off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model, IDS, LENGTHS), tuned), "an error inside `off` leaves the adapter off"
    assert [name for name, _ in model.named_modules()] == names
    adapter.unwrap(model)
    assert torch.equal(logits(model, IDS, LENGTHS), before)
    if quant == "none":
        for name, weight in tiny_weights(CONFIG).items():
            assert torch.equal(model.get_parameter(name), weight), name


@configs
def test_fold(model, config):
    adapter = adapter_of(model, config)
    adapter.wrap(model)
    wrapped = logits(model, IDS, LENGTHS)
    adapter.fold(model)
    assert_close("logits of the folded model", logits(model, IDS, LENGTHS), wrapped, 1e-5)
    base = tiny_weights(CONFIG)
    for name, linear in adapter.targets.items():
        update = adapter.updates[name]
        want = base[f"{name}.weight"] + config.scale * update.b @ update.a
        assert_close(name, linear.weight, want, 1e-6)
    for name, weight in base.items():
        if name.removesuffix(".weight") not in adapter.targets:
            assert torch.equal(model.get_parameter(name), weight), f"{name} is no target, and changed"


def test_fold_in_16_bits(folder):
    """Each weight becomes one of the two neighbours of W + s B A, and on average the update is kept."""
    model = load(folder, dtype=torch.bfloat16)
    adapter = adapter_of(model, CONFIGS["all"])
    exact = {
        name: linear.weight.float() + adapter.scale * adapter.updates[name].b @ adapter.updates[name].a
        for name, linear in adapter.targets.items()
    }
    adapter.fold(model)
    eps = torch.finfo(torch.bfloat16).eps
    for name, linear in adapter.targets.items():
        error = (linear.weight.float() - exact[name]) / exact[name].abs()
        assert error.abs().max() <= eps, name
        assert error.mean().abs() < 2 * eps / error.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_unbiased(dtype):
    """What `dtype` holds stays (zero and powers of two too); the rest goes to a neighbour, and the mean is right."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(10_000, generator=generator) * 2.0 ** torch.arange(-8, 2).repeat(1_000)
    held = torch.cat([spread.to(dtype).float(), torch.tensor([0.0, 1.0, -0.25, 0.5])])
    assert torch.equal(round_unbiased(held, dtype, generator).float(), held)
    draws = 2_000
    eps = torch.finfo(dtype).eps
    for x in (0.9999, 1.0003, -0.126, 2**-9 * 1.37):
        got = round_unbiased(torch.full((draws,), x), dtype, generator).double()
        assert len(got.unique()) == 2, x
        assert (got - x).abs().max() < eps * abs(x), x
        assert (got.mean() - x).abs() < 5 * eps * abs(x) / draws**0.5, x


def test_fold_refuses_nf4(folder):
    model = load(folder, "nf4")
    with pytest.raises(TypeError, match="q_proj is NF4Linear"):
        Adapter(model, CONFIGS["all"], seed=0).fold(model)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 2.0)])
def test_scale(rslora, scale):
    assert LoraConfig(rank=16, alpha=8, rslora=rslora).scale == scale


# --- gradients ---


@configs
def test_gradients(model, config):
    """The flat gradient against autograd through weights W + s B A written out; a second backward pass adds."""
    adapter = adapter_of(model, config)
    adapter.wrap(model)

    def loss():
        return run(model, IDS, LENGTHS).pow(3).sum()

    got = gradients(adapter, loss)
    loss().backward()
    assert_close("the gradient after two passes", adapter.grad, 2 * got, 1e-6)
    adapter.unwrap(model)
    adapter.grad.copy_(got)
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in adapter.tensors().items()}
    weights = {}
    for name, linear in adapter.targets.items():
        a, b = (leaves[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        weights[linear] = linear.weight + config.scale * b @ a

    def project(source, *linears, residual=0, hollow=False):
        stream, x = [], source
        if isinstance(source, kernels.Normed):
            stream, x = [source.x], kernels.rms_norm(*source)
        elif isinstance(source, kernels.Gated):
            x = torch.nn.functional.silu(source.gate) * source.up
        return [*stream, *(residual + x @ weights.get(linear, linear.weight).t() for linear in linears)]

    for block in model.model.layers:
        block.self_attn.project = block.mlp.project = project
    loss().backward()
    for name, update in adapter.updates.items():
        for side, leaf in (("A", update.a), ("B", update.b)):
            want = leaves[f"base_model.model.{name}.lora_{side}.weight"].grad
            assert_close(f"the gradient of {side} of {name}", leaf.grad, want, 1e-4)


def test_dropout_is_on_only_where_it_is_asked_for(model):
    """Off outside `dropping`; inside, keyed by token, layer and input, with forward and backward using one mask."""
    adapter = adapter_of(model, LoraConfig(rank=4, alpha=8, dropout=0.5))
    adapter.wrap(model)
    keys = torch.arange(len(IDS), dtype=torch.int32)
    plain = logits(model, IDS, LENGTHS)
    with adapter.dropping(keys):
        dropped = logits(model, IDS, LENGTHS)
        assert torch.equal(dropped, logits(model, IDS, LENGTHS))
    with adapter.dropping(keys + 1):
        assert not torch.equal(dropped, logits(model, IDS, LENGTHS))
    assert not torch.equal(dropped, plain)
    assert torch.equal(logits(model, IDS, LENGTHS), plain)


def test_dropout_inputs(model, monkeypatch):
    """q/k/v share a mask and so do gate and up; every layer and every other input has its own."""
    seen, projections = [], kernels.projections

    def spy(x, frozen, updates, scale, p, keys, **rest):
        seen.append(keys)
        return projections(x, frozen, updates, scale, p, keys, **rest)

    monkeypatch.setattr(kernels, "projections", spy)
    adapter = adapter_of(
        model, LoraConfig(rank=4, dropout=0.5, target_modules=("k_proj", "o_proj", "up_proj", "down_proj"))
    )
    adapter.wrap(model)
    tokens = torch.arange(len(IDS), dtype=torch.int32)
    with adapter.dropping(tokens):
        logits(model, IDS, LENGTHS)
    assert len(seen) == 4 * CONFIG["num_hidden_layers"]
    for number, keys in enumerate(seen):
        assert torch.equal(keys, kernels.mix_keys(tokens, number))


def test_dropout_follows_the_example(model):
    """An example with its keys gives the same hidden states wherever it stands in a pack."""
    adapter = adapter_of(model, LoraConfig(rank=4, alpha=8, dropout=0.5))
    adapter.wrap(model)
    keys = torch.arange(len(IDS), dtype=torch.int32) * 77
    with adapter.dropping(keys):
        whole = logits(model, IDS, LENGTHS)[3:11]
    with adapter.dropping(keys[3:11]):
        assert_close("the example alone", logits(model, IDS[3:11], (8,)), whole, 1e-5)
