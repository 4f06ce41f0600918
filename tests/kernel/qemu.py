"""Stock Debian kernels under QEMU's own translator, with any devices; and QEMU with its firmware alone.

A device is a list of QEMU's words, as the functions here make them, so several can simply be added up. Names such as
``root`` are ids in one QEMU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.kernel import build
from tests.kernel.console import Console, GuestError
from tests.kernel.guest import ARGUMENTS, Guest
from tests.kernel.qmp import Monitor

MEMORY_MIB = 256
PCI_MODULES = ("virtio_pci",)
MMIO_MODULES = ("virtio_mmio",)
IOMMU = "intel-iommu,intremap=off,caching-mode=on"
"""QEMU's IOMMU; caching mode lets it tell vfio devices of every mapping."""

Words = Sequence[str]


def vhost_user_test(
    socket: Path,
    *,
    machine: str = "q35",
    virtio_id: int = 45,
    config_size: int = 12,
    queue_size: int = 128,
    properties: Words = (),
) -> list[str]:
    """The generic vhost-user device in front of the back-end at ``socket``: on PCI, or on the MMIO bus of microvm.

    Args:
        socket: of the back-end, which must be listening.
        machine: where it will be plugged in.
        virtio_id: the device behind it.
        config_size: bytes of its configuration space.
        queue_size: descriptors of its queue.
        properties: further ones, such as ``packed=off``.
    """
    name = "vhost-user-test-device" + ("" if machine == "microvm" else "-pci")
    words = [f"chardev=c,virtio-id={virtio_id},num_vqs=1,vq_size={queue_size},config_size={config_size}", *properties]
    return ["-chardev", f"socket,id=c,path={socket}", "-device", ",".join([name, *words])]


def vhost_user_net(socket: Path, *, pairs: int = 1, properties: Words = ()) -> list[str]:
    """QEMU's own virtio-net front-end, whose control queue is QEMU's, before the back-end at ``socket``."""
    backend = f"vhost-user,id=n,chardev=n,queues={pairs}"
    words = ["virtio-net-pci", "netdev=n", f"mq={'on' if pairs > 1 else 'off'}", "romfile=", *properties]
    return ["-chardev", f"socket,id=n,path={socket}", "-netdev", backend, "-device", ",".join(words)]


def vhost_user_blk(
    socket: Path, *, name: str = "b", queues: int = 1, properties: Words = (), reconnect_ms: int | None = None
) -> list[str]:
    """QEMU's own virtio-blk front-end, before the back-end at ``socket``, or one after the other if it reconnects."""
    words = ["vhost-user-blk-pci", f"chardev={name}", f"num-queues={queues}", *properties]
    again = "" if reconnect_ms is None else f",reconnect-ms={reconnect_ms}"
    return ["-chardev", f"socket,id={name},path={socket}{again}", "-device", ",".join(words)]


def vfio_user(socket: Path, **properties: object) -> list[str]:
    """The PCI function that the vfio-user server at ``socket`` serves; properties are those of QEMU's device."""
    device = {"driver": "vfio-user-pci", "socket": {"path": str(socket), "type": "unix"}, **properties}
    return ["-device", json.dumps(device)]


def root_port(name: str = "root") -> list[str]:
    """A PCI Express root port; a device is behind it with ``bus=name``."""
    return ["-device", f"pcie-root-port,id={name},chassis=1"]


def _command(devices: Words, *, machine: str, shared: bool = True, iommu: bool = False, cpus: int = 1) -> list[str]:
    command = [*build.qemu().command(), "-accel", "tcg", "-M", f"{machine},memory-backend=m0", "-m", str(MEMORY_MIB)]
    # Random numbers of its own spare the kernel some seconds of collecting them.
    command += ["-smp", str(cpus), "-cpu", "qemu64,+rdrand"]
    if machine == "microvm":
        command += ["-global", "virtio-mmio.force-legacy=false", "-cpu", "max"]
    # Without a file behind it memory comes to a vfio-user server without descriptors.
    backend = "memory-backend-memfd,share=on" if shared else "memory-backend-ram"
    command += ["-object", f"{backend},id=m0,size={MEMORY_MIB}M", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", "-serial", "stdio"]
    # Before every device that it is to translate for.
    command += ["-device", IOMMU] if iommu else []
    return [*command, *devices]


class Qemu(Guest):
    """A stock Debian kernel under QEMU.

    Args:
        devices: QEMU's words for them.
        machine: ``q35`` (PCI Express), ``pc`` (PCI), or ``microvm`` (virtio over MMIO).
        kernel: of `build`; Debian 12's by default.
        modules: to load, with what they depend on; those of the machine's virtio bus by default.
        append: further words for the kernel.
        shared: whether QEMU can give the guest's memory away as a file.
        iommu: whether there is QEMU's IOMMU and the kernel uses it for all devices.
        parameters: of modules, by name, such as ``{"virtio_pci": "force_legacy=1"}``.
        tools: whether the guest has lspci and busybox.
        cpus: processors.
        files: further files, by path.
        incoming: a file that a guest was migrated to: it goes on here, and nothing is booted.
        apart: whether what QEMU itself says stays out of the console, into whose lines it would fall.

    Attributes:
        machine: as it was asked for.
        kernel: what was booted.
        monitor: where its monitor listens (`qmp`).
    """

    def __init__(
        self,
        devices: Words,
        *,
        machine: str = "q35",
        kernel: build.Kernel | None = None,
        modules: Words | None = None,
        append: str = "",
        shared: bool = True,
        iommu: bool = False,
        parameters: Mapping[str, str] | None = None,
        tools: bool = False,
        cpus: int = 1,
        files: Mapping[str, bytes] = MappingProxyType({}),
        incoming: Path | None = None,
        apart: bool = False,
    ) -> None:
        self.machine = machine
        self.kernel = kernel = kernel or build.debian_kernel()
        if modules is None:
            modules = MMIO_MODULES if machine == "microvm" else PCI_MODULES
        super().__init__(build.files(kernel, modules) | (build.tools() if tools else {}) | dict(files))
        words = ["console=ttyS0", _clock(machine), ARGUMENTS, "intel_iommu=on iommu=nopt" if iommu else "", append]
        # What is built in takes its parameters here, and what is loaded ignores them here.
        words += [f"{name}.{value}" for name, value in (parameters or {}).items()]
        command = _command(devices, machine=machine, shared=shared, iommu=iommu, cpus=cpus)
        command += ["-kernel", str(kernel.image), "-initrd", str(self._initrd), "-append", " ".join(words)]
        self.monitor = self.folder / "monitor"
        command += ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
        if incoming is not None:
            command += ["-incoming", f"file:{incoming}"]
            self.console = Console(command, env=build.qemu().environment(), cwd=self.folder)
            try:
                # What came before would not find its way into the guest.
                with Monitor(self.monitor) as monitor:
                    monitor.wait_until_running()
            except GuestError:
                self.close()
                raise
            return
        with (self.folder / "qemu.log").open("wb") as log:
            self._boot(command, env=build.qemu().environment(), stderr=log if apart else None)
        try:
            for module in build.module_closure(kernel, modules):
                self.command(f"insmod {module} {(parameters or {}).get(module, '')}".rstrip())
        except GuestError:
            self.close()
            raise


class Firmware(Console):
    """QEMU with SeaBIOS and what it boots from, without a kernel of ours.

    Args:
        devices: QEMU's words for them.
        machine: ``q35`` or ``pc``.
        shared: whether QEMU can give the guest's memory away as a file.
    """

    def __init__(self, devices: Words, *, machine: str = "q35", shared: bool = True) -> None:
        super().__init__(_command(devices, machine=machine, shared=shared), env=build.qemu().environment())


def _clock(machine: str) -> str:
    """What the kernel must be told about time.

    microvm has no timer interrupt to count by, so the kernel measures the processor's clock against a port; on a
    busy host it gives up and waits for ticks that never come. The clock is the host's and need not be exact here.
    """
    if machine != "microvm":
        return ""
    found = re.search(r"^cpu MHz\s*:\s*(\d+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"tsc_early_khz={int(found[1]) * 1000 if found else 2_000_000}"
