"""Every row of sections 2.1 to 2.5, and the rings of 2.14; where those are that are no case of a queue."""

from __future__ import annotations


def _numbers(letter: str, *numbers: int) -> set[str]:
    return {f"{letter}{number:02}" for number in numbers}


CATALOGUE = (
    _numbers("A", *range(1, 11), *range(13, 19))
    | _numbers("C", *range(1, 14))
    | _numbers("B", *range(1, 7), *range(8, 18), 19)
    | _numbers("I", 1, 2, 3, *range(5, 9), *range(10, 14), *range(15, 20), 21)
    | _numbers("P", *range(1, 8), 9, *range(11, 17), *range(18, 31), 32)
    | _numbers("G", 1, 2, 4, 5, 6, 8, 9, 10, 11)
    | _numbers("U", 11)
)

ELSEWHERE = {
    "A17": "the index in a kick and the address that it is written to belong to the transport: a queue has no doorbell",
    "A18": "DRIVER_OK belongs to the device: a queue exists only when it is running",
}
