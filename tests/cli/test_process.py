"""The command as a process: interrupts, readers that leave, what importing costs, and what ``info`` says."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest
import virtio_test
from virtio_test.cli.info import facts, info

from .conftest import COMMAND, Run


def test_an_interrupt_is_no_traceback() -> None:
    process = subprocess.Popen(
        [*COMMAND, "timer", "--real-time", "--first-after", "0.1", "--every", "60", "--ticks", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "==============set config:0\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""
    assert "Traceback" not in out


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "request", "1", "--count", "20000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["request", "--help"], ["--version"], ["info"]])
def test_a_reader_that_was_never_there_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_any_stdout_there_is_no_traceback() -> None:
    command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "request", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_installed_command_is_this_one() -> None:
    (entry,) = [each for each in entry_points(group="console_scripts") if each.name == "virtio-test"]
    assert entry.value == "virtio_test.cli:main"


def test_version(run: Run) -> None:
    assert run("--version").out == f"virtio-test, version {virtio_test.__version__}\n"


def test_import_loads_nothing_heavy() -> None:
    program = "import sys, virtio_test; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([*COMMAND[:3], "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"click", "rich", "logging", "hypothesis", "numpy", "asyncio"} & set(loaded)


def test_import_costs_under_100_ms() -> None:
    def seconds(program: str) -> float:
        started = time.perf_counter()
        subprocess.run([*COMMAND[:3], "-c", program], check=True)
        return time.perf_counter() - started

    seconds("import virtio_test")
    pairs = [(seconds("import virtio_test"), seconds("pass")) for _ in range(7)]
    # The least of each is the cost itself; the rest is what else the machine was doing.
    cost = min(ours for ours, _ in pairs) - min(bare for _, bare in pairs)
    assert cost < 0.1, f"{cost * 1000:.0f} ms, median {statistics.median(a - b for a, b in pairs) * 1000:.0f} ms"


def test_every_public_name_is_there() -> None:
    for name in virtio_test.__all__:
        assert getattr(virtio_test, name) is not None
    assert set(virtio_test.__all__) <= set(dir(virtio_test))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = virtio_test.no_such_name


def test_a_debug_core_warns_and_a_release_core_does_not() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import virtio_test"], capture_output=True, text=True, check=True
    )
    debug = virtio_test.build_info()["profile"] == "debug"
    assert ("DebugBuildWarning" in run.stderr) == debug


# --- info --------------------------------------------------------------------------------------------------


def test_info_is_a_table(run: Run) -> None:
    result = run("info")
    assert (result.status, result.err) == (0, "")
    for word in ("versions", "core", "features", "machine", virtio_test.__version__, "memfd", "/dev/kvm", "profile"):
        assert word in result.out


def test_info_as_json(run: Run) -> None:
    found = json.loads(run("info", "--json").out)
    assert set(found) == {"versions", "core", "features", "machine"}
    assert found["core"]["profile"] == virtio_test.build_info()["profile"]
    assert "RING_PACKED" in found["features"]["ring"]
    assert all(answer.startswith(("yes", "no")) for answer in found["machine"].values())
    assert found["machine"]["memfd"].startswith("yes"), "the tests could not run otherwise"


def test_info_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert facts()["machine"]["QEMU"].startswith("no (not in PATH")


def test_info_returns_what_it_shows() -> None:
    shown: list[str] = []
    assert [info(show=shown.append)] == shown
