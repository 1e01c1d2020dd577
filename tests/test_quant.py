"""lora/quant.py against bitsandbytes called directly, and what is kept."""

import bitsandbytes.functional as bnb
import pytest
import torch
from tiny import assert_close, load, random_ids, run, tiny_folder

from kernels.reference import expand_nf4
from lora.quant import BLOCK, NF4Linear, nf4_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(5, 122), (7, 9), (64, 64), (96, 640), (64, 96)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def parts_of(state: bnb.QuantState, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one linear as transformers writes them into a bnb-4bit folder."""
    return {"weight": codes} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


@dtypes
@shapes
def test_round_trip(device, dtype, shape):
    """Codes are those of bitsandbytes, weights what the definition makes of them, each within half the widest step.

    (What bitsandbytes itself makes of them is wrong on a CPU where a row does not end with a block.)
    """
    weight = random_weight(shape, dtype).to(device)
    linear = NF4Linear.quantise(weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(linear.codes, codes)
    dense = linear.dense(dtype)
    assert dense.dtype == dtype
    assert linear.shape == dense.shape == weight.shape
    assert torch.equal(dense, expand_nf4(linear.nf4, torch.empty_like(dense)))
    if device.type == "cuda" or shape[1] % BLOCK == 0:
        assert torch.equal(dense, bnb.dequantize_4bit(codes, state))
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    # The widest step of the table is 0.304 of absmax, and absmax itself is rounded by up to 1/256 of the largest.
    bound = blocks.abs().amax(1, keepdim=True) * 0.16 + weight.abs().max() / 100
    error = torch.nn.functional.pad((dense.float() - weight.float()).flatten(), (0, -weight.numel() % BLOCK))
    assert (error.view(-1, BLOCK).abs() <= bound).all()


def test_expands_to_any_dtype(device):
    linear = NF4Linear.quantise(random_weight((64, 128)).to(device))
    whole = linear.dense(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert linear.dense(dtype).dtype == dtype
        assert_close(f"the weight in {dtype}", linear.dense(dtype), whole, 4e-3)


def test_only_codes_are_kept(device):
    """4.127 bits a weight and a few small tables, before and after use."""
    linear = NF4Linear.quantise(random_weight((512, 1024)).to(device))

    def kept() -> int:
        state = linear.state
        tensors = [linear.codes, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
        assert [name for name, value in vars(linear).items() if isinstance(value, torch.Tensor)] == ["codes"]
        return sum(tensor.nbytes for tensor in tensors)

    before = kept()
    linear.dense(torch.bfloat16)
    assert kept() == before
    assert before < 4.2 / 8 * 512 * 1024 + 2048


@dtypes
@shapes
def test_from_parts(device, dtype, shape):
    """A linear out of a bnb-4bit folder expands to what bitsandbytes expands it to, whatever dtype it was made from."""
    codes, state = bnb.quantize_4bit(random_weight(shape, dtype).to(device), quant_type="nf4", compress_statistics=True)
    parts = parts_of(state, codes)
    assert nf4_of(parts) is None
    linear = NF4Linear.from_parts(parts)
    assert linear.shape == shape
    assert torch.equal(linear.dense(dtype), NF4Linear.quantise(random_weight(shape, dtype).to(device)).dense(dtype))


def test_from_parts_in_other_blocks():
    """Of 128, where rows of 192 end in the midst of one."""
    weight = random_weight((64, 192))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=128)
    linear = NF4Linear.from_parts(parts_of(state, codes))
    assert linear.nf4 is None
    assert linear.dense(torch.float32).shape == weight.shape
    assert (linear.dense(torch.float32) - weight).square().mean().sqrt() < 0.12


def test_from_parts_without_double_quantisation():
    codes, state = bnb.quantize_4bit(random_weight((64, 64)), quant_type="nf4", compress_statistics=False)
    assert torch.equal(
        NF4Linear.from_parts(parts_of(state, codes)).dense(torch.float32), bnb.dequantize_4bit(codes, state)
    )


def test_what_is_not_nf4():
    codes, state = bnb.quantize_4bit(random_weight((64, 64)), quant_type="fp4", compress_statistics=True)
    assert nf4_of(parts_of(state, codes)) == "quantised as ['fp4'], not nf4"
    assert nf4_of({"weight": codes, "weight.SCB": codes}) == "quantised as something unknown, not nf4"


def test_quantised_model(tmp_path):
    """All linears of the blocks and nothing else; the model computes what its expanded weights compute."""
    folder = tiny_folder(tmp_path, tie_word_embeddings=False)
    model = load(folder, "nf4")
    quantised = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert len(quantised) == 14
    assert all(".layers." in name for name in quantised)
    plain = load(folder)
    for name in quantised:
        plain.get_submodule(name).weight.copy_(model.get_submodule(name).dense(torch.float32))
    ids = random_ids((5, 9))
    assert_close("hidden states", run(model, ids, (5, 9)), run(plain, ids, (5, 9)), 1e-6)
