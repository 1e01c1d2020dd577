"""Greedy answers against transformers' generate, token for token, on SmolLM2-135M-Instruct."""

import pytest
import torch
from transformers import LlamaForCausalLM

from lora.build import build_model
from lora.checkpoint import stop_ids
from lora.generate import generate
from lora.tokenizer import Tokenizer

FRANCE = "The capital of France is"
TEXTS = [
    FRANCE,
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Hello",
    "def fibonacci(n):\n    ",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def model(smollm2):
    return build_model(smollm2, "none", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    ragged = [tokenizer.encode(text) for text in TEXTS]
    assert len({len(ids) for ids in ragged}) > 2
    return ragged


@pytest.fixture(scope="module")
def expected(smollm2, prompts):
    """transformers, one prompt at a time, 64 tokens and no stop."""
    oracle = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    oracle.generation_config.eos_token_id = None
    answers = []
    for ids in prompts:
        row = torch.tensor([ids])
        out = oracle.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


@pytest.mark.parametrize("batch_size", [1, 16])
def test_greedy_equals_transformers(model, prompts, expected, batch_size):
    answers = generate(model, prompts, [], 64, batch_size=batch_size)
    assert [answer.ids for answer in answers] == expected


def test_the_capital_of_france(model, tokenizer):
    (answer,) = generate(model, [tokenizer.encode(FRANCE)], [], 2)
    assert tokenizer.decode(answer.ids) == " Paris."


def test_a_chat_answer_stops(smollm2, model, tokenizer):
    """With the template and the model's own stop ids it ends by itself."""
    prompt = tokenizer.prompt(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}], "test"
    )
    (answer,) = generate(model, [prompt], stop_ids(smollm2), 64)
    assert answer.stopped
    assert "Paris" in tokenizer.decode(answer.ids)
