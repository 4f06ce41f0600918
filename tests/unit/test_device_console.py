"""The console device and its driver: one port and many, input that waits, outputs that do not take, wrong words."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.console import ConsoleDevice, ConsolePort
from virtio_test.driver.base import Driver
from virtio_test.driver.console import MAX_FINDINGS, ConsoleDriver
from virtio_test.errors import InvalidArgument, NoFeature, PeerTimeout, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.console import CONTROL, FEATURE_NAMES, RESIZE, ControlEvent
from virtio_test.spec.ids import DeviceId

from .class_world import RINGS, WAYS, errors, indirect, reach
from .world import open_fds


class Sink:
    """An output that keeps what it gets."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


class Chatty(ConsoleDevice):
    """A console that says whatever it is told to."""

    def say(self, message: bytes) -> None:
        self._messages[b"anything"] = message
        self._pump(2)


def three() -> tuple[list[Sink], Chatty]:
    """A console with a name, a plain port, and a console whose far side is closed."""
    sinks = [Sink(), Sink(), Sink()]
    ports = [
        ConsolePort(sinks[0], name="org.example.0"),
        ConsolePort(sinks[1], name="größe", console=False),
        ConsolePort(sinks[2], open=False),
    ]
    return sinks, Chatty(ports=ports, size=(80, 25))


def live(device: ConsoleDevice, **options: Any) -> ConsoleDriver:
    driver = ConsoleDriver(Loopback(device), **options)
    driver.initialize()
    driver.loop.run_pending()
    return driver


# --- one port ----------------------------------------------------------------------------------------------


@WAYS
def test_both_directions(way: str) -> None:
    sink = Sink()
    device = ConsoleDevice(sink, size=(132, 43))
    registers = reach(device, way)
    driver = ConsoleDriver(registers, wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    assert driver.size == (132, 43)
    for number in range(100):
        driver.send(f"line {number}\n".encode())
    assert sink.data == b"".join(f"line {number}\n".encode() for number in range(100))
    text = bytes(range(256)) * 200
    assert device.feed(text) == len(text)
    received = b""
    while len(received) < len(text):
        received += driver.receive()
    assert received == text
    assert device.odd == 0
    assert errors(registers) == []


def test_it_is_the_console_device() -> None:
    device = ConsoleDevice(Sink(), size=(80, 25))
    assert (device.device_id, device.config.size, list(device.queue_sizes)) == (DeviceId.CONSOLE, 12, [64, 64])
    assert device.features == RING_FEATURES | FeatureSet("SIZE", "EMERG_WRITE", device=FEATURE_NAMES)
    assert ConsoleDevice(Sink(), emergency=False).features == RING_FEATURES
    many = three()[1]
    assert list(many.queue_sizes) == [64] * 8
    assert many.config.max_nr_ports == 3
    assert len(ConsoleDevice(ports=[ConsolePort(Sink())]).queue_sizes) == 4


def test_what_cannot_be() -> None:
    sink = Sink()
    wrong: list[dict[str, Any]] = [
        {},
        {"output": sink, "ports": [ConsolePort(sink)]},
        {"ports": []},
        {"ports": [ConsolePort(sink, name="x" * 256)]},
        {"output": sink, "size": (65536, 1)},
    ]
    for options in wrong:
        with pytest.raises(InvalidArgument):
            ConsoleDevice(**options)
    device = ConsoleDevice(sink)
    with pytest.raises(InvalidArgument):
        device.feed(b"x", port=1)
    with pytest.raises(InvalidArgument):
        ConsoleDriver(Loopback(device), buffers=0)
    driver = live(ConsoleDevice(sink))
    with pytest.raises(InvalidArgument):
        driver.send(b"x", port=1)
    with pytest.raises(InvalidArgument):
        driver.send(b"")
    with pytest.raises(NoFeature):
        driver.set_open(on=True)


def test_input_waits_for_its_driver_and_is_bounded() -> None:
    device = ConsoleDevice(Sink(), max_input=100)
    assert device.feed(b"early ") == 6
    assert device.feed(b"x" * 200) == 94
    assert device.feed(b"more") == 0
    driver = live(device)
    assert driver.receive() == b"early " + b"x" * 94
    assert device.feed(b"more") == 4
    assert driver.receive(2) == b"mo"
    assert driver.receive() == b"re"


def test_a_driver_that_does_not_read_stops_the_input() -> None:
    device = ConsoleDevice(Sink(), max_input=1 << 20)
    driver = live(device, buffers=2, buffer_size=10, max_received=15)
    device.feed(bytes(range(200)))
    driver.loop.run_pending()
    assert len(driver.ports[0].received) <= 15 + 2 * 10
    assert len(device.ports[0].waiting) >= 165
    received = b""
    while len(received) < 200:
        received += driver.receive(7)
    assert received == bytes(range(200))
    with pytest.raises(PeerTimeout, match="input of port 0"):
        driver.receive(timeout=1.0)


def test_the_size_changes() -> None:
    device = ConsoleDevice(Sink(), size=(80, 25))
    driver = live(device)
    device.resize(100, 50)
    driver.loop.run_pending()
    assert driver.size == (100, 50)
    assert live(ConsoleDevice(Sink())).size is None


def test_buffers_of_the_wrong_kind_are_counted() -> None:
    sink = Sink()
    device = ConsoleDevice(sink)
    driver = Driver(Loopback(device))
    driver.initialize()
    assert driver.submit(1, [b"out"], [5]).wait() == b""
    assert driver.submit(1, [], [5]).wait() == b""
    driver.submit(0, [b"what for"])
    mixed = driver.submit(0, [b"what for"], [4])
    device.feed(b"abc")
    assert mixed.wait() == b"abc"
    assert sink.data == b"out"
    assert device.odd == 4


def test_large_output_comes_in_pieces() -> None:
    pieces: list[int] = []
    driver = live(ConsoleDevice(lambda data: pieces.append(len(data))))
    driver.send(bytes(600_000))
    assert pieces == [1 << 18, 1 << 18, 600_000 - (1 << 19)]


# --- emergency writes --------------------------------------------------------------------------------------


def test_emergency_writes_work_without_a_driver() -> None:
    sink = Sink()
    driver = ConsoleDriver(Loopback(ConsoleDevice(sink)))
    for character in b"panic\n":
        driver.emergency_write(character)
    driver.emergency_write(0x12345641)
    driver.registers.write_config(8, b"B")
    assert sink.data == b"panic\nAB"


def test_emergency_writes_that_were_not_offered() -> None:
    sink = Sink()
    driver = live(ConsoleDevice(sink, emergency=False))
    with pytest.raises(NoFeature):
        driver.emergency_write(65)
    driver.registers.write_config(8, b"A")
    assert sink.data == b""


def test_an_output_that_fails_an_emergency_write_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: bytes) -> None:
        raise OSError("no paper")

    device = ConsoleDevice(refuse)
    registers = Loopback(device)
    driver = ConsoleDriver(registers)
    driver.emergency_write(65)
    assert "no paper" in caplog.text
    assert device.handler_errors == 1
    assert registers.errors == []


# --- outputs -----------------------------------------------------------------------------------------------


def test_a_pipe_that_nobody_reads_does_not_stop_the_device() -> None:
    read, write = os.pipe()
    device = ConsoleDevice(write)
    driver = live(device)
    total = 1 << 20
    driver.send(b"x" * total)
    taken = total - device.ports[0].dropped
    assert 4096 <= taken < total
    assert len(os.read(read, total)) == taken
    driver.send(b"y" * 10)
    assert os.read(read, 100) == b"y" * 10
    os.close(read)
    driver.send(b"z" * 10)
    assert device.ports[0].dropped == total - taken + 10
    os.close(write)
    driver.send(b"closed")
    assert device.handler_errors == 0


def test_an_output_that_raises_breaks_the_device_or_costs_the_buffer() -> None:
    def refuse(_: bytes) -> None:
        raise ValueError("not today")

    registers = Loopback(ConsoleDevice(refuse))
    driver = ConsoleDriver(registers)
    driver.initialize()
    request = driver.submit_send(b"x")
    driver.loop.run_pending()
    assert request.error is not None
    assert "not today" in str(registers.errors[0])
    device = ConsoleDevice(refuse, on_handler_error="complete0")
    driver = live(device)
    driver.send(b"x")
    driver.send(b"y")
    assert device.handler_errors == 2


# --- many ports --------------------------------------------------------------------------------------------


@WAYS
def test_ports_are_introduced(way: str) -> None:
    sinks, device = three()
    registers = reach(device, way)
    driver = ConsoleDriver(registers, wanted=RINGS[way], indirect=indirect(way))
    driver.initialize()
    driver.loop.run_pending()
    assert {number: (port.name, port.console, port.open) for number, port in driver.ports.items()} == {
        0: ("org.example.0", True, True),
        1: ("größe", False, True),
        2: (None, True, False),
    }
    assert driver.ports[0].size == (80, 25)
    assert [port.guest_open for port in device.ports] == [True, False, True]
    for number in range(3):
        driver.send(b"to port %d" % number, port=number)
    assert [sink.data for sink in sinks] == [b"to port 0", b"to port 1", b"to port 2"]
    device.feed(b"two", port=2)
    assert driver.receive(port=2) == b"two"
    assert driver.findings == []
    assert device.odd == 0
    assert errors(registers) == []


def test_a_closed_port_gets_no_input() -> None:
    _, device = three()
    driver = live(device)
    device.feed(b"held back", port=1)
    driver.loop.run_pending()
    assert driver.ports[1].received == b""
    driver.set_open(on=True, port=1)
    assert driver.receive(port=1) == b"held back"
    driver.set_open(on=False, port=1)
    driver.loop.run_pending()
    assert not device.ports[1].guest_open


def test_our_side_opens_closes_and_changes_its_size() -> None:
    _, device = three()
    driver = live(device)
    for on in (True, False, True):
        device.set_open(on=on, port=2)
    device.resize(7, 8, port=2)
    device.resize(9, 10)
    driver.loop.run_pending()
    assert driver.ports[2].open
    assert (driver.ports[2].size, driver.ports[0].size, driver.size) == ((7, 8), (9, 10), (9, 10))


def test_without_multiport_the_first_port_is_the_console() -> None:
    sinks, device = three()
    driver = live(device, multiport=False)
    assert list(driver.ports) == [0]
    driver.send(b"alone")
    device.feed(b"back")
    assert driver.receive() == b"back"
    assert sinks[0].data == b"alone"
    device.set_open(on=False)
    driver.loop.run_pending()
    assert device.odd == 0


def test_a_second_start_is_like_the_first() -> None:
    _, device = three()
    driver = live(device)
    driver.initialize()
    driver.loop.run_pending()
    assert sorted(driver.ports) == [0, 1, 2]
    assert driver.ports[0].name == "org.example.0"
    assert driver.findings == []


# --- what a driver should not say --------------------------------------------------------------------------

words = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.tuples(st.integers(0, 4), st.integers(0, 8), st.integers(0, 2)).map(lambda each: CONTROL.pack(*each)),
)


@given(said=st.lists(words, max_size=40), rooms=st.lists(st.integers(1, 40), max_size=10), ring=st.booleans())
def test_whatever_is_said_nothing_breaks_and_little_is_kept(said: list[bytes], rooms: list[int], ring: bool) -> None:
    device = three()[1]
    registers = Loopback(device)
    wanted = RINGS["packed" if ring else "split"] | FeatureSet("MULTIPORT", "SIZE", device=FEATURE_NAMES)
    driver = Driver(registers, wanted=wanted)
    driver.initialize()
    offered = [driver.submit(2, [], [room]) for room in rooms]
    for message in said:
        assert driver.submit(3, [message]).wait() == b""
    device.feed(b"input")
    driver.loop.run_pending()
    for request in offered:
        if request.done:
            assert len(request.data) == 0 or len(request.data) >= CONTROL.size
    assert registers.errors == []
    assert device.handler_errors == 0
    # Each port has at most five things to say: that it exists, is a console, its name, its size, that it is open.
    assert len(json.loads(json.dumps(device.save()))["messages"]) <= 15


def test_asking_again_tells_nothing_new() -> None:
    _, device = three()
    driver = live(device)
    for _ in range(100):
        driver.submit(3, [CONTROL.pack(0, ControlEvent.DEVICE_READY, 1)]).wait()
        driver.submit(3, [CONTROL.pack(0, ControlEvent.PORT_READY, 1)]).wait()
    driver.loop.run_pending()
    assert driver.findings == []
    assert device.odd == 0


@pytest.mark.parametrize(
    "message",
    [
        b"short",
        CONTROL.pack(3, ControlEvent.PORT_READY, 1),
        CONTROL.pack(0, ControlEvent.PORT_READY, 0),
        CONTROL.pack(0, ControlEvent.DEVICE_READY, 0),
        CONTROL.pack(0, ControlEvent.PORT_OPEN, 2),
        CONTROL.pack(0, ControlEvent.RESIZE, 1),
        CONTROL.pack(0, 99, 1),
    ],
)
def test_messages_that_make_no_sense_are_counted(message: bytes) -> None:
    _, device = three()
    driver = live(device)
    driver.submit(3, [message]).wait()
    assert device.odd == 1


# --- what a device should not say --------------------------------------------------------------------------


def told(*messages: bytes) -> ConsoleDriver:
    """A driver whose device has said these messages after its own."""
    _, device = three()
    driver = live(device)
    for message in messages:
        device.say(message)
        driver.loop.run_pending()
    assert driver.live
    return driver


@pytest.mark.parametrize(
    ("message", "rule", "clause"),
    [
        (b"1234567", "ControlTooShort", "5.3.6.2"),
        (b"", "ControlTooShort", "5.3.6.2"),
        (CONTROL.pack(1, ControlEvent.DEVICE_ADD, 0), "PortExists", "5.3.6.2.1"),
        (CONTROL.pack(3, ControlEvent.DEVICE_ADD, 0), "PortBeyondMaximum", "5.3.6.2.1"),
        (CONTROL.pack(2**32 - 1, ControlEvent.DEVICE_ADD, 0), "PortBeyondMaximum", "5.3.6.2.1"),
        (CONTROL.pack(9, ControlEvent.DEVICE_REMOVE, 0), "UnknownPort", "5.3.6.2.1"),
        (CONTROL.pack(9, ControlEvent.PORT_OPEN, 1), "UnknownPort", "5.3.6.2.1"),
        (CONTROL.pack(0, ControlEvent.RESIZE, 0) + b"123", "UnknownEvent", "5.3.6.2"),
        (CONTROL.pack(0, 77, 0), "UnknownEvent", "5.3.6.2"),
    ],
)
def test_what_the_driver_finds(message: bytes, rule: str, clause: str) -> None:
    driver = told(message)
    assert [(each.rule, each.clause, each.queue) for each in driver.findings] == [(rule, clause, 2)]
    assert sorted(driver.ports) == [0, 1, 2]


def test_findings_are_bounded() -> None:
    assert len(told(*[CONTROL.pack(9, ControlEvent.PORT_OPEN, 1)] * (MAX_FINDINGS + 5)).findings) == MAX_FINDINGS


def test_ports_go_and_come_back() -> None:
    remove, add = CONTROL.pack(1, ControlEvent.DEVICE_REMOVE, 0), CONTROL.pack(1, ControlEvent.DEVICE_ADD, 0)
    assert sorted(told(remove).ports) == [0, 2]
    driver = told(remove, add)
    assert sorted(driver.ports) == [0, 1, 2]
    assert driver.ports[1].name is None
    with pytest.raises(InvalidArgument):
        told(remove).send(b"x", port=1)


def test_a_port_without_queues_is_refused() -> None:
    _, device = three()
    device.config.update(max_nr_ports=9)
    driver = live(device)
    device.say(CONTROL.pack(7, ControlEvent.DEVICE_ADD, 0))
    driver.loop.run_pending()
    assert sorted(driver.ports) == [0, 1, 2]
    # It said so: PORT_READY with 0, for a port that the device does not have either.
    assert device.odd == 1


@pytest.mark.parametrize("name", [b"vport\0", b"vport\0junk", b"vport"])
def test_a_name_ends_where_it_ends(name: bytes) -> None:
    assert told(CONTROL.pack(2, ControlEvent.PORT_NAME, 1) + name).ports[2].name == "vport"
    assert told(CONTROL.pack(2, ControlEvent.PORT_NAME, 1) + b"\xff").ports[2].name == r"\xff"
    assert told(CONTROL.pack(2, ControlEvent.RESIZE, 0) + RESIZE.pack(3, 4)).ports[2].size == (3, 4)


# --- saved state -------------------------------------------------------------------------------------------


def test_state_goes_round() -> None:
    _, device = three()
    registers = Loopback(device)
    driver = ConsoleDriver(registers)
    driver.initialize()
    driver.loop.run_pending()
    device.feed(b"held back", port=1)
    state = json.loads(json.dumps(registers.save()))
    sinks, other = three()
    registers.restore(state, device=other)
    driver.send(b"hello")
    assert sinks[0].data == b"hello"
    driver.set_open(on=True, port=1)
    assert driver.receive(port=1) == b"held back"
    other.feed(b"on", port=0)
    assert driver.receive() == b"on"
    assert driver.findings == []


def test_bad_states_change_nothing() -> None:
    _, device = three()
    before = device.save()
    good: Any = json.loads(json.dumps(before))
    port = good["ports"][0]
    for change in (
        {"ports": good["ports"][:2]},
        {"ports": 3},
        {"ports": [1, 2, 3]},
        {"ports": [{**port, "ready": 1}, port, port]},
        {"ports": [{**port, "waiting": "xx"}, port, port]},
        {"ports": [{**port, "waiting": None}, port, port]},
        {"ports": [{**port, "waiting": "00" * 70000}, port, port]},
        {"ports": [{"open": True}, port, port]},
        {"messages": ["00"]},
        {"messages": ["00" * 1000]},
        {"messages": "00"},
        {"messages": [None]},
        {"extra": 1},
    ):
        with pytest.raises(SavedStateError):
            device.restore({**good, **change})
        assert device.save() == before
    single = ConsoleDevice(Sink()).save()
    with pytest.raises(SavedStateError):
        device.restore(single)


@pytest.mark.parametrize("end", ["terminal", "controller"])
def test_a_terminal_that_nobody_reads_stops_nothing(end: str) -> None:
    controller, terminal = os.openpty()
    try:
        port = ConsolePort(terminal if end == "terminal" else controller)
        before = open_fds()
        # Lines: each end takes two bytes of room where the terminal puts a return before it.
        writer = threading.Thread(target=lambda: [port.put(b"x\n" * 8000) for _ in range(8)], daemon=True)
        writer.start()
        writer.join(10)
        assert not writer.is_alive()
        assert 0 < port.dropped < 8 * 16000
        assert open_fds() == before
    finally:
        os.close(terminal)
        os.close(controller)
