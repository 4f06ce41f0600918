"""Every case against every target: one process each, a second try for what is bad, and what repeats it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from virtio_test.errors import InvalidArgument, PeerError
from virtio_test.strategies import Buffer, MessageProgram, RingCase, cases, message_cases

from .child import Child
from .qemu import QemuTrial
from .target import IMAGE_BYTES, Target
from .verdict import BAD, Observation, Result
from .vhost import NotOffered, VhostTrial

__all__ = ["AGAIN", "PATIENCE", "Case", "chosen", "judge"]

Case = RingCase | MessageProgram

AGAIN: Final = "virtio-test judge --target {target} --row {row}"
"""What repeats a row where nobody says how."""
_FIRST_SECONDS: Final = 5.0
_MORE: Final = 3
PATIENCE: Final = 1.0
"""Seconds that any answer may take; the longest that a target is waited for."""


def judge(
    target: Target,
    put: Iterable[Case],
    *,
    patience: float = PATIENCE,
    again: str = AGAIN,
    done: Callable[[int], object] = lambda _: None,
) -> list[Result]:
    """Put every case to one target.

    Args:
        target: who is judged.
        put: what is put to it; what it cannot be asked (no packed ring, say) is left out.
        patience: seconds that any answer may take.
        again: the command that repeats a row, with ``{target}`` and ``{row}``.
        done: called with how many cases are done.

    Returns:
        A result for each case that could be put, in their order.

    Raises:
        InvalidArgument: the target does not answer a good request even before anything was done to it, or cannot be
            started any more.
    """
    results: list[Result] = []
    _check_good(target, patience)
    for count, case in enumerate(put, 1):
        try:
            results.append(_judged(target, case, patience, again))
        except NotOffered:
            pass
        except PeerError as error:
            raise InvalidArgument(f"{target.name}: row {case.row} cannot be put to it: {error}") from None
        done(count)
    return results


def _judged(target: Target, case: Case, patience: float, again: str) -> Result:
    seen = _trial(target, case, patience)
    steady, once = True, ""
    if seen.verdict in BAD:
        # With more patience: who is only slow today hangs once and not twice.
        second = _trial(target, case, patience * _MORE)
        steady = second.verdict == seen.verdict
        if not steady:
            # What cannot be repeated is told, and is no finding unless the other one is.
            kept, other = (seen, second) if second.verdict in BAD else (second, seen)
            seen, once = kept, f"; {other.verdict} the other time: {other.evidence}"
    return Result(
        target=target.name,
        row=case.row,
        title=case.title,
        ring="messages" if isinstance(case, MessageProgram) else "packed" if case.packed else "split",
        verdict=seen.verdict,
        evidence=seen.evidence + once,
        steady=steady,
        ours=_ours(case),
        command=again.format(target=target.name, row=case.row),
    )


def _ours(case: Case) -> str:
    if isinstance(case, MessageProgram):
        return case.rule or "accepted"
    if case.interop is None:
        return ""
    if case.interop.rule is not None:
        return case.interop.rule
    return "accepted" if case.interop.chains else "nothing there"


def _right(case: Case) -> int | None:
    """How many buffers it is right to complete; None for all of them."""
    if isinstance(case, MessageProgram):
        return 0 if case.rule else None
    return None if case.interop is None or case.interop.rule is None else case.interop.chains


def _trial(target: Target, case: Case, patience: float) -> Observation:
    with tempfile.TemporaryDirectory(prefix="virtio-test-judge-") as name:
        folder = Path(name)
        (folder / "image").write_bytes(bytes(IMAGE_BYTES))
        if target.carrier == "qtest":
            if isinstance(case, MessageProgram):
                raise NotOffered("there are no messages before registers")
            seen = QemuTrial(target, target.arguments(folder), patience=patience).ring(case)
        else:
            socket = folder / "s"
            words = [*target.program, *target.arguments(folder)]
            with Child(words, folder, ready=lambda said: target.up in said and _listens(socket)) as child:
                trial = VhostTrial(child, socket, target, patience=patience)
                seen = trial.messages(case) if isinstance(case, MessageProgram) else trial.ring(case)
    seen.legal = _right(case)
    return seen


def _check_good(target: Target, patience: float) -> None:
    """Or every verdict would be that it hangs."""
    try:
        seen = _trial(target, _legal(target), max(patience, _FIRST_SECONDS))
    except PeerError as error:
        raise InvalidArgument(f"{target.name}: {error}") from None
    if not seen.healed or not seen.used:
        raise InvalidArgument(f"{target.name} does not answer a good request: {seen.evidence}")


def _legal(target: Target) -> RingCase:
    good = target.good
    readable = ((0x8000, len(good.readable)),) if good.readable else ()
    writable = ((0x8100, good.writable),) if good.writable else ()
    buffer = Buffer(readable=readable, writable=writable, data=good.readable)
    return RingCase(title="a good request", buffers=(buffer,), features=0)


def _listens(path: Path) -> bool:
    """Whether somebody listens there; a connection would be the front-end that is served."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    # Field 3 is __SO_ACCEPTCON where it listens.
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


def chosen(rows: Sequence[str]) -> list[Case]:
    """One case for each way to break each of these rows, of all rows when there are none, for a device end.

    Raises:
        InvalidArgument: a row that no case shows.
    """
    found: dict[tuple[str, bool, str], Case] = {}
    for case in cases():
        if case.end == "device":
            found.setdefault((case.row, case.packed, case.title), case)
    for program in message_cases():
        found.setdefault((program.row, False, program.title), program)
    known = {case.row for case in found.values()}
    for row in rows:
        if row not in known:
            raise InvalidArgument(f"no case for a device shows the row {row!r}; rows are {', '.join(sorted(known))}")
    return [case for case in found.values() if not rows or case.row in rows]
