"""What ``virtio-test drive`` has each kind of device do, and how it judges what comes back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Generic, Protocol, TypeVar

from virtio_test.device import RING_FEATURES
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.registers import Registers
from virtio_test.driver.rng import RngDriver
from virtio_test.driver.test import TestDriver
from virtio_test.errors import AnswerViolation, InvalidArgument, PeerError, QueueFull, RequestFailed, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import FEATURE_NAMES, SECTOR

__all__ = ["BlkWork", "RngWork", "TestWork", "Work"]

_BLOCK: Final = 4096
_SCRATCH_BLOCKS: Final = 256
_RANDOM_BYTES: Final = 64
_TELLING_BYTES: Final = 16
"""So many random bytes are never alike by chance."""

T = TypeVar("T")
D = TypeVar("D", bound=Driver)


class _Answer(Protocol):
    def wait(self) -> bytes: ...


class Work(ABC, Generic[D]):
    """A driver and its work.

    Args:
        registers: the device.
        packed: accept packed rings.
        indirect: put every chain into an indirect table.
        timeout: seconds that an answer may take.
        write: change what the device stores.

    Attributes:
        driver: the driver.
        requests: how many were answered, and rightly.
        bytes: of their data.
        depth: how many to have in flight at once.
        tick: called with `requests` when that has grown.
    """

    def __init__(
        self, registers: Registers, *, packed: bool, indirect: bool, timeout: float, write: bool = False
    ) -> None:
        self._ring = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
        self._write = write
        self.requests = 0
        self.bytes = 0
        self.depth = 1
        self.tick: Callable[[int], object] = lambda _: None
        self.driver: D = self._driver(registers, indirect=indirect, timeout=timeout)

    @abstractmethod
    def _driver(self, registers: Registers, *, indirect: bool, timeout: float) -> D:
        """The driver, not brought up yet."""

    @abstractmethod
    def run(self, count: int) -> None:
        """Send `count` requests.

        Raises:
            PeerError: an answer was wrong, or did not come.
        """

    def facts(self) -> dict[str, object]:
        """What the device says of itself, once it is up."""
        return {}

    def _pump(self, items: Iterable[T], submit: Callable[[T], _Answer], check: Callable[[T, bytes], object]) -> None:
        """Keep `depth` requests in flight; check the answers in the order of the requests."""
        flying: deque[tuple[T, _Answer]] = deque()

        def take() -> None:
            item, answer = flying.popleft()
            data = answer.wait()
            check(item, data)
            self.requests += 1
            self.bytes += len(data)
            self.tick(self.requests)

        for item in items:
            if len(flying) >= self.depth:
                take()
            while True:
                try:
                    flying.append((item, submit(item)))
                    break
                except (QueueFull, StateError):
                    # No descriptors, or no memory for as much at once.
                    if not flying:
                        raise
                    take()
        while flying:
            take()


class TestWork(Work[TestDriver]):
    """Requests of the test device: each number comes back with 100 added."""

    __test__ = False  # a name that pytest would collect

    def _driver(self, registers: Registers, *, indirect: bool, timeout: float) -> TestDriver:
        return TestDriver(registers, console=lambda _: None, wanted=self._ring, indirect=indirect, timeout=timeout)

    def run(self, count: int) -> None:
        """See `Work.run`."""
        self._pump((number % 256 for number in range(count)), self.driver.submit_number, self._check)

    @staticmethod
    def _check(number: int, response: bytes) -> None:
        wanted = tuple((number + step) % 256 + 100 for step in (1, 2, 3))
        found = tuple(TestDriver.parse(response))
        if found != wanted:
            raise PeerError(f"the request {number} was answered {found}, where {wanted} is right")


class RngWork(Work[RngDriver]):
    """Reads of an entropy device: something comes, not too much, not always the same."""

    def _driver(self, registers: Registers, *, indirect: bool, timeout: float) -> RngDriver:
        self._last = b""
        return RngDriver(registers, wanted=self._ring, indirect=indirect, timeout=timeout)

    def run(self, count: int) -> None:
        """See `Work.run`."""
        self._pump(range(count), lambda _: self.driver.submit_read(_RANDOM_BYTES), self._check)

    def _check(self, number: int, response: bytes) -> None:
        data = RngDriver.parse(response)
        if len(data) < _TELLING_BYTES:
            return
        if len(set(data)) == 1:
            raise _not_random(f"read {number} gave {len(data)} bytes of {data[0]:#04x}")
        if data == self._last:
            raise _not_random(f"read {number} gave the same {len(data)} bytes as the one before it")
        self._last = data


def _not_random(message: str) -> AnswerViolation:
    return AnswerViolation("NotRandom", "5.4.6.2", message, queue=0)


class BlkWork(Work[BlkDriver]):
    """Reads of a block device, each block twice and alike; or writes that are read back, and put back at the end."""

    def _driver(self, registers: Registers, *, indirect: bool, timeout: float) -> BlkDriver:
        names = FeatureSet(*(name for name in FEATURE_NAMES if name != "ZONED"), device=FEATURE_NAMES)
        self._seen: dict[int, bytes] = {}
        return BlkDriver(registers, wanted=names | self._ring, indirect=indirect, timeout=timeout)

    def facts(self) -> dict[str, object]:
        """See `Work.facts`."""
        driver = self.driver
        try:
            name = driver.identify()
        except RequestFailed:
            # It need not have one (5.2.6.2).
            name = ""
        return {
            "id": name,
            "capacity": driver.capacity,
            "block_size": driver.block_size,
            "queues": driver.num_queues,
            "read_only": driver.read_only,
        }

    def run(self, count: int) -> None:
        """See `Work.run`."""
        block = min(max(_BLOCK, self.driver.block_size) // SECTOR, self.driver.sectors_at_once)
        sectors = min(block, self.driver.capacity)
        if not sectors:
            raise InvalidArgument("the device has no capacity: there is nothing to read")
        self._sectors = sectors
        self._blocks = self.driver.capacity // sectors
        self._queues = self.driver.num_queues
        try:
            self._run(count)
        except InvalidArgument:
            # What we ask for lies below the capacity that we have seen: it is another one now.
            if (now := self.driver.capacity) >= self._blocks * sectors:
                raise
            raise PeerError(f"the capacity is {now} sectors now, and was at least {self._blocks * sectors}") from None

    def _run(self, count: int) -> None:
        if self._write:
            self._run_writes(count)
        else:
            # One after the other, and again from the start: each block is read at least twice.
            span = min(self._blocks, (count + 1) // 2)
            self._pump((place % span for place in range(count)), self._read, self._check_same)

    def _queue(self, block: int) -> int:
        return block % self._queues

    def _read(self, block: int) -> _Answer:
        return self.driver.submit_read(block * self._sectors, self._sectors, queue=self._queue(block))

    def _check_same(self, block: int, data: bytes) -> None:
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if self._seen.setdefault(block, digest) != digest:
            raise PeerError(f"sector {block * self._sectors} reads otherwise than before, and nobody wrote to it here")

    def _run_writes(self, count: int) -> None:
        if self.driver.read_only:
            raise InvalidArgument("the device is read-only: drive it without --write")
        span = min(self._blocks, _SCRATCH_BLOCKS, (count + 1) // 2)
        kept = self.driver.read(0, span * self._sectors)
        try:
            for start in range(0, count, 2 * span):
                self._write_round(range(min(span, (count - start + 1) // 2)), start)
        finally:
            if self.driver.live:
                self.driver.write(0, kept)
                self._flush()
        if self.driver.read(0, span * self._sectors) != kept:
            raise PeerError(f"the first {span * self._sectors} sectors are not what was put back there")

    def _write_round(self, blocks: range, salt: int) -> None:
        def pattern(block: int) -> bytes:
            seed = hashlib.blake2b(f"{salt} {block}".encode()).digest()
            return seed * (self._sectors * SECTOR // len(seed))

        def send(block: int) -> _Answer:
            return self.driver.submit_write(block * self._sectors, pattern(block), queue=self._queue(block))

        def count_bytes(block: int, _: bytes) -> None:
            self.bytes += len(pattern(block))

        def check(block: int, data: bytes) -> None:
            if data != pattern(block):
                raise PeerError(f"sector {block * self._sectors} reads otherwise than it was written and flushed")

        self._pump(blocks, send, count_bytes)
        self._flush()
        self._pump(blocks, self._read, check)

    def _flush(self) -> None:
        if "FLUSH" in self.driver.features:
            self.driver.flush_cache()
