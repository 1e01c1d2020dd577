"""What a run says while it trains: a progress bar on a terminal, lines elsewhere, metrics.jsonl and TensorBoard.

metrics.jsonl is the record that everything else is drawn from: one object a line, flushed line by line. Its keys and
units:

    kind               "train", "eval" or "event"
    step, epoch        how many are done
    loss               mean over the step's supervised tokens, nats
    eval_loss          the same over the held-out examples; eval_loss_full: over all their tokens
    lr, grad_norm      of the step; the norm before clipping
    tokens, supervised_tokens, tokens_per_s
                       of the step
    step_s             seconds, from its first forward pass to the optimiser's launch, the next step's packing included
    mem_active_gib, mem_allocated_gib, mem_reserved_gib
                       peaks so far on a GPU; on a CPU all three are the resident size
    message            of an event
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora.files import new_file

GIB = 2**30
METRICS = "metrics.jsonl"


def resident_bytes() -> int:
    """Memory this process holds now, as the system counts it; where it does not tell, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory this process has held."""
    # Linux counts in KiB, a Mac in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_peak_gib(device: torch.device) -> float:
    """The most memory the run has held: allocated on a GPU, resident on a CPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    return peak / GIB


def memory(device: torch.device) -> dict[str, float]:
    """The memory keys of a metrics line, GiB."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        sizes = [stats[f"{kind}_bytes.all.peak"] for kind in ("active", "allocated", "reserved")]
    else:
        sizes = [resident_bytes()] * 3
    return dict(zip(("mem_active_gib", "mem_allocated_gib", "mem_reserved_gib"), (s / GIB for s in sizes), strict=True))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class RunLog:
    """Writes one run's record. `step` is where it starts: later lines of an earlier try are cut off."""

    def __init__(self, run: Path, step: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a training run needs it

        path = run / METRICS
        if path.is_file():
            # At step 0 there is no checkpoint, and the first evaluation is made again.
            kept = [json.dumps(line) + "\n" for line in read_metrics(run) if 0 < step >= line["step"]]
            with new_file(path) as aside:
                aside.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        no_bar = not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, bar_format=shape, dynamic_ncols=True, disable=no_bar)
        self._steps = steps

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def train(self, step: int, values: dict[str, float]) -> None:
        """After each step."""
        self._write("train", step, values)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "tok/s": f"{values['tokens_per_s']:,.0f}",
            "GiB": f"{values['mem_reserved_gib']:.1f}",
            # A terminal of 80 columns may cut these off.
            "lr": f"{values['lr']:.2e}",
            "grad": f"{values['grad_norm']:.3f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable:
            print(f"step {step}/{self._steps}", *(f"{name} {value}" for name, value in shown.items()), flush=True)

    def eval(self, step: int, values: dict[str, float]) -> None:
        """After each evaluation."""
        self._write("eval", step, values)
        self.say(f"step {step}: eval loss {values['eval_loss']:.4f}, full text {values['eval_loss_full']:.4f}")

    def event(self, step: int, message: str) -> None:
        """Anything else that happened; it is printed too."""
        self._write("event", step, {"message": message})
        self.say(f"step {step}: {message}")

    def say(self, line: str) -> None:
        """Prints above the bar."""
        self._bar.write(line) if not self._bar.disable else print(line, flush=True)

    def sync(self) -> None:
        """Forces the record to disk, so that it never lags behind a checkpoint."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def print_table(rows: dict[str, str]) -> None:
    """Two columns, the second one aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
