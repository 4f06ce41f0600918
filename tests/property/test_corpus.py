"""The frozen cases: each is replayed here by our core, and by the Rust fuzzers, which begin with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.errors import InvalidArgument
from virtio_test.strategies import RingCase, cases, load, save
from virtio_test.strategies.acts import ACTS
from virtio_test.strategies.case import Name

FOLDER = Path(__file__).parents[1] / "corpus"
CORPUS = dict(load(FOLDER))


@pytest.mark.parametrize("name", CORPUS)
def test_a_frozen_case_still_ends_as_it_must(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By our way to play it, and by its script, which knows nothing of that way."""
    case = CORPUS[name]
    case.check()
    policies: tuple[Name, ...] = ("interop", "strict")
    for policy in policies:
        with pytest.raises(SystemExit) as caught:
            exec(case.script(policy), {"__name__": "__main__"})
        assert caught.value.code == 0, capsys.readouterr().out


def test_the_corpus_is_there_and_its_names_are_those_of_its_cases(tmp_path: Path) -> None:
    assert len(CORPUS) > 80
    for name, case in CORPUS.items():
        assert save(case, tmp_path).stem == name
        assert (tmp_path / f"{name}.json").read_bytes() == (FOLDER / f"{name}.json").read_bytes()


def test_every_case_comes_back_from_its_json_and_from_its_repr() -> None:
    import virtio_test.strategies as strategies

    for case in cases():
        assert RingCase.from_json(case.to_json()) == case
        assert eval(repr(case), dict(vars(strategies))) == case


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"virtio-test": "ring-case", "version": 2}',
        '{"virtio-test": "something", "version": 1}',
        '{"virtio-test": "ring-case", "version": 1, "odd": 1}',
        '{"virtio-test": "ring-case", "version": 1, "later": [["odd"]]}',
        '{"virtio-test": "ring-case", "version": 1, "later": [["put"]]}',
        '{"virtio-test": "ring-case", "version": 1, "later": [["put", 1, 2]]}',
        '{"virtio-test": "ring-case", "version": 1, "size": "8"}',
        '{"virtio-test": "ring-case", "version": 1, "writes": [["write", 1, "x"]]}',
        '{"virtio-test": "ring-case", "version": 1, "state": [1]}',
        '{"virtio-test": "ring-case", "version": 1, "regions": [[1, 2]]}',
        '{"virtio-test": "ring-case", "version": 1, "interop": {"rule": "x"}}',
    ],
)
def test_what_is_no_case_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RingCase.from_json(text)
    assert "\n" not in str(caught.value)
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"odd\.json"):
        list(load(tmp_path))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(sorted(ACTS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([each.name for each in fields(RingCase)])


@given(st.sampled_from(sorted(CORPUS)), st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_a_case_with_any_values_is_refused_or_is_one(name: str, values: dict[str, Any]) -> None:
    found = json.loads(CORPUS[name].to_json()) | values
    try:
        case = RingCase.from_json(json.dumps(found))
    except InvalidArgument:
        return
    assert RingCase.from_json(case.to_json()) == case


@given(st.sampled_from(sorted(CORPUS)), st.data())
def test_a_case_that_was_cut_or_bent_is_refused_or_is_one(name: str, data: st.DataObject) -> None:
    text = CORPUS[name].to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    bent = (
        text[:at]
        + data.draw(st.sampled_from(["", "0", "[", "null", "-", text[at:]]))
        + text[at + data.draw(st.integers(0, 9)) :]
    )
    try:
        case = RingCase.from_json(bent)
    except InvalidArgument:
        return
    assert RingCase.from_json(case.to_json()) == case


@pytest.mark.parametrize("row", ["A09", "B15", "G08"])
def test_the_script_of_a_case_replays_it(row: str, tmp_path: Path) -> None:
    """And says so by its exit code: with another outcome written into the case it is 1."""
    case = next(cases(row))
    for each, code in ((case, 0), (case.but(strict=case.strict and case.strict._replace(chains=77)), 1)):
        path = tmp_path / "replay.py"
        path.write_text(each.script("strict"))
        run = subprocess.run(
            [sys.executable, "-W", "ignore", path], capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == code, run.stdout + run.stderr
        assert run.stderr == ""
