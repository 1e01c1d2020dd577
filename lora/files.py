"""Files, whole or not at all: what is written appears complete under its name, or does not appear.

A file or folder is made under another name, forced to disk, and then renamed, which a file system does at once. So a
kill at any moment leaves the old one or the new one, and at worst a stray entry whose name begins with a dot.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(error.strerror or str(error), str(path), "check the folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON: {error}", str(path), "mend the file or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", str(path), "mend the file or fetch it again")
    return value


def to_disk(path: Path) -> None:
    """Forces a file, or the entries of a folder, out of the operating system's caches."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it appears under `path`, which is not there, when the `with` block ends without error."""
    aside = path.parent / f".{path.name}.{os.getpid()}"
    # A killed process may have had our number: in a container they repeat.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            # safetensors writes files that only their owner may read; a model is there to be served.
            file.chmod(0o755 if file.is_dir() else 0o644)
            to_disk(file)
        to_disk(aside)
        aside.rename(path)
        to_disk(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write; in one step it takes the place of `path` when the `with` block ends without error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        to_disk(aside)
        aside.replace(path)
        to_disk(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, source: Path) -> None:
    """Copies `source` to `path`: readers see the old file or the new one."""
    with new_file(path) as aside:
        shutil.copyfile(source, aside)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object to a file: readers see the old one or the new one."""
    with new_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process while the `with` block lasts; UserError if another one has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is at work on it", str(folder), "wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
