"""``virtio-test drive``: the driver end against anybody's vhost-user back-end, with every answer checked.

A back-end that breaks a rule, answers wrongly or does not answer in time is a finding: it is shown with everything
that was found out until then, and raised, so that the command ends with status 1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias, cast

from virtio_test.console import print_line
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, PeerDisconnected, PeerError, RuleViolation
from virtio_test.spec.ids import TEST_DEVICE_ID, DeviceId
from virtio_test.transport.vhost_user.registers import VhostUserRegisters
from virtio_test.transport.vhost_user.wire import connect

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
    ring: Literal["split", "packed"] = "split",
    indirect: bool = False,
    count: int = 1000,
    depth: int = 32,
    timeout: float = 10.0,
    write: bool = False,
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
) -> str:
    """Send `count` requests to the back-end at `path`, check what comes back, and show the result.

    Args:
        path: where the back-end listens.
        device: what it serves, which the protocol cannot tell.
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
    try:
        connection = connect(path, timeout=timeout)
    except PeerDisconnected as error:
        raise InvalidArgument(f"{error}; start one there, or give another path") from None
    number, kind = DEVICES[device]
    facts: dict[str, object] = {
        "device": device,
        "socket": os.fspath(path),
        "ring": ring,
        "indirect": indirect,
        "depth": depth,
    }
    findings: list[PeerError] = []
    try:
        with VhostUserRegisters(connection=connection, device_id=number, timeout=timeout) as registers:
            findings = registers.errors
            if ring == "packed" and not registers.device_features() & _PACKED:
                raise InvalidArgument("the back-end offers no RING_PACKED: drive it with --ring split")
            facts["protocol"] = [name for each in registers.protocol if (name := each.name)]
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
