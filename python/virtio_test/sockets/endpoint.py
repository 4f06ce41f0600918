"""Where front-ends reach the server: a listening UNIX socket at a path, or a socket that the launcher gave.

Whatever is wrong with a path becomes one line that says what, where and what to do. A file is removed in two
cases only: the socket that a killed server of this user left behind (a socket of mode 0600, ours, on which
nobody listens), before binding; and our own, recognised by its inode, at the end. Looking and removing go through one
descriptor of the folder, so nobody can put another folder in between; no link is followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from virtio_test.errors import InvalidArgument

__all__ = ["MAX_PATH_BYTES", "Endpoint"]

MAX_PATH_BYTES: Final = 107
"""What fits into a UNIX socket address, its final NUL not counted."""

_LOCK_SECONDS: Final = 2.0

_ADVICE: Final = {
    errno.ENOENT: "no such folder; create it, or give another path",
    errno.ENOTDIR: "a part of the path is no folder; give another path",
    errno.EACCES: "the folder is not writable for this user; give another path",
    errno.EPERM: "the folder is not writable for this user; give another path",
    errno.EROFS: "the file system is read-only; give another path",
    errno.ENAMETOOLONG: "a part of the path is too long; give a shorter one",
    errno.ELOOP: "a loop of symbolic links; give another path",
    errno.ENOSPC: "the file system is full; give another path",
}


class Endpoint:
    """A bound, listening socket, or one connection that exists already.

    Args:
        path: bind and listen here; mode 0600.
        fd: a UNIX stream socket, listening or connected, that is ours from now on.

    Attributes:
        listener: the listening socket, or None.
        connected: the connection that came with the fd, or None.

    Raises:
        InvalidArgument: neither or both are given, or what was given cannot be used; one line.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, fd: int | None = None) -> None:
        self.listener: socket.socket | None = None
        self.connected: socket.socket | None = None
        self._path: Path | None = None
        self._identity: tuple[int, int] | None = None
        if (path is None) == (fd is None):
            raise InvalidArgument("a server needs either a socket path or a socket fd")
        if path is not None:
            self._bind(os.fspath(path))
        elif fd is not None:
            self._adopt(fd)

    def __repr__(self) -> str:
        return f"<Endpoint {self._path or 'of a given fd'}>"

    def _adopt(self, fd: int) -> None:
        try:
            given = socket.socket(fileno=fd)
        except OSError as error:
            raise InvalidArgument(f"fd {fd} is no socket ({error.strerror}); give a UNIX stream socket") from None
        if given.family != socket.AF_UNIX or given.type != socket.SOCK_STREAM:
            given.detach()
            raise InvalidArgument(f"fd {fd} is no UNIX stream socket; give one")
        given.settimeout(0.0)
        if given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.listener = given
        else:
            self.connected = given

    def _bind(self, text: str) -> None:
        raw = os.fsencode(text)
        if not raw or b"\0" in raw:
            raise InvalidArgument(f"socket path {text!r} is no path; give one of 1 to {MAX_PATH_BYTES} bytes")
        if len(raw) > MAX_PATH_BYTES:
            raise InvalidArgument(
                f"socket path {text} has {len(raw)} bytes, and a socket address holds {MAX_PATH_BYTES}; "
                "give a shorter one"
            )
        path = Path(text)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _alone_in(path.parent) as folder:
                if folder is not None:
                    _remove(folder, path, _is_stale)
                # The mode of the socket becomes that of its file: nobody else can connect, not even for a moment.
                os.fchmod(listener.fileno(), 0o600)
                listener.bind(raw)
                status = path.lstat()
                if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
                    raise FileExistsError(errno.EADDRINUSE, "replaced")
                listener.listen(1)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise InvalidArgument(_why_taken(path)) from None
            advice = _ADVICE.get(error.errno or 0, f"{error.strerror}; give another path")
            if error.errno == errno.ENOENT and path.parent.is_dir():
                advice = f"{path.parent} cannot hold a socket; give another path"
            raise InvalidArgument(f"socket path {text}: {advice}") from None
        listener.settimeout(0.0)
        # Absolute, so that a change of the working folder does not make us look elsewhere at the end.
        self._path = path.absolute()
        self._identity = (status.st_dev, status.st_ino)
        self.listener = listener

    def close(self) -> None:
        """Remove our file if it is still ours, and close the sockets."""
        if self._path is not None:
            # Before the socket is closed: as long as it is open nobody else's file can have its inode.
            with suppress(OSError), _opened(self._path.parent) as folder:
                _remove(folder, self._path, self._is_mine)
            self._path = None
        for each in (self.listener, self.connected):
            if each is not None:
                each.close()
        self.listener = self.connected = None

    def _is_mine(self, status: os.stat_result, _path: str) -> bool:
        return stat.S_ISSOCK(status.st_mode) and (status.st_dev, status.st_ino) == self._identity


@contextmanager
def _opened(folder: Path) -> Generator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _alone_in(folder: Path) -> Generator[int | None]:
    """Two servers that start at once must not take each other's new socket for a stale one.

    Gives the folder, and None where there is no lock, and then no stale socket is looked for: in a folder that one may
    write into and not read, or that somebody else keeps locked.
    """
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(_opened(folder))
        except PermissionError:
            yield None
        else:
            yield fd if _locked(fd) else None


def _remove(folder: int, path: Path, is_it: Callable[[os.stat_result, str], bool]) -> None:
    """Remove the file of `path` in the open `folder` if `is_it` says so, which is given its status and a path to it."""
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    through = f"/proc/self/fd/{folder}/{path.name}"
    if is_it(status, through if len(os.fsencode(through)) <= MAX_PATH_BYTES else str(path)):
        os.unlink(path.name, dir_fd=folder)


def _locked(fd: int) -> bool:
    """Lock `fd`, for which another server needs moments only; whoever holds it longer is not waited for."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        else:
            return True


def _in_use(path: str) -> bool:
    """Whether a socket is bound there. A probe of another type is refused either way, but for different reasons."""
    raw = os.fsencode(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(raw)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


def _is_stale(status: os.stat_result, path: str) -> bool:
    mine = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600
    return stat.S_ISSOCK(status.st_mode) and mine and not _in_use(path)


def _why_taken(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return f"socket path {path} is taken by something that has just gone; try again"
    if stat.S_ISSOCK(mode):
        if _in_use(str(path)):
            return f"socket path {path}: another server is there; stop it, or give another path"
        return f"socket path {path}: a socket of another program is there; remove it, or give another path"
    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a file"
    return f"socket path {path}: {kind} is there, and it is left alone; remove it, or give another path"
