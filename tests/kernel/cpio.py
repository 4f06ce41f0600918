"""The archive that a Linux kernel unpacks at its start: cpio in the "newc" format.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of Linux. Each header is the magic number and 13
fields of 8 hex digits; name and contents are padded to 4 bytes. Written by ourselves, so that a device node needs no
root and no program is called.
"""

from __future__ import annotations

from collections.abc import Mapping

DIRECTORY = 0o040755
CONSOLE = 0o020600
PROGRAM = 0o100755


def archive(files: Mapping[str, bytes]) -> bytes:
    """An initramfs with the given files (mode 755), the folders they need, and ``dev/console``.

    Args:
        files: contents by path, relative to the root.
    """
    folders = {"dev", "proc", "sys"}
    for path in files:
        parts = path.split("/")[:-1]
        folders.update("/".join(parts[: i + 1]) for i in range(len(parts)))
    members = [(folder, DIRECTORY, b"", (0, 0)) for folder in sorted(folders)]
    members.append(("dev/console", CONSOLE, b"", (5, 1)))
    members += [(path, PROGRAM, data, (0, 0)) for path, data in sorted(files.items())]
    members.append(("TRAILER!!!", 0, b"", (0, 0)))
    return b"".join(_member(inode, *member) for inode, member in enumerate(members, start=1))


def _member(inode: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    links, owner, time, check = 1, 0, 0, 0
    fields = (inode, mode, owner, owner, links, time, len(data), 0, 0, *device, len(encoded), check)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
