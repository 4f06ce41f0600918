"""Configuration space: identity, BARs, masks, the list of capabilities, power and resets."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.test import TestDevice
from virtio_test.errors import InvalidArgument
from virtio_test.spec.pci import CapType
from virtio_test.transport.pci.capabilities import ExtendedCapability, VendorData
from virtio_test.transport.pci.configspace import ConfigBytes
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import PCI_CLASS_MEMORY_RAM, PCI_CLASS_OTHERS, Flavour, class_of, declare
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.pci.interface import Bar, PciEndpoint

from .pci_world import COMMAND, LIVE, Sink, World, upper


def walk(world: World) -> Iterator[tuple[int, int]]:
    """(offset, id) of each capability, as software finds them."""
    assert world.config(6, 2) & 0x10
    at = world.config(0x34, 1)
    while at:
        assert at >= 0x40
        assert not at & 3
        yield at, world.config(at, 1)
        at = world.config(at + 1, 1)


# --- identity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "behind_port", "device", "revision", "subsystem", "legacy", "size"),
    [
        ("generic", False, 0x1013, 0, 45, True, 256),
        ("generic", True, 0x106D, 1, 0x106D, False, 4096),
        ("transitional", False, 0x1013, 0, 45, True, 256),
        ("transitional", True, 0x1013, 0, 45, True, 256),
        ("non-transitional", False, 0x106D, 1, 0x106D, False, 256),
        ("non-transitional", True, 0x106D, 1, 0x106D, False, 4096),
    ],
)
def test_flavours(
    flavour: Flavour, behind_port: bool, device: int, revision: int, subsystem: int, legacy: bool, size: int
) -> None:
    function = VirtioPci(TestDevice(), flavour=flavour, behind_express_port=behind_port)
    assert isinstance(function, PciEndpoint)
    header = function.read_config(0, 64)
    assert struct.unpack_from("<HH", header) == (0x1AF4, device)
    assert header[8] == revision
    assert int.from_bytes(header[9:12], "little") == PCI_CLASS_OTHERS << 8
    assert struct.unpack_from("<HH", header, 0x2C) == (0x1AF4, subsystem)
    assert any(bar.index == 0 and bar.kind == "io" for bar in function.bars) is legacy
    assert function.config_size == size
    assert header[0x3D] == 1
    assert (function.has_line, function.vectors) == (True, 2)


@pytest.mark.parametrize(
    ("number", "transitional", "code"),
    [
        (1, 0x1000, 0x0200),
        (2, 0x1001, 0x0100),
        (3, 0x1003, 0x0780),
        (4, 0x1005, 0x00FF),
        (5, 0x1002, 0x00FF),
        (8, 0x1004, 0x0100),
        (9, 0x1009, 0x00FF),
    ],
)
def test_ids_of_the_classes(number: int, transitional: int, code: int) -> None:
    device = BaseDevice(number, handlers={0: bytes.upper})
    old, new = (declare(device, flavour=flavour).ids for flavour in ("transitional", "non-transitional"))
    assert (old.device, old.subsystem, new.device) == (transitional, number, 0x1040 + number)
    assert old.class_code == new.class_code == code << 8


def test_a_device_without_a_transitional_id_is_modern() -> None:
    device = BaseDevice(16, handlers={0: bytes.upper})
    assert declare(device).ids.device == 0x1050
    assert declare(device, pci_device=0x1020).ids == (0x1AF4, 0x1020, 0, 0xFF00, 0x1AF4, 16)
    with pytest.raises(InvalidArgument, match="no transitional PCI device id"):
        declare(device, flavour="transitional")
    modern = BaseDevice(2, handlers={0: bytes.upper}, transitional=False)
    assert declare(modern).ids.device == 0x1042
    with pytest.raises(InvalidArgument, match="legacy rules"):
        declare(modern, flavour="transitional")


def test_every_id_is_a_parameter() -> None:
    device = upper()
    ids = declare(
        device,
        pci_vendor=0x1234,
        pci_device=0x5678,
        revision=9,
        pci_class=class_of(PCI_CLASS_MEMORY_RAM),
        subsystem_vendor=0xABCD,
        subsystem=0xEF01,
    ).ids
    assert ids == (0x1234, 0x5678, 9, 0x050000, 0xABCD, 0xEF01)
    assert class_of(0x0200) == class_of(0x00FF) == PCI_CLASS_OTHERS
    with pytest.raises(InvalidArgument, match="PCI revision"):
        declare(device, revision=256)


# --- command, status, BARs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavour", "writable"), [("non-transitional", 0x546), ("transitional", 0x547)])
def test_the_command_register(flavour: Flavour, writable: int) -> None:
    world = World(on=False, flavour=flavour)
    assert world.config(COMMAND, 2) == 0
    world.set_config(COMMAND, 2, 0xFFFF)
    assert world.config(COMMAND, 2) == writable
    world.set_config(COMMAND + 2, 2, 0xFFFF)
    assert world.config(COMMAND + 2, 2) == 0x10
    world.set_config(COMMAND, 4, 0xFFFF_0000)
    assert world.config(COMMAND, 4) == 0x0010_0000


@pytest.mark.parametrize("flavour", ["transitional", "non-transitional"])
@pytest.mark.parametrize("wide", [False, True])
def test_bars_are_sized_and_placed(flavour: Flavour, wide: bool) -> None:
    world = World(on=False, flavour=flavour, wide=wide, shared_memory={7: 5000})
    bars = {bar.index: bar for bar in world.function.bars}
    upper_halves = {bar.index + 1 for bar in bars.values() if bar.kind == "memory64"}
    assert set(bars) == ({0} if flavour == "transitional" else set[int]()) | {1, 2, 4}
    for index in range(6):
        at = 0x10 + 4 * index
        before = world.config(at, 4)
        world.set_config(at, 4, 0xFFFF_FFFF)
        mask = world.config(at, 4)
        bar = bars.get(index)
        if index in upper_halves:
            assert mask == 0xFFFF_FFFF
        elif bar is None:
            assert mask == before == 0
        else:
            kind = {"io": 1, "memory32": 0, "memory64": 4}[bar.kind] | (8 if bar.prefetchable else 0)
            assert before == kind
            assert mask == (-bar.size & 0xFFFF_FFFF) | kind
            address = 0xC000 if bar.kind == "io" else 0x8_F000_0000
            world.set_config(at, 4, address & 0xFFFF_FFFF)
            if bar.kind == "memory64":
                world.set_config(at + 4, 4, address >> 32)
                world.function.bar_base(index)
            assert world.function.bar_base(index) == address & (-1 if bar.kind == "memory64" else 0xFFFF_FFFF)


def test_the_rest_of_the_header() -> None:
    world = World(on=False)
    before = world.function.read_config(0, 64)
    for at in range(64):
        if not (4 <= at < 6 or 0x10 <= at < 0x28):
            world.set_config(at, 1, 0xFF)
    after = world.function.read_config(0, 64)
    assert {at: after[at] for at in range(64) if after[at] != before[at]} == {0x0C: 0xFF, 0x0D: 0xFF, 0x3C: 0xFF}
    # There is no ROM, and one header of type 0.
    assert (world.config(0x30, 4), world.config(0x0E, 1)) == (0, 0)


def test_expresss_latency_timer_is_hardwired() -> None:
    world = World(express=True)
    world.set_config(0x0D, 1, 0xFF)
    assert world.config(0x0D, 1) == 0


def test_accesses_of_any_width_and_place() -> None:
    world = World(express=True)
    whole = world.function.read_config(0, 4096)
    for offset in (0, 1, 0x3F, 0xFFE):
        for length in (1, 2, 3, 4, 7):
            expected = whole[offset : offset + length]
            assert world.function.read_config(offset, length) == expected + b"\xff" * (length - len(expected))
    world.function.write_config(0xFFE, bytes(16))
    world.function.write_config(5000, b"x")
    assert world.function.read_config(5000, 2) == b"\xff\xff"
    assert world.function.read_config(0, 4096) == whole


def test_misuse_by_a_carrier_is_told() -> None:
    world = World()
    for call in (
        lambda: world.function.read_config(-1, 1),
        lambda: world.function.read_config(0, 0),
        lambda: world.function.write_config(0, b""),
        lambda: world.function.read_bar(0, 0, 4),
        lambda: world.function.write_bar(6, 0, b"x"),
        lambda: world.function.read_bar(4, -4, 4),
    ):
        with pytest.raises(InvalidArgument, match="not there"):
            call()


# --- capabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("express", [False, True])
def test_the_list_of_capabilities(express: bool) -> None:
    world = World(
        express=express,
        shared_memory={1: 4096} if express else {1: 4096, 9: 100},
        vendor_data=() if express else (VendorData(0x1234, b"hello"),),
        multiplier=8,
        vectors=5,
    )
    found = list(walk(world))
    assert [kind for _, kind in found] == [0x11, *[9] * (6 if express else 8), 0x01, 0x10 if express else 0x13]
    offsets = [at for at, _ in found]
    assert offsets == sorted(set(offsets))
    assert [world.capability(name) for name in world.plan.capabilities] == offsets
    shown: dict[int, tuple[int, ...]] = {}
    for at, kind in found:
        if kind == 9 and world.config(at + 3, 1) != CapType.SHARED_MEMORY_CFG:
            size, cfg_type, bar, number, place, length = struct.unpack(
                "<BBBBxxII", world.function.read_config(at + 2, 14)
            )
            shown[cfg_type] = (size, bar, number, place, length)
    lay = world.layout
    assert lay.config is not None
    assert shown[CapType.COMMON_CFG] == (16, 4, 0, lay.common.offset, 64)
    assert shown[CapType.ISR_CFG] == (16, 4, 0, lay.isr.offset, lay.isr.length)
    assert shown[CapType.DEVICE_CFG] == (16, 4, 0, lay.config.offset, 10)
    assert shown[CapType.NOTIFY_CFG] == (20, 4, 0, lay.notify.offset, 12)
    assert world.config(world.capability("notify") + 16, 4) == 8
    assert shown[CapType.PCI_CFG] == (20, 0, 0, 0, 0)
    if not express:
        assert shown[CapType.VENDOR_CFG][0] == 12
        assert world.function.read_config(world.capability("vendor0") + 4, 8) == b"\x34\x12hello\0"
    at = world.capability("msix")
    assert struct.unpack("<HII", world.function.read_config(at + 2, 10)) == (4, 1, 0x800 | 1)


@pytest.mark.parametrize("multiplier", [0, 2, 4, 64, 4096])
@pytest.mark.parametrize("config", [0, 1, 4096, 5000])
def test_structures_lie_apart_and_notifications_on_pages_of_their_own(multiplier: int, config: int) -> None:
    space = ConfigSpace(ConfigLayout(("all", f"bytes({config})"))) if config else None
    device = upper(config=space, handlers=dict.fromkeys(range(9), bytes.upper), queue_sizes=(4,) * 9)
    world = World(device, multiplier=multiplier)
    lay = world.layout
    places = [each for each in (lay.common, lay.isr, lay.config, lay.notify) if each is not None]
    assert (lay.config is None) == (config == 0) == ("device" not in world.plan.capabilities)
    bar = next(each for each in world.function.bars if each.index == 4)
    pages = [range(each.offset // 4096, -(-(each.offset + each.length) // 4096)) for each in places]
    assert len({page for each in pages for page in each}) == sum(map(len, pages))
    assert max(each.stop for each in pages) * 4096 <= bar.size
    assert all(each.bar == 4 and not each.offset & 3 for each in places)
    world.negotiate()
    for index in range(9):
        world.set("queue_select", index)
        assert lay.notify.length >= world.get("queue_notify_off") * multiplier + 4
    queue = world.queue(8, size=4)
    world.status(LIVE)
    world.post(queue)
    assert world.answer(queue) == b"HELLO"


def test_a_legacy_driver_sees_the_start_of_a_long_configuration_space() -> None:
    space = ConfigSpace(ConfigLayout(("all", "bytes(5000)")), all=bytes(range(250)) * 20)
    world = World(upper(config=space), flavour="transitional")
    assert world.layout.legacy == (0, 0, 256)
    assert world.read(world.layout.legacy, 255, 1) == 235
    assert world.read(world.layout.config, 4999, 1) == 249


@pytest.mark.parametrize("vectors", [1, 2, 64, 65, 128, 129, 2048])
def test_table_and_pending_bits_do_not_meet(vectors: int) -> None:
    world = World(vectors=vectors)
    table, pba = world.layout.table, world.layout.pba
    assert table is not None
    assert pba is not None
    bar = next(each for each in world.function.bars if each.index == 1)
    assert table.length == 16 * vectors
    assert table.offset + table.length <= pba.offset
    assert pba.offset + pba.length <= bar.size
    last = vectors - 1
    world.control(enabled=True)
    world.negotiate()
    world.set("config_msix_vector", last)
    world.status(LIVE)
    world.device.config["count"] = 1
    world.run()
    assert world.read(pba, last // 64 * 8, 8) == 1 << last % 64


def test_shared_memory_regions_are_memory() -> None:
    world = World(shared_memory={3: 100, 4: 8192})
    for key, ram in world.function.shared.items():
        place = world.layout.shared[key]
        world.write(place, 8, 8, 0x1122_3344_5566_7788)
        assert ram.data[8:16] == bytes.fromhex("8877665544332211")
        at = world.capability(f"shared{key}")
        assert world.config(at + 5, 1) == key
        assert [world.config(at + field, 4) for field in (8, 12, 16, 20)] == [place.offset, place.length, 0, 0]


def test_extended_capabilities() -> None:
    def more(good: Declaration) -> Declaration:
        return good.replace(extended=(ExtendedCapability(3, 1, bytes(range(8))), ExtendedCapability(0xB, 2, b"abcd")))

    world = World(express=True, change=more)
    assert world.config(0x100, 4) == 0x10C1_0003
    assert world.function.read_config(0x104, 8) == bytes(range(8))
    assert world.config(0x10C, 4) == 0x0002_000B
    assert world.function.read_config(0x110, 4) == b"abcd"
    assert World(express=True).config(0x100, 4) == 0


# --- power, resets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [True, False])
def test_d3hot_answers_nothing_and_wakes_as_declared(keeps: bool) -> None:
    world = World(change=lambda good: good.change("power", no_soft_reset=keeps))
    queue = world.live()
    at = world.capability("power") + 4
    assert world.config(at, 2) == 8 * keeps
    world.set_config(at, 2, 1)
    assert world.config(at, 2) == 8 * keeps
    world.set_config(at, 2, 3)
    assert world.config(at, 2) == 8 * keeps | 3
    assert world.get("num_queues") == 0xFFFF
    world.post(queue)
    before = world.memory.read(0, 0x40000)
    world.device.config["count"] = 1
    world.run()
    assert world.memory.read(0, 0x40000) == before
    assert world.sink.levels == []
    world.set_config(at, 2, 0)
    if keeps:
        assert world.sink.levels == [True]
        world.notify(0)
        assert world.answer(queue) == b"HELLO"
    else:
        assert world.config(COMMAND, 2) == 0
        world.set_config(COMMAND, 2, 7)
        assert world.get("device_status") == 0


def test_a_reset_of_the_function_is_power_on() -> None:
    world = World()
    fresh = World(on=False).function.read_config(0, 256)
    world.msix(0, 1)
    world.set_config(0x20, 4, 0xFE00_0000)
    world.set_config(0x3C, 1, 11)
    world.works(world.live())
    world.function.reset()
    assert world.function.read_config(0, 256) == fresh
    assert not world.function.interrupts.msix_enabled
    world.set_config(COMMAND, 2, 7)
    assert world.works(world.live())


def test_express_registers() -> None:
    world = World(express=True, behind_express_port=True)
    at = world.capability("express")
    assert world.config(at + 2, 2) == 0x0002
    assert world.config(at + 4, 4) & 1 << 28
    world.set_config(at + 8, 2, 0x7FFF)
    assert world.config(at + 8, 2) == 0x781F
    world.set_config(at + 0x10, 2, 0xFFFF)
    assert world.config(at + 0x10, 2) == 0x00CB
    integrated = World(express=True)
    at = integrated.capability("express")
    assert integrated.config(at + 2, 2) == 0x0092
    assert integrated.config(at + 0xC, 4) == integrated.config(at + 0x10, 4) == 0


def test_a_carrier_holds_and_releases() -> None:
    world = World()
    queue = world.live()
    world.function.hold()
    world.post(queue)
    assert world.answer(queue) is None
    world.set_config(COMMAND, 2, 3)
    world.function.release()
    assert world.answer(queue) is None
    world.set_config(COMMAND, 2, 7)
    assert world.answer(queue) == b"HELLO"


def test_a_sink_that_comes_late_is_told_the_level() -> None:
    world = World()
    world.function.connect(None)
    world.works(world.live())
    late = Sink()
    world.function.connect(late)
    assert late.levels == [True]


def test_an_external_table_masks_nothing_here() -> None:
    world = World()
    world.function.external_table = True
    assert world.function.external_table
    world.control(enabled=True, masked=True)
    world.negotiate()
    world.set("queue_msix_vector", 1)
    queue = world.queue()
    world.status(LIVE)
    assert world.works(queue)
    assert (world.sink.vectors, world.pending) == ([1], 0)
    without = World(vectors=0).function
    without.external_table = True
    assert not without.external_table


# --- declarations that cannot be served ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "bars",
    [
        (Bar(4, 3000),),
        (Bar(4, 8),),
        (Bar(0, 512, "io"),),
        (Bar(5, 4096, "memory64"),),
        (Bar(6, 4096),),
        (Bar(-1, 4096),),
        (Bar(2, 4096), Bar(2, 4096)),
        (Bar(2, 4096, "memory64"), Bar(3, 4096)),
        (Bar(4, 1 << 32),),
    ],
)
def test_bars_that_cannot_be(bars: tuple[Bar, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"^BAR"):
        ConfigBytes(declare(upper()).replace(bars=bars))


def test_what_does_not_fit() -> None:
    good = declare(upper())
    for wrong in (
        good.replace(patches={256: b"x"}),
        good.replace(patches={-1: b"x"}),
        good.change("notify", at=250),
        good.change("notify", extra=bytes(200)),
        good.replace(extended=(ExtendedCapability(1),)),
    ):
        with pytest.raises(InvalidArgument, match="does not fit"):
            ConfigBytes(wrong)
    for call, what in (
        (lambda: declare(upper(), vectors=2049), "2049 vectors"),
        (lambda: declare(upper(), vectors=-1), "-1 vectors"),
        (lambda: declare(upper(), admin_queues=3), "3 administration virtqueues"),
    ):
        with pytest.raises(InvalidArgument, match=what):
            call()
    with pytest.raises(InvalidArgument, match="say generic"):
        declare(upper(), flavour="modern")  # type: ignore[arg-type]
    for call in (lambda: good.change("nothing"), lambda: good.without("nothing")):
        with pytest.raises(InvalidArgument, match="no capability 'nothing'"):
            call()
