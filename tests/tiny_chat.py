"""A tiny chat model with a tokenizer as a Hugging Face folder, chats to train it on, and examples of random ids."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora.adapter import Adapter
from lora.config import LoraConfig
from lora.data import Example
from lora.model import Llama

VOCABULARY = 300
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # ids 0 to 3; tiny_folder stops at 2 and 3
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "red",
    "mat",
    "and",
    "saw",
    "two",
    "birds",
    "in",
    "the",
    "old",
    "tree",
    "near",
    "our",
    "house",
    "every",
    "morning",
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, since tiny tensors gain nothing from two; and no fsync, which only a power cut could tell."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
    torch.set_num_threads(threads)


def tiny_chat_folder(path: Path, **overrides) -> Path:
    """`tiny_folder` with a byte-level BPE of 300 pieces and a ChatML template; overrides are those of `tiny_config`."""
    tiny_folder(path, vocab_size=VOCABULARY, **overrides)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def chat(prompt: str, answer: str) -> dict:
    """A line of a JSONL file."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: Sequence) -> Path:
    """Objects are written as JSON, strings as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_chats(path: Path, n: int, seed: int = 0) -> Path:
    """n chats with different prompts and ragged answers of 1 to 12 words."""
    draw = random.Random(seed)
    rows = [chat(f"Say {number}.", " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))) for number in range(n)]
    return write_jsonl(path, rows)


def random_examples(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[Example]:
    """Examples "example 0", "example 1", ... of random ids with ragged masks; the last token is always learnt."""
    draw = random.Random(seed)
    return [
        Example(
            f"example {number}",
            [draw.randrange(vocabulary) for _ in range(length)],
            [draw.random() < 0.5 for _ in range(length - 1)] + [True],
        )
        for number, length in enumerate(lengths)
    ]


def wrapped_adapter(model: Llama, config: LoraConfig) -> Adapter:
    """An adapter around the model, with a B that is not zero, as after some training."""
    adapter = Adapter(model, config, seed=0)
    draw = torch.Generator().manual_seed(1)
    for update in adapter.updates.values():
        update.b.data.copy_(0.1 * torch.randn(update.b.shape, generator=draw))
    adapter.refresh()
    adapter.wrap(model)
    return adapter
