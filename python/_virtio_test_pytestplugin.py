"""What pytest gets from virtio-test: Hypothesis profiles, the marker `row`, and a corpus of what failed.

It stands beside the package, so that a run of pytest which has nothing to do with virtio imports nothing of it.

- ``--hypothesis-profile=virtio-quick`` (or ``-ci``, ``-deep``): 50, 200 or 5,000 test cases for each property, without
  a deadline.
- ``@pytest.mark.row("A04")``: which row of the robustness catalogue a test shows.
- ``--virtio-corpus=DIR``: a case that made a test fail is kept there as JSON, to be tried again:
  ``for name, case in virtio_test.strategies.load(DIR): case.check()``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

PROFILES = {"virtio-quick": 50, "virtio-ci": 200, "virtio-deep": 5000}
"""Test cases per property, by profile."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one option."""
    group = parser.getgroup("virtio-test")
    group.addoption("--virtio-corpus", metavar="DIR", type=Path, help="keep each case that makes a test fail in DIR")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The marker; and the profiles, before Hypothesis loads the one that is asked for."""
    config.addinivalue_line("markers", "row(*ids): what of virtio-test's robustness catalogue a test shows")
    if str(config.getoption("--hypothesis-profile", default=None)) in PROFILES:
        register_profiles()


def register_profiles() -> None:
    """Derived from the profile in force, as Hypothesis loads its own where CI is set."""
    from hypothesis import settings

    for name, cases in PROFILES.items():
        settings.register_profile(name, parent=settings(), max_examples=cases, deadline=None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the case of what failed; Hypothesis has shrunk it by now."""
    report = yield
    folder: Path | None = item.config.getoption("--virtio-corpus")
    if folder is not None and call.excinfo is not None and report.failed:
        kept = [str(_save(case, folder)) for case in _cases(call.excinfo.value)]
        if kept:
            report.sections.append(("virtio-test: kept as", "\n".join(kept)))
    return report


def _cases(error: BaseException | None) -> Iterator[Any]:
    """The cases that an exception carries, and those of its group and of what it came from."""
    if error is None:
        return
    case = getattr(error, "case", None)
    if hasattr(case, "to_json"):
        yield case
        return
    group: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    for each in group:
        yield from _cases(each)
    yield from _cases(error.__cause__ or error.__context__)


def _save(case: Any, folder: Path) -> Path:
    from virtio_test.strategies import save

    return save(case, folder)
