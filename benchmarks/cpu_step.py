"""The training step on a CPU against PEFT + bitsandbytes: SmolLM2-135M, forward, backward, clipping and AdamW.

    python benchmarks/cpu_step.py                     every workload, three rounds of alternating processes
    python benchmarks/cpu_step.py --only ragged128 --rounds 1

Each measurement is a process of its own, so peak memory is the peak of one trainer, and the trainers take turns, so
that a slow minute of the machine hits both. A rate counts real tokens (padding is not work done) and is the best step
of a process, because what disturbs a step can only make it slower; the table takes the median over the rounds.

Ours runs as train.py runs it, the C library told to keep freed memory. PEFT runs in the fastest settings found for it:
base and adapters in bf16, PyTorch's fused AdamW, and whichever of the two attention implementations is faster. It needs
the packages of requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.config import LINEARS, DataConfig, LoraConfig
from lora.data import Example, encode, load_conversations
from lora.hub import fetch
from lora.log import GIB, peak_resident_bytes
from lora.tokenizer import Tokenizer

# name: (rank, examples a step, tokens of each or None for a1 lists with the loss on their answers)
WORKLOADS = {"equal16": (16, 8, 200), "equal128": (128, 8, 200), "ragged128": (128, 16, None)}
TRAINERS = ("ours", "peft-sdpa", "peft-eager")
WARM, TIMED = 1, 4


def batches(workload: str, folder: Path) -> list[list[Example]]:
    """The examples of each step, alike for every trainer."""
    _, size, length = WORKLOADS[workload]
    steps = WARM + TIMED
    if length is None:
        config = DataConfig(level="a1")
        (conversations,), _ = load_conversations(config, seed=0, epochs=1)
        examples, _ = encode(conversations[: size * steps], Tokenizer.load(folder), config)
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 49152, (size * steps, length), generator=generator).tolist()
        examples = [Example(str(i), row, [True] * length) for i, row in enumerate(ids)]
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def ours(workload: str, quant: str, folder: Path):
    """A function that takes the examples of a step and makes it."""
    from lora.adapter import Adapter
    from lora.build import build_model, choose_dtype, keep_freed_memory
    from lora.data import pack_examples
    from lora.forward import Eager
    from lora.loop import LossScale, token_keys, train_step
    from lora.optim import build_optimiser, choose_optimiser

    keep_freed_memory()
    rank = WORKLOADS[workload][0]
    device = torch.device("cpu")
    model = build_model(folder, quant, choose_dtype("auto", device), device)
    adapter = Adapter(model, LoraConfig(rank=rank, alpha=2 * rank), seed=0)
    adapter.wrap(model)
    name = choose_optimiser("auto", adapter.flat)
    optimiser = build_optimiser(name, adapter.flat, adapter.grad, weight_decay=0.01)

    def step(examples: list[Example]) -> float:
        packs = pack_examples(range(len(examples)), examples, budget=4096)
        keys = [token_keys(0, 0, pack) for pack in packs]
        return train_step(Eager(model), adapter, optimiser, packs, keys, 2e-4, 1.0, LossScale())["loss"]

    return step


def peft(workload: str, quant: str, folder: Path, attention: str):
    """The same for PEFT on transformers."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    rank = WORKLOADS[workload][0]
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    extra = {"quantization_config": four_bit, "device_map": {"": "cpu"}} if quant == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention, **extra)
    model.config.use_cache = False
    config = PeftConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01, fused=True)

    def step(examples: list[Example]) -> float:
        width = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example.ids)
            ids[row, :n] = torch.tensor(example.ids)
            labels[row, :n] = ids[row, :n].masked_fill(~torch.tensor(example.mask), -100)
            mask[row, :n] = 1
        # Without padding the mask says nothing, and attention is faster without it.
        loss = model(input_ids=ids, labels=labels, attention_mask=None if mask.all() else mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def measure(trainer: str, workload: str, quant: str) -> dict[str, float]:
    """In a process of its own: tokens/s of each timed step, the last loss and the peak memory."""
    folder = fetch("smollm2-135m")
    torch.manual_seed(0)
    step = (
        ours(workload, quant, folder)
        if trainer == "ours"
        else peft(workload, quant, folder, trainer.removeprefix("peft-"))
    )
    rates, loss = [], 0.0
    for examples in batches(workload, folder):
        start = time.perf_counter()
        loss = step(examples)
        rates.append(sum(len(example.ids) for example in examples) / (time.perf_counter() - start))
    return {"rate": max(rates[WARM:]), "loss": loss, "gib": peak_resident_bytes() / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("TRAINER", "WORKLOAD", "QUANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print("RESULT " + json.dumps(measure(*arguments.measure)))
        return

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16")
    print("| workload | base | ours tokens/s | PEFT tokens/s (attention) | ratio | ours GiB | PEFT GiB |")
    print("|---|---|---|---|---|---|---|")
    for workload in [arguments.only] if arguments.only else WORKLOADS:
        for quant in ("nf4", "none"):
            results: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in TRAINERS}
            for _ in range(arguments.rounds):
                for trainer in TRAINERS:
                    command = [sys.executable, __file__, "--measure", trainer, workload, quant]
                    done = subprocess.run(command, capture_output=True, text=True)
                    line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if not line:
                        sys.exit(f"{trainer} failed:\n{done.stderr}")
                    results[trainer].append(json.loads(line[0].removeprefix("RESULT ")))
            rate = {name: statistics.median(r["rate"] for r in rows) for name, rows in results.items()}
            gib = {name: max(r["gib"] for r in rows) for name, rows in results.items()}
            best = max(TRAINERS[1:], key=rate.__getitem__)
            print(
                f"| {workload} | {quant} | {rate['ours']:.0f} | {rate[best]:.0f} ({best.removeprefix('peft-')}) "
                f"| {rate['ours'] / rate[best]:.2f} | {gib['ours']:.2f} | {gib[best]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
