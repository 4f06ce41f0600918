"""Feature sets: an algebra with names; negotiation: what either end may and must do (VIRTIO 1.4, 2.2 and 6)."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.errors import InvalidArgument, StatusViolation
from virtio_test.features import (
    FeatureSet,
    check_accepted,
    check_own_offer,
    judge_accepted,
    judge_offered,
    negotiate,
)
from virtio_test.spec.clauses import CLAUSES
from virtio_test.spec.features import FEATURE_BY_BIT, FEATURES

CLASS = {"CAN_PRINT": 0, "LATE": 60}
NET = {"CSUM": 0, "GUEST_TSO4": 7, "GUEST_TSO6": 8, "GUEST_ECN": 9, "CTRL_VQ": 17, "MQ": 22}
NET_REQUIRES = {"MQ": ("CTRL_VQ",), "GUEST_ECN": ("GUEST_TSO4|GUEST_TSO6",), "GUEST_TSO4": ("CSUM",)}
MODERN = 1 << 32
DEFINED = sum(1 << each.bit for each in FEATURES if not each.legacy)

masks = (
    st.integers(0, 2**128 - 1)
    | st.integers(0, 2**64 - 1)
    | st.sets(st.integers(0, 127), max_size=6).map(lambda bits: sum(1 << bit for bit in bits))
)


def of(bits: int) -> FeatureSet:
    return FeatureSet.from_bits(bits, device=CLASS)


@given(bits=masks)
def test_repr_pickle_and_copy_give_an_equal_set(bits: int) -> None:
    features = of(bits)
    for again in (eval(repr(features)), pickle.loads(pickle.dumps(features)), copy.deepcopy(features)):
        assert again == features
        assert again.bits == bits == int(features)
        assert hash(again) == hash(features)
        assert dict(again.device) == CLASS


@given(bits=masks)
def test_names_and_bits_are_two_views_of_one_set(bits: int) -> None:
    features = of(bits)
    names = list(features)
    assert len(names) == len(features) == bits.bit_count()
    assert bool(features) == bool(bits)
    assert FeatureSet(*names, device=CLASS) == features
    assert FeatureSet(*features.bit_numbers(), device=CLASS) == features
    assert all(name in features for name in names)
    assert str(features) == (", ".join(names) or "none")
    for name in names:
        if name.startswith("BIT_"):
            assert int(name[4:]) not in FEATURE_BY_BIT


@given(one=masks, other=masks)
def test_algebra_is_that_of_sets_of_bits(one: int, other: int) -> None:
    left, right = of(one), of(other)
    mine, theirs = set(left.bit_numbers()), set(right.bit_numbers())
    assert set((left | right).bit_numbers()) == mine | theirs
    assert set((left & right).bit_numbers()) == mine & theirs
    assert set((left - right).bit_numbers()) == mine - theirs
    assert set((left ^ right).bit_numbers()) == mine ^ theirs
    assert (left <= right, left < right) == (mine <= theirs, mine < theirs)
    assert (left >= right, left > right) == (mine >= theirs, mine > theirs)
    assert left.isdisjoint(right) == mine.isdisjoint(theirs)
    assert (left == right) == (mine == theirs)
    assert left.bits == one, "operators change nothing"


@given(bits=masks, select=st.integers(-1, 5), value=st.integers(0, 2**33))
def test_words_are_what_registers_show(bits: int, select: int, value: int) -> None:
    features = of(bits)
    assert sum(features.word(number) << 32 * number for number in range(4)) == bits
    written = features.with_word(select, value)
    if 0 <= select < 4:
        assert written.word(select) == value & 0xFFFF_FFFF
    for number in set(range(4)) - {select}:
        assert written.word(number) == features.word(number)
    for beyond in (4, 5, 0xFFFF_FFFF, -1):
        assert features.word(beyond) == 0
        assert features.with_word(beyond, value) == features


@pytest.mark.parametrize(
    "operator", ["__or__", "__and__", "__sub__", "__xor__", "__le__", "__lt__", "__ge__", "__gt__"]
)
def test_operators_are_for_sets_of_features(operator: str) -> None:
    assert getattr(FeatureSet("VERSION_1"), operator)(1 << 32) is NotImplemented


def test_names_word_for_word() -> None:
    features = FeatureSet("VERSION_1", "virtio_f_ring_packed", "can_print", 57, "BIT_5", device={"CAN_PRINT": 0})
    assert list(features) == ["CAN_PRINT", "BIT_5", "VERSION_1", "RING_PACKED", "BIT_57"]
    assert str(features) == "CAN_PRINT, BIT_5, VERSION_1, RING_PACKED, BIT_57"
    expected = "FeatureSet('CAN_PRINT', 'BIT_5', 'VERSION_1', 'RING_PACKED', 'BIT_57', device={'CAN_PRINT': 0})"
    assert repr(features) == expected
    assert repr(FeatureSet()) == "FeatureSet()"
    assert ("BIT_32" in features, 32 in features, "EVENT_IDX" in features) == (True, True, False)
    assert list(features.undefined()) == ["BIT_5", "BIT_57"]


@pytest.mark.parametrize("bad", ["", "RING", "BIT_128", "BIT_", "BIT_-1", "BIT_1x", "BIT_" + "9" * 5000, "BIT_\u0663"])
def test_unknown_names_are_refused_in_one_line(bad: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        FeatureSet(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgument):
        assert bad in FeatureSet(device=CLASS)
    with pytest.raises(InvalidArgument, match=r"known: CAN_PRINT, .*RING_PACKED, .*LATE, or BIT_0 to BIT_127"):
        FeatureSet("RING", device=CLASS)


@pytest.mark.parametrize("bad", [-1, 128, 2**40])
def test_bits_out_of_range_are_refused(bad: int) -> None:
    with pytest.raises(InvalidArgument):
        FeatureSet(bad)
    with pytest.raises(InvalidArgument):
        FeatureSet.from_bits(-1 if bad < 0 else 1 << min(bad, 200))


@pytest.mark.parametrize(
    "names",
    [
        {"lower": 0},
        {"VERSION_1": 0},
        {"MINE": 24},
        {"MINE": 32},
        {"MINE": 41},
        {"MINE": 44},
        {"MINE": 128},
        {"MINE": -1},
        {"BIT_7": 7},
        {"VIRTIO_F_MINE": 7},
        {"A,B": 7},
        {"ONE": 3, "TWO": 3},
    ],
)
def test_device_names_must_not_contradict_the_specification(names: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument):
        FeatureSet(device=names)


def test_sets_of_one_class_and_plain_sets_mix() -> None:
    mine, plain = FeatureSet("CAN_PRINT", device=CLASS), FeatureSet.from_bits(1 | MODERN)
    assert list(plain & mine) == list(mine & plain) == ["CAN_PRINT"]
    assert list(plain) == ["BIT_0", "VERSION_1"]
    with pytest.raises(InvalidArgument, match="different device classes"):
        _ = mine | FeatureSet(device={"CAN_PRINT": 1})
    with pytest.raises(InvalidArgument, match="share bit 0"):
        _ = mine | FeatureSet(device=NET)


def test_parse() -> None:
    base = FeatureSet("VERSION_1", "EVENT_IDX", device=CLASS)
    parsed = FeatureSet.parse(" +RING_PACKED, -EVENT_IDX,+can_print ,+BIT_57", base=base)
    assert list(parsed) == ["CAN_PRINT", "VERSION_1", "RING_PACKED", "BIT_57"]
    assert FeatureSet.parse("-IN_ORDER,+VERSION_1", base=base) == base


@given(add=st.sets(st.integers(0, 127), max_size=5), remove=st.sets(st.integers(0, 127), max_size=5), base=masks)
def test_parse_adds_and_removes(add: set[int], remove: set[int], base: int) -> None:
    remove -= add
    signed = [f"+{name}" for name in FeatureSet(*add, device=CLASS)]
    signed += [f"-{name}" for name in FeatureSet(*remove, device=CLASS)]
    if signed:
        parsed = FeatureSet.parse(",".join(signed), base=of(base))
        assert set(parsed.bit_numbers()) == (set(of(base).bit_numbers()) | add) - remove


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty feature name"),
        ("+RING_PACKED,,", "empty feature name"),
        ("RING_PACKED", "no sign"),
        ("+", "no sign or no name"),
        ("+ ", "no sign or no name"),
        ("+RING_PACED", "unknown feature 'RING_PACED'; known: CAN_PRINT, "),
        ("+\nX", "unknown feature"),
        ("+EVENT_IDX,-event_idx", "EVENT_IDX is both added and removed"),
    ],
)
def test_parse_refuses_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        FeatureSet.parse(text, base=FeatureSet(device=CLASS))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(offered=masks, wanted=masks)
def test_negotiate_never_accepts_what_it_must_not(offered: int, wanted: int) -> None:
    offer = of(offered | MODERN)
    accepted = negotiate(offer, of(wanted), transport="mmio")
    allowed = DEFINED | sum(1 << bit for bit in CLASS.values())
    assert accepted <= offer
    assert not accepted.bits & ~allowed, "nothing unknown, reserved or legacy"
    assert not accepted.bits & ~(wanted | MODERN)
    assert "VERSION_1" in accepted
    assert "SR_IOV" not in accepted
    assert "ADMIN_VQ" not in accepted
    assert judge_accepted(offer, accepted, transport="mmio") is None
    usable = offered & wanted & allowed & ~(1 << 37 | 1 << 41)
    assert accepted.bits == usable | MODERN, "and nothing usable is left out"
    assert negotiate(offer, accepted, transport="mmio") == accepted, "the same again after a reset (2.2.2)"


def test_restricted_features_are_accepted_on_their_transport() -> None:
    every = FeatureSet.from_bits(2**128 - 1)
    assert negotiate(every, every, transport="pci").bits == DEFINED
    assert negotiate(every, every).bits == DEFINED


@given(offered=masks, wanted=masks)
def test_negotiate_keeps_requirements(offered: int, wanted: int) -> None:
    accepted = negotiate(
        FeatureSet.from_bits(offered | MODERN), FeatureSet.from_bits(wanted, device=NET), requires=NET_REQUIRES
    )
    present = set(accepted)
    assert "MQ" not in present or "CTRL_VQ" in present
    assert "GUEST_TSO4" not in present or "CSUM" in present
    assert "GUEST_ECN" not in present or present & {"GUEST_TSO4", "GUEST_TSO6"}


def test_dropping_one_feature_drops_what_requires_it() -> None:
    every = FeatureSet("VERSION_1", *NET, device=NET)
    without = every - FeatureSet("CSUM", "GUEST_TSO6", device=NET)
    assert list(negotiate(without, every, requires=NET_REQUIRES)) == ["CTRL_VQ", "MQ", "VERSION_1"]


def test_version_1_is_accepted_even_if_nobody_asked() -> None:
    assert negotiate(FeatureSet("VERSION_1", "EVENT_IDX"), FeatureSet()) == FeatureSet("VERSION_1")


def test_an_offer_without_version_1_is_refused() -> None:
    with pytest.raises(StatusViolation) as caught:
        negotiate(FeatureSet("EVENT_IDX"), FeatureSet("EVENT_IDX"))
    assert (caught.value.rule, caught.value.clause) == ("Version1NotOffered", "6.2")
    assert "EVENT_IDX" in caught.value.message


def test_a_required_feature_must_be_there() -> None:
    required = FeatureSet("CAN_PRINT", device=CLASS)
    offered = FeatureSet("VERSION_1", "RING_PACKED")
    with pytest.raises(StatusViolation) as caught:
        negotiate(offered, offered, required)
    assert (caught.value.rule, caught.value.clause) == ("RequiredFeatureMissing", "2.2.1")
    assert "without CAN_PRINT: not offered" in caught.value.message
    assert "CAN_PRINT" in negotiate(offered | FeatureSet(0), FeatureSet(), required)


def test_a_required_feature_whose_requirement_is_missing() -> None:
    offered = FeatureSet("VERSION_1", "MQ", device=NET)
    with pytest.raises(StatusViolation, match=r"without MQ: not offered in a form"):
        negotiate(offered, offered, FeatureSet("MQ", device=NET), requires=NET_REQUIRES)


@given(offered=masks, accepted=masks)
def test_d01_a_device_takes_a_subset_and_nothing_else(offered: int, accepted: int) -> None:
    offer, taken = of(offered | MODERN), of(accepted)
    found = judge_accepted(offer, taken)
    if accepted & ~(offered | MODERN):
        assert found is not None
        assert (found.rule, found.clause) == ("FeatureNotOffered", "2.2.1")
    elif not accepted & MODERN:
        assert found is not None
        assert (found.rule, found.clause) == ("Version1NotAccepted", "6.1")
        legacy = judge_accepted(offer, taken, legacy=True)
        assert (legacy is None) == (not accepted & DEFINED >> 33 << 33)
    else:
        assert found is None
        check_accepted(offer, taken)


def test_d03_requirements_are_checked() -> None:
    offered = FeatureSet("VERSION_1", *NET, device=NET)
    for names, name, need in [
        (("MQ",), "MQ", "CTRL_VQ"),
        (("GUEST_ECN",), "GUEST_ECN", "GUEST_TSO4 or GUEST_TSO6"),
        (("GUEST_ECN", "GUEST_TSO4"), "GUEST_TSO4", "CSUM"),
    ]:
        accepted = FeatureSet("VERSION_1", *names, device=NET)
        with pytest.raises(StatusViolation) as caught:
            check_accepted(offered, accepted, requires=NET_REQUIRES)
        assert (caught.value.rule, caught.value.clause) == ("RequirementNotAccepted", "2.2.1")
        assert caught.value.message == f"{name} is accepted without {need}, which it requires"
    good = FeatureSet("VERSION_1", "GUEST_ECN", "GUEST_TSO6", "MQ", "CTRL_VQ", device=NET)
    check_accepted(offered, good, requires=NET_REQUIRES)


def test_packed_without_version_1_is_refused_even_from_a_legacy_driver() -> None:
    offered = FeatureSet("VERSION_1", "RING_PACKED", "EVENT_IDX")
    check_accepted(offered, FeatureSet("EVENT_IDX"), legacy=True)
    with pytest.raises(StatusViolation, match="RequirementNotAccepted"):
        check_accepted(offered, FeatureSet("RING_PACKED"), legacy=True)


@pytest.mark.parametrize(
    ("features", "transport", "rule"),
    [
        (FeatureSet("EVENT_IDX"), None, "Version1NotOffered"),
        (FeatureSet("VERSION_1", 44), None, "UndefinedOffered"),
        (FeatureSet("VERSION_1", 31), None, "UndefinedOffered"),
        (FeatureSet("VERSION_1", 0), None, "UndefinedOffered"),
        (FeatureSet("VERSION_1", "ADMIN_VQ"), "mmio", "TransportNotSupported"),
        (FeatureSet("VERSION_1", "MQ", device=NET), None, "RequirementNotOffered"),
    ],
)
def test_bad_offers_are_a_violation_of_the_peer_and_a_mistake_of_ours(
    features: FeatureSet, transport: str | None, rule: str
) -> None:
    found = judge_offered(features, requires=NET_REQUIRES, transport=transport)
    assert found is not None
    assert found.rule == rule
    assert found.clause in CLAUSES
    with pytest.raises(InvalidArgument, match=rule):
        check_own_offer(features, requires=NET_REQUIRES, transport=transport)


def test_good_offers() -> None:
    check_own_offer(FeatureSet("VERSION_1", "RING_PACKED", "CAN_PRINT", device=CLASS), transport="vhost-user")
    check_own_offer(FeatureSet("VERSION_1", "ADMIN_VQ"), transport="pci")
    assert judge_offered(FeatureSet("VERSION_1", *NET, device=NET), requires=NET_REQUIRES) is None
    assert judge_accepted(FeatureSet("VERSION_1", "SR_IOV"), FeatureSet("VERSION_1", "SR_IOV"), transport="mmio")


def test_a_legacy_interface_offers_no_version_1_and_needs_none() -> None:
    offered = FeatureSet("EVENT_IDX")
    assert negotiate(offered, offered, legacy=True) == offered
    with pytest.raises(StatusViolation, match="Version1NotOffered"):
        negotiate(offered, offered)
