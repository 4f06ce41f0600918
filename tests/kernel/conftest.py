"""Fixtures of the real-kernel tests: a server on a short path, and guests that are killed whatever happens.

A missing piece (no network, no package) fails the test with one line; nothing is skipped.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.kernel import build
from tests.kernel.cache import BuildError
from tests.kernel.guest import Uml
from tests.kernel.qemu import Qemu, vhost_user_test
from tests.kernel.server import Server

BUILD_SECONDS = 900
"""A test that comes first may have to build a kernel."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and "kernel" in item.keywords:
            item.add_marker(pytest.mark.timeout(BUILD_SECONDS))


T = TypeVar("T")


def _built(make: Callable[[], T]) -> T:
    try:
        return make()
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def uml_kernel() -> build.Kernel:
    def make() -> build.Kernel:
        kernel = build.uml_kernel()
        build.files(kernel)
        return kernel

    return _built(make)


@pytest.fixture(scope="session")
def qemu_root() -> build.QemuRoot:
    def make() -> build.QemuRoot:
        build.files(build.debian_kernel())
        return build.qemu()

    return _built(make)


@pytest.fixture
def serve() -> Generator[Callable[..., Server]]:
    """Starts servers: the arguments are those of ``virtio-test serve``."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(_serve, stack)


@pytest.fixture(scope="module")
def serve_all() -> Generator[Callable[..., Server]]:
    """The same for servers that several tests share."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(_serve, stack)


def _serve(stack: contextlib.ExitStack, *arguments: str, **options: Sequence[str]) -> Server:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtio-test-")))
    server = stack.enter_context(Server(folder, *arguments, **options))
    # Of a test that fails pytest shows this.
    stack.callback(lambda: print(f"server {' '.join(arguments)}:\n{server.log}"))
    return server


@pytest.fixture
def uml(uml_kernel: build.Kernel) -> Generator[Callable[..., Uml]]:
    """Boots user-mode Linux in front of a server."""
    assert uml_kernel.image.is_file()
    with contextlib.ExitStack() as stack:

        def boot(server: Server, **options: object) -> Uml:
            return stack.enter_context(Uml(server.path, **options))  # pyright: ignore[reportArgumentType]

        yield boot


@pytest.fixture
def boot(qemu_root: build.QemuRoot) -> Generator[Callable[..., Qemu]]:
    """Boots a Debian kernel under QEMU with the devices that are named; options as of `Qemu`."""
    assert qemu_root.path.is_dir()
    with contextlib.ExitStack() as stack:
        yield functools.partial(_boot, stack)


@pytest.fixture(scope="module")
def boot_one(qemu_root: build.QemuRoot) -> Generator[Callable[..., Qemu]]:
    """The same for a guest that several tests share."""
    assert qemu_root.path.is_dir()
    with contextlib.ExitStack() as stack:
        yield functools.partial(_boot, stack)


def _boot(stack: contextlib.ExitStack, devices: Sequence[str], **options: object) -> Qemu:
    return stack.enter_context(Qemu(devices, **options))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def qemu(boot: Callable[..., Qemu]) -> Callable[..., Qemu]:
    """Boots Debian's kernel under QEMU with the generic vhost-user device before a server; options as of that."""

    def start(server: Server, *, on: str = "q35", kernel: build.Kernel | None = None, **options: object) -> Qemu:
        device = vhost_user_test(server.path, machine=on, **options)  # pyright: ignore[reportArgumentType]
        return boot(device, machine=on, kernel=kernel)

    return start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which kernels and which QEMU the tests ran on."""
    for what, made in (
        ("user-mode Linux", build.uml_kernel),
        ("Debian's kernel", build.debian_kernel),
        ("Debian's newer kernel", build.testing_kernel),
    ):
        if made.cache_info().currsize:
            terminalreporter.write_line(f"{what}: {made().version}")
    if build.qemu.cache_info().currsize:
        terminalreporter.write_line(f"QEMU: {build.qemu().version}")
