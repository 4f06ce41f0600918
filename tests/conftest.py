"""Hypothesis profiles: how hard a run looks; tests that take long; interrupts that arrive, however the run was started.

They are derived from the profile in force (Hypothesis loads its own `ci` where CI is set), and none has a deadline:
on two busy cores the time of one test case says nothing about the code.

Chosen by ``--hypothesis-profile=virtio-deep`` or by ``VIRTIO_TEST_PROFILE=virtio-deep``; without either it is the quick
one. They are the plugin's, which users have as well. Nothing is loaded at import, so a profile chosen by the caller is
never overruled.
"""

from __future__ import annotations

import os
import signal

import pytest
from _virtio_test_pytestplugin import register_profiles
from hypothesis import settings

from tests import shown

register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile", default=None) is None:
        settings.load_profile(os.environ.get("VIRTIO_TEST_PROFILE", "virtio-quick"))
    # A run in the background of a script starts with interrupts ignored, and so would all processes that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Notes which rows have tests, and leaves `deep` tests out.

    A ``-m`` on the command line replaces that of the ini file, so it cannot say that.
    """
    shown.note(config, items)
    if "deep" in (config.getoption("markexpr") or ""):
        return
    deep = [item for item in items if item.get_closest_marker("deep")]
    if deep:
        items[:] = [item for item in items if not item.get_closest_marker("deep")]
        config.hook.pytest_deselected(items=deep)
