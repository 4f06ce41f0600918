"""The configuration space: both views of the bytes, the generation, saved states."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.config import ConfigLayout, ConfigSpace, FieldSpec
from virtio_test.errors import InvalidArgument, SavedStateError, StatusViolation

TEST = ConfigLayout(("num_pages", "le32", "rw"), ("actual", "le32", "rw"), ("event", "le32", "rw"))
MIXED = ConfigLayout(
    ("mac", "bytes(6)"), ("status", "le16"), ("flags", "u8", "rw"), ("wide", "le64", "rw"), ("tag", "bytes(3)", "rw")
)
INTEGERS = {"u8": 1, "le16": 2, "le32": 4, "le64": 8}


def declared(number: int, kind: str, writable: bool) -> FieldSpec:
    return (f"field{number}", kind, "rw") if writable else (f"field{number}", kind)


types = st.sampled_from([*INTEGERS]) | st.integers(1, 9).map(lambda size: f"bytes({size})")
layouts = st.lists(st.tuples(types, st.booleans()), max_size=6).map(
    lambda fields: ConfigLayout(*(declared(number, *each) for number, each in enumerate(fields)))
)


@st.composite
def spaces(draw: st.DrawFn) -> ConfigSpace:
    layout = draw(layouts)
    values: dict[str, int | bytes] = {}
    for field in layout:
        data = draw(st.binary(min_size=field.size, max_size=field.size))
        values[field.name] = field.decode(data)
    return ConfigSpace(layout, **values)


def snapshot(space: ConfigSpace) -> tuple[bytes, int, dict[str, int]]:
    return space.read(0, space.size), space.generation, space.ignored


def test_layout_gives_offsets_without_gaps() -> None:
    placed = [(each.name, each.offset, each.size, each.driver_writable) for each in MIXED]
    assert placed == [
        ("mac", 0, 6, False),
        ("status", 6, 2, False),
        ("flags", 8, 1, True),
        ("wide", 9, 8, True),
        ("tag", 17, 3, True),
    ]
    assert (MIXED.size, len(MIXED), MIXED.names()[0]) == (20, 5, "mac")
    assert (TEST.size, TEST["event"].offset, "event" in TEST, "other" in TEST) == (12, 8, True, False)
    assert (ConfigLayout().size, ConfigSpace(ConfigLayout()).read(0, 0)) == (0, b"")


@pytest.mark.parametrize(
    "fields",
    [
        [("a", "u8"), ("a", "u8")],
        [("two words", "u8")],
        [("_private", "u8")],
        [("class", "u8")],
        [("", "u8")],
        [("a", "u16")],
        [("a", "be32")],
        [("a", "bytes(0)")],
        [("a", "bytes(-1)")],
        [("a", "bytes(01)")],
        [("a", "bytes(65537)")],
        [("a", "bytes()")],
        [("a", "bytes(\u0663)")],
        [("a", "bytes(4")],
        [("a", "u8", "wo")],
    ],
)
def test_impossible_layouts_are_refused(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ConfigLayout(*fields)
    assert "\n" not in str(caught.value)


@given(space=spaces())
def test_repr_evaluates_back(space: ConfigSpace) -> None:
    assert eval(repr(space)) == space
    assert eval(repr(space.layout)) == space.layout
    assert hash(eval(repr(space.layout))) == hash(space.layout)


def test_repr_word_for_word() -> None:
    space = ConfigSpace(ConfigLayout(("a", "u8"), ("b", "bytes(2)", "rw")), a=1)
    assert repr(space) == "ConfigSpace(ConfigLayout(('a', 'u8'), ('b', 'bytes(2)', 'rw')), a=1, b=b'\\x00\\x00')"


def test_the_device_sees_fields_and_the_driver_little_endian_bytes() -> None:
    space = ConfigSpace(TEST, num_pages=1)
    space.actual = 0x01020304
    space["event"] = 0xFFFF_FFFF
    assert space.read(0, 12) == b"\x01\0\0\0\x04\x03\x02\x01\xff\xff\xff\xff"
    assert (space.num_pages, space["actual"], space.event) == (1, 0x01020304, 0xFFFF_FFFF)
    assert space.read(5, 2) == b"\x03\x02"
    space.write(6, b"\xaa\xbb\xcc")
    assert (space.actual, space.event) == (0xBBAA0304, 0xFFFF_FFCC)


@given(space=spaces(), data=st.data())
def test_any_cut_of_reads_gives_the_same_bytes(space: ConfigSpace, data: st.DataObject) -> None:
    whole = space.read(0, space.size)
    assert whole == b"".join(
        value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
        for field in space.layout
        for value in [space[field.name]]
    )
    offset = data.draw(st.integers(0, space.size))
    length = data.draw(st.integers(0, space.size - offset))
    assert space.read(offset, length) == whole[offset : offset + length]


@given(space=spaces(), data=st.data())
def test_driver_writes_change_writable_bytes_only(space: ConfigSpace, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, space.size))
    written = data.draw(st.binary(max_size=space.size - offset))
    before, generation = space.read(0, space.size), space.generation
    calls: list[tuple[str, ...]] = []
    changes: list[int] = []
    space.on_driver_write = calls.append
    space.on_change = lambda: changes.append(1)
    space.write(offset, written)
    after = space.read(0, space.size)
    touched: list[str] = []
    readonly: dict[str, int] = {}
    for field in space.layout:
        covered = [
            each for each in range(field.offset, field.offset + field.size) if offset <= each < offset + len(written)
        ]
        if covered:
            if field.driver_writable:
                touched.append(field.name)
            else:
                readonly[field.name] = 1
        for position in range(field.offset, field.offset + field.size):
            new = position in covered and field.driver_writable
            assert after[position] == (written[position - offset] if new else before[position])
    assert calls == ([tuple(touched)] if touched else [])
    assert space.ignored == readonly
    assert (changes, space.generation) == ([], generation), "the driver needs no news of its own writes"


@pytest.mark.row("X09")
@given(space=spaces(), data=st.data())
def test_ranges_outside_are_the_other_sides_fault_and_change_nothing(space: ConfigSpace, data: st.DataObject) -> None:
    before = snapshot(space)
    offset = data.draw(st.integers(-2, 2**64))
    length = data.draw(st.integers(0, 64))
    if offset >= 0 and offset + length <= space.size:
        length = space.size - offset + 1
    with pytest.raises(StatusViolation) as caught:
        space.read(offset, length)
    assert (caught.value.rule, caught.value.clause) == ("ConfigOutOfRange", "2.5")
    with pytest.raises(StatusViolation, match="ConfigOutOfRange"):
        space.write(offset, bytes(length))
    assert snapshot(space) == before


def test_writes_take_any_bytes_and_are_not_kept_by_reference() -> None:
    space = ConfigSpace(TEST)
    source = bytearray(b"\x05\0\0\0")
    space.write(0, source)
    source[0] = 9
    space.write(4, memoryview(b"\x06\0\0\0"))
    assert (space.num_pages, space.actual) == (5, 6)


@pytest.mark.parametrize("value", [-1, 2**32, True, 1.0, "1", b"\0\0\0\1", None])
def test_the_devices_impossible_values_are_refused(value: object) -> None:
    space = ConfigSpace(TEST, num_pages=7)
    before = snapshot(space)
    for attempt in (
        lambda: setattr(space, "actual", value),
        lambda: space.update(num_pages=1, actual=value),  # type: ignore[arg-type]
        lambda: ConfigSpace(TEST, actual=value),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument, match="actual"):
            attempt()
    assert snapshot(space) == before


@pytest.mark.parametrize("value", [b"", b"12", b"1234", 5, "abc"])
def test_bytes_fields_take_exactly_their_size(value: object) -> None:
    with pytest.raises(InvalidArgument, match="exactly 3 bytes"):
        ConfigSpace(MIXED, tag=value)  # type: ignore[arg-type]


def test_unknown_fields() -> None:
    space = ConfigSpace(TEST)
    with pytest.raises(AttributeError, match="'pages'"):
        _ = space.pages
    with pytest.raises(AttributeError, match="'pages'"):
        space.pages = 1
    with pytest.raises(InvalidArgument, match="fields: num_pages, actual, event"):
        _ = space["pages"]
    with pytest.raises(InvalidArgument):
        space.update(pages=1)
    with pytest.raises(AttributeError):
        setattr(space, "generation", 5)  # noqa: B010 - a plain assignment is what the type checker refuses
    assert not hasattr(space, "_nothing")
    assert {"num_pages", "read"} <= set(dir(space))


def test_a_field_named_like_a_method_is_reached_by_index() -> None:
    space = ConfigSpace(ConfigLayout(("read", "u8"), ("size", "le16")), read=1, size=2)
    assert (space["read"], space["size"], space.size) == (1, 2, 3)
    space["size"] = 7
    assert space.read(0, 3) == b"\1\7\0"


def test_copies_are_independent() -> None:
    space = ConfigSpace(TEST, actual=3)
    again = copy.deepcopy(space)
    again.actual = 4
    assert (space.actual, again.actual, space != again) == (3, 4, True)


def test_on_change_comes_once_per_change_that_changed_something() -> None:
    space = ConfigSpace(TEST)
    seen: list[tuple[int, int]] = []
    space.on_change = lambda: seen.append((space.num_pages, space.actual))
    assert space.update(num_pages=1, actual=2) is True
    assert space.update(num_pages=1, actual=2) is False
    space.actual = 2
    space.actual = 3
    assert seen == [(1, 2), (1, 3)]


def test_generation_moves_when_the_driver_could_notice() -> None:
    space = ConfigSpace(TEST)
    start = space.generation
    space.actual = 1
    assert space.generation == start, "nobody has read anything yet"
    space.read(4, 4)
    space.actual = 1
    assert space.generation == start, "nothing is different"
    space.actual = 2
    assert space.generation == start + 1
    space.actual = 3
    assert space.generation == start + 1, "one look, one step"


class Look:
    """A driver that reads generation, half of a field, half of a field, generation: 2.5.1."""

    def __init__(self, space: ConfigSpace) -> None:
        self.space = space

    def once(self, disturb: list[list[int]]) -> tuple[bool, int]:
        halves: list[bytes] = []
        before = self.space.generation_u8
        for offset, values in zip((0, 2), disturb, strict=True):
            halves.append(self.space.read(offset, 2))
            for value in values:
                self.space.num_pages = value
        return self.space.generation_u8 == before, int.from_bytes(b"".join(halves), "little")


pages = st.integers(0, 2**32 - 1)


@given(
    first=pages,
    early=st.lists(pages, max_size=3),
    middle=st.lists(pages, max_size=600),
    late=st.lists(pages, max_size=3),
)
def test_no_torn_value_passes_under_one_generation(
    first: int, early: list[int], middle: list[int], late: list[int]
) -> None:
    space = ConfigSpace(TEST, num_pages=first)
    look = Look(space)
    look.once([[], []])
    for value in early:
        space.num_pages = value
    stable = [first, *early][-1]
    same, value = look.once([middle, late])
    if same:
        assert value == stable
    if not middle and not late:
        assert same, "nothing changed between the two looks (4.2.2)"


def test_256_changes_between_two_looks_do_not_wrap_unnoticed() -> None:
    space = ConfigSpace(TEST, num_pages=0)
    look = Look(space)
    same, _ = look.once([[value << 8 for value in range(1, 257)], []])
    assert not same


def test_generation_widths() -> None:
    space = ConfigSpace(TEST)
    for value in range(1, 300):
        space.read(0, 1)
        space.actual = value
    assert (space.generation, space.generation_u8) == (299, 299 - 256)


@given(space=spaces(), other=st.data())
def test_saved_state_goes_through_json_and_restores(space: ConfigSpace, other: st.DataObject) -> None:
    target = ConfigSpace(space.layout)
    calls: list[object] = []
    target.on_change = lambda: calls.append(1)
    target.on_driver_write = calls.append
    for _ in range(other.draw(st.integers(0, 3))):
        target.read(0, 0)
        for field in space.layout:
            target[field.name] = field.decode(other.draw(st.binary(min_size=field.size, max_size=field.size)))
    calls.clear()
    generation = target.generation
    target.restore(json.loads(json.dumps(space.save())))
    assert target == space
    assert calls == []
    assert target.generation not in (generation, space.generation)


GOOD = ConfigSpace(MIXED, mac=b"\1\2\3\4\5\6", status=1, wide=2**63).save()


def broken(**changes: object) -> dict[str, object]:
    return {**GOOD, **changes}


def broken_value(name: str, value: object) -> dict[str, object]:
    values = GOOD["values"]
    assert isinstance(values, dict)
    return {**GOOD, "values": {**values, name: value}}


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "state",
        {},
        {**GOOD, "more": 1},
        {"version": 1, "values": GOOD["values"]},
        broken(version=2),
        broken(version="1"),
        broken(version=True),
        broken(generation=-1),
        broken(generation=2**32),
        broken(generation=1.5),
        broken(generation=True),
        broken(values=None),
        broken(values=[]),
        broken(values={"mac": "010203040506"}),
        broken_value("extra", 1),
        broken_value("status", -1),
        broken_value("status", 65536),
        broken_value("status", "01"),
        broken_value("status", value=True),
        broken_value("status", None),
        broken_value("mac", "0102030405"),
        broken_value("mac", "01020304050607"),
        broken_value("mac", "zz0203040506"),
        broken_value("mac", 5),
        broken_value("tag", None),
    ],
)
def test_a_bad_state_changes_nothing(state: object) -> None:
    space = ConfigSpace(MIXED, flags=9, tag=b"abc")
    space.read(0, 1)
    before = snapshot(space)
    with pytest.raises(SavedStateError) as caught:
        space.restore(state)
    assert "\n" not in str(caught.value)
    assert snapshot(space) == before
    space.restore(GOOD)
    assert space.mac == b"\1\2\3\4\5\6"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (-1, 0), (0, -1), (12, -1), (12, 1), (13, 0)])
def test_each_end_of_the_space(offset: int, length: int) -> None:
    space = ConfigSpace(TEST)
    with pytest.raises(StatusViolation, match="ConfigOutOfRange"):
        space.read(offset, length)
    if length >= 0:
        with pytest.raises(StatusViolation, match="ConfigOutOfRange"):
            space.write(offset, bytes(length))
    assert (space.read(12, 0), space.read(11, 1)) == (b"", b"\0")


def test_the_same_bytes_of_another_layout_are_another_space() -> None:
    assert ConfigSpace(ConfigLayout(("a", "le16"))) == ConfigSpace(ConfigLayout(("a", "le16")))
    assert ConfigSpace(ConfigLayout(("a", "le16"))) != ConfigSpace(ConfigLayout(("b", "le16")))
    assert ConfigSpace(ConfigLayout(("a", "le16")), a=1) != ConfigSpace(ConfigLayout(("a", "le16")), a=2)
