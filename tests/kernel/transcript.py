"""The words on both consoles, as the original system has them."""

from __future__ import annotations

ACK = "virttest get ack"

USAGE = [
    "guest: out: ERROR:please enter two parameters!",
    "guest: out: eg: ./virtio number",
    "guest: out: but the number between 0 and 255!",
]
OPEN_FAILED = ["guest: out: ERROR:virtio_misc open failed!"]
WRITE_FAILED = "guest: out: ERROR:write failed!"


def device_request(number: int) -> list[str]:
    """What the device says for one request."""
    words = [f"get type [ {number} ]"]
    words += [f"get arg{i} [ {(number + i) % 256} ]" for i in (1, 2, 3)]
    # The original calls the text arg3 too.
    words.append("get arg3 [ hello back end! ]")
    return [f"QEMU_BACK_END: >>> {word} form the front end <<<" for word in words]


def driver_request(number: int) -> list[str]:
    """What the driver says for one request's answer."""
    values = [(number + i) % 256 + 100 for i in (1, 2, 3)]
    names = ("ret", "arg1", "arg2")
    answer = [f"virtio response {name} is {value}" for name, value in zip(names, values, strict=True)]
    return ["virtio test_request_done get ack", *answer]


def device_tick(k: int) -> list[str]:
    """What the device says for its tick ``k`` and the number that the driver answers with."""
    return [f"==============set config:{k}", f"=========get virtio num:{k + 1}"]


def driver_tick() -> list[str]:
    """What the driver says for one tick."""
    return ["virttest virttest_changed", "virttest get config change", ACK]
