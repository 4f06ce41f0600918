"""Every exception of virtio-test, in two families.

Theory
------
Whoever catches an error first wants to know one thing: who is at fault?

* `UsageError`: *we were misused*. The caller passed something that cannot be, or used an object after
  its time. Guest memory is byte for byte as it was.
* `PeerError`: *the other side broke the rules*. A driver's ring, a device's used entry, a front-end's
  message. It names the rule and the clause of VIRTIO 1.4, and every place that is known.

The same rules judge both ends, so a `PeerError` does not say "driver" or "device": it says what was
broken, and the object that raised it knows which side it was talking to.

The Rust core imports these classes; it defines none of its own. Every class pickles (a worker process
hands its findings over), and `repr` of an error evaluates back to an equal one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class VirtioTestError(Exception):
    """Base of everything that virtio-test raises on purpose."""


class UsageError(VirtioTestError):
    """We were misused: the calling code is at fault, no guest memory was touched."""


class InvalidArgument(UsageError, ValueError):
    """An argument has the right type and an impossible value."""


class StaleChain(UsageError):
    """A chain was used after the queue it came from was reset, or after it was completed or put back."""


class ForeignChain(UsageError):
    """A chain was handed to a queue that it did not come from."""


class StaleMemory(UsageError):
    """The memory behind a chain or view is no longer mapped: the memory table has changed."""


class QueueFull(UsageError):
    """The driver end has no free descriptors for the chain; take used buffers back first."""


class NoFeature(UsageError):
    """The call needs a feature that was not negotiated."""


class HandlerError(UsageError):
    """A handler returned something that cannot be a response (type, size)."""


class StateError(UsageError):
    """The call is not possible in the present state (device status, ring state, life of the object)."""


class SavedStateError(UsageError, ValueError):
    """A saved state is malformed or does not fit this device; nothing was changed."""


class PeerError(VirtioTestError):
    """The other side broke the rules."""


class RuleViolation(PeerError):
    """One broken rule of the specification, with every place that is known.

    Attributes:
        rule: stable name of the rule, for example ``"NextOutOfRange"``.
        clause: clause of VIRTIO 1.4, for example ``"2.7.5"``.
        message: what was found, and where it counts what was expected; one sentence.
        queue: index of the virtqueue, or None.
        position: ring position (split: index into the avail or used ring; packed: descriptor slot), or None.
        head: head descriptor index (split) or buffer id (packed), or None.
        descriptor: index of the descriptor in its table, or None.
        address: guest physical address in question, or None.
        explainer: whoever knows more of rules than their names; the package hands its catalogue in.
        expecter: whoever knows what a rule asks for; likewise.
    """

    explainer: ClassVar[Callable[[RuleViolation], str] | None] = None
    expecter: ClassVar[Callable[[RuleViolation], str] | None] = None

    def __init__(
        self,
        rule: str,
        clause: str,
        message: str,
        *,
        queue: int | None = None,
        position: int | None = None,
        head: int | None = None,
        descriptor: int | None = None,
        address: int | None = None,
    ) -> None:
        super().__init__(rule, clause, message)
        self.rule = rule
        self.clause = clause
        self.message = message
        self.queue = queue
        self.position = position
        self.head = head
        self.descriptor = descriptor
        self.address = address

    def places(self) -> dict[str, int]:
        """The places that are known, by name, in reading order."""
        named = {
            "queue": self.queue,
            "position": self.position,
            "head": self.head,
            "descriptor": self.descriptor,
            "address": self.address,
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def expected(self) -> str:
        """What must hold by this rule, one sentence of the catalogue; empty for a rule that it does not have."""
        expecter = RuleViolation.expecter
        return "" if expecter is None else expecter(self)

    def explain(self) -> str:
        """All that is known of the rule, for a terminal: clause, outcomes, what others do, a ring that shows it."""
        explainer = RuleViolation.explainer
        return str(self) if explainer is None else explainer(self)

    def __str__(self) -> str:
        where = ", ".join(
            f"{name} {value:#x}" if name == "address" else f"{name} {value}" for name, value in self.places().items()
        )
        return f"{self.rule} ({self._document()}): {self.message}{self._expected()}" + (f" [{where}]" if where else "")

    def _document(self) -> str:
        return f"VIRTIO 1.4, {self.clause}"

    def _expected(self) -> str:
        """Of what was expected as much as the message does not say already."""
        expected = self.expected.removesuffix(".")
        return f"; expected: {expected}" if expected and expected.casefold() not in self.message.casefold() else ""

    def __repr__(self) -> str:
        places = "".join(f", {name}={value!r}" for name, value in self.places().items())
        return f"{type(self).__name__}({self.rule!r}, {self.clause!r}, {self.message!r}{places})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.rule, self.clause, self.message))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rule, self.clause, self.message), self.__dict__


class QueueViolation(RuleViolation):
    """A virtqueue (its rings, its descriptors, its registers) broke a rule; the queue is latched."""


class StatusViolation(RuleViolation):
    """The other side broke the rules of device status, features or configuration space."""


class MessageError(RuleViolation):
    """A protocol message (vhost-user, …) is malformed, out of order or carries the wrong fds.

    `clause` names the protocol's own document and section instead of a VIRTIO clause, so `str()` says so.
    """

    def _document(self) -> str:
        return self.clause


class AnswerViolation(RuleViolation):
    """What a device answered, or shows in its configuration space, breaks a rule of its class (VIRTIO 1.4, 5)."""


class RequestViolation(RuleViolation):
    """What a driver asked of a device breaks a rule of its class (VIRTIO 1.4, 5); the queue goes on."""


class RequestFailed(PeerError):
    """The device answered, as it may, that it could not do what was asked of it."""


class DeviceNeedsReset(PeerError):
    """The device has set DEVICE_NEEDS_RESET; what was in flight is lost."""


class PeerDisconnected(PeerError):
    """The other side closed the connection."""


class PeerTimeout(PeerError):
    """The other side did not answer within the bounded wait."""


class DebugBuildWarning(UserWarning):
    """The imported core was built without optimisation: fit for tests, not for measuring."""
