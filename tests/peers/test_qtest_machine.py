"""The machine itself: odd forms of a device, configuration changes, several devices at once, and ends of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from virtio_test.carrier.qtest import QtestMachine
from virtio_test.clock import Timer
from virtio_test.driver.alloc import Arena
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.net import NetDriver
from virtio_test.driver.pci import PciRegisters, open_pci
from virtio_test.driver.rng import RngDriver
from virtio_test.errors import PeerDisconnected, PeerTimeout, StateError
from virtio_test.spec.pci import CapType

from tests.kernel import build
from tests.peers.machines import World
from tests.unit.world import open_fds

RNG = ["-object", "rng-random,id=r0,filename=/dev/urandom"]


def machine(words: Sequence[str], **options: float) -> QtestMachine:
    qemu = build.qemu()
    return QtestMachine(qemu.command(), words, env=qemu.environment(), **options)  # pyright: ignore[reportArgumentType]


def device(words: str, *more: str) -> list[str]:
    return [*RNG, "-device", f"virtio-rng-pci,rng=r0,addr=5,{words}", *more]


@pytest.mark.parametrize("lines", ["auto", "intx"])
@pytest.mark.parametrize(
    ("words", "kind"),
    [("vectors=1", "msix"), ("vectors=2", "msix"), ("vectors=7", "msix"), ("vectors=0", "intx")],
)
def test_any_number_of_vectors(words: str, kind: str, lines: Literal["auto", "intx"]) -> None:
    with machine(device(words)) as here:
        registers = open_pci(here.pci(5), interrupts=lines, strict=True)
        assert registers.interrupts.kind == ("intx" if lines == "intx" else kind)
        driver = RngDriver(registers)
        driver.initialize()
        assert len(driver.read(64)) == 64
        assert registers.interrupts.vectors == {
            0: 0 if kind == "intx" or lines == "intx" or words == "vectors=1" else 1
        }


def test_notifications_on_pages_of_their_own_and_in_io_space() -> None:
    with machine(device("page-per-vq=on")) as here:
        registers = open_pci(here.pci(5), strict=True)
        assert isinstance(registers, PciRegisters)
        assert registers.capabilities.structures[CapType.NOTIFY_CFG].multiplier == 4096
        driver = RngDriver(registers)
        driver.initialize()
        assert len(driver.read(64)) == 64
    with machine(device("modern-pio-notify=on,disable-legacy=on")) as here:
        registers = open_pci(here.pci(5), strict=True)
        assert isinstance(registers, PciRegisters)
        place = registers.capabilities.structures[CapType.NOTIFY_CFG]
        assert registers.function.bars[place.bar].io, "the faster one comes first, and the first counts"
        assert place.multiplier == 0
        assert [each.why for each in registers.capabilities.ignored] == ["not the first of its type"]
        driver = RngDriver(registers)
        driver.initialize()
        assert len(driver.read(64)) == 64


def test_several_devices_interrupt_one_loop(world: Callable[..., World]) -> None:
    """MSI-X and a shared line side by side, with requests of all in flight at once."""
    here = world("q35")
    memory = here.machine.memory
    start = memory.regions[0].address
    drivers: list[RngDriver] = []
    accesses = [here.machine.pci(here.spots["rng", form].number) for form in ("modern", "transitional", "legacy")]
    lines: list[Literal["msix", "intx"]] = ["msix", "intx", "intx"]
    for place, (access, line) in enumerate(zip(accesses, lines, strict=True)):
        arena = Arena(memory, address=start + (place << 20), size=1 << 20)
        drivers.append(RngDriver(open_pci(access, interrupts=line), arena=arena))
        drivers[-1].initialize()
    for _ in range(10):
        requests = [driver.submit_read(32) for driver in drivers for _ in range(2)]
        assert len({each.wait() for each in requests}) == 6
    for driver, access in zip(drivers, accesses, strict=True):
        driver.detach()
        access.close()


def test_words_for_messages_are_used_again() -> None:
    """A machine that lives long is opened more often than it has words."""
    with machine(device("vectors=2")) as here:
        seen: set[int] = set()
        for _ in range(20):
            access = here.pci(5)
            driver = RngDriver(open_pci(access, interrupts="msix"))
            driver.initialize()
            assert len(driver.read(4)) == 4
            driver.detach()
            seen |= {access.message(vector)[0] for vector in (0, 1)}
            access.close()
        assert len(seen) == 2


# --- configuration changes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def qmp(path: Path) -> Generator[Callable[..., None]]:
    """QEMU's monitor, for what a machine's owner may do to its devices."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(5)
        channel.connect(str(path))
        stream = channel.makefile("rw")
        stream.readline()

        def command(execute: str, **arguments: object) -> None:
            stream.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
            stream.flush()
            while "return" not in (answer := json.loads(stream.readline())):
                assert "error" not in answer, answer

        command("qmp_capabilities")
        yield command
        stream.close()


@pytest.mark.parametrize("lines", ["msix", "intx"])
@pytest.mark.parametrize("interface", ["modern", "legacy"])
def test_configuration_changes_arrive(
    tmp_path: Path, lines: Literal["msix", "intx"], interface: Literal["modern", "legacy"]
) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    words = ["-chardev", f"socket,id=mon,path={tmp_path}/qmp,server=on,wait=off", "-mon", "chardev=mon,mode=control"]
    words += ["-blockdev", f"driver=file,node-name=f,filename={image}"]
    words += ["-blockdev", "driver=raw,node-name=disk,file=f", "-device", "virtio-blk-pci,drive=disk,addr=4"]
    words += [
        "-netdev",
        f"dgram,id=n0,local.type=unix,local.path={tmp_path}/a,remote.type=unix,remote.path={tmp_path}/b",
    ]
    words += ["-device", "virtio-net-pci,netdev=n0,addr=5,id=nic"]
    with machine(words) as here, qmp(tmp_path / "qmp") as command:
        memory = here.memory
        arenas = [Arena(memory, address=(1 + place) << 24, size=1 << 24) for place in (0, 1)]
        blk = BlkDriver(open_pci(here.pci(4), interface=interface, interrupts=lines), arena=arenas[0])
        net = NetDriver(open_pci(here.pci(5), interface=interface, interrupts=lines), arena=arenas[1])
        blk.initialize()
        net.initialize()
        assert blk.capacity == 2048
        command("block_resize", **{"node-name": "disk", "size": 3 << 20})
        blk.run_until(lambda: blk.capacity == 6144, "the new capacity", timeout=5)
        assert net.link_up
        command("set_link", name="nic", up=False)
        net.run_until(lambda: not net.link_up, "the link to go down", timeout=5)
        assert net.live
        blk.write(6143, bytes(512))


# --- ends -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    before = open_fds()
    here = machine(device("packed=on"))
    pid, folder = here.process.pid, here.process.folder
    assert pid is not None
    driver = RngDriver(open_pci(here.pci(5)))
    driver.initialize()
    assert (folder / "ram").stat().st_size == 64 << 20
    here.close()
    here.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()
    with pytest.raises(PeerDisconnected):
        driver.initialize()
    # Loop and memory close their own fds when nobody has them any more; they know each other, in a circle.
    del here, driver
    assert open_fds() == before


def test_a_qemu_that_does_not_come_up_says_why() -> None:
    with pytest.raises(PeerDisconnected, match=r"no-such-device.* is not a valid device model name.*exit status 1"):
        machine(["-device", "no-such-device"])
    with pytest.raises(PeerDisconnected, match="cannot be started"):
        QtestMachine(["/nonexistent/qemu"])
    with pytest.raises(PeerDisconnected, match="exit status 0"):
        QtestMachine(["/bin/true"])


def test_a_qemu_that_dies_ends_whoever_waits() -> None:
    # Its entropy comes from nowhere, so the request stays in flight.
    words = ["-chardev", "null,id=none", "-object", "rng-egd,id=none,chardev=none"]
    with machine([*words, "-device", "virtio-rng-pci,rng=none,addr=5"]) as here:
        driver = Driver(open_pci(here.pci(5)))
        driver.initialize()
        request = driver.submit(0, [], [16])
        pid = here.process.pid
        assert pid is not None
        Timer(here.loop.clock, lambda: os.kill(pid, signal.SIGKILL), first_after=0.05)
        with pytest.raises(PeerDisconnected, match=r"QEMU is gone .*exit status -9"):
            request.wait(timeout=10)
        assert here.loop.clock.now() < 5
        with pytest.raises(PeerDisconnected):
            driver.initialize()
    assert not here.process.running


def test_a_qemu_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    with machine(device("vectors=2"), timeout=0.3) as here:
        driver = Driver(open_pci(here.pci(5)))
        driver.initialize()
        assert here.process.pid is not None
        os.kill(here.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(PeerTimeout, match="did not answer"):
            driver.initialize()
        assert time.monotonic() - start < 2
        with pytest.raises(PeerDisconnected):
            driver.reset()


def test_an_empty_slot_has_no_function(world: Callable[..., World]) -> None:
    with pytest.raises(StateError, match="no PCI function"):
        open_pci(world("q35").machine.pci(29))
