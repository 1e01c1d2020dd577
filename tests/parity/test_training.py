"""Training against PEFT on transformers: the same base, adapter, examples and AdamW; padded batches over there."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import LLAMA3_ROPE, load
from tiny_chat import random_examples, tiny_chat_folder, wrapped_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora import loop
from lora.adapter import Adapter
from lora.checkpoint import save_adapter
from lora.config import LINEARS, LoraConfig, OptimConfig, RunConfig
from lora.data import Dataset, Example, Overlong, pack_examples, plan
from lora.forward import Eager
from lora.log import read_metrics
from lora.optim import build_optimiser, learning_rate

EXAMPLES = random_examples([5, 33, 12, 47, 2, 33, 20, 8, 61, 17, 26])
LORAS = {
    "all": LoraConfig(rank=8, alpha=16),
    "rslora": LoraConfig(rank=4, alpha=2, rslora=True, target_modules=LINEARS[:4]),
}
loras = pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    shape = {"tie_word_embeddings": request.param == "tied", "rope_parameters": LLAMA3_ROPE}
    return tiny_chat_folder(tmp_path_factory.mktemp("base"), **shape)


def peft_model(folder: Path, adapter: Adapter, out: Path) -> PeftModel:
    """`adapter` on its base, in PEFT, by way of our own files."""
    save_adapter(out, adapter.tensors(), adapter.config, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return PeftModel.from_pretrained(base, out, is_trainable=True).train()


def padded_loss(model: PeftModel, examples: list[Example]) -> Tensor:
    """transformers' own loss of one padded batch, with -100 for all that is not learnt."""
    longest = max(len(example.ids) for example in examples)
    ids, labels, attended = [], [], []
    for example in examples:
        pad = longest - len(example.ids)
        ids.append(example.ids + [3] * pad)
        labels.append([id if mask else -100 for id, mask in zip(example.ids, example.mask)] + [-100] * pad)
        attended.append([1] * len(example.ids) + [0] * pad)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": attended}
    return model(**{name: torch.tensor(rows) for name, rows in batch.items()}).loss


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """By the names in our files."""
    return {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}


@loras
@pytest.mark.parametrize(("budget", "n"), [(1, 11), (48, 6), (100, 3), (1000, 1)], ids=["1", "48", "100", "1000"])
def test_gradient_of_a_step(folder, tmp_path, lora, budget, n):
    """Of every A and B, from one example at a time up to all at once."""
    model = load(folder)
    adapter = wrapped_adapter(model, lora)
    packs = pack_examples(range(len(EXAMPLES)), EXAMPLES, budget)
    assert len(packs) == n
    supervised = sum(pack.supervised_tokens for pack in packs)
    loss = (
        loop.accumulate(Eager(model), adapter, packs, [loop.token_keys(0, 0, pack) for pack in packs], 1.0) / supervised
    )
    theirs = peft_model(folder, adapter, tmp_path)
    want = padded_loss(theirs, EXAMPLES)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    adapter.flat.copy_(adapter.grad / supervised)  # so that `tensors` names the gradients
    mine = adapter.tensors()
    assert mine.keys() == gradients(theirs).keys()
    for name, gradient in gradients(theirs).items():
        error = ((mine[name] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-5, f"{name} is off by {error:.1e}"


@loras
def test_twenty_steps(folder, tmp_path, lora):
    """`train` itself, with its order, schedule, decay and clipping, against a loop written by hand around PEFT."""
    optim = OptimConfig(batch_size=3, epochs=5, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.7)
    steps = plan(EXAMPLES, optim, seed=0)
    assert len(steps) == 20
    model = load(folder)
    adapter = Adapter(model, lora, seed=0)
    adapter.wrap(model)
    theirs = peft_model(folder, adapter, tmp_path)
    learnt = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learnt, weight_decay=0.1)
    want = []
    for number, step in enumerate(steps):
        adamw.param_groups[0]["lr"] = learning_rate(number, 20, 2, "cosine", 1e-2)
        loss = padded_loss(theirs, [EXAMPLES[index] for index in step.examples])
        adamw.zero_grad()
        loss.backward()
        want.append((loss.item(), torch.nn.utils.clip_grad_norm_(learnt, 0.7).item()))
        adamw.step()

    data = Dataset(EXAMPLES, EXAMPLES[:2], Overlong(0, 0), Overlong(0, 0))
    optimiser = build_optimiser("adamw", adapter.flat, adapter.grad, optim.weight_decay)
    settings = (optim, RunConfig(eval_every=100), tmp_path, str(folder))
    assert loop.train(model, adapter, optimiser, data, steps, loop.State(64), *settings) == "finished"
    got = [(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert len(got) == 20
    assert want[0][0] - want[-1][0] > 0.1, "it learns too little to compare"
    for number, (mine, other) in enumerate(zip(got, want, strict=True), 1):
        assert mine == pytest.approx(other, rel=1e-4), f"loss and gradient norm of step {number}"
