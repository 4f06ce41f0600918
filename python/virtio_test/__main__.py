"""``python -m virtio_test`` is the command ``virtio-test``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
