"""`open_pci`: from a bus to the registers of the virtio device on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from virtio_test.driver.access import PciAccess
from virtio_test.errors import InvalidArgument, StateError, StatusViolation
from virtio_test.spec.pci import LEGACY_CONFIG, CapType

from .capabilities import Capabilities, walk
from .interrupts import Interrupts
from .legacy import LegacyPciRegisters
from .modern import PciRegisters
from .msix import MsixTable, judge_msix
from .probe import Findings, PciFunction

__all__ = ["open_pci"]

_LEGACY_BAR = 0


def open_pci(
    access: PciAccess,
    *,
    interface: Literal["auto", "modern", "legacy"] = "auto",
    interrupts: Literal["auto", "msix", "intx"] = "auto",
    strict: bool = False,
    timeout: float = 10.0,
) -> PciRegisters | LegacyPciRegisters:
    """Find out what a PCI function is, place its BARs, and hand its registers to a driver.

    Args:
        access: the bus with the function on it.
        interface: ``auto`` takes the modern one if there are virtio capabilities (4.1.5.1.1.1), else the legacy one.
        interrupts: ``auto`` takes MSI-X where function and bus have it, else the line.
        strict: raise everything that is against the rules, not only what makes the device unusable.
        timeout: seconds of the loop's clock that waits take at most.

    Raises:
        StateError: there is no function, the bus has no room for a BAR, or what was asked for is not there.
        StatusViolation: the device breaks a rule so that it cannot be driven.
    """
    if interface not in ("auto", "modern", "legacy") or interrupts not in ("auto", "msix", "intx"):
        raise InvalidArgument(f"interface {interface!r} or interrupts {interrupts!r} is unknown")
    function = PciFunction(access, Findings(strict=strict))
    found = walk(function)
    if interface == "legacy" or (interface == "auto" and not found.virtio):
        _check_legacy(function, found, forced=interface == "legacy")
        needed = {_LEGACY_BAR}
        legacy = True
    else:
        needed = {found.require(kind).bar for kind in (CapType.COMMON_CFG, CapType.NOTIFY_CFG)}
        needed |= {each.bar for kind, each in found.structures.items() if kind is not CapType.PCI_CFG}
        _place_shared_memory(function, found)
        for kind in (CapType.ISR_CFG, CapType.PCI_CFG):
            if kind not in found.broken and (problem := found.missing(kind)) is not None:
                function.findings.note(problem)
        legacy = False
    messages = _choose(function, found, interrupts)
    if messages and found.msix is not None:
        needed |= {found.msix.table_bar, found.msix.pba_bar}
    elif not legacy:
        found.require(CapType.ISR_CFG)
    for index in sorted(needed):
        function.place(index)
    function.enable(line=not messages)
    table: MsixTable | None = None
    if found.msix is not None:
        table = MsixTable(function, found.msix)
        table.switch(on=messages)

    def make(read_isr: Callable[[], int]) -> Interrupts:
        return Interrupts(function, table if messages else None, read_isr)

    if legacy:
        return LegacyPciRegisters(function, make)
    return PciRegisters(function, found, make, timeout=timeout)


def _place_shared_memory(function: PciFunction, found: Capabilities) -> None:
    """A region that is too large for this bus is not there; the device may be usable without it."""
    for number, place in list(found.shared_memory.items()):
        try:
            function.place(place.bar)
        except StateError:
            del found.shared_memory[number]


def _check_legacy(function: PciFunction, found: Capabilities, *, forced: bool) -> None:
    bar = function.bars.get(_LEGACY_BAR)
    if bar is not None and bar.io and bar.size > LEGACY_CONFIG and (forced or function.transitional):
        return
    if forced:
        raise StateError("the function has no legacy interface: its BAR 0 is no I/O space that could hold one")
    if function.transitional:
        text = "no virtio capability, and BAR 0 is no I/O space that could hold the legacy interface"
        raise StatusViolation("NoInterface", "4.1.5.1.1.1", text)
    # There is none: what a modern device lacks first.
    found.require(CapType.COMMON_CFG)


def _choose(function: PciFunction, found: Capabilities, wanted: Literal["auto", "msix", "intx"]) -> bool:
    """Whether to use MSI-X."""
    if wanted != "intx":
        problem = None if found.msix is None else judge_msix(function, found.msix)
        if problem is None and found.msix is not None and _has_messages(function):
            return True
        if wanted == "msix":
            raise problem or StateError("the function has no MSI-X capability, or its bus no message for it")
        if problem is not None:
            function.findings.note(problem)
    if not function.has_pin:
        text = "there is no interrupt to use: no interrupt pin, and no MSI-X that is usable and wanted"
        function.findings.note(StatusViolation("NoInterrupt", "4.1.1", text))
    return False


def _has_messages(function: PciFunction) -> bool:
    try:
        function.access.message(0)
    except StateError:
        return False
    return True
