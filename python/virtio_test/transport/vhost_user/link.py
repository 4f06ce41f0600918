"""One connection to a back-end, negotiated and watched by the loop until it ends.

Theory
------
Nothing but an answer may come over the connection, and nothing but what was negotiated over the back-end's own
channel. Whatever else comes is found by the loop, or before the next request. Anything that cannot be listened to
any longer (nobody there, no answer in time, a wrong message) ends the connection for good; a refusal is an answer,
and the connection goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected, PeerError
from virtio_test.loop import OwnerLoop

from .codec import Message
from .frontend import FrontEnd
from .messages import PROTOCOL_FEATURES_BIT, BackendRequest, IotlbType, ProtocolFeature, Request
from .payloads import Iotlb
from .rules import violation

__all__ = ["MAX_ERRORS", "MAX_QUEUES", "Link", "note"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_F = ProtocolFeature

MAX_QUEUES: Final = 256
MAX_ERRORS: Final = 1000
"""Errors that are kept, the first ones: a back-end can break rules as fast as it can send."""


def note(errors: list[PeerError], error: PeerError) -> bool:
    """Keep `error` among `errors`; False when there are enough."""
    if len(errors) >= MAX_ERRORS:
        return False
    errors.append(error)
    return True


class Link:
    """A front-end that has said who it is and agreed on protocol features.

    Args:
        front: the front-end, new, ours from now on.
        loop: the owner loop.
        wanted: protocol features to take of those offered.
        queues: how many virtqueues are wanted; None for all there are.
        errors: where every rule that the back-end breaks goes, and what ends the connection; at most `MAX_ERRORS`.

    Attributes:
        offered: the feature bits of GET_FEATURES.
        queues: how many virtqueues there are, or are wanted.
        lost: what the connection ended with; None while it stands.
        on_lost: called with it, once.
        on_config_changed: called when the back-end says that its configuration space has changed.
        on_miss: called with the translation that the back-end lacks; whether it has it now.

    Raises:
        PeerError: the back-end does not answer as it should.
        InvalidArgument: it has fewer queues than are wanted.
    """

    def __init__(
        self,
        front: FrontEnd,
        loop: OwnerLoop,
        *,
        wanted: ProtocolFeature,
        queues: int | None,
        errors: list[PeerError],
    ) -> None:
        self.front = front
        self.lost: PeerError | None = None
        self.on_lost: Callable[[PeerError], object] = lambda _: None
        self.on_config_changed: Callable[[], object] = lambda: None
        self.on_miss: Callable[[Iotlb], bool] = lambda _: False
        self._loop = loop
        self._errors = errors
        try:
            front.request(Request.SET_OWNER)
            self.offered = front.number(Request.GET_FEATURES)
            if self.knows_protocol:
                offered = front.number(Request.GET_PROTOCOL_FEATURES)
                front.set_protocol_features(ProtocolFeature(offered & int(wanted)))
            self.queues = self._count_queues(queues)
            if self.protocol & _F.BACKEND_REQ:
                front.open_channel()
        except BaseException:
            front.close()
            raise
        loop.add_reader(front.socket.fileno(), self._readable)
        if front.channel is not None:
            loop.add_reader(front.channel.socket.fileno(), self._asked)

    def __repr__(self) -> str:
        return f"<Link, protocol {self.protocol!r}{f', lost: {self.lost}' if self.lost else ''}>"

    @property
    def protocol(self) -> ProtocolFeature:
        """The negotiated protocol features."""
        return self.front.protocol

    @property
    def knows_protocol(self) -> bool:
        """Whether the back-end knows protocol features, so that rings are enabled by a message."""
        return bool(self.offered & 1 << PROTOCOL_FEATURES_BIT)

    def _count_queues(self, wanted: int | None) -> int:
        if not self.protocol & _F.MQ:
            return 1 if wanted is None else wanted
        there = self.front.number(Request.GET_QUEUE_NUM)
        if not 1 <= there <= MAX_QUEUES:
            raise violation("QueueCount", f"the back-end says that it has {there} queues")
        if wanted is not None and wanted > there:
            raise InvalidArgument(f"{wanted} queues are wanted, and the back-end has {there}")
        return there if wanted is None else wanted

    @contextmanager
    def talking(self) -> Generator[FrontEnd]:
        """Ask and answer: what goes wrong inside ends the connection, unless it is a refusal.

        Raises:
            PeerError: what it has ended with, now or before.
        """
        if self.lost is not None:
            raise self.lost.with_traceback(None)
        try:
            self.front.check_silent()
            yield self.front
        except MessageError as error:
            if error.rule != "Refused":
                self.lose(error)
            elif error not in self._errors[-1:]:
                note(self._errors, error)
            raise
        except PeerError as error:
            self.lose(error)
            raise

    def settle(self) -> None:
        """Where nothing is acknowledged, an answer tells that everything before it has been done."""
        if not self.protocol & _F.REPLY_ACK:
            with self.talking() as front:
                front.number(Request.GET_FEATURES)

    def lose(self, error: PeerError) -> None:
        """End the connection with `error`; the first one counts."""
        if self.lost is None:
            note(self._errors, error)
            self._end(error)
            self.on_lost(error)

    def close(self) -> None:
        """Leave; nobody is told."""
        if self.lost is None:
            self._end(PeerDisconnected("the front-end has closed the connection"))

    def _end(self, error: PeerError) -> None:
        self.lost = error
        self._loop.remove_reader(self.front.socket.fileno())
        self._close_channel()
        self.front.close()

    def _close_channel(self) -> None:
        channel, self.front.channel = self.front.channel, None
        if channel is not None:
            self._loop.remove_reader(channel.socket.fileno())
            channel.close()

    def _readable(self) -> None:
        try:
            self.front.check_silent()
        except PeerError as error:
            self.lose(error)

    def _asked(self) -> None:
        try:
            self.front.backend_requests(answer=self._answer)
        except PeerDisconnected:
            # Its channel alone: it has nothing more to say, and goes on.
            self._close_channel()
        except PeerError as error:
            self.lose(error)

    def _answer(self, message: Message) -> int:
        if message.request == BackendRequest.CONFIG_CHANGE_MSG and self.protocol & _F.CONFIG:
            self.on_config_changed()
            return 0
        if message.request == BackendRequest.IOTLB_MSG and self.front.translated:
            assert isinstance(message.payload, Iotlb)
            if message.payload.type == IotlbType.MISS:
                return 0 if self.on_miss(message.payload) else 1
            raise violation("IotlbType", f"type {message.payload.type}, where a back-end misses")
        name = getattr(message.request, "name", f"request {message.request}")
        error = violation("NotNegotiated", f"the back-end sent {name}, for which nothing was negotiated")
        if note(self._errors, error):
            _log.warning("refused: %s", error)
        return 1
