"""A device that answers many requests at once, in numpy: a batch costs little more than one of them.

In this process, with a driver of our own:        python examples/batch_device.py
For a real guest, as a vhost-user back-end:       python examples/batch_device.py lengths.sock
It needs numpy:                                   pip install 'virtio-test[numpy]'
"""

import sys

import numpy as np
from virtio_test import BaseDevice, DeviceQueue, Driver, Loopback, batched

LENGTHS_DEVICE_ID = 62  # given to nobody in VIRTIO 1.4


class LengthsDevice(BaseDevice):
    """One queue of vectors: three floats in, their length as one float out."""

    def __init__(self) -> None:
        handler = batched(self.lengths, request_size=12, response_size=4)
        super().__init__(LENGTHS_DEVICE_ID, handlers={0: handler}, queue_sizes=(256,))
        self.largest = 0

    def lengths(self, requests: memoryview, responses: memoryview) -> None:
        """Row k of `responses`, which is zeroed, answers row k of `requests`, which is read-only."""
        vectors = np.frombuffer(requests, "<f4").reshape(-1, 3)
        self.largest = max(self.largest, len(vectors))
        np.sqrt((vectors * vectors).sum(axis=1), out=np.frombuffer(responses, "<f4"))


def answer(queue: DeviceQueue) -> int:
    """The same on a bare queue, step by step; how many were answered."""
    batch = queue.pop_many(128)
    vectors = np.frombuffer(batch.requests(12), "<f4").reshape(-1, 3)
    # A request that is too short was refused and left out: the batch has a row less.
    assert len(batch) == len(vectors)
    return batch.respond(np.sqrt((vectors * vectors).sum(axis=1)).astype("<f4"))


def main(arguments: list[str]) -> str:
    """Serve on the socket that is named, or measure vectors in this process; returns what it prints."""
    device = LengthsDevice()
    if arguments:
        from virtio_test.transport.vhost_user.backend import serve

        serve(device, arguments[0])
        return ""

    driver = Driver(Loopback(device))
    driver.initialize()
    vectors = np.array([[3, 4, 0], [1, 2, 2], [2, 3, 6]] * 20, "<f4")
    pending = [driver.submit(0, [vector.tobytes()], [4]) for vector in vectors]
    lengths = np.frombuffer(b"".join(request.wait() for request in pending), "<f4")
    text = f"{lengths[:3].tolist()} and so on, {len(lengths)} in all, up to {device.largest} at once"
    print(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
