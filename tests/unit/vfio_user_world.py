"""A vfio-user server in its own thread, and clients before it, over real sockets."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from virtio_test._core import GuestMemory
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.server import VfioUserServer
from virtio_test.devices.test import TestDevice
from virtio_test.driver.pci import open_pci
from virtio_test.driver.test import TestDriver
from virtio_test.errors import MessageError
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.flavours import Flavour
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.pci.interface import PciEndpoint

from .world import ServerThread, eventually

PAGE = 4096
MODERN_BAR = 4
STATUS = 0x14
"""Where `device_status` is: in BAR 4, whose first structure is the common configuration."""


def silent(_line: str) -> None:
    """A console that nobody reads."""


def a_file(size: int = PAGE) -> int:
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class Watched(VirtioPci):
    """A function that notes when its carrier holds it."""

    @property
    def calls(self) -> list[str]:
        return self.__dict__.setdefault("noted", [])

    def hold(self) -> None:
        self.calls.append("hold")
        super().hold()

    def release(self) -> None:
        self.calls.append("release")
        super().release()


class Server(ServerThread):
    """A `VfioUserServer` of a PCI function, the test device's if none is given, running in a thread."""

    def __init__(
        self,
        path: Path,
        endpoint: PciEndpoint | None = None,
        *,
        flavour: Flavour = "transitional",
        patience: float = 2.0,
    ) -> None:
        if endpoint is None:
            device = TestDevice(console=silent)
            endpoint = VirtioPci(device, flavour=flavour, loop=OwnerLoop(), memory=GuestMemory())
        self.endpoint = endpoint
        self.server = VfioUserServer(endpoint, path=path, patience=patience)
        super().__init__(path, self.server)

    @property
    def last_error(self) -> MessageError | None:
        return self.server.last_error

    def idle(self) -> bool:
        """Wait until no client is connected; whether that came, with nothing of a client left."""

        def nothing_left() -> bool:
            gone = self.server.session is None and not self.endpoint.memory.regions
            return gone and not self.endpoint.external_table

        return eventually(nothing_left)


def serving(
    path: Path,
    endpoint: PciEndpoint | None = None,
    *,
    flavour: Flavour = "transitional",
    patience: float = 2.0,
) -> closing[Server]:
    """A server at `path`, which must live to the end."""
    return closing(Server(path, endpoint, flavour=flavour, patience=patience))


def small_memory() -> GuestMemory:
    return GuestMemory([(0, 1 << 20)])


def bring_up(client: VfioUserClient) -> TestDriver:
    """The test device's driver, up and ready, behind `client`."""
    driver = TestDriver(open_pci(client), console=silent)
    driver.initialize()
    return driver


def served(server: Server) -> None:
    """The server serves as if nothing had happened, and forgets it again."""
    with VfioUserClient(server.path, memory=small_memory()) as client:
        driver = bring_up(client)
        assert driver.request(1).ret == 102
    assert server.idle()
