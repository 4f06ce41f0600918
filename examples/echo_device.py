"""A device in a page: it sends back what it gets, in capitals, and counts how often.

In this process, with a driver of our own:        python examples/echo_device.py
For a real guest, as a vhost-user back-end:       python examples/echo_device.py echo.sock
"""

import sys

from virtio_test import BaseDevice, ConfigLayout, ConfigSpace, Driver, Loopback

ECHO_DEVICE_ID = 60  # given to nobody in VIRTIO 1.4


class EchoDevice(BaseDevice):
    """One queue of echoes; the configuration space shows how many there were."""

    def __init__(self) -> None:
        super().__init__(
            ECHO_DEVICE_ID,
            handlers={0: self.echo},
            queue_sizes=(64,),
            config=ConfigSpace(ConfigLayout(("echoes", "le32"), ("longest", "le32"))),
        )

    def echo(self, request: bytes) -> bytes:
        """Bytes in, bytes out; the driver learns of the new counts by a configuration change."""
        self.config.update(echoes=self.config.echoes + 1, longest=max(self.config.longest, len(request)))
        return request.upper()


def main(arguments: list[str]) -> str:
    """Serve on the socket that is named, or say hello in this process; returns what it prints."""
    device = EchoDevice()
    if arguments:
        from virtio_test.transport.vhost_user.backend import serve

        serve(device, arguments[0])
        return ""

    driver = Driver(Loopback(device), layout=device.config.layout)
    driver.initialize()
    answers = [driver.submit(0, [word.encode()], [32]).wait().decode() for word in ("hello", "world")]
    counts = f"{driver.read_field('echoes')} echoes, the longest of {driver.read_field('longest')} bytes"
    text = f"{' '.join(answers)}: {counts}"
    print(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
