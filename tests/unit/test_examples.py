"""The examples do what they say, as functions and as scripts."""

from __future__ import annotations

import importlib.util
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from virtio_test import DeviceQueue, DriverQueue, GuestMemory
from virtio_test._core import QueueConfig, RingLayout

EXAMPLES = Path(__file__).parents[2] / "examples"
PYTEST = ("test_my_device",)
"""Those that pytest runs."""
NAMES = ("batch_device", "blk_device", "echo_device", "lying_function", "sum_driver")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NAMES, *PYTEST}


def test_batch_device(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("batch_device")
    text = example.main([])
    assert text == "[5.0, 3.0, 7.0] and so on, 60 in all, up to 60 at once"
    assert capsys.readouterr().out == text + "\n"
    memory = GuestMemory([(0, 0x10000)])
    config = QueueConfig.from_layout(RingLayout.contiguous(16, 0x1000))
    driver, queue = DriverQueue(memory, config), DeviceQueue(memory, config)
    memory.write(0x8000, struct.pack("<3f", 3, 4, 0))
    tokens = [driver.add([(0x8000, size)], [(0x9000 + size, 4)]) for size in (12, 8)]
    driver.publish()
    assert example.answer(queue) == 1
    assert driver.get_used_many() == [(tokens[0], 4), (tokens[1], 0)]
    assert memory.read(0x9000 + 12, 4) == struct.pack("<f", 5)


def test_blk_device(capsys: pytest.CaptureFixture[str]) -> None:
    text = load("blk_device").main([])
    assert text == "in a page: hello; sector 1 was written 9 times, 2 were at all"
    assert capsys.readouterr().out == text + "\n"


def test_echo_device(capsys: pytest.CaptureFixture[str]) -> None:
    text = load("echo_device").main([])
    assert text == "HELLO WORLD: 2 echoes, the longest of 5 bytes"
    assert capsys.readouterr().out == text + "\n"


def test_sum_driver(capsys: pytest.CaptureFixture[str]) -> None:
    text = load("sum_driver").main()
    assert text.startswith(f"[6, 0, {4 * (2**31 - 1)}] over SIGNED, INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED")
    assert capsys.readouterr().out == text + "\n"


def test_lying_function(capsys: pytest.CaptureFixture[str]) -> None:
    text = load("lying_function").main()
    found = dict(zip(text.splitlines()[::2], text.splitlines()[1::2], strict=True))
    assert found.pop("nothing:") == "  works: TestResponse(ret=111, arg1=112, arg2=113)"
    assert [each.split()[0] for each in found.values()] == [
        "RegionBeyondBar",
        "MissingCommon",
        "the",
        "FeaturesRefused",
        "BadQueueSize",
        "ConfigNeverStable",
    ]
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_as_a_script(name: str) -> None:
    # A debug core says so on stderr; that is its right, and not the script's output.
    run = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("name", ["blk_device", "echo_device"])
def test_the_device_is_served(name: str, tmp_path: Path) -> None:
    path = tmp_path / "served"
    program = [sys.executable, "-W", "ignore::UserWarning", EXAMPLES / f"{name}.py", path]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 30
            with socket.socket(socket.AF_UNIX) as front_end:
                front_end.settimeout(30)
                # The socket is not there at once, and then it does not listen yet.
                while front_end.connect_ex(str(path)) and time.monotonic() < deadline:
                    time.sleep(0.01)
                # GET_FEATURES: once it is answered, the server is past its start and hears signals.
                front_end.sendall(struct.pack("<3I", 1, 1, 0))
                assert len(front_end.recv(20)) == 20
            process.terminate()
            assert process.communicate(timeout=30) == (b"", b"")
        finally:
            process.kill()
    assert process.returncode == 0
    assert not path.exists()


@pytest.mark.parametrize("name", PYTEST)
def test_as_tests(name: str, tmp_path: Path) -> None:
    """Far from our own configuration, as in a project of one's own."""
    (tmp_path / f"{name}.py").write_text((EXAMPLES / f"{name}.py").read_text())
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout


@pytest.mark.parametrize("name", [*NAMES, *PYTEST])
def test_a_page_is_a_page(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
