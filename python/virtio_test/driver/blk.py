"""The driver of a block device (VIRTIO 1.4, 5.2): requests of every type, each answer judged.

Theory
------
Every request is laid out as the legacy interface wants it (5.2.6.4) and any device must take it: one descriptor with
the header, then the data, then one byte of its own for the status. That byte is set to 0xff, which no device answers,
so a status that was never written is found.

What is judged, with the error that the request then ends with:

* `UsedLengthShort` (2.7.8.2): fewer bytes are said to be written than data and status have, so neither can be relied
  on. Devices that count only the status when they refuse, or nothing at all, are common: an answer without data is
  taken as it is where the driver's policy takes lengths from devices that say too little (`used_without_write`).
  Through the legacy interface lengths mean nothing (5.2.6.3).
* `StatusMissing`, `StatusUnknown` (5.2.6): the status byte is as it was, or of no defined value.
* `ReservedLifetime` (5.2.6.2), and at bring-up `BadNumQueues` and `BadSegments` (5.2.4): limits that leave no room
  for a sector.

A status other than OK is no broken rule: the request ends with `RequestFailed`, and its `status` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from virtio_test._core import Policy
from virtio_test.config import ConfigLayout
from virtio_test.errors import (
    AnswerViolation,
    InvalidArgument,
    NoFeature,
    PeerError,
    QueueFull,
    RequestFailed,
    StateError,
)
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import (
    CONFIG_FIELDS,
    FEATURE_NAMES,
    FIELD_FEATURES,
    HEADER,
    ID_SIZE,
    LIFETIME,
    LIFETIME_LIMITS,
    SECTOR,
    SEGMENT,
    SEGMENT_UNMAP,
    RequestStatus,
    RequestType,
)

from .alloc import Arena
from .base import DRIVER_FEATURES, Driver
from .registers import Registers
from .request import Request

__all__ = ["BlkDriver", "BlkRequest", "Lifetime"]

_WANTED: Final = FeatureSet(*FEATURE_NAMES, device=FEATURE_NAMES) - FeatureSet("ZONED", device=FEATURE_NAMES)
_NONE: Final = FeatureSet(device=FEATURE_NAMES)
_ZONED: Final = FeatureSet("ZONED", device=FEATURE_NAMES)
_UNSET: Final = 0xFF
_SHOWN: Final = 16
_MAX_TRANSFER: Final = 1 << 20
_INDIRECT_SEGMENTS: Final = 14
_MASK: Final = 0xFFFF_FFFF
_MAX_SEGMENTS: Final = 32768
"""Descriptors of the largest queue."""


class Lifetime(NamedTuple):
    """Wear of the storage (5.2.6): reserved blocks 0 to 3, and two estimates in tenths, 0 to 11; 0 is unknown."""

    pre_eol_info: int
    typ_a: int
    typ_b: int


@dataclass(eq=False, slots=True)
class BlkRequest:
    """One request in flight.

    Attributes:
        kind: its type; any number, where a test asks for one.
        sector: the sector of its header.
        request: the chain; None until it is submitted.
        on_done: called once with this object, in the owner loop, when it is back or lost.
        done: whether it is back or lost.
        status: the status byte; None while there is none, or none that can be believed.
        data: what the device wrote before it.
        error: why it failed or is lost; None when it was done.
    """

    kind: int
    sector: int
    on_done: Callable[[BlkRequest], object] | None = field(default=None, repr=False)
    request: Request | None = field(default=None, repr=False)
    done: bool = False
    status: int | None = None
    data: bytes = field(default=b"", repr=False)
    error: Exception | None = None

    def wait(self, *, timeout: float | None = None) -> bytes:
        """Run the loop until it is back; its data. `timeout` in seconds, the driver's own when None.

        Raises:
            PeerTimeout: the device did not answer; the request is still in flight.
            RequestFailed: the device could not do it.
            AnswerViolation: its answer broke a rule.
            Exception: why it is lost.
        """
        if self.request is None:
            raise StateError("the request was never submitted")
        if not self.done:
            self.request.driver.run_until(lambda: self.done, f"the answer to {self}", timeout=timeout)
        if self.error is not None:
            raise self.error
        return self.data

    def __str__(self) -> str:
        known = RequestType(self.kind).name if self.kind in set(RequestType) else f"request type {self.kind}"
        return f"{known} at sector {self.sector}"


class BlkDriver(Driver):
    """The driver of a block device.

    Args:
        registers: the device as the transport shows it.
        wanted: features to accept, of the class and of the ring; all that the driver knows, when None. ZONED is never
            accepted (5.2.5.1).
        required: features without which `initialize` fails.
        queue_size: largest size of a queue.
        indirect: put every chain into an indirect table, where INDIRECT_DESC is negotiated.
        policy: tolerances towards the device's used rings.
        arena: where rings and buffers lie.
        timeout: seconds of the loop's clock that waits take at most.
        max_transfer: bytes of data that `read` and `write` put into one request at most.

    Attributes:
        capacity: sectors of 512 bytes; follows the device's configuration changes.
    """

    def __init__(
        self,
        registers: Registers,
        *,
        wanted: FeatureSet | None = None,
        required: FeatureSet | None = None,
        queue_size: int | None = None,
        indirect: bool = False,
        policy: Policy = Policy.interop,
        arena: Arena | None = None,
        timeout: float = 10.0,
        max_transfer: int = _MAX_TRANSFER,
    ) -> None:
        if max_transfer < SECTOR:
            raise InvalidArgument(f"max_transfer is {max_transfer}; one sector of {SECTOR} bytes is the least")
        super().__init__(
            registers,
            wanted=_WANTED | DRIVER_FEATURES if wanted is None else (_NONE | wanted) - _ZONED,
            required=required,
            layout=ConfigLayout(*CONFIG_FIELDS),
            queue_size=queue_size,
            indirect=indirect,
            policy=policy,
            arena=arena,
            timeout=timeout,
        )
        self.max_transfer = max_transfer
        self.capacity = 0
        self._size_max: int | None = None
        self._seg_max: int | None = None
        self._num_queues = 1
        self._requests: dict[int, BlkRequest] = {}
        self._said = 0

    # --- the configuration space ----------------------------------------------------------------------------

    def field(self, name: str) -> int | None:
        """A number of the configuration space; None when the feature that it depends on was not negotiated."""
        if name in FIELD_FEATURES and FIELD_FEATURES[name] not in self.features:
            return None
        value = self.read_field(name)
        assert isinstance(value, int)
        return value

    @property
    def read_only(self) -> bool:
        """Whether the device fails writes."""
        return "RO" in self.features

    @property
    def block_size(self) -> int:
        """Bytes of a block, 512 when the device does not say."""
        return self.field("blk_size") or SECTOR

    @property
    def geometry(self) -> tuple[int, int, int] | None:
        """Cylinders, heads and sectors, if the device has them."""
        if "GEOMETRY" not in self.features:
            return None
        return self.field("cylinders") or 0, self.field("heads") or 0, self.field("sectors") or 0

    @property
    def num_queues(self) -> int:
        """Request queues, as the device has said at bring-up: 1 without MQ (5.2.2)."""
        return self._num_queues

    @property
    def writeback(self) -> bool:
        """Whether a write needs a flush to be stable (5.2.5.1)."""
        mode = self.field("writeback")
        return "FLUSH" in self.features if mode is None else mode != 0

    @writeback.setter
    def writeback(self, on: bool) -> None:
        self._needs("CONFIG_WCE")
        self.write_field("writeback", int(on))

    def set_up(self) -> None:
        """See `Driver.set_up`."""
        self._size_max = self.field("size_max") or None
        self._seg_max = self.field("seg_max") or (1 if "SEG_MAX" in self.features else None)
        self.capacity = self.field("capacity") or 0
        # Read once: it is what the requests are spread over.
        shown = self.field("num_queues")
        self._num_queues = 1 if shown is None else shown
        if not self._num_queues or any(index not in self.queues for index in range(self._num_queues)):
            message = f"num_queues is {shown}, and there are the queues {sorted(self.queues)[:_SHOWN]}"
            raise AnswerViolation("BadNumQueues", "5.2.4", message)
        if self._size_max is not None and self._size_max * self._segments() < SECTOR:
            message = f"size_max is {self._size_max}, with {self._segments()} segments: no sector fits into a request"
            raise AnswerViolation("BadSegments", "5.2.4", message)

    def config_changed(self) -> None:
        """See `Driver.config_changed`; the capacity may be another one (5.2.6.1)."""
        self.capacity = self.field("capacity") or 0

    # --- single requests ------------------------------------------------------------------------------------

    def submit_request(
        self,
        kind: int,
        sector: int,
        data: bytes = b"",
        room: int = 0,
        *,
        queue: int = 0,
        publish: bool = True,
        on_done: Callable[[BlkRequest], object] | None = None,
    ) -> BlkRequest:
        """Send any request, right or wrong: nothing but the answer is judged.

        Args:
            kind: the type.
            sector: the sector.
            data: what the device reads behind the header.
            room: bytes that it may write before the status.
            queue: the virtqueue.
            publish: make it visible and kick now; else `flush(queue)` does, for many at once.
            on_done: called once, in the owner loop.

        Raises:
            StateError: the driver is not up, or its memory is used up.
            QueueFull: no descriptors are free.
            InvalidArgument: more segments than a chain can have.
        """
        blk = BlkRequest(kind, sector, on_done)
        readable = [HEADER.pack(kind, 0, sector), *(data[start:end] for start, end in self._cut(len(data)))]
        writable = [*(end - start for start, end in self._cut(room)), 1]
        request = self.submit(queue, readable, writable, publish=False, on_done=self._request_done)
        blk.request = request
        self._requests[id(request)] = blk
        # Nobody has seen it yet: a status that stays like this was not written by the device.
        self.memory.write(request.writable[-1][0], bytes((_UNSET,)))
        if publish and self.live:
            self.flush(queue)
        return blk

    def submit_read(
        self,
        sector: int,
        count: int,
        *,
        queue: int = 0,
        publish: bool = True,
        on_done: Callable[[BlkRequest], object] | None = None,
    ) -> BlkRequest:
        """Read `count` sectors in one request; `wait()` returns them. Errors as for `submit_request`."""
        self._check_range(sector, count * SECTOR)
        return self.submit_request(
            RequestType.IN, sector, room=count * SECTOR, queue=queue, publish=publish, on_done=on_done
        )

    def submit_write(
        self,
        sector: int,
        data: bytes,
        *,
        queue: int = 0,
        publish: bool = True,
        on_done: Callable[[BlkRequest], object] | None = None,
    ) -> BlkRequest:
        """Write whole sectors in one request. Errors as for `submit_request`."""
        self._check_range(sector, len(data))
        return self.submit_request(RequestType.OUT, sector, data, queue=queue, publish=publish, on_done=on_done)

    def submit_flush(self, *, queue: int = 0, publish: bool = True) -> BlkRequest:
        """Make what is written stable.

        Raises:
            NoFeature: FLUSH was not negotiated.
        """
        self._needs("FLUSH")
        return self.submit_request(RequestType.FLUSH, 0, queue=queue, publish=publish)

    def submit_discard(self, segments: Sequence[tuple[int, int]], *, queue: int = 0) -> BlkRequest:
        """Discard (sector, count) ranges in one request.

        Raises:
            NoFeature: DISCARD was not negotiated.
            InvalidArgument: more or larger segments than the device takes.
        """
        return self._submit_segments(RequestType.DISCARD, "discard", segments, 0, queue)

    def submit_write_zeroes(
        self, segments: Sequence[tuple[int, int]], *, unmap: bool = False, queue: int = 0
    ) -> BlkRequest:
        """Make (sector, count) ranges read as zeros; with `unmap` the device may give their place away.

        Raises:
            NoFeature: WRITE_ZEROES was not negotiated.
            InvalidArgument: more or larger segments than the device takes.
        """
        return self._submit_segments(RequestType.WRITE_ZEROES, "write_zeroes", segments, SEGMENT_UNMAP * unmap, queue)

    def _submit_segments(
        self, kind: RequestType, name: str, segments: Sequence[tuple[int, int]], flags: int, queue: int
    ) -> BlkRequest:
        self._needs(kind.name)
        most, longest = self.field(f"max_{name}_seg") or 0, self.field(f"max_{name}_sectors") or 0
        if not 1 <= len(segments) <= most or any(not 0 <= count <= longest for _, count in segments):
            raise InvalidArgument(f"{kind.name} of {segments}: 1 to {most} segments of at most {longest} sectors")
        for sector, count in segments:
            self._check_range(sector, count * SECTOR)
        return self.submit_request(kind, 0, b"".join(SEGMENT.pack(*each, flags) for each in segments), queue=queue)

    # --- requests that wait ---------------------------------------------------------------------------------

    def identify(self, *, timeout: float | None = None) -> str:
        """The device ID string (GET_ID)."""
        data = self.submit_request(RequestType.GET_ID, 0, room=ID_SIZE).wait(timeout=timeout)
        return data.split(b"\0", 1)[0].decode("ascii", "backslashreplace")

    def get_lifetime(self, *, timeout: float | None = None) -> Lifetime:
        """The wear of the storage.

        Raises:
            NoFeature: LIFETIME was not negotiated.
            AnswerViolation: `ReservedLifetime` (5.2.6.2).
        """
        self._needs("LIFETIME")
        answer = self.submit_request(RequestType.GET_LIFETIME, 0, room=LIFETIME.size).wait(timeout=timeout)
        values = Lifetime(*LIFETIME.unpack(answer))
        if any(value > limit for value, limit in zip(values, LIFETIME_LIMITS, strict=True)):
            raise AnswerViolation("ReservedLifetime", "5.2.6.2", f"{values}, where {LIFETIME_LIMITS} is the most")
        return values

    def read(self, sector: int, count: int, *, queue: int = 0, timeout: float | None = None) -> bytes:
        """`count` sectors, in as many requests as the device's limits make of it, many in flight at once.

        Raises:
            PeerError: the first request that failed, broke a rule or did not come back.
            InvalidArgument: beyond the capacity.
        """
        self._check_range(sector, count * SECTOR)
        step = self._step()
        parts = [(place, min(step, sector + count - place)) for place in range(sector, sector + count, step)]
        return b"".join(
            self._all(
                [lambda each=each: self.submit_read(*each, queue=queue, publish=False) for each in parts], timeout
            )
        )

    def write(self, sector: int, data: bytes, *, queue: int = 0, timeout: float | None = None) -> None:
        """Write whole sectors; requests and errors as for `read`."""
        self._check_range(sector, len(data))
        step = self._step()
        parts = [
            (sector + start // SECTOR, data[start : start + step * SECTOR])
            for start in range(0, len(data), step * SECTOR)
        ]
        self._all([lambda each=each: self.submit_write(*each, queue=queue, publish=False) for each in parts], timeout)

    def flush_cache(self, *, timeout: float | None = None) -> None:
        """Return when what is written is stable (FLUSH)."""
        self.submit_flush().wait(timeout=timeout)

    def discard(self, sector: int, count: int, *, timeout: float | None = None) -> None:
        """Discard one range."""
        self.submit_discard([(sector, count)]).wait(timeout=timeout)

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False, timeout: float | None = None) -> None:
        """Make one range read as zeros."""
        self.submit_write_zeroes([(sector, count)], unmap=unmap).wait(timeout=timeout)

    def _all(self, submits: Sequence[Callable[[], BlkRequest]], timeout: float | None) -> list[bytes]:
        """Submit all, as many at once as queue and memory hold; their data in order."""
        requests: list[BlkRequest] = []
        for submit in submits:
            while True:
                try:
                    requests.append(submit())
                    break
                except (QueueFull, StateError):
                    waiting = next((each for each in requests if not each.done), None)
                    if waiting is None:
                        raise
                    self._flush_all()
                    waiting.wait(timeout=timeout)
        if requests:
            self._flush_all()
        return [each.wait(timeout=timeout) for each in requests]

    def _flush_all(self) -> None:
        for index in self.queues:
            self.flush(index)

    # --- inside ---------------------------------------------------------------------------------------------

    def _needs(self, feature: str) -> None:
        if feature not in self.features:
            raise NoFeature(f"{feature} was not negotiated")

    def _check_range(self, sector: int, length: int) -> None:
        if sector < 0 or length < 0 or length % SECTOR or sector * SECTOR + length > self.capacity * SECTOR:
            raise InvalidArgument(
                f"{length} bytes at sector {sector}: whole sectors of {SECTOR} bytes below {self.capacity} are wanted"
            )

    def _segments(self) -> int:
        """Segments of data that one chain can have."""
        size = min((queue.size for queue in self.queues.values()), default=0)
        limits = [max(1, size - 2), self._seg_max, _INDIRECT_SEGMENTS if self.indirect else None]
        return min(each for each in limits if each is not None)

    @property
    def sectors_at_once(self) -> int:
        """Sectors that `read` and `write` put into one request, by the device's limits and our own."""
        return self._step()

    def _step(self) -> int:
        size = (
            self.max_transfer if self._size_max is None else min(self.max_transfer, self._size_max * self._segments())
        )
        return max(1, size // SECTOR)

    def _cut(self, length: int) -> list[tuple[int, int]]:
        """The segments of `length` bytes of data, none longer than the device takes (SIZE_MAX)."""
        step = min(self._size_max or _MASK, _MASK)
        if length > step * _MAX_SEGMENTS:
            raise InvalidArgument(f"{length} bytes of data in segments of {step} are more than any chain has")
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def _complete(self, queue_index: int, token: int, written: int) -> None:
        # The whole buffer is read, whatever the length says of it: it is judged together with the status.
        self._said = written
        request = self._flying[queue_index, token]
        whole = sum(length for _, length in request.writable)
        super()._complete(queue_index, token, whole if id(request) in self._requests else written)

    def _request_done(self, request: Request) -> None:
        blk = self._requests.pop(id(request))
        blk.error = request.error
        if request.error is None:
            request.written = self._said
            self._judge(blk, request.data, self._said)
        blk.done = True
        if blk.on_done is not None:
            blk.on_done(blk)

    def _judge(self, blk: BlkRequest, answer: bytes, said: int) -> None:
        status, data = answer[-1], answer[:-1]
        done = status == RequestStatus.OK
        short = said < len(answer) and not self.registers.legacy
        if status == _UNSET:
            blk.error = self._violation(blk, "StatusMissing", "5.2.6", "the status byte was not written")
        elif short and ((done and data) or not self.policy.switches()["used_without_write"]):
            message = f"{said} bytes are said to be written, data and status have {len(answer)}"
            blk.error = self._violation(blk, "UsedLengthShort", "2.7.8.2", message)
        elif status not in set(RequestStatus):
            blk.error = self._violation(blk, "StatusUnknown", "5.2.6", f"the status is {status}")
        else:
            # Of what is not said to be written nobody knows where it comes from.
            blk.status, blk.data = status, b"" if short else data
            if not done:
                blk.error = RequestFailed(f"{blk} was answered {RequestStatus(status).name}")

    @staticmethod
    def _violation(blk: BlkRequest, rule: str, clause: str, message: str) -> PeerError:
        queue = blk.request.queue_index if blk.request is not None else None
        return AnswerViolation(rule, clause, f"{blk}: {message}", queue=queue)
