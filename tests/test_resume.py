"""--resume: a run that was killed, at any moment and as often as you like, ends as one that was never stopped.

Runs are train.py's own `main`, in processes forked from a server that has imported it once, since importing takes
longer than training this tiny model.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_chat import tiny_chat_folder, write_chats

import train
from lora.checkpoint import checkpoints
from lora.errors import exit_code
from lora.files import new_folder
from lora.log import read_metrics
from lora.run import FINISHED, ending, read_run

STEPS = 40
FLAGS = [
    "--batch-size=3",
    "--epochs=10",
    "--max-steps=40",
    "--eval-every=6",
    "--save-every=4",
    "--lora-rank=4",
    "--lora-dropout=0.2",
    "--quant=none",
    "--dtype=fp32",
    "--device=cpu",
    "--micro-batch-tokens=60",
    "--learning-rate=1e-2",
]
FIELDS = ("kind", "step", "epoch", "loss", "grad_norm", "lr", "tokens", "eval_loss", "eval_loss_full")
DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])


def child(argv: list[str], output: Path, last_disk_call: int | None) -> None:
    """train.py in a process of its own, which is killed in place of its n-th call that changes the disk."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    calls = 0

    def counted(call):
        def wrapper(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == last_disk_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapper

    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    os.fsync = lambda handle: None  # slow, and only a power cut could tell
    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    sys.argv = ["train.py", *argv]
    sys.exit(exit_code(train.main))


@dataclass
class Trainer:
    """Starts train.py on one tiny model and file. Each call waits for the end and returns the exit code."""

    folder: Path

    def __call__(self, run: Path, *argv: str, last_disk_call: int | None = None) -> int:
        return self._end(self._start(run, argv, last_disk_call))

    def stop(self, run: Path, *argv: str, steps: int, seconds: float, number: int) -> int:
        """Sends signal `number` some time after so many steps are done."""
        process = self._start(run, argv)
        for _ in range(steps):
            self._wait_for_step(process)
        time.sleep(seconds)
        os.kill(process.pid, number)
        return self._end(process)

    def new(self, *more: str) -> list[str]:
        """The flags of a new run."""
        return [*FLAGS, "--model", str(self.folder), "--data", str(self.folder / "chat.jsonl"), *more]

    def said(self) -> str:
        """What the last one printed."""
        return (self.folder / "output").read_text()

    def _start(self, run: Path, argv, last_disk_call: int | None = None):
        arguments = ([*argv, "--run-dir", str(run)], self.folder / "output", last_disk_call)
        (self.folder / "output").write_text("")
        process = SERVER.Process(target=child, args=arguments)
        process.start()
        process.steps = 0
        return process

    def _wait_for_step(self, process) -> None:
        process.steps += 1
        while process.is_alive() and self.said().count("\nstep ") < process.steps:
            time.sleep(0.002)

    def _end(self, process) -> int:
        process.join(60)
        assert process.exitcode is not None, f"it hangs:\n{self.said()}"
        return process.exitcode


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    folder = tiny_chat_folder(tmp_path_factory.mktemp("base"))
    write_chats(folder / "chat.jsonl", 20)
    return Trainer(folder)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """optimizer -> a run that was never stopped."""
    runs = {}

    def get(optimizer: str) -> Path:
        if optimizer not in runs:
            runs[optimizer] = tmp_path_factory.mktemp("whole") / "run"
            assert trainer(runs[optimizer], *trainer.new("--optimizer", optimizer)) == 0, trainer.said()
        return runs[optimizer]

    return get


def left_by(run: Path) -> dict[str, object]:
    """What a run must end in: the bytes of its tensors, its state and its record, times left out."""
    found: dict[str, object] = {"best": (run / "adapter_model.safetensors").read_bytes()}
    for folder in checkpoints(run).values():
        found |= {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.glob("*.safetensors")}
        state = json.loads((folder / "meta.json").read_text())
        found[f"state of {folder.name}"] = state | {"seconds": None}
    for number, line in enumerate(line for line in read_metrics(run) if line["kind"] != "event"):
        found[f"line {number}"] = {key: line[key] for key in FIELDS if key in line}
    card = json.loads((run / "run_card.json").read_text())
    changing = ("seconds_in_steps", "peak_memory_gib", "git_commit")
    return found | {f"card {key}": value for key, value in card.items() if key not in changing}


def assert_same(run: Path, want: Path) -> None:
    got, wanted = left_by(run), left_by(want)
    assert got.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if got[name] != value]
    assert not different, f"{', '.join(different[:9])} differ"


def test_a_whole_run(whole):
    """The comparison below sees what it should: 3 to 4 checkpoints and the whole record."""
    run = whole("adamw")
    found = left_by(run)
    assert 2 <= len(checkpoints(run)) <= 3
    assert f"checkpoint-{STEPS}/training_state.safetensors" in found
    assert sum(name.startswith("line ") for name in found) == STEPS + 1 + 7
    assert found["card finished"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_killed_ten_times(trainer, whole, tmp_path, optimizer):
    """At random moments of training, and in place of random calls that write, rename or delete."""
    draw = random.Random(optimizer)
    run, argv = tmp_path / "run", trainer.new("--optimizer", optimizer)
    for kill in range(10):
        if kill % 2:
            code = trainer(run, *argv, last_disk_call=draw.randint(8, 40))
        else:
            steps, seconds = draw.randint(1, 6), draw.uniform(0, 0.05)
            code = trainer.stop(run, *argv, steps=steps, seconds=seconds, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, f"start {kill} was to be killed: {trainer.said()}"
        argv = ["--resume"]
    assert trainer(run, "--resume") == 0, trainer.said()
    assert "resuming" in trainer.said()
    assert_same(run, whole(optimizer))


@pytest.mark.slow
def test_killed_at_every_write(trainer, whole, tmp_path):
    """In place of each call that changes the disk, from the first checkpoint to the end of the run."""
    whole_run, call = whole("adamw"), 7
    while True:
        run = tmp_path / f"run-{call}"
        code = trainer(run, *trainer.new("--optimizer", "adamw"), last_disk_call=call)
        if code == 0:
            break
        # The last call of all comes when the card is in its place and says that the run is finished.
        if ending(run) not in FINISHED:
            assert trainer(run, "--resume") == 0, trainer.said()
        assert_same(run, whole_run)
        shutil.rmtree(run)
        call += 1
    assert call > 80


def test_killed_before_the_first_checkpoint(trainer, whole, tmp_path):
    """The run begins again, and its record too: nothing stands there twice."""
    run = tmp_path / "run"
    argv = trainer.new("--optimizer", "adamw")
    assert trainer.stop(run, *argv, steps=2, seconds=0, number=signal.SIGKILL) == -signal.SIGKILL
    assert not checkpoints(run)
    assert trainer(run, "--resume") == 0, trainer.said()
    assert_same(run, whole("adamw"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(trainer, whole, tmp_path, number):
    """The step is finished and saved, the exit code is 130, and the run goes on as if nothing had been."""
    run = tmp_path / "run"
    code = trainer.stop(run, *trainer.new("--optimizer", "adamw"), steps=11, seconds=0.01, number=number)
    assert code == 130, trainer.said()
    record = read_metrics(run)
    done = max(line["step"] for line in record)
    assert record[-1]["message"] == "interrupted and saved"
    assert max(checkpoints(run)) == done < STEPS
    assert trainer.said().endswith(f": go on with python train.py --resume --run-dir {run}\n")
    card = json.loads((run / "run_card.json").read_text())
    assert (card["finished"], card["ending"], card["steps"]) == (False, "interrupted", done)
    assert trainer(run, "--resume") == 0, trainer.said()
    end, want = left_by(run), left_by(whole("adamw"))
    last = f"checkpoint-{STEPS}"
    for name, value in want.items():
        if last in name or name.startswith(("line ", "best", "card ")):
            assert end[name] == value, f"{name} differs"


def test_stray_folders_are_no_checkpoints(trainer, whole, tmp_path):
    """Half-written ones begin with a dot, half-deleted ones have no meta.json; neither is gone on from."""
    run = tmp_path / "run"
    argv = trainer.new("--optimizer", "adamw")
    assert trainer.stop(run, *argv, steps=9, seconds=0, number=signal.SIGINT) == 130
    last = checkpoints(run)[max(checkpoints(run))]
    shutil.copytree(last, run / ".checkpoint-39.1234")
    shutil.copytree(last, run / "checkpoint-38")
    (run / "checkpoint-38" / "meta.json").unlink()
    assert last == checkpoints(run)[max(checkpoints(run))]
    assert trainer(run, "--resume") == 0, trainer.said()
    for file in ("adapter_model.safetensors", "training_state.safetensors"):
        end, want = (folder / f"checkpoint-{STEPS}" / file for folder in (run, whole("adamw")))
        assert end.read_bytes() == want.read_bytes(), file


def test_stray_folder_of_the_same_process_id(tmp_path):
    """In a container a process may well have the number that the killed one had."""
    (tmp_path / f".checkpoint-5.{os.getpid()}").mkdir()
    with new_folder(tmp_path / "checkpoint-5") as aside:
        (aside / "meta.json").write_text("{}")
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-5"]


def test_a_finished_run_is_not_resumed(trainer, whole, tmp_path):
    """Unless its card was lost to a kill: then nothing but the card is made again."""
    run = tmp_path / "run"
    shutil.copytree(whole("adamw"), run)
    assert trainer(run, "--resume") == 2
    assert "the run is finished" in trainer.said()
    (run / "run_card.json").unlink()
    assert trainer(run, "--resume") == 0, trainer.said()
    assert_same(run, whole("adamw"))


def test_resume_keeps_its_settings(trainer, whole, tmp_path):
    """Other flags are refused; so is another file of examples under the same name. Nothing is touched."""
    run = tmp_path / "run"
    shutil.copytree(whole("adamw"), run)
    (run / "run_card.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert trainer(run, "--resume", "--lora-rank", "8", "--seed", "3") == 2
    assert "--lora-rank, --seed" in trainer.said()
    settings, resolved = read_run(run)
    assert (resolved.micro_batch_tokens, resolved.device, resolved.optimizer) == (60, "cpu", "adamw")
    text = settings.data.data.read_text()
    try:
        settings.data.data.write_text(text.replace("Say 3.", "Say 03."))
        assert trainer(run, "--resume") == 2
        assert "the examples are not those it began with" in trainer.said()
    finally:
        settings.data.data.write_text(text)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
