"""The cache folder: what was built once for given inputs is built no more.

An entry is a folder ``NAME-HASH``, the hash being that of everything the result depends on and that we decide:
files, recipe, compiler. Debian's package versions are not among it, or every security update would cost two minutes;
which versions came stands in the entry's ``versions.txt``.

An entry is built in a folder beside it and renamed when it is whole, under a lock: a build that was interrupted, or
two at once, leave no half entry behind.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class BuildError(Exception):
    """Something needed for the guests is missing or cannot be built; the message is one line."""


def root() -> Path:
    """The cache folder: ``VIRTIO_TEST_CACHE``, else ``virtio-test`` in the user's cache folder."""
    chosen = os.environ.get("VIRTIO_TEST_CACHE")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "virtio-test"


def digest(*parts: str | bytes | Path) -> str:
    """A hash of texts, bytes, and of files by their names and contents, as 16 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            data = part.name.encode() + b"\0" + part.read_bytes()
        else:
            data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


def recipe(*functions: Callable[..., object]) -> str:
    """The source of what builds an entry: the entry is built anew when that changes, and not with every other line."""
    return "".join(map(inspect.getsource, functions))


@functools.cache
def compiler() -> str:
    """The version of this system's compiler.

    Raises:
        BuildError: there is none.
    """
    return run(["gcc", "-dumpfullversion"], what="asking for the compiler's version").strip()


def entry(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry; ``build`` is called with an empty folder where there is none yet.

    Raises:
        BuildError: the cache folder cannot be written, or the build says so.
    """
    path = root() / f"{name}-{key}"
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / f"{name}.lock"):
            if not path.is_dir():
                _build(path, build)
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror or error}: set VIRTIO_TEST_CACHE to a folder that works") from error
    return path


def _build(path: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(
    command: Sequence[str | Path], *, what: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Runs a command to its end and returns its standard output.

    Args:
        command: program and arguments.
        what: what it does, for the message.
        cwd: where it runs.
        env: its whole environment; ours by default.

    Raises:
        BuildError: it is not installed, or failed; the message ends with the line that says why.
    """
    program = str(command[0])
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BuildError(f"{what}: no program '{program}': install what guest/debian-packages.txt lists") from error
    if done.returncode:
        raise BuildError(
            f"{what} failed: {program} exited with {done.returncode}: {_reason(done.stderr or done.stdout)}"
        )
    return done.stdout


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "error:")) or " error" in line.lower() or "***" in line]
    return (telling or lines or ["it said nothing"])[0][:300]
