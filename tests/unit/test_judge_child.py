"""One target as a process: how it ends is told, and nothing of it stays."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from virtio_test.errors import PeerDisconnected
from virtio_test.judge.child import Child

from tests.unit.world import open_fds


def child(folder: Path, script: str, *, up: str = "up") -> Child:
    return Child(("/bin/sh", "-c", f"echo up; {script}"), folder, ready=lambda said: up in said)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int) -> bool:
    """Whether it ends: a killed one is still there for a moment."""
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("exit 0", "exit status 0: up"),
        ("exit 3", "exit status 3: up"),
        ("kill -ABRT $$", "signal SIGABRT: up"),
        ("kill -40 $$", "signal SIGRTMIN+6: up"),
    ],
)
def test_how_it_ended(tmp_path: Path, script: str, how: str) -> None:
    with child(tmp_path, script) as one:
        assert one.died(10) == how
        assert not one.alive
        assert one.died() == how


def test_what_it_says_as_it_ends_is_heard(tmp_path: Path) -> None:
    """It is looked at just before it speaks, and ends before it is looked at again."""
    go, pid = tmp_path / "go", tmp_path / "pid"
    script = f"echo $$ > {pid}; while [ ! -e {go} ]; do sleep 0.01; done; echo up"

    def ready(said: str) -> bool:
        if pid.exists() and pid.read_text() and not go.exists():
            go.touch()
            assert ended(int(pid.read_text()))
        return "up" in said

    with Child(("/bin/sh", "-c", script), tmp_path, ready=ready) as one:
        assert one.died() == "exit status 0: up"


def test_what_it_started_ends_with_it_even_if_it_ended_first(tmp_path: Path) -> None:
    """Its id is not free before that: a group of the same number could be somebody else's."""
    before = open_fds()
    with child(tmp_path, "sleep 1000 & echo $! > pid; exit 1".replace("pid", str(tmp_path / "pid"))) as one:
        assert one.died(10).startswith("exit status 1")
        other = int((tmp_path / "pid").read_text())
        assert alive(other)
        first = one._process.pid  # type: ignore[reportPrivateUsage]
        assert os.getpgid(first) == first
    assert ended(other)
    assert open_fds() == before
    one.close()
    assert not one.alive


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whoever_gives_up_waiting_for_it_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    pid: list[int] = []
    before = open_fds()

    def interrupted(said: str) -> bool:
        if not said.strip():
            return False
        pid.append(int(said))
        raise error

    with pytest.raises(error):
        Child(("/bin/sh", "-c", "echo $$; exec sleep 1000"), tmp_path, ready=interrupted)
    assert ended(pid[0])
    assert open_fds() == before


def test_it_runs_where_its_words_mean_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tool").symlink_to("/bin/sh")
    (tmp_path / "script").write_text("echo up; echo $RUNTIME_DIRECTORY; exec sleep 1000")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with Child(("./tool", "script"), folder, ready=lambda said: str(folder) in said) as one:
        assert one.alive


def test_one_that_does_not_come_up(tmp_path: Path) -> None:
    with pytest.raises(PeerDisconnected, match="false does not come up: it said nothing"):
        Child(("false",), tmp_path, ready=lambda _: False)
    with pytest.raises(PeerDisconnected, match=f"{sys.executable}/x cannot be started: Not a directory"):
        Child((f"{sys.executable}/x",), tmp_path, ready=lambda _: False)
