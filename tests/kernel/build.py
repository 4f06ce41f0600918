"""What the guests are made of: kernels, our driver module and programs, QEMU.

``python -m tests.kernel.build uml|qemu|all`` builds what is missing and prints what there is; ``clean`` removes the
cache. Tests call the functions, which build as well, so a test alone needs no command before it. Each returns at once
when the cache has it.
"""

from __future__ import annotations

import functools
import inspect
import lzma
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import cache, packages
from tests.kernel.cache import BuildError, run

GUEST = Path(__file__).resolve().parents[2] / "guest"
MODULE_FILES = ("Kbuild", "virtio_test.c", "virtio_test.h")
PROGRAMS = ("init", "virtio")
UML_SOURCE = "linux-source-6.1"
DEBIAN_IMAGE = "linux-image-cloud-amd64"
DEBIAN_HEADERS = "linux-headers-cloud-amd64"
QEMU_SUITE = "forky"
QEMU_LEAST = (10, 2)
"""The first QEMU whose vhost-user-test-device-pci can be created by its user."""

# What a later out-of-tree module needs of a built kernel tree; all else is 1.3 GiB of sources and objects.
_KEPT = ("Makefile", "Kbuild", "Kconfig", ".config", "Module.symvers", "include", "scripts", "arch/um", "arch/x86")

# The kernel's own environment: its messages are parsed, and MAKEFLAGS of a calling make are not for it.
_ENV = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}} | {
    "LC_ALL": "C",
    "KBUILD_BUILD_USER": "virtio-test",
    "KBUILD_BUILD_HOST": "virtio-test",
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that boots, and how modules are built for it.

    Attributes:
        image: the file to boot (for user-mode Linux: to run).
        tree: the folder for ``make -C``.
        arguments: further arguments for that make.
        modules: folder of its own modules; None where all is built in.
        version: what came, for reports.
    """

    image: Path
    tree: Path
    arguments: tuple[str, ...] = ()
    modules: Path | None = None
    version: str = ""


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
def _compiler() -> str:
    return run(["gcc", "-dumpfullversion"], what="asking for the compiler's version").strip()


def _recipe(*functions: Callable[..., object]) -> str:
    """The source of what builds an entry: the entry is built anew when that changes, and not with every other line."""
    return "".join(map(inspect.getsource, functions))


# ---------------------------------------------------------------------------------------------- user-mode Linux


@functools.cache
def uml_kernel() -> Kernel:
    """User-mode Linux from Debian's sources with guest/uml.config; about 1.5 minutes of two cores when it is new.

    Raises:
        BuildError: the sources cannot be had, or the build fails.
    """
    config = GUEST / "uml.config"
    path = cache.entry(
        "uml", cache.digest(config, UML_SOURCE, _compiler(), _recipe(_build_uml, packages.fetch), *_KEPT), _build_uml
    )
    version = (path / "versions.txt").read_text().strip()
    return Kernel(image=path / "linux", tree=path / "tree", arguments=("ARCH=um",), version=version)


def _build_uml(into: Path) -> None:
    work = into / "work"
    versions = packages.fetch([UML_SOURCE], work)
    run(["tar", "-xJf", work / f"usr/src/{UML_SOURCE}.tar.xz", "-C", work], what="unpacking the kernel's sources")
    source = work / UML_SOURCE
    wanted = (GUEST / "uml.config").read_text()
    make = ["make", "-s", "-C", source, "ARCH=um"]
    run([*make, "tinyconfig"], what="configuring user-mode Linux", env=_ENV)
    with (source / ".config").open("a") as config:
        config.write(wanted)
    run([*make, "olddefconfig"], what="configuring user-mode Linux", env=_ENV)
    _check_config(wanted, (source / ".config").read_text())
    run([*make, f"-j{os.cpu_count() or 1}"], what="building user-mode Linux", env=_ENV)
    shutil.copy2(source / "linux", into / "linux")
    tree = into / "tree"
    for name in _KEPT:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(tree / name)
    shutil.rmtree(work)
    (into / "versions.txt").write_text("\n".join(versions) + "\n")


def _check_config(wanted: str, got: str) -> None:
    lines = set(got.splitlines())
    lost = [line for line in wanted.splitlines() if line.startswith("CONFIG_") and line not in lines]
    if lost:
        raise BuildError(f"guest/uml.config: this kernel has no such setting: {', '.join(lost)}")


# --------------------------------------------------------------------------------------- Debian's kernel and QEMU


@functools.cache
def debian_kernel() -> Kernel:
    """The stock cloud kernel of Debian 12 with the headers that modules are built with.

    Raises:
        BuildError: they cannot be downloaded.
    """
    path = cache.entry(
        "debian", cache.digest(DEBIAN_IMAGE, DEBIAN_HEADERS, _recipe(_fetch_debian, packages.fetch)), _fetch_debian
    )
    image = next((path / "root/boot").glob("vmlinuz-*"))
    release = image.name.removeprefix("vmlinuz-")
    tree = path / f"root/usr/src/linux-headers-{release}"
    # The headers name their other half by its installed place.
    common = path / f"root/usr/src/linux-headers-{release.removesuffix('-cloud-amd64')}-common"
    return Kernel(
        image=image,
        tree=common,
        arguments=(f"KBUILD_OUTPUT={tree}", "ARCH=x86"),
        modules=path / f"root/lib/modules/{release}",
        version=(path / "versions.txt").read_text().splitlines()[0],
    )


def _fetch_debian(into: Path) -> None:
    images = packages.depends(DEBIAN_IMAGE, "linux-image-")
    headers = packages.depends(DEBIAN_HEADERS, "linux-headers-")
    if len(images) != 1 or len(headers) != 1:
        raise BuildError(f"{DEBIAN_IMAGE}, {DEBIAN_HEADERS}: apt names no single kernel: run 'apt-get update'")
    parts = packages.depends(headers[0], "linux-headers-") + packages.depends(headers[0], "linux-kbuild-")
    versions = packages.fetch([*images, *headers, *parts], into / "root")
    versions.sort(key=lambda line: not line.startswith("linux-image-"))
    (into / "versions.txt").write_text("\n".join(versions) + "\n")


@functools.cache
def qemu() -> QemuRoot:
    """QEMU 10.2 or newer, with qemu-img and qemu-storage-daemon, from Debian's testing.

    Raises:
        BuildError: it cannot be fetched, or is too old.
    """
    path = cache.entry("qemu", cache.digest(QEMU_SUITE, _recipe(_fetch_qemu, packages.extract_suite)), _fetch_qemu)
    version = (path / "versions.txt").read_text().strip()
    return QemuRoot(path=path / "root", version=version)


def _fetch_qemu(into: Path) -> None:
    packages.extract_suite(QEMU_SUITE, ["qemu-system-x86", "qemu-utils"], into / "root")
    found = QemuRoot(path=into / "root", version="")
    text = run([*found.command(), "--version"], what="starting QEMU", env=found.environment()).splitlines()[0]
    numbers = re.search(r"version (\d+)\.(\d+)", text)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < QEMU_LEAST:
        least = ".".join(map(str, QEMU_LEAST))
        raise BuildError(f"Debian's {QEMU_SUITE} has '{text}', but {least} or newer is needed: name a newer suite")
    (into / "versions.txt").write_text(text + "\n")


# ------------------------------------------------------------------------------------------ our module and programs


def module(kernel: Kernel) -> Path:
    """Our driver module for a kernel: the folder with ``virtio_test.ko``.

    Raises:
        BuildError: it does not build, or not without a warning.
    """
    sources = [GUEST / "module" / name for name in MODULE_FILES]

    def build(into: Path) -> None:
        for source in sources:
            shutil.copy2(source, into)
        command = ["make", "-s", "-C", kernel.tree, *kernel.arguments, f"M={into}", "W=1", "KCFLAGS=-Werror", "modules"]
        run(command, what=f"building the driver module for {kernel.version}", env=_ENV)

    key = cache.digest(*sources, str(kernel.tree), _compiler(), _recipe(module))
    return cache.entry("module", key, build)


@functools.cache
def programs() -> Path:
    """The static programs of the guest: a folder with ``init`` and ``virtio``.

    Raises:
        BuildError: they do not build.
    """
    sources = [GUEST / "user" / f"{name}.c" for name in PROGRAMS]
    return cache.entry("programs", cache.digest(*sources, _compiler(), _recipe(_build_programs)), _build_programs)


def _build_programs(into: Path) -> None:
    flags = ["-std=gnu11", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror"]
    for name in PROGRAMS:
        source = GUEST / "user" / f"{name}.c"
        run(["gcc", *flags, "-o", into / name, source], what=f"building {source.name}", env=_ENV)


def files(kernel: Kernel, names: Sequence[str] = ()) -> dict[str, bytes]:
    """The guest's files by path: init, programs, our module, and modules of the kernel with all they depend on.

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


def module_closure(kernel: Kernel, names: Sequence[str]) -> Mapping[str, bytes]:
    """Modules of a kernel and what they depend on, in the order in which they can be loaded.

    Raises:
        BuildError: the kernel has no such module.
    """
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found:
            return
        data = _module_data(kernel, name)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends and depends[1] else []:
            add(other)
        found[name] = data

    for name in names:
        add(name)
    return found


def _module_data(kernel: Kernel, name: str) -> bytes:
    if kernel.modules is not None:
        # File names may have dashes where the module's name has underscores.
        for path in kernel.modules.rglob("*.ko*"):
            if path.name.split(".")[0].replace("-", "_") == name:
                data = path.read_bytes()
                return lzma.decompress(data) if path.suffix == ".xz" else data
    raise BuildError(f"{kernel.version} has no module '{name}'")


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
            print(f"user-mode Linux: {kernel.image} ({kernel.version}); module: {module(kernel)}")
        if arguments[0] in {"qemu", "all"}:
            machine, kernel = qemu(), debian_kernel()
            print(f"QEMU: {machine.path} ({machine.version})")
            print(f"Debian kernel: {kernel.image} ({kernel.version}); module: {module(kernel)}")
    except BuildError as error:
        print(f"tests.kernel.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
