"""kernels/reference.py: the dropout mask is a fair coin, and a function of its key alone."""

import pytest
import torch
from torch import Tensor

from kernels import reference

KEYS, CHANNELS = 256, 512


def keys_of(*chain: int, device="cpu") -> Tensor:
    """The keys of tokens 0 to KEYS - 1, after a chain of (seed, step, example, ...)."""
    keys = torch.zeros(KEYS, dtype=torch.int32, device=device)
    for value in chain:
        keys = reference.mix_keys(keys, value)
    return reference.mix_keys(keys, torch.arange(KEYS, dtype=torch.int32, device=device))


def correlation(one: Tensor, other: Tensor) -> float:
    """In standard deviations of what independent masks would have."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].abs() * one.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate(device, p):
    """Of all channels, of each token's and of each channel's: within 5.5 standard deviations of a coin's."""
    mask = reference.dropout_mask(keys_of(1, device=device), CHANNELS, p).double()
    for name, dim in (("all", (0, 1)), ("a token's", 1), ("a channel's", 0)):
        kept = mask.mean(dim)
        bound = 5.5 * (p * (1 - p) / (mask.numel() / kept.numel())) ** 0.5
        worst = (kept - (1 - p)).abs().max().item()
        assert worst < bound, f"{name} rate is off by {worst:.4f}, {bound:.4f} is chance"


def test_dropout_is_independent():
    """Between seeds, steps, examples, layers and inputs; between tokens and between channels near and far."""
    mask = reference.dropout_mask(keys_of(1, 2, 3, 4), CHANNELS, 0.5)
    for chain in [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 3, 68)]:
        other = reference.dropout_mask(keys_of(*chain), CHANNELS, 0.5)
        assert correlation(mask, other) < 5, f"(1, 2, 3, 4) and {chain} draw masks that are alike"
    for shift in (1, 2, 3, 16, 128):
        assert correlation(mask[shift:], mask[:-shift]) < 5, f"tokens {shift} apart draw masks that are alike"
        assert correlation(mask[:, shift:], mask[:, :-shift]) < 5, f"channels {shift} apart are alike"
    # What two tokens and two channels share must not give the fourth away.
    square = mask[1:, 1:] ^ mask[1:, :-1] ^ mask[:-1, 1:]
    assert correlation(square, mask[:-1, :-1]) < 5, "the mask is linear in token and channel"


def test_mix_keys_never_meet(device):
    """Small keys and values, such as seed and step, or layer and input: every pair has its own result."""
    small = torch.arange(256, dtype=torch.int32, device=device)
    mixed = reference.mix_keys(small[:, None], small)
    assert len(mixed.unique()) == 256 * 256
    assert torch.equal(mixed[:, 7], reference.mix_keys(small, 7))


def test_dropout_is_a_function_of_the_key(device):
    """A token's mask is the same alone, in any pack, with more channels, and on every device."""
    keys = keys_of(7)
    mask = reference.dropout_mask(keys, CHANNELS, 0.3)
    assert torch.equal(reference.dropout_mask(keys[40:41], CHANNELS, 0.3), mask[40:41])
    assert torch.equal(reference.dropout_mask(keys.flip(0), CHANNELS, 0.3), mask.flip(0))
    assert torch.equal(reference.dropout_mask(keys, CHANNELS // 2, 0.3), mask[:, : CHANNELS // 2])
    assert torch.equal(reference.dropout_mask(keys_of(7, device=device), CHANNELS, 0.3).cpu(), mask)


def test_no_dropout(device):
    assert reference.dropout_mask(keys_of(0, device=device), CHANNELS, 0.0).all()
