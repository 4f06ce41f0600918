"""Our PCI function before a real kernel, over vfio-user: every flavour, on both PC machines, with both interrupts.

One boot serves all tests of a machine: a guest with a function of each flavour, of which one at a time has our driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from virtio_test.devices.test import TestDevice
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare

from tests.kernel import checks, own
from tests.kernel.pci import bound, declared, interrupts, missing, virtio_name
from tests.kernel.qemu import Qemu, root_port, vfio_user
from tests.kernel.server import Server
from tests.kernel.transcript import ACK, device_request, device_tick, driver_tick

pytestmark = pytest.mark.kernel

FUNCTION = ("--transport", "pci", "--carrier", "vfio-user")


DECLARED = ("everything", "integrated")


def _functions(machine: str) -> dict[str, tuple[list[str], str, Declaration]]:
    """By name: what its server is asked for, its slot, and what the guest must see."""
    device = TestDevice()
    made: dict[str, tuple[list[str], str, Declaration]] = {
        "generic": ([], "04", declare(device)),
        "transitional": (
            ["--flavour", "transitional", "--features", "-RING_PACKED"],
            "05",
            declare(device, flavour="transitional"),
        ),
        "non-transitional": (
            ["--flavour", "non-transitional", "--features", "-RING_PACKED,-EVENT_IDX"],
            "06",
            declare(device, flavour="non-transitional"),
        ),
        "everything": (["--declare", "everything"], "07", own.declaration(device, "everything")),
    }
    made["timer"] = (["--timer", "--first-after", "0", "--every", "0.4"], "09", declare(device))
    if machine == "q35":
        made["integrated"] = (["--declare", "integrated"], "08", own.declaration(device, "integrated"))
        made["generic behind a port"] = (["--express"], "01:00", declare(device, behind_express_port=True))
    return {name: (asked, slot if ":" in slot else f"00:{slot}", of) for name, (asked, slot, of) in made.items()}


@dataclass(frozen=True)
class World:
    machine: str
    line: bool
    guest: Qemu
    servers: dict[str, Server]
    slots: dict[str, str]
    declarations: dict[str, Declaration]

    def each(self) -> list[tuple[str, str, Server]]:
        """Name, slot and server of each function that takes requests."""
        return [(name, slot, self.servers[name]) for name, slot in self.slots.items() if name != "timer"]

    def how(self, name: str) -> str:
        """How its interrupts come."""
        return "MSI-X" if self.declarations[name].layout.vectors and not self.line else "INTx"


WORLDS = [("q35", False), ("q35", True), ("pc", False), ("pc", True)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-{'INTx' if world[1] else 'MSI-X'}")
def world(request: pytest.FixtureRequest, serve_all: Callable[..., Server], boot_one: Callable[..., Qemu]) -> World:
    machine, line = request.param
    servers: dict[str, Server] = {}
    words: list[str] = root_port() if machine == "q35" else []
    functions = _functions(machine)
    for name, (asked, slot, _) in functions.items():
        if name in DECLARED:
            servers[name] = serve_all(*asked, program=("-m", "tests.kernel.own"))
        else:
            servers[name] = serve_all(*FUNCTION, *asked)
        bus, device = slot.split(":")
        place = {"addr": f"{device}.0"} if bus == "00" else {"bus": "root"}
        words += vfio_user(servers[name].path, **place)
    guest = boot_one(words, machine=machine, append="pci=nomsi" if line else "", tools=True)
    guest.command("write /sys/bus/virtio/drivers_autoprobe 0")
    guest.load()
    slots = {name: f"0000:{slot}.0" for name, (_, slot, _) in functions.items()}
    return World(machine, line, guest, servers, slots, {name: each[2] for name, each in functions.items()})


def test_lspci_shows_what_was_declared_and_linux_binds_its_driver(world: World) -> None:
    for name, slot, _ in world.each():
        text = "\n".join(checks.shell(world.guest, f"lspci -vvv -s {slot} 2>&1"))
        wanted = [*declared(world.declarations[name]), "Kernel driver in use: virtio-pci"]
        assert missing(text, wanted) is None, f"{name}:\n{text}"


def test_requests_read_as_the_original_on_both_consoles(world: World) -> None:
    for name, slot, server in world.each():
        with bound(world.guest, slot) as device:
            before = len(server.lines)
            for number in (10, 255):
                checks.request(world.guest, number)
            assert server.said(before + 10)[before:] == device_request(10) + device_request(255), name
            kinds = interrupts(world.guest, device)
            assert kinds, name
            assert all(("IO-APIC" in kind) == (world.how(name) == "INTx") for kind in kinds), kinds
            checks.ran(world.guest, transport=f"pci {name}, {world.how(name)}", carrier="vfio-user", at=device)


def test_ticks_read_as_the_original_on_both_consoles(world: World) -> None:
    """The device has ticked since its server was started; the driver answers from its first change on."""
    guest, server = world.guest, world.servers["timer"]
    guest.command("rmmod virtio_test")
    guest.load("timer=1")
    with bound(guest, world.slots["timer"]) as device:
        answered = guest.console.lines.count(ACK)
        guest.console.wait_for(ACK, count=answered + 3)
        checks.ran(
            guest, device="test (timer)", transport=f"pci generic, {world.how('timer')}", carrier="vfio-user", at=device
        )
        server.console.wait_for("=========get virtio num:3")
    guest.command("rmmod virtio_test")
    guest.load()
    said = [line for line in guest.console.lines if line.startswith("virttest ")]
    assert said[:9] == driver_tick() * 3
    lines = server.lines
    first = lines.index("=========get virtio num:1")
    tick = sum("set config:" in line for line in lines[:first])
    assert lines[first - 1 : first + 5] == [line for k in range(3) for line in _tick(tick - 1 + k, 1 + k)]


def _tick(tick: int, number: int) -> list[str]:
    return [device_tick(tick)[0], device_tick(number - 1)[1]]


def test_the_driver_goes_and_comes_back(world: World) -> None:
    for _, slot, server in world.each():
        for number in (1, 2, 3):
            with bound(world.guest, slot):
                before = len(server.lines)
                checks.request(world.guest, number)
                assert server.said(before + 5)[before:] == device_request(number)


def test_a_function_is_reset_and_used_again(world: World) -> None:
    """Without its drivers a function is reset by FLR; then Linux finds it as at power on."""
    guest = world.guest
    for name, slot, _ in world.each():
        function = f"/sys/bus/pci/devices/{slot}"
        expected = "af_flr" if "reset" in world.declarations[name].capabilities else "flr"
        assert checks.shell(guest, f"cat {function}/reset_method")[0].split()[0] == expected
        guest.command(f"write /sys/bus/pci/drivers/virtio-pci/unbind {slot}")
        guest.command(f"write {function}/reset 1")
        guest.command(f"write /sys/bus/pci/drivers/virtio-pci/bind {slot}")
        with bound(guest, slot):
            checks.request(guest, 20)


def test_a_function_is_removed_and_found_again(world: World) -> None:
    guest = world.guest
    slot = world.slots["non-transitional"]
    with bound(guest, slot):
        checks.request(guest, 30)
        guest.command(f"write /sys/bus/pci/devices/{slot}/remove 1")
        guest.command("write /sys/bus/pci/rescan 1")
        name = virtio_name(guest, slot)
        guest.command(f"write /sys/bus/virtio/drivers/virtio_test/bind {name}")
        checks.request(guest, 31)
        guest.command(f"write /sys/bus/virtio/drivers/virtio_test/unbind {name}")
        # What `bound` takes back at its end.
        guest.command(f"write /sys/bus/virtio/drivers/virtio_test/bind {name}")
