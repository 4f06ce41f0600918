"""A PCI function in front of user-mode Linux: commands, interrupts and resets, and our PCI driver through all of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_test._core import GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.uml import MAX_ERRORS, MAX_WAITING, UmlPci, serve_uml
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.test import TestDevice
from virtio_test.driver.access import PciAccess
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.errors import InvalidArgument, MessageError, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.pcidev import HEADER, INTERRUPT_QUEUE, UML_PCI_DEVICE_ID, Op
from virtio_test.status import Status
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.vhost_user.backend import Backend

from tests.unit.uml_world import BUFFER_SIZE, UmlKernel, command

SPLIT = RING_FEATURES - FeatureSet("RING_PACKED")
MODERN_BAR = 4
MSIX_BAR = 1


def upper() -> BaseDevice:
    return BaseDevice(45, handlers={0: bytes.upper}, queue_sizes=(8,))


def driven(kernel: UmlKernel, **options: Any) -> Driver:
    """The inner device's driver, over PCI; it is live."""
    driver = Driver(open_pci(kernel, **options), wanted=SPLIT, arena=kernel.inner_arena)
    driver.initialize()
    return driver


# --- our own driver through it -----------------------------------------------------------------------------


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("outer", ["split", "packed"])
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("timer", [False, True])
def test_the_transcripts_are_those_of_the_loopback(interrupts: str, outer: str, ring: str, *, timer: bool) -> None:
    wanted = RING_FEATURES if ring == "packed" else SPLIT

    def play(driver: TestDriver) -> FeatureSet:
        agreed = driver.initialize()
        if timer:
            driver.loop.run(timeout=32.5)
        else:
            driver.request(10)
            driver.request_many(range(250, 256))
        return agreed

    expected: list[str] = []
    play(
        TestDriver(
            Loopback(TestDevice(timer=timer, console=expected.append)),
            timer=timer,
            console=expected.append,
            wanted=wanted,
        )
    )
    lines: list[str] = []
    kernel = UmlKernel(TestDevice(timer=timer, console=lines.append), packed=outer == "packed")
    assert isinstance(kernel, PciAccess)
    registers = open_pci(kernel, interrupts=interrupts)  # pyright: ignore[reportArgumentType]
    agreed = play(TestDriver(registers, timer=timer, console=lines.append, wanted=wanted, arena=kernel.inner_arena))
    assert ("RING_PACKED" in agreed) is (ring == "packed")
    assert lines == expected
    assert len(lines) == (15 if timer else 63)
    assert kernel.uml.errors == []
    assert kernel.function.violations == []
    kinds = {each[0] for each in kernel.interrupts}
    assert kinds == {Op.MSI if interrupts == "msix" else Op.INT}


def test_what_the_outer_device_is() -> None:
    kernel = UmlKernel(upper())
    assert (kernel.uml.device_id, list(kernel.uml.queue_sizes)) == (UML_PCI_DEVICE_ID, [256, 256])
    assert "IN_ORDER" not in kernel.uml.features
    assert repr(kernel.uml).startswith("<UmlPci id 1234 of <VirtioPci 1af4:106d")
    assert UmlPci(kernel.function, device_id=77).device_id == 77
    with pytest.raises(StateError, match="cannot be saved"):
        kernel.uml.save()


def test_both_devices_have_one_memory() -> None:
    function = VirtioPci(upper())
    with pytest.raises(StateError, match="one memory"):
        Loopback(UmlPci(function))
    with pytest.raises(InvalidArgument, match="loop and the memory"):
        serve_uml(lambda loop, _: VirtioPci(upper(), loop=loop), "none/unused")
    with pytest.raises(InvalidArgument, match="loop and the memory"):
        serve_uml(lambda _, memory: VirtioPci(upper(), memory=memory), "none/unused")
    with pytest.raises(InvalidArgument, match="regions of its own"):
        Backend(upper(), path="unused", memory=GuestMemory([(0, 4096)]))


# --- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_configuration_space_is_read_and_written(size: int) -> None:
    kernel = UmlKernel(upper())
    whole = kernel.function.read_config(0, 8)
    assert kernel.send([command(Op.CFG_READ, 0, size)], [8]) == whole[:size]
    assert kernel.send([command(Op.CFG_WRITE, 0x3C, min(size, 4), data=b"\x2a" * 8)]) == b""
    assert kernel.function.read_config(0x3C, 1) == b"\x2a"
    assert kernel.uml.errors == []


def test_behind_the_function_s_own_space_there_are_ones() -> None:
    kernel = UmlKernel(upper())
    assert kernel.function.config_size == 256
    assert kernel.send([command(Op.CFG_READ, 256, 4)], [8]) == b"\xff" * 4
    assert kernel.send([command(Op.CFG_READ, 252, 8)], [8])[4:] == b"\xff" * 4
    kernel.send([command(Op.CFG_WRITE, 256, 4, data=bytes(8))])
    kernel.send([command(Op.CFG_WRITE, 252, 8, data=bytes(8))])
    assert kernel.uml.errors == []


def test_bars_are_read_and_written() -> None:
    kernel = UmlKernel(upper())
    registers = open_pci(kernel)
    registers.write_status(1)
    assert kernel.send([command(Op.MMIO_READ, 0x14, 1, bar=MODERN_BAR)], [1]) == b"\x01"
    assert kernel.send([command(Op.MMIO_WRITE, 0x14, 1, bar=MODERN_BAR, data=b"\x03")]) == b""
    assert registers.read_status() == 3
    kernel.send([command(Op.MMIO_WRITE, 0, 24, bar=MSIX_BAR), bytes(range(5)), bytes(range(5, 30))])
    table = kernel.send([command(Op.MMIO_READ, 0, 24, bar=MSIX_BAR)], [7, 17])
    # Of the word at 12 only the mask bit can be written.
    assert table == bytes(range(12)) + bytes(4) + bytes(range(16, 24))
    kernel.send([command(Op.MMIO_MEMSET, 4, 8, bar=MSIX_BAR, data=b"\x55")])
    assert kernel.send([command(Op.MMIO_READ, 4, 8, bar=MSIX_BAR)], [8]) == b"\x55" * 8
    assert kernel.uml.errors == []


@pytest.mark.parametrize(
    ("at", "size", "accesses"),
    [
        (0, 8, [(0, 8)]),
        (4, 8, [(4, 4), (8, 4)]),
        (2, 4, [(2, 2), (4, 2)]),
        (1, 7, [(1, 1), (2, 2), (4, 4)]),
        (3, 3, [(3, 1), (4, 2)]),
        (0, 11, [(0, 4), (4, 4), (8, 2), (10, 1)]),
    ],
)
def test_a_wide_transfer_is_made_of_aligned_accesses(at: int, size: int, accesses: list[tuple[int, int]]) -> None:
    kernel = UmlKernel(upper())
    seen: list[tuple[int, int]] = []
    read, write = kernel.function.read_bar, kernel.function.write_bar

    def spy_read(bar: int, offset: int, length: int) -> bytes:
        seen.append((offset, length))
        return read(bar, offset, length)

    def spy_write(bar: int, offset: int, data: bytes) -> None:
        seen.append((offset, len(data)))
        write(bar, offset, data)

    kernel.function.read_bar, kernel.function.write_bar = spy_read, spy_write
    assert len(kernel.send([command(Op.MMIO_READ, at, size, bar=MSIX_BAR)], [16])) == size
    assert seen == accesses
    seen.clear()
    kernel.send([command(Op.MMIO_WRITE, at, size, bar=MSIX_BAR, data=bytes(16))])
    assert seen == accesses


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_transfer_may_end_where_its_space_does(size: int) -> None:
    kernel = UmlKernel(upper())
    open_pci(kernel)
    assert kernel.send([command(Op.CFG_READ, 4096 - size, size)], [8]) == b"\xff" * size
    kernel.send([command(Op.MMIO_WRITE, 0x1000 - size, size, bar=MSIX_BAR, data=bytes(8))])
    kernel.send([command(Op.MMIO_MEMSET, 0x1000 - size, size, bar=MSIX_BAR, data=b"x")])
    assert len(kernel.send([command(Op.MMIO_READ, 0x1000 - size, size, bar=MSIX_BAR)], [8])) == size
    assert kernel.uml.errors == []


MALFORMED: list[tuple[bytes, str]] = [
    (b"\x01", "CommandShort"),
    (command(Op.CFG_READ, 0, 4)[:15], "CommandShort"),
    (command(0, 0, 4), "UnknownCommand"),
    (command(9, 0, 4), "UnknownCommand"),
    (command(255, 0, 4), "UnknownCommand"),
    (command(Op.INT, 1), "UnknownCommand"),
    (command(Op.MSI, 0, 4, data=bytes(4)), "UnknownCommand"),
    (command(Op.CFG_READ, 0, 0), "CommandSize"),
    (command(Op.CFG_READ, 0, 3), "CommandSize"),
    (command(Op.CFG_READ, 0, 16), "CommandSize"),
    (command(Op.CFG_WRITE, 0, 0xFFFF_FFFF, data=bytes(64)), "CommandSize"),
    (command(Op.CFG_READ, 4096, 1), "CommandRange"),
    (command(Op.CFG_READ, 4094, 4), "CommandRange"),
    (command(Op.CFG_READ, (1 << 64) - 1, 4), "CommandRange"),
    (command(Op.MMIO_READ, 0, 4, bar=0), "NoSuchBar"),
    (command(Op.MMIO_READ, 0, 4, bar=5), "NoSuchBar"),
    (command(Op.MMIO_WRITE, 0, 4, bar=255, data=bytes(4)), "NoSuchBar"),
    (command(Op.MMIO_READ, 0, 0, bar=MODERN_BAR), "CommandRange"),
    (command(Op.MMIO_READ, 0x4000, 1, bar=MODERN_BAR), "CommandRange"),
    (command(Op.MMIO_READ, 0x3FFD, 4, bar=MODERN_BAR), "CommandRange"),
    (command(Op.MMIO_READ, 0, 0xFFFF_FFFF, bar=MODERN_BAR), "CommandRange"),
    (command(Op.MMIO_WRITE, (1 << 64) - 4, 4, bar=MODERN_BAR, data=bytes(4)), "CommandRange"),
    (command(Op.MMIO_MEMSET, 1, 0x4000, bar=MODERN_BAR, data=b"x"), "CommandRange"),
    (command(Op.CFG_WRITE, 4, 4, data=bytes(3)), "CommandData"),
    (command(Op.MMIO_WRITE, 0, 8, bar=MODERN_BAR, data=bytes(7)), "CommandData"),
    (command(Op.MMIO_MEMSET, 0, 8, bar=MODERN_BAR), "CommandData"),
]


@pytest.mark.parametrize(("message", "rule"), MALFORMED)
def test_a_malformed_command_is_answered_with_nothing(message: bytes, rule: str) -> None:
    kernel = UmlKernel(upper())
    assert kernel.send([message], [8]) == b""
    assert kernel.send([message]) == b""
    assert dict(kernel.uml.ignored) == {rule: 2}
    error = kernel.uml.errors[0]
    assert isinstance(error, MessageError)
    assert (error.rule, error.clause) == (rule, "linux/virtio_pcidev.h")
    assert kernel.read_config(0, 4) == 0x106D1AF4


def test_an_answer_without_room_is_none() -> None:
    kernel = UmlKernel(upper())
    assert kernel.send([command(Op.CFG_READ, 0, 4)], [3]) == b""
    assert kernel.send([command(Op.MMIO_READ, 0, 64, bar=MSIX_BAR)]) == b""
    assert dict(kernel.uml.ignored) == {"CommandRoom": 2}


def test_errors_are_counted_and_not_kept_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    kernel = UmlKernel(upper())
    for _ in range(MAX_ERRORS + 5):
        kernel.send([b"?"])
    assert len(kernel.uml.errors) == MAX_ERRORS
    assert kernel.uml.ignored["CommandShort"] == MAX_ERRORS + 5
    assert [record.name for record in caplog.records] == ["virtio_test.uml"], "one line, however many there are"


def test_accesses_that_the_function_does_not_define_are_its_matter() -> None:
    kernel = UmlKernel(upper())
    open_pci(kernel)
    assert kernel.send([command(Op.MMIO_READ, 0x3F00, 4, bar=MODERN_BAR)], [4]) == b"\xff" * 4
    assert kernel.uml.errors == []
    assert len(kernel.function.violations) == 1


# --- interrupts --------------------------------------------------------------------------------------------


def msi(data: int, address: int = 0xA0000) -> bytes:
    return HEADER.pack(Op.MSI, 0, 0, 4, address) + data.to_bytes(4, "little")


def test_an_interrupt_message_is_what_would_be_written_to_memory() -> None:
    kernel = UmlKernel(upper())
    sink = kernel.function.interrupts.sink
    assert sink is not None
    sink.message(3, 0x1_0000_A000, 0xDEAD_BEEF)
    for asserted in (True, False):
        sink.line(asserted)
    kernel.loop.run_pending()
    assert kernel.interrupts == [msi(0xDEAD_BEEF, 0x1_0000_A000), HEADER.pack(Op.INT, 0, 0, 0, 1)]


def test_interrupts_wait_for_buffers_and_equal_ones_are_one() -> None:
    kernel = UmlKernel(upper(), buffers=0)
    sink = kernel.function.interrupts.sink
    assert sink is not None
    for data in (7, 8, 7, 7, 9):
        sink.message(0, 0xA0000, data)
    kernel.loop.run_pending()
    assert kernel.interrupts == []
    for _ in range(2):
        kernel.give_buffer()
    kernel.loop.run_pending()
    assert kernel.interrupts == [msi(7), msi(8)]
    sink.message(0, 0xA0000, 7)
    for _ in range(3):
        kernel.give_buffer()
    kernel.loop.run_pending()
    assert kernel.interrupts == [msi(7), msi(8), msi(9), msi(7)]


def test_a_kernel_that_takes_no_interrupts_costs_no_memory() -> None:
    kernel = UmlKernel(upper(), buffers=0)
    sink = kernel.function.interrupts.sink
    assert sink is not None
    for data in range(MAX_WAITING + 10):
        sink.message(0, 0xA0000, data)
    assert kernel.uml.lost == 10
    kernel.give_buffer()
    kernel.loop.run_pending()
    assert kernel.interrupts == [msi(10)]


@pytest.mark.parametrize("size", [1, BUFFER_SIZE - 1])
def test_a_buffer_that_is_too_small_is_given_back_empty(size: int) -> None:
    kernel = UmlKernel(upper(), buffers=0)
    sink = kernel.function.interrupts.sink
    assert sink is not None
    kernel.give_buffer(size)
    kernel.give_buffer(BUFFER_SIZE + 5)
    sink.message(0, 0xA0000, 7)
    kernel.loop.run_pending()
    assert kernel.interrupts == [b"", msi(7)]
    assert dict(kernel.uml.ignored) == {"InterruptRoom": 1}


# --- resets ------------------------------------------------------------------------------------------------


def test_a_reset_of_the_outer_device_resets_the_function() -> None:
    kernel = UmlKernel(upper())
    driver = driven(kernel)
    assert driver.submit(0, [b"x"], [1]).wait() == b"X"
    assert kernel.function.bank.status.live
    kernel.function.interrupts.call(0)
    kernel.bus.write_status(0)
    assert not kernel.function.bank.status.driver_ok
    assert kernel.function.read_config(4, 2) == b"\0\0"
    kernel.outer.initialize()
    for _ in range(kernel.buffers):
        kernel.give_buffer()
    kernel.loop.run_pending()
    assert kernel.interrupts[1:] == [], "what waited belongs to the time before"
    assert driven(kernel).submit(0, [b"y"], [1]).wait() == b"Y"


def test_the_function_is_held_while_the_command_queue_stands_still() -> None:
    kernel = UmlKernel(upper())
    driver = driven(kernel)
    queue = kernel.bus.queue(0)
    kernel.uml.stop_queue(0)
    queue.stop()
    request = driver.submit(0, [b"x"], [1], publish=False)
    driver.queues[0].publish()
    kernel.function.bank.kick(0)
    kernel.loop.run_pending()
    assert not request.done
    queue.resume()
    kernel.uml.start_queue(queue)
    kernel.loop.run_pending()
    assert request.wait() == b"X", "it went on from where it stood, so the function was not reset"


def test_a_command_queue_that_starts_anew_has_a_new_driver() -> None:
    kernel = UmlKernel(upper())
    driven(kernel)
    assert kernel.function.bank.status.live
    kernel.outer.reset_queue(0)
    assert not kernel.function.bank.status.driver_ok
    kernel.outer.reset_queue(INTERRUPT_QUEUE)
    for _ in range(kernel.buffers):
        kernel.give_buffer()
    assert driven(kernel).submit(0, [b"y"], [1]).wait() == b"Y"


def test_no_line_is_left_asserted_behind_a_driver_without_msix() -> None:
    device = upper()
    kernel = UmlKernel(device, declaration=declare(device, flavour="non-transitional", vectors=0))
    driver = driven(kernel)
    for text in (b"a", b"b", b"c"):
        assert driver.submit(0, [text], [1]).wait() == text.upper()
    assert {each[0] for each in kernel.interrupts} == {Op.INT}
    assert not kernel.function.interrupts.asserted


# --- chaos -------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.sampled_from([0, 1, 4, 0x14, 0x16, 0xFC, 0xFFF, 0x1000, 0x3FFF]), st.integers(0, (1 << 64) - 1))
SIZES = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64]), st.integers(0, (1 << 32) - 1))
HEADERS: st.SearchStrategy[bytes] = st.tuples(
    st.one_of(st.integers(1, 5), st.integers(0, 255)),
    st.one_of(st.sampled_from([1, 4]), st.integers(0, 255)),
    st.just(0),
    SIZES,
    NUMBERS,
).map(lambda fields: HEADER.pack(*fields) + bytes(fields[3] % 20))
COMMANDS: st.SearchStrategy[bytes] = st.one_of(HEADERS, HEADERS, st.binary(min_size=1, max_size=24))


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(st.tuples(COMMANDS, st.lists(st.integers(1, 70), max_size=2)), max_size=20))
def test_any_commands(begun: bool, program: list[tuple[bytes, list[int]]]) -> None:
    kernel = UmlKernel(upper())
    if begun:
        driven(kernel)
    for message, room in program:
        assert len(kernel.send([message], room)) <= sum(room)
        kernel.loop.run_pending()
    assert sum(kernel.uml.ignored.values()) + sum(kernel.uml.commands.values()) >= len(program)
    assert not kernel.bus.read_status() & Status.DEVICE_NEEDS_RESET
    kernel.outer.initialize()
    for _ in range(kernel.buffers):
        kernel.give_buffer()
    assert driven(kernel).submit(0, [b"after all"], [9]).wait() == b"AFTER ALL"
