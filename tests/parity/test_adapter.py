"""Adapters to PEFT and from PEFT: the same logits on both sides, in fp32."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from tiny import load, logits, random_ids, tiny_folder
from transformers import AutoModelForCausalLM

from lora.adapter import Adapter
from lora.build import load_into
from lora.checkpoint import save_adapter
from lora.config import LINEARS, LoraConfig

IDS = random_ids((23,))
CLOSE = {"rtol": 0.0, "atol": 1e-4}
CONFIGS = {
    "all": LoraConfig(rank=5, alpha=8, dropout=0.1),
    "rslora": LoraConfig(rank=6, alpha=3, rslora=True),
    "subset": LoraConfig(rank=3, alpha=12, target_modules=("q_proj", "v_proj", "down_proj")),
    "one": LoraConfig(rank=1, alpha=1.5, target_modules=("o_proj",)),
}

configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    return model.eval()(IDS[None]).logits[0]


@configs
def test_ours_in_peft(folder, tmp_path, config):
    model = load(folder)
    base = logits(model, IDS, (len(IDS),))
    adapter = Adapter(model, config, seed=0)
    for update in adapter.updates.values():
        update.b.data.normal_(std=0.3)
    adapter.wrap(model)
    mine = logits(model, IDS, (len(IDS),))
    assert not torch.allclose(mine, base, atol=0.1)
    save_adapter(tmp_path, adapter.tensors(), config, str(folder))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    torch.testing.assert_close(theirs(tuned), mine, **CLOSE)


@configs
def test_peft_in_ours(folder, tmp_path, config):
    described = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules="all-linear" if config.target_modules == LINEARS else list(config.target_modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), described)
    tuned.save_pretrained(tmp_path)
    model = load(folder)
    adapter = load_into(model, tmp_path)
    assert adapter.config == config
    torch.testing.assert_close(logits(model, IDS, (len(IDS),)), theirs(tuned), **CLOSE)


def test_first_draw(folder):
    """A is drawn from the distribution that PEFT draws from."""
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), PeftConfig(r=64, target_modules=list(LINEARS)))
    adapter = Adapter(load(folder), LoraConfig(rank=64), seed=0)
    for name, parameter in tuned.named_parameters():
        if "lora_" not in name:
            continue
        mine = adapter.tensors()[name.replace(".default", "")]
        assert mine.shape == parameter.shape, name
        assert mine.std().item() == pytest.approx(parameter.std().item(), rel=0.05), name
        assert mine.abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.02), name
