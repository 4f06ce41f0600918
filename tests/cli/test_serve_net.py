"""``virtio-test serve --device net``: what its options make of it, and the wrong ones in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_test.driver.net import NetDriver
from virtio_test.errors import PeerTimeout
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import FEATURE_NAMES
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .conftest import Run
from .test_drive import served


def _loops(driver: NetDriver) -> None:
    driver.send(b"frame" * 20)
    assert driver.receive() == b"frame" * 20


def _generates(driver: NetDriver) -> None:
    first, second = driver.receive(), driver.receive()
    assert first[:6] == driver.mac == bytes.fromhex("525400123456")
    assert (len(first), int.from_bytes(first[14:22], "big")) == (200, 0)
    assert int.from_bytes(second[14:22], "big") == 1


def _drops(driver: NetDriver) -> None:
    assert driver.mtu == 1000
    driver.send(b"frame").wait()
    with pytest.raises(PeerTimeout):
        driver.receive(timeout=0.1)


GENERATE = ("--backend", "generate", "--frame-size", "200", "--mac", "52:54:00:12:34:56")


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ((), _loops),
        (("--queues", "4"), _loops),
        (("--native", "loop"), _loops),
        (("--queues", "4", "--native", "adaptive"), _loops),
        (
            ("--backend", "generate", "--frame-size", "200", "--mac", "52:54:00:12:34:56", "--native", "busy"),
            _generates,
        ),
        (("--backend", "generate", "--frame-size", "200", "--mac", "52:54:00:12:34:56"), _generates),
        (("--backend", "drop", "--mtu", "1000"), _drops),
    ],
)
def test_a_network_device(tmp_path: Path, options: tuple[str, ...], check: Callable[[NetDriver], None]) -> None:
    with (
        served(tmp_path / "s", "--device", "net", *options) as path,
        VhostUserRegisters(path, device_id=DeviceId.NET, timeout=30) as registers,
    ):
        driver = NetDriver(registers)
        driver.initialize()
        offered_mq = bool(registers.device_features() >> FEATURE_NAMES["MQ"] & 1)
        assert offered_mq == ("--queues" in options)
        check(driver)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "blk", "--backend", "drop"), "--backend is an option of the device net, not of blk"),
        (("--device", "net", "--image", "x"), "--image is an option of the device blk, not of net"),
        (("--device", "console", "--native", "busy"), "--native is an option of the device blk, not of console"),
        (("--device", "rng", "--native", "wild"), "'wild' is not one of 'loop', 'blocking', 'adaptive', 'busy'"),
        (("--device", "net", "--frame-size", "60"), "give --backend generate"),
        (("--device", "net", "--mac", "52:54"), "'52:54' is no MAC address: give one such as 52:54:00:12:34:56"),
        (("--device", "net", "--mac", "01:00:00:00:00:01"), "is no address of 6 bytes that one interface can have"),
        (("--device", "net", "--mtu", "67"), "give a number from 68 to 65535"),
        (("--device", "net", "--backend", "tap"), "'tap' is not one of 'loopback', 'drop', 'generate'"),
    ],
)
def test_wrong_options_are_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run("serve", "--socket", str(tmp_path / "s"), *arguments)
    assert (result.status, result.out) == (2, "")
    assert says in result.err
    assert result.err.count("\n") == 1
