"""The message table of vhost-user: complete, consistent, and the layouts that peers really send."""

from __future__ import annotations

import struct

import pytest
from virtio_test.transport.vhost_user import payloads as p
from virtio_test.transport.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    MAX_PAYLOAD,
    BackendRequest,
    ProtocolFeature,
    Request,
    Row,
    render,
)
from virtio_test.transport.vhost_user.rules import MESSAGE_RULES, violation

ROWS = [*FRONTEND_REQUESTS.values(), *BACKEND_REQUESTS.values()]
KINDS = sorted({row.payload for row in ROWS} | {row.reply for row in ROWS if row.reply}, key=lambda kind: kind.__name__)


def test_every_request_has_one_row() -> None:
    assert set(FRONTEND_REQUESTS) == set(Request) == set(range(1, 46))
    assert set(BACKEND_REQUESTS) == set(BackendRequest) == set(range(1, 11))
    assert all(
        number == row.request for table in (FRONTEND_REQUESTS, BACKEND_REQUESTS) for number, row in table.items()
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_consistent(row: Row) -> None:
    for kind in (row.payload, row.reply or p.Empty):
        least, largest = kind.sizes()
        assert 0 <= least <= largest <= MAX_PAYLOAD
    for least, largest in (row.fds, row.reply_fds):
        assert 0 <= least <= largest <= p.MAX_TABLE_REGIONS
    assert row.needs is None or row.needs in ProtocolFeature


# Sizes as QEMU's, DPDK's and UML's C structures have them.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (p.Empty, (0, 0)),
        (p.U64, (8, 8)),
        (p.VringState, (8, 8)),
        (p.VringAddress, (40, 40)),
        (p.MemoryTable, (8, 264)),
        (p.SingleRegion, (40, 40)),
        (p.Log, (16, 16)),
        (p.Iotlb, (32, 32)),
        (p.Config, (12, 4096)),
        (p.Area, (24, 24)),
        (p.Inflight, (20, 24)),
        (p.SharedObject, (16, 16)),
        (p.DeviceState, (8, 8)),
        (p.SharedMemoryMap, (40, 40)),
        (p.SharedMemoryConfig, (2056, 2056)),
    ],
)
def test_payload_sizes(kind: type[p.Payload], sizes: tuple[int, int]) -> None:
    assert kind.sizes() == sizes


SAMPLES: list[p.Payload] = [
    p.Empty(),
    p.U64(0x0123_4567_89AB_CDEF),
    p.VringState(3, 7),
    p.VringAddress(1, 0, 0x1000, 0x3000, 0x2000, 5),
    p.MemoryTable(()),
    p.MemoryTable((p.MemoryRegion(0, 4096, 8192, 0), p.MemoryRegion(4096, 4096, 1 << 40, 4096))),
    p.SingleRegion(1, 2, 3, 4),
    p.Log(1, 2),
    p.Iotlb(1, 2, 3, 3, 2),
    p.Config(0, 3, 1, b"abc"),
    p.CryptoSession(b"anything"),
    p.Area(1, 2, 3),
    p.Inflight(1, 2, 3, 4),
    p.SharedObject(bytes(range(16))),
    p.DeviceState(1, 0),
    p.SharedMemoryMap(1, 2, 3, 4, 1),
    p.SharedMemoryConfig((4096, 0, 8192) + (0,) * 253),
]


def test_the_samples_cover_every_payload() -> None:
    assert {type(sample) for sample in SAMPLES} == set(KINDS)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_payload_comes_back_as_it_was(sample: p.Payload) -> None:
    data = sample.pack()
    least, largest = type(sample).sizes()
    assert least <= len(data) <= largest
    assert type(sample).parse(data) == sample
    assert eval(repr(sample), dict(vars(p))) == sample


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_payload_of_another_size_is_refused(kind: type[p.Payload]) -> None:
    least, largest = kind.sizes()
    for size in {least - 1, largest + 1} - {-1}:
        with pytest.raises(ValueError, match="bytes of payload"):
            kind.parse(bytes(size))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (p.Config, struct.pack("=III", 0, 0, 0)),
        (p.Config, struct.pack("=III", 0, 4084, 0) + bytes(4084)),
        (p.CryptoSession, bytes(4096)),
        (p.MemoryTable, struct.pack("=II", 8, 0) + bytes(8 * 32)),
    ],
)
def test_the_least_and_the_largest_payload_are_taken(kind: type[p.Payload], data: bytes) -> None:
    assert kind.parse(data).pack() == data


def test_a_memory_table_of_one_region_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="296 bytes of payload"):
        p.MemoryTable.parse(struct.pack("=II", 9, 0) + bytes(9 * 32))


def test_the_address_payload_has_the_order_of_the_protocol() -> None:
    address = p.VringAddress(index=1, flags=2, descriptor=3, used=4, available=5, log=6)
    assert address.pack() == struct.pack("=IIQQQQ", 1, 2, 3, 4, 5, 6)


def test_a_memory_table_may_have_more_room_than_regions() -> None:
    # UML counts one region and sends room for two.
    data = struct.pack("=II4Q", 1, 0, 1, 2, 3, 4) + bytes(32)
    assert p.MemoryTable.parse(data).regions == (p.MemoryRegion(1, 2, 3, 4),)


@pytest.mark.parametrize("count", [2, 9, 0xFFFF_FFFF])
def test_a_memory_table_cannot_count_more_than_it_has(count: int) -> None:
    with pytest.raises(ValueError, match="are counted"):
        p.MemoryTable.parse(struct.pack("=II", count, 0) + bytes(32))


@pytest.mark.parametrize("size", [0, 2, 4, 0xFFFF_FFFF])
def test_a_configuration_access_has_as_many_bytes_as_it_says(size: int) -> None:
    with pytest.raises(ValueError, match="are announced"):
        p.Config.parse(struct.pack("=III", 0, size, 0) + b"abc")


def test_inflight_may_come_with_the_padding_of_its_c_structure() -> None:
    assert p.Inflight.parse(struct.pack("=QQHH4x", 1, 2, 3, 4)) == p.Inflight(1, 2, 3, 4)


def test_render_names_every_request() -> None:
    text = render()
    for row in ROWS:
        assert f" {row.name}: " in text
    assert " 12 SET_VRING_KICK: value u64; fds 0 to 1; reply: only with NEED_REPLY\n" in text
    assert " 40 GET_STATUS: nothing; fds 0; reply: value u64; needs STATUS\n" in text


def test_a_violation_names_rule_and_section() -> None:
    error = violation("VringBase", "base 9 of a ring of 8", queue=2)
    assert (error.rule, error.queue) == ("VringBase", 2)
    assert str(error) == (
        "VringBase (vhost-user, VHOST_USER_SET_VRING_BASE): base 9 of a ring of 8; expected: The base lies within the "
        "ring [queue 2]"
    )
    assert all(rule.name == name and rule.summary and rule.row for name, rule in MESSAGE_RULES.items())
