"""lora/evaluate.py: means over tokens, whatever they were packed with."""

import dataclasses

import pytest
import torch
from tiny import load, logits
from tiny_chat import random_examples, tiny_chat_folder, wrapped_adapter

from lora.config import LoraConfig
from lora.data import pack_examples
from lora.evaluate import evaluate, token_losses
from lora.model import Llama

EXAMPLES = random_examples([2, 9, 40, 9, 17])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Llama:
    return load(tiny_chat_folder(tmp_path_factory.mktemp("base")))


def packs(budget: int):
    return pack_examples(range(len(EXAMPLES)), EXAMPLES, budget)


def by_hand(model: Llama) -> tuple[list[float], list[float]]:
    """-log p of every supervised token, and of every token but the first of each example, one example at a time."""
    response, full = [], []
    for example in EXAMPLES:
        ids = torch.tensor(example.ids)
        log_p = torch.log_softmax(logits(model, ids, (len(ids),)).double(), dim=1)
        for position in range(1, len(ids)):
            loss = -log_p[position - 1, ids[position]].item()
            full.append(loss)
            if example.mask[position]:
                response.append(loss)
    return response, full


def test_by_hand(model):
    losses = evaluate(model, packs(1000))
    response, full = by_hand(model)
    assert losses.response == pytest.approx(sum(response) / len(response), rel=1e-6)
    assert losses.full == pytest.approx(sum(full) / len(full), rel=1e-6)
    assert (losses.response_tokens, losses.full_tokens) == (len(response), len(full))
    assert losses.full_tokens == sum(len(example.ids) - 1 for example in EXAMPLES)


@pytest.mark.parametrize("budget", [1, 20, 50])
def test_packing_does_not_matter(model, budget):
    one, other = (dataclasses.asdict(evaluate(model, packs(tokens))) for tokens in (budget, 1000))
    assert one == pytest.approx(other, rel=1e-6)


def test_adapter_on_and_off(tmp_path):
    """Evaluated as the model is: the adapter counts while it is on; dropout never does; no gradient is made."""
    model = load(tiny_chat_folder(tmp_path))
    base = evaluate(model, packs(1000))
    adapter = wrapped_adapter(model, LoraConfig(rank=4, alpha=8, dropout=0.5))
    tuned = evaluate(model, packs(1000))
    assert tuned.response != pytest.approx(base.response, rel=1e-3)
    assert evaluate(model, packs(1000)) == tuned
    with adapter.off(model):
        assert evaluate(model, packs(1000)) == base
    assert not adapter.grad.any()


def test_token_losses(model):
    """Each token has the loss of being predicted from those before it, in its example's place."""
    found = token_losses(model, packs(60))
    assert found.keys() == {example.name for example in EXAMPLES}
    for example in EXAMPLES:
        own = found[example.name]
        assert own[0].isnan()
        ids = torch.tensor(example.ids)
        want = -torch.log_softmax(logits(model, ids, (len(ids),)).double(), dim=1)[:-1]
        want = want.gather(1, ids[1:, None]).squeeze(1)
        torch.testing.assert_close(own[1:], want, rtol=0, atol=1e-5)
