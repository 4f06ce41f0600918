"""Our own block device in a process that does what it is told as soon as a queue is found broken.

``python tests/peers/faulty.py abort|exit|next|once|pause|sleep|spin serve …``: the rest is that of the command
`virtio-test`. ``next`` aborts when the next front-end comes; ``once`` sleeps if there is no file ``FAULTY_MARK`` yet,
and makes it; ``pause`` sleeps for three seconds only.
"""

import logging
import os
import sys
import time
from pathlib import Path

from virtio_test.cli import main


class Fault(logging.Handler):
    """Acts at the line with which the server tells of a broken queue."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self._spoilt = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._spoilt and "is connected" in record.getMessage():
            os.abort()
        if "HeadOutOfRange" not in record.getMessage():
            return
        if self._kind == "abort":
            os.abort()
        if self._kind == "exit":
            os._exit(3)
        if self._kind == "next":
            self._spoilt = True
            return
        if self._kind == "pause":
            time.sleep(3)
            return
        if self._kind == "once":
            mark = Path(os.environ["FAULTY_MARK"])
            if mark.exists():
                return
            mark.touch()
            self._kind = "sleep"
        while True:
            if self._kind == "sleep":
                time.sleep(1)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(Fault(sys.argv.pop(1)))
    sys.exit(main())
