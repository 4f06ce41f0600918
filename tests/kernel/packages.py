"""Packages fetched without being installed: Debian's own programs find, check and unpack them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kernel.cache import BuildError, run


class FetchError(BuildError):
    """What was asked for is not known to apt, or cannot be downloaded."""


def depends(package: str, prefix: str) -> list[str]:
    """The packages whose names begin with ``prefix`` that ``package`` depends on directly.

    Raises:
        BuildError: apt does not know the package.
    """
    output = _apt("apt-cache", ["depends", "--important", package], package)
    names = [line.split(":", 1)[1].strip() for line in output.splitlines() if "Depends:" in line]
    return [name for name in names if name.startswith(prefix)]


def fetch(packages: Sequence[str], into: Path) -> list[str]:
    """Downloads packages from this Debian's archive and unpacks them into ``into``.

    Returns:
        ``name version`` of each.

    Raises:
        BuildError: apt does not know a package, or it cannot be downloaded.
    """
    downloads = into / ".downloads"
    downloads.mkdir(parents=True)
    _apt("apt-get", ["-q", "download", *packages], ", ".join(packages), cwd=downloads)
    versions: list[str] = []
    for file in sorted(downloads.glob("*.deb")):
        run(["dpkg-deb", "-x", file, into], what=f"unpacking {file.name}")
        versions.append(run(["dpkg-deb", "-W", file], what=f"reading {file.name}").strip().replace("\t", " "))
    if len(versions) != len(packages):
        raise BuildError(f"apt-get downloaded {len(versions)} packages for {', '.join(packages)}")
    shutil.rmtree(downloads)
    return versions


def with_fresh_lists(build: Callable[[Path], None], into: Path) -> None:
    """Builds into ``into``; when a download fails, apt's lists are renewed and it is tried once more.

    An archive keeps no version that a newer one has replaced, so lists of last month name files that are gone.

    Raises:
        BuildError: it failed for another reason, or with new lists too.
    """
    try:
        build(into)
    except FetchError:
        renew = Path(__file__).parents[2] / "tools" / "debian-packages"
        run([renew, "--renew"], what="renewing apt's lists")
        for path in into.iterdir():
            shutil.rmtree(path)
        build(into)


def extract_suite(suite: str, packages: Sequence[str], into: Path) -> None:
    """Unpacks packages of another Debian suite, with all that they depend on, into ``into``; root is not needed.

    Raises:
        BuildError: mmdebstrap is missing or could not fetch them.
    """
    # A mirror that is a snapshot is older than its lists' validity.
    options = ['Acquire::Check-Valid-Until "false"', 'APT::Install-Recommends "false"']
    run(
        ["mmdebstrap", "--quiet", "--variant=extract", f"--mode={'root' if os.geteuid() == 0 else 'chrootless'}",
         *(f"--aptopt={option}" for option in options), f"--include={','.join(packages)}", suite, into],
        what=f"fetching {', '.join(packages)} from Debian's {suite}",
    )  # fmt: skip
    shutil.rmtree(into / "dev", ignore_errors=True)


# Bound inside a mount namespace of the command alone: nothing is left mounted, whatever happens to it.
_ENTER = 'mount --rbind /dev "$0/dev" && mount --rbind /proc "$0/proc" && exec chroot "$0" "$@"'


def run_in_root(root: Path, command: Sequence[str | Path], *, what: str) -> str:
    """Runs a command inside the root file system of another suite; returns its standard output.

    Who is not root becomes it in a user namespace of its own.

    Raises:
        BuildError: namespaces are forbidden here, or the command failed.
    """
    namespaces = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    inside = ["/usr/bin/env", "-i", "PATH=/usr/bin:/usr/sbin", "LC_ALL=C", *command]
    return run(["unshare", *namespaces, "sh", "-c", _ENTER, root, *inside], what=what)


def _apt(program: str, arguments: Sequence[str], package: str, cwd: Path | None = None) -> str:
    try:
        return run([program, *arguments], what=f"asking apt for {package}", cwd=cwd)
    except BuildError as error:
        raise FetchError(f"{error}: is this Debian 12, and was 'apt-get update' run?") from error
