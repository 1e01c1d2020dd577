"""The training step, on one screen, and the loop around it.

The loss of a step is the mean over *all* its supervised tokens. However the step is cut into micro-batches,

    loss = (sum over packs of the sum of token losses in the pack) / (supervised tokens in the step)

so each pack adds the gradient of its sum to the adapter's flat buffer, the division comes once at the end, and one
example at a time or all at once give the same step. (Averaging each micro-batch and then averaging the averages, as is
often done, gives a token in a short micro-batch more weight than one in a long one.)

Nothing here keeps a random generator: the order of the examples is a function of (seed, epoch), dropout of (seed, step,
example, position, ...). So what a run must remember to go on exactly is small: the adapter, the optimiser and `State`.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import kernels
from lora.adapter import Adapter
from lora.checkpoint import checkpoints, export, load_adapter, load_state, remove, save_adapter, save_state
from lora.config import OptimConfig, RunConfig
from lora.data import Dataset, Pack, Step, pack_examples
from lora.evaluate import evaluate
from lora.files import new_folder
from lora.forward import Eager, Forward, choose_forward, upload
from lora.log import RunLog, memory
from lora.model import Llama
from lora.optim import Optimiser, learning_rate

T = TypeVar("T")


class Diverged(Exception):
    """The loss or its gradient is no longer a number; the message names the examples."""


@dataclass
class LossScale:
    """fp16 holds no number under 6e-8 and none over 65,504, so in fp16 the summed loss is multiplied by `factor` before
    backward and the gradient divided by it after. A gradient that overflows halves the factor and the step is made
    again; 200 steps that do not double it. Being powers of two, factors change no digits. Elsewhere it stays 1.
    """

    factor: float = 1.0
    good_steps: int = 0
    moving: bool = False

    def halve(self) -> bool:
        """Whether there is a smaller factor to try; if so, takes it."""
        if not self.moving or self.factor < 2**-14:
            return False
        self.factor, self.good_steps = self.factor / 2, 0
        return True

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.moving and self.good_steps % 200 == 0:
            self.factor *= 2


@dataclass
class State:
    """Where a run is: with the adapter and the optimiser, all that it needs to go on.

    micro_batch_tokens: the budget of a pack; smaller than the run began with, if the GPU's memory ran out on the way.
    """

    micro_batch_tokens: int
    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    loss_scale: LossScale = field(default_factory=LossScale)


# --- the step ---------------------------------------------------------------------------------------------------------


def summed_loss(forward: Forward, pack: Pack) -> Tensor:
    """Sum of -log p(token) over the pack's supervised tokens, fp32 []; only their rows meet the head."""
    head, rows = forward.model.head, pack.supervised.nonzero().squeeze(1)
    hidden = forward(pack).index_select(0, upload(rows, head.device))
    return kernels.linear_cross_entropy(hidden, head, upload(pack.targets[rows], head.device))


def token_keys(seed: int, step: int, pack: Pack) -> Tensor:
    """The dropout key of every token, int32 [T]: a function of seed, step, example and position alone."""
    keys = torch.full_like(pack.indices, seed)
    for part in (step, pack.indices, pack.positions.int()):
        keys = kernels.mix_keys(keys, part)
    return keys


def accumulate(
    forward: Forward, adapter: Adapter, packs: Sequence[Pack], keys: Sequence[Tensor], factor: float
) -> Tensor:
    """Fills adapter.grad with the gradient of factor x (the sum of all token losses); returns that sum, fp32 []."""
    adapter.grad.zero_()
    total = torch.zeros((), device=adapter.grad.device)
    for pack, pack_keys in zip(packs, keys, strict=True):
        with adapter.dropping(upload(pack_keys, total.device)):
            part = summed_loss(forward, pack)
            (part * factor).backward()
        total += part.detach()
        # A graph cannot be captured while the leaves are held by an earlier pass on another stream.
        del part
    return total


def train_step(
    forward: Forward,
    adapter: Adapter,
    optimiser: Optimiser,
    packs: Sequence[Pack],
    keys: Sequence[Tensor],
    lr: float,
    max_grad_norm: float,
    loss_scale: LossScale,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """One optimiser step on the examples in `packs`: gradient, clipping by the global norm, AdamW.

    keys: int32 [T] for each pack; lr: of this step; meanwhile: is called while a GPU still works. Returns the step's
    line of metrics.jsonl (log.py). Raises Diverged and leaves the weights as they were if loss or gradient is not a
    number.
    """
    start = time.perf_counter()
    tokens, supervised = sum(len(pack.ids) for pack in packs), sum(pack.supervised_tokens for pack in packs)
    while True:
        total = accumulate(forward, adapter, packs, keys, loss_scale.factor)
        mean = 1 / (supervised * loss_scale.factor)
        sums = torch.stack((total, adapter.grad.norm()))
        meanwhile()
        summed, norm = sums.tolist()
        loss, norm = summed / supervised, norm * mean
        if math.isfinite(norm) or not loss_scale.halve():
            break
    if not math.isfinite(loss + norm):
        raise Diverged(f"loss {loss}, gradient norm {norm}, on {', '.join(not_finite(forward.model, packs))}")
    loss_scale.succeeded()
    clip = min(1.0, max_grad_norm / (norm + 1e-6))
    optimiser.step(lr, clip * mean)
    adapter.refresh()
    seconds = time.perf_counter() - start
    return {
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_s": tokens / seconds,
        "step_s": seconds,
    }


@torch.no_grad()
def not_finite(model: Llama, packs: Sequence[Pack]) -> list[str]:
    """The names of the examples whose own loss is not a number, ten at most; any of them if it shows on none alone."""
    guilty = []
    for pack in packs:
        start = 0
        for name, length in zip(pack.names, pack.lengths, strict=True):
            rows = slice(start, start + length)
            tensors = (pack.indices, pack.ids, pack.positions, pack.targets, pack.scored, pack.supervised)
            alone = Pack((name,), (length,), *(tensor[rows] for tensor in tensors))
            if not math.isfinite(summed_loss(Eager(model), alone).item()):
                guilty.append(name)
            start += length
    guilty = guilty or [name for pack in packs for name in pack.names]
    return guilty if len(guilty) <= 10 else [*guilty[:10], f"and {len(guilty) - 10} more"]


def in_packs(
    work: Callable[[list[Pack]], T],
    packs_of: Callable[[int], list[Pack]],
    state: State,
    log: RunLog,
    release: Callable[[], bool],
) -> T:
    """work(what `packs_of` makes of a budget). If the GPU's memory runs out: again, and from then on, with half the
    budget.

    However examples are packed, the step is the same but for the last bits, so to make it again is all it takes.
    release: gives back memory that was kept for packs of the old size, and says whether there was any.
    """
    while True:
        packs = packs_of(state.micro_batch_tokens)
        smallest = all(len(pack.lengths) == 1 for pack in packs)
        try:
            return work(packs)
        except torch.OutOfMemoryError:
            if not release() and smallest:
                raise
        # Only now are the tensors free that the error's traceback held.
        torch.cuda.empty_cache()
        if not smallest:
            state.micro_batch_tokens = max(len(pack.ids) for pack in packs) // 2
        log.event(state.step, f"memory ran out; from here on {state.micro_batch_tokens} tokens a micro-batch")


# --- the loop ---------------------------------------------------------------------------------------------------------


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C or a polite kill adds to, instead of stopping the program; the second one does stop it."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # Not print(): the signal may have come in the midst of one.
        os.write(2, b"\nsaving after this step; once more stops at once and loses all since the last checkpoint\n")

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(run: Path, base: str, adapter: Adapter, optimiser: Optimiser, state: State, keep: int) -> None:
    """A checkpoint of this moment; the best one so far becomes the run's adapter; older ones go, but not the best."""
    folder = run / f"checkpoint-{state.step}"
    with new_folder(folder) as aside:
        save_adapter(aside, adapter.tensors(), adapter.config, base)
        save_state(aside, optimiser.state, asdict(state))
    if state.best_step == state.step:
        export(folder, run)
    tidy(run, state, keep)


def tidy(run: Path, state: State, keep: int) -> None:
    """Deletes all checkpoints but the best one and the latest `keep` others, and what a kill left half-done."""
    for step in [step for step in checkpoints(run) if step != state.best_step][:-keep]:
        remove(run / f"checkpoint-{step}")
    for folder in run.glob(".checkpoint-*"):
        shutil.rmtree(folder)


def restore(run: Path, adapter: Adapter, optimiser: Optimiser, keep: int, micro_batch_tokens: int) -> State:
    """The newest checkpoint into adapter and optimiser; a run without one starts at step 0, with this budget."""
    there = checkpoints(run)
    if not there:
        return State(micro_batch_tokens)
    folder = there[max(there)]
    adapter.load(load_adapter(folder)[0])
    tensors, meta = load_state(folder)
    for name, tensor in optimiser.state.items():
        tensor.copy_(tensors[name])
    state = State(**meta | {"loss_scale": LossScale(**meta["loss_scale"])})
    if state.best_step in there:
        # A kill between checkpoint and export leaves an older export behind.
        export(there[state.best_step], run)
    tidy(run, state, keep)
    return state


def train(
    model: Llama,
    adapter: Adapter,
    optimiser: Optimiser,
    data: Dataset,
    steps: Sequence[Step],
    state: State,
    optim: OptimConfig,
    settings: RunConfig,
    run: Path,
    base: str,
) -> str:
    """Runs `steps` from `state.step` on, in place; returns how it ended: "finished", "patience" or "interrupted".

    base: where the model is from, for the adapter's description. Raises Diverged, with the last checkpoint as it was.
    """
    device = model.head.device
    an_epoch = sum(step.epoch <= 1 for step in steps) or len(steps)
    eval_every = settings.eval_every or min(50, an_epoch)
    save_every = settings.save_every or eval_every
    warmup = round(optim.warmup_ratio * len(steps)) if optim.warmup_steps is None else optim.warmup_steps
    log = RunLog(run, state.step, len(steps))
    forward = choose_forward(model, adapter, optim.graphs)
    packed_up = partial(in_packs, state=state, log=log, release=forward.clear)
    held_out = partial(pack_examples, range(len(data.eval)), data.eval)

    @lru_cache(maxsize=2)  # the step at work, and the next one, which is packed meanwhile
    def packs_of_step(number: int, budget: int) -> list[Pack]:
        return pack_examples(steps[number].examples if number < len(steps) else [], data.train, budget)

    @lru_cache(maxsize=2)
    def keys_of_step(number: int, budget: int) -> list[Tensor]:
        return [token_keys(settings.seed, number, pack) for pack in packs_of_step(number, budget)]

    def evaluated() -> float:
        losses = packed_up(partial(evaluate, model), held_out)
        if not math.isfinite(losses.response + losses.full):
            names = ", ".join(packed_up(partial(not_finite, model), held_out))
            message = f"the evaluation after step {state.step} stopped the run: loss {losses.response}, on {names}"
            log.event(state.step, message)
            raise Diverged(message)
        epoch = steps[state.step - 1].epoch if state.step else 0.0
        log.eval(state.step, {"epoch": epoch, "eval_loss": losses.response, "eval_loss_full": losses.full})
        return losses.response

    def out_of_patience() -> bool:
        return settings.patience is not None and state.worse_in_a_row >= settings.patience

    try:
        with interrupts() as interrupted:
            if state.step == 0:
                evaluated()
            while state.step < len(steps) and not out_of_patience():
                step = steps[state.step]
                lr = learning_rate(state.step, len(steps), warmup, optim.schedule, optim.learning_rate)

                def one_step(packs: list[Pack], lr: float = lr) -> dict[str, float]:
                    keys = keys_of_step(state.step, state.micro_batch_tokens)
                    limit, scale = optim.max_grad_norm, state.loss_scale
                    meanwhile = partial(keys_of_step, state.step + 1, state.micro_batch_tokens)
                    return train_step(forward, adapter, optimiser, packs, keys, lr, limit, scale, meanwhile)

                try:
                    values = packed_up(one_step, partial(packs_of_step, state.step))
                except Diverged as error:
                    message = f"step {state.step + 1} stopped the run: {error}"
                    log.event(state.step, message)
                    raise Diverged(message) from None
                state.step += 1
                state.tokens += values["tokens"]
                state.supervised_tokens += values["supervised_tokens"]
                state.seconds += values["step_s"]
                log.train(state.step, {"epoch": step.epoch, **values, **memory(device)})

                last = state.step == len(steps)
                better = False
                if last or state.step % eval_every == 0:
                    loss = evaluated()
                    better = state.best_loss is None or loss < state.best_loss
                    state.worse_in_a_row = 0 if better else state.worse_in_a_row + 1
                    if better:
                        state.best_loss, state.best_step = loss, state.step
                if last or better or interrupted or out_of_patience() or state.step % save_every == 0:
                    log.sync()
                    save(run, base, adapter, optimiser, state, settings.keep)
                if interrupted and not last:
                    log.event(state.step, "interrupted and saved")
                    return "interrupted"
            return "finished" if state.step == len(steps) else "patience"
    finally:
        log.close()
