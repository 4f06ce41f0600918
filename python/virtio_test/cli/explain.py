"""``virtio-test explain``: what the catalogue of rules knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from virtio_test import checks
from virtio_test.console import print_line

__all__ = ["explain"]


def explain(rule: str | None, *, as_json: bool = False, show: Callable[[str], object] = print_line) -> str:
    """Show one rule, or a line for each when it is None; returns what was shown.

    Raises:
        InvalidArgument: no rule has that name.
    """
    if as_json:
        names = list(checks.CATALOGUE) if rule is None else [rule]
        text = json.dumps({"rules": [entry for name in names for entry in checks.as_dict(name)]}, indent=2)
    elif rule is None:
        text = checks.list_rules()
    else:
        text = checks.explain(rule, width=min(shutil.get_terminal_size((100, 24)).columns, 120))
    show(text)
    return text
