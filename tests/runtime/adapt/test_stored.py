"""Files of mixtures and records, damaged in every way: found on load, in one line, or harmless."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.mixtures import TaskMixture, load_mixture, save_mixture
from t2runtime.adapt.record import Record

HASH, MARK = "0f" * 8, "a1" * 8
FLAT = TaskMixture(
    "sums", {"a": 1.0, "b": -0.5}, {"a": HASH, "b": HASH}, "cem", 3, 640,
    {"accuracy": 0.75, "log_likelihood": -1.5}, {"questions": [MARK], "shots": 1},
)  # fmt: skip
DEEP = TaskMixture("deep", {"up": {"a": 1.0}, "down": {}}, {"a": HASH}, facts={"questions": []})
MADE = Record({"a": HASH}, {"sums": {"a": (1, 2), "base": (0, 2)}, "x": {}}, (MARK,))


def write(what: Any, path: Path) -> dict[str, Any]:
    """Save it; the JSON that it became."""
    what.save(path) if isinstance(what, Record) else save_mixture(path, what)
    facts = json.loads(path.read_text())
    assert isinstance(facts, dict)
    return facts


def read(what: Any, path: Path) -> Any:
    return Record.load(path) if isinstance(what, Record) else load_mixture(path)


def refused(what: Any, path: Path, facts: Any) -> str:
    """Why the file is; the checksum is taken away, as after a change by hand."""
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != "digest"}))
    with pytest.raises(t2k.CorruptFileError) as caught:
        read(what, path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and len(said) < 400 + len(str(path))
    return said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": ["a"]}, "experts must be a mapping {expert: hash}, got ['a']"),
        ({"experts": {"a": 1, "b": HASH}}, "the hash of expert 'a' must be a text, got 1"),
        ({"experts": {}}, "experts must name"),
        ({"task": 5}, "task must be a str, got int"),
        ({"task": "../up"}, "task must consist of"),
        ({"weights": [1.0]}, "weights must be a mapping"),
        ({"weights": {"a": "1"}}, "finite number, got '1'"),
        ({"weights": {"a": {"a": 1.0}, "b": 1.0}}, "not both"),
        ({"weights": {"up": {"a": {}}}}, "finite number, got {}"),
        ({"weights": {"a": None}}, "finite number, got None"),
        ({"weights": {"a": float("nan")}}, "it holds NaN or inf"),
        ({"weights": {"a": 1e39}}, "finite number, got 1e+39"),
        ({"facts": {"x": [float("inf")]}}, "it holds NaN or inf"),
        ({"method": None}, "method must be a text, got None"),
        ({"seed": "3"}, "seed must be a whole number, got '3'"),
        ({"budget": "x"}, "budget must be a whole number, got 'x'"),
        ({"budget": True}, "budget must be a whole number, got True"),
        ({"budget": -1}, "budget must be at least 0, got -1"),
        ({"score": [1]}, "score must be a mapping {name: number}"),
        ({"score": {"accuracy": "1"}}, "score['accuracy'] must be a finite number, got '1'"),
        ({"facts": []}, "facts must be a mapping"),
        ({"facts": {"questions": "abc"}}, "questions must be a list of texts, got 'abc'"),
        ({"facts": {"questions": [1]}}, "questions must be a list of texts, got [1]"),
        ({"facts": {"questions": [[MARK]]}}, "questions must be a list of texts"),
        ({"surplus": 1}, "has an unknown 'surplus'. Its fields are task, weights, experts, "),
        ({"kind": "store"}, "must be of kind 'mixture'"),
    ],
)
def test_a_mixture_with_a_wrong_value(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "m.json"
    assert words in refused(FLAT, path, write(FLAT, path) | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": ["a"]}, "experts must be a mapping {expert: hash}"),
        ({"experts": {"a": None}}, "the hash of expert 'a' must be a text"),
        ({"experts": {"base": HASH}}, "taken for the base"),
        ({"counts": [1]}, "counts must be a mapping"),
        ({"counts": {"x": [1]}}, "counts['x'] must be a mapping"),
        ({"counts": {"x": {"a": 5}}}, "counts['x']['a'] must be (right, tried), got 5"),
        ({"counts": {"x": {"a": [1, 2, 3]}}}, "must be (right, tried), got [1, 2, 3]"),
        ({"counts": {"x": {"a": [1.7, 2]}}}, "must be a whole number, got 1.7"),
        ({"counts": {"x": {"a": ["1", "2"]}}}, "must be a whole number, got '1'"),
        ({"counts": {"x": {"a": [False, True]}}}, "must be a whole number, got False"),
        ({"counts": {"x": {"a": [3, 2]}}}, "right must be in 0..tried"),
        ({"counts": {"x": {"c": [1, 2]}}}, "expert must be one of base, a, got 'c'"),
        ({"questions": "abc"}, "questions must be a list of texts"),
        ({"surplus": 1}, "has an unknown 'surplus'"),
    ],
)
def test_a_record_with_a_wrong_value(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "r.json"
    assert words in refused(MADE, path, write(MADE, path) | change)


@pytest.mark.parametrize(
    ("what", "field"),
    [(FLAT, "task"), (FLAT, "weights"), (FLAT, "experts"), (MADE, "experts"), (MADE, "counts")],
)
def test_a_field_that_is_missing(tmp_path: Path, what: Any, field: str) -> None:
    facts = write(what, tmp_path / "x.json")
    del facts[field]
    assert f"lacks {field}" in refused(what, tmp_path / "x.json", facts)


def test_numbers_too_long_to_be_read_and_lists_too_deep(tmp_path: Path) -> None:
    for what in (FLAT, MADE):
        for value in ("1" * 5000, "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900):
            path = tmp_path / "x.json"
            text = json.dumps(write(what, path) | {"experts": "HERE"}).replace('"HERE"', value)
            path.write_text(text)
            with pytest.raises(t2k.CorruptFileError):
                read(what, path)


def places(value: Any, into: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield (*into, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*into, key))


VALUES: list[Callable[[random.Random], Any]] = [
    lambda _: None, lambda _: True, lambda r: r.randint(-3, 9), lambda _: 10**400,
    lambda r: r.random(), lambda _: float("nan"), lambda _: float("-inf"), lambda _: 1e39,
    lambda _: "", lambda _: "a", lambda _: "\ud800\n", lambda _: [], lambda _: ["a"],
    lambda _: [1, 2], lambda _: {}, lambda _: {"a": 1.0}, lambda _: {"up": {"a": 1.0}},
    lambda _: {"a": [1, 2]}, lambda _: [["a", 1.0]], lambda _: {"": {"": []}},
]  # fmt: skip


@pytest.mark.parametrize("what", [FLAT, DEEP, MADE], ids=["flat", "deep", "record"])
def test_values_replaced_at_random_are_refused_or_good(what: Any, tmp_path: Path) -> None:
    """What loads is whole: it can be used, saved, and read back equal."""
    path, rng, loaded = tmp_path / "x.json", random.Random(0), 0
    facts = write(what, path)
    del facts["digest"]
    paths = list(places(facts))
    for _ in range(1500):
        changed = copy.deepcopy(facts)
        *way, last = rng.choice(paths)
        inside = changed
        for key in way:
            inside = inside[key]
        if rng.random() < 0.8:
            inside[last] = rng.choice(VALUES)(rng)
        else:
            del inside[last]
        path.write_text(json.dumps(changed))
        try:
            again = read(what, path)
        except t2k.CorruptFileError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        if loaded % 10 == 0:  # the disk takes its time
            write(again, path)
            assert read(what, path) == again
        if isinstance(again, Record):
            assert {again.choose(category) for category in again.counts} <= {*again.experts, None}
        elif not again.budget or again.facts.get("questions") is not None:
            assert all(isinstance(mark, str) for mark in again.questions())
    assert 50 < loaded < 1000


@pytest.mark.parametrize("what", [FLAT, MADE], ids=["mixture", "record"])
def test_every_bit_of_a_file_is_watched(
    what: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped one is found, unless the content stays what it was (a space, say)."""
    path = tmp_path / "x.json"
    write(what, path)
    assert read(what, path) == what and not caplog.records
    raw, harmless = path.read_bytes(), 0
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            again = read(what, path)
        except t2k.CorruptFileError:
            continue
        assert again == what
        harmless += 1
    assert harmless < len(raw) / 8


@pytest.mark.parametrize("what", [FLAT, MADE], ids=["mixture", "record"])
def test_a_change_by_hand(what: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is refused until its checksum is taken away; then the file is read, with a warning."""
    path = tmp_path / "x.json"
    facts = write(what, path)
    facts["experts"]["later"] = HASH
    path.write_text(json.dumps(facts, indent=4))
    with pytest.raises(t2k.CorruptFileError, match="by hand, remove its field 'digest'"):
        read(what, path)
    del facts["digest"]
    path.write_text(json.dumps(facts))
    with caplog.at_level(logging.WARNING):
        again = read(what, path)
    assert again.experts["later"] == HASH
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        f"{path} has no checksum (field 'digest')"
    ]
    write(again, path)
    caplog.clear()
    assert read(what, path) == again and not caplog.records


def test_a_mixture_written_by_hand_needs_no_more_than_weights_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = {"task": "own", "weights": {"a": 1}, "experts": {"a": HASH}}
    path.write_text(json.dumps({"kind": "mixture", "version": 1, **own}))
    assert load_mixture(path) == TaskMixture("own", {"a": 1}, {"a": HASH})
