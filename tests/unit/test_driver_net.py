"""The network driver against a device that puts what it is told to into buffers: headers, pieces, commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Chain, Policy
from virtio_test.carrier.loopback import Loopback
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES
from virtio_test.devices.chains import ChainDevice
from virtio_test.driver.net import MAX_FINDINGS, NetDriver
from virtio_test.errors import (
    AnswerViolation,
    InvalidArgument,
    NoFeature,
    PeerTimeout,
    RequestFailed,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet, check_own_offer
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import CONFIG_FIELDS, FEATURE_NAMES, HEADER, HEADER_LEGACY, REQUIRES, HeaderFlags, LinkStatus

from .class_world import RINGS, WAYS, errors, indirect, reach

MAC = bytes.fromhex("525400123456")
USUAL = ("MAC", "STATUS", "MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR")


def bits(*names: str) -> FeatureSet:
    return FeatureSet(*names, device=FEATURE_NAMES)


class Wire(ChainDevice):
    """A network device without a network: it keeps what is sent, and puts into receive buffers what it is told to."""

    def __init__(self, *names: str, mtu: int = 0, ack: bytes = b"\0") -> None:
        super().__init__(
            DeviceId.NET,
            chains={1: self._sent, 2: self._commanded},
            queue_sizes=(64, 64, 64) if "CTRL_VQ" in names else (64, 64),
            features=bits(*names),
            config=ConfigSpace(ConfigLayout(*CONFIG_FIELDS), mac=MAC, status=LinkStatus.LINK_UP, mtu=mtu),
            requires=REQUIRES,
        )
        self.ack = ack
        self.sent: list[bytes] = []
        self.cuts: list[list[int]] = []
        self.commands: list[bytes] = []

    def _sent(self, chain: Chain) -> int:
        self.cuts.append([length for _, length, _ in chain.segments])
        self.sent.append(chain.read())
        return 0

    def _commanded(self, chain: Chain) -> int:
        self.commands.append(chain.read())
        return chain.write(self.ack)

    @property
    def room(self) -> int:
        """Bytes of one receive buffer."""
        queue = self.queue(0)
        chain = queue.pop()
        assert chain is not None
        queue.unpop(chain)
        return chain.writable

    def put(self, *buffers: bytes) -> None:
        """Use one receive buffer for each of these."""
        queue = self.queue(0)
        for data in buffers:
            chain = queue.pop()
            assert chain is not None
            assert chain.write(data) == len(data)
            queue.push(chain)
        queue.signal()

    def frame(self, data: bytes, *, header: bytes | None = None) -> None:
        """Deliver a frame as a device does that keeps the rules."""
        size = 12 if "VERSION_1" in self.negotiated or "MRG_RXBUF" in self.negotiated else 10
        room = self.room
        count = -(-(size + len(data)) // room)
        if header is None:
            header = HEADER.pack(0, 0, 0, 0, 0, 0, count)[:size]
        whole = header + data
        self.put(*(whole[start : start + room] for start in range(0, len(whole), room)))


def live(*names: str, **options: Any) -> tuple[Wire, NetDriver]:
    device = Wire(*(names or USUAL))
    driver = NetDriver(Loopback(device), **options)
    driver.initialize()
    return device, driver


def frame(length: int) -> bytes:
    return bytes(each * 7 & 0xFF for each in range(length))


# --- as it should be ---------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("mergeable", [False, True])
def test_both_directions(way: str, mergeable: bool) -> None:
    device = Wire(*USUAL)
    registers = reach(device, way)
    driver = NetDriver(registers, wanted=RINGS[way], indirect=indirect(way), mergeable=mergeable)
    driver.initialize()
    size = 10 if way == "legacy" and not mergeable else 12
    assert driver.header_size == size
    assert (driver.mac, driver.link_up, driver.mtu) == (MAC, True, None)
    for length in (1, 14, 60, 1514):
        driver.send(frame(length)).wait()
        assert device.sent[-1] == bytes(size) + frame(length)
        device.frame(frame(length))
        assert driver.receive() == frame(length)
    for number in range(300):
        device.frame(frame(60) + bytes([number & 0xFF]))
        assert driver.receive() == frame(60) + bytes([number & 0xFF])
    assert driver.findings == []
    assert driver.counters == {"sent": 4, "received": 304}
    assert errors(registers) == []


def test_a_legacy_header_has_a_descriptor_of_its_own() -> None:
    device = Wire(*USUAL)
    driver = NetDriver(reach(device, "legacy"), mergeable=False)
    driver.initialize()
    driver.send(frame(60)).wait()
    assert device.cuts == [[10, 60]]
    queue = device.queue(0)
    chain = queue.pop()
    assert chain is not None
    assert [length for _, length, _ in chain.segments] == [10, 1518]
    queue.unpop(chain)
    modern, driver = live()
    driver.send(frame(60)).wait()
    assert modern.cuts == [[72]]
    assert modern.room == 12 + 1518


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=10),
    buffer_size=st.integers(1, 60),
    packed=st.booleans(),
)
def test_frames_in_pieces_come_together(lengths: Sequence[int], buffer_size: int, packed: bool) -> None:
    device = Wire(*USUAL)
    driver = NetDriver(Loopback(device), wanted=RINGS["packed" if packed else "split"], buffer_size=buffer_size)
    driver.initialize()
    for length in lengths:
        count = -(-(12 + length) // (12 + buffer_size))
        if count <= driver.buffers:
            device.frame(frame(length))
            assert driver.receive() == frame(length)
    driver.loop.run_pending()
    assert driver.findings == []
    assert not driver.frames


def test_frames_go_to_a_callback_or_wait_and_are_dropped_at_last() -> None:
    device, driver = live(max_frames=3)
    for number in range(5):
        device.frame(bytes([number]))
    driver.loop.run_pending()
    assert [driver.receive() for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert driver.counters["dropped"] == 2
    with pytest.raises(PeerTimeout, match="a frame"):
        driver.receive(timeout=1.0)
    got: list[bytes] = []
    device, driver = live(on_frame=got.append)
    device.frame(b"called")
    driver.loop.run_pending()
    assert got == [b"called"]


def test_the_receive_queue_stays_full() -> None:
    device, driver = live(buffers=5)
    for number in range(100):
        device.frame(bytes([number]))
        driver.loop.run_pending()
        assert len([each for each in driver.in_flight if each.queue_index == 0]) == 5


def test_sending_waits_for_room() -> None:
    device, driver = live(queue_size=8)
    for number in range(100):
        driver.send(bytes([number]) * 60)
    driver.loop.run_pending()
    assert [each[12:] for each in device.sent] == [bytes([number]) * 60 for number in range(100)]
    device.queue(1).stop()
    for _ in range(8):
        driver.send(b"x")
    with pytest.raises(PeerTimeout):
        driver.send(b"x", timeout=1.0)
    driver.reset()
    with pytest.raises(StateError):
        driver.send(b"x")


@pytest.mark.parametrize("length", [0, 1519])
def test_frames_that_cannot_be_sent(length: int) -> None:
    _, driver = live()
    with pytest.raises(InvalidArgument):
        driver.send(bytes(length))


def test_what_it_takes_of_an_offer() -> None:
    everything = Wire(*(name for name in FEATURE_NAMES))
    driver = NetDriver(Loopback(everything))
    everything.config.update(mtu=1500)
    assert driver.initialize() == bits(*USUAL, "MTU") | RING_FEATURES
    bare = NetDriver(Loopback(Wire("CSUM")))
    assert bare.initialize() == RING_FEATURES
    assert (bare.link_up, bare.mtu, bare.mac[0] & 3) == (True, None, 2)


def test_no_feature_without_what_it_requires() -> None:
    device = Wire("CTRL_VQ", "CTRL_RX")
    device.requires = {}
    driver = NetDriver(Loopback(device, offered=device.features - bits("CTRL_VQ")))
    assert "CTRL_RX" not in driver.initialize()
    for name, needs in REQUIRES.items():
        with pytest.raises(InvalidArgument, match="without"):
            check_own_offer(bits(name, "VERSION_1"), requires=REQUIRES)
        assert all(set(need.split("|")) <= set(FEATURE_NAMES) for need in needs)


def test_the_link_goes_down() -> None:
    device, driver = live()
    device.config.update(status=0)
    assert not driver.link_up


def test_the_mtu_bounds_both_directions() -> None:
    device = Wire("MTU", mtu=1000)
    driver = NetDriver(Loopback(device), mergeable=False)
    driver.initialize()
    assert driver.mtu == 1000
    driver.send(bytes(1018)).wait()
    with pytest.raises(InvalidArgument):
        driver.send(bytes(1019))
    device.frame(frame(1018))
    assert driver.receive() == frame(1018)
    device.frame(frame(1019))
    driver.loop.run_pending()
    assert [(each.rule, each.clause) for each in driver.findings] == [("FrameTooLong", "5.1.4.1")]


@pytest.mark.parametrize("mtu", [0, 67])
def test_an_mtu_that_cannot_be(mtu: int) -> None:
    driver = NetDriver(Loopback(Wire("MTU", mtu=mtu)))
    with pytest.raises(AnswerViolation, match="BadMtu"):
        driver.initialize()


def test_queues_that_are_not_there() -> None:
    device = Wire("MAC", "CTRL_VQ")
    device.queue_sizes = (64, 64)
    with pytest.raises(AnswerViolation, match="QueueMissing"):
        NetDriver(Loopback(device)).initialize()


def test_a_configuration_space_that_ends_early() -> None:
    registers = Loopback(Wire(*USUAL))
    registers.config_size = lambda: 6
    with pytest.raises(StatusViolation, match="ConfigTooShort"):
        _ = [driver.link_up for driver in [NetDriver(registers)] if driver.initialize()]


# --- what a device should not put into a buffer ------------------------------------------------------------


def header(count: int = 1, *, flags: int = 0, gso_type: int = 0) -> bytes:
    return HEADER.pack(flags, gso_type, 0, 0, 0, 0, count)


@pytest.mark.parametrize(
    ("buffers", "rule", "clause"),
    [
        ([b""], "HeaderTooShort", "5.1.9"),
        ([b"x" * 11], "HeaderTooShort", "5.1.9"),
        ([header(0) + b"x"], "BadNumBuffers", "5.1.9.3.2"),
        ([header(65) + b"x"], "BadNumBuffers", "5.1.9.3.2"),
        ([header(65535) + b"x"], "BadNumBuffers", "5.1.9.3.2"),
        ([header(2) + b"x", b"y"], "BufferNotFull", "5.1.9.4.1"),
        ([header(3) + b"x" * 20, b"y" * 31, b"z"], "BufferNotFull", "5.1.9.4.1"),
        ([header(2) + b"x" * 20, b""], "BufferEmpty", "5.1.9.4.1"),
        ([header(flags=HeaderFlags.NEEDS_CSUM) + b"x"], "OffloadNotNegotiated", "5.1.9.4.1"),
        ([header(flags=HeaderFlags.DATA_VALID) + b"x"], "OffloadNotNegotiated", "5.1.9.4.1"),
        ([header(gso_type=1) + b"x"], "OffloadNotNegotiated", "5.1.9.4.1"),
        ([header(2, gso_type=4) + b"x" * 20, b"y"], "OffloadNotNegotiated", "5.1.9.4.1"),
    ],
)
def test_a_frame_that_breaks_a_rule_is_dropped_and_the_next_is_not(
    buffers: Sequence[bytes], rule: str, clause: str
) -> None:
    device, driver = live(buffer_size=20)
    assert device.room == 32
    device.put(*buffers)
    device.frame(b"good")
    assert driver.receive() == b"good"
    assert [(each.rule, each.clause, each.queue) for each in driver.findings] == [(rule, clause, 0)]
    assert driver.counters == {"broken": 1, "received": 1}
    assert driver.live


def test_num_buffers_of_a_device_that_does_not_merge() -> None:
    for policy, found in ((Policy.interop, []), (Policy.strict, ["BadNumBuffers"])):
        device, driver = live("MAC", policy=policy)
        device.put(header(0) + b"old habits")
        driver.loop.run_pending()
        assert [each.rule for each in driver.findings] == found
        assert list(driver.frames) == ([] if found else [b"old habits"])


def test_a_legacy_header_has_no_num_buffers() -> None:
    device = Wire("MAC", "MRG_RXBUF")
    driver = NetDriver(reach(device, "legacy"), mergeable=False, policy=Policy.strict)
    driver.initialize()
    device.put(HEADER_LEGACY.pack(0, 0, 0, 0, 0, 0) + b"\xff\xffdata")
    assert driver.receive() == b"\xff\xffdata"


def test_findings_are_bounded() -> None:
    device, driver = live(buffer_size=20)
    for _ in range(MAX_FINDINGS + 10):
        device.put(b"")
        driver.loop.run_pending()
    assert len(driver.findings) == MAX_FINDINGS
    assert driver.counters["broken"] == MAX_FINDINGS + 10


@given(
    said=st.lists(
        st.one_of(
            st.binary(max_size=32),
            st.tuples(st.integers(0, 4), st.integers(0, 20)).map(lambda each: header(each[0]) + bytes(each[1])),
            st.just(bytes(32)),
        ),
        max_size=30,
    )
)
def test_whatever_comes_nothing_is_lost_but_frames(said: Sequence[bytes]) -> None:
    device, driver = live(buffer_size=20, buffers=30)
    device.put(*said)
    driver.loop.run_pending()
    assert driver.live
    assert len([each for each in driver.in_flight if each.queue_index == 0]) == 30
    assert driver.counters["received"] == len(driver.frames)
    assert all(len(each) <= 64 * 32 for each in driver.frames)
    driver.initialize()
    device.frame(b"fresh")
    driver.frames.clear()
    assert driver.receive() == b"fresh"


# --- commands ----------------------------------------------------------------------------------------------


@WAYS
def test_commands(way: str) -> None:
    device = Wire(*USUAL)
    driver = NetDriver(reach(device, way), wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    driver.set_promiscuous(on=True)
    driver.set_promiscuous(on=False)
    driver.set_mac(b"\x02abcde")
    assert device.commands == [b"\0\0\1", b"\0\0\0", b"\1\1\x02abcde"]
    assert driver.mac == b"\x02abcde"


@pytest.mark.parametrize(
    ("ack", "error", "text"),
    [
        (b"\1", RequestFailed, "command 0.0 was answered ERR"),
        (b"", AnswerViolation, "AckMissing"),
        (b"\xff", AnswerViolation, "AckMissing"),
        (b"\2", AnswerViolation, "AckUnknown"),
    ],
)
def test_acks(ack: bytes, error: type[Exception], text: str) -> None:
    device = Wire(*USUAL, ack=ack)
    driver = NetDriver(Loopback(device))
    driver.initialize()
    with pytest.raises(error, match=text):
        driver.set_promiscuous(on=True)
    assert driver.live


def test_commands_that_were_not_negotiated() -> None:
    _, driver = live("MAC")
    with pytest.raises(NoFeature):
        driver.command(0, 0, b"\1")
    with pytest.raises(NoFeature):
        driver.set_promiscuous(on=True)
    with pytest.raises(NoFeature):
        driver.set_mac(MAC)
    _, driver = live()
    with pytest.raises(InvalidArgument):
        driver.set_mac(b"short")


def test_impossible_numbers() -> None:
    wrong: list[dict[str, Any]] = [{"buffers": 0}, {"buffer_size": 0}, {"max_frames": 0}]
    for options in wrong:
        with pytest.raises(InvalidArgument):
            live(**options)
