"""A rule explained: what the clause asks, what follows here, what others do, and a ring that shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Final

from virtio_test.errors import MessageError, RuleViolation

from .catalogue import CATALOGUE, entries
from .entry import Entry
from .minimal import EXAMPLES

__all__ = ["as_dict", "explain", "list_rules"]

_WIDTH: Final = 100
_PROTOCOLS: Final = {"vhost-user": "vhost-user", "vfio-user": "vfio-user", "linux/virtio_pcidev.h": "uml-pci"}


def explain(rule: RuleViolation | str, *, width: int = _WIDTH) -> str:
    """Text for a terminal of at most `width` columns; of an error its own words and places first.

    An error whose rule is somebody else's is its own words and no more.

    Args:
        rule: an error, or the name of a rule.
        width: columns, 40 at least.

    Raises:
        InvalidArgument: no rule has that name.
    """
    width = max(width, 40)
    if isinstance(rule, str):
        return "\n\n".join(_text(entry, width) for entry in entries(rule))
    found = [entry for entry in CATALOGUE.get(rule.rule, ()) if entry.family == _family(rule)]
    lines = _wrapped(str(rule), width, "")
    return "\n\n".join(("\n".join(lines), *(_text(entry, width) for entry in found)))


def as_dict(rule: str) -> list[dict[str, Any]]:
    """The same as plain data, one dictionary for each entry of that name; raises as `explain`."""
    return [
        {
            "name": entry.name,
            "family": entry.family,
            "clauses": list(entry.clauses),
            "summary": entry.summary,
            "demands": entry.demands,
            "practice": entry.practice,
            "interop": str(entry.interop),
            "strict": str(entry.strict),
            "peer": entry.peer,
            "rows": list(entry.rows),
            "examples": [each.as_dict() for each in _examples(entry)],
        }
        for entry in entries(rule)
    ]


def list_rules() -> str:
    """One line for each rule: family, name and what must hold."""
    found = [entry for each in CATALOGUE.values() for entry in each]
    name, family = max(len(each.name) for each in found), max(len(each.family) for each in found)
    return "\n".join(f"{each.family:{family}}  {each.name:{name}}  {each.summary}" for each in found)


def _family(error: RuleViolation) -> str:
    """A message's error names the document of its protocol first."""
    if not isinstance(error, MessageError):
        return "virtio"
    document = error.clause.partition(",")[0]
    return _PROTOCOLS.get(document, document)


def _examples(entry: Entry) -> tuple[Any, ...]:
    return EXAMPLES.get(entry.name, ()) if entry.family == "virtio" else ()


def _text(entry: Entry, width: int) -> str:
    document = "VIRTIO 1.4" if entry.family == "virtio" else entry.family
    lines = _wrapped(f"{entry.name} ({document}: {', '.join(entry.clauses)})", width, "")
    lines += _wrapped(entry.summary, width)
    for clause, text in entry.demands.items():
        lines += _section(f"Clause {clause}", text, width)
    if entry.interop == entry.strict:
        lines += _section("When it is broken", entry.interop, width)
    else:
        tolerance = f"{entry.interop}: {entry.peer}" if entry.peer else str(entry.interop)
        lines += _section("Policy.interop", tolerance, width)
        lines += _section("Policy.strict", entry.strict, width)
    if entry.practice:
        lines += _section("Elsewhere", entry.practice, width)
    if entry.rows:
        lines += _section("Catalogue", ", ".join(entry.rows), width)
    for example in _examples(entry):
        lines += ["", *(f"  {line}" for line in example.lines())]
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _section(title: str, text: str, width: int) -> Iterator[str]:
    yield ""
    yield f"{title}:"
    yield from _wrapped(text, width)
