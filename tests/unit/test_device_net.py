"""The network device: back-ends, merged buffers, headers that must not be sent, commands, pairs of queues."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES, Device
from virtio_test.devices.net import MAX_FINDINGS, Generate, NetDevice
from virtio_test.driver.net import NetDriver
from virtio_test.errors import InvalidArgument, PeerTimeout, QueueViolation, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.net import FEATURE_NAMES, HEADER, ControlClass, HeaderFlags, LinkStatus

from .class_world import RINGS, WAYS, errors, indirect, reach

MAC = bytes.fromhex("525400123456")
TX, RX, CONTROL = 1, 0, 2


def bits(*names: str) -> FeatureSet:
    return FeatureSet(*names, device=FEATURE_NAMES)


def live(device: NetDevice, *more: str, **options: Any) -> NetDriver:
    """A driver, which also takes the features `more`."""
    driver = NetDriver(Loopback(device), wanted=RING_FEATURES | bits(*more), **options)
    driver.initialize()
    return driver


def frame(length: int) -> bytes:
    return bytes(each * 7 & 0xFF for each in range(length))


def header(*, flags: int = 0, gso_type: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return HEADER.pack(flags, gso_type, 0, 0, start, offset, 0)


def settle(driver: NetDriver) -> None:
    driver.loop.run_pending()


# --- as it should be ---------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("mergeable", [False, True])
def test_what_is_sent_comes_back(way: str, mergeable: bool) -> None:
    device = NetDevice(mac=MAC, mergeable=mergeable)
    assert isinstance(device, Device)
    registers = reach(device, way)
    driver = NetDriver(registers, wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    assert device.header_size == driver.header_size == (10 if way == "legacy" and not mergeable else 12)
    assert (driver.mac, driver.link_up, driver.mtu) == (MAC, True, None)
    for number in range(200):
        sent = frame(1 + number * 7) + bytes([number])
        driver.send(sent)
        assert driver.receive() == sent
    assert (driver.findings, device.findings, errors(registers)) == ([], [], [])
    assert device.counters["sent"] == device.counters["received"] == 200
    assert device.counters["sent_bytes"] == device.counters["received_bytes"]
    assert device.counters["dropped"] == 0


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8), buffer_size=st.integers(1, 60))
def test_a_frame_fills_as_many_buffers_as_it_needs(lengths: Sequence[int], buffer_size: int) -> None:
    device = NetDevice()
    driver = live(device, buffer_size=buffer_size)
    for length in lengths:
        fits = -(-(12 + length) // (12 + buffer_size)) <= driver.buffers
        driver.send(frame(length)).wait()
        settle(driver)
        assert list(driver.frames) == ([frame(length)] if fits else [])
        driver.frames.clear()
    assert driver.findings == device.findings == []
    assert device.queue(RX).in_flight == 0


def test_a_callable_answers_with_frames() -> None:
    seen: list[bytes] = []

    def twice(sent: bytes) -> list[bytes]:
        seen.append(sent)
        return [sent.upper(), sent * 2]

    driver = live(NetDevice(twice))
    driver.send(b"frame")
    assert [driver.receive(), driver.receive()] == [b"FRAME", b"frameframe"]
    assert seen == [b"frame"]
    silent = NetDevice(lambda _: None)
    driver = live(silent)
    driver.send(b"frame").wait()
    assert (silent.counters["sent"], silent.counters["received"]) == (1, 0)


def test_nothing_comes_back_of_what_is_dropped() -> None:
    device = NetDevice("drop")
    driver = live(device)
    driver.send(frame(60)).wait()
    with pytest.raises(PeerTimeout):
        driver.receive(timeout=1)
    assert device.counters == {"sent": 1, "sent_bytes": 60}


@pytest.mark.parametrize("size", [14, 21, 22, 64, 1514])
def test_frames_are_generated_while_there_are_buffers(size: int) -> None:
    backend = Generate(size, count=100)
    device = NetDevice(backend, mac=MAC)
    driver = live(device, buffers=8)
    got = [driver.receive() for _ in range(100)]
    assert got == [backend.frame(MAC, number) for number in range(100)]
    assert {len(each) for each in got} == {size}
    assert len(set(got)) == (100 if size >= 22 else 1)
    with pytest.raises(PeerTimeout):
        driver.receive(timeout=1)
    driver.initialize()
    assert driver.receive() == backend.frame(MAC, 0)


def test_a_generator_without_end_keeps_nobody_waiting() -> None:
    device = NetDevice(Generate(60))
    driver = live(device, max_frames=100)
    driver.run_until(lambda: device.counters["received"] > 2000, "many frames")
    assert driver.counters["dropped"] > 0
    assert driver.findings == []


def test_a_generated_frame_that_does_not_fit_waits_for_no_kick_of_its_own() -> None:
    device = NetDevice(Generate(64), mergeable=False)
    driver = live(device, buffer_size=20)
    settle(driver)
    assert [each.rule for each in device.findings] == ["BufferTooSmall"] * len(device.findings)
    assert 1 <= len(device.findings) < 10
    assert device.counters["received"] == 0


def test_frames_from_elsewhere() -> None:
    device = NetDevice("drop")
    assert not device.deliver(b"nobody is there")
    driver = live(device, buffers=4)
    for number in range(10):
        assert device.deliver(b"%d" % number)
        assert driver.receive() == b"%d" % number
    assert not device.deliver(b"no such pair", pair=1)
    device.hold()
    assert not device.deliver(b"held")
    device.release()
    assert [device.deliver(b"x") for _ in range(5)] == [True] * 4 + [False]
    for wrong in (b"", bytes(70_000)):
        with pytest.raises(InvalidArgument):
            device.deliver(wrong)


def test_without_a_link_nothing_goes_through() -> None:
    device = NetDevice()
    driver = live(device)
    told: list[bool] = []
    driver.config_changed = lambda: told.append(driver.link_up)
    device.set_link(up=False)
    settle(driver)
    driver.send(frame(60)).wait()
    assert device.counters["dropped"] == 1
    device.set_link(up=True)
    settle(driver)
    assert told == [False, True]
    driver.send(frame(60))
    assert driver.receive() == frame(60)


def test_an_mtu_holds_in_both_directions() -> None:
    device = NetDevice(lambda _: [bytes(1018), bytes(1019)], mtu=1000)
    driver = live(device, mergeable=False)
    assert driver.mtu == 1000
    driver.send(bytes(1018))
    assert driver.receive() == bytes(1018)
    driver.submit(TX, [bytes(12 + 1019)]).wait()
    settle(driver)
    assert [(each.rule, each.clause) for each in device.findings] == [("FrameTooLong", "5.1.4.2")]
    assert device.counters["dropped"] == 1


# --- checksums ---------------------------------------------------------------------------------------------


def test_a_checksum_that_is_left_out_is_passed_on_or_completed() -> None:
    seen: list[bytes] = []
    device = NetDevice(checksum=True)
    driver = live(device, "CSUM", "GUEST_CSUM")
    data = bytes(range(40, 61))
    lacking = header(flags=HeaderFlags.NEEDS_CSUM, start=4, offset=6) + data
    driver.submit(TX, [lacking]).wait()
    # Our driver never accepts the offload and says so; what it got is what was sent.
    settle(driver)
    assert [each.rule for each in driver.findings] == ["OffloadNotNegotiated"]
    device = NetDevice(seen.append, checksum=True)
    live(device, "CSUM").submit(TX, [lacking]).wait()
    (whole,) = seen
    assert whole[:10] + whole[12:] == data[:10] + data[12:]
    padded = data[4:] + b"\0"
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    assert int.from_bytes(whole[10:12], "big") == ~(total % 0xFFFF or 0xFFFF) & 0xFFFF
    looped = NetDevice(checksum=True)
    driver = live(looped, "CSUM")
    driver.submit(TX, [lacking]).wait()
    assert driver.receive() == whole
    assert driver.findings == []


# --- what a driver must not send ---------------------------------------------------------------------------


BAD = {
    "nothing": (b"\0", "HeaderTooShort", "5.1.9"),
    "a byte less": (header()[:11], "HeaderTooShort", "5.1.9"),
    "no frame": (header(), "FrameMissing", "5.1.9"),
    "csum": (header(flags=1) + b"x" * 60, "OffloadNotNegotiated", "5.1.9.2.1"),
    "data valid": (header(flags=2) + b"x" * 60, "OffloadNotNegotiated", "5.1.9.2.1"),
    "rsc": (header(flags=4) + b"x" * 60, "OffloadNotNegotiated", "5.1.9.2.1"),
    "tso4": (header(gso_type=1) + b"x" * 60, "OffloadNotNegotiated", "5.1.9.2.1"),
    "ecn": (header(gso_type=0x80) + b"x" * 60, "OffloadNotNegotiated", "5.1.9.2.1"),
    "too long": (header() + bytes(0xFFFF + 19), "FrameTooLong", "5.1.4.2"),
}


def returned(sent: bytes) -> list[bytes]:
    return [sent]


@pytest.mark.parametrize(
    "backend", ["loopback", "drop", Generate(60, count=0), returned], ids=["loop", "drop", "made", "own"]
)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_frame_is_told_of_and_goes_no_further(name: str, backend: Any) -> None:
    data, rule, clause = BAD[name]
    device = NetDevice(backend)
    driver = live(device)
    request = driver.submit(TX, [data])
    assert request.wait() == b""
    settle(driver)
    (found,) = device.findings
    assert (found.rule, found.clause, found.queue) == (rule, clause, TX)
    assert found.expected
    assert device.counters == {"broken": 1}
    assert not driver.frames
    driver.send(frame(60)).wait()
    assert device.counters["sent"] == 1


@pytest.mark.parametrize(("start", "offset"), [(59, 0), (0, 59), (60, 0), (0xFFFF, 0xFFFF), (30, 29), (0xFFFF, 0)])
def test_a_checksum_beyond_its_frame(start: int, offset: int) -> None:
    device = NetDevice(checksum=True)
    driver = live(device, "CSUM")
    driver.submit(TX, [header(flags=1, start=start, offset=offset) + frame(60)]).wait()
    assert [(each.rule, each.clause) for each in device.findings] == [("ChecksumBeyondFrame", "5.1.9.2.1")]
    driver.submit(TX, [header(flags=1, start=28, offset=30) + frame(60)]).wait()
    assert len(device.findings) == 1


def test_fields_that_mean_nothing_are_not_looked_at() -> None:
    """Flags that nobody knows, and what belongs to offloads that are not asked for (5.1.9.2.2)."""
    driver = live(NetDevice())
    for odd in (HEADER.pack(0xC0, 0, 9, 9, 0xFFFF, 0xFFFF, 7), header(flags=8)):
        driver.submit(TX, [odd + frame(60)]).wait()
        assert driver.receive() == frame(60)


def test_findings_are_bounded() -> None:
    device = NetDevice()
    driver = live(device)
    for _ in range(MAX_FINDINGS + 10):
        driver.submit(TX, [b"x"]).wait()
    assert len(device.findings) == MAX_FINDINGS
    assert device.counters["broken"] == MAX_FINDINGS + 10


def test_a_buffer_in_which_nothing_fits_stays_for_what_does() -> None:
    device = NetDevice(mergeable=False)
    driver = live(device, buffer_size=30, buffers=1)
    driver.send(frame(31)).wait()
    settle(driver)
    assert [(each.rule, each.queue) for each in device.findings] == [("BufferTooSmall", RX)]
    driver.send(frame(30))
    assert driver.receive() == frame(30)
    # With merging, the first one must hold the header.
    device = NetDevice()
    driver = live(device, buffers=1)
    device.deliver(b"takes the buffer")
    driver._offered = 10  # pyright: ignore[reportPrivateUsage] - it shall put in no other
    settle(driver)
    driver.submit(RX, [], [11])
    assert not device.deliver(b"x")
    assert [each.rule for each in device.findings] == ["BufferTooSmall"]
    assert device.queue(RX).in_flight == 0


@pytest.mark.row("CVE-2021-3748", "U09")
@pytest.mark.parametrize("packed", [False, True])
def test_a_frame_over_two_buffers_of_which_the_second_is_bad(packed: bool) -> None:
    """Nothing is written into the first, and nothing is shown; the reset mends it."""
    device = NetDevice("drop")
    driver = NetDriver(Loopback(device), buffers=8, buffer_size=64, wanted=RINGS["packed" if packed else "split"])
    driver.initialize()
    layout = driver.queues[RX].layout()
    driver.memory.write(layout.at("desc.addr", 1), (0x9000_0000).to_bytes(8, "little"))
    first = int.from_bytes(driver.memory.read(layout.at("desc.addr", 0), 8), "little")
    driver.memory.fill(first, 76, 0x33)
    ring = driver.memory.read(layout.desc, layout.end - layout.desc)
    assert device.deliver(b"f" * 100) is False
    settle(driver)
    assert driver.memory.read(first, 76) == b"\x33" * 76
    assert driver.memory.read(layout.desc, layout.end - layout.desc) == ring
    assert driver.broken is not None
    driver.initialize()
    assert device.deliver(b"f" * 100) is True
    assert driver.receive() == b"f" * 100


def test_memory_that_goes_while_a_frame_is_put_in() -> None:
    memory = GuestMemory([(0, 1 << 20), (1 << 24, 4096)])
    device = NetDevice("drop")
    driver = NetDriver(Loopback(device, memory=memory), buffers=2, buffer_size=64)
    driver.initialize()
    layout = driver.queues[RX].layout()
    memory.write(layout.at("desc.addr", 1), (1 << 24).to_bytes(8, "little"))
    fill = device._fill  # pyright: ignore[reportPrivateUsage] - between the taking and the writing

    def gone(*what: Any) -> None:
        memory.remove_region(1 << 24, 4096)
        fill(*what)

    device._fill = gone  # type: ignore[method-assign]
    assert device.deliver(b"f" * 100) is False
    assert device.queue(RX).in_flight == 0
    assert driver.broken is None
    assert not device.deliver(b"f" * 100)
    settle(driver)
    assert driver.broken is not None, "the address is not mapped any more"


def test_a_back_end_that_fails() -> None:
    def fails(_: bytes) -> list[bytes]:
        raise ValueError("no network")

    backends: list[Callable[[bytes], list[bytes]]] = [fails, lambda _: [b""], lambda _: [bytes(1 << 17)]]
    for backend in backends:
        device = NetDevice(backend, on_handler_error="complete0")
        driver = live(device)
        assert driver.send(frame(60)).wait() == b""
        assert device.handler_errors == 1
        assert driver.live


# --- commands ----------------------------------------------------------------------------------------------


def command(driver: NetDriver, kind: int, number: int, data: bytes, *, queue: int = CONTROL) -> bytes:
    return driver.submit(queue, [bytes((kind, number)) + data], [1]).wait()


CTRL = ("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "GUEST_ANNOUNCE")


def test_commands_are_kept() -> None:
    device = NetDevice(mac=MAC)
    driver = live(device, *CTRL)
    control = device.control
    driver.set_promiscuous(on=True)
    assert command(driver, 0, 5, b"\1") == b"\0"
    assert control.modes == {0, 5}
    driver.set_promiscuous(on=False)
    assert control.modes == {5}
    driver.set_mac(b"\x02abcde")
    assert (control.mac, device.config.mac) == (b"\x02abcde", b"\x02abcde")
    table = struct.pack("<I", 1) + MAC + struct.pack("<I", 2) + b"\1zzzzz\1yyyyy"
    assert command(driver, 1, 0, table) == b"\0"
    assert (control.unicast, control.multicast) == ([MAC], [b"\1zzzzz", b"\1yyyyy"])
    assert [command(driver, 2, 0, struct.pack("<H", each)) for each in (0, 7, 4095)] == [b"\0"] * 3
    assert command(driver, 2, 1, struct.pack("<H", 7)) == b"\0"
    assert control.vlans == {0, 4095}
    assert device.findings == []
    driver.initialize()
    assert (control.mac, control.modes, control.unicast, control.vlans) == (MAC, set(), [], set())
    assert driver.mac == MAC


def test_the_driver_is_asked_to_make_itself_known() -> None:
    device = NetDevice()
    driver = live(device)
    assert not device.announce()
    driver = live(device, *CTRL)
    told: list[int] = []
    driver.config_changed = lambda: told.append(device.config.status)
    assert device.announce()
    settle(driver)
    assert told == [LinkStatus.LINK_UP | LinkStatus.ANNOUNCE]
    assert command(driver, 3, 0, b"") == b"\0"
    settle(driver)
    assert device.config.status == LinkStatus.LINK_UP
    assert len(told) == 1, "what it did itself is no news to it"


@pytest.mark.row("CVE-2014-0150")
@pytest.mark.parametrize(
    "request_",
    [
        b"", b"\0", b"\0\0", b"\0\0\2", b"\0\0\1\1", b"\0\6\1", b"\1\1short", b"\1\1\1bcdef", b"\1\1toolong!", b"\1\2",
        b"\1\0" + struct.pack("<I", 0xFFFF_FFFF) + MAC, b"\1\0" + struct.pack("<I", 0x2AAA_AAAB) + MAC,
        b"\1\0" + struct.pack("<I", 1) + MAC, b"\1\0" + struct.pack("<I", 0) + b"\0\0\0",
        b"\1\0" + struct.pack("<II", 0, 0) + b"\0",
        b"\1\0" + struct.pack("<I", 1025) + bytes(6150) + bytes(4), b"\1\0" + bytes(100_000),
        b"\2\0\0\x10", b"\2\0\0", b"\2\2\0\0", b"\3\0\0", b"\3\1", b"\4\0\1\0", b"\4\1", b"\xff\xff",
    ],
)  # fmt: skip
def test_a_command_that_is_none_changes_nothing(request_: bytes) -> None:
    """ERR, whatever it says of its own size; the table is as it was."""
    device = NetDevice(mac=MAC)
    driver = live(device, *CTRL)
    assert command(driver, 1, 0, struct.pack("<I", 1) + MAC + struct.pack("<I", 0)) == b"\0"
    before = device.control.save()
    chain = [request_] if request_ else []
    assert driver.submit(CONTROL, chain, [1]).wait() == b"\1"
    assert device.control.save() == before
    assert [(each.rule, each.clause, each.queue) for each in device.findings] == [("CommandMalformed", "5.1.9.5", 2)]


def test_a_command_without_room_for_its_answer() -> None:
    device = NetDevice()
    driver = live(device)
    assert driver.submit(CONTROL, [b"\0\0\1"]).wait() == b""
    assert [each.rule for each in device.findings] == ["CommandMalformed"]
    driver.set_promiscuous(on=True)


def test_commands_that_were_not_negotiated() -> None:
    device = NetDevice()
    driver = live(device)
    assert command(driver, 2, 0, b"\1\0") == b"\1"
    assert command(driver, 0, 2, b"\1") == b"\1"
    assert command(driver, 3, 0, b"") == b"\1"


def test_the_address_is_the_drivers_to_write_only_through_the_legacy_interface() -> None:
    device = NetDevice(mac=MAC)
    driver = live(device)
    driver.registers.write_config(0, b"\x02abcde")
    assert driver.registers.read_config(0, 6) == MAC
    registers = reach(device2 := NetDevice(mac=MAC), "legacy")
    driver = NetDriver(registers)
    driver.initialize()
    driver.registers.write_config(0, b"\x02abcde")
    assert driver.registers.read_config(0, 6) == b"\x02abcde"
    assert device2.control.mac == b"\x02abcde"
    driver.initialize()
    assert driver.mac == MAC


# --- pairs -------------------------------------------------------------------------------------------------


class Pairs(NetDriver):
    """With MQ: the control queue is behind the last pair."""

    def set_up(self) -> None:
        self.last = 2 * int.from_bytes(self.read_config(8, 2), "little")
        super().set_up()

    def use(self, pairs: int) -> bytes:
        return command(self, 4, 0, struct.pack("<H", pairs), queue=self.last)

    def loop_back(self, pair: int, data: bytes) -> bytes | None:
        target = self.submit(2 * pair, [], [12 + len(data)]) if pair else None
        self.submit(2 * pair + 1, [bytes(12) + data]).wait()
        self.loop.run_pending()
        if target is None:
            return self.frames.popleft() if self.frames else None
        return target.data[12:] if target.done else None


def test_pairs_are_in_use_as_the_driver_asks_for_them() -> None:
    device = NetDevice(pairs=4)
    assert list(device.queue_sizes) == [256] * 9
    driver = Pairs(Loopback(device), wanted=RING_FEATURES | bits("MQ"))
    driver.initialize()
    assert (device.control_queue, device.pairs_in_use) == (8, 1)
    assert driver.loop_back(0, b"zero") == b"zero"
    assert driver.loop_back(1, b"not yet") is None
    assert device.counters["dropped"] == 1
    for pairs, ack in ((0, b"\1"), (5, b"\1"), (0xFFFF, b"\1"), (4, b"\0")):
        assert driver.use(pairs) == ack
    assert device.pairs_in_use == 4
    for pair in (0, 2, 3):
        assert driver.loop_back(pair, b"pair %d" % pair) == b"pair %d" % pair
    assert driver.use(1) == b"\0"
    assert driver.loop_back(3, b"no more") is None
    driver.initialize()
    assert device.pairs_in_use == 1


def test_without_mq_the_third_queue_is_the_control_queue() -> None:
    device = NetDevice(pairs=4)
    driver = live(device)
    assert "MQ" not in driver.features
    assert (device.control_queue, device.known_pairs) == (CONTROL, 1)
    driver.set_promiscuous(on=True)
    assert device.control.modes == {0}


# --- declarations and saved states -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: NetDevice("loop"),  # type: ignore[arg-type]
        lambda: NetDevice(mac=b"short"),
        lambda: NetDevice(mac=b"\1group"),
        lambda: NetDevice(mtu=67),
        lambda: NetDevice(mtu=65536),
        lambda: NetDevice(pairs=0),
        lambda: NetDevice(pairs=0x8001),
        lambda: NetDevice(pairs=2, control=False),
        lambda: Generate(13),
        lambda: Generate(70_000),
        lambda: Generate(count=-1),
    ],
)
def test_impossible_devices(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_what_it_offers() -> None:
    always = {"MAC", "STATUS"}
    everything = NetDevice(pairs=2, mtu=1500, checksum=True)
    class_bits = set(everything.features) & set(FEATURE_NAMES)
    assert class_bits == always | {"MTU", "MQ", "CSUM", "GUEST_CSUM", "MRG_RXBUF", *CTRL}
    least = NetDevice(control=False, mergeable=False)
    assert set(least.features) & set(FEATURE_NAMES) == always
    assert len(least.queue_sizes) == 2
    assert "IN_ORDER" in least.features


def test_a_saved_state_carries_what_commands_have_set() -> None:
    device = NetDevice(Generate(64, count=5), pairs=2, mac=MAC)
    driver = live(device, *CTRL)
    for _ in range(5):
        driver.receive()
    driver.set_mac(b"\x02abcde")
    driver.set_promiscuous(on=True)
    command(driver, 2, 0, b"\7\0")
    command(driver, ControlClass.MAC, 0, struct.pack("<I", 1) + MAC + struct.pack("<I", 0))
    state = json.loads(json.dumps(device.save()))
    other = NetDevice(Generate(64, count=5), pairs=2, mac=MAC)
    other.restore(state)
    assert other.control.save() == device.control.save()
    assert other.config.mac == b"\x02abcde"
    assert other.save()["generated"] == [5, 0]
    for wrong in (NetDevice(), NetDevice(pairs=2, mtu=1500), NetDevice(pairs=3)):
        with pytest.raises(SavedStateError):
            wrong.restore(state)
    for part, value in (
        ("generated", [1]), ("generated", [1, -1]), ("generated", [1, True]), ("generated", 1), ("control", 1),
        *((("control", {**state["control"], name: bad})) for name, bad in (
            ("mac", "zz"), ("mac", "0011"), ("mac", 7), ("modes", [9]), ("modes", [True]), ("modes", 1),
            ("vlans", [4096]),
            ("vlans", ["a"]), ("unicast", ["00"]), ("unicast", ["000000000000"] * 1025), ("pairs", 0), ("pairs", 3),
            ("pairs", "1"), ("more", 1),
        )),
    ):  # fmt: skip
        before = other.save()
        with pytest.raises(SavedStateError):
            other.restore({**state, part: value})
        assert other.save() == before


def test_a_receive_ring_that_breaks_while_a_frame_is_sent() -> None:
    """The transmit queue is not to blame, and its chain is answered."""
    device = NetDevice()
    loopback = Loopback(device)
    driver = NetDriver(loopback, wanted=RINGS["split"])
    driver.initialize()
    layout = driver.queues[RX].layout()
    driver.memory.write(layout.at("desc.addr", 0), (0x9000_0000).to_bytes(8, "little"))
    driver.submit(TX, [bytes(12) + frame(60)])
    settle(driver)
    assert driver.broken is not None
    (error,) = loopback.errors
    assert isinstance(error, QueueViolation)
    assert (error.queue, error.rule) == (RX, "UnmappedAddress")
    assert device.handler_errors == 0
