"""``docs/rows.md``: the robustness catalogue as a page, written from `virtio_test.checks.ROWS`.

``python -m tests.rows`` prints it, and with ``write`` writes it; `tests/unit/test_rows.py` compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from virtio_test.checks import ROWS, SECTIONS, Meets, Outcome, Row

DOCS = Path(__file__).resolve().parents[1] / "docs" / "rows.md"
HEAD = """# What the other side may do, and what comes of it

Written from `virtio_test.checks.ROWS` (`make rows`), and compared with it by the tests. Each row has a
test that shows it, marked with its id: `pytest -m row` runs them all, and `virtio-test explain A05` tells one with its
clauses.

Two policies judge: `Policy.interop`, for serving and driving what is really out there, and `Policy.strict`, for checks.
Where one outcome stands, both agree.

"""
OTHERWISE = """## Where we decide otherwise than the catalogue recommends

"""
TOLERANCES = """## Whom interop is tolerant for

"""
APART = """## What does not apply

"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "".join(_legend()), "\n"]
    for title, rows in SECTIONS.items():
        parts += [f"## {title}\n\n", *_table([row for row in rows if row.meets is not Meets.NOBODY]), "\n"]
    parts += [OTHERWISE, *(f"- **{row.id}**: {row.differs}\n" for row in ROWS.values() if row.differs), "\n"]
    parts += [TOLERANCES, *(f"- **{row.id}**: {row.peer}.\n" for row in ROWS.values() if row.peer), "\n"]
    parts += [APART, *(f"- **{', '.join(row.ids)}**: {row.stimulus} {_sentence(row.reason)}\n" for row in _apart())]
    return "".join(parts)


def _legend() -> Iterator[str]:
    """What each outcome in the tables means."""
    used = {outcome for row in ROWS.values() for outcome in (row.interop, row.strict)} - {Outcome.APART}
    yield "| outcome | |\n|---|---|\n"
    yield from (f"| {_word(outcome)} | {outcome} |\n" for outcome in Outcome if outcome in used)


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| row | what happens | who meets it | outcome | how | rules | clauses |\n|---|---|---|---|---|---|---|\n"
    for row in rows:
        ids = "<br>".join(row.ids)
        outcome = _word(row.interop)
        if row.interop != row.strict:
            outcome += f"; strict: {_word(row.strict)}"
        how = " ".join(filter(None, (row.behaviour, f"As {', '.join(row.rows)}." if row.rows else "")))
        rules = " ".join(f"`{name}`" for name in row.rules[:3]) + (" …" if len(row.rules) > 3 else "")
        clauses = ", ".join(row.clauses[:4]) + (" …" if len(row.clauses) > 4 else "")
        cells = (ids, row.stimulus, str(row.meets), outcome, how, rules, clauses)
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _apart() -> list[Row]:
    return [row for row in ROWS.values() if row.meets is Meets.NOBODY]


def _word(outcome: Outcome) -> str:
    return outcome.name.lower()


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."


def main(arguments: list[str]) -> int:
    """Prints the page, or writes it; the exit status."""
    match arguments:
        case []:
            sys.stdout.write(page())
        case ["write"]:
            DOCS.write_text(page(), encoding="utf-8")
        case _:
            sys.stderr.write("usage: python -m tests.rows [write]\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
