"""A device that keeps what it is asked for until its driver tells it to answer: ``--socket PATH --policy POLICY``.

It is the test device but for that. The configuration fields that a driver may write say what is to be done:

* ``event`` 1: answer all that is kept, oldest first; 2: newest first;
* ``actual``: `num_pages` becomes the same, a change of the configuration by the device.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

from virtio_test._core import Chain, GuestMemory, Policy
from virtio_test.carrier.uml import serve_uml
from virtio_test.config import ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import CAN_PRINT, CONFIG_LAYOUT
from virtio_test.loop import OwnerLoop
from virtio_test.spec.ids import TEST_DEVICE_ID
from virtio_test.spec.testdevice import QUEUE_SIZE, REQUEST, RESPONSE
from virtio_test.transport.findings import log_findings
from virtio_test.transport.pci.function import VirtioPci

NEWEST_FIRST: Final = 2


class LateDevice(BaseDevice):
    """The device."""

    def __init__(self) -> None:
        super().__init__(
            TEST_DEVICE_ID,
            handlers={0: kept(self._keep)},
            queue_sizes=(QUEUE_SIZE,),
            features=CAN_PRINT,
            config=ConfigSpace(CONFIG_LAYOUT),
        )
        self.config.on_driver_write = self._told
        self._answers: dict[int, bytes] = {}

    def _keep(self, chain: Chain) -> None:
        # Read at once: what the ring holds later is its driver's affair.
        self._answers[id(chain)] = _answer(chain)

    def reset(self) -> None:
        super().reset()
        self._answers.clear()

    def _told(self, names: tuple[str, ...]) -> None:
        if "actual" in names:
            self.config.update(num_pages=self.config["actual"])
        if "event" in names:
            newest_first = self.config["event"] == NEWEST_FIRST
            for chain in reversed(self.kept) if newest_first else self.kept:
                self.complete(chain, self._answers.pop(id(chain)))


def _answer(chain: Chain) -> bytes:
    if chain.readable < REQUEST.size or chain.writable < RESPONSE.size:
        return b""
    _, *numbers, _ = REQUEST.unpack(chain.read(REQUEST.size))
    return RESPONSE.pack(*(number + 100 for number in numbers))


def main() -> None:
    path, policy = (sys.argv[sys.argv.index(option) + 1] for option in ("--socket", "--policy"))
    logging.basicConfig(format="virtio-test: %(levelname)s: %(message)s", level=logging.INFO)

    def function(loop: OwnerLoop, memory: GuestMemory) -> VirtioPci:
        rules = {"interop": Policy.interop, "strict": Policy.strict}[policy]
        made = VirtioPci(LateDevice(), loop=loop, memory=memory, policy=rules)
        log_findings(made.bank)
        return made

    serve_uml(function, path, ready=lambda _: print("virtio-test: serving late", file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
