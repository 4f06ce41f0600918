"""The PCI rows of the robustness catalogue, X10 to X16: decoding, resets, interrupts, administration virtqueues."""

from __future__ import annotations

import pytest
from virtio_test.devices.base import kept
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import COMMON, NO_VECTOR

from .pci_world import COMMAND, LIVE, READY, UP, S, World, row, upper


@row("X10")
@pytest.mark.parametrize("command", [0, 1, 4, 5])
def test_bars_do_not_answer_without_memory_decoding(row: str, command: int) -> None:
    world = World()
    queue = world.live()
    world.post(queue, kick=False)
    world.run()
    queue.get_used()
    world.set_config(COMMAND, 2, command)
    assert world.get("num_queues") == 0xFFFF
    assert world.read(world.layout.table, 12, 4) == 0xFFFF_FFFF
    world.set("device_status", 0)
    world.notify(0)
    world.set_config(COMMAND, 2, 7)
    assert world.get("device_status") == LIVE
    assert world.works(queue)


@row("X10")
def test_without_bus_mastering_nothing_is_written_and_no_message_sent(row: str) -> None:
    world = World()
    world.msix(0, 1)
    world.negotiate()
    world.set("config_msix_vector", 1)
    world.set("queue_msix_vector", 0)
    queue = world.queue()
    world.status(LIVE)
    world.run()
    world.set_config(COMMAND, 2, 3)
    world.post(queue)
    before = world.memory.read(0, 0x40000)
    world.device.config["count"] = 1
    world.run()
    assert world.memory.read(0, 0x40000) == before
    assert world.sink.messages == []
    assert world.pending == 0b10
    world.set_config(COMMAND, 2, 7)
    assert world.answer(queue) == b"HELLO"
    assert world.sink.vectors == [1, 0]


@row("X10")
def test_the_line_needs_no_bus_mastering(row: str) -> None:
    world = World()
    world.live()
    world.set_config(COMMAND, 2, 3)
    world.device.config["count"] = 1
    world.run()
    assert world.sink.levels == [True]


@row("X11")
@pytest.mark.parametrize("how", ["status", "flr", "af", "endpoint", "power"])
def test_what_completes_after_a_reset_reaches_nobody(row: str, how: str) -> None:
    held: list[object] = []
    device = upper(handlers={0: kept(held.append)}, queue_sizes=(16,))
    world = World(
        device,
        express=how == "flr",
        change=lambda good: good.change("power", no_soft_reset=False) if how == "power" else good,
    )
    queue = world.live()
    world.post(queue)
    world.run()
    (chain,) = device.kept
    before = world.memory.read(0, 0x40000)
    if how == "status":
        assert world.status(0) == 0
    elif how == "flr":
        at = world.capability("express") + 8
        world.set_config(at, 2, world.config(at, 2) | 0x8000)
        assert world.config(at, 2) == 0x2810
    elif how == "af":
        at = world.capability("reset") + 4
        world.set_config(at, 1, 1)
        assert world.config(at, 1) == 0
    elif how == "power":
        world.set_config(world.capability("power") + 4, 2, 3)
        world.set_config(world.capability("power") + 4, 2, 0)
    else:
        world.function.reset()
    assert device.complete(chain, b"late") is False
    world.run()
    assert world.memory.read(0, 0x40000) == before
    assert world.sink.levels == world.sink.messages == []
    if how != "status":
        assert world.config(COMMAND, 2) == 0
        world.set_config(COMMAND, 2, 7)
    assert world.get("device_status") == 0


@row("X12")
def test_the_next_interrupt_takes_the_new_vector(row: str) -> None:
    world = World()
    world.msix(0, 1, 2)
    world.negotiate()
    world.set("queue_msix_vector", 1)
    queue = world.queue()
    world.status(LIVE)
    for vector in (1, 2, 0, NO_VECTOR, 1):
        world.set("queue_msix_vector", vector)
        assert world.get("queue_msix_vector") == vector
        assert world.works(queue)
    assert world.sink.messages == [(v, 0xFEE0_0000 + v, 0x40 + v) for v in (1, 2, 0, 1)]


@row("X13")
@pytest.mark.parametrize("how", ["vector", "function", "both"])
def test_a_masked_vector_is_told_once_when_it_is_unmasked(row: str, how: str) -> None:
    world = World()
    world.msix(0, masked=(0,) if how != "function" else ())
    world.control(enabled=True, masked=how != "vector")
    world.negotiate()
    world.set("queue_msix_vector", 0)
    queue = world.queue()
    world.status(LIVE)
    for _ in range(3):
        assert world.works(queue)
    assert (world.sink.messages, world.pending) == ([], 1)
    world.write(world.layout.pba, 0, 8, 0)
    assert world.pending == 1
    if how != "function":
        world.mask(0, masked=False)
    if how == "both":
        assert world.sink.messages == []
    if how != "vector":
        world.control(enabled=True)
    assert (world.sink.vectors, world.pending) == ([0], 0)
    world.mask(0, masked=True)
    world.mask(0, masked=False)
    assert world.sink.vectors == [0]


@row("X13")
def test_a_reset_forgets_what_is_pending_and_keeps_the_table(row: str) -> None:
    world = World()
    world.msix(0, masked=(0,))
    world.negotiate()
    world.set("queue_msix_vector", 0)
    queue = world.queue()
    world.status(LIVE)
    assert world.works(queue)
    assert world.pending == 1
    world.status(0)
    assert world.get("queue_msix_vector") == world.get("config_msix_vector") == NO_VECTOR
    world.mask(0, masked=False)
    assert (world.sink.messages, world.pending) == ([], 0)
    assert world.read(world.layout.table, 0, 8) == 0xFEE0_0000
    world.function.reset()
    world.set_config(COMMAND, 2, 7)
    assert [world.read(world.layout.table, 4 * at, 4) for at in range(4)] == [0, 0, 0, 1]


@row("X13")
def test_nothing_is_pending_once_msix_is_off(row: str) -> None:
    world = World()
    world.msix(0, masked=(0,))
    world.negotiate()
    world.set("queue_msix_vector", 0)
    queue = world.queue()
    world.status(LIVE)
    assert world.works(queue)
    world.control(enabled=False)
    assert world.pending == 0
    world.control(enabled=True)
    world.mask(0, masked=False)
    assert world.sink.messages == []


@row("X14")
def test_no_vector_is_no_interrupt(row: str) -> None:
    world = World()
    world.msix(0, 1, 2)
    queue = world.live()
    assert world.works(queue)
    world.device.config["count"] = 1
    world.run()
    assert (world.sink.messages, world.sink.levels, world.pending) == ([], [], 0)


@row("X15")
def test_the_isr_bit_comes_before_the_line(row: str) -> None:
    world = World()
    queue = world.live()
    seen: list[tuple[bool, int, int]] = []
    at = COMMAND + 2
    world.sink.line = lambda asserted: seen.append(
        (asserted, world.function.interrupts.isr, world.config(at, 2) >> 3 & 1)
    )
    assert world.works(queue)
    world.read(world.layout.isr, 0, 1)
    assert seen == [(True, 1, 1), (False, 0, 0)]


@row("X15")
@pytest.mark.parametrize("how", ["read", "reset", "flr", "mask", "msix", "sleep"])
def test_the_line_is_released(row: str, how: str) -> None:
    world = World()
    queue = world.live()
    assert world.works(queue)
    assert world.works(queue)
    assert world.sink.levels == [True]
    if how == "read":
        world.read(world.layout.isr, 0, 1)
    elif how == "reset":
        world.status(0)
    elif how == "flr":
        world.set_config(world.capability("reset") + 4, 1, 1)
    elif how == "mask":
        world.set_config(COMMAND, 2, 0x407)
        # The status register says it all the same.
        assert world.config(COMMAND + 2, 2) & 8
    elif how == "msix":
        world.control(enabled=True)
    else:
        world.set_config(world.capability("power") + 4, 2, 3)
    assert world.sink.levels == [True, False]
    if how == "mask":
        world.set_config(COMMAND, 2, 0x007)
    elif how == "msix":
        world.control(enabled=False)
    elif how == "sleep":
        world.set_config(world.capability("power") + 4, 2, 0)
    assert world.sink.levels == [True, False] + [True] * (how in ("mask", "msix", "sleep"))


@row("X15")
def test_a_configuration_change_sets_its_bit_with_msix_too(row: str) -> None:
    world = World()
    world.msix(0)
    world.negotiate()
    world.set("config_msix_vector", 0)
    world.queue()
    world.status(LIVE)
    world.device.config["count"] = 1
    world.run()
    assert (world.sink.vectors, world.sink.levels) == ([0], [])
    assert world.read(world.layout.isr, 0, 1) == 2


@row("X16")
@pytest.mark.parametrize("accepted", [False, True])
def test_administration_virtqueues_are_beyond_the_others(row: str, accepted: bool) -> None:
    handlers = dict.fromkeys(range(3), bytes.upper)
    world = World(upper(FeatureSet("ADMIN_VQ"), handlers=handlers, queue_sizes=(16, 16, 8)), admin_queues=1)
    world.negotiate(*([] if accepted else ["ADMIN_VQ"]))
    assert [world.get(name) for name in ("num_queues", "admin_queue_index", "admin_queue_num")] == [2, 2, 1]
    sizes: list[int] = []
    for index in (0, 1, 2, 3, 4, 0x7FFF, 0xFFFF):
        world.set("queue_select", index)
        sizes.append(world.get("queue_size"))
    assert sizes == [16, 16, 8 if accepted else 0, 0, 0, 0, 0]
    queue = world.queue(2, size=8)
    world.status(LIVE)
    if accepted:
        assert world.works(queue)
        assert world.rules() == {}
    else:
        assert world.get("queue_enable") == 0
        assert set(world.rules()) == {"NoSuchQueue"}


@row("X16", "Q12")
def test_a_queue_that_is_not_there_reads_as_nothing(row: str) -> None:
    world = World()
    world.negotiate()
    world.set("queue_select", 2)
    for name in COMMON:
        if name.startswith("queue_") and name != "queue_select":
            world.set(name, 1)
            assert world.get(name) == (NO_VECTOR if name == "queue_msix_vector" else 0), name
    assert world.get("device_status") == READY == UP | S.FEATURES_OK
