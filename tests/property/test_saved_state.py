"""Any state at all, of any transport and any device: taken, or refused whole, and a reset heals what was taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.console import ConsoleDevice
from virtio_test.devices.net import NetDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.errors import SavedStateError

from tests.unit.test_saved_state import through_json, wipe, world
from tests.unit.ways import RINGS, WAYS, reach

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.integers(0, 40) | st.integers(0, 1 << 16) | st.integers(0, 1 << 64) | st.booleans()


def places(state: object) -> list[tuple[str | int, ...]]:
    """Every path into a state."""
    found: list[tuple[str | int, ...]] = [()]
    if isinstance(state, dict):
        inner: list[tuple[str | int, Any]] = list(state.items())  # type: ignore[reportUnknownArgumentType]
    elif isinstance(state, list):
        inner = list(enumerate(state))  # type: ignore[reportUnknownArgumentType]
    else:
        inner = []
    for key, value in inner:
        found += [(key, *path) for path in places(value)]
    return found


def bytes_of_text(data: st.DataObject, text: str) -> str:
    """The same text with some characters changed."""
    characters = list(text)
    for _ in range(data.draw(st.integers(1, 3))):
        if characters:
            characters[data.draw(st.integers(0, len(characters) - 1))] = data.draw(
                st.sampled_from("0123456789abcdefg ")
            )
    return "".join(characters)


def change_some(data: st.DataObject, state: dict[str, Any]) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([each for each in places(state) if each]))
        at: Any = state
        for step in path[:-1]:
            at = at[step]
        old = at[path[-1]]
        how = data.draw(st.sampled_from(["number", "json", "remove", "text"]))
        if how == "remove" and isinstance(at, dict):
            del at[path[-1]]
        elif how == "number" and isinstance(old, int | None):
            at[path[-1]] = data.draw(NUMBERS)
        elif how == "text" and isinstance(old, str):
            at[path[-1]] = bytes_of_text(data, old)
        else:
            at[path[-1]] = data.draw(JSON)


@WAYS
@RINGS
@given(data=st.data())
def test_any_state_is_taken_or_refused_whole_and_a_reset_heals(way: str, ring: str, data: st.DataObject) -> None:
    _, over, driver = world(way, ring)
    driver.submit(0, [b"x"], [1])
    over.run()
    if data.draw(st.booleans()):
        driver.suspend()
    before = through_json(over.side.save())
    state = copy.deepcopy(before)
    change_some(data, state)
    try:
        over.side.restore(state)
    except SavedStateError:
        assert through_json(over.side.save()) == before
    over.run()
    wipe(over)
    over.side.restore(before)
    over.run()
    driver.initialize()
    assert driver.submit(1, [b"x"], [1]).wait() == b"X"


DEVICES: dict[str, Callable[[], BaseDevice]] = {
    "test": lambda: TestDevice(console=lambda _: None),
    "timer": lambda: TestDevice(timer=True, console=lambda _: None),
    "blk": lambda: BlkDevice(bytearray(4096)),
    "console": lambda: ConsoleDevice(lambda _: None),
    "rng": RngDevice,
    "net": lambda: NetDevice(pairs=2),
    "net, native": lambda: NetDevice(pairs=2, native=True),
}


@pytest.mark.row("R07")
@pytest.mark.parametrize("name", DEVICES)
@given(data=st.data())
def test_any_state_of_any_device(name: str, data: st.DataObject) -> None:
    over = reach(DEVICES[name](), "in process")
    driver = Driver(over.registers)
    driver.initialize()
    before = through_json(over.side.save())
    state = copy.deepcopy(before)
    change_some(data, state["device"])
    try:
        over.side.restore(state)
    except SavedStateError:
        assert through_json(over.side.save()) == before
    over.run()
    driver.initialize()
