"""A driver on registers that lie: sizes, notifications, vectors, waits; and how it accesses the ones that do not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import PciRegisters, open_pci
from virtio_test.driver.registers import Registers
from virtio_test.errors import InvalidArgument, NoFeature, PeerTimeout, StateError, StatusViolation, VirtioTestError
from virtio_test.features import FeatureSet
from virtio_test.spec.clauses import CLAUSES
from virtio_test.spec.pci import COMMON, NO_VECTOR
from virtio_test.status import Status

from tests.unit.pci_driver_world import (
    COMMON_AT,
    DEVICE_AT,
    GOOD,
    ISR_AT,
    NOTIFY_AT,
    FakePci,
    common,
    device,
    isr,
    le,
    msix,
    notify,
    window,
)

ALL = FeatureSet("RING_RESET", "NOTIFICATION_DATA", "INDIRECT_DESC", "EVENT_IDX")


def brought_up(fake: FakePci, wanted: FeatureSet | None = None, **options: str) -> tuple[Driver, PciRegisters]:
    registers = open_pci(fake, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(registers, PciRegisters)
    driver = Driver(registers, wanted=wanted)
    driver.initialize()
    return driver, registers


def bare(fake: FakePci) -> PciRegisters:
    registers = open_pci(fake)
    assert isinstance(registers, PciRegisters)
    return registers


# --- the right way --------------------------------------------------------------------------------------------


def test_bring_up_leaves_a_queue_that_is_enabled_and_mapped() -> None:
    fake = FakePci()
    driver, registers = brought_up(fake, ALL)
    assert isinstance(registers, Registers)
    assert fake.status == 0x0F
    assert registers.interrupts.vectors == {0: 1}
    assert (registers.read("config_msix_vector"), registers.read("queue_msix_vector")) == (0, 1)
    assert registers.read("queue_enable") == 1
    ring = registers.read("queue_desc")
    assert driver.memory.is_mapped(ring, 64 * 16)
    entry = [int.from_bytes(fake.bars[1][at : at + 4], "little") for at in range(16, 32, 4)]
    assert entry == [0xFEE0_0001, 0, 0x41, 0]
    assert fake.config[fake.places[-1] + 3] & 0x80, "MSI-X is on"


def test_every_register_is_accessed_with_its_own_width() -> None:
    """4.1.3.1, and 4.1.4.3.2: what is not the driver's is never written."""
    fake = FakePci()
    driver, registers = brought_up(fake, ALL)
    driver.submit(0, [b"x"], [4])
    driver.reset_queue(0)
    registers.read_config(0, 8)
    driver.reset()
    widths: dict[int, int] = {}
    for each in COMMON.values():
        widths |= {each.offset + half: 4 for half in (0, 4)} if each.size == 8 else {each.offset: each.size}
    seen = {(offset, size) for bar, offset, size in fake.accesses if bar == 0 and offset < 0x40}
    assert seen <= set(widths.items())
    assert len(seen) > 15
    writable = {at for each in COMMON.values() if each.driver_writable for at in (each.offset, each.offset + 4)}
    assert all(offset in writable for bar, offset, _, _ in fake.writes if bar == 0 and offset < 0x40)
    assert all(
        size in (1, 4) and offset % size == 0 for _, offset, size in fake.accesses if offset >= 0x40 or size == 4
    )
    assert (0, COMMON["queue_enable"].offset, 2, 0) not in fake.writes


@pytest.mark.parametrize(
    ("wanted", "width", "value"),
    [
        (FeatureSet(), 2, 0),
        (FeatureSet("NOTIFICATION_DATA"), 4, 1 << 16),
        (FeatureSet("NOTIF_CONFIG_DATA"), 2, 0x1234),
        (FeatureSet("NOTIF_CONFIG_DATA", "NOTIFICATION_DATA"), 4, 0x1234 | 1 << 16),
    ],
)
def test_kicks(wanted: FeatureSet, width: int, value: int) -> None:
    """4.1.5.2.1: 16 bits with the index, 32 bits with the position, the device's own value instead of the index."""
    fake = FakePci()
    fake.features |= FeatureSet("NOTIF_CONFIG_DATA").bits
    fake.put("queue_notif_config_data", 0x1234)
    fake.put("queue_notify_off", 3)
    driver, _ = brought_up(fake, wanted)
    driver.submit(0, [b"x"])
    assert fake.writes[-1] == (0, NOTIFY_AT + 12, width, value)


def test_fewer_vectors_than_queues_are_shared() -> None:
    for vectors, expected in [
        (1, {0: 0, 1: 0, 2: 0, 3: 0}),
        (2, {0: 1, 1: 1, 2: 1, 3: 1}),
        (3, {0: 1, 1: 2, 2: 1, 3: 2}),
        (9, {0: 1, 1: 2, 2: 3, 3: 4}),
    ]:
        for table, messages in ((vectors, 64), (9, vectors)):
            fake = FakePci([*GOOD[:-1], msix(table)], vectors=messages)
            fake.put("num_queues", 4)
            fake.lie("queue_enable", _alternating())
            driver, registers = brought_up(fake)
            assert registers.interrupts.vectors == expected
            called: list[int] = []
            registers.listen(call=called.append, config_changed=lambda: called.append(-1))  # noqa: B023
            fake.message_handler(expected[3])
            assert called == [-1] * (expected[3] == 0) + [each for each in expected if expected[each] == expected[3]]
            assert sorted(driver.queues) == [0, 1, 2, 3]


def _alternating() -> Callable[[], int]:
    """queue_enable of one queue after the other: 0 when looked at, 1 once it was written."""
    state = [1]

    def read() -> int:
        state[0] ^= 1
        return state[0]

    return read


def test_the_line_is_used_without_msix() -> None:
    fake = FakePci(GOOD[:-1])
    _, registers = brought_up(fake)
    assert registers.interrupts.kind == "intx"
    assert fake.read_config(4, 2) == 0x0006
    assert registers.read("config_msix_vector") == registers.read("queue_msix_vector") == NO_VECTOR
    seen: list[object] = []
    registers.listen(call=seen.append, config_changed=lambda: seen.append("config"))
    for status in (0, 1, 2, 3):
        fake.bars[0][ISR_AT] = status
        fake.line_handler()
    assert seen == [0, "config", "config", 0]


def test_msix_or_the_line_as_asked() -> None:
    assert bare(FakePci(vectors=0)).interrupts.kind == "intx"
    registers = open_pci(FakePci(), interrupts="intx", strict=True)
    assert registers.interrupts.kind == "intx"
    with pytest.raises(StateError, match="no MSI-X"):
        open_pci(FakePci(GOOD[:-1]), interrupts="msix")
    with pytest.raises(StatusViolation, match="BadMsixTable"):
        open_pci(FakePci([*GOOD[:-1], msix(table=3)]), interrupts="msix")
    with pytest.raises(InvalidArgument):
        open_pci(FakePci(), interrupts="msi")  # pyright: ignore[reportArgumentType]


def test_a_refused_vector_is_replaced_by_the_shared_one() -> None:
    fake = FakePci()
    fake.lie("queue_msix_vector", lambda: NO_VECTOR if written(fake, "queue_msix_vector") else 0)
    _, registers = brought_up(fake)
    assert registers.interrupts.vectors == {0: 0}


def written(fake: FakePci, register: str) -> int:
    place = COMMON[register]
    return int.from_bytes(fake.bars[0][place.offset : place.offset + place.size], "little")


def test_one_queue_is_reset_and_enabled_again() -> None:
    fake = FakePci()
    driver, registers = brought_up(fake, ALL)
    lost = driver.submit(0, [b"x"])
    assert driver.reset_queue(0) == [lost]
    assert registers.interrupts.vectors == {0: 1}
    assert registers.read("queue_enable") == 1
    assert driver.live


def test_a_slow_device_is_waited_for() -> None:
    """Reset and queue reset take a while; nothing wakes the loop, and nothing takes real time here."""
    fake = FakePci()
    driver, _ = brought_up(fake, ALL)
    left = [20]

    def slow() -> int:
        left[0] -= 1
        return int(left[0] > 0)

    fake.lie("queue_reset", slow)
    driver.reset_queue(0)
    assert 0.015 < fake.clock.now() < 0.1
    left[0] = 20
    fake.lie("device_status", slow)
    driver.reset()
    assert left[0] == 0


# --- the wrong ones -------------------------------------------------------------------------------------------


def lie(register: str, value: int) -> Callable[[FakePci], None]:
    return lambda fake: fake.lie(register, value)


def put(register: str, value: int) -> Callable[[FakePci], None]:
    return lambda fake: fake.put(register, value)


Case = tuple[Callable[[FakePci], object], str, str]

BAD: dict[str, Case] = {
    "queue-size-3": (put("queue_size", 3), "BadQueueSize", "4.1.4.3.1"),
    "queue-size-32769": (put("queue_size", 32769), "BadQueueSize", "4.1.4.3.1"),
    "queue-size-65535": (put("queue_size", 65535), "BadQueueSize", "4.1.4.3.1"),
    "queue-size-refused": (
        lambda fake: fake.lie("queue_size", iter((64, 32)).__next__),
        "QueueSizeRefused",
        "4.1.4.3",
    ),
    "queue-enabled-before": (put("queue_enable", 1), "QueueEnabledOnReset", "4.1.4.3.1"),
    "queue-never-enabled": (lie("queue_enable", 0), "QueueNotEnabled", "4.1.4.3.1"),
    "notify-off-beyond": (put("queue_notify_off", 0x400), "NotifyBeyondRegion", "4.1.4.4.1"),
    "notify-off-all-ones": (put("queue_notify_off", 0xFFFF), "NotifyBeyondRegion", "4.1.4.4.1"),
    "notify-off-times-2-31": (
        lambda fake: (fake.lay([common(), notify(1 << 31), *GOOD[2:]]), fake.put("queue_notify_off", 0xFFFF)),
        "NotifyBeyondRegion",
        "4.1.4.4.1",
    ),
    "notify-last-byte-missing": (
        lambda fake: fake.lay([common(), notify(length=3), *GOOD[2:]]),
        "NotifyBeyondRegion",
        "4.1.4.4.1",
    ),
    "notify-32-bits-misaligned": (
        lambda fake: fake.lay([common(), notify(offset=0x1002, length=0x100), *GOOD[2:]]),
        "NotifyMisaligned",
        "4.1.4.4.1",
    ),
    "notify-32-bits-with-multiplier-2": (
        lambda fake: (fake.lay([common(), notify(2), *GOOD[2:]]), fake.put("queue_notify_off", 1)),
        "NotifyMisaligned",
        "4.1.4.4.1",
    ),
    "queue-vector-refused": (lie("queue_msix_vector", NO_VECTOR), "VectorRefused", "4.1.5.1.2.1"),
    "queue-vector-another": (lie("queue_msix_vector", 3), "VectorMismatch", "4.1.5.1.2.1"),
    "config-vector-refused": (lie("config_msix_vector", NO_VECTOR), "VectorRefused", "4.1.5.1.2.1"),
    "config-vector-another": (lie("config_msix_vector", 5), "VectorMismatch", "4.1.5.1.2.1"),
    "msix-table-forgets": (lambda fake: fake.reads.update({(1, 16): lambda: 0}), "MsixTableNotWritable", "4.1.5.1.2.1"),
    "msix-entry-stays-masked": (
        lambda fake: fake.reads.update({(1, 28): lambda: 1}),
        "MsixTableNotWritable",
        "4.1.5.1.2.1",
    ),
    "reset-register-missing": (
        lambda fake: fake.lay([common(length=0x38), *GOOD[1:]]),
        "CommonTooShort",
        "4.1.4.3",
    ),
    "features-ok-never": (lie("device_status", 0), "StatusBitLost", "2.1"),
    "version-1-missing": (lambda fake: setattr(fake, "features", 0), "Version1NotOffered", "6.2"),
}


@pytest.mark.row("G16", "G17")
@pytest.mark.parametrize(("change", "rule", "clause"), BAD.values(), ids=BAD)
def test_bring_up_ends_with_the_rule_that_was_broken(
    change: Callable[[FakePci], object], rule: str, clause: str
) -> None:
    fake = FakePci()
    change(fake)
    with pytest.raises(StatusViolation) as caught:
        brought_up(fake, ALL)
    assert (caught.value.rule, caught.value.clause) == (rule, clause)
    assert clause in CLAUSES
    assert fake.writes[-1][:3] == (0, COMMON["device_status"].offset, 1)
    assert fake.writes[-1][3] & Status.FAILED


@pytest.mark.row("G17")
def test_features_ok_refused() -> None:
    fake = FakePci()
    fake.lie("device_status", lambda: fake.bars[0][COMMON["device_status"].offset] & ~Status.FEATURES_OK)
    with pytest.raises(StatusViolation) as caught:
        brought_up(fake)
    assert caught.value.rule == "FeaturesRefused"


def test_no_queues() -> None:
    fake = FakePci()
    fake.put("num_queues", 0)
    driver, _ = brought_up(fake)
    assert driver.queues == {}


@pytest.mark.row("G16")
def test_a_queue_of_size_0_is_not_there() -> None:
    fake = FakePci()
    fake.put("queue_size", 0)
    fake.put("num_queues", 3)
    driver, registers = brought_up(fake)
    assert registers.queue_max_sizes() == [0, 0, 0]
    assert driver.queues == {}


def test_65535_queues_are_handled() -> None:
    """That many may be there; a driver whose memory does not hold them all says so, in time."""
    fake = FakePci()
    fake.put("num_queues", 65535)
    start = time.monotonic()
    assert len(bare(fake).queue_max_sizes()) == 65535
    fake.lie("queue_enable", _alternating())
    with pytest.raises(StateError, match="bytes are left"):
        brought_up(fake)
    assert time.monotonic() - start < 20


def test_a_device_that_never_leaves_reset() -> None:
    fake = FakePci()
    fake.lie("device_status", 0x0F)
    with pytest.raises(PeerTimeout, match="the end of the reset"):
        brought_up(fake)
    assert fake.clock.now() == pytest.approx(10, abs=0.1)


def test_a_queue_that_never_leaves_reset() -> None:
    fake = FakePci()
    driver, registers = brought_up(fake, ALL)
    fake.lie("queue_reset", 1)
    with pytest.raises(PeerTimeout, match="reset of queue 0"):
        driver.reset_queue(0)
    assert 0 in driver.queues, "its buffers are still the device's"
    fake.lie("queue_reset", 0)
    fake.lie("queue_enable", 1)
    with pytest.raises(StatusViolation, match="QueueStillEnabled"):
        registers.reset_queue(0)


def test_a_queue_reset_needs_the_feature_and_the_queue() -> None:
    _, registers = brought_up(FakePci(), FeatureSet())
    with pytest.raises(NoFeature):
        registers.reset_queue(0)
    _, registers = brought_up(FakePci(), ALL)
    with pytest.raises(InvalidArgument):
        registers.reset_queue(1)


@pytest.mark.row("G15", "T10")
def test_a_generation_that_never_stands_still() -> None:
    fake = FakePci()
    driver, _ = brought_up(fake)
    count = [0]

    def moving() -> int:
        count[0] = (count[0] + 1) % 256
        return count[0]

    fake.lie("config_generation", moving)
    with pytest.raises(StatusViolation, match="ConfigNeverStable"):
        driver.read_config(0, 4)


@pytest.mark.row("G15")
def test_a_configuration_space_that_is_too_short() -> None:
    fake = FakePci([common(), notify(), isr(), device(length=6), window(), msix()])
    driver, registers = brought_up(fake)
    assert driver.read_config(2, 4) == bytes(4)
    with pytest.raises(StatusViolation, match="ConfigTooShort"):
        driver.read_config(4, 4)
    for offset, length in ((4, 4), (-1, 1), (0, 7), (6, 1)):
        with pytest.raises(InvalidArgument):
            registers.read_config(offset, length)
        with pytest.raises(InvalidArgument):
            registers.write_config(offset, bytes(length))
    none = bare(FakePci([common(), notify(), isr(), window(), msix()]))
    assert none.config_size() == 0


def test_configuration_is_read_and_written_in_natural_pieces() -> None:
    fake = FakePci()
    registers = bare(fake)
    fake.bars[0][DEVICE_AT : DEVICE_AT + 16] = bytes(range(16))
    for offset, length, steps in [
        (0, 1, [(0, 1)]),
        (2, 2, [(2, 2)]),
        (4, 4, [(4, 4)]),
        (8, 8, [(8, 4), (12, 4)]),
        (4, 8, [(4, 4), (8, 4)]),
        (1, 2, [(1, 1), (2, 1)]),
        (0, 6, [(at, 1) for at in range(6)]),
        (0, 0, []),
    ]:
        fake.accesses.clear()
        assert registers.read_config(offset, length) == bytes(range(offset, offset + length))
        assert [(at - DEVICE_AT, size) for _, at, size in fake.accesses] == steps
        registers.write_config(offset, bytes(range(offset, offset + length)))
    assert fake.bars[0][DEVICE_AT : DEVICE_AT + 16] == bytes(range(16))


def test_a_device_that_goes_away_reads_as_ones() -> None:
    fake = FakePci()
    driver, _ = brought_up(fake, ALL)
    request = driver.submit(0, [b"x"], [4])
    fake.reads = {(0, at): lambda: 0xFFFF_FFFF for at in range(COMMON_AT, 0x40)}
    with pytest.raises(VirtioTestError):
        request.wait()
    assert request.done, "the status says NEEDS_RESET, among everything else"
    with pytest.raises(PeerTimeout):
        driver.initialize()


@pytest.mark.row("G09")
@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_a_line_that_is_never_lowered(status: int) -> None:
    """4.1.4.5.1: reading clears. On a virtual clock nothing else would end the wait."""
    fake = FakePci(GOOD[:-1])
    driver, _ = brought_up(fake)
    request = driver.submit(0, [b"x"], [4])
    fake.reads[0, ISR_AT] = lambda: status
    fake.hold_line()
    with pytest.raises(StatusViolation, match="LineNeverLowered"):
        request.wait()


@pytest.mark.row("G09")
def test_spurious_messages_and_calls_before_bring_up() -> None:
    fake = FakePci()
    registers = bare(fake)
    driver = Driver(registers)
    for vector in (0, 1, 5, 77):
        fake.message_handler(vector)
    driver.initialize()
    for vector in (0, 1, 5, 77):
        fake.message_handler(vector)
    assert driver.live


def test_64_bit_addresses_are_two_halves() -> None:
    fake = FakePci()
    registers = bare(fake)
    registers.write("queue_desc", 0x1234_5678_9ABC_DEF0)
    place = COMMON["queue_desc"].offset
    assert fake.writes[-2:] == [(0, place, 4, 0x9ABC_DEF0), (0, place + 4, 4, 0x1234_5678)]
    assert fake.bars[0][place : place + 8] == le(0x1234_5678_9ABC_DEF0, 8)
    assert registers.read("queue_desc") == 0x1234_5678_9ABC_DEF0
