"""The test device: both transcripts, every framing, what is counted, and its saved state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import VirtualClock
from virtio_test.device import RING_FEATURES
from virtio_test.devices.test import CAN_PRINT, TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.test import TestDriver, build_request
from virtio_test.errors import InvalidArgument, SavedStateError, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.testdevice import CONFIG_FIELDS, COUNTER, REQUEST, RESPONSE

RINGS = pytest.mark.parametrize("ring", ["split", "packed"])
Ring = Literal["split", "packed"]

NINE_LINES = """\
QEMU_BACK_END: >>> get type [ 10 ] form the front end <<<
QEMU_BACK_END: >>> get arg1 [ 11 ] form the front end <<<
QEMU_BACK_END: >>> get arg2 [ 12 ] form the front end <<<
QEMU_BACK_END: >>> get arg3 [ 13 ] form the front end <<<
QEMU_BACK_END: >>> get arg3 [ hello back end! ] form the front end <<<
virtio test_request_done get ack
virtio response ret is 111
virtio response arg1 is 112
virtio response arg2 is 113""".splitlines()


def ring_features(ring: Ring) -> FeatureSet:
    return RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")


class Machine:
    """A test device, a test driver, and one console for both."""

    def __init__(
        self, ring: Ring = "split", *, timer: bool = False, can_print: bool = True, first_after: float = 30.0
    ) -> None:
        self.lines: list[str] = []
        self.device = TestDevice(timer=timer, first_after=first_after, console=self.lines.append, can_print=can_print)
        self.loop = OwnerLoop(clock=VirtualClock())
        self.loopback = Loopback(self.device, loop=self.loop)
        self.driver = TestDriver(self.loopback, timer=timer, console=self.lines.append, wanted=ring_features(ring))
        self.driver.initialize()

    def raw(self, readable: Sequence[bytes], writable: Sequence[int] = (), *, indirect: bool = False) -> bytes:
        return self.driver.submit(0, readable, writable, indirect=indirect).wait()


# --- requests ----------------------------------------------------------------------------------------------


@RINGS
def test_the_nine_lines(ring: Ring) -> None:
    machine = Machine(ring)
    assert machine.driver.request(10) == (111, 112, 113)
    assert machine.lines == NINE_LINES


@RINGS
@pytest.mark.parametrize("number", range(256))
def test_every_number_counts_in_a_byte(ring: Ring, number: int) -> None:
    machine = Machine(ring)
    expected = [(number + step) % 256 + 100 for step in (1, 2, 3)]
    assert list(machine.driver.request(number)) == expected
    assert machine.lines[3] == f"QEMU_BACK_END: >>> get arg3 [ {(number + 3) % 256} ] form the front end <<<"


def test_answers_wrap_at_32_bits_and_print_as_signed() -> None:
    machine = Machine()
    numbers = (2**32 - 1, 2**31 - 1, 2**32 - 100, 2**31)
    answer = machine.raw([REQUEST.pack(*numbers, b"a" * 32)], [12])
    assert RESPONSE.unpack(answer) == ((2**31 - 1 + 100), 0, 2**31 + 100)
    assert machine.lines == [
        "QEMU_BACK_END: >>> get type [ -1 ] form the front end <<<",
        "QEMU_BACK_END: >>> get arg1 [ 2147483647 ] form the front end <<<",
        "QEMU_BACK_END: >>> get arg2 [ -100 ] form the front end <<<",
        "QEMU_BACK_END: >>> get arg3 [ -2147483648 ] form the front end <<<",
        f"QEMU_BACK_END: >>> get arg3 [ {'a' * 32} ] form the front end <<<",
    ]


def test_a_text_of_other_bytes_is_shown_harmlessly() -> None:
    machine = Machine()
    machine.raw([REQUEST.pack(1, 2, 3, 4, b"\xff\x80b\0never shown")], [12])
    assert machine.lines[4] == r"QEMU_BACK_END: >>> get arg3 [ \xff\x80b ] form the front end <<<"


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) - 1) + 1 for cut in cuts} - {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


@RINGS
@given(data=st.data())
def test_framing_makes_no_difference(ring: Ring, data: st.DataObject) -> None:
    cuts = st.lists(st.integers(0, 100), max_size=6)
    extra = data.draw(st.binary(max_size=20))
    readable = pieces(build_request(10) + extra, data.draw(cuts))
    room = 12 + data.draw(st.integers(0, 20))
    writable = [len(piece) for piece in pieces(bytes(room), data.draw(cuts))]
    machine = Machine(ring)
    answer = machine.raw(readable, writable, indirect=data.draw(st.booleans()) and machine.driver.indirect)
    assert answer == RESPONSE.pack(111, 112, 113)
    assert machine.lines == NINE_LINES[:5]


@RINGS
@pytest.mark.parametrize("length", [1, 4, 16, 47])
def test_a_short_request_gets_nothing_and_is_counted(ring: Ring, length: int) -> None:
    machine = Machine(ring)
    assert machine.raw([build_request(10)[:length]], [12]) == b""
    assert machine.lines == ["Qemu Error: iov_to_buf function failed."]
    assert machine.device.counters.as_dict() == {
        "requests": 0,
        "short": 1,
        "small": 0,
        "counters": 0,
        "trailing": 0,
        "unshown": 0,
    }
    assert machine.driver.request(10) == (111, 112, 113)
    assert machine.loopback.queue(0).in_flight == 0


@RINGS
def test_a_request_without_anything_to_read(ring: Ring) -> None:
    machine = Machine(ring)
    assert machine.raw([], [12]) == b""
    assert machine.device.counters.short == 1


@RINGS
@pytest.mark.parametrize("writable", [[], [1], [11], [4, 4, 3]])
def test_a_small_buffer_is_never_half_filled(ring: Ring, writable: list[int]) -> None:
    machine = Machine(ring)
    request = machine.driver.submit(0, [build_request(10)], writable)
    places = list(request.writable)
    for address, length in places:
        machine.driver.memory.write(address, b"." * length)
    assert request.wait() == b""
    assert all(machine.driver.memory.read(address, length) == b"." * length for address, length in places)
    assert machine.device.counters.as_dict() == {
        "requests": 1,
        "short": 0,
        "small": 1,
        "counters": 0,
        "trailing": 0,
        "unshown": 0,
    }
    assert machine.lines == NINE_LINES[:5]


def test_a_console_that_refuses_a_line_breaks_the_device_by_default() -> None:
    machine = Machine()

    def refuse(_line: str) -> None:
        raise OSError("the disk is full")

    machine.device.console = refuse
    request = machine.driver.submit_number(10)
    machine.loop.run_pending()
    assert request.done
    assert request.error is not None
    assert "the disk is full" in str(machine.loopback.errors[0])


# --- timer -------------------------------------------------------------------------------------------------


def timer_lines(ticks: int) -> list[str]:
    return [
        line
        for k in range(ticks)
        for line in (
            f"==============set config:{k}",
            "virttest virttest_changed",
            "virttest get config change",
            f"=========get virtio num:{k + 1}",
            "virttest get ack",
        )
    ]


@RINGS
def test_the_timer_transcript(ring: Ring) -> None:
    machine = Machine(ring, timer=True)
    assert machine.loop.run(until=lambda: machine.driver.acknowledged == 9)
    assert machine.lines == timer_lines(9)
    assert machine.loop.clock.now() == 38.0
    assert machine.device.config["num_pages"] == machine.device.config["actual"] == 8


def test_ticks_print_before_the_driver_is_live_and_notify_only_after() -> None:
    lines: list[str] = []
    device = TestDevice(timer=True, first_after=2, every=1, console=lines.append)
    clock = VirtualClock()
    loop = OwnerLoop(clock=clock)
    loopback = Loopback(device, loop=loop)
    clock.advance(3)
    loop.run_pending()
    assert lines == ["==============set config:0", "==============set config:1"]
    driver = TestDriver(loopback, timer=True, console=lines.append)
    driver.initialize()
    loop.run_pending()
    assert len(lines) == 2
    clock.advance(1)
    loop.run_pending()
    assert lines[2:] == [
        "==============set config:2",
        "virttest virttest_changed",
        "virttest get config change",
        "=========get virtio num:1",
        "virttest get ack",
    ]
    # A reset neither stops the timer nor sets the ticks back.
    driver.reset()
    clock.advance(1)
    loop.run_pending()
    assert lines[7:] == ["==============set config:3"]
    driver.initialize()
    clock.advance(1)
    loop.run_pending()
    assert lines[8:10] == ["==============set config:4", "virttest virttest_changed"]


def test_a_chain_of_counters_makes_a_line_each() -> None:
    machine = Machine(timer=True)
    assert machine.raw([COUNTER.pack(1), COUNTER.pack(2**32 - 1)[:3], COUNTER.pack(2**32 - 1)[3:] + b"xy"]) == b""
    assert machine.lines == ["=========get virtio num:1", "=========get virtio num:-1"]
    assert machine.raw([b"abc"]) == b""
    assert machine.lines[2:] == ["Qemu Error: iov_to_buf function failed."]
    assert machine.device.counters.as_dict() == {
        "requests": 0,
        "short": 1,
        "small": 0,
        "counters": 2,
        "trailing": 2,
        "unshown": 0,
    }


def test_what_the_timer_reports_as_written_is_what_it_wrote() -> None:
    machine = Machine(timer=True)
    request = machine.driver.submit(0, [COUNTER.pack(1)], [12])
    request.wait()
    assert request.written == 0


def test_a_second_bus_does_not_start_a_second_timer() -> None:
    machine = Machine(timer=True)
    machine.device.attach(machine.loopback.bank)
    assert machine.loop.run(until=lambda: machine.driver.acknowledged == 2)
    assert machine.lines == timer_lines(2)


def test_detach_stops_it() -> None:
    machine = Machine(timer=True)
    machine.device.detach()
    assert not machine.loop.run(until=lambda: bool(machine.lines))
    assert machine.loop.clock.next_deadline() is None


@pytest.mark.parametrize("times", [{"first_after": -1.0}, {"every": 0.0}, {"every": float("nan")}])
def test_impossible_times(times: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        TestDevice(timer=True, **times)  # pyright: ignore[reportArgumentType]


# --- configuration space, features, repr -------------------------------------------------------------------


def test_the_driver_reads_all_and_writes_two_fields() -> None:
    machine = Machine()
    registers = machine.loopback
    assert registers.config_size() == 12 == 4 * len(CONFIG_FIELDS)
    registers.write_config(4, (7).to_bytes(4, "little") + (8).to_bytes(4, "little"))
    assert registers.read_config(0, 12) == b"\0\0\0\0\x07\0\0\0\x08\0\0\0"
    registers.write_config(0, b"\xff\xff\xff\xff")
    assert registers.read_config(0, 4) == b"\0\0\0\0"
    with pytest.raises(StatusViolation):
        registers.read_config(10, 4)


def test_offer() -> None:
    assert TestDevice().features == RING_FEATURES | CAN_PRINT
    assert int(TestDevice().features) & 1
    assert not int(TestDevice(can_print=False).features) & 1
    assert list(TestDevice().queue_sizes) == [128]
    assert TestDevice().device_id == 45


@pytest.mark.parametrize("device", [TestDevice(), TestDevice(timer=True, first_after=3, every=0.5, can_print=False)])
def test_repr_evaluates_back(device: TestDevice) -> None:
    again = eval(repr(device), {"TestDevice": TestDevice})
    assert repr(again) == repr(device)
    assert again.features == device.features


# --- saved state -------------------------------------------------------------------------------------------


def test_state_is_json_and_goes_round() -> None:
    import json

    machine = Machine(timer=True)
    assert machine.loop.run(until=lambda: machine.driver.acknowledged == 3)
    machine.driver.write_field("event", 5)
    machine.loop.clock.advance(0.25)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    state = json.loads(json.dumps(machine.device.save()))
    assert state["ticks"] == 3
    assert state["remaining"] == 0.75
    assert state["config"]["values"] == {"num_pages": 2, "actual": 2, "event": 5}

    lines: list[str] = []
    other = TestDevice(timer=True, console=lines.append)
    other.restore(state)
    clock = VirtualClock()
    Loopback(other, loop=OwnerLoop(clock=clock))
    clock.advance(0.7)
    assert lines == []
    clock.advance(0.1)
    assert lines == ["==============set config:3"]
    clock.advance(1)
    assert lines[1:] == ["==============set config:4"]


def test_a_running_timer_goes_on_with_the_restored_time() -> None:
    machine = Machine(timer=True)
    machine.device.restore({**machine.device.save(), "remaining": 1.5, "ticks": 70})
    assert machine.loop.run(until=lambda: machine.driver.acknowledged == 1)
    assert machine.loop.clock.now() == 1.5
    assert machine.lines[0] == "==============set config:70"


@pytest.mark.parametrize(
    "change",
    [
        {"timer": False},
        {"timer": 1},
        {"ticks": -1},
        {"ticks": 2**32},
        {"ticks": True},
        {"ticks": 1.0},
        {"remaining": -0.1},
        {"remaining": None},
        {"remaining": "1"},
        {"remaining": True},
        {"remaining": float("inf")},
        {"remaining": float("nan")},
        {"remaining": 1e30},
        {"version": 0},
        {"device_id": 44},
        {"config": {"version": 1, "generation": 0, "values": {"num_pages": 2**32, "actual": 0, "event": 0}}},
        {"extra": 0},
    ],
)
def test_a_bad_state_changes_nothing(change: dict[str, object]) -> None:
    machine = Machine(timer=True, first_after=3)
    before = machine.device.save()
    with pytest.raises(SavedStateError):
        machine.device.restore({**before, "ticks": 9, **change})
    assert machine.device.save() == before


def test_the_variants_do_not_mix() -> None:
    with pytest.raises(SavedStateError):
        TestDevice().restore(TestDevice(timer=True).save())
    with pytest.raises(SavedStateError):
        TestDevice().restore({**TestDevice().save(), "remaining": 1.0})


def test_any_driver_can_drive_it() -> None:
    lines: list[str] = []
    driver = Driver(Loopback(TestDevice(console=lines.append)))
    driver.initialize()
    assert "CAN_PRINT" not in list(driver.features)
    assert driver.submit(0, [build_request(10)], [12]).wait() == RESPONSE.pack(111, 112, 113)
