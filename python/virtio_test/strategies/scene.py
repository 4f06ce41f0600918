"""A case on stage: the ring in guest memory, the legal peer that made it, and the end that is judged.

`Scene` builds what a case describes and does its acts one by one; what is handed out and the rule that is found broken
stay in it. Memory is kept from one scene to the next (`Stage`): mapping is slower than all that happens in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final, Protocol

from virtio_test._core import (
    Chain,
    DeviceQueue,
    DriverQueue,
    GuestMemory,
    Player,
    Policy,
    QueueConfig,
    QueueState,
    RingLayout,
    Trace,
)
from virtio_test.errors import InvalidArgument, QueueFull, QueueViolation

from .acts import (
    Act,
    Add,
    Buffer,
    Change,
    Copy,
    Fill,
    Look,
    Map,
    Pop,
    Publish,
    Push,
    Put,
    Race,
    Take,
    Unmap,
    Use,
    Write,
)
from .case import AVAIL, INDEX, USED, Name, Outcome, RingCase

__all__ = ["DeviceEnd", "Scene", "Stage"]

_SMALL: Final = 1 << 20
"""Bytes of a memory that is worth zeroing and keeping."""
_MOST: Final = 1024
"""Memories that are kept of each kind."""


class DeviceEnd(Protocol):
    """What a scene needs of a device end; `DeviceQueue` is one, and so can be your own."""

    def has_work(self) -> bool:
        """Whether a chain is available."""
        ...

    def pop(self) -> Any:
        """The next chain, an object with `segments`; None when there is none."""
        ...

    def push(self, chain: Any, written: int | None = None, /) -> object:
        """Complete a chain."""
        ...


MakeDevice = Callable[[GuestMemory, QueueConfig, QueueState], DeviceEnd]


def our_device(memory: GuestMemory, config: QueueConfig, state: QueueState) -> DeviceQueue:
    """The device end of the core."""
    return DeviceQueue(memory, config, state=state)


class Stage:
    """Memories that are zeroed and used again, one for each map that was asked for."""

    def __init__(self) -> None:
        self._memories: dict[tuple[object, bool], GuestMemory] = {}
        self._clean: dict[tuple[tuple[int, int, bool], ...], tuple[GuestMemory, int]] = {}

    def memory(self, case: RingCase, *, traced: bool = False) -> GuestMemory:
        """Zeros in the regions of the case."""
        traced = traced or case.traced
        memory = self._memories.pop((case.regions, traced), None)
        if memory is None:
            return _fresh(case, traced=traced)
        if memory.trace is not None:
            memory.trace.clear()
        for address, size, writable in case.regions:
            if writable:
                memory.fill(address, size)
        return memory

    def give_back(self, case: RingCase, memory: GuestMemory) -> None:
        """Keep it for the next one, if it is small and as it was."""
        regions = tuple(sorted((each.address, each.size, each.writable) for each in memory.regions))
        if regions == tuple(sorted(case.regions)) and sum(size for _, size, _ in regions) <= _SMALL:
            if len(self._memories) == _MOST:
                del self._memories[next(iter(self._memories))]
            self._memories[case.regions, memory.trace is not None] = memory

    def outcome(self, case: RingCase, policy: Policy) -> Outcome | None:
        """What comes of the case at our end, found in one call; None where a `Scene` has to play it."""
        clean = self._clean
        kept = clean.get(case.regions)
        if kept is None:
            if len(clean) == _MOST:
                del clean[next(iter(clean))]
            memory = _fresh(case, traced=False)
            clean[case.regions] = kept = memory, memory.epoch
        memory, epoch = kept
        found = _PLAYER.play(memory, case, policy)
        if memory.epoch != epoch:
            del clean[case.regions]
        return None if found is None else Outcome(*found)


_PLAYER: Final = Player((Put, Fill, Write, Copy, Unmap, Look, Pop, Push, Add, Publish, Take, Use), index=INDEX)

STAGE: Final = Stage()
"""The one that cases use by themselves."""


def _fresh(case: RingCase, *, traced: bool) -> GuestMemory:
    memory = GuestMemory(
        [(address, size) for address, size, writable in case.regions if writable],
        backing="anonymous",
        trace=Trace() if traced else None,
    )
    for address, size, writable in case.regions:
        if not writable:
            memory.add_region(address, size, writable=False)
    return memory


@cache
def _fields(packed: bool) -> dict[str, tuple[bool, str, int]]:  # noqa: FBT001 (a key of the cache)
    """Field of an act to (whether it is one of the tables, its name in the layout, bytes)."""
    widths = {name: width for name, (_, width, _, _) in RingLayout(1, packed=packed).fields().items()}
    own = {name: (False, name, width) for name, width in widths.items()}
    return own | {f"table.{name[5:]}": (True, name, widths[name]) for name in widths if name.startswith("desc.")}


def _bytes(field: str, value: int, width: int) -> bytes:
    try:
        return value.to_bytes(width, "little")
    except OverflowError:
        raise InvalidArgument(f"{field} has {width} bytes, which cannot hold {value:#x}") from None


class Scene:
    """One case, built up to the point where the judged end exists; then `run`, or your own calls.

    Attributes:
        case: what is played.
        memory: guest memory.
        driver: the driver end; the legal peer, unless it is the judged one.
        device: the device end; None when its configuration was refused, and in a driver's case before the first `Use`.
        chains: what the device end handed out.
        used: (number of the buffer, bytes written) of what the driver end handed out.
        violation: the rule that the judged end found broken; None so far.
    """

    def __init__(
        self,
        case: RingCase,
        policy: Name = "strict",
        *,
        memory: GuestMemory | None = None,
        device: MakeDevice = our_device,
    ) -> None:
        self.case = case
        self.policy: Name = policy
        self.memory = _fresh(case, traced=case.traced) if memory is None else memory
        self.chains: list[Any] = []
        self.used: list[tuple[int, int]] = []
        self.violation: QueueViolation | None = None
        self.built = True
        self.device: DeviceEnd | None = None
        self._layouts, self._fields = (case.layout(), case.table()), _fields(case.packed)
        self._numbers: dict[int, int] = {}
        self._theirs: list[Chain] = []
        if (case.state or case.areas) and case.end == "driver":
            self._refuse(lambda: DriverQueue(self.memory, case.config(policy), state=case.begin()))
            return
        judged = case.end == "driver"
        self._begin()
        tables = case.tables if case.tabled else None
        self.driver = DriverQueue(
            self.memory,
            case.config(policy, judged=judged),
            state=case.begin(judged=judged),
            indirect=tables,
            indirect_entries=case.entries,
        )
        for buffer in case.buffers:
            self._add(buffer)
        self.driver.publish()
        if judged:
            for change in case.writes:
                self.do(change)
            return
        for change in case.writes:
            self.do(change)
        self._refuse(lambda: device(self.memory, case.config(policy), case.begin()))

    def _refuse(self, build: Callable[[], DeviceEnd | DriverQueue]) -> None:
        try:
            end = build()
        except QueueViolation as violation:
            self.violation, self.built = violation, False
            return
        if isinstance(end, DriverQueue):
            self.driver = end
        else:
            self.device = end

    def _begin(self) -> None:
        """The ring of a queue that stands at `start` with nothing in flight (2.7.6, 2.8.1)."""
        case = self.case
        if not case.packed:
            self.put("avail.idx", case.start)
            self.put("used.idx", case.start)
            return
        here, wrap = case.start & 0x7FFF, case.start >> 15
        begin, end = (0, here) if wrap else (here, case.size)
        self.fill("desc.flags", (AVAIL | USED,) * (end - begin), begin)

    # ----------------------------------------------------------------------------------------------------- the fields

    def at(self, field: str, index: int = 0) -> tuple[int, int]:
        """Address and width of a field, whose name and place must be ones that there are."""
        try:
            table, name, width = self._fields[field]
        except KeyError:
            raise InvalidArgument(f"{field} is no field of this ring: it has {', '.join(self._fields)}") from None
        return self._layouts[table].at(name, index), width

    def put(self, field: str, value: int, index: int = 0) -> None:
        """Write one field."""
        address, width = self.at(field, index)
        self.memory.write(address, _bytes(field, value, width))

    def get(self, field: str, index: int = 0) -> int:
        """Read one field."""
        return int.from_bytes(self.memory.read(*self.at(field, index)), "little")

    def fill(self, field: str, values: Sequence[int], begin: int = 0) -> None:
        """Write a field at so many places, from `begin` on."""
        if not values:
            return
        more = len(values) - 1
        first, width = self.at(field, begin)
        stride = (self.at(field, begin + more)[0] - first) // max(more, 1)
        whole = bytearray(self.memory.read(first, stride * more + width))
        for number, value in enumerate(values):
            whole[stride * number : stride * number + width] = _bytes(field, value, width)
        self.memory.write(first, whole)

    # -------------------------------------------------------------------------------------------------------- the acts

    def do(self, act: Act) -> None:
        """One act; what the judged end finds broken is raised."""
        match act:
            case Put(field, value, place):
                self.put(field, value, place)
            case Fill(field, value, step, number):
                self.fill(field, range(value, value + step * number, step) if step else (value,) * number)
            case Write(address, data):
                self.memory.write(address, data)
            case Copy(destination, source, length):
                self.memory.copy(destination, source, length)
            case Map(address, size, writable):
                self.memory.add_region(address, size, writable=writable)
            case Unmap(address, size):
                self.memory.remove_region(address, size)
            case Race(number, field, value, place):
                trace = self.memory.trace
                assert trace is not None
                number += len(trace.log())
                address, width = self.at(field, place)
                trace.change_at(number, address, _bytes(field, value, width))
            case Add(buffer):
                self._add(buffer)
            case Publish():
                self.driver.publish()
            case Use(which, written):
                self._use(which, written)
            case Take(limit) if self.case.end == "driver":
                self._take(limit)
            case Take(limit):
                with suppress(QueueViolation):
                    self._take(limit)
            case Look():
                self._look()
            case Pop(limit):
                self._pop(limit)
            case Push(which, written):
                # Of a case of chaos nobody knows how many chains there are.
                if which < len(self.chains):
                    self._end.push(self.chains[which], written)

    @property
    def _end(self) -> DeviceEnd:
        assert self.device is not None
        return self.device

    def _add(self, buffer: Buffer) -> None:
        data = buffer.data
        for address, length in buffer.readable:
            if not data:
                break
            self.memory.write(address, data[:length])
            data = data[length:]
        token = self.driver.add(buffer.readable, buffer.writable, indirect=buffer.indirect)
        self._numbers[token] = len(self._numbers)

    def _look(self) -> None:
        if self.case.end == "driver":
            self.driver.has_used()
        else:
            self._end.has_work()

    def _pop(self, count: int) -> int:
        for taken in range(count):
            chain = self._end.pop()
            if chain is None:
                return taken
            self.chains.append(chain)
        return count

    def _use(self, which: int, written: int) -> None:
        """The legal device; where the ring is nonsense by now it does nothing, and what it found is not our end's."""
        if self.device is None:
            self.device = DeviceQueue(self.memory, self.case.config(judged=False), state=self.case.begin(judged=False))
        with suppress(QueueViolation):
            while (chain := self._end.pop()) is not None:
                self._theirs.append(chain)
            if which < len(self._theirs):
                chain = self._theirs[which]
                self._end.push(chain, min(written, chain.writable))

    def _take(self, limit: int) -> int:
        for taken in range(limit):
            found = self.driver.get_used()
            if found is None:
                return taken
            token, written = found
            self.used.append((self._numbers[token], written))
        return limit

    @property
    def added(self) -> int:
        """Buffers that the driver end added so far."""
        return len(self._numbers)

    def number(self, token: int) -> int:
        """Which of them a token of the driver end stands for."""
        return self._numbers[token]

    def run(self) -> Outcome:
        """All that happens later, and then everything that there is to take."""
        if self.built:
            try:
                # A driver that finds no room has a device that gave too little back, which the outcome shows.
                with suppress(QueueFull):
                    for act in self.case.later:
                        self.do(act)
                self.drain()
            except QueueViolation as violation:
                self.violation = violation
        return self.outcome

    def spoil(self) -> None:
        """Make the changes of what happens later, and no call: for tests that make the calls themselves."""
        for act in self.case.later:
            if isinstance(act, Change):
                self.do(act)

    def drain(self) -> None:
        """Take everything; more than twice what the ring has room for is an error of the judged end."""
        limit = 2 * self.case.size + 2
        count = self._take(limit) if self.case.end == "driver" else self._pop(limit)
        if count == limit:
            raise AssertionError(f"{count} were handed out of a ring of {self.case.size}")

    @property
    def outcome(self) -> Outcome:
        """What has come of it so far."""
        rule = None if self.violation is None else self.violation.rule
        if self.case.end == "driver":
            return Outcome(len(self.used), rule, self.built, used=tuple(self.used))
        return Outcome(len(self.chains), rule, self.built, tuple(tuple(chain.segments) for chain in self.chains))

    def returned(self) -> list[tuple[int, int, bytes]]:
        """What the legal driver gets back: (number of the buffer, bytes written, those bytes)."""
        found: list[tuple[int, int, bytes]] = []
        for token, written in self.driver.get_used_many():
            number = self._numbers[token]
            spans = self.case.buffers[number].writable
            whole = b"".join(self.memory.read(address, length) for address, length in spans)
            found.append((number, written, whole[:written]))
        return found
