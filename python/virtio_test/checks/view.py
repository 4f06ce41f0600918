"""Guest memory looked at, and never written: what a queue stores into a view is dropped."""

from __future__ import annotations

from collections.abc import Callable

from virtio_test._core import GuestMemory, RingLayout

__all__ = ["Reader", "field", "view_of"]

Reader = Callable[[int, int], bytes]


def _drop(_address: int, _data: bytes) -> None:
    """What is stored in a view is lost."""


def view_of(memory: GuestMemory, read: Reader | None = None) -> GuestMemory:
    """The same regions, read through `read`, which is the memory's own if not given."""
    view = GuestMemory()
    for region in memory.regions:
        write = _drop if region.writable else None
        view.add_remote(region.address, region.size, read=memory.read if read is None else read, write=write)
    return view


def field(memory: GuestMemory, layout: RingLayout, name: str, index: int = 0) -> int:
    """One field of a ring, as `RingLayout.fields` names it."""
    return int.from_bytes(memory.read(layout.at(name, index), layout.fields()[name][1]), "little")
