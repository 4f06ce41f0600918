"""What rules there are, what is broken in a ring at rest, and what to make of it.

`explain` tells all that is known of a rule, or of a row of the robustness catalogue; `CATALOGUE` and `ROWS` hold it as
data, and `Ring.check` (or `check_ring`) finds every rule that an image of guest memory breaks. The judge is always the
core: nothing here reads a ring by itself.
"""

from __future__ import annotations

from .catalogue import CATALOGUE, entries, nearest
from .entry import Entry, Outcome
from .example import Example
from .explain import as_dict, explain, list_rows, list_rules
from .lint import check_ring
from .minimal import EXAMPLES
from .ring import Ring
from .rows import ROWS, SECTIONS, Meets, Row, find_row, rows_of_rule, rules_of_row

__all__ = [
    "CATALOGUE",
    "EXAMPLES",
    "ROWS",
    "SECTIONS",
    "Entry",
    "Example",
    "Meets",
    "Outcome",
    "Ring",
    "Row",
    "as_dict",
    "check_ring",
    "entries",
    "explain",
    "find_row",
    "list_rows",
    "list_rules",
    "nearest",
    "rows_of_rule",
    "rules_of_row",
]
