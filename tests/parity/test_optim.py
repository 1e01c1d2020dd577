"""The flat 8-bit step against bitsandbytes' own optimiser, tensor by tensor: equal to the bit."""

import bitsandbytes
import pytest
import torch

from lora.optim import AdamW8bit

# bitsandbytes keeps state in 8 bits from 4,096 elements on.
SHAPES = [(16, 256), (8, 576), (576, 8), (33, 256), (128, 2048)]
RATES = (1e-2, 2e-4, 3e-3, 5e-4, 1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_flat_step(device, decay):
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(device) * scale for shape in SHAPES]

    parameters = draw(0.1)
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    mine = AdamW8bit(flat, torch.zeros_like(flat), decay)
    theirs = bitsandbytes.optim.AdamW8bit(parameters, weight_decay=decay)
    for step, rate in enumerate(RATES):
        # Gradients of several sizes, with whole blocks at zero in the first step, as A's is.
        gradients = draw(0.0 if step == 0 else 10.0 ** (step - 3))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        mine.grad.copy_(torch.cat([gradient.flatten() for gradient in gradients]))
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        mine.step(rate, 1.0)
        for shape, parameter, got in zip(SHAPES, parameters, mine.flat.split(sizes), strict=True):
            assert torch.equal(got, parameter.flatten()), f"the {shape} tensor differs after step {step}"

    blocks = [size // 256 for size in sizes]
    for ours, key, parts in (
        ("m", "state1", sizes),
        ("v", "state2", sizes),
        ("m_absmax", "absmax1", blocks),
        ("v_absmax", "absmax2", blocks),
    ):
        for shape, parameter, got in zip(SHAPES, parameters, mine.state[ours].split(parts), strict=True):
            want = theirs.state[parameter][key]
            assert want.dtype == got.dtype
            assert torch.equal(got, want.flatten()), f"{ours} of the {shape} tensor differs"
