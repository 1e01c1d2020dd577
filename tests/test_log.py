"""lora/log.py: what a terminal shows while a run trains."""

import os
import pty
import sys
import termios

from lora.log import RunLog


def test_bar_fits_80_columns(tmp_path, monkeypatch):
    """Of a long run, loss, speed and memory are to be seen."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        log = RunLog(tmp_path, 1233, 12000)
        speed = {"tokens_per_s": 123456.7, "mem_reserved_gib": 123.45}
        log.train(1234, {"loss": 1.23456, "lr": 1.234e-4, "grad_norm": 1.2345, **speed})
        log.close()
        shown = os.read(ours, 10_000).decode().strip().split("\r")[-1]
    os.close(ours)
    assert "loss=1.2346, tok/s=123,457, GiB=123.5" in shown
    assert len(shown) <= 80
