"""A rule explained: what the clause asks, what follows here, what others do, and a ring that shows it; and a row."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from virtio_test.errors import InvalidArgument, MessageError, RuleViolation

from .catalogue import CATALOGUE, entries
from .entry import Entry
from .minimal import EXAMPLES
from .rows import ROWS, Row, find_row, rows_of_rule, rules_of_row

__all__ = ["as_dict", "expected", "explain", "list_rows", "list_rules"]

_WIDTH: Final = 100
_PROTOCOLS: Final = {"vhost-user": "vhost-user", "vfio-user": "vfio-user", "linux/virtio_pcidev.h": "uml-pci"}


def explain(rule: RuleViolation | str, *, width: int = _WIDTH) -> str:
    """Text for a terminal of at most `width` columns; of an error its own words and places first.

    An error whose rule is somebody else's is its own words and no more.

    Args:
        rule: an error, the name of a rule, or the id of a row (``"A05"``, ``"CVE-2016-5403"``).
        width: columns, 40 at least.

    Raises:
        InvalidArgument: no rule has that name, and no row that id.
    """
    width = max(width, 40)
    if isinstance(rule, str):
        found = _named(rule)
        return _row_text(found, width) if isinstance(found, Row) else "\n\n".join(_text(each, width) for each in found)
    found = _entries(rule)
    lines = _wrapped(str(rule), width, "")
    return "\n\n".join(("\n".join(lines), *(_text(entry, width) for entry in found)))


def expected(error: RuleViolation) -> str:
    """What must hold by the rule of an error; empty when it is somebody else's."""
    return next((entry.summary for entry in _entries(error)), "")


def as_dict(rule: str) -> list[dict[str, Any]]:
    """The same as plain data, one dictionary for each entry of that name, or for the row; raises as `explain`."""
    named = _named(rule)
    if isinstance(named, Row):
        return [named.as_dict() | {"rules": list(rules_of_row(named))}]
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
            "rows": list(_rows(entry)),
            "examples": [each.as_dict() for each in _examples(entry)],
        }
        for entry in named
    ]


def list_rules() -> str:
    """One line for each rule: family, name and what must hold."""
    found = [entry for each in CATALOGUE.values() for entry in each]
    name, family = max(len(each.name) for each in found), max(len(each.family) for each in found)
    return "\n".join(f"{each.family:{family}}  {each.name:{name}}  {each.summary}" for each in found)


def list_rows() -> str:
    """One line for each row: id, who meets it, and what happens."""
    name, meets = max(map(len, ROWS)), max(len(each.meets) for each in ROWS.values())
    return "\n".join(f"{each.id:{name}}  {each.meets:{meets}}  {each.stimulus}" for each in ROWS.values())


def _named(name: str) -> tuple[Entry, ...] | Row:
    """The entries of a rule, or the row."""
    try:
        return entries(name)
    except InvalidArgument as no_rule:
        try:
            return find_row(name)
        except InvalidArgument as no_row:
            # Every id has a number of two digits or more, and no rule's name has.
            raise (no_row if re.search(r"\d\d", name) else no_rule) from None


def _rows(entry: Entry) -> tuple[str, ...]:
    """The rows that it answers; those of a protocol's rule are its own."""
    # Where two families use one name, only what an entry says itself is sure to be its own.
    return rows_of_rule(entry.name) if len(CATALOGUE[entry.name]) == 1 else entry.rows


def _entries(error: RuleViolation) -> list[Entry]:
    """The entry of its rule, where the catalogue has it."""
    return [entry for entry in CATALOGUE.get(error.rule, ()) if entry.family == _family(error)]


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
    lines += _outcomes("When it is broken", entry, width)
    if entry.practice:
        lines += _section("Elsewhere", entry.practice, width)
    if rows := _rows(entry):
        lines += _section("Catalogue", ", ".join(rows), width)
    for example in _examples(entry):
        lines += ["", *(f"  {line}" for line in example.lines())]
    return "\n".join(lines)


def _row_text(row: Row, width: int) -> str:
    also = f" = {', '.join(row.also)}" if row.also else ""
    lines = _wrapped(f"{row.id}{also} ({row.meets}{': ' if row.clauses else ''}{', '.join(row.clauses)})", width, "")
    lines += _wrapped(row.stimulus, width)
    for clause, text in row.demands.items():
        lines += _section(f"Clause {clause}", text, width)
    lines += _outcomes("Outcome", row, width)
    for title, text in (
        ("How", row.behaviour),
        ("Elsewhere", row.practice),
        ("Why not", row.reason),
        ("Differs", row.differs),
        ("Rules", ", ".join(rules_of_row(row))),
        ("Like", ", ".join(row.rows)),
    ):
        if text:
            lines += _section(title, text, width)
    return "\n".join(lines)


def _outcomes(title: str, told: Entry | Row, width: int) -> Iterator[str]:
    """One for both policies where they agree."""
    if told.interop == told.strict:
        yield from _section(title, told.interop, width)
        return
    yield from _section("Policy.interop", f"{told.interop}: {told.peer}", width)
    yield from _section("Policy.strict", told.strict, width)


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _section(title: str, text: str, width: int) -> Iterator[str]:
    yield ""
    yield f"{title}:"
    yield from _wrapped(text, width)
