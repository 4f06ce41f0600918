"""``virtio-test explain``: what the catalogue of rules knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from virtio_test import checks
from virtio_test.console import print_line

__all__ = ["explain"]


def explain(
    rule: str | None,
    *,
    rows: bool = False,
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
) -> str:
    """Show one rule or row; when it is None a line for each rule, or for each row. Returns what was shown.

    Raises:
        InvalidArgument: no rule has that name, and no row that id.
    """
    if as_json:
        names = list(checks.ROWS if rows else checks.CATALOGUE) if rule is None else [rule]
        found = [entry for name in names for entry in checks.as_dict(name)]
        # What has an id is a row.
        text = json.dumps({"rows" if all("id" in each for each in found) else "rules": found}, indent=2)
    elif rule is None:
        text = checks.list_rows() if rows else checks.list_rules()
    else:
        text = checks.explain(rule, width=min(shutil.get_terminal_size((100, 24)).columns, 120))
    show(text)
    return text
