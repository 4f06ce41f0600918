"""`Suspension`: what a device does between the driver's SUSPEND and its resume (VIRTIO 1.4, 3.4).

Theory
------
Suspending takes turns of the owner loop, so the write that asks for it is answered at once and the driver reads the
status until SUSPEND is 1 and DRIVER_OK is 0 (3.4.1):

1. `suspend`: from now on the device is not live; no kick has an effect.
2. *drain*: every queue stops, as for a saved state; kept chains are completed or go back to the ring. Notifications of
   that are marked. While the device is held (no bus master, say) it may not write, and the driver must not wait for
   whoever holds it: what does not fit the ring again stays in flight then, and is taken up at the resume.
3. *present*, behind those marks: the driver has been told everything, SUSPEND appears.

A queue that cannot be stopped breaks the device: NEEDS_RESET appears instead (3.4.2), and so it is with one that
cannot start again.

**While suspended** nothing reaches a queue and nothing is notified; what would have been, waits for the resume. The
configuration space reads as it did at the suspension, generation and all, whatever the device does meanwhile: changes
appear with the resume, and are notified then. What the driver writes there, and its kicks, are ignored and noted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_test.errors import StatusViolation
from virtio_test.status import Action, Status

if TYPE_CHECKING:
    from .bank import RegisterBank

__all__ = ["Suspension"]


class Suspension:
    """The suspended state of one bank, and what waits for its end.

    Args:
        bank: whose.

    Attributes:
        calls: queues whose used buffer notification waits.
        config: whether a configuration change notification waits.
    """

    def __init__(self, bank: RegisterBank) -> None:
        self.calls: set[int] = set()
        self.config = False
        self._bank = bank
        self._view: tuple[bytes, int] | None = None

    @property
    def active(self) -> bool:
        """Whether the driver sees the device suspended; a resume under way has not ended that yet."""
        return bool(self._bank.status.value & Status.SUSPEND)

    @property
    def view(self) -> tuple[bytes, int] | None:
        """The configuration space and its generation as they read while suspended; None while the device runs."""
        return self._view

    def notices(self) -> bool:
        """Whether notifications go out: the device is live, or is telling the last before it is suspended."""
        return self._bank.live or self._bank.status.moving is Action.SUSPEND

    def refuses(self, what: str) -> bool:
        """The driver does `what`, which it must not while suspended: whether it is, and so ignored."""
        if self.active:
            self._bank.note(StatusViolation("UsedWhileSuspended", "3.4.1", f"{what} while the device is suspended"))
        return self.active

    def suspend(self) -> None:
        """The driver has set SUSPEND on a running device."""
        self._bank.loop.pend((self, "drain"), self._drain)

    def resume(self) -> None:
        """The driver has set DRIVER_OK on a suspended device."""
        self._bank.loop.pend((self, "resume"), self._resume)

    def finish(self) -> None:
        """Do at once what is under way, for a state that is saved: nobody could go on with the half of it."""
        self._forget_turns()
        if self._bank.status.moving is Action.SUSPEND:
            self._bank.stop_queues()
            self._present()
        self._resume()

    def reset(self) -> None:
        """The device was reset: nothing is suspended, nothing waits."""
        self._forget_turns()
        self.calls.clear()
        self.config = False
        self._view = None

    def restored(self, *, calls: set[int], config: bool) -> None:
        """A saved state was taken over: what may wait to be told, if it is one of a suspended device."""
        self.reset()
        if self.active:
            self.calls, self.config = calls, config
            self._hold_view()

    def _drain(self) -> None:
        self._bank.stop_queues()
        self._bank.loop.pend((self, "present"), self._present)

    def _present(self) -> None:
        # It may have broken meanwhile, which ends the suspension.
        if self._bank.status.moving is Action.SUSPEND:
            self._hold_view()
            self._bank.status.suspended()

    def _resume(self) -> None:
        if self._bank.status.moving is not Action.RESUME:
            return
        self._bank.status.resumed()
        self._view = None
        self._bank.start_queues()
        calls, self.calls = self.calls, set()
        for index in sorted(calls):
            self._bank.call(index)
        if self.config:
            self.config = False
            self._bank.config_changed()

    def _hold_view(self) -> None:
        space = self._bank.device.config
        self._view = space.read(0, space.size), space.generation

    def _forget_turns(self) -> None:
        for turn in ("drain", "present", "resume"):
            self._bank.loop.unpend((self, turn))
