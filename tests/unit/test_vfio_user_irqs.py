"""Interrupts over vfio-user: every combination of data and action, the level of INTx, and the client's own table."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtio_test._core import GuestMemory, Notifier
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.codec import OwnedFd
from virtio_test.carrier.vfio_user.irqs import Interrupts
from virtio_test.carrier.vfio_user.messages import Command, IrqIndex, IrqSet
from virtio_test.carrier.vfio_user.payloads import SetIrqs
from virtio_test.carrier.vfio_user.rules import Refused
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.loop import OwnerLoop
from virtio_test.spec import pcibus
from virtio_test.transport.pci.interface import InterruptSink

from .vfio_user_world import MODERN_BAR, Server, bring_up, serving, silent, small_memory
from .world import open_fds

NONE, BOOL, EVENTFD = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSet.MASK, IrqSet.UNMASK, IrqSet.TRIGGER
INTX, MSIX = IrqIndex.INTX, IrqIndex.MSIX


class Ears:
    """Interrupts with four vectors and a line, and the eventfds that were given to them."""

    def __init__(self) -> None:
        self.loop = OwnerLoop()
        self.interrupts = Interrupts(self.loop, vectors=4, has_line=True)

    def ask(
        self,
        flags: int,
        index: int = MSIX,
        start: int = 0,
        count: int = 1,
        *,
        fds: list[int] | None = None,
        data: bytes = b"",
    ) -> None:
        owned = [OwnedFd(os.dup(fd)) for fd in fds or []]
        self.interrupts.set(SetIrqs(20, flags, index, start, count, data), owned)

    def listen(self, index: int = MSIX, count: int = 1) -> list[Notifier]:
        made = [Notifier.eventfd() for _ in range(count)]
        self.ask(EVENTFD | TRIGGER, index, 0, count, fds=[each.fileno() for each in made])
        return made

    def message(self, vector: int) -> None:
        self.interrupts.message(vector, 0, 0)


@pytest.fixture
def ears() -> Iterator[Ears]:
    before = open_fds()
    made = Ears()
    yield made
    made.interrupts.close()
    del made
    assert open_fds() <= before + 1


def heard(*notifiers: Notifier) -> list[int]:
    return [each.drain() for each in notifiers]


def test_it_is_where_a_function_sends_its_interrupts(ears: Ears) -> None:
    assert isinstance(ears.interrupts, InterruptSink)


# --- vectors --------------------------------------------------------------------------------------------------


def test_a_vector_goes_to_its_own_eventfd(ears: Ears) -> None:
    fds = ears.listen(count=4)
    for vector in (0, 3, 3, 1):
        ears.message(vector)
    assert heard(*fds) == [1, 1, 0, 2]


def test_a_vector_without_an_eventfd_is_dropped(ears: Ears) -> None:
    ears.message(0)
    (fd,) = ears.listen()
    ears.message(1)
    ears.message(4)
    ears.message(1 << 20)
    assert heard(fd) == [0]


def test_a_set_may_grow_vector_by_vector_as_qemu_has_it(ears: Ears) -> None:
    ears.ask(EVENTFD | TRIGGER, count=1)
    first, second = Notifier.eventfd(), Notifier.eventfd()
    ears.ask(EVENTFD | TRIGGER, fds=[first.fileno()])
    ears.ask(EVENTFD | TRIGGER, start=1, fds=[second.fileno()])
    ears.message(0)
    ears.message(1)
    ears.ask(EVENTFD | TRIGGER, start=0, count=1)
    ears.message(0)
    ears.message(1)
    assert heard(first, second) == [1, 2]
    ears.ask(NONE | TRIGGER, count=0)
    ears.message(1)
    assert heard(first, second) == [0, 0]


def test_a_masked_vector_waits_once(ears: Ears) -> None:
    fds = ears.listen(count=3)
    ears.ask(BOOL | MASK, count=3, data=b"\1\0\1")
    for _ in range(3):
        ears.message(0)
        ears.message(1)
    assert heard(*fds) == [0, 3, 0]
    ears.ask(NONE | UNMASK, count=3)
    assert heard(*fds) == [1, 0, 0]
    ears.ask(NONE | UNMASK, count=3)
    assert heard(*fds) == [0, 0, 0]


def test_taking_the_eventfd_away_forgets_what_waited(ears: Ears) -> None:
    ears.listen()
    ears.ask(NONE | MASK)
    ears.message(0)
    ears.ask(EVENTFD | TRIGGER)
    (fd,) = ears.listen()
    ears.ask(NONE | UNMASK)
    assert heard(fd) == [0]


@pytest.mark.parametrize(("index", "count"), [(INTX, 1), (MSIX, 4), (IrqIndex.ERR, 1), (IrqIndex.REQ, 1)])
def test_a_client_can_cause_its_own_interrupts(ears: Ears, index: int, count: int) -> None:
    fds = ears.listen(index, count)
    ears.ask(NONE | TRIGGER, index, 0, count)
    assert heard(*fds) == [1] * count
    ears.ask(BOOL | TRIGGER, index, 0, count, data=b"\0" * (count - 1) + b"\x80")
    assert heard(*fds) == [0] * (count - 1) + [1]


# --- the line -------------------------------------------------------------------------------------------------


def test_the_line_masks_itself_until_it_is_acknowledged(ears: Ears) -> None:
    (fd,) = ears.listen(INTX)
    ears.interrupts.line(asserted=True)
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [1]
    # Still asserted when it is acknowledged: once more.
    ears.ask(NONE | UNMASK, INTX)
    assert heard(fd) == [1]
    ears.interrupts.line(asserted=False)
    ears.ask(NONE | UNMASK, INTX)
    ears.ask(NONE | UNMASK, INTX)
    assert heard(fd) == [0]
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [1]
    # Down and up while masked: the acknowledgement finds it up.
    ears.interrupts.line(asserted=False)
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [0]
    ears.ask(NONE | UNMASK, INTX)
    assert heard(fd) == [1]


def test_a_client_masks_the_line(ears: Ears) -> None:
    (fd,) = ears.listen(INTX)
    ears.ask(NONE | MASK, INTX)
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [0]
    ears.ask(BOOL | UNMASK, INTX, data=b"\0")
    assert heard(fd) == [0]
    ears.ask(BOOL | UNMASK, INTX, data=b"\1")
    assert heard(fd) == [1]


def test_who_listens_late_hears_the_line(ears: Ears) -> None:
    ears.interrupts.line(asserted=True)
    (fd,) = ears.listen(INTX)
    assert heard(fd) == [1]
    (other,) = ears.listen(INTX)
    assert heard(fd, other) == [0, 1]
    ears.ask(NONE | TRIGGER, INTX, 0, 0)
    ears.ask(NONE | UNMASK, INTX)
    assert heard(fd, other) == [0, 0]


def test_an_eventfd_acknowledges_the_line(ears: Ears) -> None:
    (fd,) = ears.listen(INTX)
    resample = Notifier.eventfd()
    ears.ask(EVENTFD | UNMASK, INTX, fds=[resample.fileno()])
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [1]
    resample.notify()
    ears.loop.run_pending()
    assert heard(fd) == [1]
    ears.interrupts.line(asserted=False)
    resample.notify()
    ears.loop.run_pending()
    assert heard(fd) == [0]
    # Taken away: it says nothing any more.
    ears.interrupts.line(asserted=True)
    assert heard(fd) == [1]
    ears.ask(EVENTFD | UNMASK, INTX)
    resample.notify()
    ears.loop.run_pending()
    assert heard(fd) == [0]


def test_the_eventfd_that_acknowledges_goes_with_all_others(ears: Ears) -> None:
    resample = Notifier.eventfd()
    ears.ask(EVENTFD | UNMASK, INTX, fds=[resample.fileno()])
    ears.ask(EVENTFD | UNMASK, INTX, fds=[resample.fileno()])
    ears.ask(NONE | TRIGGER, INTX, 0, 0)
    resample.notify()
    assert ears.loop.run_pending() == 0


# --- what is refused ------------------------------------------------------------------------------------------

REFUSED = [
    ("IrqIndex", errno.EINVAL, 33, 5, 0, 1, 0, b""),
    ("IrqIndex", errno.EINVAL, 33, 0xFFFF_FFFF, 0, 0, 0, b""),
    ("IrqFlags", errno.EINVAL, 0, 2, 0, 1, 0, b""),
    ("IrqFlags", errno.EINVAL, 1, 2, 0, 1, 0, b""),
    ("IrqFlags", errno.EINVAL, 32, 2, 0, 1, 0, b""),
    ("IrqFlags", errno.EINVAL, 3 | 32, 2, 0, 1, 0, b"\1"),
    ("IrqFlags", errno.EINVAL, 1 | 48, 2, 0, 1, 0, b""),
    ("IrqFlags", errno.EINVAL, 1 | 32 | 64, 2, 0, 1, 0, b""),
    ("IrqFlags", errno.EINVAL, 1 | 32 | 1 << 31, 2, 0, 0, 0, b""),
    ("IrqData", errno.EINVAL, 1 | 32, 2, 0, 1, 0, b"\1"),
    ("IrqData", errno.EINVAL, 2 | 32, 2, 0, 2, 0, b"\1"),
    ("IrqData", errno.EINVAL, 2 | 32, 2, 0, 1, 0, b"\1\1"),
    ("IrqData", errno.EINVAL, 4 | 32, 2, 0, 1, 1, b"\0\0\0\0"),
    ("IrqRange", errno.EINVAL, 1 | 32, 2, 4, 1, 0, b""),
    ("IrqRange", errno.EINVAL, 1 | 32, 2, 0, 5, 0, b""),
    ("IrqRange", errno.EINVAL, 1 | 32, 2, 1, 0, 0, b""),
    ("IrqRange", errno.EINVAL, 1 | 8, 2, 0, 0, 0, b""),
    ("IrqRange", errno.EINVAL, 1 | 32, 2, 0xFFFF_FFFF, 0xFFFF_FFFF, 0, b""),
    ("IrqRange", errno.EINVAL, 4 | 32, 2, 3, 2, 2, b""),
    ("IrqRange", errno.EINVAL, 4 | 32, 0, 0, 2, 2, b""),
    ("IrqRange", errno.EINVAL, 1 | 32, 1, 0, 1, 0, b""),
    ("IrqFlags", errno.ENOTTY, 4 | 8, 0, 0, 1, 1, b""),
    ("IrqFlags", errno.ENOTTY, 4 | 8, 2, 0, 1, 1, b""),
    ("IrqFlags", errno.ENOTTY, 4 | 16, 2, 0, 1, 1, b""),
]


@pytest.mark.parametrize(("rule", "number", "flags", "index", "start", "count", "fds", "data"), REFUSED)
def test_what_cannot_be_set_changes_nothing(
    ears: Ears, rule: str, number: int, flags: int, index: int, start: int, count: int, fds: int, data: bytes
) -> None:
    mine = ears.listen(count=4)
    given = [Notifier.eventfd() for _ in range(fds)]
    with pytest.raises(Refused) as found:
        ears.ask(flags, index, start, count, fds=[each.fileno() for each in given], data=data)
    assert (found.value.error.rule, found.value.errno) == (rule, number)
    for vector in range(4):
        ears.message(vector)
    assert heard(*mine) == [1] * 4


def test_an_interrupt_that_is_not_there_can_be_switched_off(ears: Ears) -> None:
    ears.ask(NONE | TRIGGER, IrqIndex.MSI, 0, 0)


def test_only_eventfds_take_interrupts(ears: Ears) -> None:
    (mine,) = ears.listen()
    read, write = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    file = os.memfd_create("name\nwith a line", 0)
    for fd in (read, write, null, file):
        for action, index in ((TRIGGER, MSIX), (UNMASK, INTX)):
            with pytest.raises(Refused, match="IrqFd") as found:
                ears.ask(EVENTFD | action, index, fds=[fd])
            assert "\n" not in str(found.value.error)
        os.close(fd)
    semaphore = os.eventfd(0, os.EFD_SEMAPHORE)
    with pytest.raises(Refused, match="semaphore"):
        ears.ask(EVENTFD | UNMASK, INTX, fds=[semaphore])
    os.close(semaphore)
    ears.message(0)
    assert heard(mine) == [1]


def test_a_full_eventfd_holds_nobody_up(ears: Ears) -> None:
    fd = os.eventfd(0, 0)
    os.write(fd, struct.pack("=Q", (1 << 64) - 2))
    ears.ask(EVENTFD | TRIGGER, fds=[fd])
    ears.message(0)
    assert struct.unpack("=Q", os.read(fd, 8))[0] == (1 << 64) - 1
    os.close(fd)


# --- over a socket --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def test_more_vectors_than_one_message_carries(tmp_path: Path) -> None:
    from virtio_test.devices.test import TestDevice
    from virtio_test.transport.pci.flavours import declare
    from virtio_test.transport.pci.function import VirtioPci

    device = TestDevice(console=silent)
    made = declare(device, flavour="non-transitional", vectors=40)
    endpoint = VirtioPci(device, declaration=made, loop=OwnerLoop(), memory=GuestMemory())
    with serving(tmp_path / "s", endpoint) as server, VfioUserClient(server.path, memory=small_memory()) as client:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
        assert repr(client.interrupts) == "<ClientInterrupts: MSI-X, 40 eventfds>"
        assert server.server.session is not None
        assert repr(server.server.session.interrupts) == "<Interrupts: INTx off, 40 of 40 vectors>"


def test_a_masked_vector_waits_in_the_client(server: Server) -> None:
    with VfioUserClient(server.path, memory=small_memory()) as client:
        registers = open_pci(client, interrupts="msix")
        driver = TestDriver(registers, console=silent)
        driver.initialize()
        place = client.msix
        assert place is not None
        control = place.offset + 16 * 1 + 12
        client.write_bar(place.bar, control, 4, pcibus.MSIX_ENTRY_MASKED)
        request = driver.submit_number(4)
        client.loop.run(until=lambda: request.done, timeout=0.3)
        assert not request.done
        client.write_bar(place.bar, control, 4, 0)
        assert int.from_bytes(request.wait(timeout=5.0)[:4], "little") == 105
        # The same with the mask of the whole function.
        at = place.position + pcibus.MSIX_CONTROL
        client.write_config(at, 2, pcibus.MSIX_ENABLE | pcibus.MSIX_MASK_ALL)
        request = driver.submit_number(5)
        client.loop.run(until=lambda: request.done, timeout=0.3)
        assert not request.done
        client.write_config(at, 2, pcibus.MSIX_ENABLE)
        assert int.from_bytes(request.wait(timeout=5.0)[:4], "little") == 106


def test_interrupts_can_be_switched_while_the_device_runs(server: Server) -> None:
    with VfioUserClient(server.path, memory=small_memory()) as client:
        for kind in ("msix", "intx", "msix"):
            driver = TestDriver(open_pci(client, interrupts=kind), console=silent)
            driver.initialize()
            assert driver.request(2).ret == 103


def test_a_line_that_stays_up_is_told_again(server: Server) -> None:
    with VfioUserClient(server.path, memory=small_memory()) as client:
        driver = TestDriver(open_pci(client, interrupts="intx"), console=silent)
        driver.initialize()
        seen: list[int] = []
        isr = 0x1000

        def line() -> None:
            # The first two times nobody reads the ISR, so the line stays up.
            seen.append(client.read_bar(MODERN_BAR, isr, 1) if len(seen) >= 2 else 0)

        client.listen(message=lambda _: None, line=line)
        driver.submit_number(1)
        client.loop.run(until=lambda: len(seen) >= 3, timeout=10.0)
        client.loop.run(timeout=0.2)
        assert seen == [0, 0, 1]


def test_a_command_with_more_fds_than_interrupts_ends_the_connection(server: Server) -> None:
    with VfioUserClient(server.path, memory=small_memory()) as client:
        fd = Notifier.eventfd()
        reply = client.command(
            Command.DEVICE_SET_IRQS, SetIrqs(20, EVENTFD | TRIGGER, MSIX, 0, 3), fds=(fd.fileno(),) * 3
        )
        assert reply is not None
        assert reply.errno == errno.EINVAL
