"""The results as text, as JSON and as a page: one line for each row of the catalogue, the worst case of it counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from virtio_test.checks import ROWS

from .verdict import BAD, Result, Verdict

__all__ = ["as_json", "as_lines", "as_markdown", "worst"]

_ORDER: Final = tuple(Verdict)


def worst(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """(row, ring) to its results, the worst one first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        found.setdefault((each.row, each.ring), []).append(each)
    return {key: sorted(some, key=_badness, reverse=True) for key, some in sorted(found.items())}


def _badness(result: Result) -> int:
    return _ORDER.index(result.verdict)


def as_lines(target: str, results: Sequence[Result], *, every: bool = False) -> str:
    """For a terminal: a line for each row and ring, or for every case, and what repeats each finding."""
    rows = worst(results)
    shown = [each for some in rows.values() for each in (some if every else some[:1])]
    head = f"{target}: {_counted(results)}"
    lines = [_line(each, 1 if every else len(rows[each.row, each.ring])) for each in shown]
    bad = sorted({each.command for each in results if each.verdict in BAD})
    return "\n".join([head, *lines, *(f"again: {command}" for command in bad)])


def _counted(results: Sequence[Result]) -> str:
    counts = Counter(each.verdict for each in results)
    return f"{len(results)} cases, " + ", ".join(f"{counts[each]} {each}" for each in _ORDER if counts[each])


def _line(result: Result, cases: int) -> str:
    of = f" (worst of {cases})" if cases > 1 else ""
    unsteady = "" if result.steady else " (not each time)"
    text = f"{result.row:4} {result.ring:6} {result.verdict:9}{unsteady} {result.title}{of}: {result.evidence}"
    return text.rstrip()


def as_json(versions: Mapping[str, str], results: Sequence[Result]) -> str:
    """One object: the targets with their versions, and every case."""
    return json.dumps({"targets": dict(versions), "results": [each.as_dict() for each in results]}, indent=2)


def as_markdown(tables: Mapping[str, Sequence[Result]], *, date: str) -> str:
    """A page: what was found, and a table of rows and targets.

    Args:
        tables: target with its version to its results.
        date: of the run.
    """
    found = {name: worst(results) for name, results in tables.items()}
    keys = sorted({key for some in found.values() for key in some})
    lines = ["| target | cases | " + " | ".join(_ORDER) + " |", "|---|---|" + "---|" * len(_ORDER)]
    for name, results in tables.items():
        counts = Counter(each.verdict for each in results)
        lines.append(f"| {name} | {len(results)} | " + " | ".join(str(counts[each]) for each in _ORDER) + " |")
    lines += ["", "## Who dies and who hangs", ""]
    for name, results in tables.items():
        for row, ring in (key for key, some in worst(results).items() if some[0].verdict in BAD):
            first = found[name][row, ring][0]
            unsteady = "" if first.steady else ", not each time"
            lines.append(f"- {name}, {row} ({ring}, {first.title}): **{first.verdict}**{unsteady}: `{first.evidence}`.")
            lines.append(f"  Again: `{first.command}`")
    lines += ["", f"## Row by row ({date})", "", "| row | ring | what happens | " + " | ".join(tables) + " |"]
    lines.append("|---|---|---|" + "---|" * len(tables))
    for row, ring in keys:
        told = ROWS[row].stimulus if row in ROWS else ""
        cells = [found[name][row, ring][0].verdict if (row, ring) in found[name] else "" for name in tables]
        lines.append(f"| {row} | {ring} | {told} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
