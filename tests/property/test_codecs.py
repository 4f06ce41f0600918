"""What the fuzzer of the Python codecs holds them to, with a few bytes of Hypothesis' own (see `fuzz/codecs.py`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from virtio_test.carrier.vfio_user.messages import COMMANDS
from virtio_test.transport.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS

from fuzz import codecs

BYTES = st.binary(max_size=200)


def bare(pack: Callable[[int, int], bytes], numbers: list[int], first: tuple[int, ...]) -> st.SearchStrategy[bytes]:
    """Streams of headers that fit, with any bytes behind each."""

    def stream(head: int, cut: int, parts: list[tuple[int, int, bytes]]) -> bytes:
        body = b"".join(pack(number, len(data)) + data + bytes(more) for number, more, data in parts)
        return bytes((head, cut)) + body

    part = st.tuples(st.sampled_from(numbers), st.just(0), st.binary(max_size=80))
    return st.builds(stream, st.sampled_from(first), st.integers(0, 255), st.lists(part, min_size=1, max_size=3))


VHOST = bare(
    lambda number, size: b"".join(value.to_bytes(4, "little") for value in (number, 1, size)),
    sorted({*FRONTEND_REQUESTS, *BACKEND_REQUESTS, 999}),
    (0, 1, 0x41, 0xC1),
)
VFIO = bare(
    lambda number, size: (
        (7).to_bytes(2, "little")
        + number.to_bytes(2, "little")
        + b"".join(value.to_bytes(4, "little") for value in (16 + size, 0, 0))
    ),
    sorted({*COMMANDS, 999}),
    (0, 1, 0x41),
)


def _inflight(size: int) -> bytes:
    """A GET_INFLIGHT_FD with so much of its 20 bytes and their padding."""
    return b"\1\0" + b"".join(word.to_bytes(4, "little") for word in (31, 1, size)) + b"\7" * size


@given(VHOST | BYTES)
@example(_inflight(20))
@example(_inflight(24))
def test_vhost_user(data: bytes) -> None:
    codecs.vhost_user(data)


@given(VFIO | BYTES)
def test_vfio_user(data: bytes) -> None:
    codecs.vfio_user(data)


@given(st.binary(min_size=9, max_size=200))
@example(bytes(9) + (1).to_bytes(8, "little") + bytes((1, 0, 4, 0)) + bytes(100))
def test_inflight(data: bytes) -> None:
    codecs.inflight(data)


@given(BYTES)
def test_case(data: bytes) -> None:
    codecs.case(data)


@given(st.binary(min_size=3, max_size=60))
def test_uml(data: bytes) -> None:
    codecs.uml(data)


def test_saved() -> None:
    for seed in range(3):
        codecs.saved(bytes((seed * 37 + place) % 251 for place in range(400)))


def test_an_oracle_that_is_broken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer would see a codec that loses a byte."""
    number = next(number for number, row in FRONTEND_REQUESTS.items() if row.payload.sizes() == (8, 8))
    stream = b"\x01\xff" + b"".join(value.to_bytes(4, "little") for value in (number, 1, 8)) + bytes(range(8))
    codecs.vhost_user(stream)

    def loses(_: object) -> bytes:
        return bytes(8)

    monkeypatch.setattr(FRONTEND_REQUESTS[number].payload, "pack", loses)
    with pytest.raises(AssertionError):
        codecs.vhost_user(stream)
