"""Disks for the guests: images made on the host, filled and checked by the guest's own programs."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.kernel import build
from tests.kernel.cache import run
from tests.kernel.checks import shell
from tests.kernel.guest import Guest

SIZE = 12 << 20
FILES, FILE_KIB = 12, 500


def make(path: Path) -> Path:
    """An ext4 file system in a file, whose two first sectors boot; the file's path."""
    with path.open("wb") as image:
        image.truncate(SIZE)
    run(["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", path], what="making a file system")
    with path.open("r+b") as image:
        # ext4 leaves the first 1024 bytes alone.
        image.write(build.boot_sector())
    return path


def check(path: Path) -> None:
    """Lets e2fsck read all of it.

    Raises:
        BuildError: the file system was not left whole.
    """
    run(["e2fsck", "-f", "-n", path], what="checking the file system")


def mount(guest: Guest, disk: str) -> None:
    """Mounts a disk at the folder of its name."""
    shell(guest, f"mkdir -p /{disk}; mount -t ext4 /dev/{disk} /{disk}")


def fill(guest: Guest, disk: str) -> list[str]:
    """Fills a mounted disk: with files of random bytes, then to its last block; the files' checksums."""
    each = f"dd if=/dev/urandom of=/{disk}/f$i bs=10k count={FILE_KIB // 10} 2>/dev/null"
    shell(guest, f"for i in $(seq {FILES}); do {each}; done; mkdir /{disk}/d; mv /{disk}/f1 /{disk}/d/moved")
    shell(guest, f"cd /{disk}; sha256sum f* d/moved > sums; sync")
    # dd fails when no room is left, which is wanted here; then not even one more block has room.
    fails = "2>/dev/null; then exit 1; fi"
    shell(guest, f"if dd if=/dev/zero of=/{disk}/rest bs=64k {fails}; sync; if cp /{disk}/f2 /{disk}/f0 {fails}")
    shell(guest, f"rm /{disk}/rest /{disk}/f0; sync")
    sums = shell(guest, f"cat /{disk}/sums")
    assert len(set(sums)) == FILES
    return sums


def remount(guest: Guest, disk: str) -> None:
    """Unmounts a disk, forgets what the kernel has of it, and mounts it again."""
    shell(guest, f"umount /{disk}; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/{disk} /{disk}")


def swap(guest: Guest, disk: str, image: Path, *, mib: int = 4) -> None:
    """Moves random bytes both ways past every cache: guest and host must find the same ones on the disk."""
    size = mib << 20
    before = hashlib.sha256(image.read_bytes()[:size]).hexdigest()
    read = f"dd if=/dev/{disk} bs=256k count={4 * mib} iflag=direct 2>/dev/null | sha256sum"
    assert shell(guest, read)[0].split()[0] == before
    shell(guest, f"dd if=/dev/urandom of=/dev/{disk} bs=256k count={4 * mib} oflag=direct conv=fsync 2>/dev/null")
    written = shell(guest, read)[0].split()[0]
    assert written != before
    assert hashlib.sha256(image.read_bytes()[:size]).hexdigest() == written


def verify(guest: Guest, disk: str, sums: list[str]) -> None:
    """Reads every file of a disk again, which is mounted, and compares its checksum."""
    assert shell(guest, f"cat /{disk}/sums") == sums
    assert shell(guest, f"cd /{disk}; sha256sum -c sums | grep -c OK") == [str(FILES)]
