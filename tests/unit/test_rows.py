"""The robustness catalogue as data: whole, in step with the rules, and each row with a test that shows it."""

from __future__ import annotations

import json
import re
from itertools import chain

import pytest
from virtio_test import checks, strategies
from virtio_test.checks import (
    CATALOGUE,
    ROWS,
    SECTIONS,
    Entry,
    Meets,
    Outcome,
    Row,
    find_row,
    rows_of_rule,
    rules_of_row,
)
from virtio_test.checks.entry import clause_text
from virtio_test.checks.rows.practice import PRACTICE
from virtio_test.errors import InvalidArgument

from tests import rows, shown


def numbers(letter: str, *ranges: int | tuple[int, int]) -> set[str]:
    spans = (range(each, each + 1) if isinstance(each, int) else range(each[0], each[1] + 1) for each in ranges)
    return {f"{letter}{number:02}" for number in chain.from_iterable(spans)}


IDS = (
    numbers("A", (1, 10), (13, 18))
    | numbers("C", (1, 13))
    | numbers("B", (1, 6), (8, 17), 19)
    | numbers("I", (1, 3), (5, 8), (10, 13), (15, 19), 21)
    | numbers("P", (1, 7), 9, (11, 16), (18, 30), 32)
    | numbers("Q", (1, 17))
    | numbers("D", (1, 17))
    | numbers("X", (1, 16))
    | numbers("U", (1, 7), (9, 12))
    | numbers("N", 1, (3, 8), 10, 11)
    | numbers("T", (1, 15))
    | numbers("R", (1, 4), (6, 12))
    | numbers("M", (1, 6), (8, 13), (15, 17), (19, 21))
    | numbers("G", (1, 2), (4, 6), (8, 11), (13, 19))
)
"""Sections 2.1 to 2.14. Q12 and X09 stand in the table of vulnerabilities only; the driver's side of PCI has no id."""

VULNERABILITIES = """
CVE-2011-2212 CVE-2011-2512 CVE-2013-4148 CVE-2013-4149 CVE-2013-4150 CVE-2013-4151 CVE-2013-4535 CVE-2013-4536
CVE-2013-4542 CVE-2013-6399 CVE-2014-0182 CVE-2014-0150 CVE-2016-5403 CVE-2016-6490 CVE-2016-7422 CVE-2016-6833
CVE-2017-17381 CVE-2020-10717 CVE-2021-3544 CVE-2021-3545 CVE-2021-3546 CVE-2021-3748 CVE-2022-26353 CVE-2022-26354
CVE-2023-3180 CVE-2023-6693 CVE-2024-3446 CVE-2024-4693 CVE-2024-6505 CVE-2024-7730 CVE-2024-8612 CVE-2026-16457
CVE-2026-50626 CVE-2026-50624 CVE-2026-48914 CVE-2026-6425 qemu@6dbdc271 qemu@d6384ad1 qemu@665c8543 qemu@758ef96a
qemu@fbdfdbb9 qemu@b9d248df qemu@bf21298c qemu@27806d2d qemu@733a98a5 qemu@df12999c qemu@67550d65 qemu@52c7bb36
qemu@77248856
CVE-2019-14835 CVE-2019-3900 CVE-2020-10942 CVE-2018-1118 CVE-2023-5158 CVE-2026-23069 CVE-2026-46207
CVE-2018-1059 CVE-2019-14818 CVE-2020-10722 CVE-2020-10723 CVE-2020-10724 CVE-2020-10725 CVE-2020-10726 CVE-2020-14374
CVE-2020-14375 CVE-2020-14376 CVE-2020-14377 CVE-2020-14378 CVE-2022-2132
CVE-2019-18960 CVE-2020-16843 CVE-2020-27174 CVE-2026-5747 firecracker#5353 CVE-2026-45782 cloud-hypervisor@082fdc4d0
cloud-hypervisor@3b431afba cloud-hypervisor@22eeb3f80 cloud-hypervisor@2d2931a76 cloud-hypervisor@778c9f53d
cloud-hypervisor@cfec13077 cloud-hypervisor@fe6bcd037 CVE-2023-41051 CVE-2023-50711 virtio-queue@0.4 virtio-queue#196
virtio-queue@0.7.1 virtio-queue@0.8 vm-memory#97 mvm#1860 openvmm#2983 openvmm#2986 openvmm#3934 openvmm#3990
openvmm#4045 openvmm#4046 openvmm#4047 openvmm#4048 openvmm#4049 openvmm#4145 openvmm#4226 vmd-2021
"""

KNOWN = {name for row in ROWS.values() for name in row.ids}


def test_every_id_of_the_catalogue_is_there() -> None:
    assert {name for name in KNOWN if re.fullmatch(r"[A-Z]\d\d", name)} == IDS
    assert set(VULNERABILITIES.split()) <= KNOWN
    assert KNOWN - IDS - set(VULNERABILITIES.split()) == SYNONYMS | {"X-capabilities"}


INVARIANTS = {f"V{number}" for number in range(1, 14)}
"""What holds for all rows; a test may name them beside its rows."""


SYNONYMS = {
    *("qemu@6682ea33", "qemu@d530f2df", "qemu@0be94d8d"),
    *(name for name in KNOWN if name.startswith(("GHSA-", "RUSTSEC-"))),
}
"""Ids of what has another id already."""


@pytest.fixture(scope="module", name="marked")
def _marked(pytestconfig: pytest.Config) -> dict[str, list[str]]:
    return shown.rows(pytestconfig)


def test_every_row_has_a_test_that_shows_it(marked: dict[str, list[str]]) -> None:
    wanted = {name for row in ROWS.values() if not row.reason for name in row.ids} - SYNONYMS
    assert sorted(wanted - set(marked)) == []


def test_no_test_shows_a_row_that_is_not_there(marked: dict[str, list[str]]) -> None:
    assert sorted(set(marked) - KNOWN - INVARIANTS) == []


def test_no_id_is_there_twice() -> None:
    assert len(ROWS) == sum(map(len, SECTIONS.values()))
    assert len(KNOWN) == sum(len(row.ids) for row in ROWS.values())
    assert not {name.casefold() for name in KNOWN} & {name.casefold() for name in CATALOGUE}


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
def test_a_row_is_whole(row: Row) -> None:
    assert row.stimulus.endswith(".")
    assert len(row.stimulus) <= 120
    assert set(row.rules) <= set(CATALOGUE)
    assert set(row.rows) <= KNOWN - set(row.ids)
    # Whoever tolerates says for whom; strict accepts no more than interop does.
    assert bool(row.peer) == (row.interop != row.strict)
    assert row.interop is Outcome.ACCEPTED or not row.peer
    if row.meets is Meets.NOBODY:
        assert row.reason
        assert row.interop is Outcome.APART
        return
    assert not row.reason
    assert row.clauses
    assert row.rules or row.interop not in (Outcome.BROKEN, Outcome.LATCHED, Outcome.REFUSED)
    for clause in row.clauses:
        if clause[0].isdigit():
            assert clause_text(clause)
        else:
            assert row.meets is Meets.PROTOCOL or "vhost-user" in clause


ENTRIES = [entry for found in CATALOGUE.values() for entry in found if entry.rows]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.family}-{entry.name}")
def test_rules_and_rows_name_each_other(entry: Entry) -> None:
    assert set(entry.rows) <= set(ROWS)
    assert set(entry.rows) <= set(rows_of_rule(entry.name))
    assert all(entry.name in rules_of_row(ROWS[name]) for name in entry.rows)


def test_practice_is_told_of_rows_that_there_are() -> None:
    assert set(PRACTICE) <= set(ROWS)
    assert all(text.endswith(".") and ROWS[name].practice == text for name, text in PRACTICE.items())


def test_what_a_row_tolerates_its_rule_does() -> None:
    """A row of one rule has its outcomes, unless it says why not."""
    for row in ROWS.values():
        if len(row.rules) != 1 or row.behaviour or row.differs or row.rows:
            continue
        family = "vhost-user" if row.meets is Meets.PROTOCOL else "virtio"
        entry = next((each for each in CATALOGUE[row.rules[0]] if each.family == family), CATALOGUE[row.rules[0]][0])
        assert (row.interop, row.strict) == (entry.interop, entry.strict), row.id


# ------------------------------------------------------------------------------------------------ held to the cases

FOUND = {Outcome.BROKEN, Outcome.LATCHED, Outcome.REFUSED}
"""What a queue that finds a rule broken comes to."""


@pytest.mark.parametrize("name", strategies.ROWS)
def test_a_row_says_what_comes_of_its_rings(name: str) -> None:
    row = ROWS[name]
    # What a switch changes is neither of the two policies.
    cases = [case for case in strategies.cases(name) if not case.switches]
    for outcome, told in (
        (row.interop, [case.interop.rule for case in cases if case.interop]),
        (row.strict, [case.strict.rule for case in cases if case.strict]),
    ):
        assert {rule for rule in told if rule} <= set(rules_of_row(row))
        # Where some of it is accepted, another case may show where that ends.
        assert any(told) if outcome in FOUND else not told or None in told


@pytest.mark.parametrize("name", strategies.REGISTER_ROWS)
def test_a_row_says_what_comes_of_its_registers(name: str) -> None:
    row = ROWS[name]
    if row.interop is Outcome.ACCEPTED:
        return  # what is broken on the way there is its story
    for program in strategies.register_cases(name):
        assert set(program.rules) <= set(rules_of_row(row)), str(program)
        assert program.rules or row.interop is Outcome.UNREAD, str(program)


@pytest.mark.parametrize("name", strategies.MESSAGE_ROWS)
def test_a_row_says_what_comes_of_its_messages(name: str) -> None:
    row = ROWS[name]
    judged = row.interop in (Outcome.ENDED, Outcome.JUDGED)
    for program in strategies.message_cases(name):
        assert (program.rule in rules_of_row(row)) if judged else program.rule is None, str(program)


# -------------------------------------------------------------------------------------------------------- explained


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [40, 100])
def test_every_row_is_explained_within_the_width(name: str, width: int) -> None:
    text = checks.explain(name, width=width)
    for told in (ROWS[name].stimulus, ROWS[name].interop, ROWS[name].strict, ROWS[name].reason, ROWS[name].differs):
        assert words(told) in words(text)
    assert max(map(len, text.splitlines())) <= max(width, 2 + max(map(len, rules_of_row(ROWS[name])), default=0))
    assert json.loads(json.dumps(checks.as_dict(name)))[0]["id"] == name


def test_a_row_is_found_by_each_of_its_ids() -> None:
    for row in ROWS.values():
        for name in row.ids:
            assert find_row(name.lower()) is row
    assert checks.explain("ghsa-776c-mpj7-jm3r") == checks.explain("CVE-2026-5747")


def test_a_rule_names_its_rows() -> None:
    assert "CVE-2016-5403" in checks.explain("TooManyInFlight")
    assert {"A06", "P24", "CVE-2016-5403"} <= set(checks.as_dict("TooManyInFlight")[0]["rows"])


def test_a_wrong_id_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"no row is called 'CVE-2016-5404'; the nearest are CVE-2016-5403"):
        checks.explain("CVE-2016-5404")
    with pytest.raises(InvalidArgument, match="--list --rows"):
        checks.explain("~~~~~~~~~~~~~~11")
    # A name with a digit may be a rule's.
    with pytest.raises(
        InvalidArgument, match="no rule is called 'Version1NotOfered'; the nearest names are Version1Not"
    ):
        checks.explain("Version1NotOfered")


def test_the_list_has_every_row_once() -> None:
    lines = checks.list_rows().splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)


def test_the_page_is_that_of_the_data() -> None:
    assert rows.DOCS.read_text(encoding="utf-8") == rows.page(), "run `make rows`"
