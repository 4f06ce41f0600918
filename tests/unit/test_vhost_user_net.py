"""Network devices behind vhost-user: whose the control queue is, and pairs without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from virtio_test._core import DriverQueue, GuestMemory, QueueConfig, RingLayout
from virtio_test.device import RING_FEATURES
from virtio_test.devices.net import NetDevice
from virtio_test.driver.net import NetDriver
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import FEATURE_NAMES
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import ProtocolFeature
from virtio_test.transport.vhost_user.network import not_ours_to_take
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .vhost_user_world import serving
from .world import PATIENCE, eventually

F = ProtocolFeature
USUAL = F.MQ | F.CONFIG | F.REPLY_ACK | F.STATUS


def bits(*names: str) -> FeatureSet:
    return FeatureSet(*names, device=FEATURE_NAMES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [1, 3])
def test_our_own_back_end_has_a_control_queue(tmp_path: Path, packed: bool, pairs: int) -> None:
    device = NetDevice(pairs=pairs)
    wanted = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
    with (
        serving(tmp_path / "s", device) as server,
        VhostUserRegisters(server.path, device_id=DeviceId.NET, timeout=PATIENCE) as registers,
    ):
        driver = NetDriver(registers, wanted=wanted)
        driver.initialize()
        assert {"CTRL_VQ", "MRG_RXBUF", "STATUS"} <= set(driver.features)
        driver.set_promiscuous(on=True)
        for number in range(100):
            driver.send(bytes([number]) * (number + 1))
            assert driver.receive() == bytes([number]) * (number + 1)
        assert driver.findings == device.findings == []


@pytest.mark.parametrize("offered", [F.MQ | F.REPLY_ACK, F(0), F.CONFIG], ids=["no space", "nothing", "no count"])
def test_where_it_is_the_front_ends_the_driver_sees_none(tmp_path: Path, offered: ProtocolFeature) -> None:
    """As with DPDK's: the features are on offer, and there is no such queue, or nobody can tell."""
    queues = None if offered & F.MQ else 2
    with (
        serving(tmp_path / "s", NetDevice(), protocol_features=offered) as server,
        VhostUserRegisters(server.path, device_id=DeviceId.NET, queues=queues, timeout=PATIENCE) as registers,
    ):
        driver = NetDriver(registers)
        accepted = driver.initialize()
        assert "MRG_RXBUF" in accepted
        hidden = {"CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR", *(() if offered & F.CONFIG else ("MAC", "STATUS"))}
        assert not hidden & set(accepted)
        driver.send(b"frame")
        assert driver.receive() == b"frame"


def test_every_feature_that_needs_the_queue_goes_with_it() -> None:
    commanded = not_ours_to_take(queues=2, pairs=1)
    names = set(FeatureSet.from_bits(commanded, device=FEATURE_NAMES))
    assert {"CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "GUEST_ANNOUNCE", "MQ", "CTRL_MAC_ADDR", "RSS"} <= names
    assert not names & {"MAC", "STATUS", "MTU", "MRG_RXBUF", "CSUM"}
    assert not_ours_to_take(queues=3, pairs=1) == 0
    assert not_ours_to_take(queues=6, pairs=3) == commanded
    without = set(FeatureSet.from_bits(not_ours_to_take(queues=128, pairs=None), device=FEATURE_NAMES))
    assert without == names | {"MAC", "STATUS", "MTU", "HASH_REPORT", "SPEED_DUPLEX"}


@pytest.mark.parametrize("running", [1, 2])
def test_without_a_control_queue_every_pair_that_runs_is_in_use(tmp_path: Path, running: int) -> None:
    """As with QEMU and DPDK in front: MQ is negotiated, and the commands end there."""
    device = NetDevice(pairs=2)
    with (
        serving(tmp_path / "s", device) as server,
        VhostUserRegisters(server.path, device_id=DeviceId.NET, timeout=PATIENCE) as registers,
    ):
        driver = NetDriver(registers, wanted=RING_FEATURES | bits("MQ"))
        enable = registers.enable_queue

        def some(config: QueueConfig) -> None:
            if config.index < 2 * running:
                enable(config)

        registers.enable_queue = some
        driver.initialize()
        assert device.control_queue == 4
        for pair in range(running):
            into = driver.submit(2 * pair, [], [100]) if pair else None
            driver.submit(2 * pair + 1, [bytes(12) + b"pair %d" % pair]).wait()
            got = driver.receive() if into is None else into.wait()[12:]
            assert got == b"pair %d" % pair


def test_a_front_end_keeps_the_control_queue_and_negotiates_the_rest(tmp_path: Path) -> None:
    """QEMU accepts what the control queue is needed for, and not the queue."""
    device = NetDevice(pairs=2)
    accepted = bits("MQ", "GUEST_ANNOUNCE", "MRG_RXBUF", "MAC", "VERSION_1")
    with serving(tmp_path / "s", device) as server, FrontEnd(server.path, timeout=PATIENCE) as front:
        assert front.negotiate(accepted, protocol_features=USUAL) == accepted
        memory = GuestMemory([(0, 1 << 20)])
        front.share(memory)
        rings = [RingLayout.contiguous(8, 0x1000 * (index + 1)) for index in range(4)]
        queues = [DriverQueue(memory, QueueConfig.from_layout(layout, index=n)) for n, layout in enumerate(rings)]
        running = [front.setup_ring(queue.config) for queue in queues]
        for index in range(4):
            front.enable(index)
        queues[2].add([], [(0x20000, 100)])
        memory.write(0x30000, bytes(12) + b"second pair")
        queues[3].add([(0x30000, 23)], [])
        for index in (2, 3):
            queues[index].publish()
            running[index].kick.notify()
        assert eventually(queues[2].has_used)
        assert memory.read(0x20000 + 12, 11) == b"second pair"
        assert (device.control_queue, device.pairs_in_use) == (None, 2)
