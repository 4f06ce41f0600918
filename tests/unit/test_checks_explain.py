"""A rule explained: from an error, from a name, as data."""

from __future__ import annotations

import json
import re

import pytest
from virtio_test import checks
from virtio_test._core import Policy
from virtio_test.carrier.vfio_user.rules import violation as vfio_user_violation
from virtio_test.checks import CATALOGUE, EXAMPLES
from virtio_test.errors import InvalidArgument, MessageError, QueueViolation, RuleViolation, StatusViolation
from virtio_test.spec.clauses import CLAUSES
from virtio_test.transport.vhost_user.rules import violation as vhost_user_violation


def words(text: str) -> str:
    return " ".join(text.split())


def test_an_error_explains_itself_with_its_places() -> None:
    error = EXAMPLES["NextOutOfRange"][0].run(Policy.strict)
    assert error is not None
    text = words(error.explain())
    assert text.startswith(words(str(error)))
    assert words(CLAUSES["2.7.5"]) in text
    assert "rust-vmm" in text
    assert "desc[0]: addr 0x10000, len 16, flags NEXT, next 4 avail.ring[0]: 0 avail.idx: 1" in text
    assert "C01, I12, I21" in text


def test_both_outcomes_are_told_where_they_differ() -> None:
    text = words(checks.explain("IndirectTooLong"))
    assert "Policy.interop: accepted: drivers of Windows" in text
    assert "Policy.strict: raised once" in text
    alike = checks.explain("OutOfOrder")
    assert "Policy." not in alike
    assert "When it is broken:" in alike


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("width", [40, 100])
def test_every_rule_is_explained_within_the_width(name: str, width: int) -> None:
    text = checks.explain(name, width=width)
    for entry in CATALOGUE[name]:
        assert words(entry.summary) in words(text)
    # Of a ring no line is broken.
    prose = re.sub(r"^  (A split|A packed|  ).*$", "", text, flags=re.MULTILINE)
    assert max(map(len, prose.splitlines())) <= width
    assert json.loads(json.dumps(checks.as_dict(name)))[0]["name"] == name


def test_a_protocols_error_is_its_own_protocols_rule() -> None:
    for make, family, other in (
        (vhost_user_violation, "vhost-user", "vfio-user:"),
        (vfio_user_violation, "vfio-user", "vhost-user:"),
    ):
        text = make("FdCount", "two fds").explain()
        assert f"FdCount ({family}:" in text
        assert other not in text
    text = MessageError("NoSuchBar", "linux/virtio_pcidev.h", "BAR 7").explain()
    assert "uml-pci" in text
    assert "VIRTIO" not in text
    assert "uml-pci" not in StatusViolation("NoSuchBar", "4.1.4", "BAR 7").explain()


def test_a_rule_of_somebody_else_is_its_own_words() -> None:
    error = RuleViolation("HouseRule", "2.7", "mine", queue=1)
    assert words(error.explain()) == str(error)


def test_without_the_package_an_error_is_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuleViolation, "explainer", None)
    error = QueueViolation("ZeroLength", "2.7.5", "0 bytes")
    assert error.explain() == str(error)


def test_a_wrong_name_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'NextOutOfRang'; the nearest names are NextOutOfRange"):
        checks.explain("NextOutOfRang")
    with pytest.raises(InvalidArgument, match="--list"):
        checks.explain("%%%")
    assert checks.explain("nextoutofrange") == checks.explain("NextOutOfRange")
    assert "QueueSizeZero" in checks.nearest("sizezero")
    assert "NotNegotiated" in checks.nearest("neg", count=9)


def test_the_list_has_every_entry_once() -> None:
    lines = checks.list_rules().splitlines()
    assert len(lines) == sum(map(len, CATALOGUE.values()))
    assert len(set(lines)) == len(lines)
