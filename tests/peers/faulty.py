"""Our own block device in a process that does what it is told as soon as a queue is found broken.

``python tests/peers/faulty.py abort|exit|sleep|spin serve …``: the rest is that of the command `virtio-test`.
"""

import logging
import os
import sys
import time

from virtio_test.cli import main


class Fault(logging.Handler):
    """Acts at the line with which the server tells of a broken queue."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def emit(self, record: logging.LogRecord) -> None:
        if "HeadOutOfRange" not in record.getMessage():
            return
        if self._kind == "abort":
            os.abort()
        if self._kind == "exit":
            os._exit(3)
        while True:
            if self._kind == "sleep":
                time.sleep(1)


if __name__ == "__main__":
    logging.getLogger().addHandler(Fault(sys.argv.pop(1)))
    sys.exit(main())
