"""The back-end's own channel to the front-end, over the socket of SET_BACKEND_REQ_FD.

Nothing here waits. What the socket does not take is kept, once per kind and queue (a second "configuration
changed" adds nothing to a first that is still unsent), and goes out when the front-end has answered something.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Final

from virtio_test.errors import MessageError
from virtio_test.loop import OwnerLoop

from .codec import Decoder, Message, OwnedFd, encode
from .messages import BACKEND_REQUESTS, BackendRequest
from .payloads import U64, Iotlb, Payload, VringState
from .rules import violation

__all__ = ["BackendChannel"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_MOST_UNREAD: Final = 1024
"""Misses that a front-end may leave unread or unanswered, whose pages came all the same."""


class BackendChannel:
    """Sends requests of the back-end and reads what the front-end answers.

    Args:
        fd: the socket that came with SET_BACKEND_REQ_FD.
        loop: waits for answers.

    Attributes:
        on_refused: called with the page of a MISS that was answered with a number other than 0.

    Raises:
        MessageError: FdType, it is no socket.
    """

    def __init__(self, fd: OwnedFd, loop: OwnerLoop) -> None:
        if not stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode):
            raise violation("FdType", "the fd of the back-end channel is no socket")
        self._loop = loop
        self._socket: socket.socket | None = socket.socket(fileno=fd.take())
        self._decoder = Decoder(BACKEND_REQUESTS, replies=True)
        self._unsent: dict[tuple[BackendRequest, int], bytes] = {}
        self._partial = b""
        self._refused = False
        self.on_refused: Callable[[int], object] = lambda _: None
        # Pages of the misses that will be answered, in the order in which they are sent.
        self._missed: deque[int] = deque()
        self._numbers = count()
        loop.add_reader(self._socket.fileno(), self._readable)

    def __repr__(self) -> str:
        return f"<BackendChannel {'open' if self._socket else 'closed'}, {len(self._unsent)} unsent>"

    def config_changed(self) -> None:
        """The configuration space has changed."""
        self._send(BackendRequest.CONFIG_CHANGE_MSG, None, 0, need_reply=False)

    def vring_call(self, index: int) -> None:
        """Buffers of queue `index` were used. In-band notifications are always acknowledged."""
        self._send(BackendRequest.VRING_CALL, VringState(index), index, need_reply=True)

    def vring_error(self, index: int) -> None:
        """Queue `index` has stopped for good."""
        self._send(BackendRequest.VRING_ERR, VringState(index), index, need_reply=True)

    def miss(self, entry: Iotlb, *, need_reply: bool) -> None:
        """The translation of a page is missing; whoever asks does so once for each."""
        if len(self._missed) + len(self._unsent) > _MOST_UNREAD:
            _log.warning("the front-end's back-end channel is closed: it reads or answers nothing")
            self.close()
        if self._socket is not None:
            if need_reply:
                self._missed.append(entry.iova)
            self._unsent[BackendRequest.IOTLB_MSG, next(self._numbers)] = encode(
                BackendRequest.IOTLB_MSG, entry, need_reply=need_reply
            )
            self._flush()

    def close(self) -> None:
        """Close the channel; what was not sent is dropped."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._unsent.clear()
        self._missed.clear()

    def _send(self, request: BackendRequest, payload: Payload | None, index: int, *, need_reply: bool) -> None:
        if self._socket is not None:
            self._unsent.setdefault((request, index), encode(request, payload, need_reply=need_reply))
            self._flush()

    def _flush(self) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        while self._socket is not None and (self._partial or self._unsent):
            if not self._partial:
                key = next(iter(self._unsent))
                self._partial = self._unsent.pop(key)
            try:
                self._partial = self._partial[self._socket.send(self._partial, flags) :]
            except BlockingIOError:
                return
            except OSError as error:
                _log.info("the front-end's back-end channel is closed: %s", error.strerror)
                self.close()

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            data = self._socket.recv(self._decoder.wanted, socket.MSG_DONTWAIT)
            for message in self._decoder.feed(data):
                self._answered(message)
        except BlockingIOError:
            return
        except (OSError, MessageError) as error:
            _log.warning("the front-end's back-end channel is closed: %s", error)
            data = b""
        if data:
            self._flush()
        else:
            self.close()

    def _answered(self, message: Message) -> None:
        refused = isinstance(message.payload, U64) and bool(message.payload.value)
        if refused and not self._refused:
            # Once: it can send as many as it likes, for requests that there never were.
            self._refused = True
            _log.info("the front-end refused request %d of ours", message.request)
        if message.request == BackendRequest.IOTLB_MSG:
            if not self._missed:
                raise violation("UnexpectedReply", "a translation was answered that nobody asked for")
            page = self._missed.popleft()
            if refused:
                self.on_refused(page)
