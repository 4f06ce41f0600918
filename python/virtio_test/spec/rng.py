"""The entropy device (VIRTIO 1.4, 5.4): one queue, no feature bits, no configuration space."""

from types import MappingProxyType
from typing import Final

FEATURE_NAMES: Final[MappingProxyType[str, int]] = MappingProxyType({})
"""Feature bits of the class: none (5.4.3)."""

REQUEST_QUEUE: Final = 0
"""Each buffer is filled, wholly or in part, with random bytes (5.4.6)."""
