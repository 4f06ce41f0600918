"""``virtio-test drive``: the driver end against anybody's device behind a socket, with every answer checked.

The device is a vhost-user back-end, or a PCI function behind a vfio-user server. One that breaks a rule, answers
wrongly or does not answer in time is a finding: it is shown with everything that was found out until then, and
raised, so that the command ends with status 1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias, cast

from virtio_test.console import print_line
from virtio_test.driver.registers import Registers
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, PeerDisconnected, PeerError, RuleViolation
from virtio_test.spec.ids import TEST_DEVICE_ID, DeviceId
from virtio_test.transport.vhost_user.registers import VhostUserRegisters
from virtio_test.transport.vhost_user.wire import connect

from .machine import Interface
from .progress import Progress
from .work import BlkWork, RngWork, TestWork, Work

__all__ = ["DEVICES", "DeviceName", "drive"]

DeviceName: TypeAlias = Literal["test", "blk", "rng"]
DEVICES: Final[dict[DeviceName, tuple[int, type[Work[Any]]]]] = {
    "test": (TEST_DEVICE_ID, TestWork),
    "blk": (DeviceId.BLOCK, BlkWork),
    "rng": (DeviceId.ENTROPY, RngWork),
}
"""Device id and work by name."""
_PACKED: Final = 1 << 34


def drive(
    path: str | os.PathLike[str],
    *,
    device: DeviceName = "test",
    transport: Literal["vhost-user", "pci"] = "vhost-user",
    interface: Interface = "auto",
    intx: bool = False,
    ring: Literal["split", "packed"] = "split",
    indirect: bool = False,
    count: int = 1000,
    depth: int = 32,
    timeout: float = 10.0,
    write: bool = False,
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
) -> str:
    """Send `count` requests to the device at `path`, check what comes back, and show the result.

    Args:
        path: where its server listens.
        device: what it serves.
        transport: ``vhost-user``, or ``pci`` for a function behind vfio-user.
        interface: which interface of a PCI function to use.
        intx: interrupts of a PCI function by its line instead of by messages.
        ring: format of the virtqueues.
        indirect: put every chain into an indirect table, where the back-end can.
        count: how many requests, from 1; with `write` one more if it is odd, as what is written is also read.
        depth: how many in flight at once, from 1.
        timeout: seconds that any answer may take.
        write: of a block device, overwrite its first blocks too; they are put back at the end.
        as_json: show one JSON object instead of lines.
        show: takes the text.

    Returns:
        What was shown.

    Raises:
        InvalidArgument: nobody listens, or the device cannot be driven like that.
        PeerError: the first finding, behind the result.
    """
    if write and device != "blk":
        raise InvalidArgument(f"there is nothing to write to with the device {device!r}: --write is for blk")
    if transport != "pci" and (interface != "auto" or intx):
        raise InvalidArgument("--interface and --intx are for --transport pci")
    facts: dict[str, object] = {
        "device": device,
        "socket": os.fspath(path),
        "transport": transport,
        "ring": ring,
        "indirect": indirect,
        "depth": depth,
    }
    findings: list[PeerError] = []
    number, kind = DEVICES[device]
    if transport == "pci":
        opened = _function(path, facts, findings, interface=interface, intx=intx, timeout=timeout)
    else:
        opened = _backend(path, facts, findings, device_id=number, timeout=timeout)
    try:
        with opened as registers:
            if registers.device_id() != number:
                raise InvalidArgument(f"its virtio device id is {registers.device_id()}; that of {device} is {number}")
            if ring == "packed" and not registers.device_features() & _PACKED:
                raise InvalidArgument("the device offers no RING_PACKED: drive it with --ring split")
            work = kind(registers, packed=ring == "packed", indirect=indirect, timeout=timeout, write=write)
            work.depth = depth
            _drive(work, count, facts)
    except PeerError as error:
        # An err fd says which queue was given up; that the device is broken follows from it.
        if error not in findings and not (findings and isinstance(error, DeviceNeedsReset)):
            findings.append(error)
    facts["findings"] = [_finding(each) for each in findings]
    text = json.dumps(facts, indent=2) if as_json else _lines(facts)
    show(text)
    if findings:
        raise findings[0].with_traceback(None)
    return text


@contextmanager
def _backend(
    path: str | os.PathLike[str],
    facts: dict[str, object],
    findings: list[PeerError],
    *,
    device_id: int,
    timeout: float,
) -> Generator[Registers]:
    """A vhost-user back-end; the protocol cannot tell what device it is."""
    try:
        connection = connect(path, timeout=timeout)
    except PeerDisconnected as error:
        raise _nobody(str(error)) from None
    registers = VhostUserRegisters(connection=connection, device_id=device_id, timeout=timeout)
    facts["protocol"] = [name for each in registers.protocol if (name := each.name)]
    try:
        with registers:
            yield registers
    finally:
        # Before what ended the work: it is what that followed from.
        findings[:0] = registers.errors


@contextmanager
def _function(
    path: str | os.PathLike[str],
    facts: dict[str, object],
    findings: list[PeerError],
    *,
    interface: Interface,
    intx: bool,
    timeout: float,
) -> Generator[Registers]:
    """A PCI function behind a vfio-user server."""
    from virtio_test.carrier.vfio_user.client import VfioUserClient
    from virtio_test.driver.pci import open_pci

    try:
        client = VfioUserClient(path, timeout=timeout)
    except OSError as error:
        raise _nobody(f"no vfio-user server at {os.fspath(path)}: {error.strerror or error}") from None
    with client:
        registers = open_pci(client, interface=interface, interrupts="intx" if intx else "auto", timeout=timeout)
        facts["interface"] = "legacy" if registers.legacy else "modern"
        facts["interrupts"] = registers.interrupts.kind
        try:
            yield registers
        finally:
            findings[:0] = registers.findings


def _nobody(what: str) -> InvalidArgument:
    return InvalidArgument(f"{what}; start one there, or give another path")


def _drive(work: Work[Any], count: int, facts: dict[str, object]) -> None:
    """Bring the device up, do the work, leave it reset; `facts` grows as it goes."""
    facts["features"] = list(work.driver.initialize())
    facts |= work.facts()
    started = time.monotonic()
    try:
        with Progress("requests", count) as work.tick:
            work.run(count)
    finally:
        facts["requests"] = work.requests
        facts["bytes"] = work.bytes
        facts["seconds"] = round(time.monotonic() - started, 6)
    work.driver.detach()


def _finding(error: PeerError) -> dict[str, object]:
    if not isinstance(error, RuleViolation):
        return {"rule": type(error).__name__, "clause": None, "message": str(error)}
    return {"rule": error.rule, "clause": error.clause, "message": error.message, **error.places()}


def _lines(facts: dict[str, object]) -> str:
    """Name and value, a line each; a finding is a line of its own."""
    found = cast("list[dict[str, object]]", facts["findings"])
    shown = {name: _plain(value) for name, value in facts.items()}
    shown["findings"] = str(len(found)) if found else "none"
    width = max(map(len, shown))
    lines = [f"{name.replace('_', ' '):{width}}  {value}".rstrip() for name, value in shown.items()]
    for each in found:
        places = [f"{name} {value}" for name, value in each.items() if name not in {"rule", "clause", "message"}]
        where = f" [{', '.join(places)}]" if places else ""
        clause = f" ({each['clause']})" if each["clause"] else ""
        lines.append(f"  {each['rule']}{clause}: {_plain(each['message'])}{where}")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """A value on one line; what the back-end says of itself may contain anything."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, cast("list[object]", value))) if isinstance(value, list) else str(value)
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
