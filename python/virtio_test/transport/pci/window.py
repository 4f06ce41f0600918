"""The PCI configuration access capability (VIRTIO 1.4, 4.1.4.9): a window from configuration space into the BARs.

Theory
------
The driver writes BAR, offset and length (1, 2 or 4) into the capability; every access to `pci_cfg_data` is then one
access of that length there. It reaches what the other virtio capabilities describe and nothing else: not the MSI-X
table, not the legacy registers, and not itself. Anything else reads as ones, writes nothing and is a violation.
While the length is 0, as after a reset, nobody has asked for anything: the data are plain bytes. A carrier that reads
more than 4 bytes in one go is copying configuration space, and no driver.
"""

from __future__ import annotations

from collections.abc import Sequence

from virtio_test.errors import StatusViolation
from virtio_test.spec.pci import CAP, CAP_PCI_CFG_DATA
from virtio_test.transport.bank import RegisterBank

from .configspace import ConfigBytes
from .declaration import Place
from .regions import Region, find_region

__all__ = ["Window"]


class Window:
    """One such capability, at `at` in the configuration space; `regions` are what it may reach."""

    def __init__(
        self, config: ConfigBytes, at: int, regions: Sequence[tuple[Place, Region]], bank: RegisterBank
    ) -> None:
        self._config = config
        self._at = at
        self._data = at + CAP_PCI_CFG_DATA.offset
        self._regions = regions
        self._bank = bank

    def before_read(self, offset: int, length: int) -> None:
        """Software is about to read configuration space."""
        wanted = self._wanted(offset, length)
        if not wanted:
            return
        found = self._target(wanted)
        data = None if found is None else found[0].read(found[1], wanted)
        if data is None:
            self._refuse("read", wanted)
            data = b"\xff" * CAP_PCI_CFG_DATA.size
        self._config.data[self._data : self._data + len(data)] = data

    def after_write(self, offset: int, length: int) -> None:
        """Software has written configuration space."""
        wanted = self._wanted(offset, length)
        if not wanted:
            return
        found = self._target(wanted)
        if found is None or found[0].write(found[1], self._config.read(self._data, wanted)):
            self._refuse("written", wanted)

    def _wanted(self, offset: int, length: int) -> int:
        """`cap.length`, when that access is one to the data."""
        inside = offset < self._data + CAP_PCI_CFG_DATA.size and self._data < offset + length
        return self._config.dword(self._at + CAP["length"].offset) if inside and length <= 4 else 0

    def _target(self, length: int) -> tuple[Region, int] | None:
        offset = self._config.dword(self._at + CAP["offset"].offset)
        if length not in (1, 2, 4) or offset % length:
            return None
        return find_region(self._regions, self._config.data[self._at + CAP["bar"].offset], offset, length)

    def _refuse(self, verb: str, length: int) -> None:
        bar, offset = (
            self._config.data[self._at + CAP["bar"].offset],
            self._config.dword(self._at + CAP["offset"].offset),
        )
        message = f"pci_cfg_data {verb} for {length} bytes at {offset:#x} of BAR {bar}"
        self._bank.note(StatusViolation("BadWindow", "4.1.4.9.2", message))
