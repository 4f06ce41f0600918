"""Back-ends and front-ends that are killed: processes forked from one that has imported everything.

Run as a program: each line of its standard input is one victim, as JSON, and it prints the victim's process id. A
victim dies at a message that it was told of, at an instruction that the clock chooses, or by its test. None cleans up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from virtio_test._core import Chain
from virtio_test.clock import Timer
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.features import FeatureSet
from virtio_test.spec.testdevice import REQUEST, RESPONSE
from virtio_test.transport.vhost_user.backend import Backend, serve
from virtio_test.transport.vhost_user.codec import Message
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.registers import VhostUserRegisters
from virtio_test.transport.vhost_user.session import Session

SIZE = 16
TURN = 0.0005


def answer(request: bytes) -> bytes:
    """What is right."""
    serial = REQUEST.unpack(request)[0]
    return RESPONSE.pack(serial, serial ^ 0xFFFF_FFFF, serial * 7 & 0xFFFF_FFFF)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Worker(BaseDevice):
    """Answers requests, at once or later and in any order, and writes down each one that it executes."""

    def __init__(self, journal: Path, *, later: bool, packed: bool, seed: int) -> None:
        features = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
        super().__init__(
            45, handlers={0: kept(self.keep_one) if later else self.execute}, queue_sizes=(SIZE,), features=features
        )
        # The ring's bits are added to whatever is asked for.
        self.features = self.features if packed else self.features - FeatureSet("RING_PACKED")
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._random = random.Random(seed)
        self._open: list[Chain] = []
        self._timer: Timer | None = None

    def execute(self, request: bytes) -> bytes:
        os.write(self._journal, b"%d %d\n" % (os.getpid(), REQUEST.unpack(request)[0]))
        return answer(request)

    def keep_one(self, chain: Chain) -> None:
        self._open.append(chain)
        if self._timer is None:
            self._timer = Timer(self.bus.clock, self._some, first_after=TURN, every=TURN)

    def _some(self) -> None:
        for _ in range(self._random.randrange(4)):
            if self._open:
                chain = self._open.pop(self._random.randrange(len(self._open)))
                self.complete(chain, self.execute(chain.read()))


def back_end(
    path: str, journal: str, *, later: bool, packed: bool, seed: int, at: int, after: bool, clock: float, working: bool
) -> None:
    """Serve until death: before or after message `at` of the first connection, or `clock` seconds after its beginning.

    With `working` the clock begins when its ring does.
    """
    handle, begin = Session.handle, Backend._begin  # pyright: ignore[reportPrivateUsage]
    seen = 0

    def handle_or_die(self: Session, message: Message) -> bytes | None:
        nonlocal seen
        seen += 1
        if seen == at and not after:
            die()
        reply = handle(self, message)
        if seen == at:
            die()
        if clock and working and message.request == Request.SET_VRING_ENABLE:
            # The signal's default action ends the process, wherever it is.
            signal.setitimer(signal.ITIMER_REAL, clock)
        return reply

    def begin_and_wait_for_death(self: Backend, connection: Any) -> None:
        begin(self, connection)
        signal.setitimer(signal.ITIMER_REAL, clock)

    Session.handle = handle_or_die
    if clock and not working:
        Backend._begin = begin_and_wait_for_death  # pyright: ignore[reportPrivateUsage]
    worker = Worker(Path(journal), later=later, packed=packed, seed=seed)
    serve(worker, path, ready=lambda _: Path(f"{path}.ready").touch())


def front_end(path: str, *, packed: bool, at: int) -> None:
    """Use the device at `path`, and die before message `at`."""
    send, sent = FrontEnd.send_bytes, 0

    def send_or_die(self: FrontEnd, data: bytes, fds: Any = ()) -> None:
        nonlocal sent
        sent += 1
        if sent == at:
            die()
        send(self, data, fds)

    FrontEnd.send_bytes = send_or_die
    wanted = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
    registers = VhostUserRegisters(path, device_id=45, queue_size=SIZE)
    driver = Driver(registers, wanted=wanted)
    driver.initialize()
    request = driver.submit(0, [REQUEST.pack(1, 2, 3, 4, b"")], [RESPONSE.size])
    request.wait()
    driver.reset()
    registers.close()


class Morgue:
    """Where victims are made."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.unit.vhost_user_victims"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._victims: list[int] = []

    def make(self, what: str, **how: object) -> int:
        """A process that does `what`; its id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, how]).encode() + b"\n")
        self._process.stdin.flush()
        self._victims.append(int(self._process.stdout.readline()))
        return self._victims[-1]

    def close(self) -> None:
        for victim in self._victims:
            kill(victim)
        self._process.communicate()


def kill(pid: int) -> None:
    """Kill a victim, if it lives: a zombie's id is its own until it is waited for, which its parent never does."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def morgue() -> Generator[Morgue]:
    made = Morgue()
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    """Fork a victim for each line."""
    for line in sys.stdin:
        what, how = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(0)
                {"back-end": back_end, "front-end": front_end}[what](**how)
            except BaseException as error:  # noqa: BLE001 - said, and then the end, which is this process's whatever comes
                print(f"victim: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
