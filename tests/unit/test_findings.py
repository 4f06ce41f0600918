"""What a served driver does against the rules, as lines of the log: one for a rule and reset, and not for ever."""

from __future__ import annotations

import logging

import pytest
from virtio_test._core import GuestMemory
from virtio_test.devices.test import TestDevice
from virtio_test.spec.pci import COMMON
from virtio_test.transport import findings
from virtio_test.transport.findings import log_findings
from virtio_test.transport.pci.function import VirtioPci


def function() -> VirtioPci:
    made = VirtioPci(TestDevice(console=lambda _: None), memory=GuestMemory([(0, 1 << 20)]))
    made.write_config(0x04, b"\x06\x00")
    log_findings(made.bank)
    return made


def write(made: VirtioPci, name: str, value: int) -> None:
    made.write_bar(4, COMMON[name].offset, value.to_bytes(COMMON[name].size, "little"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The rules of the lines, in order."""
    return [record.getMessage().removeprefix("the driver: ").split(" ")[0] for record in caplog.records]


def test_a_rule_makes_one_line_from_reset_to_reset(caplog: pytest.LogCaptureFixture) -> None:
    made = function()
    for _ in range(3):
        write(made, "num_queues", 7)
        write(made, "queue_size", 3)
    assert said(caplog) == ["ReadOnlyRegister", "BadQueueSize"]
    assert made.bank.ignored["BadQueueSize"] == 3
    write(made, "device_status", 0)
    write(made, "queue_size", 3)
    assert said(caplog) == ["ReadOnlyRegister", "BadQueueSize", "BadQueueSize"]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_what_breaks_the_device_is_one_line_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    made = function()
    for status in (1, 3):
        write(made, "device_status", status)
    write(made, "driver_feature_select", 1)
    write(made, "driver_feature", 1)
    write(made, "device_status", 11)
    write(made, "queue_desc", 1 << 40)
    write(made, "queue_enable", 1)
    write(made, "device_status", 15)
    assert made.bank.status.broken
    assert said(caplog) == ["RingUnmapped"]
    assert "[queue 0, address 0x10000000000]" in caplog.text


def test_a_driver_cannot_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MOST_LINES", 5)
    made = function()
    for _ in range(20):
        write(made, "queue_size", 3)
        write(made, "device_status", 0)
    assert said(caplog)[:-1] == ["BadQueueSize"] * 5
    assert caplog.messages[-1] == "the driver: this was the last of 5 lines, more is only counted"
    assert made.bank.ignored["BadQueueSize"] == 20


def test_who_serves_nobody_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made = VirtioPci(TestDevice(console=lambda _: None))
    made.write_config(0x04, b"\x06\x00")
    write(made, "queue_size", 3)
    assert made.bank.ignored["BadQueueSize"] == 1
    assert caplog.records == []
