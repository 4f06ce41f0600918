"""Programs that a pair needs built first: benches of our own crate, which cargo knows by name."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

from benches.runner import BenchError, MissingPeer

ROOT = Path(__file__).parents[1]


@functools.cache
def built(name: str) -> str:
    """The program of `[[bench]]` `name`, built as the core itself is, without Python.

    Raises:
        MissingPeer: there is no cargo.
        BenchError: it does not build; cargo has said why on standard error.
    """
    cargo = shutil.which("cargo") or shutil.which("cargo", path=Path.home() / ".cargo/bin")
    if cargo is None:
        raise MissingPeer(f"no cargo in PATH to build {name} with: install Rust 1.85 or newer (rustup)")
    command = [cargo, "bench", "--quiet", "--locked", "--no-default-features", "--no-run", "--bench", name]
    done = subprocess.run([*command, "--message-format=json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [message["executable"] for message in messages if message.get("target", {}).get("name") == name]
    if done.returncode or not found:
        raise BenchError(f"cargo could not build {name}")
    return found[-1]
