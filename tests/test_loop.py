"""lora/loop.py: one step however it is cut, and a run's record, checkpoints and ends."""

import json
import math
import os
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import load
from tiny import run as forward
from tiny_chat import (
    quick,  # noqa: F401
    random_examples,
    tiny_chat_folder,
    wrapped_adapter,
)
from torch import Tensor

from lora import loop
from lora.adapter import Adapter
from lora.checkpoint import checkpoints, load_adapter, load_state
from lora.config import LoraConfig, OptimConfig, RunConfig
from lora.data import Dataset, Example, Overlong, Pack, make_pack, pack_examples, plan
from lora.evaluate import Losses, evaluate
from lora.forward import Eager
from lora.log import read_metrics
from lora.model import Llama
from lora.optim import Optimiser, build_optimiser, learning_rate

LENGTHS = (7, 40, 3, 12, 40, 25)
EXAMPLES = random_examples(LENGTHS, vocabulary=299)
ODD_TOKEN = 299  # in no example
LORA = LoraConfig(rank=4, alpha=8)
DROPOUT = replace(LORA, dropout=0.3)
OPTIM = OptimConfig(batch_size=3, epochs=3, learning_rate=1e-2)
NONE_LONG = Overlong(0, 0)
DATA = Dataset(EXAMPLES, random_examples((9, 30), seed=1, vocabulary=299), NONE_LONG, NONE_LONG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


@pytest.fixture
def model(folder) -> Llama:
    return load(folder)


# --- the step ---


def summed(model: Llama, adapter: Adapter, packs: list[Pack]) -> tuple[float, dict[tuple[str, str], Tensor]]:
    """The summed loss of step 5 on these packs, and the gradient of every A and B."""
    keys = [loop.token_keys(0, 5, pack) for pack in packs]
    total = loop.accumulate(Eager(model), adapter, packs, keys, 1.0).item()
    return total, {(name, side): getattr(u, side).grad.clone() for name, u in adapter.updates.items() for side in "ab"}


def gradient(model: Llama, adapter: Adapter, budget: int) -> tuple[float, dict[tuple[str, str], Tensor]]:
    """`summed` on EXAMPLES, cut under this budget."""
    return summed(model, adapter, pack_examples(range(len(EXAMPLES)), EXAMPLES, budget))


def assert_same_gradient(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    """Per tensor, the norm of the difference relative to the norm."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        error = ((got[name] - tensor).norm() / tensor.norm()).item()
        assert error <= tolerance, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("lora", [LORA, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("budget", [1, 41, 80, 100])
def test_any_budget_gives_the_same_step(model, lora, budget):
    """From one example at a time up to all at once."""
    adapter = wrapped_adapter(model, lora)
    loss, grads = gradient(model, adapter, budget)
    whole_loss, whole = gradient(model, adapter, sum(LENGTHS))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert_same_gradient(grads, whole)


def test_the_loss_is_that_of_each_example_alone(model):
    """Against autograd through plain cross-entropy, one example at a time."""
    adapter = wrapped_adapter(model, LORA)
    loss, grads = gradient(model, adapter, 80)
    adapter.grad.zero_()
    want = torch.zeros(())
    for example in EXAMPLES:
        ids = torch.tensor(example.ids)
        logits = forward(model, ids, (len(ids),)) @ model.head.t()
        targets = ids[1:].masked_fill(~torch.tensor(example.mask[1:]), -100)
        want += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-6)
    for name, tensor in grads.items():
        assert_same_gradient({name: tensor}, {name: getattr(adapter.updates[name[0]], name[1]).grad})


def test_dropout_is_on_in_a_step(model):
    plain, dropped = (gradient(model, wrapped_adapter(model, lora), 80)[0] for lora in (LORA, DROPOUT))
    assert dropped != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recompute_gives_the_same_gradient(model, recompute):
    adapter = wrapped_adapter(model, DROPOUT)
    loss, grads = gradient(model, adapter, 80)
    model.recompute = recompute
    again, recomputed = gradient(model, adapter, 80)
    assert again == loss
    assert_same_gradient(recomputed, grads, 1e-6)


@pytest.mark.parametrize("lora", [LORA, DROPOUT], ids=["plain", "dropout"])
def test_neighbours_do_not_matter(model, lora):
    """An example's loss and gradient are the same to rounding alone, and between any others that teach nothing."""
    adapter = wrapped_adapter(model, lora)
    silent = [Example("silent", e.ids, [False] * len(e.ids)) for e in random_examples((5, 31, 18, 12), seed=9)]
    alone, *among = (
        summed(model, adapter, [make_pack(order, [*EXAMPLES, *silent])])
        for order in ([3], [3, 6], [7, 3, 8], [9, 8, 3], [3, 9])
    )
    for loss, grads in among:
        assert loss == pytest.approx(alone[0], rel=1e-6)
        assert_same_gradient(grads, alone[1])


def test_token_keys():
    """Every (seed, step, example, position) has its own key, and where the example stands in a pack plays no part."""
    packs = {order: make_pack(list(order), EXAMPLES) for order in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0))}
    keys = [loop.token_keys(seed, step, pack) for seed in (0, 1) for step in (0, 1, 2) for pack in packs.values()]
    assert len(torch.cat(keys).unique()) == 2 * 3 * sum(LENGTHS)
    for forwards, backwards in zip(keys[::2], keys[1::2], strict=True):
        want = torch.cat(forwards.split(LENGTHS)[::-1])
        assert torch.equal(backwards, want)
        assert forwards.dtype == torch.int32


@dataclass
class Job:
    """All that a run needs, but for its folder and settings."""

    model: Llama
    adapter: Adapter
    optimiser: Optimiser
    data: Dataset
    optim: OptimConfig
    state: loop.State

    @classmethod
    def new(cls, folder: Path, data: Dataset = DATA, optim: OptimConfig = OPTIM, lora: LoraConfig = LORA):
        model = load(folder)
        adapter = Adapter(model, lora, seed=0)
        adapter.wrap(model)
        optimiser = build_optimiser("adamw", adapter.flat, adapter.grad, optim.weight_decay)
        return cls(model, adapter, optimiser, data, optim, loop.State(60))

    def step(self, loss_scale: loop.LossScale, budget: int = 100, max_grad_norm: float = 1.0) -> dict[str, float]:
        packs = pack_examples(range(len(EXAMPLES)), EXAMPLES, budget)
        keys = [loop.token_keys(0, 0, pack) for pack in packs]
        return loop.train_step(
            Eager(self.model), self.adapter, self.optimiser, packs, keys, 1e-3, max_grad_norm, loss_scale
        )

    def train(self, run: Path, **settings) -> str:
        """Trains into `run`; settings are those of RunConfig."""
        run.mkdir(exist_ok=True)
        steps = plan(self.data.train, self.optim, seed=0)
        return loop.train(
            self.model, self.adapter, self.optimiser, self.data, steps, self.state, self.optim,
            RunConfig(**settings), run, "base",
        )  # fmt: skip


def test_clipping(folder):
    """The gradient that AdamW sees has at most the norm allowed; the record tells the norm before clipping."""
    seen = {}
    for limit in (1e9, 0.5, 1e-3):
        job = Job.new(folder)
        record = job.step(loop.LossScale(), max_grad_norm=limit)
        seen[limit] = (record["grad_norm"], job.optimiser.state["m"].norm().item() / (1 - 0.9))
    norm = seen[1e9][0]
    assert norm > 0.5
    for limit, (told, used) in seen.items():
        assert told == norm
        assert used == pytest.approx(min(limit, norm), rel=1e-4)


def test_a_step_is_a_step_of_torch_adamw(folder):
    """Gradient, clipping and AdamW together, twice, on fp32 numbers, decay included."""
    optim = replace(OPTIM, weight_decay=0.1)
    job, other = Job.new(folder, optim=optim), Job.new(folder, optim=optim)
    parameter = torch.nn.Parameter(other.adapter.flat)
    adamw = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        job.step(loop.LossScale())
        packs = pack_examples(range(len(EXAMPLES)), EXAMPLES, 100)
        summed(other.model, other.adapter, packs)
        parameter.grad = other.adapter.grad / sum(pack.supervised_tokens for pack in packs)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        adamw.step()
    torch.testing.assert_close(job.adapter.flat, other.adapter.flat, rtol=0, atol=1e-6)


# --- fp16 ---


def test_loss_scale(folder, monkeypatch):
    """A gradient that overflows is made again at half the factor; the factor itself changes nothing."""
    accumulate, factors = loop.accumulate, []

    def overflowing(forward, adapter, packs, keys, factor):
        factors.append(factor)
        total = accumulate(forward, adapter, packs, keys, factor)
        adapter.grad[0] = math.inf if factor > 4 else adapter.grad[0]
        return total

    plain, job = Job.new(folder), Job.new(folder)
    want = plain.step(loop.LossScale())
    monkeypatch.setattr(loop, "accumulate", overflowing)
    scale = loop.LossScale(32.0, good_steps=150, moving=True)
    got = job.step(scale)
    assert factors == [32, 16, 8, 4]
    assert scale == loop.LossScale(4.0, good_steps=1, moving=True)
    assert (got["loss"], got["grad_norm"]) == (want["loss"], want["grad_norm"])
    assert torch.equal(job.adapter.flat, plain.adapter.flat)


def test_loss_scale_grows():
    """In fp16 after every 200 good steps; in other dtypes never."""
    moving, fixed = loop.LossScale(16.0, moving=True), loop.LossScale()
    for step in range(400):
        assert moving.factor == (16 if step < 200 else 32)
        moving.succeeded()
        fixed.succeeded()
    assert (moving.factor, fixed.factor) == (64, 1)


@pytest.mark.parametrize("moving", [True, False])
def test_overflow_at_every_scale_stops_the_run(folder, monkeypatch, moving):
    def overflowing(forward, adapter, packs, keys, factor):
        adapter.grad[0] = math.inf
        return torch.ones(())

    monkeypatch.setattr(loop, "accumulate", overflowing)
    job = Job.new(folder)
    before = job.adapter.flat.clone()
    with pytest.raises(loop.Diverged, match="example 1, "):
        job.step(loop.LossScale(8.0, moving=moving))
    assert torch.equal(job.adapter.flat, before)


# --- memory ---


def test_memory_runs_out(folder, tmp_path, monkeypatch):
    """A pass that does not fit is made again in halves, with the same examples and dropout, and the run says so."""
    lora = replace(LORA, dropout=0.2)
    calm, short = Job.new(folder, lora=lora), Job.new(folder, lora=lora)
    summed_loss = loop.summed_loss

    def too_small(forward, pack):
        loss = summed_loss(forward, pack)
        if len(pack.ids) > 32 and len(pack.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    assert calm.train(tmp_path / "calm") == "finished"
    monkeypatch.setattr(loop, "summed_loss", too_small)
    assert short.train(tmp_path / "short") == "finished"
    torch.testing.assert_close(short.adapter.flat, calm.adapter.flat, rtol=0, atol=1e-5)
    assert short.state.micro_batch_tokens <= 32 < calm.state.micro_batch_tokens
    events = [line["message"] for line in read_metrics(tmp_path / "short") if line["kind"] == "event"]
    assert events == [f"memory ran out; from here on {short.state.micro_batch_tokens} tokens a micro-batch"]


def test_memory_too_small_for_one_example(folder, tmp_path, monkeypatch):
    def never(forward, pack):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "summed_loss", never)
    with pytest.raises(torch.OutOfMemoryError):
        Job.new(folder).train(tmp_path / "run")


# --- runs that end early ---


def guilty_data(index: int) -> Dataset:
    """DATA with a token in one example that no other has."""
    ids = [*EXAMPLES[index].ids[:-2], ODD_TOKEN, EXAMPLES[index].ids[-1]]
    train = [*EXAMPLES[:index], replace(EXAMPLES[index], ids=ids), *EXAMPLES[index + 1 :]]
    return replace(DATA, train=train)


def test_nan_names_the_example_and_leaves_the_checkpoint(folder, tmp_path):
    """The token's embedding is not a number; the second step meets it, after the first was saved."""
    steps = plan(EXAMPLES, OPTIM, seed=0)
    guilty = steps[1].examples[1]
    job = Job.new(folder, guilty_data(guilty))
    job.model.model.embed_tokens.weight[ODD_TOKEN] = math.nan
    with pytest.raises(loop.Diverged) as stopped:
        job.train(tmp_path / "run", save_every=1)
    names = [name for name in (example.name for example in EXAMPLES) if name in str(stopped.value)]
    assert names == [f"example {guilty}"]
    assert job.state.step == 1
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["kind"], last["step"]) == ("event", 1)
    assert "step 2" in last["message"]
    assert f"example {guilty}" in last["message"]

    Job.new(folder).train(tmp_path / "healthy", save_every=1, keep=99)
    assert list(checkpoints(tmp_path / "run")) == [1]
    for file in ("adapter_model.safetensors", "training_state.safetensors"):
        left, want = (tmp_path / name / "checkpoint-1" / file for name in ("run", "healthy"))
        assert left.read_bytes() == want.read_bytes(), file


def test_nan_in_evaluation_stops_the_run(folder, tmp_path, monkeypatch):
    """A model that no longer gives numbers is never the best one, and the record stays JSON."""
    monkeypatch.setattr(loop, "evaluate", canned(2.0, 1.5, math.nan))
    job = Job.new(folder)
    with pytest.raises(loop.Diverged):
        job.train(tmp_path / "run", eval_every=1)
    assert job.state.best_step == 1
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text


def canned(*losses: float):
    """An `evaluate` that returns these losses one after the other."""
    queue = iter(losses)
    return lambda model, packs: Losses(next(queue), 9.0, 1, 1)


def test_patience(folder, tmp_path, monkeypatch):
    """Two evaluations in a row that are no better stop the run; the count starts anew with each better one."""
    monkeypatch.setattr(loop, "evaluate", canned(9.0, 3.0, 3.5, 2.0, 2.0, 2.5))
    job = Job.new(folder)
    assert job.train(tmp_path / "run", eval_every=1, patience=2) == "patience"
    assert (job.state.step, job.state.best_step, job.state.best_loss) == (5, 3, 2.0)


def test_the_last_step_is_saved_when_patience_ends_a_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", canned(9.0, 2.0, 2.5, 2.6))
    job = Job.new(folder)
    assert job.train(tmp_path / "run", eval_every=1, patience=2, save_every=100) == "patience"
    assert list(checkpoints(tmp_path / "run")) == [1, 3]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 6]), (2, [2, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_rotation_keeps_the_latest_and_the_best(folder, tmp_path, monkeypatch, keep, left):
    monkeypatch.setattr(loop, "evaluate", canned(9.0, 3.0, 2.0, 2.5, 2.5, 2.5, 2.5))
    run = tmp_path / "run"
    assert Job.new(folder).train(run, eval_every=1, keep=keep) == "finished"
    assert list(checkpoints(run)) == left
    assert adapter_bytes(run) == adapter_bytes(run / "checkpoint-2") != adapter_bytes(run / "checkpoint-6")
    assert load_adapter(run)[1] == LORA


def test_a_better_one_is_saved_whatever_save_every_says(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", canned(9.0, 3.0, 2.0, 2.5, 2.5, 2.5, 2.5))
    Job.new(folder).train(tmp_path / "run", eval_every=1, save_every=4, keep=9)
    assert list(checkpoints(tmp_path / "run")) == [1, 2, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(folder, tmp_path, monkeypatch, number):
    """The step is finished and saved; handlers are put back; a resumed run ends as one that was never stopped."""
    job, before = Job.new(folder), signal.getsignal(number)
    step = loop.train_step

    def interrupted(*arguments):
        if job.state.step == 2:
            os.kill(os.getpid(), number)
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    run = tmp_path / "run"
    assert job.train(run, eval_every=2) == "interrupted"
    assert signal.getsignal(number) is before
    assert job.state.step == max(checkpoints(run)) == 3
    assert read_metrics(run)[-1]["message"] == "interrupted and saved"
    monkeypatch.setattr(loop, "train_step", step)
    again, whole = Job.new(folder), Job.new(folder)
    again.state = loop.restore(run, again.adapter, again.optimiser, 2, 60)
    assert again.train(run, eval_every=2) == whole.train(tmp_path / "whole", eval_every=2) == "finished"
    assert torch.equal(again.adapter.flat, whole.adapter.flat)


def test_second_interrupt_stops_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), loop.interrupts() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        assert "once more stops at once and loses all since the last checkpoint" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)


# --- a whole run, and its record ---


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> tuple[Job, Path]:
    """A run of 60 steps on examples it can learn by heart."""
    job = Job.new(folder, Dataset(EXAMPLES, EXAMPLES, NONE_LONG, NONE_LONG), replace(OPTIM, epochs=30))
    run = tmp_path_factory.mktemp("whole") / "run"
    assert job.train(run, eval_every=7, keep=99) == "finished"
    return job, run


def test_learning(whole):
    losses = [line["loss"] for line in read_metrics(whole[1]) if line["kind"] == "train"]
    assert losses[0] > 5
    assert losses[-1] < 0.5 * losses[0]


def test_metrics(whole):
    """The keys that other programs draw from, and what they mean."""
    job, run = whole
    lines = read_metrics(run)
    steps = plan(EXAMPLES, job.optim, seed=0)
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in trained] == list(range(1, 61))
    assert [line["step"] for line in evaluated] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 60]
    for line, step in zip(trained, steps, strict=True):
        assert line.keys() == {
            "kind", "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "step_s",
            "mem_active_gib", "mem_allocated_gib", "mem_reserved_gib",
        }  # fmt: skip
        chosen = [EXAMPLES[index] for index in step.examples]
        assert line["epoch"] == step.epoch
        assert line["tokens"] == sum(len(example.ids) for example in chosen)
        assert line["supervised_tokens"] == sum(sum(example.mask[1:]) for example in chosen)
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_s"])
        assert line["lr"] == learning_rate(line["step"] - 1, 60, 6, "cosine", 1e-2)
        assert 0 < line["mem_active_gib"] < 64
    for line in evaluated:
        assert line.keys() == {"kind", "step", "epoch", "eval_loss", "eval_loss_full"}
    last = evaluate(job.model, pack_examples(range(len(EXAMPLES)), EXAMPLES, 60))
    assert (evaluated[-1]["eval_loss"], evaluated[-1]["eval_loss_full"]) == (last.response, last.full)
    assert job.state.tokens == sum(line["tokens"] for line in trained) == 30 * sum(LENGTHS)
    assert job.state.supervised_tokens == sum(line["supervised_tokens"] for line in trained)


def test_first_loss(whole, folder):
    """The first line's loss is the untouched model's on the examples of the first step."""
    first = plan(EXAMPLES, whole[0].optim, seed=0)[0].examples
    want = evaluate(load(folder), pack_examples(first, EXAMPLES, 1000)).response
    (line,) = [line for line in read_metrics(whole[1]) if line["kind"] == "train" and line["step"] == 1]
    assert line["loss"] == pytest.approx(want, rel=1e-6)


def test_the_best_is_exported(whole):
    """It is the checkpoint with the lowest evaluation loss, byte for byte, and it gives that loss."""
    job, run = whole
    evaluated = {
        line["step"]: line["eval_loss"] for line in read_metrics(run) if line["kind"] == "eval" and line["step"]
    }
    best = min(evaluated, key=evaluated.get)
    assert (job.state.best_step, job.state.best_loss) == (best, evaluated[best])
    assert adapter_bytes(run) == adapter_bytes(run / f"checkpoint-{best}")
    meta = load_state(run / "checkpoint-60")[1]
    assert meta == asdict(job.state)


def test_tensorboard(whole):
    """TensorBoard reads the same numbers."""
    events = EventAccumulator(str(whole[1] / "tensorboard")).Reload()
    lines = read_metrics(whole[1])
    for kind, key in (("train", "loss"), ("train", "lr"), ("train", "grad_norm"), ("eval", "eval_loss")):
        read = {event.step: event.value for event in events.Scalars(f"{kind}/{key}")}
        want = {line["step"]: line[key] for line in lines if line["kind"] == kind}
        assert read == pytest.approx(want, rel=1e-6)


def test_torn_last_line(tmp_path):
    """A line that a kill cut short is not there."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
