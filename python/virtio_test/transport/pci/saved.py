"""What of a saved state belongs to the PCI function: configuration space, selectors, interrupts, shared memory.

Theory
------
Configuration space is saved whole and judged bit by bit: what software cannot write must be what this function
declares, so a state of another function, or one whose BARs or capabilities were moved, is refused. What software can
write may be anything that it could have written: a power state that is there, no reset that is still asked for.

The MSI-X table is as long as declared, whatever the state says of itself; vectors are in it, or NO_VECTOR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from virtio_test.errors import SavedStateError
from virtio_test.spec.pci import ISR_CONFIG, ISR_QUEUE, NO_VECTOR
from virtio_test.transport.saved import data, fields, number, numbers

from .common import CommonRegisters
from .configspace import ConfigBytes
from .interrupts import Interrupts
from .legacy import LegacyRegisters
from .regions import Ram

__all__ = ["FunctionState", "SavedFunction"]

_FIELDS: Final = (
    "config",
    "device_feature_select",
    "driver_feature_select",
    "queue_select",
    "legacy_queue_select",
    "isr",
    "config_vector",
    "queue_vectors",
    "msix_table",
    "msix_pending",
    "shared",
)
_WORD: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class FunctionState:
    """Registers that fit their function."""

    config: bytes
    selects: tuple[int, int, int, int]
    isr: int
    config_vector: int
    queue_vectors: list[int]
    table: bytes
    pending: set[int]
    shared: dict[int, bytes]


class SavedFunction:
    """The registers of one function, to be saved and restored.

    Args:
        config: its configuration space.
        common: the common configuration.
        legacy: the legacy registers.
        interrupts: vectors, ISR status and MSI-X table.
        shared: region id → shared memory.
        power_at: where power states are, each in the two lowest bits of a byte.
        flr_at: where a reset is asked for: offset and bit.
    """

    def __init__(
        self,
        config: ConfigBytes,
        common: CommonRegisters,
        legacy: LegacyRegisters,
        interrupts: Interrupts,
        shared: Mapping[int, Ram],
        *,
        power_at: Sequence[int],
        flr_at: Sequence[tuple[int, int]],
    ) -> None:
        self._config = config
        self._common = common
        self._legacy = legacy
        self._interrupts = interrupts
        self._shared = shared
        self._power_at = power_at
        self._flr_at = flr_at

    def save(self) -> dict[str, object]:
        """The registers as JSON values; bytes as hexadecimal text."""
        table = self._interrupts.table
        return {
            "config": self._config.data.hex(),
            "device_feature_select": self._common.device_feature_select,
            "driver_feature_select": self._common.driver_feature_select,
            "queue_select": self._common.queue_select,
            "legacy_queue_select": self._legacy.queue_select,
            "isr": self._interrupts.isr,
            "config_vector": self._interrupts.config_vector,
            "queue_vectors": list(self._interrupts.queue_vectors),
            "msix_table": "" if table is None else table.entries.hex(),
            "msix_pending": [] if table is None else table.pending,
            "shared": {str(key): each.data.hex() for key, each in self._shared.items()},
        }

    def check(self, state: object) -> FunctionState:
        """Judge registers; nothing is changed.

        Raises:
            SavedStateError: they are malformed, or of another function.
        """
        parts = fields(state, "PCI function", _FIELDS)
        config = data(parts["config"], "PCI configuration space", self._config.size)
        self._check_config(config)
        table = self._interrupts.table
        vectors = 0 if table is None else table.vectors
        entries = data(parts["msix_table"], "MSI-X table", 0 if table is None else len(table.entries))
        if table is not None and not table.possible(entries):
            raise SavedStateError("the saved MSI-X table has bits that are not there")
        pending = numbers(parts["msix_pending"], "pending MSI-X vectors", vectors - 1)
        mapped = numbers(parts["queue_vectors"], "queue vectors", NO_VECTOR, count=len(self._interrupts.queue_vectors))
        for each in (*mapped, config_vector := number(parts["config_vector"], "config vector", NO_VECTOR)):
            if self._interrupts.valid(each) != each:
                raise SavedStateError(f"the saved vector {each} is none of the {vectors} that there are")
        regions = fields(parts["shared"], "shared memory", tuple(str(key) for key in self._shared))
        return FunctionState(
            config,
            (
                number(parts["device_feature_select"], "device_feature_select", _WORD),
                number(parts["driver_feature_select"], "driver_feature_select", _WORD),
                number(parts["queue_select"], "queue_select", 0xFFFF),
                number(parts["legacy_queue_select"], "legacy queue_select", 0xFFFF),
            ),
            number(parts["isr"], "ISR status", ISR_QUEUE | ISR_CONFIG),
            config_vector,
            mapped,
            entries,
            set(pending),
            {
                key: data(regions[str(key)], f"shared memory region {key}", len(each.data))
                for key, each in self._shared.items()
            },
        )

    def _check_config(self, config: bytes) -> None:
        if (at := self._config.impossible(config)) is not None:
            raise SavedStateError(
                f"the saved PCI configuration space has {config[at]:#04x} at {at:#x}, which is not of this function"
            )
        for at in self._power_at:
            if config[at] & 3 in (1, 2):
                raise SavedStateError(f"the saved power state is D{config[at] & 3}, and there are D0 and D3")
        for at, bit in self._flr_at:
            if config[at] & bit:
                raise SavedStateError("the saved PCI function is in the middle of a reset")

    def apply(self, state: FunctionState) -> None:
        """Take over what `check` gave. The function settles afterwards, and so sends what is pending."""
        self._config.data[:] = state.config
        common = self._common
        common.device_feature_select, common.driver_feature_select, common.queue_select, legacy = state.selects
        self._legacy.queue_select = legacy
        self._interrupts.isr = state.isr
        self._interrupts.config_vector = state.config_vector
        self._interrupts.queue_vectors[:] = state.queue_vectors
        if self._interrupts.table is not None:
            self._interrupts.table.take_over(state.table, state.pending)
        for key, content in state.shared.items():
            self._shared[key].data[:] = content
