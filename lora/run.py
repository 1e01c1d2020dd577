"""The run folder: its name, what stands in its config.json and run_card.json, and how to find one again.

runs/<name>/
  config.json                  settings (every flag) and what they came to on this machine
  run_card.json                what was really done; "finished" is true once the run has ended by itself
  metrics.jsonl  tensorboard/
  adapter_model.safetensors  adapter_config.json  tokenizer files      the best adapter, in PEFT's format
  checkpoint-<step>/
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.checkpoint import checkpoints
from lora.config import Config, flat, from_flat
from lora.errors import UserError
from lora.files import read_json, write_json

RUNS = Path("runs")
CONFIG, CARD = "config.json", "run_card.json"
_PACKAGES = ("torch", "bitsandbytes", "safetensors", "tokenizers", "triton", "numpy")


@dataclass(frozen=True)
class Resolved:
    """What the settings came to on the machine where the run began; a resumed run keeps all of it."""

    model: str
    device: str
    dtype: str
    optimizer: str
    micro_batch_tokens: int
    threads: int
    data_hash: str
    held_out_hash: str


def new_run(config: Config) -> Path:
    """The folder of a new run, not yet made: --run-dir, or runs/<what it trains on>, with a number if that is taken."""
    if (folder := config.run.run_dir) is not None:
        if (folder / CONFIG).exists():
            how = "continue it with --resume, or give another folder"
            raise UserError("there is a run already", f"--run-dir {folder}", how)
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError("the folder is not empty", f"--run-dir {folder}", "give a new one")
        if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
            raise UserError("a file is in the way", f"--run-dir {folder}", "give another name")
        return folder
    own = config.data.words or config.data.data
    name = config.run.recipe or (own.stem if own else config.data.level)
    folder, number = RUNS / name, 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def ending(run: Path) -> str | None:
    """How a run ended: "finished", "patience", "interrupted", "diverged" or "failed"; None without a card."""
    return read_json(run / CARD)["ending"] if (run / CARD).is_file() else None


FINISHED = ("finished", "patience")


def find_run(given: Path | None, finished: bool) -> Path:
    """`given`, or the newest run that is (not) finished; UserError if there is none."""
    kind, flag = ("finished", "--run") if finished else ("unfinished", "--run-dir")
    if given is not None:
        if not (given / CONFIG).is_file():
            raise UserError("no run is there", f"{flag} {given}", "give a folder that train.py wrote")
        if not finished and ending(given) in FINISHED:
            raise UserError("the run is finished", f"{flag} {given}", "start a new one without --resume")
        return given
    # A run that diverged would do so again.
    wanted = FINISHED if finished else (None, "interrupted", "failed")
    there = [path.parent for path in RUNS.glob(f"*/{CONFIG}") if ending(path.parent) in wanted]
    if not there:
        how = "train one with train.py --level a1, or name a folder" if finished else "start one without --resume"
        raise UserError(f"no {kind} run under {RUNS}", flag, how)
    return max(there, key=lambda run: (run / CONFIG).stat().st_mtime)


def write_config(run: Path, config: Config, resolved: Resolved) -> None:
    write_json(run / CONFIG, {"settings": flat(config), "resolved": asdict(resolved)})


def read_run(run: Path) -> tuple[Config, Resolved]:
    """What `write_config` wrote."""
    raw = read_json(run / CONFIG)
    try:
        return from_flat(Config, raw["settings"], str(run / CONFIG)), Resolved(**raw["resolved"])
    except (KeyError, TypeError):
        how = "give a folder that this version of train.py wrote"
        raise UserError("not the config of a run", str(run / CONFIG), how) from None


def adapter_folder(run: Path, which: str) -> Path:
    """Where the adapter "best", "last" or of step N of a run stands."""
    if which == "best":
        if not (run / "adapter_config.json").is_file():
            raise UserError("the run has no best adapter yet", str(run), "let it reach its first evaluation")
        return run
    there = checkpoints(run)
    step = max(there, default=None) if which == "last" else int(which) if which.isdecimal() else None
    if step not in there:
        how = f"give best, last or a step that has one: {', '.join(map(str, there)) or 'none'}"
        raise UserError("no such checkpoint", f"--checkpoint {which}", how)
    return there[step]


def git_commit() -> str | None:
    """The commit of this source tree, with + if it was changed since; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changes)


def versions() -> dict[str, str]:
    """Python and the packages that computed the run."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_card(run: Path, values: dict[str, Any]) -> None:
    write_json(run / CARD, values)
