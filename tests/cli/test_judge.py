"""``virtio-test judge``, as far as nothing is started; the rest is in tests/peers."""

from __future__ import annotations

import pytest
from virtio_test.judge import TARGETS

from tests.cli.conftest import Run


def test_the_targets_are_listed(run: Run) -> None:
    result = run("judge", "--list")
    assert (result.status, result.err) == (0, "")
    assert [line.split()[0] for line in result.out.splitlines()] == list(TARGETS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give one --target or more, or --list"),
        (("--list", "--target", "virtio-test"), "one of the two"),
        (("--target", "qemu"), "no target is called 'qemu'; known are virtio-test, "),
        (("--target", "virtio-test", "--row", "Z99"), "no case for a device shows the row 'Z99'"),
        (("--target", "virtio-test", "--program", "a", "--program", "b"), "2 times --program for 1 targets"),
        (("--target", "virtio-test", "--program", "'"), "cannot be taken apart"),
        (("--target", "virtio-test", "--program", ""), "--program is empty"),
        (("--target", "virtio-test", "--program", "/no/such/program"), "/no/such/program: No such file"),
        (("--target", "virtio-test", "--target", "virtio-test"), "a target is named twice"),
        (("--target", "virtio-test", "--markdown", "/no/such/page"), "no page can be written there"),
        (("--target", "virtio-test", "--markdown", "/"), "no page can be written there"),
        (("--target", "virtio-test", "--patience", "0"), "more than 0 seconds"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    result = run("judge", *arguments)
    assert (result.status, result.out) == (2, "")
    assert complaint in result.err
    assert result.err.count("\n") == 1
