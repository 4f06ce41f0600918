"""The legal half of an attack: setting a queue up, asking for something, and seeing it answered.

The area has the ring at `RING`, with its three areas a page or more apart, requests, responses and indirect tables.
Everything that a ring is made of is written through `RingLayout`; no offset of a ring is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from virtio_test._core import RingLayout
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import CapType
from virtio_test.spec.status import Status
from virtio_test.spec.testdevice import REQUEST, RESPONSE, TEXT

from tests.kernel.attack.program import At, Program, Results, Value

__all__ = [
    "AVAIL",
    "BASIC",
    "CONFIG_VECTOR",
    "INDIRECT",
    "NEXT",
    "QUEUE_VECTOR",
    "REQUESTS",
    "RESPONSES",
    "RING",
    "TABLE",
    "USED",
    "WRITE",
    "Queue",
    "answer",
    "kick",
    "mark",
    "probe",
    "probed",
    "release",
    "request",
    "reset",
]

RING: Final = 0x0000
DRIVER: Final = 0x2000
DEVICE: Final = 0x3000
REQUESTS: Final = 0x4000
RESPONSES: Final = 0x8000
TABLE: Final = 0x10000
CLEARED: Final = 0x18000
"""What is zero when an attack begins: all up to the tables' end, where tables are written as far as they count."""

CONFIG_VECTOR: Final = 0
QUEUE_VECTOR: Final = 1

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
AVAIL: Final = 1 << 7
USED: Final = 1 << 15

BASIC: Final = FeatureSet.from_bits(1) | FeatureSet("VERSION_1", "INDIRECT_DESC")
"""CAN_PRINT, and what every attack is written for."""

_ACKNOWLEDGED: Final = Status.ACKNOWLEDGE | Status.DRIVER
_READY: Final = _ACKNOWLEDGED | Status.FEATURES_OK
_FIELDS: Final = {"desc": RING, "driver": DRIVER, "device": DEVICE}


def request(number: int) -> bytes:
    """The request that the original makes of a number."""
    return REQUEST.pack(number, number + 1, number + 2, number + 3, TEXT)


def answer(number: int) -> tuple[int, int]:
    """Its answer, as the two numbers that `Queue.answered` brings back."""
    data = RESPONSE.pack(*(number + added + 100 for added in (1, 2, 3)))
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")


def reset(p: Program, label: str = "reset") -> None:
    """Reset the device and see that it is."""
    p.out("device_status", 0)
    p.until(label, "device_status", 0)


def mark(p: Program, number: int) -> None:
    """Leave a line in the server's log that says which attack begins: a queue of that number is written to."""
    p.out("queue_select", number)
    p.out("queue_size", 1)
    reset(p, "marked")


def kick(p: Program, queue: int = 0) -> None:
    """Notify a queue, whose place is its number's as `queue_notify_off` says of ours."""
    p.out_at(CapType.NOTIFY_CFG, 4 * queue, 2, queue)


@dataclass(frozen=True)
class Queue:
    """Queue 0 of the function as an attack sets it up.

    Attributes:
        packed: its format.
        size: descriptors.
        features: what is accepted besides RING_PACKED.
        places: addresses of areas (``desc``, ``driver``, ``device``) that lie elsewhere.
        enabled: whether the queue is enabled.
        final: the status to end with.
    """

    packed: bool = False
    size: int = 8
    features: FeatureSet = BASIC
    places: Mapping[str, Value] = field(default_factory=dict[str, Value])
    enabled: bool = True
    final: Status = _READY | Status.DRIVER_OK

    @property
    def layout(self) -> RingLayout:
        """Where its fields lie in the area."""
        given = {name: each.offset for name, each in self.places.items() if isinstance(each, At)}
        return RingLayout(self.size, packed=self.packed, **{**_FIELDS, **given})

    def start(self, p: Program, *, settled: bool = True) -> None:
        """Initialize the device as 3.1.1 has it; brings back the status as ``started``.

        Args:
            p: the program.
            settled: wait until the device has looked at its new queue, as it does without a kick.
        """
        self.negotiate(p)
        self.run(p, settled=settled)

    def run(self, p: Program, *, settled: bool = True) -> None:
        """The queue, and the final status; see `start`.

        What the device says about kicks is put to what it never says, so that its first look shows.
        """
        name = self.says
        looks = settled and self.enabled and bool(self.final & Status.DRIVER_OK)
        if looks:
            self.put(p, name, 0, 0xFFFF)
        self.place(p)
        if self.enabled:
            p.out("queue_enable", 1)
        if self.final != _READY:
            p.out("device_status", int(self.final))
        p.read("started", "device_status")
        if looks:
            p.wait("looked", self.layout.at(name), 2, 2 if self.packed and "EVENT_IDX" in self.features else 0)

    @property
    def says(self) -> str:
        """The field in which the device says whether it wants kicks; it writes it whenever it looks at the queue."""
        return "device_event.flags" if self.packed else "avail_event" if "EVENT_IDX" in self.features else "used.flags"

    def kick_and_wait(self, p: Program, label: str) -> None:
        """Kick, and wait until the device has looked at the queue, whatever it found there."""
        self.put(p, self.says, 0, 0xFFFF)
        kick(p)
        p.wait(label, self.layout.at(self.says), 2, 0, 0xFF00)

    def negotiate(self, p: Program) -> None:
        """Zero the area, then up to FEATURES_OK."""
        p.fill(0, CLEARED)
        p.forget()
        p.out("device_status", int(_ACKNOWLEDGED))
        accepted = self.features | FeatureSet("RING_PACKED") if self.packed else self.features
        for select in (0, 1):
            p.out("driver_feature_select", select)
            p.out("driver_feature", accepted.word(select))
        p.out("device_status", int(_READY))
        p.out("config_msix_vector", CONFIG_VECTOR)

    def place(self, p: Program) -> None:
        """The queue's registers, without enabling it."""
        p.out("queue_select", 0)
        p.out("queue_size", self.size)
        p.out("queue_msix_vector", QUEUE_VECTOR)
        for name, own in _FIELDS.items():
            p.out(f"queue_{name}", self.places.get(name, At(own)))

    # --- the ring -------------------------------------------------------------------------------------------

    def put(self, p: Program, field: str, index: int, value: Value) -> None:
        """Write a field of the ring."""
        layout = self.layout
        p.put(layout.at(field, index), value, layout.fields()[field][1])

    def desc(self, p: Program, index: int, address: Value, length: int, flags: int = 0, link: int = 0) -> None:
        """Write a descriptor: `link` is next or, packed, the id; its flags come last and make it available."""
        self.put(p, "desc.addr", index, address)
        self.put(p, "desc.len", index, length)
        self.put(p, "desc.id" if self.packed else "desc.next", index, link)
        self.put(p, "desc.flags", index, flags ^ AVAIL if self.packed else flags)

    def entry(
        self,
        p: Program,
        index: int,
        address: Value,
        length: int,
        flags: int = 0,
        link: int = 0,
        *,
        at: int = TABLE,
    ) -> None:
        """Write an entry of the indirect table at an offset of the area."""
        table = RingLayout(32768, packed=self.packed, desc=at)
        fields = {"addr": address, "len": length, "id" if self.packed else "next": link, "flags": flags}
        for name, value in fields.items():
            p.put(table.at(f"desc.{name}", index), value, table.fields()[f"desc.{name}"][1])

    def publish(self, p: Program, *heads: int, idx: int | None = None) -> None:
        """Make heads available in a split ring that was fresh; a packed one has done it with its descriptors."""
        if self.packed:
            return
        for slot, head in enumerate(heads):
            self.put(p, "avail.ring", slot, head)
        self.put(p, "avail.idx", 0, len(heads) if idx is None else idx)

    def ask(self, p: Program, number: int, *, position: int = 0, kicks: bool = True, identity: int = 1) -> None:
        """Make the request of `number` available, as the one behind `position` others of two descriptors.

        Args:
            p: the program.
            number: see `request`.
            position: how many came before.
            kicks: whether to kick.
            identity: the buffer's id in a packed ring.
        """
        at, to = REQUESTS + 0x100 * (position % 16), RESPONSES + 0x100 * (position % 16)
        p.put_bytes(at, request(number))
        p.fill(to, 16, 0xEE)
        first = 2 * position % self.size
        second = (first + 1) % self.size
        if self.packed:
            # The head last: it makes the whole list available.
            flip = [(2 * position + each) // self.size % 2 for each in (0, 1)]
            masks = [(AVAIL | USED) if each else 0 for each in flip]
            self.desc(p, second, At(to), RESPONSE.size, WRITE ^ masks[1], identity)
            self.desc(p, first, At(at), REQUEST.size, NEXT ^ masks[0], identity)
        else:
            self.desc(p, first, At(at), REQUEST.size, NEXT, second)
            self.desc(p, second, At(to), RESPONSE.size, WRITE)
            self.put(p, "avail.ring", position % self.size, first)
            self.put(p, "avail.idx", 0, position + 1)
        if kicks:
            kick(p)

    def used(self, p: Program, *, position: int = 0, slot: int | None = None, label: str = "") -> None:
        """Wait for the used element behind `position` others; brings back ``used``, ``id``, ``len`` and ``flags``.

        Args:
            p: the program.
            position: how many came before.
            slot: the descriptor in which a packed ring's comes; that of `ask` when None.
            label: before the names.
        """
        if self.packed:
            passed = 2 * position if slot is None else slot
            at = passed % self.size
            flags = 0 if passed // self.size % 2 else AVAIL | USED
            layout = self.layout
            p.wait(f"{label}flags", layout.at("desc.flags", at), 2, flags, AVAIL | USED)
            p.get(f"{label}id", layout.at("desc.id", at), 2)
            p.get(f"{label}len", layout.at("desc.len", at), 4)
        else:
            layout = self.layout
            p.wait(f"{label}used", layout.at("used.idx"), 2, position + 1)
            p.get(f"{label}id", layout.at("used.ring.id", position % self.size), 4)
            p.get(f"{label}len", layout.at("used.ring.len", position % self.size), 4)

    def answered(self, p: Program, *, position: int = 0, label: str = "") -> None:
        """The response to `ask`, as ``low`` and ``high``."""
        to = RESPONSES + 0x100 * (position % 16)
        p.get(f"{label}low", to, 8)
        p.get(f"{label}high", to + 8, 4)


def release(p: Program, how: int = 1) -> None:
    """Tell the late device (`late`) to answer what it keeps: 1 oldest first, 2 newest first."""
    p.out_at(CapType.DEVICE_CFG, 8, 4, how)


def probe(p: Program, number: int, *, packed: bool, late: bool = False) -> None:
    """After a reset: everything from the beginning, and one request; its results begin with ``probe.``."""
    queue = Queue(packed=packed)
    queue.start(p, settled=late)
    queue.ask(p, number, kicks=not late)
    if late:
        queue.kick_and_wait(p, "probe.looked")
        release(p)
    queue.used(p, label="probe.")
    queue.answered(p, label="probe.")
    p.interrupts("probe.queue", QUEUE_VECTOR, 1)
    p.interrupts("probe.config", CONFIG_VECTOR)
    p.read("probe.status", "device_status")
    reset(p, "probe.reset")


def probed(results: Results, number: int) -> str | None:
    """What is wrong with a probe's results; None when all is right."""
    low, high = answer(number)
    wanted = {"len": RESPONSE.size, "low": low, "high": high, "queue": 1, "config": 0, "status": 15, "reset": 0}
    # An interrupt from before the reset may still be on its way through QEMU.
    found = {name: results[f"probe.{name}"] for name in wanted} | {"queue": min(results["probe.queue"], 1)}
    wrong = [f"{name} {found[name]:#x}" for name, value in wanted.items() if found[name] != value]
    return f"the request after the reset: {', '.join(wrong)}" if wrong else None
