"""The judge before our own device, before QEMU's, and before processes that really die, hang and spin."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from virtio_test import judge
from virtio_test.cli import main
from virtio_test.errors import InvalidArgument
from virtio_test.judge import Result, Verdict
from virtio_test.strategies import RingCase

from tests.kernel.cache import BuildError
from tests.peers import reference
from tests.unit.world import open_fds

PATIENT = 3.0
"""Seconds: these machines are busy."""


def judged(name: str, *rows: str, program: str | None = None, patience: float = PATIENT) -> list[Result]:
    """One case for each ring of these rows."""
    first: dict[tuple[str, bool], judge.Case] = {}
    for case in judge.chosen(rows):
        first.setdefault((case.row, isinstance(case, RingCase) and case.packed), case)
    try:
        target = judge.named(name).started_by(program) if name in judge.TARGETS else reference.target(name)
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)
    return judge.judge(target, first.values(), patience=patience)


def faulty(kind: str) -> str:
    """The words that start a target with that fault."""
    return shlex.join([sys.executable, str(Path(__file__).with_name("faulty.py")), kind])


def test_our_own_device_survives() -> None:
    before = open_fds()
    found = judged("virtio-test", "A01", "A04", "A08", "C02", "I06", "P15", "P16")
    assert {(each.row, each.verdict) for each in found} == {
        (row, Verdict.SURVIVES) for row in ("A01", "A04", "A08", "C02", "I06", "P15", "P16")
    }
    assert all("says that the queue is broken" in each.evidence for each in found if each.row != "A08")
    assert open_fds() == before


def test_qemu_storage_daemon_refuses() -> None:
    found = judged("qemu-storage-daemon-testing", "A02", "A04", "C01", "P16", "M01")
    # It offers no packed ring, so P16 cannot be put to it.
    assert [(each.row, each.ring, each.verdict) for each in found] == [
        ("A02", "split", Verdict.SURVIVES),
        ("A04", "split", Verdict.REFUSES),
        ("C01", "split", Verdict.REFUSES),
        ("M01", "messages", Verdict.IGNORES),
    ]
    # A header of version 0 is one to it.
    assert [each.evidence for each in found[3:]] == ["takes it"]
    assert all("ends the connection" in each.evidence for each in found[1:3])


def test_a_device_of_qemu_says_that_it_is_broken() -> None:
    found = judged("qemu-virtio-blk-testing", "A02", "A04", "B17")
    assert [(each.row, each.verdict) for each in found if each.ring == "split"] == [
        ("A02", Verdict.SURVIVES),
        ("A04", Verdict.SURVIVES),
        ("B17", Verdict.SURVIVES),
    ]
    assert "says that the queue is broken" in next(each.evidence for each in found if each.row == "A04")


@pytest.mark.row("P13")
def test_a_register_that_takes_no_such_size_is_a_refusal_and_no_end_of_the_service() -> None:
    found = judged("qemu-virtio-rng-testing", "P13", "B09")
    # B09 needs 16 descriptors, and this device has 8: it cannot be asked that.
    assert {(each.row, each.verdict) for each in found} == {("P13", Verdict.REFUSES)}


@pytest.mark.parametrize(
    ("kind", "verdict", "evidence"),
    [
        ("abort", Verdict.DIES, "signal SIGABRT"),
        ("exit", Verdict.DIES, "exit status 3"),
        ("next", Verdict.DIES, "signal SIGABRT"),
        ("sleep", Verdict.HANGS, "answers no good request any more"),
        ("spin", Verdict.HANGS, "spins"),
    ],
)
def test_what_becomes_of_a_process_is_told(kind: str, verdict: Verdict, evidence: str) -> None:
    (found,) = judged("virtio-test", "A04", program=faulty(kind), patience=1.0)
    assert found.verdict is verdict
    assert evidence in found.evidence
    assert found.steady
    assert found.command == "virtio-test judge --target virtio-test --row A04"


def test_a_hang_that_is_not_seen_again_is_told_and_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTY_MARK", str(tmp_path / "mark"))
    (found,) = judged("virtio-test", "A04", program=faulty("once"), patience=1.0)
    assert (found.verdict, found.steady) == (Verdict.SURVIVES, False)
    assert "; hangs the other time: " in found.evidence
    assert found.evidence.endswith("answers no good request any more")


def test_who_is_only_slow_does_not_hang() -> None:
    """Three seconds are more than everything that is waited for at first, and less than it is the second time."""
    (found,) = judged("virtio-test", "A04", program=faulty("pause"), patience=0.7)
    assert found.verdict not in judge.BAD
    assert not found.steady


def test_what_a_machine_says_of_what_came_later_is_seen() -> None:
    """A first chain was completed; then the index goes back."""
    found = judged("qemu-virtio-rng-testing", "A10")
    assert [each.verdict for each in found] == [Verdict.SURVIVES]
    assert "says that the queue is broken" in found[0].evidence


def test_a_target_that_does_not_serve_at_all_is_no_verdict() -> None:
    with pytest.raises(InvalidArgument, match="does not come up"):
        judged("virtio-test", "A04", program="false")


def test_the_command_shows_and_writes_what_was_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    program = faulty("exit")
    options = ["--target", "virtio-test", "--program", program, "--row", "A08", "--row", "A04", "--patience", "2"]
    assert main(["judge", *options, "--markdown", str(page)]) == 1
    out = capfd.readouterr().out
    assert "A04  split  dies" in out
    assert (
        f"again: virtio-test judge --target virtio-test --row A04 --program {shlex.quote(program)} --patience 2" in out
    )
    assert "A08  split  survives" in out
    assert "| A04 | split | An avail ring entry is no index" in page.read_text()
    assert main(["judge", "--target", "virtio-test", "--row", "A08", "--patience", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {each["verdict"] for each in found["results"]} == {"survives"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_whoever_ends_the_judge_ends_what_it_started(tmp_path: Path, number: int, status: int) -> None:
    """Its targets have sessions of their own, so a terminal or a time limit would not reach them."""
    words = ["judge", "--target", "virtio-test", "--program", faulty("sleep"), "--row", "A04", "--patience", "60"]
    with subprocess.Popen(
        [sys.executable, "-m", "virtio_test", *words],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
    ) as process:
        # The first folder is that of the good request.
        end, folders = time.monotonic() + 60, set[Path]()
        while len(folders) < 2 or not any((each / "s").exists() for each in tmp_path.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.05)
            folders |= set(tmp_path.iterdir())
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert b"Traceback" not in error
    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


def processes_with(text: str) -> list[str]:
    """Command lines that contain it."""
    found: list[str] = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = each.read_bytes().decode(errors="replace").replace("\0", " ")
            found += [words] * (text in words)
    return found
