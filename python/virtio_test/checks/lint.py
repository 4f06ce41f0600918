"""Everything that is broken in a ring at rest: an image of guest memory, a dump, or a device that stands still.

Theory
------
A running queue stops at the first broken rule, since nothing behind it can be trusted. Who debugs a driver wants to
see all of it. So each available chain is walked by a device end of its own that begins right there, each area of the
ring is judged with the others in a place that is known to be good, and used elements are taken by a driver end of our
own making (`used.py`). The judge is the core in each case, and the errors are its own; what is read here is only where
to begin.

An image may have been made to keep whoever looks at it: many heads that lead into one long list are as many lists. So
the work is bounded by `MOST_LOOKS`, which no ring comes near whose lists share nothing.

Nothing is written: the ends work on a view of the memory that drops what they store. What an image cannot show is not
judged: an avail idx that went back, what else is in flight, and the used descriptors of a packed ring, which have
overwritten what they must be compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from virtio_test._core import DeviceQueue, GuestMemory, QueueConfig, QueueState, RingLayout
from virtio_test.errors import InvalidArgument, QueueViolation

from .example import AVAIL, NEXT, Write
from .suppression import check_suppression
from .used import LONGEST, UsedJudge, moved
from .view import field, view_of

__all__ = ["MOST_LOOKS", "check_ring"]

MOST_LOOKS: Final = 1 << 22
"""Times that one run looks at the image, or a second or two to a minute, as the memory is."""

_AREAS: Final = ("desc", "driver", "device")
_WRAP: Final = 1 << 15
_INDEX: Final = 0xFFFF
_SCRATCH: Final = 1 << 62
"""Where an area is put that is known to be good; no machine has memory there."""


def check_ring(
    memory: GuestMemory,
    config: QueueConfig,
    *,
    state: QueueState | None = None,
    driver_state: QueueState | None = None,
) -> list[QueueViolation]:
    """Every rule that the ring of `config` breaks: areas, chains, used elements, event suppression, in this order.

    Args:
        memory: the image; it is only read, and must not change meanwhile.
        config: the queue. Its policy decides what is tolerated; `Policy.strict` tells all.
        state: where the device stands. If None, a split ring tells it by its used idx, as if chains were used in the
            order of being available; a packed ring counts as fresh.
        driver_state: where the driver stands: its `used` says how many used elements it has taken, and those behind
            are judged with their lengths. If None, those of the last lap are judged by their ids, as far as a used idx
            that counts from 0 says that they were written. Split rings only.

    Returns:
        The violations; empty when all is well.

    Raises:
        InvalidArgument: `driver_state` for a packed ring, which does not keep what its used descriptors answer; lists
            that are too long together to be walked (`MOST_LOOKS`).
    """
    if driver_state is not None and config.packed:
        raise InvalidArgument("a packed ring does not keep what was used: give no driver state")
    lint = _Lint(memory, config)
    if lint.size() and not lint.areas() & {"desc", "driver"}:
        lint.chains(state, driver_state)
    if lint.bad is not None:
        if not config.packed and not lint.bad:
            lint.used(driver_state)
        lint.suppression()
    return lint.found


class _Lint:
    """One run.

    Attributes:
        found: what is broken so far.
        bad: areas that are, None while the size is.
    """

    def __init__(self, memory: GuestMemory, config: QueueConfig) -> None:
        self.found: list[QueueViolation] = []
        self.bad: set[str] | None = None
        self._memory = memory
        self._config = config
        self._looks = 0
        self._view = view_of(memory, self._look)

    def _look(self, address: int, length: int) -> bytes:
        self._looks += 1
        return self._memory.read(address, length)

    def _go_on(self) -> None:
        """Between two chains or elements: whether it has not been too much."""
        if self._looks > MOST_LOOKS:
            raise InvalidArgument(
                f"the ring of {self._config.size} takes more than {MOST_LOOKS} looks at memory: its lists share "
                "descriptors, or are too long together"
            )

    def size(self) -> bool:
        """Whether there can be a queue of this size."""
        try:
            RingLayout(self._config.size, packed=self._config.packed)
        except InvalidArgument:
            self._begin(self._config, None, self._view)
            return False
        return True

    def areas(self) -> set[str]:
        """Judge each area for itself; those that are broken and without which no chain is found."""
        size, packed = self._config.size, self._config.packed
        good = RingLayout.contiguous(size, _SCRATCH, packed=packed)
        view = view_of(self._memory, self._look)
        view.add_region(_SCRATCH, -(-(good.end - _SCRATCH) // 4096) * 4096)
        self.bad = {
            name
            for name in _AREAS
            if self._begin(_replaced(self._config, good, set(_AREAS) - {name}), None, view) is None
        }
        if self.bad:
            # What lies in an area that only the device writes is not needed to go on.
            self._config, self._view = _replaced(self._config, good, self.bad), view
        return self.bad - ({"driver"} if packed else set())

    def _begin(self, config: QueueConfig, state: QueueState | None, view: GuestMemory) -> DeviceQueue | None:
        """A device end that begins there; None when the core refuses it, which is then found."""
        try:
            return DeviceQueue(view, config, state=state)
        except QueueViolation as error:
            self.found.append(error)
            return None

    # --- chains ---------------------------------------------------------------------------------------------

    def chains(self, state: QueueState | None, driver_state: QueueState | None) -> None:
        """Walk every chain that is available."""
        config, layout = self._config, self._config.layout()
        if state is None and not config.packed and not self.bad:
            idx, avail = (field(self._view, layout, name) for name in ("used.idx", "avail.idx"))
            taken = idx if driver_state is None else driver_state.used
            # Of a used idx that cannot be, the device is to blame, and it says nothing of the driver's chains.
            known = (avail - taken & _INDEX) <= layout.size
            state = QueueState(taken if known and (idx - taken & _INDEX) > (avail - taken & _INDEX) else idx)
        if state is None:
            state = QueueState(_WRAP if config.packed else 0)
        if self._begin(config, state, self._view) is None:
            return
        walk = self._packed_chains if config.packed else self._split_chains
        seen: set[int] = set()
        for position, head in walk(layout, state.avail):
            if head in seen and (error := _twice(config, head)) is not None:
                self.found.append(moved(error, config, position=position))
            seen.add(head)

    def _pop(self, at: int) -> tuple[int, int] | None:
        """The head of the chain at a ring position, and the position behind it; None when there is no good one."""
        self._go_on()
        queue = self._begin(self._config, QueueState(at), self._view)
        if queue is None:
            return None
        try:
            chain = queue.pop()
        except QueueViolation as error:
            self.found.append(error)
            return None
        return None if chain is None else (chain.head, queue.state.avail)

    def _split_chains(self, layout: RingLayout, begin: int) -> Iterator[tuple[int, int]]:
        """Position and head of the good ones."""
        count = field(self._view, layout, "avail.idx") - begin & _INDEX
        # An idx that is too far ahead says nothing of what is available; the first pop tells.
        for ahead in range(count if count <= layout.size else 1):
            at = begin + ahead & _INDEX
            if (popped := self._pop(at)) is not None:
                yield at, popped[0]

    def _packed_chains(self, layout: RingLayout, begin: int) -> Iterator[tuple[int, int]]:
        """Position and buffer id of the good ones."""
        at = begin
        # Each list has a descriptor at least, and none of them is available in two laps.
        for _ in range(layout.size):
            before, popped = len(self.found), self._pop(at)
            if popped is not None:
                yield at & ~_WRAP, popped[0]
                at = popped[1]
            elif len(self.found) > before:
                at = self._behind_broken(layout, at)
            else:
                return

    def _behind_broken(self, layout: RingLayout, at: int) -> int:
        """Where the next list begins behind a broken one, whose descriptors are linked by NEXT; a lap at most."""
        for _ in range(layout.size):
            slot = at & ~_WRAP
            at = at + 1 if slot + 1 < layout.size else (at & _WRAP) ^ _WRAP
            if not field(self._view, layout, "desc.flags", slot) & NEXT:
                break
        return at

    def suppression(self) -> None:
        """Judge the fields that ask for fewer notifications."""
        self.found += check_suppression(self._view, self._config)

    # --- used elements --------------------------------------------------------------------------------------

    def used(self, driver_state: QueueState | None) -> None:
        """Judge used elements: of all of them the ids; of those that the driver has not taken, all."""
        config, layout = self._config, self._config.layout()
        idx, avail = (field(self._view, layout, name) for name in ("used.idx", "avail.idx"))
        if driver_state is None:
            judge = UsedJudge(config, {})
            # 2.7.8: in its first lap the device has written those before its idx; what lies in the others is nobody's.
            for at in range(max(0, idx - layout.size), idx):
                self._judge(judge, at, whole=False)
            return
        begin = driver_state.used
        in_flight = avail - begin & _INDEX
        if in_flight > layout.size:
            self._begin(config, QueueState(avail, begin), self._view)
            return
        error = UsedJudge(config, {}).idx(begin, idx, in_flight)
        if error is not None:
            self.found.append(moved(error, config, position=begin, address=layout.at("used.idx")))
            return
        positions = [begin + ahead & _INDEX for ahead in range(idx - begin & _INDEX)]
        heads = {field(self._view, layout, "used.ring.id", at % layout.size) for at in positions}
        judge = UsedJudge(config, {head: self._writable(layout, head) for head in heads if head < layout.size})
        for at in positions:
            self._judge(judge, at, whole=True)

    def _judge(self, judge: UsedJudge, at: int, *, whole: bool) -> None:
        layout = self._config.layout()
        slot = at % layout.size
        identity, length = (field(self._view, layout, f"used.ring.{name}", slot) for name in ("id", "len"))
        error = judge.take(identity, length) if whole else judge.identity(identity)
        if error is not None:
            self.found.append(moved(error, self._config, position=at, address=layout.at("used.ring.id", slot)))
            # The judge begins anew, with all that is in flight.
            self._looks += layout.size * whole
        self._go_on()

    def _writable(self, layout: RingLayout, head: int) -> int:
        """Writable bytes of a chain that was used and not taken, and so still stands in its table."""
        self._go_on()
        told = {layout.at("avail.idx"): 1, layout.at("avail.ring"): head}

        def read(address: int, length: int) -> bytes:
            if length == 2 and address in told:
                return told[address].to_bytes(2, "little")
            return self._look(address, length)

        try:
            chain = DeviceQueue(view_of(self._memory, read), self._config, state=QueueState(0)).pop()
        except QueueViolation:
            # Of a broken chain no length can be too much.
            return LONGEST
        return LONGEST if chain is None else min(chain.writable, LONGEST)


def _replaced(config: QueueConfig, good: RingLayout, areas: Collection[str]) -> QueueConfig:
    """The same queue with some areas elsewhere."""
    places = {name: getattr(good if name in areas else config, name) for name in _AREAS}
    return QueueConfig(
        config.size,
        desc=places["desc"],
        driver=places["driver"],
        device=places["device"],
        index=config.index,
        features=config.features,
        policy=config.policy,
    )


def _twice(config: QueueConfig, head: int) -> QueueViolation | None:
    """What the core says of a head, or buffer id, that is available while it is in flight."""
    size = max(config.size, 2)
    layout = RingLayout.contiguous(size, 0, packed=config.packed)
    memory = GuestMemory([(0, -(-layout.end // 4096) * 4096)], backing="anonymous")
    writes = _twice_packed(head) if config.packed else _twice_split(head)
    for name, index, value in writes:
        memory.write(layout.at(name, index), value.to_bytes(layout.fields()[name][1], "little"))
    queue = DeviceQueue(memory, QueueConfig.from_layout(layout, policy=config.policy))
    try:
        queue.pop()
        queue.pop()
    except QueueViolation as error:
        return error
    return None


def _twice_split(head: int) -> tuple[Write, ...]:
    return (("desc.len", head, 1), ("avail.ring", 0, head), ("avail.ring", 1, head), ("avail.idx", 0, 2))


def _twice_packed(identity: int) -> tuple[Write, ...]:
    return tuple(
        (name, slot, value)
        for slot in (0, 1)
        for name, value in (("desc.len", 1), ("desc.id", identity), ("desc.flags", AVAIL))
    )
