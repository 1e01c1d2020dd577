"""Trains a LoRA adapter: settings -> model, data, plan -> the loop in lora/loop.py -> a run folder.

python train.py --level a1                     this project's word lists, with their recipe (all: every level in turn)
python train.py --words mine.tsv               lists of your own words: word, part of speech, sentence
python train.py --data chat.jsonl              your own examples, a line each: {"messages": [...]}
python train.py --resume                       go on with the newest run that was stopped
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path

import torch

from lora.adapter import Adapter
from lora.build import (
    build_model,
    choose_device,
    choose_dtype,
    choose_micro_batch_tokens,
    keep_freed_memory,
    let_memory_grow,
)
from lora.config import Config, parse_training
from lora.data import Dataset, Step, check_ids, hash_of, load_dataset, pack_examples, plan, without_their_word
from lora.errors import UserError, exit_code
from lora.files import locked
from lora.hub import SMOLLM2, default_model, fetch
from lora.levels import LEVELS
from lora.log import memory_peak_gib, print_table
from lora.loop import Diverged, LossScale, State, restore, train
from lora.model import Llama
from lora.optim import build_optimiser, choose_optimiser
from lora.run import FINISHED, Resolved, find_run, git_commit, new_run, read_run, versions, write_card, write_config
from lora.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    config = parse_training(argv, __doc__)
    if config.data.level != "all":
        return train_one(config)
    # Each level has a preset of its own, so each is parsed anew; all of them before the first one starts.
    parent = config.run.run_dir
    levels = [["--level", level, *(["--run-dir", str(parent / level)] if parent else [])] for level in LEVELS]
    configs = [parse_training([*argv, *own], __doc__) for own in levels]
    for one in configs:
        new_run(one)
    for one in configs:
        if code := train_one(one):
            left = ", ".join(c.data.level for c in configs[configs.index(one) + 1 :]) or "none"
            print(f"go on with --resume, and then with each level that was not begun: {left}")
            return code
        # What the last run leaves behind shall not count as taken by the next.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


def train_one(config: Config) -> int:
    """One run, from its settings to its folder; returns the exit code."""
    resumed: Resolved | None = None
    if config.run.resume:
        run = find_run(config.run.run_dir, finished=False)
        config, resumed = read_run(run)
        torch.set_num_threads(resumed.threads)
        print(f"resuming {run}")
    else:
        run = new_run(config)
    if config.run.deterministic:
        # cuBLAS reads this when it starts: a fixed workspace makes its sums repeatable.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs, and half of the cost

    let_memory_grow()
    device = choose_device(resumed.device if resumed else config.base.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = getattr(torch, resumed.dtype) if resumed else choose_dtype(config.base.dtype, device)
    source = resumed.model if resumed else choose_model(config, device)
    folder = fetch(source)
    tokenizer = Tokenizer.load(folder, config.data.template_date)
    data = load_dataset(config.data, tokenizer, config.run.seed, math.ceil(config.optim.epochs))
    if config.data.words and (lost := without_their_word(config.data)):
        print(f"{len(lost)} sentences do not seem to use their word, so eval.py will not see it either: {lost[0]} ...")
    steps = plan(data.train, config.optim, config.run.seed, data.epochs)
    if resumed and data.hash != resumed.data_hash:
        raise UserError("the examples are not those it began with", str(run), "bring the data back, or start a new run")

    model = build_model(folder, config.base.quant, dtype, device)
    check_ids([*data.train, *data.eval], model.config.vocab_size)
    model.recompute = config.optim.recompute
    adapter = Adapter(model, config.lora, config.run.seed)
    adapter.wrap(model)
    name = resumed.optimizer if resumed else choose_optimiser(config.optim.optimizer, adapter.flat)
    optimiser = build_optimiser(name, adapter.flat, adapter.grad, config.optim.weight_decay)
    resolved = resumed or Resolved(
        model=source,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        optimizer=name,
        micro_batch_tokens=config.optim.micro_batch_tokens or choose_micro_batch_tokens(model, config.lora),
        threads=torch.get_num_threads(),
        data_hash=data.hash,
        held_out_hash=hash_of(data.eval),
    )
    print_table(overview(run, resolved, config, model, adapter, data, steps))

    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if not resumed:
            write_config(run, config, resolved)
        for file in tokenizer.files:
            shutil.copyfile(file, run / file.name)
        budget = resolved.micro_batch_tokens
        state = restore(run, adapter, optimiser, config.run.keep, budget) if resumed else State(budget)
        if resumed:
            print(f"going on after step {state.step} of {len(steps)}")
        elif dtype == torch.float16:
            state.loss_scale = LossScale(16.0, moving=True)
        ending = "failed"
        try:
            base = str(folder) if source == SMOLLM2 else source  # where other programs find it
            ending = train(model, adapter, optimiser, data, steps, state, config.optim, config.run, run, base)
        except Diverged as error:
            ending = "diverged"
            print(f"error: {error}", file=sys.stderr)
        except torch.OutOfMemoryError as error:
            how = "say --recompute block, or give shorter ones (--max-length)"
            raise UserError("the GPU's memory is too small for one example", f"--device {device}", how) from error
        finally:
            write_card(run, card(ending, config, resolved, data, steps, state))
    best = "" if state.best_loss is None else f", best {state.best_loss:.4f} at step {state.best_step}"
    then = f"go on with python train.py --resume --run-dir {run}" if ending == "interrupted" else run
    print(f"{ending} after step {state.step} of {len(steps)}{best}: {then}")
    return {"interrupted": 130, "diverged": 1}.get(ending, 0)


def choose_model(config: Config, device: torch.device) -> str:
    """--model, or the default for this device, said aloud."""
    if config.base.model is not None:
        return config.base.model
    name, reason = default_model(device.type == "cuda")
    print(reason)
    return name


def overview(
    run: Path, resolved: Resolved, config: Config, model: Llama, adapter: Adapter, data: Dataset, steps: list[Step]
) -> dict[str, str]:
    """What is about to happen, as a table."""
    tokens = sum(len(example.ids) for example in data.train)
    supervised = sum(example.supervised for example in data.train)
    targeted = sum(math.prod(linear.shape) for linear in adapter.targets.values())
    first = pack_examples(steps[0].examples, data.train, resolved.micro_batch_tokens)
    used = sum(len(pack.ids) for pack in first) / (len(first) * resolved.micro_batch_tokens)
    long, long_eval, optim = data.train_overlong, data.eval_overlong, config.optim
    return {
        "model": f"{resolved.model}, {config.base.quant} base, {resolved.dtype} on {resolved.device}",
        "adapter": f"rank {config.lora.rank}, alpha {config.lora.alpha:g} on {len(adapter.targets)} linears",
        "trainable": f"{len(adapter):,} parameters ({100 * len(adapter) / targeted:.1f} % of those linears)",
        "examples": f"{len(data.train):,} to train on, {len(data.eval):,} held out"
        + (f"; every epoch has its own {len(data.epochs[0]):,}" if data.epochs else ""),
        "overlong": f"{long.dropped} dropped, {long.truncated} truncated; "
        f"held out: {long_eval.dropped} dropped, {long_eval.truncated} truncated",
        "tokens": f"{tokens:,}, {supervised:,} of them supervised ({100 * supervised / tokens:.0f} %)",
        "micro-batch": f"{resolved.micro_batch_tokens:,} tokens; first step: {len(first)}, {100 * used:.0f} % full",
        "steps": str(len(steps)),
        "epochs": f"{round(steps[-1].epoch, 3):g}",
        "optimiser": f"{resolved.optimizer}, {optim.schedule} from {optim.learning_rate:g}",
        "run": str(run),
    }


def card(ending: str, config: Config, resolved: Resolved, data: Dataset, steps: list[Step], state: State) -> dict:
    """What was really done."""
    done = steps[: state.step]
    return {
        "finished": ending in FINISHED,
        "ending": ending,
        "steps": state.step,
        "steps_planned": len(steps),
        "epochs": done[-1].epoch if done else 0,
        "examples": len(data.train),
        "unique_examples_seen": len({index for step in done for index in step.examples}),
        "eval_examples": len(data.eval),
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "overlong": {"train": vars(data.train_overlong), "eval": vars(data.eval_overlong)},
        "best_eval_loss": state.best_loss,
        "best_step": state.best_step,
        "seconds_in_steps": state.seconds,
        "peak_memory_gib": memory_peak_gib(torch.device(resolved.device)),
        "data_hash": data.hash,
        "git_commit": git_commit(),
        "versions": versions(),
        **vars(resolved),
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
