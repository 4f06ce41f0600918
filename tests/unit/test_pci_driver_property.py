"""Whatever a function's bytes are, a driver ends, and ends with a driver that works or with a typed error.

Three ways to be wrong: all bytes arbitrary; a function that is right but for some bytes; registers that answer
something else at some of their reads. Time is virtual, so a wait without a bound would show as a test that never ends.
"""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import open_pci
from virtio_test.errors import PeerError, QueueFull, StateError, StatusViolation
from virtio_test.features import FeatureSet

from tests.unit.pci_driver_world import GOOD, FakePci, shared, vendor

MODES: list[Literal["auto", "modern", "legacy"]] = ["auto", "modern", "legacy"]
LINES: list[Literal["auto", "msix", "intx"]] = ["auto", "msix", "intx"]
ALL = FeatureSet("RING_RESET", "NOTIFICATION_DATA", "NOTIF_CONFIG_DATA", "RING_PACKED", "EVENT_IDX", "IN_ORDER")

byte = st.one_of(st.sampled_from([0, 1, 2, 4, 8, 9, 0x11, 0x40, 0x7F, 0x80, 0xFE, 0xFF]), st.integers(0, 255))
word = st.one_of(st.sampled_from([0, 1, 0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000]), st.integers(0, 0xFFFF_FFFF))


def drive(
    fake: FakePci, interface: Literal["auto", "modern", "legacy"], lines: Literal["auto", "msix", "intx"]
) -> None:
    """All that a driver does; what comes out otherwise is not ours to raise."""
    try:
        driver = Driver(open_pci(fake, interface=interface, interrupts=lines), wanted=ALL, queue_size=8, timeout=0.05)
        driver.initialize()
        for index in list(driver.queues)[:2]:
            request = driver.submit(index, [], [16])
            fake.message_handler(1)
            fake.line_handler()
            driver.loop.run_pending()
            assert not request.done, "nobody has answered"
            if "RING_RESET" in driver.features:
                assert driver.reset_queue(index) == [request]
        size = driver.registers.config_size()
        driver.read_config(0, min(size, 8))
        driver.detach()
    except (PeerError, StateError, QueueFull):
        pass


@given(
    st.binary(min_size=256, max_size=256),
    st.lists(st.tuples(word, byte), min_size=6, max_size=6),
    st.binary(max_size=128),
    st.sampled_from(MODES),
    st.sampled_from(LINES),
)
def test_arbitrary_bytes(
    config: bytes,
    masks: list[tuple[int, int]],
    content: bytes,
    interface: Literal["auto", "modern", "legacy"],
    lines: Literal["auto", "msix", "intx"],
) -> None:
    fake = FakePci()
    fake.config[4:] = config[4:]
    fake.masks = [(mask & ~0xF, flags & 0xF) for mask, flags in masks]
    for bar in range(6):
        fake.bars[bar] = bytearray(content.ljust(256, content[-1:] or b"\0"))
    drive(fake, interface, lines)


def capability() -> st.SearchStrategy[bytes]:
    """A capability with a right head and arbitrary insides."""
    kinds = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 0, 6])
    lengths = st.one_of(st.sampled_from([16, 20, 24]), byte)
    bars = st.one_of(st.integers(0, 6), byte)
    place = st.one_of(st.sampled_from([0, 0x1000, 0x2000, 0x3000, 4, 0x40]), word)

    def build(kind: int, length: int, bar: int, number: int, words: list[int]) -> bytes:
        return bytes([9, 0, length, kind, bar, number, 0, 0]) + b"".join(each.to_bytes(4, "little") for each in words)

    return st.builds(build, kinds, lengths, bars, byte, st.lists(place, min_size=4, max_size=4))


@pytest.mark.row("X-capabilities")
@given(st.lists(st.one_of(capability(), st.sampled_from([*GOOD, shared(1, 0, 4096), vendor(1)])), max_size=7), byte)
def test_arbitrary_capabilities(caps: list[bytes], end: int) -> None:
    fake = FakePci()
    places = fake.lay(caps)
    if places:
        fake.config[places[-1] + 1] = end
    drive(fake, "auto", "auto")


@given(
    st.lists(st.tuples(st.integers(0, 255), byte), max_size=6),
    st.lists(st.tuples(st.integers(0, 0x3F), byte), max_size=6),
    st.booleans(),
    st.sampled_from(MODES),
)
def test_right_but_for_some_bytes(
    config: list[tuple[int, int]],
    registers: list[tuple[int, int]],
    sticky: bool,
    interface: Literal["auto", "modern", "legacy"],
) -> None:
    fake = FakePci()
    for offset, value in config:
        fake.config[offset] = value
    for offset, value in registers:
        if offset not in (0x12, 0x13):  # 65535 queues take their time; they have a case of their own
            fake.fresh[offset] = fake.bars[0][offset] = value
            if sticky:
                fake.reads[0, offset] = lambda value=value: value
    drive(fake, interface, "auto")


@pytest.mark.row("X-capabilities")
@given(st.lists(st.one_of(st.none(), word), max_size=60), st.sampled_from(LINES))
def test_registers_that_change_their_mind(answers: list[int | None], lines: Literal["auto", "msix", "intx"]) -> None:
    """Each read is answered truthfully, or with anything; after those given, truthfully."""
    fake = FakePci()
    truth = fake.read_bar
    waiting = iter(answers)

    def read_bar(bar: int, offset: int, size: int) -> int:
        told = truth(bar, offset, size)
        lie = None if (bar, offset) == (0, 0x12) else next(waiting, None)
        return told if lie is None else lie & (1 << 8 * size) - 1

    fake.read_bar = read_bar
    drive(fake, "auto", lines)


def test_a_right_function_gets_through() -> None:
    """`drive` swallows what a device does wrong, so it has to be seen once that it gets to its end."""
    fake = FakePci()
    drive(fake, "auto", "auto")
    assert (0, 0x14, 1, 0x0F) in fake.writes
    assert (0, 0x3A, 2, 1) in fake.writes
    assert fake.writes[-1] == (0, 0x14, 1, 0)
    assert StatusViolation.__mro__[1:3][-1] is PeerError
