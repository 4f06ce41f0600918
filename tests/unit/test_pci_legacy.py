"""The legacy registers of the transitional flavour (VIRTIO 1.4, 4.1.4.10), and how the two interfaces keep apart."""

from __future__ import annotations

import pytest
from virtio_test._core import DriverQueue, Notifier, QueueConfig, RingLayout
from virtio_test.features import FeatureSet

from .pci_world import COMMAND, SIZE, UP, S, World, upper

FEATURES, ACCEPTED, PFN, QUEUE_SIZE, SELECT, NOTIFY, STATUS, ISR = 0, 4, 8, 12, 14, 16, 18, 19
CONFIG_VECTOR, QUEUE_VECTOR = 20, 22
WIDTH = {FEATURES: 4, ACCEPTED: 4, PFN: 4, QUEUE_SIZE: 2, SELECT: 2, NOTIFY: 2, STATUS: 1, ISR: 1} | {20: 2, 22: 2}
PAGE = 0x10


class Legacy(World):
    """A legacy driver."""

    def old(self, register: int) -> int:
        return self.read(self.layout.legacy, register, WIDTH[register])

    def set_old(self, register: int, value: int) -> None:
        self.write(self.layout.legacy, register, WIDTH[register], value)

    def old_status(self, value: int) -> int:
        self.set_old(STATUS, value)
        return self.old(STATUS)

    def old_queue(self, index: int = 0) -> DriverQueue:
        self.set_old(SELECT, index)
        self.set_old(PFN, PAGE * (index + 1))
        layout = RingLayout.legacy(SIZE, 4096 * PAGE * (index + 1))
        config = QueueConfig.from_layout(layout, index=index, features=self.old(ACCEPTED))
        return DriverQueue(self.memory, config, kick=Notifier.callback(lambda: self.set_old(NOTIFY, index)))

    def old_live(self, features: int | None = None) -> DriverQueue:
        self.old_status(0)
        self.old_status(UP)
        self.set_old(ACCEPTED, self.old(FEATURES) if features is None else features)
        queue = self.old_queue()
        assert self.old_status(UP | S.DRIVER_OK) == UP | S.DRIVER_OK
        return queue

    def old_works(self, queue: DriverQueue) -> bool:
        self.post(queue, kick=False)
        self.set_old(NOTIFY, queue.index)
        return self.answer(queue) == b"HELLO"


def legacy() -> Legacy:
    return Legacy(flavour="transitional")


def test_the_sequence_of_a_legacy_driver() -> None:
    world = legacy()
    offered = FeatureSet.from_bits(world.old(FEATURES))
    assert offered == FeatureSet("NOTIFY_ON_EMPTY", "ANY_LAYOUT", "INDIRECT_DESC", "EVENT_IDX")
    assert [world.old(QUEUE_SIZE), world.old(PFN)] == [SIZE, 0]
    queue = world.old_live()
    assert world.old(PFN) == PAGE
    assert world.old_works(queue)
    assert [world.old(ISR), world.old(ISR)] == [1, 0]
    assert world.sink.levels == [True, False]
    assert world.bank.legacy
    assert "VERSION_1" not in world.bank.accepted
    assert world.rules() == {}


def test_the_device_may_be_used_before_driver_ok() -> None:
    world = legacy()
    world.old_status(UP)
    queue = world.old_queue()
    assert world.old_works(queue)


def test_the_vectors_move_what_is_behind_them() -> None:
    world = legacy()
    place = world.layout.legacy
    world.device.config["count"] = 0x1122_3344
    assert world.read(place, 20, 4) == 0x1122_3344
    world.msix(0, 1)
    assert world.read(place, 24, 4) == 0x1122_3344
    assert [world.old(CONFIG_VECTOR), world.old(QUEUE_VECTOR)] == [0xFFFF, 0xFFFF]
    queue = world.old_live()
    world.set_old(CONFIG_VECTOR, 1)
    world.set_old(QUEUE_VECTOR, 0)
    assert [world.old(CONFIG_VECTOR), world.old(QUEUE_VECTOR)] == [1, 0]
    assert world.old_works(queue)
    world.device.config["count"] = 1
    world.run()
    assert (world.sink.vectors, world.sink.levels) == ([0, 1], [])
    world.set_old(QUEUE_VECTOR, 9)
    assert world.old(QUEUE_VECTOR) == 0xFFFF
    world.control(enabled=False)
    assert world.read(place, 20, 4) == 1


def test_the_configuration_in_any_width() -> None:
    world = legacy()
    place = world.layout.legacy
    world.write(place, 24, 4, 0x0403_0201)
    for offset, width in ((24, 1), (25, 2), (24, 3), (24, 4), (22, 8)):
        expected = (0x0403_0201 << 16 if offset == 22 else 0x0403_0201 >> 8 * (offset - 24)) & (1 << 8 * width) - 1
        assert world.read(place, offset, width) == expected, (offset, width)
    world.write(place, 25, 1, 0xAA)
    assert world.device.config["word"] == 0x0403_AA01
    assert world.read(place, 28, 4) == 0xFFFF_FFFF
    world.write(place, 28, 4, 0)
    assert world.rules() == {"ConfigOutOfRange": 2}


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_registers_have_their_width(width: int) -> None:
    world = legacy()
    world.old_status(UP)
    world.run()
    before = [world.old(register) for register in (ACCEPTED, PFN, SELECT, STATUS)]
    world.bank.ignored.clear()
    for offset in range(20):
        good = WIDTH.get(offset) == width
        if not good and offset + width <= 20:
            assert world.read(world.layout.legacy, offset, width) == (1 << 8 * width) - 1
            world.write(world.layout.legacy, offset, width, (1 << 8 * width) - 1)
            assert world.rules() == {"AccessWidth": 2}, offset
            world.bank.ignored.clear()
    assert [world.old(register) for register in (ACCEPTED, PFN, SELECT, STATUS)] == before


@pytest.mark.parametrize("register", [FEATURES, QUEUE_SIZE, ISR])
def test_what_is_read_only_stays(register: int) -> None:
    world = legacy()
    before = world.old(register)
    world.set_old(register, 0)
    assert world.old(register) == before
    assert world.rules() == {"ReadOnlyRegister": 1}


@pytest.mark.parametrize("index", [2, 3, 0xFFFF])
def test_a_queue_that_is_not_there(index: int) -> None:
    world = legacy()
    queue = world.old_live()
    world.set_old(SELECT, index)
    assert [world.old(SELECT), world.old(QUEUE_SIZE), world.old(PFN)] == [index, 0, 0]
    world.set_old(PFN, 1)
    world.set_old(NOTIFY, index)
    assert world.rules() == {"NoSuchQueue": 1}
    assert world.old_works(queue)


def test_administration_virtqueues_are_not_for_it() -> None:
    device = upper(FeatureSet("ADMIN_VQ"))
    world = Legacy(device, flavour="transitional", admin_queues=1)
    world.set_old(SELECT, 1)
    assert world.old(QUEUE_SIZE) == 0
    world.set_old(PFN, 5)
    assert world.old(PFN) == 0
    assert world.rules() == {"NoSuchQueue": 1}


def test_a_queue_is_taken_away_and_placed_again() -> None:
    world = legacy()
    queue = world.old_live()
    assert world.old_works(queue)
    world.set_old(PFN, 5)
    assert (world.old(PFN), world.rules()) == (PAGE, {"EnabledQueueWritten": 1})
    world.set_old(PFN, 0)
    assert world.old(PFN) == 0
    world.memory.fill(4096 * PAGE, 0x4000)
    assert world.old_works(world.old_queue())


def test_a_queue_outside_of_memory_breaks_the_device() -> None:
    world = legacy()
    world.old_status(UP)
    world.set_old(PFN, 0xFFFF_FFFF)
    world.old_status(UP | S.DRIVER_OK)
    world.run()
    assert world.old(STATUS) & S.DEVICE_NEEDS_RESET
    assert world.old_works(world.old_live())


def test_the_interfaces_do_not_mix() -> None:
    world = legacy()
    queue = world.old_live()
    accepted = world.bank.accepted
    world.set("queue_size", 8)
    world.set("device_status", 0xFF)
    world.notify(0)
    world.write(world.layout.config, 4, 4, 1)
    assert world.rules() == {"MixedInterfaces": 4}
    assert (world.bank.accepted, world.old(STATUS)) == (accepted, UP | S.DRIVER_OK)
    assert world.old_works(queue)
    # A reset is everybody's, and the next one to write is the one in use.
    assert world.status(0) == 0
    world.bank.ignored.clear()
    queue = world.live()
    world.set_old(PFN, 3)
    world.set_old(NOTIFY, 0)
    world.write(world.layout.legacy, 24, 4, 1)
    assert world.rules() == {"MixedInterfaces": 3}
    assert world.works(queue)
    world.set_old(STATUS, 0)
    assert world.get("device_status") == 0


def test_io_decoding() -> None:
    world = legacy()
    world.old_status(S.ACKNOWLEDGE)
    world.set_config(COMMAND, 2, 6)
    assert world.old(STATUS) == 0xFF
    world.old_status(0)
    world.set_config(COMMAND, 2, 5)
    assert world.old(STATUS) == S.ACKNOWLEDGE
    assert world.get("device_status") == 0xFF


def test_a_modern_function_has_no_such_bar() -> None:
    world = World()
    assert world.layout.legacy is None
    assert 0 not in {bar.index for bar in world.function.bars}
