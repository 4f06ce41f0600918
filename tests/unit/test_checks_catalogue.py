"""The catalogue of rules: nothing that can be raised is missing from it, and its rings show what they say."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
from virtio_test._core import Policy, rules
from virtio_test.checks import CATALOGUE, EXAMPLES, Entry, Example, Outcome
from virtio_test.checks.entry import clause_text
from virtio_test.checks.suppression import SUPPRESSION_ENTRIES
from virtio_test.driver.pci import capabilities
from virtio_test.status import BIT_RULES

from tests.unit.rule_names import Named, rule_names

PACKAGE = Path(__file__).parents[2] / "python" / "virtio_test"
FAMILIES = {
    "carrier/vfio_user/": {"vfio-user"},
    "transport/vhost_user/": {"vhost-user", "virtio"},
    "carrier/uml.py": {"uml-pci"},
    "sockets/": {"vhost-user", "vfio-user"},
}
"""Whose rules a module can find broken; all others find those of the specification."""

ENTRIES = [entry for found in CATALOGUE.values() for entry in found]


@pytest.fixture(scope="module", name="raised")
def _raised() -> Named:
    found = rule_names(PACKAGE)
    # The places that make a name at run time make it of a table, or have it of an error of the core.
    assert found.made == {
        "status.py:StatusViolation",
        "driver/pci/capabilities.py:StatusViolation",
        "checks/suppression.py:_violation",
        "checks/used.py:QueueViolation",
        "devices/net.py:RequestViolation",
    }
    for entry in SUPPRESSION_ENTRIES:
        found.names.setdefault(entry.name, set()).add("checks/suppression.py")
    for rule in BIT_RULES:
        if rule.broken:
            found.names.setdefault(rule.broken, set()).add("status.py")
            found.clauses.setdefault(rule.broken, set()).add(rule.clause)
    names = typing.cast("dict[object, str]", vars(capabilities)["_NAMES"])
    for name in names.values():
        found.names.setdefault(f"Missing{name}", set()).add("driver/pci/capabilities.py")
    return found


def families_of(module: str) -> set[str]:
    return next((found for start, found in FAMILIES.items() if module.startswith(start)), {"virtio"})


def test_every_rule_that_can_be_raised_is_in_the_catalogue(raised: Named) -> None:
    missing = [
        f"{name}, raised in {module}"
        for name, modules in raised.names.items()
        for module in modules
        if not families_of(module) & {entry.family for entry in CATALOGUE.get(name, ())}
    ]
    assert missing == []
    assert [rule.name for rule in rules() if rule.name not in CATALOGUE] == []


def test_nothing_is_in_the_catalogue_that_cannot_be_raised(raised: Named) -> None:
    core = {rule.name for rule in rules()}
    spare = [
        entry.name
        for entry in ENTRIES
        if entry.name not in core
        and not any(entry.family in families_of(module) for module in raised.names.get(entry.name, ()))
    ]
    assert spare == []


def test_every_clause_that_is_cited_is_in_the_entry(raised: Named) -> None:
    for name, clauses in raised.clauses.items():
        told = {clause for entry in CATALOGUE[name] for clause in entry.clauses}
        assert clauses <= told, name
    for rule in rules():
        assert CATALOGUE[rule.name][0].clauses == tuple(rule.clause.split(", "))
        assert CATALOGUE[rule.name][0].summary == rule.summary


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.family}-{entry.name}")
def test_an_entry_is_whole(entry: Entry) -> None:
    assert entry.summary.endswith(".")
    assert len(entry.summary) <= 120
    assert entry.clauses
    for row in entry.rows:
        assert re.fullmatch(r"[ABCDGIMNPQRTUX]\d\d", row), row
    if entry.family == "virtio":
        assert all(clause_text(clause) for clause in entry.clauses)
    # Whoever tolerates says for whom; and strict accepts nothing.
    assert bool(entry.peer) == (entry.interop != entry.strict)
    assert entry.strict is not Outcome.ACCEPTED


def test_names_are_one_familys_once() -> None:
    for found in CATALOGUE.values():
        assert len({entry.family for entry in found}) == len(found)


# --------------------------------------------------------------------------------------------------- the minimal rings


def test_every_rule_of_rings_has_a_ring_in_each_of_its_formats() -> None:
    # What no ring shows: the file under it is cut short while it runs.
    shown = [rule for rule in rules() if rule.name != "MemoryLost"]
    assert list(EXAMPLES) == [rule.name for rule in shown]
    for rule in shown:
        clauses = rule.clause.split(", ")
        split = clauses[0].startswith("2.7")
        packed = clauses[-1].startswith("2.8") or rule.name == "ChainTooBig"
        wanted = [False] * split + [True] * packed
        assert [example.packed for example in EXAMPLES[rule.name]] == wanted, rule.name


@pytest.mark.parametrize(
    "example",
    [each for found in EXAMPLES.values() for each in found],
    ids=lambda each: f"{each.rule}-{'packed' if each.packed else 'split'}",
)
def test_a_minimal_ring_breaks_its_rule_and_no_other(example: Example) -> None:
    strict, interop = example.run(Policy.strict), example.run(Policy.interop)
    assert strict is not None
    assert strict.rule == example.rule
    assert (interop is None) == example.tolerated
    assert interop is None or interop.rule == example.rule
    text = list(example.lines())
    assert text[0].startswith("A packed" if example.packed else "A split")
    assert len(text) > 1 or "size" in example.config


def test_the_outcomes_of_the_catalogue_are_those_of_the_rings() -> None:
    for name, found in EXAMPLES.items():
        entry = CATALOGUE[name][0]
        assert (entry.interop is Outcome.ACCEPTED) == any(example.tolerated for example in found), name
        ends = {example.end for example in found}
        assert (entry.strict is Outcome.LATCHED) == (ends == {"driver"})


def test_a_ring_without_its_defect_is_accepted() -> None:
    """Else any ring would do."""
    for packed in (False, True):
        example = EXAMPLES["ZeroLength"][packed]
        whole = tuple((name, index, 16 if name == "desc.len" else value) for name, index, value in example.writes)
        assert Example(rule="", packed=packed, writes=whole).run(Policy.strict) is None
