"""QEMU's own devices under our drivers, with no guest: a machine that is reached through QEMU's test protocol."""

from .machine import QtestMachine
from .mmio import QtestMmio
from .pci import QtestPci
from .process import QemuProcess, halting_firmware
from .protocol import Qtest

__all__ = ["QemuProcess", "Qtest", "QtestMachine", "QtestMmio", "QtestPci", "halting_firmware"]
