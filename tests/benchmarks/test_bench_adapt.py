"""The benchmark of a search's generation at a size whose times mean nothing: gate, rows, goals."""

from __future__ import annotations

from pathlib import Path

import bench_adapt
import pytest
import results
import torch
from harness import Refused

TINY = ["--members", "3", "--shots", "2", "--layers", "1", "--hidden", "32", "--rows", "2",
        "--new-tokens", "2", "--rounds", "2"]  # fmt: skip


def test_rows_goals_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_adapt.main([*TINY, "--json", str(tmp_path / "out.json")]) == 0
    found = results.read(tmp_path / "out.json")
    names = [(row["model"], row["name"]) for row in found["rows"]]
    forms = ["one batch", "2 rows a batch", "merge", "public scheme"]
    assert names == [(model, form) for model in ("small", "random") for form in forms]
    assert found["rows"][0]["speedup_of_ours"] == found["rows"][4]["speedup_of_ours"] == 1
    assert all(row["seconds"] > row["floor"] > 0 for row in found["rows"])
    assert len(found["goals"]) == 4 and "small: one batch against merge" in capsys.readouterr().out


def test_forms_agree_and_leave_nothing_behind() -> None:
    generation = bench_adapt.Generation(bench_adapt.build_parser().parse_args(TINY), "random")
    first = generation.one_batch()
    for form in (generation.merged, generation.reloaded, generation.one_batch):
        bench_adapt.gate("form", form(), first)
    assert len(first[0]) == 6


def test_another_answer_is_refused() -> None:
    want = (["7", "8"], torch.zeros(2))
    with pytest.raises(Refused, match="ours: 1 of 2 answers differ"):
        bench_adapt.gate("ours", (["7", "9"], torch.zeros(2)), want)
    with pytest.raises(Refused, match="a likelihood differs by 5.00e-01 nats"):
        bench_adapt.gate("ours", (["7", "8"], torch.full((2,), 0.5)), want)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--members", "0"], "at least 1"),
        (["--layers", "1", "--hidden", "33"], "multiple of 32"),
        (["--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_adapt.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err
