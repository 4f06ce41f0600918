"""How the command is run: in this process, where only its output matters, and as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from virtio_test.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


Run = Callable[..., Result]

COMMAND = (sys.executable, "-W", "ignore::UserWarning", "-m", "virtio_test")
"""As a process of its own; a debug core says so on stderr, which is its right and not the command's output."""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Result:
        capfd.readouterr()
        status = main(list(arguments))
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return call


@pytest.fixture
def spawn() -> Run:
    def call(*arguments: str) -> Result:
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    return call
