"""One attack on a device of QEMU, through the registers of its virtio-pci and without a guest.

The machine's RAM is a file, so the case lies in it as a guest's driver would have left it. Below 640 KiB there is
RAM everywhere, and what a case calls a hole just behind its regions is none: such cases are not put.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from virtio_test._core import GuestMemory, QueueConfig, QueueState
from virtio_test.carrier.qtest import QtestMachine
from virtio_test.driver.pci import open_pci
from virtio_test.driver.registers import Registers
from virtio_test.errors import PeerError
from virtio_test.spec.status import Status
from virtio_test.strategies import Map, Put, RingCase, Unmap

from .rings import Good, Image, image_of, used_entry
from .target import Target
from .verdict import Observation
from .vhost import NotOffered, moved, refusal

__all__ = ["QemuTrial"]

_LOW: Final = 0xA0000
_GOOD: Final = 16 << 20
_RAM: Final = 64 << 20
_LARGEST: Final = 32768
_SLOT: Final = 2
_VERSION_1: Final = 1 << 32
_PACKED: Final = 1 << 34
_LOOK_SECONDS: Final = 0.002
_START_SECONDS: Final = 30.0
_READY: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


class QemuTrial:
    """One case against a machine of its own.

    Args:
        target: the machine's program and its device.
        words: the device, in QEMU's own words.
        patience: seconds that anything may take.
    """

    def __init__(self, target: Target, words: Sequence[str], *, patience: float) -> None:
        self._target = target
        self._words = words
        self._patience = patience

    def ring(self, case: RingCase) -> Observation:
        """Put a ring in front of it.

        Raises:
            NotOffered: it cannot be asked that.
        """
        if any(_in_ram(act.value) for act in case.writes if isinstance(act, Put) and _address(act)):
            raise NotOffered("there is RAM where the case wants a hole")
        if any(isinstance(act, Map | Unmap) for act in (*case.writes, *case.later)):
            raise NotOffered("the memory of a machine stays as it is")
        seen = Observation()
        with QtestMachine(
            self._target.program, self._words, ram=_RAM, timeout=_START_SECONDS, exit_with_parent=False
        ) as machine:
            machine.qtest.timeout = self._patience
            memory = GuestMemory()
            with machine.process.ram_path.open("r+b") as file:
                memory.add_region(0, _LOW, fd=file.fileno(), offset=0)
                memory.add_region(_GOOD, _RAM - _GOOD - (1 << 20), fd=file.fileno(), offset=_GOOD)
            registers = open_pci(machine.pci(_SLOT), timeout=self._patience)
            image = image_of(case, memory=memory)
            try:
                self._attack(registers, image, case, seen)
            except NotOffered:
                raise
            except PeerError as error:
                seen.refused = refusal(error)
            try:
                seen.healed = "same" if self._serves(registers, memory, packed=case.packed) else ""
            except PeerError as error:
                seen.refused = seen.refused or refusal(error)
            # Its socket closes a moment before its process ends: `last_words` waits for that.
            words = machine.process.last_words() if seen.refused else ""
            if not machine.process.running:
                words = words or machine.process.last_words() or "it said nothing"
                seen.death = "".join(each if each.isprintable() else " " for each in words)
        return seen

    def _attack(self, registers: Registers, image: Image, case: RingCase, seen: Observation) -> None:
        self._bring_up(registers, moved(image.config, self._target.attacked), case.features, image.state)
        kick = registers.kick_notifier(self._target.attacked, lambda: image.state.avail)
        kick.notify()
        self._watch(registers, image, seen)
        for _ in image.later():
            before = used_entry(image)[1]
            kick.notify()
            self._watch(registers, image, seen, before)

    def _bring_up(self, registers: Registers, config: QueueConfig, features: int, state: QueueState) -> None:
        if state not in (QueueState(0, 0), QueueState(0x8000, 0x8000)):
            raise NotOffered("a queue behind registers begins at its beginning")
        wanted = _VERSION_1 | features | _PACKED * config.packed
        if missing := wanted & ~registers.device_features():
            raise NotOffered(f"{self._target.name} does not offer the bits {missing:#x}")
        registers.write_status(0)
        registers.write_status(Status.ACKNOWLEDGE)
        registers.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        registers.write_driver_features(wanted)
        registers.write_status(_READY)
        most = registers.queue_max_sizes()[config.index]
        if most < config.size <= _LARGEST:
            raise NotOffered(f"a queue of {config.size}, where {self._target.name} has {most} descriptors")
        registers.enable_queue(config)
        registers.write_status(_READY | Status.DRIVER_OK)

    def _watch(self, registers: Registers, image: Image, seen: Observation, before: int = 0) -> None:
        """Until something happens beside the `before` used ones, or nothing for long enough."""
        end = time.monotonic() + self._patience / 4
        while time.monotonic() < end and seen.count == before and not seen.error:
            time.sleep(_LOOK_SECONDS)
            seen.error = bool(registers.read_status() & Status.DEVICE_NEEDS_RESET)
            # After that answer: whoever gave it is no longer in the middle of the ring.
            seen.used, seen.count = used_entry(image)

    def _serves(self, registers: Registers, memory: GuestMemory, *, packed: bool) -> bool:
        target = self._target
        good = Good(memory, target, packed=packed, base=_GOOD)
        fresh = 0x8000 * packed
        self._bring_up(registers, good.config, 0, QueueState(fresh, fresh))
        registers.kick_notifier(target.attacked, lambda: fresh).notify()
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            right = good.answered()
            if right is not None:
                return right
            time.sleep(_LOOK_SECONDS)
        return False


def _address(act: Put) -> bool:
    return act.field.endswith(".addr")


def _in_ram(address: int) -> bool:
    return 0xF000 <= address < _LOW
