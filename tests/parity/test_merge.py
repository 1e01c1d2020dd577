"""A merged folder in transformers: the same logits as here, and the same ids for a conversation."""

from pathlib import Path

import pytest
import torch
from tiny import LLAMA3_ROPE, load, logits, random_ids
from tiny_chat import VOCABULARY, chat, tiny_chat_folder, wrapped_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lora.config import LoraConfig
from lora.export import write_model
from lora.tokenizer import Tokenizer

IDS = random_ids((60,), VOCABULARY)
MESSAGES = [*chat("The cat ② sat.", "Yes, it did.")["messages"], {"role": "user", "content": "On\na mat?"}]


@pytest.fixture(params=["one file", "shards"])
def limit(request) -> int:
    return {"one file": 10**9, "shards": 20_000}[request.param]


def merged(out: Path, limit: int, tied: bool, dtype: torch.dtype) -> Path:
    """A folded model's folder."""
    base = tiny_chat_folder(out / "base", tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE)
    model = load(base, dtype=dtype)
    wrapped_adapter(model, LoraConfig(rank=4, alpha=8)).fold(model)
    (out / "merged").mkdir()
    write_model(model, base, Tokenizer.load(base).files, out / "merged", limit)
    assert (len(list((out / "merged").glob("*.safetensors"))) > 3) is (limit == 20_000)
    return out / "merged"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits(tmp_path, limit, tied, dtype):
    folder = merged(tmp_path, limit, tied, dtype)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    assert theirs.config.tie_word_embeddings is tied
    shared = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert shared is tied
    with torch.no_grad():
        want = theirs.eval()(IDS[None]).logits[0]
    torch.testing.assert_close(logits(load(folder), IDS, (len(IDS),)), want, rtol=0.0, atol=1e-4)


def test_tokenizer(tmp_path, limit):
    """Ids by the chat template, the text of them, and where an answer stops."""
    folder = merged(tmp_path, limit, tied=True, dtype=torch.bfloat16)
    mine, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert mine.prompt(MESSAGES, "messages") == want
    assert mine.chat(MESSAGES[:2], "response", "messages").ids == theirs.apply_chat_template(
        MESSAGES[:2], return_dict=False
    )
    assert mine.decode(want) == theirs.decode(want, skip_special_tokens=True)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 3]
