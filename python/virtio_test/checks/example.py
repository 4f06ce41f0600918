"""A minimal ring that shows one rule broken: plain writes into guest memory, and a real queue that meets them.

The map is the same for all: RAM from 0 on, with the ring at `RING`, a buffer at `BUFFER` and an indirect table at
`TABLE`; one page at `ROM` that the device may only read. Everything is written through `RingLayout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, Literal

from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, Policy, QueueConfig, QueueState, RingLayout
from virtio_test.errors import QueueViolation

__all__ = ["AVAIL", "BUFFER", "INDIRECT", "NEXT", "NOWHERE", "RAM", "RING", "ROM", "TABLE", "USED", "WRITE"]
__all__ += ["Example", "Write"]

RAM: Final = 256 << 20
RING: Final = 0x1000
BUFFER: Final = 0x10000
TABLE: Final = 0x20000
ROM: Final = 0x8000_0000
NOWHERE: Final = 0x9000_0000

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
AVAIL: Final = 1 << 7
USED: Final = 1 << 15
_FLAGS: Final = {NEXT: "NEXT", WRITE: "WRITE", INDIRECT: "INDIRECT", AVAIL: "AVAIL", USED: "USED"}

_INDIRECT_DESC: Final = 1 << 28
_RING_PACKED: Final = 1 << 34
_TABLE_SIZE: Final = 32768

_ELEMENTS: Final = frozenset({"desc", "table", "used.ring"})

Write = tuple[str, int, int]
"""(field of `RingLayout`, index, value); a field that begins with ``table.`` is one of the indirect table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One ring, and what is changed in it.

    Attributes:
        rule: the rule that it breaks.
        packed: its format.
        size: descriptors.
        end: which end meets it. For ``"driver"`` one buffer of 16 writable bytes is in flight.
        indirect: whether INDIRECT_DESC is negotiated.
        writes: what stands in memory.
        later: what the other side writes once the first chain was popped.
        config: arguments of `QueueConfig` that differ from the ring's own.
        state: (avail, used) to go on from.
        pops: chains that the device end asks for; as long as there are any, when None.
        tolerated: whether `Policy.interop` accepts it.
    """

    rule: str
    packed: bool = False
    size: int = 4
    end: Literal["device", "driver"] = "device"
    indirect: bool = True
    writes: tuple[Write, ...] = ()
    later: tuple[Write, ...] = ()
    config: dict[str, int] = field(default_factory=dict[str, int])
    state: tuple[int, int] | None = None
    pops: int | None = None
    tolerated: bool = False

    def image(self, policy: Policy = Policy.strict) -> tuple[GuestMemory, QueueConfig]:
        """The ring in fresh memory before anybody meets it, and its queue."""
        memory = _memory()
        if self.end == "driver":
            self._fill_driver(memory, policy)
        self._put(memory, self.writes)
        return memory, self._queue_config(policy)

    def run(self, policy: Policy = Policy.strict) -> QueueViolation | None:
        """Build it in fresh memory and let a real queue meet it; what it finds broken, or None."""
        memory = _memory()
        try:
            if self.end == "driver":
                self._meet_driver(memory, policy)
            else:
                self._meet_device(memory, policy)
        except QueueViolation as error:
            return error
        return None

    def lines(self) -> Iterator[str]:
        """The ring as text, one line for each descriptor or field."""
        what = "split" if not self.packed else "packed"
        indirect = "" if self.indirect else ", without INDIRECT_DESC"
        yield f"A {what} ring of {self.config.get('size', self.size)} that shows it{indirect}:"
        for name, value in self.config.items():
            if name != "size":
                yield f"  {name} area at {value:#x}, the ring's own place is {getattr(self._layout(), name):#x}"
        if self.state is not None:
            yield f"  goes on from avail {self.state[0]:#x}, used {self.state[1]:#x}"
        if self.end == "driver":
            yield "  in flight: one buffer of 16 writable bytes, with id 0"
        yield from (f"  {line}" for line in _told(self.writes))
        if self.later:
            yield "  and once its first chain was popped:"
            yield from (f"  {line}" for line in _told(self.later))

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "packed": self.packed,
            "size": self.size,
            "end": self.end,
            "indirect": self.indirect,
            "writes": [list(each) for each in self.writes],
            "later": [list(each) for each in self.later],
            "config": self.config,
            "state": list(self.state) if self.state is not None else None,
            "pops": self.pops,
            "tolerated": self.tolerated,
        }

    def _layout(self) -> RingLayout:
        return RingLayout.contiguous(self.size, RING, packed=self.packed)

    def _queue_config(self, policy: Policy) -> QueueConfig:
        layout = self._layout()
        fields = {"size": layout.size, "desc": layout.desc, "driver": layout.driver, "device": layout.device}
        fields |= self.config
        features = _INDIRECT_DESC * self.indirect | _RING_PACKED * self.packed
        return QueueConfig(
            fields["size"],
            desc=fields["desc"],
            driver=fields["driver"],
            device=fields["device"],
            features=features,
            policy=policy,
        )

    def _meet_device(self, memory: GuestMemory, policy: Policy) -> None:
        self._put(memory, self.writes)
        state = QueueState(*self.state) if self.state is not None else None
        queue = DeviceQueue(memory, self._queue_config(policy), state=state)
        taken = 0
        while taken != self.pops and queue.pop() is not None:
            taken += 1
            if taken == 1:
                self._put(memory, self.later)

    def _meet_driver(self, memory: GuestMemory, policy: Policy) -> None:
        queue = self._fill_driver(memory, policy)
        self._put(memory, self.writes)
        while queue.get_used() is not None:
            pass

    def _fill_driver(self, memory: GuestMemory, policy: Policy) -> DriverQueue:
        queue = DriverQueue(memory, self._queue_config(policy))
        queue.add([], [(BUFFER, 16)])
        queue.publish()
        return queue

    def _put(self, memory: GuestMemory, writes: tuple[Write, ...]) -> None:
        ring, entries = self._layout(), RingLayout(_TABLE_SIZE, packed=self.packed, desc=TABLE)
        for name, index, value in writes:
            layout = entries if name.startswith("table.") else ring
            known = name.replace("table.", "desc.", 1)
            width = layout.fields()[known][1]
            memory.write(layout.at(known, index), value.to_bytes(width, "little"))


def _memory() -> GuestMemory:
    memory = GuestMemory([(0, RAM)])
    memory.add_region(ROM, 4096, writable=False)
    return memory


def _told(writes: tuple[Write, ...]) -> Iterator[str]:
    """A descriptor, an entry or a used element in one line, every other field in its own."""
    for (area, index), group in groupby(writes, lambda each: (each[0].rpartition(".")[0], each[1])):
        values = [(name, _value(name, value)) for name, _, value in group]
        if area in _ELEMENTS:
            yield f"{area}[{index}]: {', '.join(_last(name, value) for name, value in values)}"
        else:
            yield from (f"{name}{f'[{index}]' * (name == 'avail.ring')}: {value}" for name, value in values)


def _last(name: str, value: str) -> str:
    return f"{name.rpartition('.')[2]} {value}"


def _value(name: str, value: int) -> str:
    if name.endswith(".flags"):
        names = [text for bit, text in _FLAGS.items() if value & bit]
        return "|".join(names) or "0"
    return f"{value:#x}" if name.endswith(".addr") else str(value)
