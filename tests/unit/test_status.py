"""The device status machine: each row of the robustness catalogue's section 2.7, and properties over all writes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.errors import DeviceNeedsReset, InvalidArgument, SavedStateError, StatusViolation
from virtio_test.spec.clauses import CLAUSES
from virtio_test.status import (
    BIT_RULES,
    INIT_SEQUENCE,
    Action,
    BitRule,
    DeviceStatus,
    StatusChange,
    When,
    check_read_back,
    describe,
    table_text,
)

ACK, DRIVER, DRIVER_OK, FEATURES_OK, SUSPEND, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x10, 0x40, 0x80
LIVE = ACK | DRIVER | FEATURES_OK | DRIVER_OK
values = st.integers(0, 0xFF)


def at(status: int) -> DeviceStatus:
    return DeviceStatus(status)


def rules(change: StatusChange) -> list[str]:
    return [each.rule for each in change.violations]


def good(device: DeviceStatus, value: int) -> StatusChange:
    return device.write(value, features_ok=True)


def test_the_sequence_of_3_1_1() -> None:
    device = DeviceStatus()
    assert good(device, 0) == StatusChange(0, 0, (Action.RESET,))
    written, actions = 0, list[Action]()
    for step in INIT_SEQUENCE:
        written |= step
        assert not device.live
        change = good(device, written)
        assert (change.before | step, change.after, change.violations) == (written, written, ())
        actions += change.actions
    assert actions == [Action.FEATURES_ACCEPTED, Action.ACTIVATE]
    assert device.live
    assert (device.value, device.ignored) == (LIVE, {})


def test_the_whole_sequence_may_come_in_one_write() -> None:
    change = good(at(0), LIVE)
    assert change == StatusChange(0, LIVE, (Action.FEATURES_ACCEPTED, Action.ACTIVATE))


@pytest.mark.parametrize("written", [ACK | DRIVER | FEATURES_OK, LIVE])
def test_d01_d03_bad_features_read_back_without_features_ok(written: int) -> None:
    device = at(ACK | DRIVER)
    change = device.write(written, features_ok=False)
    assert change.after == device.value == ACK | DRIVER
    assert change.actions == (Action.FEATURES_REFUSED,)
    assert rules(change)[0] == "BadFeatures"
    assert change.violations[0].clause == "2.2.2"
    assert not device.features_ok
    # A better subset is accepted without a reset in between.
    assert good(device, ACK | DRIVER | FEATURES_OK).actions == (Action.FEATURES_ACCEPTED,)


def test_d02_features_ok_is_judged_once() -> None:
    device = at(ACK | DRIVER | FEATURES_OK)
    change = device.write(ACK | DRIVER | FEATURES_OK, features_ok=False)
    assert (change.after, change.actions, change.violations) == (ACK | DRIVER | FEATURES_OK, (), ())


def test_d04_driver_ok_without_features_ok_is_ignored_and_counted() -> None:
    device = at(ACK | DRIVER)
    for count in (1, 2, 3):
        change = good(device, ACK | DRIVER | DRIVER_OK)
        assert (change.after, change.actions, rules(change)) == (ACK | DRIVER, (), ["DriverOkWithoutFeaturesOk"])
        assert device.ignored == {"DriverOkWithoutFeaturesOk": count}
    assert not device.driver_ok


def test_d05_cleared_bits_stay_and_are_counted() -> None:
    device = at(LIVE)
    change = good(device, ACK | DRIVER | DRIVER_OK)
    assert (change.after, change.actions, rules(change)) == (LIVE, (), ["StatusBitCleared"])
    assert change.violations[0].clause == "2.1.1"
    assert "FEATURES_OK stays set" in change.violations[0].message
    assert device.live


def test_d06_needs_reset_written_by_the_driver_is_ignored() -> None:
    device = at(LIVE)
    change = good(device, LIVE | NEEDS_RESET)
    assert (change.after, change.actions, rules(change)) == (LIVE, (), ["DriverSetNeedsReset"])
    assert not device.broken


@pytest.mark.parametrize("written", [LIVE | NEEDS_RESET, LIVE], ids=["mirrored", "from the driver's own copy"])
def test_a_driver_that_has_not_seen_needs_reset_breaks_no_rule(written: int) -> None:
    device = at(LIVE | NEEDS_RESET)
    assert good(device, written) == StatusChange(LIVE | NEEDS_RESET, LIVE | NEEDS_RESET)


@pytest.mark.parametrize("written", [LIVE | 0x20, LIVE | 0x100, LIVE | 0xFFFF_FF20])
def test_d07_undefined_bits_are_ignored(written: int) -> None:
    device = DeviceStatus(LIVE, width=4)
    change = good(device, written)
    assert (change.after, change.actions, rules(change)) == (LIVE, (), ["UndefinedStatusBit"])


def test_a_wide_value_whose_low_byte_is_zero_is_no_reset() -> None:
    device = DeviceStatus(LIVE, width=4)
    change = good(device, 0x100)
    assert (change.after, change.actions) == (LIVE, ())
    assert rules(change) == ["StatusBitCleared", "UndefinedStatusBit"]


@given(status=st.sampled_from([0, 1, 3, 0xB, LIVE, LIVE | NEEDS_RESET, LIVE | FAILED, 0x1B, 0x43, 0x83, 0xCF]))
def test_d08_reset_works_everywhere_and_twice(status: int) -> None:
    device = at(status)
    assert good(device, 0) == StatusChange(status, 0, (Action.RESET,))
    assert device.reset() == StatusChange(0, 0, (Action.RESET,))
    assert good(device, LIVE).actions == (Action.FEATURES_ACCEPTED, Action.ACTIVATE)


def test_d10_driver_ok_twice_activates_once() -> None:
    device = at(ACK | DRIVER | FEATURES_OK)
    assert good(device, LIVE).actions == (Action.ACTIVATE,)
    assert good(device, LIVE) == StatusChange(LIVE, LIVE)


def test_d11_d12_breaking_before_driver_ok_notifies_nobody() -> None:
    device = at(ACK | DRIVER | FEATURES_OK)
    assert device.needs_reset() is False
    change = good(device, LIVE)
    assert (change.after, change.actions, change.violations) == (LIVE | NEEDS_RESET, (), ())
    assert not device.live
    assert device.needs_reset() is False


def test_needs_reset_notifies_once_per_reset() -> None:
    device = at(LIVE)
    assert device.needs_reset() is True
    assert [device.needs_reset() for _ in range(3)] == [False, False, False]
    assert (device.value, device.live, device.broken) == (LIVE | NEEDS_RESET, False, True)


def test_d13_d16_recovery_after_needs_reset() -> None:
    device = at(LIVE)
    device.needs_reset()
    for _ in range(3):
        assert good(device, 0).after == 0
        assert good(device, LIVE).actions == (Action.FEATURES_ACCEPTED, Action.ACTIVATE)
        assert device.live
        assert device.needs_reset() is True


@pytest.mark.parametrize(("register", "clause"), [(1, "4.1.3.1"), (4, "4.2.2.2")])
def test_d15_other_widths_are_ignored(register: int, clause: str) -> None:
    for width in {1, 2, 4, 8} - {register}:
        device = DeviceStatus(LIVE, width=register)
        for value in (0, LIVE | FAILED):
            change = device.write(value, features_ok=True, width=width)
            assert (change.after, change.actions, rules(change)) == (LIVE, (), ["StatusWidth"])
            assert change.violations[0].clause == clause
        assert device.ignored == {"StatusWidth": 2}
    device = DeviceStatus(LIVE, width=register)
    assert device.write(0, features_ok=True, width=register).actions == (Action.RESET,)


def test_d17_suspend_and_resume() -> None:
    device = at(LIVE)
    change = device.write(LIVE | SUSPEND, features_ok=True, suspend_negotiated=True)
    assert (change.after, change.actions, change.violations) == (LIVE, (Action.SUSPEND,), ())
    assert not device.live, "no new buffers while draining"
    again = device.write(LIVE | SUSPEND, features_ok=True, suspend_negotiated=True)
    assert again.actions == ()
    device.suspended()
    suspended = LIVE & ~DRIVER_OK | SUSPEND
    assert (device.value, device.live) == (suspended, False)
    device.suspended()
    device.resumed()
    assert device.value == suspended, "nobody asked to resume"
    change = device.write(suspended | DRIVER_OK, features_ok=True, suspend_negotiated=True)
    assert (change.after, change.actions, change.violations) == (suspended, (Action.RESUME,), ())
    assert device.write(suspended | DRIVER_OK, features_ok=True, suspend_negotiated=True).actions == ()
    device.resumed()
    assert (device.value, device.live, device.ignored) == (LIVE, True, {})


@pytest.mark.parametrize(
    ("status", "negotiated"), [(LIVE, False), (ACK | DRIVER | FEATURES_OK, True), (LIVE | NEEDS_RESET, True), (0, True)]
)
def test_d17_suspend_where_it_is_not_possible(status: int, negotiated: bool) -> None:
    device = at(status)
    change = device.write(status | SUSPEND, features_ok=True, suspend_negotiated=negotiated)
    assert (change.after, change.actions, rules(change)) == (status, (), ["SuspendNotPossible"])


def test_d17_failing_to_suspend_or_resume() -> None:
    device = at(LIVE)
    device.write(LIVE | SUSPEND, features_ok=True, suspend_negotiated=True)
    assert device.needs_reset() is True
    device.suspended()
    assert device.value == LIVE | NEEDS_RESET

    suspended = LIVE & ~DRIVER_OK | SUSPEND
    device = at(suspended)
    good(device, suspended | DRIVER_OK)
    assert device.needs_reset() is False, "DRIVER_OK is clear while suspended"
    device.resumed()
    assert device.value == suspended | NEEDS_RESET
    change = good(device, suspended | DRIVER_OK)
    assert (change.after, change.actions, change.violations) == (suspended | NEEDS_RESET, (), ())


def test_after_failed_only_a_reset_helps() -> None:
    device = at(ACK | DRIVER)
    assert good(device, ACK | DRIVER | FAILED).actions == (Action.FAILED,)
    change = good(device, LIVE | FAILED)
    assert (change.after, change.actions) == (ACK | DRIVER | FAILED, ())
    assert rules(change) == ["StatusAfterFailed", "StatusAfterFailed"]
    assert good(device, 0).after == 0
    assert good(device, LIVE).after == LIVE


def test_a_driver_that_gives_up_stops_a_live_device() -> None:
    device = at(LIVE)
    assert good(device, LIVE | FAILED).actions == (Action.FAILED,)
    assert not device.live


def test_negative_values_are_the_callers_mistake() -> None:
    device = at(LIVE)
    with pytest.raises(InvalidArgument, match="-1"):
        good(device, -1)
    assert (device.value, device.ignored) == (LIVE, {})


operations = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 0x1FF), st.booleans(), st.booleans()),
    st.sampled_from([("break",), ("suspended",), ("resumed",)]),
)


@given(steps=st.lists(operations, max_size=30))
def test_properties_of_every_history(steps: list[tuple[str, int, bool, bool] | tuple[str]]) -> None:
    device = DeviceStatus(width=4)
    counted = notified = active = 0
    for step in steps:
        before = device.value
        match step:
            case ("write", value, features_ok, suspend):
                change = device.write(value, features_ok=features_ok, suspend_negotiated=suspend)
                assert (change.before, change.after) == (before, device.value)
                counted += len(change.violations)
                if value == 0:
                    assert (change.after, change.actions) == (0, (Action.RESET,))
                    notified = active = 0
                else:
                    assert Action.RESET not in change.actions
                    assert change.after & before == before, "only a reset clears"
                    assert not change.after & ~before & ~value, "nothing appears that was not written"
                    assert not change.after & ~before & (NEEDS_RESET | SUSPEND | 0x20)
                    assert (Action.FEATURES_ACCEPTED in change.actions) == bool(change.after & ~before & FEATURES_OK)
                    if change.after & ~before & FEATURES_OK:
                        assert features_ok
                    active += change.actions.count(Action.ACTIVATE)
            case ("break",):
                notified += device.needs_reset()
            case ("suspended",):
                device.suspended()
            case _:
                device.resumed()
        assert notified <= 1, "one notification per reset"
        assert active <= 1, "one activation per reset"
        if device.driver_ok:
            assert device.features_ok
            assert not device.value & SUSPEND
        if device.live:
            assert active == 1
            assert not device.broken
        assert DeviceStatus(device.value).value == device.value, "every state that is reached can be saved"
    assert sum(device.ignored.values()) == counted


def test_the_table_decides_every_bit() -> None:
    for bit in (ACK, DRIVER, DRIVER_OK, FEATURES_OK, SUSPEND, NEEDS_RESET, FAILED, 0):
        rows = [each for each in BIT_RULES if each.bit == bit]
        assert rows[-1].when is When.ALWAYS, "the last row of each bit always holds"
        assert all(each.when is not When.ALWAYS for each in rows[:-1]), "no row is out of reach"
    for each in BIT_RULES:
        assert each.clause in CLAUSES
        assert not (each.broken and each.outcome == "set"), "what breaks a rule has no effect"


def test_every_row_of_the_table_is_reached() -> None:
    reached: set[int] = set()

    class Spy(DeviceStatus):
        def _rule(self, bit: int, *, features_ok: bool, suspend_negotiated: bool) -> BitRule:
            rule = super()._rule(bit, features_ok=features_ok, suspend_negotiated=suspend_negotiated)
            reached.add(BIT_RULES.index(rule))
            return rule

    for status in range(256):
        try:
            DeviceStatus(status)
        except InvalidArgument:
            continue
        for value, features_ok, suspend in itertools.product(range(256), (False, True), (False, True)):
            Spy(status).write(value, features_ok=features_ok, suspend_negotiated=suspend)
    assert reached == set(range(len(BIT_RULES)))


def test_table_text_shows_every_row() -> None:
    lines = table_text().splitlines()
    assert lines[0].split()[:3] == ["driver", "sets", "when"]
    assert len(lines) == len(BIT_RULES) + 1
    for rule, line in zip(BIT_RULES, lines[1:], strict=True):
        assert line.startswith(describe(rule.bit) if rule.bit else "other bits")
        assert rule.when.value in line
        assert rule.clause in line.split()
        assert rule.row in line
        assert (rule.action.value if rule.action else "-") in line
        assert line == line.rstrip()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "0"),
        (3, "ACKNOWLEDGE|DRIVER"),
        (LIVE, "ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK"),
        (0x20, "0x20"),
        (0xE0, "DEVICE_NEEDS_RESET|FAILED|0x20"),
        (0x110, "SUSPEND|0x100"),
    ],
)
def test_describe(status: int, text: str) -> None:
    assert describe(status) == text


@given(status=values)
def test_describe_loses_nothing(status: int) -> None:
    bits = {"ACKNOWLEDGE": 1, "DRIVER": 2, "DRIVER_OK": 4, "FEATURES_OK": 8, "SUSPEND": 16}
    bits |= {"DEVICE_NEEDS_RESET": 64, "FAILED": 128, "0x20": 32, "0": 0}
    assert sum(bits[name] for name in describe(status).split("|")) == status


def test_read_back() -> None:
    check_read_back(LIVE, LIVE)
    check_read_back(LIVE | SUSPEND, LIVE)
    check_read_back(ACK, ACK)
    with pytest.raises(StatusViolation) as caught:
        check_read_back(ACK | DRIVER | FEATURES_OK, ACK | DRIVER)
    assert (caught.value.rule, caught.value.clause) == ("FeaturesRefused", "3.1.1")
    with pytest.raises(DeviceNeedsReset):
        check_read_back(LIVE, LIVE | NEEDS_RESET)
    for read in (0, DRIVER | FEATURES_OK | DRIVER_OK):
        with pytest.raises(StatusViolation, match="StatusBitLost"):
            check_read_back(LIVE, read)
    with pytest.raises(StatusViolation, match="StatusBitInvented"):
        check_read_back(ACK, ACK | DRIVER)


@given(history=st.lists(st.tuples(values, st.booleans()), max_size=10))
def test_both_ends_agree(history: list[tuple[int, bool]]) -> None:
    """A write without a violation, to a device that does not break, reads back as the driver end expects."""
    device = DeviceStatus()
    for value, features_ok in history:
        change = device.write(value, features_ok=features_ok)
        if value and not change.violations and not value & NEEDS_RESET:
            check_read_back(value, device.value)


@given(status=st.integers(-2, 0x1FF))
def test_restore_takes_what_a_device_can_have_and_nothing_else(status: int) -> None:
    device = at(LIVE)
    possible = 0 <= status <= 0xFF and not status & 0x20
    possible = possible and (not status & (DRIVER_OK | SUSPEND) or bool(status & FEATURES_OK))
    possible = possible and status & (DRIVER_OK | SUSPEND) != DRIVER_OK | SUSPEND
    if possible:
        device.restore(status)
        assert device.save() == status
        assert device.broken == bool(status & NEEDS_RESET)
        assert eval(repr(device)).value == status
    else:
        with pytest.raises(SavedStateError):
            device.restore(status)
        assert device.save() == LIVE
        with pytest.raises(InvalidArgument):
            DeviceStatus(status)


@pytest.mark.parametrize("bad", [None, "3", 3.0, True, [3]])
def test_restore_refuses_other_types(bad: object) -> None:
    device = at(ACK)
    with pytest.raises(SavedStateError):
        device.restore(bad)
    assert device.value == ACK


def test_repr_and_str() -> None:
    assert repr(at(3)) == "DeviceStatus(0x3)"
    assert repr(DeviceStatus(0, width=4)) == "DeviceStatus(0x0, width=4)"
    assert str(at(3)) == "ACKNOWLEDGE|DRIVER"
    with pytest.raises(InvalidArgument, match="width"):
        DeviceStatus(width=3)


def test_it_is_live_while_nothing_stands_against_it() -> None:
    device = at(LIVE)
    assert device.live
    device.write(LIVE | SUSPEND, features_ok=True, suspend_negotiated=True)
    assert not device.live, "it is suspending"
    assert (device.value, device.moving) == (LIVE, Action.SUSPEND)
    device.suspended()
    assert not device.live
    for bit in (NEEDS_RESET, FAILED):
        assert not at(LIVE | bit).live
    assert not at(LIVE & ~DRIVER_OK).live


@pytest.mark.parametrize(("status", "why"), [(-1, "8 bits"), (0x100, "8 bits"), (0xFF, "have a meaning")])
def test_a_saved_status_is_one_of_8_bits(status: int, why: str) -> None:
    device = at(LIVE)
    with pytest.raises(SavedStateError, match=why):
        device.restore(status)
    assert device.value == LIVE


def test_no_register_holds_a_negative_status() -> None:
    device = at(LIVE)
    with pytest.raises(InvalidArgument, match="no negative number"):
        good(device, -1)
    assert device.value == LIVE
