"""Fixtures of the tests against QEMU's own devices: machines that stay up from test to test.

Without QEMU a test fails with one line that says why; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from virtio_test.carrier.qtest.process import Machine

from tests.kernel.cache import BuildError
from tests.peers.machines import FORMS, World

FETCH_SECONDS = 600
"""The test that comes first may have to fetch QEMU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.peers)
            item.add_marker(pytest.mark.timeout(FETCH_SECONDS))


@pytest.fixture(scope="session")
def running() -> Generator[dict[tuple[str, str], World]]:
    """The machines that are up; `world` starts them."""
    worlds: dict[tuple[str, str], World] = {}
    try:
        yield worlds
    finally:
        for each in worlds.values():
            each.close()


@pytest.fixture
def world(running: dict[tuple[str, str], World]) -> Callable[..., World]:
    """Gives a machine with every device on it: one that is up, or a new one."""

    def get(machine: Machine, *forms: str) -> World:
        key = (machine, " ".join(forms))
        known = running.get(key)
        if known is None or not known.usable:
            if known is not None:
                known.close()
            try:
                running[key] = World(machine, forms or FORMS)
            except BuildError as error:
                pytest.fail(str(error), pytrace=False)
        return running[key]

    return get
