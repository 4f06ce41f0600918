"""Every row of sections 2.1 to 2.5 of the robustness catalogue, and where those are that are no case of a queue."""

from __future__ import annotations


def _numbers(letter: str, *numbers: int) -> set[str]:
    return {f"{letter}{number:02}" for number in numbers}


ROWS = (
    _numbers("A", *range(1, 11), *range(13, 19))
    | _numbers("C", *range(1, 14))
    | _numbers("B", *range(1, 7), *range(8, 18), 19)
    | _numbers("I", 1, 2, 3, *range(5, 9), *range(10, 14), *range(15, 20), 21)
    | _numbers("P", *range(1, 8), 9, *range(11, 17), *range(18, 31), 32)
)

ELSEWHERE = {
    "A17": "the index in a kick and the address that it is written to belong to the transport: a queue has no doorbell",
    "A18": "DRIVER_OK belongs to the device: a queue exists only when it is running",
}
