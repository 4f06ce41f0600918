"""DPDK on both sides: our driver before net_vhost, and virtio-user before our network device."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from virtio_test.device import RING_FEATURES
from virtio_test.devices.net import Backend, Generate, NetDevice
from virtio_test.driver.net import NetDriver
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import DeviceId
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from tests.combinations import record
from tests.kernel.cache import BuildError
from tests.kernel.checks import ring
from tests.peers.dpdk import Testpmd
from tests.unit.vhost_user_world import serving

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
PATIENCE = 30.0
SMALL = 2048
"""Packets that a testpmd has memory for: it is up sooner."""


@contextmanager
def started(testpmd: type[Testpmd], path: Path, *, packed: bool | None = None) -> Generator[Testpmd]:
    try:
        if packed is None:
            made = testpmd.back_end(path, mbufs=SMALL)
        else:
            made = testpmd.driver(path, packed=packed, mbufs=SMALL)
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)
    with made:
        yield made


def test_our_driver_before_net_vhost(tmp_path: Path) -> None:
    """It offers CTRL_VQ, which is the front-end's to serve; frames come back as they were sent."""
    with started(Testpmd, tmp_path / "s") as testpmd:
        testpmd.tell("set fwd io")
        testpmd.tell("start")
        for way in ("split", "packed", "packed, indirect"):
            wanted = RING_FEATURES if way != "split" else RING_FEATURES - FeatureSet("RING_PACKED")
            with VhostUserRegisters(tmp_path / "s", device_id=DeviceId.NET, queues=2, timeout=PATIENCE) as registers:
                driver = NetDriver(registers, wanted=wanted, indirect=way.endswith("indirect"))
                features = driver.initialize()
                assert ("RING_PACKED" in features, "MRG_RXBUF" in features) == (way != "split", True)
                assert not {"CTRL_VQ", "MAC", "GUEST_ANNOUNCE"} & set(features)
                _bring_up(driver)
                for number in range(100):
                    sent = bytes([number]) * (60 + 14 * number)
                    driver.send(sent)
                    assert driver.receive(timeout=PATIENCE) == sent
                assert driver.findings == []
                assert registers.errors == []
                _ran(features, "net_vhost")


def _ran(agreed: FeatureSet, peer: str) -> None:
    bits = frozenset(bit for bit in range(64) if agreed.bits >> bit & 1)
    record(device="net", transport="vhost-user", carrier="vhost-user", ring=ring(bits), peer=f"DPDK 22.11 {peer}")


def _bring_up(driver: NetDriver) -> None:
    """It looks at a ring some time after it was enabled, and drops what comes before."""
    end = time.monotonic() + PATIENCE
    while not driver.frames:
        assert time.monotonic() < end
        driver.send(bytes(60))
        driver.loop.run_pending()
        time.sleep(0.01)
    driver.run_until(lambda: driver.counters["received"] > 0, "the first frame")
    time.sleep(0.05)
    driver.loop.run_pending()
    driver.frames.clear()


@RINGS
def test_virtio_user_before_our_device(tmp_path: Path, packed: bool) -> None:
    backends: list[tuple[Backend, str, str]] = [
        ("loopback", "io", "start tx_first 4"),
        (Generate(64), "rxonly", "start"),
    ]
    for backend, mode, start in backends:
        device = NetDevice(backend, pairs=2)
        with serving(tmp_path / "s", device), started(Testpmd, tmp_path / "s", packed=packed) as testpmd:
            testpmd.tell(f"set fwd {mode}")
            testpmd.tell(start)
            end = time.monotonic() + PATIENCE
            while (stats := testpmd.stats())["RX-packets"] < 2000:
                assert time.monotonic() < end, (stats, device.counters)
            testpmd.tell("stop")
            stats = testpmd.stats()
            assert (stats["RX-errors"], stats["TX-errors"]) == (0, 0)
            assert stats["RX-bytes"] == 64 * stats["RX-packets"]
            assert ("RING_PACKED" in device.negotiated) == packed
            assert device.findings == []
            assert device.counters["received"] >= stats["RX-packets"]
            _ran(device.negotiated, "virtio-user")
