"""One guest that does all attacks, and what came of each: what the guest saw, and what the server said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from tests.kernel.attack.case import FIRST_MARK, Case, Machine
from tests.kernel.attack.program import file, parse
from tests.kernel.checks import said
from tests.kernel.console import GuestError
from tests.kernel.guest import Guest
from tests.kernel.server import Server

__all__ = ["Outcome", "attack", "programs"]

_FILES: Final = {False: "attack/messages", True: "attack/line"}
"""Where the programs lie in the guest: those for MSI-X, and those for the interrupt line."""

_MARK: Final = re.compile(r"the driver: NoSuchQueue .*queue_size written.*\[queue (\d+)\]")
_STOPPED: Final = re.compile(r"queue 0 stopped: (\w+)")
_SECONDS: Final = 300.0
"""How long the programs of a guest may take on a busy machine; it is less than ten on an idle one."""

_RULE: Final = re.compile(r"the driver: (\w+)")


@dataclass(frozen=True)
class Outcome:
    """What came of one attack.

    Attributes:
        verdict: as the guest saw it; or what fits no verdict.
        rules: as the server named them.
    """

    verdict: str
    rules: tuple[str, ...]


def programs(cases: Sequence[Case], machine: Machine) -> Mapping[str, bytes]:
    """The guest's files with them."""
    return {
        path: file([case.program(number, machine) for number, case in enumerate(cases) if case.by_line == by_line])
        for by_line, path in _FILES.items()
    }


def attack(guest: Guest, server: Server, cases: Sequence[Case], machine: Machine) -> dict[str, Outcome]:
    """Load the module and run the programs that the guest was given; what came of each case, by its id."""
    # QEMU's registers have one vector for everything; its line says which it is.
    guest.command("insmod virtio_attack" + " line=1" * machine.silent)
    lines = said(guest.command(f"run attack /{_FILES[False]}", timeout=_SECONDS))
    if any(case.by_line for case in cases):
        guest.command("rmmod virtio_attack")
        guest.command("insmod virtio_attack line=1")
        lines += said(guest.command(f"run attack /{_FILES[True]}", timeout=_SECONDS))
    came, told = parse(lines), _told(server.log)
    stopped = iter(_STOPPED.findall(server.log))
    outcomes: dict[str, Outcome] = {}
    for number, case in enumerate(cases):
        values = came.get(f"{number}", "it did not run")
        results = values if isinstance(values, str) else case.program(number, machine).decode(values)
        verdict = results if isinstance(results, str) else case.outcome(number, results)
        if machine.silent:
            # There is no mark, but each ring that the guest saw stop has its line.
            rules = tuple(islice(stopped, 1)) if verdict.startswith("broken") else ()
        else:
            rules = told.get(number, ())
        outcomes[case.id] = Outcome(verdict, rules)
    if late := list(stopped):
        raise GuestError(f"the server stopped more rings than the guest has seen: {late}")
    return outcomes


def _told(log: str) -> dict[int, tuple[str, ...]]:
    """The rules in the server's log, by the number of the attack whose mark came before."""
    found: dict[int, tuple[str, ...]] = {}
    number = -1
    for line in log.splitlines():
        if (mark := _MARK.search(line)) and int(mark[1]) >= FIRST_MARK:
            number = int(mark[1]) - FIRST_MARK
            found[number] = ()
        elif rule := _RULE.search(line):
            found[number] = (*found.get(number, ()), rule[1])
    return found
