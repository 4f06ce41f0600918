"""The PCI driver layer: `open_pci` makes `Registers` of a function on any bus, and believes nothing that it reads."""

from .capabilities import Capabilities, Ignored, MsixCapability, Structure, VendorData
from .interrupts import Interrupts
from .legacy import LegacyPciRegisters
from .modern import PciRegisters
from .open import open_pci
from .probe import BarInfo, Findings, PciFunction

__all__ = [
    "BarInfo",
    "Capabilities",
    "Findings",
    "Ignored",
    "Interrupts",
    "LegacyPciRegisters",
    "MsixCapability",
    "PciFunction",
    "PciRegisters",
    "Structure",
    "VendorData",
    "open_pci",
]
