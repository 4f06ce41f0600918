"""Our back-end in a process of its own: ``python -m benches.peers.serve SOCKET [--image FILE] [--wait HOW] [--cpu N]``.

A disk with an image, else a source of entropy. HOW is a strategy of `virtio_test.devices.native`; without it turns are
made in the owner loop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.loop import stopped_by_signals
from virtio_test.transport.vhost_user.backend import Backend


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--wait", choices=["blocking", "adaptive", "busy"])
    parser.add_argument("--cpu", type=int)
    given = parser.parse_args()
    cpus = None if given.cpu is None else (given.cpu,)
    if given.image is None:
        device = RngDevice(native=True, wait=given.wait, cpus=cpus)
    else:
        device = BlkDevice(given.image, native=True, wait=given.wait, cpus=cpus)
    backend = Backend(device, path=given.socket)
    with stopped_by_signals(backend.loop):
        backend.loop.run()
    backend.close()
    device.close()


if __name__ == "__main__":
    main()
