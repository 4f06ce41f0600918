"""Images: the bytes behind a block device, in a file or in memory.

An `Image` does as it is told or raises `OSError`: the block device above it checks every range before it asks, and
answers the driver. Ranges are bytes from the start of the image.

`zero` makes a range read as zeros. `discard` gives it back to the host where that can be done; what is read there
afterwards is zeros, or what was there before.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from virtio_test.errors import InvalidArgument

__all__ = ["FileImage", "Image", "RamImage"]

_PUNCH_HOLE: Final = 0x03
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE."""

_ZEROS: Final = bytes(1 << 16)


@runtime_checkable
class Image(Protocol):
    """What a block device reads and writes."""

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` from `offset` on.

        Raises:
            OSError: it cannot be read; the content of `buffer` is then undefined.
        """
        ...

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OSError: it cannot be written; parts of it may have been.
        """
        ...

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make `length` bytes read as zeros; with `unmap` the host may take their place back."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Nobody needs these bytes any more."""
        ...

    def sync(self) -> None:
        """Return once everything written is on stable storage."""
        ...

    def close(self) -> None:
        """Let go of the image."""
        ...


class RamImage:
    """An image in memory.

    Args:
        data: the image itself, not a copy of it; a number makes that many zeros.
    """

    def __init__(self, data: bytearray | int) -> None:
        self.data = bytearray(data) if isinstance(data, int) else data

    def __repr__(self) -> str:
        return f"RamImage({self.size})"

    @property
    def size(self) -> int:
        """See `Image.size`."""
        return len(self.data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `Image.read_into`."""
        end = self._end(offset, len(buffer))
        with memoryview(self.data) as view:
            buffer[:] = view[offset:end]

    def write(self, data: memoryview, offset: int) -> None:
        """See `Image.write`."""
        end = self._end(offset, len(data))
        with memoryview(self.data) as view:
            view[offset:end] = data

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:  # noqa: ARG002 - there is nobody to give it to
        """See `Image.zero`."""
        end = self._end(offset, length)
        with memoryview(self.data) as view:
            for start in range(offset, end, len(_ZEROS)):
                view[start : min(end, start + len(_ZEROS))] = _ZEROS[: end - start]

    def discard(self, offset: int, length: int) -> None:
        """See `Image.discard`."""
        self.zero(offset, length, unmap=True)

    def sync(self) -> None:
        """See `Image.sync`: memory is as stable as it gets."""

    def close(self) -> None:
        """See `Image.close`."""

    def _end(self, offset: int, length: int) -> int:
        # The owner may have made it shorter: a slice would then make it longer again, in the wrong place.
        if offset + length > len(self.data):
            raise OSError(errno.EIO, "the image in memory is shorter than it was")
        return offset + length


class FileImage:
    """An image in a file, or on a block device of the host.

    Args:
        file: path of the file, or an open descriptor, which is duplicated.
        read_only: never write to it; a path is then opened for reading only.

    Raises:
        InvalidArgument: it cannot be opened, or is no file that can be read at any place.
    """

    def __init__(self, file: str | os.PathLike[str] | int, *, read_only: bool = False) -> None:
        self._name = f"fd {file}" if isinstance(file, int) else str(Path(file))
        try:
            if isinstance(file, int):
                self._fd = os.dup(file)
            else:
                self._fd = os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidArgument(f"image {self._name} cannot be opened: {error.strerror}") from None
        try:
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            os.close(self._fd)
            raise InvalidArgument(f"image {self._name} has no size: {error.strerror}") from None
        self._punches = True

    def __repr__(self) -> str:
        return f"<FileImage {self._name}>"

    @property
    def size(self) -> int:
        """See `Image.size`."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def fileno(self) -> int:
        """The file, still owned by this object."""
        return self._fd

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `Image.read_into`."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, f"image {self._name} is shorter than it was")
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        """See `Image.write`."""
        done = 0
        while done < len(data):
            count = os.pwrite(self._fd, data[done:], offset + done)
            if not count:
                raise OSError(errno.EIO, f"image {self._name} takes no more bytes")
            done += count

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """See `Image.zero`."""
        if unmap and self._punch(offset, length):
            return
        with memoryview(_ZEROS) as zeros:
            for start in range(offset, offset + length, len(_ZEROS)):
                self.write(zeros[: offset + length - start], start)

    def discard(self, offset: int, length: int) -> None:
        """See `Image.discard`."""
        self._punch(offset, length)

    def sync(self) -> None:
        """See `Image.sync`."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """See `Image.close`; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _punch(self, offset: int, length: int) -> bool:
        """Make a hole, which reads as zeros; False where the host cannot."""
        if not length or not self._punches:
            return not length
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate64(self._fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            self._punches = False
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            return False
        raise OSError(number, os.strerror(number))
