"""``virtio-test explain``."""

from __future__ import annotations

import json

import pytest
from virtio_test.checks import CATALOGUE, ROWS

from tests.cli.conftest import Run


def test_a_rule_is_explained(run: Run) -> None:
    result = run("explain", "HeadOutOfRange")
    assert (result.status, result.err) == (0, "")
    assert "HeadOutOfRange (VIRTIO 1.4: 2.7.6)" in result.out
    assert "avail.ring[0]: 4" in result.out
    assert "\x1b" not in result.out


def test_as_json(run: Run) -> None:
    result = run("explain", "nestedindirect", "--json")
    assert result.status == 0
    (rule,) = json.loads(result.out)["rules"]
    assert rule["clauses"] == ["2.7.5.3.1", "2.8.19"]
    assert rule["interop"] == "accepted"
    assert [example["packed"] for example in rule["examples"]] == [False, True]


def test_all_of_them(run: Run) -> None:
    lines = run("explain", "--list").out.splitlines()
    assert len(lines) == sum(map(len, CATALOGUE.values()))
    assert len(json.loads(run("explain", "--list", "--json").out)["rules"]) == len(lines)


def test_a_row_is_explained(run: Run) -> None:
    result = run("explain", "a05")
    assert (result.status, result.err) == (0, "")
    assert "One head is made available twice" in result.out
    (row,) = json.loads(run("explain", "CVE-2016-5403", "--json").out)["rows"]
    assert row["rules"] == ["TooManyInFlight"]
    assert set(row["demands"]) == set(row["clauses"])


def test_all_rows(run: Run) -> None:
    assert len(run("explain", "--list", "--rows").out.splitlines()) == len(ROWS)
    assert [row["id"] for row in json.loads(run("explain", "--list", "--rows", "--json").out)["rows"]] == list(ROWS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "NextOutRange"], "the nearest names are NextOutOfRange"),
        (["explain", "NextOutRange", "--json"], "the nearest names are NextOutOfRange"),
        (["explain"], "give the name of one rule, or --list"),
        (["explain", "ZeroLength", "--list"], "one of the two"),
        (["explain", "A05", "--rows"], "--rows goes with --list"),
        (["explain", "A99"], "no row is called 'A99'; the nearest are A09"),
    ],
)
def test_bad_usage_is_one_line(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert words in result.err
