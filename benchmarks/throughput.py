"""The training step on a GPU against the trainers people use: real tokens a second, and the memory it takes.

    python benchmarks/throughput.py                                   every workload, every trainer that is installed
    python benchmarks/throughput.py --workload short --impl ours unsloth
    python benchmarks/throughput.py --shape tiny --device cpu --impl ours --workload short       a dry run

Weights are random in the real shapes, the base is NF4 with double quantisation, and every trainer gets the same seeded
examples, all tokens supervised, in a process of its own; the optimiser step, clipping and (ours) packing are counted.
The peers run in one hand-written loop: bf16 autocast, bitsandbytes' 8-bit AdamW, rows padded to the longest of a
micro-batch. Padding is no work done, so a rate counts real tokens only.

Peak memory is torch's, from the loaded model on, warm-up included. The floor is the matmuls that the step cannot do
without, at the rate that one large bf16 matmul sustains in the same process; attention and elementwise work come on
top.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

# Unsloth calls home unless told not to.
os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora.config import LINEARS, LoraConfig
from lora.data import Example
from lora.log import GIB

VOCABULARY = 128256
WARM, TIMED = 12, 10


class Shape(NamedTuple):
    """Of a Llama model, in the order of the columns below."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the seven in a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        n, mlp = self.hidden, self.mlp
        return [(q, n), (kv, n), (kv, n), (n, q), (mlp, n), (mlp, n), (n, mlp)]


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 16, True),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, False),
}


class Workload(NamedTuple):
    """shortest, longest: tokens of an example; recompute: "none", "mlp" or "block", as in lora/model.py."""

    shape: str
    rank: int
    alpha: int
    dropout: float
    batch: int
    accum: int
    shortest: int
    longest: int
    recompute: str
    micro_batch_tokens: int  # of ours: a step is a set of examples, and how it is cut is the trainer's business


# c1: ten words in, ten sentences out. t1: rows packed to 2,048 tokens, batch 2 x 4, also with checkpointing. short:
# chat turns. axolotl: the usual settings for an 8B model; axolotl-fast: the same without recomputing, which the peers
# cannot do in 24 GB.
WORKLOADS = {
    "full512": Workload("1b", 128, 256, 0.0, 16, 4, 512, 512, "none", 8192),
    "c1": Workload("1b", 128, 256, 0.05, 16, 4, 150, 350, "none", 8704),
    "t1": Workload("1b", 16, 16, 0.0, 2, 4, 2048, 2048, "none", 4096),
    "t1-ckpt": Workload("1b", 16, 16, 0.0, 2, 4, 2048, 2048, "block", 2048),
    "short": Workload("1b", 16, 16, 0.0, 2, 4, 100, 300, "none", 1024),
    "axolotl": Workload("8b", 64, 32, 0.05, 2, 4, 2048, 2048, "block", 4096),
    "axolotl-fast": Workload("8b", 64, 32, 0.05, 2, 4, 2048, 2048, "none", 4096),
}


def matmul_flops(shape: Shape, work: Workload) -> int:
    """A token's: the base forward, and backward to its input; the update also to its weights. Of a block that is run
    again the last product is not needed, and of an MLP neither."""
    again = {"none": [], "mlp": shape.linears[4:6], "block": shape.linears[:6]}[work.recompute]

    def macs(linears: list[tuple[int, int]], base: int, update: int) -> int:
        return sum(base * out * into + update * work.rank * (out + into) for out, into in linears)

    return 2 * (shape.layers * (macs(shape.linears, 2, 3) + macs(again, 1, 1)) + 2 * VOCABULARY * shape.hidden)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of [8192, 4096] x [4096, 8192] in bf16 that the card sustains: after a second of it, when it is as warm
    and as slow as in a run (an H200 begins a tenth above that, and is at its power limit after a moment)."""
    n, products = (8192, 20) if device.type == "cuda" else (512, 2)
    a, b = (torch.randn(n, n // 2, device=device).bfloat16() for _ in range(2))
    seconds, began = [], time.perf_counter()
    while time.perf_counter() - began < 2:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ b.t()
        synchronise(device)
        seconds.append((time.perf_counter() - start) / products)
    return 2 * n * n * (n // 2) / statistics.median(seconds[len(seconds) // 2 :])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the same work for everyone ---------------------------------------------------------------------------------------


def write_model(shape: Shape, folder: Path) -> None:
    """Random weights as a Hugging Face folder, with the tokenizer that some peers will not load without."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    n = shape.hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": n,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "torch_dtype": "bfloat16",
    }
    names = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return (0.02 * torch.randn(size, generator=generator, device=device)).bfloat16().cpu()

    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, n), "model.norm.weight": torch.ones(n).bfloat16()}
    if not shape.tied:
        tensors["lm_head.weight"] = draw(VOCABULARY, n)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        for name, size in zip(names, shape.linears, strict=True):
            tensors[f"{block}{name}.weight"] = draw(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = torch.ones(n).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"<w{i}>" for i in range(len(characters), 128000))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {0: "<|begin_of_text|>", 4: "<|finetune_right_pad_id|>", 9: "<|eot_id|>"}
    tokenizer.add_special_tokens([special.get(i, f"<|reserved_{i}|>") for i in range(256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    wrapped = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[9]}
    (folder / "tokenizer_config.json").write_text(json.dumps(wrapped | {"pad_token": special[4]}))


def steps_of(work: Workload) -> list[list[Example]]:
    """The examples of each step, alike for every trainer."""
    generator = torch.Generator().manual_seed(1)
    size = work.batch * work.accum
    lengths = torch.randint(work.shortest, work.longest + 1, (WARM + TIMED, size), generator=generator).tolist()
    rows = [[torch.randint(0, 128000, (n,), generator=generator).tolist() for n in step] for step in lengths]
    return [[Example(str(i), row, [True] * len(row)) for i, row in enumerate(step)] for step in rows]


# --- the trainers: each a function that makes step number n ----------------------------------------------------------


def ours(work: Workload, folder: Path, steps: list[list[Example]], device: torch.device, micro_batch_tokens: int):
    from lora.adapter import Adapter
    from lora.build import build_model, let_memory_grow
    from lora.data import pack_examples
    from lora.forward import choose_forward
    from lora.loop import LossScale, token_keys, train_step
    from lora.optim import build_optimiser

    let_memory_grow()
    config = LoraConfig(rank=work.rank, alpha=work.alpha, dropout=work.dropout)
    model = build_model(folder, "nf4", torch.bfloat16, device)
    model.recompute = work.recompute
    adapter = Adapter(model, config, seed=0)
    adapter.wrap(model)
    optimiser = build_optimiser("adamw8bit", adapter.flat, adapter.grad, weight_decay=0.01)
    forward = choose_forward(model, adapter)

    @lru_cache(maxsize=2)  # as in the loop: a step is packed while the GPU works at the one before
    def packed(number: int):
        examples = steps[number] if number < len(steps) else []
        packs = pack_examples(range(len(examples)), examples, micro_batch_tokens)
        return packs, [token_keys(0, number, pack) for pack in packs]

    def step(number: int) -> float:
        meanwhile = partial(packed, number + 1)
        return train_step(forward, adapter, optimiser, *packed(number), 2e-4, 1.0, LossScale(), meanwhile)["loss"]

    return step


def peer(impl: str, work: Workload, folder: Path, steps: list[list[Example]]):
    if impl == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=2048, load_in_4bit=True, dtype=torch.bfloat16
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=work.rank,
            lora_alpha=work.alpha,
            lora_dropout=work.dropout,
            target_modules=list(LINEARS),
            bias="none",
            use_gradient_checkpointing=False if work.recompute == "none" else "unsloth",
            random_state=0,
        )
    else:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        if impl == "peft-liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=four_bit,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            device_map={"": 0},
        )
        if work.recompute != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        config = PeftConfig(
            r=work.rank,
            lora_alpha=work.alpha,
            lora_dropout=work.dropout,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    import bitsandbytes

    model.config.use_cache = False
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = bitsandbytes.optim.AdamW8bit(parameters, lr=2e-4, weight_decay=0.01)

    def step(number: int) -> float:
        for start in range(0, len(steps[number]), work.batch):
            some = [example.ids for example in steps[number][start : start + work.batch]]
            width = max(map(len, some))
            ids = torch.full((len(some), width), 128004)
            for i, row in enumerate(some):
                ids[i, : len(row)] = torch.tensor(row)
            mask = torch.arange(width) < torch.tensor([[len(row)] for row in some])
            batch = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}
            if not mask.all():
                batch["attention_mask"] = mask.long()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**{name: tensor.cuda() for name, tensor in batch.items()}).loss
            (loss / work.accum).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(impl: str, work: Workload, folder: Path, device: torch.device, budget: int) -> dict[str, float]:
    steps = steps_of(work)
    step = ours(work, folder, steps, device, budget) if impl == "ours" else peer(impl, work, folder, steps)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rates, seconds = [], []
    for number, examples in enumerate(steps):
        synchronise(device)
        start = time.perf_counter()
        step(number)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        rates.append(sum(len(example.ids) for example in examples) / seconds[-1])
    cuda = device.type == "cuda"
    return {
        "median": statistics.median(rates[WARM:]),
        "best": max(rates[WARM:]),
        "first_s": seconds[0],
        "step_ms": 1000 * statistics.median(seconds[WARM:]),
        "gib": torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else 0.0,
        "floor_rate": matmul_rate(device) / matmul_flops(SHAPES[work.shape], work),
    }


HEAD = (
    "workload", "trainer", "tokens/s median", "best", "step ms", "peak GiB", "reserved GiB", "of unsloth's rate",
    "of its memory", "of the matmul floor", "first step s",
)  # fmt: skip


# The trainers, and what each needs.
TRAINERS = {"unsloth": ("unsloth",), "ours": (), "peft": ("peft",), "peft-liger": ("peft", "liger_kernel")}


def installed(impl: str) -> bool:
    return all(importlib.util.find_spec(package) for package in TRAINERS[impl])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--impl", nargs="+", choices=TRAINERS)
    parser.add_argument("--shape", choices=SHAPES, help="instead of the workload's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--micro-batch-tokens", type=int, help="of ours, instead of the workload's")
    parser.add_argument("--folder", type=Path, help="where the random models go, and stay; else a temporary folder")
    parser.add_argument("--measure", metavar="IMPL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    works = {name: WORKLOADS[name] for name in arguments.workload}
    if arguments.shape:
        works = {name: work._replace(shape=arguments.shape) for name, work in works.items()}
    if arguments.measure:
        (work,) = works.values()
        budget = arguments.micro_batch_tokens or work.micro_batch_tokens
        result = measure(arguments.measure, work, arguments.folder, device, budget)
        print("RESULT " + json.dumps(result))
        return

    impls = arguments.impl or [impl for impl in TRAINERS if installed(impl)]
    if missing := [impl for impl in TRAINERS if not installed(impl)]:
        print(f"not installed here: {', '.join(missing)}")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        parent = arguments.folder or Path(temporary)
        for name, work in works.items():
            folder = parent / work.shape
            if not folder.exists():
                write_model(SHAPES[work.shape], folder)
            beside = None
            for impl in impls:
                command = [sys.executable, __file__, "--workload", name, "--shape", work.shape, "--measure", impl]
                command += ["--device", arguments.device, "--folder", str(folder)]
                if arguments.micro_batch_tokens:
                    command += ["--micro-batch-tokens", str(arguments.micro_batch_tokens)]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                except subprocess.TimeoutExpired:
                    print(f"| {name} | {impl} took more than ten minutes |", flush=True)
                    continue
                line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not line:
                    print(f"| {name} | {impl} failed |", flush=True)
                    print(done.stderr, file=sys.stderr, flush=True)
                    continue
                r = json.loads(line[0].removeprefix("RESULT "))
                beside = r if impl == "unsloth" else beside
                cells = [name, impl, f"{r['median']:,.0f}", f"{r['best']:,.0f}", f"{r['step_ms']:.1f}"]
                cells += [f"{r['gib']:.2f}", f"{r['reserved_gib']:.2f}"]
                cells += [f"{r[key] / beside[key]:.2f}" if beside else "-" for key in ("median", "gib")]
                cells += [f"{r['median'] / r['floor_rate']:.0%}", f"{r['first_s']:.1f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
