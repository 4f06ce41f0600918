"""The machines over each register transport in this process, in either ring format."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from virtio_test.transport.pci.function import VirtioPci

from tests.stateful.machine import Machine

STEPS = 30


class PciMachine(Machine):
    """With what a PCI driver can do besides: vectors masked one by one, and bus mastering taken away."""

    way = "pci"

    @property
    def side(self) -> VirtioPci:
        side = self.over.side
        assert isinstance(side, VirtioPci)
        return side

    @rule(vector=st.integers(0, 2))
    def mask_or_unmask(self, vector: int) -> None:
        """What comes meanwhile is pending, and one message afterwards."""
        at = self.side.declaration.layout.table
        assert at is not None
        self.masked ^= {vector}
        self.side.write_bar(at.bar, at.offset + 16 * vector + 12, bytes((vector in self.masked, 0, 0, 0)))

    @rule()
    def master_or_not(self) -> None:
        command = int.from_bytes(self.side.read_config(4, 2), "little")
        self.master = not self.master
        self.side.write_config(4, (command & ~4 | 4 * self.master).to_bytes(2, "little"))

    def unblock(self) -> None:
        super().unblock()
        for vector in tuple(self.masked):
            self.mask_or_unmask(vector)
        if not self.master:
            self.master_or_not()


MACHINES: dict[str, type[Machine]] = {"in process": Machine, "mmio": Machine, "pci": PciMachine}


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("way", MACHINES)
def test_whatever_happens(way: str, ring: str) -> None:
    made: Any = type(f"{MACHINES[way].__name__}_{ring}", (MACHINES[way],), {"way": way, "ring": ring})
    cases = max(20, (settings.default or settings()).max_examples // 2)
    run_state_machine_as_test(made, settings=settings(max_examples=cases, stateful_step_count=STEPS, deadline=None))
