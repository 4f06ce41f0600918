"""Errors: the two families, pickling, `repr` that evaluates back, one line of text."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test import errors

VIOLATIONS = [
    errors.RuleViolation,
    errors.QueueViolation,
    errors.StatusViolation,
    errors.AnswerViolation,
    errors.RequestViolation,
    errors.MessageError,
]
PLAIN = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.VirtioTestError) and not issubclass(each, errors.RuleViolation)
]
PLACES = ("queue", "position", "head", "descriptor", "address")
names = st.text(alphabet=st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
places = st.fixed_dictionaries({}, optional=dict.fromkeys(PLACES, st.integers(0, 2**64 - 1)))


def rebuilt(error: Exception) -> object:
    return eval(repr(error), dict(vars(errors)))


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_errors_pickle_and_say_what_they_were_given(kind: type[errors.VirtioTestError]) -> None:
    error = kind("a ring of size 0")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), rebuilt(error)):
        assert type(again) is kind
        assert isinstance(again, Exception)
        assert again.args == ("a ring of size 0",)
        assert str(again) == "a ring of size 0"


def test_there_are_two_families_and_no_error_is_in_both() -> None:
    leaves = [each for each in [*PLAIN, *VIOLATIONS] if each is not errors.VirtioTestError]
    assert len(leaves) >= 15
    for each in leaves:
        assert issubclass(each, errors.UsageError) != issubclass(each, errors.PeerError), each


def test_usual_handlers_catch_bad_arguments() -> None:
    assert issubclass(errors.InvalidArgument, ValueError)
    assert issubclass(errors.SavedStateError, ValueError)
    assert not issubclass(errors.PeerError, ValueError)


@given(kind=st.sampled_from(VIOLATIONS), rule=names, clause=names, message=st.text(max_size=50), where=places)
def test_violations_survive_pickle_copy_and_repr(
    kind: type[errors.RuleViolation], rule: str, clause: str, message: str, where: dict[str, int]
) -> None:
    error = kind(rule, clause, message, **where)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error), rebuilt(error)):
        assert again == error
        assert hash(again) == hash(error)
        assert isinstance(again, errors.RuleViolation)
        assert (again.rule, again.clause, again.message, again.places()) == (rule, clause, message, where)


@given(kind=st.sampled_from(VIOLATIONS), where=places)
def test_str_is_one_line_with_rule_and_clause(kind: type[errors.RuleViolation], where: dict[str, int]) -> None:
    text = str(kind("NextOutOfRange", "2.7.5", "next is 9, the table has 4", **where))
    assert "\n" not in text
    assert text.startswith("NextOutOfRange (")
    assert "2.7.5" in text
    assert "next is 9, the table has 4" in text
    if kind is not errors.MessageError:
        assert text.count("[") == (1 if where else 0)
        assert all(f"{name} " in text for name in where)


def test_str_word_for_word() -> None:
    error = errors.QueueViolation("NextOutOfRange", "2.7.5", "next is 9", queue=0, head=3, address=0x1000)
    assert str(error) == (
        "NextOutOfRange (VIRTIO 1.4, 2.7.5): next is 9; expected: The next field of a chained descriptor is an index "
        "of its table [queue 0, head 3, address 0x1000]"
    )
    assert repr(error) == "QueueViolation('NextOutOfRange', '2.7.5', 'next is 9', queue=0, head=3, address=4096)"


def test_message_error_names_its_own_document() -> None:
    error = errors.MessageError("PayloadSize", "vhost-user, Header", "size is 5", queue=2)
    assert str(error) == (
        "PayloadSize (vhost-user, Header): size is 5; expected: The payload has the size of its request [queue 2]"
    )


def test_what_is_expected_is_said_once_and_only_of_rules_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "A queue has at least one descriptor."
    error = errors.QueueViolation("QueueSizeZero", "2.7", "size 0")
    assert error.expected == expected
    assert pickle.loads(pickle.dumps(error)).expected == expected
    said = errors.QueueViolation("QueueSizeZero", "2.7", f"size 0: {expected[:-1].lower()}")
    assert str(said).count("at least one descriptor") == 1
    other = errors.RuleViolation("HouseRule", "2.7", "mine", queue=1)
    assert other.expected == ""
    assert str(other) == "HouseRule (VIRTIO 1.4, 2.7): mine [queue 1]"
    monkeypatch.setattr(errors.RuleViolation, "expecter", None)
    assert error.expected == ""
    assert str(error) == "QueueSizeZero (VIRTIO 1.4, 2.7): size 0"


def test_equality_is_by_class_and_all_fields() -> None:
    error = errors.QueueViolation("A", "2.1", "m", queue=1)
    assert error != errors.QueueViolation("A", "2.1", "m", queue=2)
    assert error != errors.StatusViolation("A", "2.1", "m", queue=1)
    assert error != errors.QueueViolation("A", "2.2", "m", queue=1)
    assert error != "A"


def test_a_note_does_not_get_lost_on_the_way_to_another_process() -> None:
    error = errors.StatusViolation("A", "2.1", "m")
    error.add_note("seen in worker 3")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen in worker 3"]
