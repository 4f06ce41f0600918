"""The rings of a driver as its front-end keeps them: configurations, notifiers, memory and what is in flight.

A ring's configuration and its notifiers outlive a connection: the next back-end gets the same. What is set up on a
connection ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Notifier, QueueConfig, Region
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.loop import OwnerLoop

from .frontend import FrontEndRing
from .inflight import InflightRegion
from .link import Link
from .messages import ProtocolFeature, Request
from .payloads import MAX_TABLE_REGIONS
from .rings import FRESH_PACKED
from .rules import violation

__all__ = ["FrontEndRings"]

_F = ProtocolFeature
_FRESH: Final = {False: 0, True: FRESH_PACKED << 16 | FRESH_PACKED}
"""The base of a ring that nobody has used yet, for a split and for a packed one: avail and used, with wrap bits."""


class FrontEndRings:
    """All rings of one driver.

    Args:
        loop: where calls arrive.
        memory: what is shared.
        called: called with a queue that has used buffers.
        stopped: called with a queue that the back-end has given up.

    Attributes:
        configs: what is to run or runs, by queue.
        running: what is set up on the present connection.
        inflight: the back-end's record of what it has in flight, if it keeps one.
    """

    def __init__(
        self,
        loop: OwnerLoop,
        memory: GuestMemory,
        *,
        called: Callable[[int], object],
        stopped: Callable[[int], object],
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._called = called
        self._stopped = stopped
        self._kicks: dict[int, Notifier] = {}
        self._calls: dict[int, Notifier] = {}
        self._shared: list[Region] = []
        self.configs: dict[int, QueueConfig] = {}
        self.running: dict[int, FrontEndRing] = {}
        self.inflight: InflightRegion | None = None

    def __repr__(self) -> str:
        return f"<FrontEndRings {sorted(self.configs)}, running {sorted(self.running)}>"

    def kick(self, index: int) -> Notifier:
        """What kicks queue `index`, until that is reset."""
        return self._kicks.setdefault(index, Notifier.eventfd())

    def forget(self) -> None:
        """Everything that a driver has set."""
        for index in list(self.running):
            self._unwatch(index)
        self.configs.clear()
        self._kicks.clear()
        self._calls.clear()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None

    def disconnected(self) -> None:
        """What was set up on the connection has gone with it; what is already used can still be taken."""
        for index in list(self.running):
            self._unwatch(index)
        self._shared = []

    def call_all(self) -> None:
        """Look for used buffers everywhere, whether there was a call or not."""
        for index in list(self.configs):
            self._called(index)

    # --- memory and record ----------------------------------------------------------------------------------

    def share(self, link: Link) -> None:
        """Show the back-end the memory as it is now.

        Raises:
            StateError: a region cannot be shared, or there are more than a table holds, and no slots.
            MessageError: RegionSlots, the back-end has fewer than there are regions.
        """
        regions = self._memory.regions
        gone = [each for each in self._shared if _place(each) not in map(_place, regions)]
        new = [each for each in regions if _place(each) not in map(_place, self._shared)]
        if not gone and not new:
            return
        with link.talking() as front:
            if link.protocol & _F.CONFIGURE_MEM_SLOTS:
                slots = front.number(Request.GET_MAX_MEM_SLOTS)
                if slots < len(regions):
                    raise violation("RegionSlots", f"the back-end has {slots} slots, the memory {len(regions)} regions")
                for region in gone:
                    front.remove_region(region)
                for region in new:
                    front.add_region(region)
            elif len(regions) > MAX_TABLE_REGIONS:
                raise StateError(f"{len(regions)} regions of memory, and a table holds {MAX_TABLE_REGIONS}")
            else:
                front.share(self._memory)
        self._shared = regions

    def _record(self, link: Link) -> None:
        """Give the back-end a region for what it will have in flight."""
        if not link.protocol & _F.INFLIGHT_SHMFD or not self.configs:
            return
        size = max(config.size for config in self.configs.values())
        packed = any(config.packed for config in self.configs.values())
        with link.talking() as front:
            if self.inflight is None:
                self.inflight = front.get_inflight(link.queues, size, packed=packed)
            front.set_inflight(self.inflight)

    # --- rings ----------------------------------------------------------------------------------------------

    def add(self, config: QueueConfig) -> None:
        """A queue that is to run.

        Raises:
            StateError: it is enabled already.
        """
        if config.index in self.configs:
            raise StateError(f"queue {config.index} is enabled already: reset it first")
        self.configs[config.index] = config

    def start(self, link: Link) -> None:
        """Memory, record and every queue; the order is QEMU's."""
        self.share(link)
        self._record(link)
        for index in self.configs:
            self.start_one(link, index)

    def start_one(self, link: Link, index: int, *, base: int | None = None) -> None:
        """Set queue `index` up and enable it, at `base`, or fresh when None."""
        config = self.configs[index]
        self._unwatch(index)
        call = self._calls.setdefault(index, Notifier.eventfd())
        with link.talking() as front:
            ring = front.setup_ring(
                config, base=_FRESH[config.packed] if base is None else base, kick=self.kick(index), call=call
            )
            self.running[index] = ring
            self._loop.add_reader(ring.call.fileno(), lambda: self._readable(index, ring))
            self._loop.add_reader(ring.error.fileno(), lambda: self._failed(index, ring))
            if link.knows_protocol:
                front.enable(index)

    def stop_one(self, link: Link, index: int) -> None:
        """Stop queue `index`, as far as it runs, and judge where it says that it has stopped.

        Raises:
            MessageError: VringBase, it cannot have stopped there.
        """
        if index not in self.running:
            return
        config = self.configs[index]
        with link.talking() as front:
            if link.knows_protocol:
                front.enable(index, on=False)
            base = front.get_base(index)
            if config.packed and max(base & 0x7FFF, base >> 16 & 0x7FFF) >= config.size:
                raise violation("VringBase", f"a ring of {config.size} stopped at {base:#x}", queue=index)
            if not config.packed and base > 0xFFFF:
                raise violation("VringBase", f"the ring stopped at {base:#x}, where 16 bits are legal", queue=index)
        self._unwatch(index)

    def remove(self, link: Link | None, index: int) -> None:
        """Stop queue `index`, where there is a connection, and forget it.

        Raises:
            InvalidArgument: it is not enabled.
        """
        if index not in self.configs:
            raise InvalidArgument(f"queue {index} is not enabled; enabled are {sorted(self.configs)}")
        if link is not None:
            self.stop_one(link, index)
        del self.configs[index]
        self._kicks.pop(index, None)
        self._calls.pop(index, None)

    def hand_over(self, link: Link) -> None:
        """What the last back-end had goes to this one; the order is QEMU's."""
        region = self.inflight
        assert region is not None
        self.share(link)
        with link.talking() as front:
            front.set_inflight(region)
            for index, config in self.configs.items():
                self.start_one(link, index, base=self._base(region, config))

    def _base(self, region: InflightRegion, config: QueueConfig) -> int:
        """Where a ring goes on: a split one behind what is used, as QEMU has it; a packed one as recorded."""
        layout = config.layout()

        def word(address: int) -> int:
            return int.from_bytes(self._memory.read(address, 2), "little")

        if not config.packed:
            return word(layout.at("used.idx"))
        state = region.packed_state(config.index, lambda slot: word(layout.at("desc.flags", slot)))
        return state.avail | state.used << 16

    # --- what arrives ---------------------------------------------------------------------------------------

    def _readable(self, index: int, ring: FrontEndRing) -> None:
        if ring.call.drain():
            self._called(index)

    def _failed(self, index: int, ring: FrontEndRing) -> None:
        if ring.error.drain():
            self._stopped(index)

    def _unwatch(self, index: int) -> None:
        ring = self.running.pop(index, None)
        if ring is not None:
            self._loop.remove_reader(ring.call.fileno())
            self._loop.remove_reader(ring.error.fileno())


def _place(region: Region) -> tuple[int, int, int | None, int]:
    return region.address, region.size, region.fd, region.offset
