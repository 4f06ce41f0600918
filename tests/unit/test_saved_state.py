"""Saved states of the register transports: there and back in mid-stream, and every state that is none refused whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from virtio_test.carrier.pci import PciLoopback
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import open_pci
from virtio_test.errors import DeviceNeedsReset, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.status import Status
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci

from tests.unit.pci_world import Sink
from tests.unit.ways import RINGS, WAYS, Way, features, reach

LAYOUT = ConfigLayout(("level", "le32"), ("mode", "le32", "rw"))
MORE = FeatureSet("SUSPEND")

BANK = {"in process": (), "mmio": ("bank",), "pci": ("bank",)}
"""Where the state of the bank is in that of a transport."""


def keeper() -> BaseDevice:
    """Two queues; keeps what comes to the first, answers on the second."""
    return BaseDevice(
        7,
        handlers={0: kept(lambda _: None), 1: bytes.upper},
        queue_sizes=(16, 16),
        config=ConfigSpace(LAYOUT, level=1),
    )


def echo() -> BaseDevice:
    """The same with a class that has a transitional PCI device id."""
    return BaseDevice(
        4,
        handlers={0: kept(lambda _: None), 1: bytes.upper},
        queue_sizes=(16, 16),
        config=ConfigSpace(LAYOUT, level=1),
    )


def world(way: str, ring: str = "split") -> tuple[BaseDevice, Way, Driver]:
    device = keeper()
    over = reach(device, way, more=MORE)
    driver = Driver(over.registers, wanted=features(ring) | MORE, layout=LAYOUT)
    driver.initialize()
    over.run()
    return device, over, driver


def through_json(state: object) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def wipe(over: Way) -> None:
    """As if it were another one: nothing is left of what was set up."""
    if isinstance(over.side, VirtioPci):
        over.side.reset()
    else:
        over.bank.reset()


@pytest.mark.row("R10", "R12")
@WAYS
@RINGS
def test_a_driver_notices_nothing(way: str, ring: str) -> None:
    device, over, driver = world(way, ring)
    for number in range(40):  # so that indices and wrap counters are no longer fresh
        assert driver.submit(1, [b"a"], [1]).wait() == b"A"
        request = driver.submit(0, [bytes([number])], [1])
        over.run()
        device.complete(device.kept[0], b"a")
        assert request.wait() == b"a"
    waiting = [driver.submit(0, [bytes([number])], [1]) for number in range(5)]
    over.run()
    late = driver.submit(1, [b"late"], [4])
    state = through_json(over.side.save())
    for _ in range(2):
        wipe(over)
        assert over.registers.read_status() != driver_status(driver)
        device = keeper()
        over.side.restore(copy.deepcopy(state), device=device)
        assert through_json(over.side.save()) == {**state, **again(way, state, over)}
    assert late.wait() == b"LATE"
    assert [chain.read() for chain in device.kept] == [b"\0", b"\1", b"\2", b"\3", b"\4"]
    for chain in device.kept:
        device.complete(chain, b"b")
    assert [each.wait() for each in waiting] == [b"b"] * 5
    device.config.update(level=77)
    assert driver.read_field("level") == 77
    driver.write_field("mode", 3)
    assert device.config.mode == 3
    assert over.bank.errors == []


def driver_status(driver: Driver) -> int:
    return int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK) if driver.live else -1


def again(way: str, state: dict[str, Any], over: Way) -> dict[str, Any]:
    """What a state saved after the restore may have otherwise: the generation of the configuration, which moves on."""
    part = copy.deepcopy(state)
    at: Any = part
    for step in BANK[way]:
        at = at[step]
    at["device"]["config"]["generation"] = over.bank.config_generation()
    return part


@pytest.mark.row("R10")
@WAYS
def test_what_was_used_and_not_told_is_told_after_the_restore(way: str) -> None:
    device, over, driver = world(way)
    request = driver.submit(1, [b"x"], [1])
    device.kicked(1)
    state = through_json(over.side.save())
    wipe(over)
    over.side.restore(state)
    assert request.wait() == b"X"


@WAYS
def test_a_change_that_was_not_told_is_told_after_the_restore(way: str) -> None:
    device, over, driver = world(way)
    heard: list[object] = []
    driver.config_changed = lambda: heard.append(driver.read_field("level"))
    device.config.update(level=5)
    state = through_json(over.side.save())
    wipe(over)
    over.side.restore(state)
    over.run()
    assert heard == [5]
    over.side.restore(through_json(over.side.save()))
    over.run()
    assert heard == [5], "told once"


@pytest.mark.row("R12")
@WAYS
@RINGS
def test_a_broken_device_is_restored_broken(way: str, ring: str) -> None:
    device, over, driver = world(way, ring)
    request = driver.submit(0, [b"x"], [1])
    queue = driver.queues[0]
    queue.add([(0xFFFF_0000_0000, 8)])
    queue.signal()
    over.run()
    assert over.registers.read_status() & Status.DEVICE_NEEDS_RESET
    state = through_json(over.side.save())
    wipe(over)
    other = keeper()
    over.side.restore(state, device=other)
    over.run()
    assert over.registers.read_status() & Status.DEVICE_NEEDS_RESET
    assert all(slot.queue is not None and slot.queue.latched is not None for slot in over.bank.slots)
    over.bank.kick(0)
    over.run()
    assert (device.kept, other.kept) == ([], [])
    assert isinstance(request.error, DeviceNeedsReset)
    driver.initialize()
    assert driver.submit(1, [b"x"], [1]).wait() == b"X"


@WAYS
def test_half_set_up(way: str) -> None:
    """At every step of the initialization: what is restored goes on from there, in a device that knew nothing."""
    device = keeper()
    over = reach(device, way, more=MORE)
    registers = over.registers

    def moved() -> None:
        state = through_json(over.side.save())
        wipe(over)
        over.side.restore(state)

    for status in (1, 3):
        registers.write_status(status)
        moved()
        assert registers.read_status() == status
    agreed = over.bank.offered - FeatureSet("RING_PACKED")
    registers.write_driver_features(agreed.bits)
    moved()
    registers.write_status(11)
    moved()
    assert registers.read_status() == 11
    driver = Driver(registers)
    driver.initialize()
    assert driver.submit(1, [b"x"], [1]).wait() == b"X"


def test_the_registers_of_a_page() -> None:
    page = VirtioMmio(keeper())

    def write(offset: int, value: int) -> None:
        page.write(offset, value.to_bytes(4, "little"))

    levels: list[bool] = []
    page.interrupt = levels.append
    write(0x070, 1)
    write(0x014, 1)
    write(0x024, 3)
    write(0x030, 1)
    write(0x038, 4)
    write(0x080, 0x1234_0000)
    write(0x0AC, 2)
    page.bank.on_config()
    state = through_json(page.save())
    other = VirtioMmio(keeper())
    seen: list[bool] = []
    other.interrupt = seen.append
    other.restore(state)
    assert other.save() == {**state, "bank": other.save()["bank"]}
    assert (other.queue_sel, other.shm_sel, other.device_features_sel, other.driver_features_sel) == (1, 2, 1, 3)
    assert (other.bank.slots[1].size, other.bank.slots[1].desc) == (4, 0x1234_0000)
    assert seen == [True]
    assert other.interrupt_status == 2


def test_the_legacy_page() -> None:
    page = VirtioMmio(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(16,)), version=1)
    for offset, value in ((0x028, 4096), (0x070, 3), (0x020, 0), (0x030, 0), (0x03C, 256), (0x040, 5), (0x070, 7)):
        page.write(offset, value.to_bytes(4, "little"))
    assert page.bank.legacy
    assert page.bank.queue(0).layout().desc == 5 * 4096
    other = VirtioMmio(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(16,)), version=1)
    other.restore(through_json(page.save()))
    assert other.bank.legacy
    assert other.read(0x040, 4) == (5).to_bytes(4, "little")
    assert (other.aligns, other.guest_page_size) == ({0: 256}, 4096)
    assert other.bank.slots[0].started
    with pytest.raises(SavedStateError, match="version"):
        VirtioMmio(BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(16,))).restore(page.save())


@pytest.mark.parametrize("lines", ["msix", "intx"])
def test_the_legacy_interface_of_a_function(lines: Literal["msix", "intx"]) -> None:
    side = VirtioPci(echo(), flavour="transitional")
    driver = Driver(open_pci(PciLoopback(side), interface="legacy", interrupts=lines), layout=LAYOUT)
    driver.initialize()
    for _ in range(20):
        assert driver.submit(1, [b"a"], [1]).wait() == b"A"
    waiting = driver.submit(0, [b"x"], [1])
    late = driver.submit(1, [b"late"], [4])
    state = through_json(side.save())
    side.reset()
    assert not side.bank.legacy
    device = echo()
    side.restore(state, device=device)
    assert side.bank.legacy
    assert late.wait() == b"LATE"
    device.complete(device.kept[0], b"y")
    assert waiting.wait() == b"y"
    assert side.violations == []


def test_what_a_function_has_on_its_bus() -> None:
    _, over, _ = world("pci")
    side = over.side
    assert isinstance(side, VirtioPci)
    bars = {bar.index: side.bar_base(bar.index) for bar in side.bars}
    assert any(bars.values())
    command = side.read_config(4, 2)
    vectors = (side.interrupts.config_vector, list(side.interrupts.queue_vectors))
    table = side.interrupts.table
    assert table is not None
    entries = table.entries
    state = through_json(side.save())
    side.reset()
    assert {bar.index: side.bar_base(bar.index) for bar in side.bars} != bars
    assert table.entries != entries
    side.restore(state)
    assert {bar.index: side.bar_base(bar.index) for bar in side.bars} == bars
    assert side.read_config(4, 2) == command
    assert (side.interrupts.config_vector, list(side.interrupts.queue_vectors)) == vectors
    assert table.entries == entries
    assert table.enabled


def test_a_message_that_could_not_be_sent_is_sent_by_whoever_is_restored() -> None:
    device, over, _ = world("pci")
    side = over.side
    assert isinstance(side, VirtioPci)
    table = side.interrupts.table
    assert table is not None
    at = side.declaration.layout.table
    assert at is not None
    vector = side.interrupts.config_vector
    mask = at.offset + 16 * vector + 12
    side.write_bar(at.bar, mask, b"\1\0\0\0")
    device.config.update(level=3)
    over.run()
    assert table.pending == [vector]
    state = through_json(side.save())
    side.reset()
    sink = Sink()
    side.connect(sink)
    side.restore(state)
    over.run()
    assert table.pending == [vector]
    sink.messages.clear()
    side.write_bar(at.bar, mask, bytes(4))
    assert sink.vectors == [vector]


def test_a_function_that_is_no_bus_master_is_restored_as_none() -> None:
    _, over, driver = world("pci")
    side = over.side
    assert isinstance(side, VirtioPci)
    command = int.from_bytes(side.read_config(4, 2), "little")
    side.write_config(4, (command & ~4).to_bytes(2, "little"))
    request = driver.submit(1, [b"x"], [1])
    over.run()
    state = through_json(side.save())
    side.reset()
    side.restore(state)
    over.run()
    assert not request.done
    side.write_config(4, command.to_bytes(2, "little"))
    over.run()
    assert request.response == b"X"


# --- what is no state ----------------------------------------------------------------------------------------------

Spoil = Callable[[Any], object]


def put(*path: str | int, to: object) -> Spoil:
    def apply(state: Any) -> None:
        for step in path[:-1]:
            state = state[step]
        state[path[-1]] = to

    return apply


def repeat(*path: str | int, times: int) -> Spoil:
    def apply(state: Any) -> None:
        for step in path:
            state = state[step]
        state += state[:1] * times

    return apply


def suspended_without_feature(state: Any) -> None:
    state["status"] = 0x1B
    state["features"] &= ~FeatureSet("SUSPEND").bits


def not_enabled(size: int) -> Spoil:
    return lambda state: state["queues"][0].update(size=size, enabled=False, avail=None, used=None)


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


IN_BANK: list[tuple[str, tuple[str, ...], Spoil]] = [
    ("queue size 0", ("R01", "CVE-2013-4148", "qemu@d6384ad1"), put("queues", 0, "size", to=0)),
    ("queue size 3", ("R01",), put("queues", 0, "size", to=3)),
    ("queue size beyond the device's", ("R01", "CVE-2013-4148"), put("queues", 0, "size", to=32)),
    ("queue size 65536", ("R01",), put("queues", 0, "size", to=65536)),
    ("more in flight than entries", ("R02", "CVE-2014-0182"), put("queues", 0, "avail", to=0x4000)),
    ("used beyond avail", ("R02",), put("queues", 0, "used", to=1)),
    ("a position of 17 bits", ("R02", "R09"), put("queues", 0, "used", to=1 << 16)),
    ("a negative position", ("R02",), put("queues", 0, "avail", to=-1)),
    ("1025 queues", ("R04", "CVE-2013-4151", "CVE-2013-6399"), repeat("queues", times=1024)),
    ("a queue that is not there", ("R04", "CVE-2013-4151"), put("queues", 0, "index", to=2)),
    ("a queue index of 64 bits", ("R04", "CVE-2013-6399"), put("queues", 0, "index", to=1 << 63)),
    ("elements in flight", ("R06", "CVE-2013-4535", "CVE-2013-4536"), put("queues", 0, "elements", to=[{"in": 4096}])),
    ("requests in flight", ("R06", "CVE-2013-4542"), put("device", "requests", to=[{"out_num": 4096}])),
    (
        "a long configuration",
        ("R07", "CVE-2013-4149", "qemu@665c8543"),
        put("device", "config", "values", "more", to=1),
    ),
    ("no configuration", ("R07",), put("device", "config", to=None)),
    ("a device that is none", ("R07", "CVE-2013-4150"), put("device", to=[])),
    ("a field of 33 bits", ("R07", "CVE-2013-4150"), put("device", "config", "values", "level", to=1 << 32)),
    ("features that are not offered", ("R08",), put("features", to=1 << 40 | 1 << 50)),
    ("features of 129 bits", ("R08",), put("features", to=1 << 128)),
    ("no features", ("R08",), put("features", to=None)),
    ("a running queue without a position", (), lambda state: state["queues"][0].update(avail=None, used=None)),
    ("a position of a queue that is not enabled", (), put("queues", 0, "enabled", to=False)),
    ("a ring outside of memory", (), put("queues", 0, "desc", to=1 << 62)),
    ("a ring that is not aligned", (), put("queues", 0, "driver", to=0x1001)),
    ("enabled by 1", (), put("queues", 0, "enabled", to=1)),
    ("half a position", (), put("queues", 0, "avail", to=None)),
    ("another version", (), put("version", to=1)),
    ("a status that cannot be", (), put("status", to=0x20)),
    ("suspended and running", (), put("status", to=0x1F)),
    ("suspended without the feature", ("D17",), suspended_without_feature),
    ("a size 3 of a queue that is not enabled", ("R01",), not_enabled(3)),
    ("a size 0 of a queue that is not enabled", ("R01",), not_enabled(0)),
    ("a device that is too deep", ("R07",), lambda state: state["device"].update(config=deep(40))),
    ("a field that has no name", ("R07",), put("device", "config", to={1: 2})),
    ("a field that is no JSON value", ("R07",), put("device", "config", to=b"")),
    ("an interface that is none", (), put("interface", to="old")),
    ("an interface with other features", (), put("interface", to="legacy")),
    ("a change that may be due", (), put("config_due", to=None)),
    ("queues that are none", (), put("queues", to={})),
    ("a queue that is none", (), put("queues", 0, to=None)),
    ("nothing", (), lambda state: state.clear()),
]

IN_PCI: list[tuple[str, tuple[str, ...], Spoil]] = [
    ("a configuration space that is shorter than it says", ("CVE-2023-50711",), put("config", to="00")),
    ("one of another function", ("R07",), lambda s: s.update(config="ff" + s["config"][2:])),
    ("one that is no text", (), put("config", to=4096)),
    ("one that is no hexadecimal text", (), lambda s: s.update(config="xy" + s["config"][2:])),
    ("one with spaces", (), lambda s: s.update(config="  " + s["config"][2:])),
    ("an MSI-X table that is shorter than it says", ("CVE-2023-50711",), lambda s: s.update(msix_table="00" * 16)),
    ("an MSI-X table that is longer", ("CVE-2023-50711",), lambda s: s.update(msix_table=s["msix_table"] * 2)),
    ("a vector control that is none", (), lambda s: s.update(msix_table=s["msix_table"][:-2] + "80")),
    ("a vector that is not there", ("X02",), put("config_vector", to=200)),
    ("a queue's vector that is not there", ("X02",), put("queue_vectors", 0, to=0xFFFE)),
    ("more vectors than queues", ("CVE-2023-50711",), put("queue_vectors", to=[0xFFFF] * 3)),
    ("a pending vector that is not there", ("X02",), put("msix_pending", to=[2048])),
    ("a pending vector below 0", (), put("msix_pending", to=[-1])),
    ("a selector of 33 bits", (), put("device_feature_select", to=1 << 32)),
    ("a queue selector of 17 bits", (), put("queue_select", to=1 << 16)),
    ("an ISR status that is none", (), put("isr", to=4)),
    ("shared memory that is not there", (), put("shared", to={"0": "00"})),
    ("an unknown register", (), put("more", to=1)),
]

IN_PAGE: list[tuple[str, tuple[str, ...], Spoil]] = [
    ("a selector of 33 bits", (), put("queue_sel", to=1 << 32)),
    ("an event that is none", (), put("interrupt_status", to=4)),
    ("an alignment that is none", ("Q17",), put("aligns", 0, to=3)),
    ("a page size that is none", ("Q17",), put("guest_page_size", to=5000)),
    ("more pages than queues", ("CVE-2023-50711",), put("pages", to=[0, 0, 0])),
    ("another version of the page", (), put("page_version", to=1)),
    ("an unknown register", (), put("more", to=1)),
]

CASES = [
    *((way, BANK[way], *each) for way in BANK for each in IN_BANK),
    *(("pci", ("function",), *each) for each in IN_PCI),
    *(("mmio", ("page",), *each) for each in IN_PAGE),
]


@pytest.mark.parametrize(
    ("way", "path", "spoil"),
    [
        pytest.param(way, path, spoil, id=f"{way}: {name}", marks=[pytest.mark.row(*rows)] if rows else [])
        for way, path, name, rows, spoil in CASES
    ],
)
def test_a_bad_state_changes_nothing(way: str, path: tuple[str, ...], spoil: Spoil) -> None:
    device, over, driver = world(way)
    request = driver.submit(0, [b"x"], [1])
    over.run()
    before = through_json(over.side.save())
    state = copy.deepcopy(before)
    at: Any = state
    for step in path:
        at = at[step]
    spoil(at)
    with pytest.raises(SavedStateError) as caught:
        over.side.restore(state)
    assert len(str(caught.value).splitlines()) == 1
    assert through_json(over.side.save()) == before
    over.run()
    device.complete(device.kept[0], b"y")
    assert request.wait() == b"y"
    assert over.bank.errors == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("device", "config", to=deep(40)), "deeper than"),
        (put("device", "config", to={1: 2}), "no text"),
        (put("device", "config", to=b""), "no JSON value"),
    ],
)
def test_a_device_is_given_json_values_only(change: Spoil, message: str) -> None:
    """Whatever a device of one's own would make of them."""

    class Careless(BaseDevice):
        def check_state(self, state: object) -> None:
            """Takes anything."""

        def apply_state(self, state: object) -> None:
            """Takes anything."""

    over = reach(Careless(7, handlers={0: bytes.upper}), "in process")
    state: Any = over.side.save()
    change(state)
    with pytest.raises(SavedStateError, match=message):
        over.side.restore(state)


@pytest.mark.row("X11")
@pytest.mark.parametrize(
    ("offset", "bits", "message"),
    [("power", 1, "power state is D1"), ("power", 2, "power state is D2"), ("express", 0x80, "middle of a reset")],
)
def test_a_function_that_cannot_be(offset: str, bits: int, message: str) -> None:
    side = VirtioPci(keeper(), behind_express_port=True)
    at = side._config.capabilities[offset] + {"power": 4, "express": 9}[offset]  # type: ignore[reportPrivateUsage]
    state: Any = through_json(side.save())
    config = bytearray.fromhex(state["function"]["config"])
    config[at] |= bits
    state["function"]["config"] = config.hex()
    with pytest.raises(SavedStateError, match=message):
        side.restore(state)


@pytest.mark.row("R09")
@pytest.mark.parametrize("bits", [16, 0x7FFF, 0x8010, 0xFFFF])
@pytest.mark.parametrize("name", ["avail", "used"])
def test_a_place_beyond_a_packed_ring(name: str, bits: int) -> None:
    _, over, _ = world("in process", "packed")
    before = through_json(over.side.save())
    state = copy.deepcopy(before)
    state["queues"][0][name] = bits
    with pytest.raises(SavedStateError, match="offset"):
        over.side.restore(state)
    assert through_json(over.side.save()) == before


@pytest.mark.row("R03")
@WAYS
def test_a_position_that_the_ring_contradicts_breaks_the_device(way: str) -> None:
    """A legal state of another ring: nobody but the ring can tell, when it is looked at."""
    _, over, driver = world(way)
    state = through_json(over.side.save())
    at: Any = state
    for step in BANK[way]:
        at = at[step]
    at["queues"][1].update(avail=0x100, used=0x100)
    over.side.restore(state)
    over.run()
    assert over.registers.read_status() & Status.DEVICE_NEEDS_RESET
    assert over.bank.ignored == {"AvailIdxTooFar": 1}
    driver.initialize()
    assert driver.submit(1, [b"x"], [1]).wait() == b"X"


@pytest.mark.row("R04")
def test_a_function_has_vectors_for_its_own_queues() -> None:
    over = reach(keeper(), "pci")
    more = BaseDevice(7, handlers={2: bytes.upper}, queue_sizes=(16, 16, 16), config=ConfigSpace(LAYOUT))
    with pytest.raises(SavedStateError, match="3 queues, this function 2"):
        over.side.restore(over.side.save(), device=more)


@pytest.mark.row("R04")
@WAYS
def test_a_device_with_other_queues(way: str) -> None:
    _, over, _ = world(way)
    before = through_json(over.side.save())
    with pytest.raises(SavedStateError):
        over.side.restore(copy.deepcopy(before), device=BaseDevice(7, handlers={0: bytes.upper}, queue_sizes=(16,)))
    assert through_json(over.side.save()) == before
