"""The kernels that are booted, and the modules for them: user-mode Linux, stock Debian 12, stock Debian testing.

Each function returns at once when the cache has its kernel (`cache.py`).
"""

from __future__ import annotations

import functools
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import cache, packages
from tests.kernel.cache import BuildError, run

GUEST = Path(__file__).resolve().parents[2] / "guest"
MODULES = {
    "virtio_test": ("module", ("Kbuild", "virtio_test.c", "virtio_test.h")),
    "virtio_attack": ("attack", ("Kbuild", "virtio_attack.c", "virtio_attack.h")),
}
"""Our modules: the folder of `GUEST`, and what is in it."""
UML_SOURCE = "linux-source-6.1"
DEBIAN_IMAGE = "linux-image-cloud-amd64"
DEBIAN_HEADERS = "linux-headers-cloud-amd64"
TESTING_SUITE = "forky"
TESTING_LEAST = (6, 18)
"""The first Linux whose virtio_ring accepts IN_ORDER."""

# What an out-of-tree build calls besides the compiler, which comes with the headers; the small initramfs tool stands
# for the large one that the kernel's package would bring.
_BUILD_TOOLS = ("make", "dash", "coreutils", "sed", "grep", "mawk", "findutils", "tiny-initramfs")

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
        root: the root file system in which modules are built, with the compiler of its suite; None for this system.
            `tree` is then a path inside it.
        version: what came, for reports.
    """

    image: Path
    tree: Path
    arguments: tuple[str, ...] = ()
    modules: Path | None = None
    root: Path | None = None
    version: str = ""

    @property
    def short(self) -> str:
        """Its version without Debian's part, such as ``6.1``."""
        found = re.search(r"\d+\.\d+", self.version)
        return found[0] if found else self.version


# ---------------------------------------------------------------------------------------------- user-mode Linux


@functools.cache
def uml_kernel() -> Kernel:
    """User-mode Linux from Debian's sources with guest/uml.config; about 1.5 minutes of two cores when it is new.

    Raises:
        BuildError: the sources cannot be had, or the build fails.
    """
    config = GUEST / "uml.config"
    recipe = cache.recipe(_build_uml, packages.fetch)
    path = cache.entry("uml", cache.digest(config, UML_SOURCE, cache.compiler(), recipe, *_KEPT), _fresh(_build_uml))
    version = (path / "versions.txt").read_text().strip()
    return Kernel(image=path / "linux", tree=path / "tree", arguments=("ARCH=um",), version=version)


def _fresh(build: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda into: packages.with_fresh_lists(build, into)


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


# --------------------------------------------------------------------------------------- Debian's kernels


@functools.cache
def debian_kernel() -> Kernel:
    """The stock cloud kernel of Debian 12 with the headers that modules are built with.

    Raises:
        BuildError: they cannot be downloaded.
    """
    path = cache.entry(
        "debian",
        cache.digest(DEBIAN_IMAGE, DEBIAN_HEADERS, cache.recipe(_fetch_debian, packages.fetch)),
        _fresh(_fetch_debian),
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
def testing_kernel() -> Kernel:
    """The cloud kernel of Debian's testing, in a root file system with its headers and its suite's compiler.

    Raises:
        BuildError: it cannot be fetched, or is too old.
    """
    key = cache.digest(TESTING_SUITE, *_BUILD_TOOLS, cache.recipe(_fetch_testing, packages.extract_suite))
    path = cache.entry("testing", key, _fetch_testing)
    release = (path / "versions.txt").read_text().strip()
    modules = path / f"root/usr/lib/modules/{release}"
    return Kernel(
        image=modules / "vmlinuz",
        tree=Path(f"/usr/src/linux-headers-{release}"),
        modules=modules,
        root=path / "root",
        version=f"linux-image-{release}",
    )


def _fetch_testing(into: Path) -> None:
    root = into / "root"
    packages.extract_suite(TESTING_SUITE, [DEBIAN_IMAGE, DEBIAN_HEADERS, *_BUILD_TOOLS], root)
    # What the packages' scripts would have made, which nobody has run.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    (root / "usr/bin/awk").symlink_to("mawk")
    for name in ("dev", "proc"):
        (root / name).mkdir(exist_ok=True)
    for name in ("doc", "locale", "man"):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    releases = [path.name for path in (root / "usr/lib/modules").iterdir()]
    if len(releases) != 1:
        raise BuildError(f"{DEBIAN_IMAGE} of Debian's {TESTING_SUITE} brought {len(releases)} kernels")
    numbers = re.match(r"(\d+)\.(\d+)", releases[0])
    if numbers is None or (int(numbers[1]), int(numbers[2])) < TESTING_LEAST:
        least = ".".join(map(str, TESTING_LEAST))
        raise BuildError(f"Debian's {TESTING_SUITE} has Linux {releases[0]}, but {least} or newer is needed")
    (into / "versions.txt").write_text(releases[0] + "\n")


# -------------------------------------------------------------------------------------------------------- modules


def module(kernel: Kernel, name: str = "virtio_test") -> Path:
    """One of our modules for a kernel: the folder with ``NAME.ko``.

    Args:
        kernel: what to build it for.
        name: of `MODULES`; the driver of the test device by default.

    Raises:
        BuildError: it does not build, or not without a warning.
    """
    folder, files = MODULES[name]
    sources = [GUEST / folder / file for file in files]
    what = f"building {name} for {kernel.version}"

    def make(folder: Path, named: Path) -> list[str | Path]:
        for source in sources:
            shutil.copy2(source, folder)
        options = ["W=1", "KCFLAGS=-Werror"]
        return ["make", "-s", "-C", kernel.tree, *kernel.arguments, f"M={named}", *options, "modules"]

    def build(into: Path) -> None:
        if kernel.root is None:
            run(make(into, into), what=what, env=_ENV)
            return
        with tempfile.TemporaryDirectory(prefix="module-", dir=kernel.root / "tmp") as there:
            here = Path(there)
            packages.run_in_root(kernel.root, make(here, "/" / here.relative_to(kernel.root)), what=what)
            shutil.copy2(here / f"{name}.ko", into)

    parts = (str(kernel.root), str(kernel.tree), cache.compiler(), cache.recipe(module, packages.run_in_root))
    return cache.entry(folder, cache.digest(*sources, *parts), build)


def module_closure(kernel: Kernel, names: Sequence[str]) -> Mapping[str, bytes]:
    """Modules of a kernel and what they depend on, in the order in which they can be loaded.

    What is built in is left out.

    Raises:
        BuildError: the kernel has no such module.
    """
    found: dict[str, bytes] = {}
    builtin = _builtin(kernel)

    def add(name: str) -> None:
        if name in found or name in builtin:
            return
        data = _module_data(kernel, name)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends and depends[1] else []:
            add(_module_name(other))
        found[name] = data

    for name in names:
        add(name)
    return found


def _module_name(path: str) -> str:
    # File names may have dashes where the module's name has underscores.
    return path.rsplit("/", 1)[-1].split(".", maxsplit=1)[0].replace("-", "_")


def _builtin(kernel: Kernel) -> set[str]:
    if kernel.modules is None:
        return set()
    return {_module_name(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}


def _module_data(kernel: Kernel, name: str) -> bytes:
    if kernel.modules is not None:
        for path in kernel.modules.rglob("*.ko*"):
            if _module_name(path.name) == _module_name(name):
                data = path.read_bytes()
                return lzma.decompress(data) if path.suffix == ".xz" else data
    raise BuildError(f"{kernel.version} has no module '{name}'")
