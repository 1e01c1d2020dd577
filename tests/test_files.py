"""lora/files.py: whole files or none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import problems

from lora import checkpoint, files

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_folder(tmp_path):
    """Nothing under its name until the block ends, then all of it, and nothing beside it."""
    with files.new_folder(tmp_path / "runs" / "one") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "file").write_text("text")
        assert not (tmp_path / "runs" / "one").exists()
        assert aside.name.startswith(".")
    assert names(tmp_path / "runs") == ["one"]
    assert (tmp_path / "runs" / "one" / "sub" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_new_folder_that_fails(tmp_path, error, there):
    if there:
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "old").write_text("old")
    with pytest.raises(error), files.new_folder(tmp_path / "one") as aside:
        (aside / "new").write_text("new")
        raise error
    assert names(tmp_path) == (["one"] if there else [])
    if there:
        assert (tmp_path / "one" / "old").read_text() == "old"


def test_new_folder_replaces_nothing(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), files.new_folder(tmp_path / "one") as aside:
        (aside / "new").write_text("new")
    assert names(tmp_path) == ["one"]
    assert names(tmp_path / "one") == ["old"]


def test_new_folder_after_a_kill(tmp_path):
    """What a killed process with the same number left behind is no hindrance: in a container numbers repeat."""
    stray = tmp_path / f".one.{os.getpid()}"
    stray.mkdir()
    (stray / "half").write_text("half")
    with files.new_folder(tmp_path / "one") as aside:
        (aside / "whole").write_text("whole")
    assert names(tmp_path) == ["one"]
    assert names(tmp_path / "one") == ["whole"]


def test_removed_checkpoint_is_never_half_there(tmp_path, monkeypatch):
    """A kill while a checkpoint goes away leaves no part of it that still counts as a checkpoint."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "meta.json").write_text("{}")

    def die(folder, **_):
        raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(SystemExit):
        checkpoint.remove(tmp_path / "checkpoint-3")
    assert checkpoint.checkpoints(tmp_path) == {}
    assert names(tmp_path) == [".checkpoint-3.old"]


def test_locked(tmp_path):
    """One process at a time; the lock leaves nothing behind and ends with its holder."""
    code = "import sys, pathlib; from lora.files import locked\nwith locked(pathlib.Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with files.locked(tmp_path):
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "another process is at work on it" in refused.stderr
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert names(tmp_path) == []


def test_replace_file(tmp_path):
    (tmp_path / "source").write_text("new")
    for _ in range(2):
        files.replace_file(tmp_path / "target", tmp_path / "source")
        assert (tmp_path / "target").read_text() == "new"
    assert names(tmp_path) == ["source", "target"]


def test_write_json(tmp_path):
    for value in ({"a": 1}, {"b": [2.5, None, "ü"]}):
        files.write_json(tmp_path / "x.json", value)
        assert files.read_json(tmp_path / "x.json") == value
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"path": tmp_path})
    assert files.read_json(tmp_path / "x.json") == value
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"{", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff\xfe", "not JSON")],
)
def test_read_json_problems(tmp_path, content, why):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems(files.read_json, path)
    assert problem.startswith(why)
    assert str(path) in problem
