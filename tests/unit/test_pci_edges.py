"""Where what a PCI function is made of, and what it takes, begins and ends: each number, and the next one."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.transport.pci.capabilities import Capability
from virtio_test.transport.pci.configspace import ConfigBytes
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.pci.interface import Bar
from virtio_test.transport.pci.msix import MsixTable, PendingBits

from .pci_world import DEVICE_ID, LIVE, SIZE, UP, World, upper

Kind = Literal["io", "memory32", "memory64"]
QUEUES = 2


def with_bars(*bars: Bar) -> Declaration:
    """A declaration with nothing but these BARs."""
    plain = declare(upper(), flavour="non-transitional", vectors=0)
    return plain.replace(bars=bars, capabilities={})


# --- base address registers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [("io", 4), ("io", 256), ("memory32", 16), ("memory32", 1 << 31), ("memory64", 16), ("memory64", 1 << 63)],
)
def test_the_least_and_the_largest_bar(kind: Kind, size: int) -> None:
    made = ConfigBytes(with_bars(Bar(2, size, kind)))
    made.write(0x18, b"\xff" * 8)
    width = 8 if kind == "memory64" else 4
    flags = {"io": 1, "memory32": 0, "memory64": 4}[kind]
    assert int.from_bytes(made.read(0x18, width), "little") == -size & ((1 << 8 * width) - 1) | flags


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("io", 2),
        ("io", 512),
        ("io", 12),
        ("io", 0),
        ("memory32", 8),
        ("memory32", 1 << 32),
        ("memory32", 48),
        ("memory64", 8),
        ("memory64", 1 << 64),
    ],
)
def test_a_bar_of_an_impossible_size(kind: Kind, size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"BAR 2 has {size} bytes"):
        ConfigBytes(with_bars(Bar(2, size, kind)))


@pytest.mark.parametrize(("index", "kind"), [(0, "memory32"), (5, "memory32"), (0, "memory64"), (4, "memory64")])
def test_the_first_and_the_last_bar(index: int, kind: Kind) -> None:
    made = ConfigBytes(with_bars(Bar(index, 4096, kind)))
    made.write(0x10 + 4 * index, (0xD000_0000).to_bytes(4, "little"))
    assert made.base(made.bars[index]) == 0xD000_0000


@pytest.mark.parametrize(
    "bars",
    [
        (Bar(-1, 4096),),
        (Bar(-1, 4096, "memory64"),),
        (Bar(6, 4096),),
        (Bar(5, 4096, "memory64"),),
        (Bar(2, 4096, "memory64"), Bar(3, 4096)),
        (Bar(2, 4096), Bar(2, 4096)),
    ],
)
def test_bars_that_have_no_place(bars: tuple[Bar, ...]) -> None:
    with pytest.raises(InvalidArgument, match="there are six, and some are taken"):
        ConfigBytes(with_bars(*bars))


@pytest.mark.parametrize(("offset", "fits"), [(-1, False), (0, True), (252, True), (253, False), (256, False)])
def test_patches_lie_in_configuration_space(offset: int, *, fits: bool) -> None:
    declared = with_bars().replace(patches={offset: b"\1\2\3\4"})
    if fits:
        assert ConfigBytes(declared).read(offset, 4) == b"\1\2\3\4"
    else:
        with pytest.raises(InvalidArgument, match="a patch at"):
            ConfigBytes(declared)


@pytest.mark.parametrize(("at", "fits"), [(0xFE, True), (0xFF, False), (0x100, False)])
def test_a_capability_ends_where_its_pointers_do(at: int, *, fits: bool) -> None:
    declared = with_bars().replace(capabilities={"last": Capability(at=at)}, extended_space=True)
    if fits:
        assert ConfigBytes(declared).capabilities == {"last": at}
    else:
        with pytest.raises(InvalidArgument, match="the capability last at"):
            ConfigBytes(declared)


# --- what is declared -----------------------------------------------------------------------------------------

ID_LIMITS = {
    "pci_vendor": 0xFFFF,
    "pci_device": 0xFFFF,
    "revision": 0xFF,
    "pci_class": 0xFFFF,
    "subsystem_vendor": 0xFFFF,
    "subsystem": 0xFFFF,
}


@pytest.mark.parametrize("name", ID_LIMITS)
def test_ids_that_their_registers_hold(name: str) -> None:
    for value in (0, ID_LIMITS[name]):
        given: dict[str, Any] = {name: value}
        declare(upper(), **given)
    for value in (-1, ID_LIMITS[name] + 1):
        given = {name: value}
        with pytest.raises(InvalidArgument, match="it is at most"):
            declare(upper(), **given)


@pytest.mark.parametrize("vectors", [0, 1, 2048])
def test_as_many_vectors_as_a_table_has(vectors: int) -> None:
    assert VirtioPci(upper(), declaration=declare(upper(), vectors=vectors)).vectors == vectors


@pytest.mark.parametrize("vectors", [-1, 2049])
def test_more_vectors_than_a_table_has(vectors: int) -> None:
    with pytest.raises(InvalidArgument, match="MSI-X has at most 2048"):
        declare(upper(), vectors=vectors)


@pytest.mark.parametrize(("admin", "possible"), [(-1, False), (0, True), (QUEUES, True), (QUEUES + 1, False)])
def test_administration_virtqueues_are_some_of_the_queues(admin: int, *, possible: bool) -> None:
    if possible:
        assert declare(upper(), admin_queues=admin).layout.admin_queues == admin
    else:
        with pytest.raises(InvalidArgument, match="administration virtqueues of a device with 2"):
            declare(upper(), admin_queues=admin)


def test_flavours_that_a_device_has() -> None:
    modern = BaseDevice(2, handlers={0: bytes.upper}, transitional=False)
    unnamed = BaseDevice(16, handlers={0: bytes.upper})
    for device in (modern, unnamed):
        assert declare(device, flavour="non-transitional").layout.legacy is None
        assert declare(device).layout.legacy is None
    with pytest.raises(InvalidArgument, match="say generic, transitional or non-transitional"):
        declare(modern, flavour="legacy")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="legacy rules"):
        declare(modern, flavour="transitional")
    with pytest.raises(InvalidArgument, match="no transitional PCI device id"):
        declare(unnamed, flavour="transitional")
    assert declare(unnamed, flavour="transitional", pci_device=0x1020).layout.legacy is not None
    assert declare(unnamed, pci_device=0x1020).layout.legacy is not None
    assert declare(unnamed, pci_device=0x1020, behind_express_port=True).layout.legacy is None


# --- the table ------------------------------------------------------------------------------------------------


def table(vectors: int) -> tuple[MsixTable, list[int]]:
    sent: list[int] = []
    made = MsixTable(vectors, can_send=lambda: True, send=lambda vector, _address, _data: sent.append(vector))
    return made, sent


@pytest.mark.parametrize("vectors", [1, 2048])
def test_vectors_that_a_table_sends(vectors: int) -> None:
    made, sent = table(vectors)
    made.external = True
    made.notify(0)
    assert sent == []
    made.control(enabled=True, masked=False)
    for vector in (-1, 0, vectors - 1, vectors, vectors + 1):
        made.notify(vector)
    assert sent == [0, vectors - 1]
    assert made.pending == []


@pytest.mark.parametrize("vectors", [0, 2049])
def test_a_table_that_cannot_be(vectors: int) -> None:
    with pytest.raises(InvalidArgument, match="1 to 2048 vectors"):
        table(vectors)


def test_only_whole_words_of_the_table_and_of_its_bits() -> None:
    made, _ = table(2)
    bits = PendingBits(made)
    for offset, length in ((0, 4), (4, 4), (12, 4), (0, 8), (8, 8)):
        assert made.read(offset, length) is not None
        assert bits.read(offset, length) == bytes(length)
        assert made.write(offset, bytes(length)) is None
    for offset, length in ((0, 1), (0, 2), (2, 2), (0, 16), (2, 4), (4, 8), (1, 4)):
        assert made.read(offset, length) is None
        assert bits.read(offset, length) is None
        assert made.write(offset, bytes(length)) is not None


@pytest.mark.parametrize(
    ("control", "possible"), [(b"\0\0\0\0", True), (b"\1\0\0\0", True), (b"\2\0\0\0", False), (b"\0\0\0\1", False)]
)
def test_a_table_of_a_saved_state_has_mask_bits_only(control: bytes, *, possible: bool) -> None:
    made, _ = table(2)
    assert made.possible(bytes(28) + control) == possible
    world = World(vectors=2)
    state: Any = world.function.save()
    state["function"]["msix_table"] = (bytes(28) + control).hex()
    if possible:
        world.function.restore(state)
    else:
        with pytest.raises(SavedStateError, match="bits that are not there"):
            world.function.restore(state)


@pytest.mark.parametrize("field", ["config_vector", "queue_vectors"])
@pytest.mark.parametrize(("vector", "there"), [(0, True), (2, True), (3, False), (0xFFFE, False), (0xFFFF, True)])
def test_vectors_of_a_saved_state_are_in_the_table(field: str, vector: int, *, there: bool) -> None:
    world = World(vectors=3)
    state: Any = world.function.save()
    state["function"][field] = vector if field == "config_vector" else [0xFFFF, vector]
    if there:
        world.function.restore(state)
    else:
        with pytest.raises(SavedStateError, match=f"the saved vector {vector} is none of the 3"):
            world.function.restore(state)


def test_a_function_without_msix() -> None:
    world = World(vectors=0)
    assert (world.function.vectors, world.function.external_table) == (0, False)
    world.function.external_table = True
    assert not world.function.external_table
    queue = world.live()
    assert world.works(queue)
    assert world.sink.levels == [True]
    world.function.restore(world.function.save())
    assert world.function.interrupts.valid(0) == 0xFFFF
    assert not world.function.interrupts.msix_enabled


def test_whose_table_it_is_and_whether_there_is_a_line() -> None:
    function = VirtioPci(upper(), declaration=declare(upper(), vectors=2, pin=0))
    assert (function.external_table, function.has_line) == (False, False)
    function.external_table = True
    assert function.external_table
    assert VirtioPci(upper(), declaration=declare(upper())).has_line


# --- accesses -------------------------------------------------------------------------------------------------


def test_accesses_that_a_carrier_cannot_make() -> None:
    function = World().function
    assert function.read_config(0, 1) == b"\xf4"
    assert function.read_bar(1, 0, 4) == bytes(4)
    for offset, length in ((-1, 1), (0, 0), (-1, 0)):
        with pytest.raises(InvalidArgument, match="configuration space, which is not there"):
            function.read_config(offset, length)
        with pytest.raises(InvalidArgument, match="BAR 1, which is not there"):
            function.read_bar(1, offset, length)
    with pytest.raises(InvalidArgument, match="configuration space, which is not there"):
        function.write_config(0, b"")
    for bar in (-1, 0, 3, 6):
        with pytest.raises(InvalidArgument, match=f"BAR {bar}, which is not there"):
            function.read_bar(bar, 0, 4)


@pytest.mark.parametrize(("state", "awake"), [(0, True), (3, False)])
@pytest.mark.parametrize("command", [0, 2, 4, 6])
def test_a_function_that_sleeps_answers_and_sends_nothing(state: int, command: int, *, awake: bool) -> None:
    world = World(on=False)
    world.set_config(4, 2, command)
    world.set_config(world.capability("power") + 4, 1, state)
    function = world.function
    assert function.awake == awake
    assert function.decodes(1) == (awake and command in (2, 6))
    assert function.bus_master == (awake and command >= 4)


def test_what_only_marks_a_queue() -> None:
    world = World(flavour="transitional")
    notify, legacy, common = world.layout.notify, world.layout.legacy, world.layout.common
    assert legacy is not None
    asked = world.function.is_notification
    assert asked(notify.bar, notify.offset, 2)
    assert asked(notify.bar, notify.offset + notify.length - 4, 4)
    assert not asked(notify.bar, notify.offset + notify.length, 2)
    assert asked(legacy.bar, 16, 2)
    assert not any(asked(legacy.bar, at, size) for at, size in ((16, 4), (16, 1), (14, 2), (18, 2), (18, 1)))
    assert not asked(common.bar, common.offset + 16, 2)
    assert not asked(3, 0, 2)


def test_the_configuration_behind_the_legacy_registers_begins_where_they_end() -> None:
    config = ConfigSpace(ConfigLayout(("word", "le32", "rw")))
    world = World(upper(config=config), flavour="transitional")
    header = 20
    world.write(world.layout.legacy, 18, 1, 1)
    world.write(world.layout.legacy, header, 4, 0x1234_5678)
    assert config["word"] == 0x1234_5678
    assert world.read(world.layout.legacy, header, 4) == 0x1234_5678
    assert world.rules() == {}
    world.write(world.layout.legacy, header - 1, 2, 0)
    assert world.read(world.layout.legacy, header - 1, 2) == 0xFFFF
    assert world.rules() == {"AccessWidth": 2}


def test_registers_of_the_modern_interface_once_the_legacy_one_is_used() -> None:
    world = World(flavour="transitional")
    world.write(world.layout.legacy, 18, 1, int(UP))
    world.set("queue_select", 1)
    world.notify(0)
    assert world.get("queue_select") == 0
    world.run()
    assert world.get("device_status") == UP
    assert "NotifiedEarly" not in world.rules()
    # Only the way out is open to both.
    world.set("device_status", 0)
    assert world.get("device_status") == 0
    world.set("queue_select", 1)
    assert world.get("queue_select") == 1


def test_a_deaf_register_takes_nothing() -> None:
    world = World(change=lambda good: good.replace(deaf=frozenset({"queue_select", "device_status"})))
    world.set("queue_select", 1)
    world.set("device_status", 1)
    assert (world.get("queue_select"), world.get("device_status")) == (0, 0)
    world.set("driver_feature_select", 1)
    assert world.get("driver_feature_select") == 1


@pytest.mark.parametrize("accepted", [False, True])
def test_administration_virtqueues_are_there_for_who_accepted_them(*, accepted: bool) -> None:
    handlers = dict.fromkeys(range(3), bytes.upper)
    device = BaseDevice(DEVICE_ID, features=FeatureSet("ADMIN_VQ"), handlers=handlers, queue_sizes=(SIZE,) * 3)
    world = World(device, admin_queues=2, offered=device.features | FeatureSet("RING_RESET"))
    world.negotiate(*(() if accepted else ("ADMIN_VQ",)))
    sizes: list[int] = []
    for index in range(4):
        world.set("queue_select", index)
        sizes.append(world.get("queue_size"))
    assert sizes == [SIZE, *([SIZE, SIZE] if accepted else [0, 0]), 0]
    assert world.rules() == {}
    for name in ("queue_size", "queue_msix_vector", "queue_enable", "queue_reset", "queue_desc"):
        world.set("queue_select", 2)
        world.set(name, 1)
    # An address has two halves.
    assert world.rules().get("NoSuchQueue", 0) == (0 if accepted else 6)
    assert world.bank.slots[2].desc == (1 if accepted else 0)


def test_a_queue_is_reset_by_a_one() -> None:
    world = World(offered=upper().features | FeatureSet("RING_RESET"))
    world.live()
    assert world.get("device_status") == LIVE
    for value in (0, 2):
        world.set("queue_reset", value)
    assert world.get("queue_enable") == 1
    assert world.rules() == {"BadQueueReset": 2}
    world.set("queue_reset", 1)
    assert world.get("queue_enable") == 0
    world.set("queue_select", QUEUES)
    world.set("queue_reset", 1)
    assert world.rules() == {"BadQueueReset": 2, "NoSuchQueue": 1}


def test_accesses_that_are_no_register_of_the_common_configuration() -> None:
    world = World()
    for offset, size in ((0, 2), (1, 4), (0x14, 2), (0x20, 1), (0x24, 2)):
        assert world.read(world.layout.common, offset, size) == (1 << 8 * size) - 1
        world.write(world.layout.common, offset, size, 0)
    assert world.rules() == {"AccessWidth": 10}


# --- saved states ---------------------------------------------------------------------------------------------


def test_as_many_queues_as_were_saved() -> None:
    world = World()
    state = world.function.save()
    three = upper(handlers=dict.fromkeys(range(3), bytes.upper), queue_sizes=(SIZE,) * 3)
    with pytest.raises(SavedStateError, match="the device has 3 queues, this function 2"):
        world.function.restore(state, device=three)
    world.function.restore(state, device=upper())


@pytest.mark.parametrize(
    ("capability", "offset", "bits", "says"),
    [
        (None, 0, 1, "0xf5 at 0x0, which is not of this function"),
        (None, 0x3C, 0x2A, None),
        ("power", 4, 1, "power state is D1"),
        ("power", 4, 2, "power state is D2"),
        ("power", 4, 3, None),
        ("reset", 4, 1, "in the middle of a reset"),
        ("reset", 4, 0, None),
    ],
)
def test_configuration_space_as_software_could_have_left_it(
    capability: str | None, offset: int, bits: int, says: str | None
) -> None:
    world = World()
    state: Any = world.function.save()
    config = bytearray.fromhex(state["function"]["config"])
    config[offset if capability is None else world.capability(capability) + offset] |= bits
    state["function"]["config"] = config.hex()
    if says is None:
        world.function.restore(state)
        assert world.function.save()["function"] == state["function"]
    else:
        with pytest.raises(SavedStateError, match=says):
            world.function.restore(state)


# --- the window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "good"),
    [
        (0, 1, True),
        (1, 1, True),
        (2, 2, True),
        (4, 4, True),
        (1, 2, False),
        (2, 4, False),
        (0, 3, False),
        (0, 8, False),
    ],
)
def test_accesses_that_go_through_the_window(offset: int, length: int, *, good: bool) -> None:
    world = World()
    at, place = world.capability("pci_cfg"), world.layout.config
    assert place is not None
    world.set_config(at + 4, 1, place.bar)
    world.set_config(at + 8, 4, place.offset + offset)
    world.set_config(at + 12, 4, length)
    assert world.rules() == {}
    world.config(0, 4)
    world.set_config(0x3C, 1, 1)
    assert world.rules() == {}
    value = world.config(at + 16, 4)
    world.set_config(at + 16, 4, value)
    assert world.rules() == ({} if good else {"BadWindow": 2})
    assert (value == 0xFFFF_FFFF) == (not good)
