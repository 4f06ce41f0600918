"""What the guests are made of: kernels, our driver module and programs, QEMU.

``python -m tests.kernel.build uml|qemu|all`` builds what is missing and prints what there is; ``clean`` removes the
cache. Tests call the functions, which build as well, so a test alone needs no command before it. Each returns at once
when the cache has it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import cache, packages
from tests.kernel.cache import BuildError, run
from tests.kernel.kernels import (
    GUEST,
    TESTING_SUITE,
    Kernel,
    debian_kernel,
    module,
    module_closure,
    testing_kernel,
    uml_kernel,
)

PROGRAMS = ("init", "virtio", "attack", "frame", "reads")
QEMU_LEAST = (10, 2)
"""The first QEMU whose vhost-user-test-device-pci can be created by its user."""


@dataclass(frozen=True, kw_only=True)
class QemuRoot:
    """QEMU with its own libraries, run through its own loader.

    Attributes:
        path: the folder that stands for its root.
        version: as it says itself.
    """

    path: Path
    version: str

    def command(self, program: str = "qemu-system-x86_64") -> list[str]:
        """The words that start ``program``; its arguments follow."""
        libraries = f"{self.path}/usr/lib/x86_64-linux-gnu"
        words = [f"{self.path}/usr/lib64/ld-linux-x86-64.so.2", "--argv0", program, "--library-path", libraries]
        words.append(f"{self.path}/usr/bin/{program}")
        if program.startswith("qemu-system"):
            words += ["-L", f"{self.path}/usr/share/qemu", "-L", f"{self.path}/usr/share/seabios"]
        return words

    def environment(self) -> dict[str, str]:
        """The environment to start it in."""
        return dict(os.environ) | {"QEMU_MODULE_DIR": f"{self.path}/usr/lib/x86_64-linux-gnu/qemu"}


@functools.cache
def qemu() -> QemuRoot:
    """QEMU 10.2 or newer, with qemu-img and qemu-storage-daemon, from Debian's testing.

    Raises:
        BuildError: it cannot be fetched, or is too old.
    """
    path = cache.entry(
        "qemu", cache.digest(TESTING_SUITE, cache.recipe(_fetch_qemu, packages.extract_suite)), _fetch_qemu
    )
    version = (path / "versions.txt").read_text().strip()
    return QemuRoot(path=path / "root", version=version)


def _fetch_qemu(into: Path) -> None:
    packages.extract_suite(TESTING_SUITE, ["qemu-system-x86", "qemu-utils"], into / "root")
    found = QemuRoot(path=into / "root", version="")
    text = run([*found.command(), "--version"], what="starting QEMU", env=found.environment()).splitlines()[0]
    numbers = re.search(r"version (\d+)\.(\d+)", text)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < QEMU_LEAST:
        least = ".".join(map(str, QEMU_LEAST))
        raise BuildError(f"Debian's {TESTING_SUITE} has '{text}', but {least} or newer is needed: name a newer suite")
    (into / "versions.txt").write_text(text + "\n")


# ------------------------------------------------------------------------------------------ our module and programs


@functools.cache
def programs() -> Path:
    """The static programs of the guest: a folder with `PROGRAMS`.

    Raises:
        BuildError: they do not build.
    """
    sources = [GUEST / "user" / f"{name}.c" for name in PROGRAMS]
    return cache.entry(
        "programs", cache.digest(*sources, cache.compiler(), cache.recipe(_build_programs)), _build_programs
    )


def _build_programs(into: Path) -> None:
    flags = ["-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror"]
    for name in PROGRAMS:
        source = GUEST / "user" / f"{name}.c"
        run(["gcc", *flags, "-o", into / name, source], what=f"building {source.name}")


@functools.cache
def tools() -> dict[str, bytes]:
    """Debian's programs for the guest, by path: lspci with its libraries, and busybox.

    Raises:
        BuildError: they cannot be fetched.
    """
    path = cache.entry(
        "tools", cache.digest(TESTING_SUITE, cache.recipe(_fetch_tools, packages.extract_suite)), _fetch_tools
    )
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def _fetch_tools(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into) as folder:
        root = Path(folder) / "root"
        packages.extract_suite(TESTING_SUITE, ["pciutils", "busybox-static"], root)
        loader, libraries = root / "usr/lib64/ld-linux-x86-64.so.2", root / "usr/lib/x86_64-linux-gnu"
        listed = run(
            [loader, "--library-path", libraries, "--list", root / "usr/bin/lspci"], what="listing lspci's libraries"
        )
        wanted = {"bin": [root / "usr/bin/lspci", root / "usr/bin/busybox"], "lib64": [loader]}
        wanted["lib"] = [Path(path) for path in re.findall(r"=> (\S+)", listed) if "ld-linux" not in path]
        for name, files in wanted.items():
            (into / name).mkdir()
            for file in files:
                shutil.copy2(file, into / name)


@functools.cache
def boot_sector() -> bytes:
    """The first two sectors of a disk that SeaBIOS can boot from: guest/boot/sector.S says what they print.

    Raises:
        BuildError: it does not assemble.
    """
    source = GUEST / "boot" / "sector.S"

    def build(into: Path) -> None:
        where = into / "sector.o"
        run(["gcc", "-c", "-m32", "-Wa,--fatal-warnings", "-o", where, source], what=f"assembling {source.name}")
        link = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00", "-o", into / "sector", where]
        run(link, what=f"linking {source.name}")

    key = cache.digest(source, cache.compiler(), cache.recipe(boot_sector))
    return (cache.entry("boot", key, build) / "sector").read_bytes()


def files(kernel: Kernel, names: Sequence[str] = ()) -> dict[str, bytes]:
    """The guest's files by path: init, programs, our driver, and modules of the kernel with all they depend on.

    Args:
        kernel: whose modules.
        names: modules to take from the kernel, such as ``virtio_pci``.
    """
    made = programs()
    contents = {"init": (made / "init").read_bytes(), "bin/virtio": (made / "virtio").read_bytes()}
    contents["lib/modules/virtio_test.ko"] = (module(kernel) / "virtio_test.ko").read_bytes()
    for name, data in module_closure(kernel, names).items():
        contents[f"lib/modules/{name}.ko"] = data
    return contents


def attack_files(kernel: Kernel) -> dict[str, bytes]:
    """What a guest that attacks has besides: the module of ``guest/attack`` and the program that feeds it."""
    return {
        "bin/attack": (programs() / "attack").read_bytes(),
        "lib/modules/virtio_attack.ko": (module(kernel, "virtio_attack") / "virtio_attack.ko").read_bytes(),
    }


def net_files() -> dict[str, bytes]:
    """What a guest with a network has besides: the program that sends frames and waits for them."""
    return {"bin/frame": (programs() / "frame").read_bytes()}


def disk_files() -> dict[str, bytes]:
    """What a guest whose disks are measured has besides: the program that reads from them."""
    return {"bin/reads": (programs() / "reads").read_bytes()}


def main(arguments: Sequence[str]) -> int:
    """Builds what is named; returns the exit status."""
    if list(arguments) == ["clean"]:
        shutil.rmtree(cache.root(), ignore_errors=True)
        return 0
    if len(arguments) != 1 or arguments[0] not in {"uml", "qemu", "all"}:
        print("usage: python -m tests.kernel.build uml|qemu|all|clean", file=sys.stderr)
        return 2
    try:
        if arguments[0] in {"uml", "all"}:
            kernel = uml_kernel()
            attack_files(kernel)
            print(f"user-mode Linux: {kernel.image} ({kernel.version}); module: {module(kernel)}")
        if arguments[0] in {"qemu", "all"}:
            machine = qemu()
            print(f"QEMU: {machine.path} ({machine.version})")
            print(f"programs for the guest: {', '.join(sorted(tools()))}; boot sector: {len(boot_sector())} bytes")
            attack_files(debian_kernel())
            for kernel in (debian_kernel(), testing_kernel()):
                print(f"Debian kernel: {kernel.image} ({kernel.version}); module: {module(kernel)}")
    except BuildError as error:
        print(f"tests.kernel.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
