"""Functions that are wrong on purpose: what is declared is what is served."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import COMMON, CapType
from virtio_test.transport.pci.capabilities import Msix, Notify, PciCfg, Power, Raw, SharedMemory, VendorData, Virtio
from virtio_test.transport.pci.declaration import Declaration, Ids, Place

from .pci_world import LIVE, READY, UP, S, World, upper

BYTE = st.integers(0, 0xFF)
WORD = st.integers(0, 0xFFFF_FFFF)


@given(cfg_type=BYTE, bar=BYTE, offset=WORD, length=WORD, number=BYTE, cap_len=BYTE)
def test_every_field_of_a_capability(
    cfg_type: int, bar: int, offset: int, length: int, number: int, cap_len: int
) -> None:
    def lie(good: Declaration) -> Declaration:
        return good.change(
            "common", cfg_type=cfg_type, bar=bar, offset=offset, length=length, id=number, cap_len=cap_len
        )

    world = World(change=lie)
    at = world.capability("common")
    assert [world.config(at + field, 1) for field in (2, 3, 4, 5)] == [cap_len, cfg_type, bar, number]
    assert [world.config(at + field, 4) for field in (8, 12)] == [offset, length]
    # The registers are where they were.
    assert world.works(world.live())


@given(offset=st.integers(0, (1 << 64) - 1), length=st.integers(0, (1 << 64) - 1))
def test_64_bits_of_a_shared_memory_region(offset: int, length: int) -> None:
    region = SharedMemory(bar=2, offset=offset, length=length, id=5)
    world = World(change=lambda good: good.add("region", region))
    at = world.capability("region")
    low, size, high, size_high = (world.config(at + field, 4) for field in (8, 12, 16, 20))
    assert (low | high << 32, size | size_high << 32) == (offset, length)


def test_a_list_that_never_ends() -> None:
    good = World()
    first = good.capability("msix")
    world = World(change=lambda plan: plan.change("isr", next=first))
    at, seen = world.config(0x34, 1), list[int]()
    while len(seen) < 100:
        seen.append(at)
        at = world.config(at + 1, 1)
    assert set(seen) == {first, good.capability("common"), good.capability("isr")}


@pytest.mark.parametrize("pointer", [0x00, 0x04, 0x3C, 0x41, 0xFF])
def test_a_pointer_to_nowhere(pointer: int) -> None:
    world = World(change=lambda plan: plan.change("common", next=pointer))
    assert world.config(world.capability("common") + 1, 1) == pointer


def test_capabilities_that_are_missing_doubled_and_elsewhere() -> None:
    def change(good: Declaration) -> Declaration:
        other = Virtio(CapType.COMMON_CFG, 4, 0x800, 64)
        return good.without("isr").add("other", other, first=True).change("notify", at=0x60, multiplier=3)

    world = World(change=change)
    assert world.capability("other") < world.capability("common")
    assert world.capability("notify") == 0x60
    assert world.config(0x60 + 16, 4) == 3
    # Nobody else lies there.
    ranges = sorted((world.capability(name), len(each.body()) + 2) for name, each in world.plan.capabilities.items())
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(ranges))
    assert world.works(world.live())


def test_any_byte_of_configuration_space() -> None:
    world = World(change=lambda good: good.replace(patches={0: b"\xff\xff", 0x34: b"\x02", 0xF0: b"abc"}))
    assert world.config(0, 2) == 0xFFFF
    assert world.config(0x34, 1) == 2
    assert world.function.read_config(0xF0, 4) == b"abc\0"
    world.function.reset()
    assert world.config(0, 2) == 0xFFFF


def test_identity() -> None:
    world = World(change=lambda good: good.replace(ids=Ids(0x1AF4, 0x10C0, 7, 0x123456, 1, 2), pin=0))
    assert world.config(0, 4) == 0x10C0_1AF4
    assert world.config(8, 4) == 0x1234_5607
    assert (world.function.has_line, world.config(0x3D, 1)) == (False, 0)
    assert world.works(world.live())
    assert world.sink.levels == []
    # The bit in the status register stands all the same.
    assert world.config(6, 2) & 8


@given(name=st.sampled_from(sorted(COMMON)), value=st.integers(0, (1 << 64) - 1))
def test_every_register_reads_what_is_declared(name: str, value: int) -> None:
    world = World(change=lambda good: good.replace(registers={name: value}))
    assert world.get(name) == value & (1 << 8 * COMMON[name].size) - 1


def test_registers_that_change_what_is_true() -> None:
    count = itertools.count()
    world = World(
        change=lambda good: good.replace(
            registers={
                "config_generation": lambda _: next(count),
                "queue_notify_off": lambda real: real + 5,
                "isr": lambda real: real | 0x80,
            }
        )
    )
    assert [world.get("config_generation") for _ in range(3)] == [0, 1, 2]
    assert world.get("queue_notify_off") == 5
    assert world.read(world.layout.isr, 0, 1) == 0x80


def test_a_reset_that_never_ends_and_features_that_are_never_agreed_upon() -> None:
    stuck = World(change=lambda good: good.replace(registers={"device_status": lambda real: real or 1}))
    assert stuck.status(0) == 1
    stubborn = World(change=lambda good: good.replace(registers={"device_status": lambda real: real & ~8}))
    stubborn.status(UP)
    stubborn.features(stubborn.bank.offered)
    assert stubborn.status(READY) == UP


@pytest.mark.parametrize("name", ["queue_enable", "device_status", "queue_msix_vector", "notify", "config"])
def test_registers_that_take_no_write(name: str) -> None:
    world = World(change=lambda good: good.replace(deaf=frozenset({name})))
    if name == "device_status":
        assert world.status(S.ACKNOWLEDGE) == 0
        return
    world.negotiate()
    queue = world.queue()
    world.status(LIVE)
    world.run()
    world.set("queue_msix_vector", 0)
    world.write(world.layout.config, 4, 4, 9)
    assert world.get("queue_enable") == (name != "queue_enable")
    assert world.get("queue_msix_vector") == (0xFFFF if name == "queue_msix_vector" else 0)
    assert world.device.config["word"] == (0 if name == "config" else 9)
    assert world.works(queue) is (name not in ("queue_enable", "notify"))


def test_the_legacy_registers_too() -> None:
    world = World(
        flavour="transitional",
        change=lambda good: good.replace(
            registers={"legacy.queue_size": 12, "legacy.queue_pfn": lambda real: real ^ 1},
            deaf=frozenset({"legacy.queue_select", "legacy.config"}),
        ),
    )
    assert world.read(world.layout.legacy, 12, 2) == 12
    assert world.read(world.layout.legacy, 8, 4) == 1
    world.write(world.layout.legacy, 14, 2, 1)
    assert world.read(world.layout.legacy, 14, 2) == 0
    world.write(world.layout.legacy, 24, 4, 1)
    assert world.device.config["word"] == 0


def test_registers_that_are_elsewhere() -> None:
    """A layout of one's own is no lie: capabilities and registers agree."""

    def move(good: Declaration) -> Declaration:
        place = Place(4, 0x800, 64)
        layout = replace(good.layout, common=place)
        return good.replace(layout=layout).change("common", offset=place.offset)

    world = World(change=move)
    assert world.config(world.capability("common") + 8, 4) == 0x800
    assert world.works(world.live())


def test_notification_data_of_ones_own() -> None:
    device = upper(FeatureSet("NOTIF_CONFIG_DATA"))
    for multiplier in (0, 4):
        world = World(
            device,
            multiplier=multiplier,
            change=lambda good: good.replace(registers={"queue_notif_config_data": lambda real: real + 0x100}),
        )
        queue = world.live()
        assert world.get("queue_notif_config_data") == 0x100
        world.post(queue, kick=False)
        world.run()
        world.bank.ignored.clear()
        world.notify(0, 0x100)
        assert world.rules() == {}
        world.notify(0, 0)
        assert world.rules() == {"NotificationValue" if multiplier else "BadNotification": 1}


def test_capabilities_repeat_themselves() -> None:
    """`repr` evaluates back, so a declaration that found something can be written down."""
    for each in (
        Raw(5, b"xy", b"\xff"),
        Virtio(1, 2, 3, 4, at=0x80, next=0),
        Notify(multiplier=3),
        PciCfg(),
        SharedMemory(id=3),
        VendorData(1, b"z"),
        Msix(3),
        Power(no_soft_reset=False),
    ):
        assert eval(repr(each)) == each
