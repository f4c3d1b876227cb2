"""The benchmark of the decomposition: it goes on where it stopped, and adds up measured times."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import bench_decompose
import llama
import results

QUICK = ["--quick", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = bench_decompose.torch.get_num_threads()
    yield
    bench_decompose.torch.set_num_threads(before)


def total(path: Path) -> dict[str, object]:
    return results.read(path)["rows"][-1]


def test_a_second_run_does_what_the_first_left(tmp_path: Path, monkeypatch, capsys) -> None:
    state, out = tmp_path / "state.json", tmp_path / "out.json"
    argv = [*QUICK, "--state", str(state), "--json", str(out)]
    assert bench_decompose.main([*argv, "--minutes", "0"]) == 0
    assert total(out) == {
        "shape": "all", "count": 14, "done": 0, "size": "other", "where": "0 of 14 weights",
    }  # fmt: skip
    assert bench_decompose.main(argv) == 0
    assert total(out)["done"] == 14 and "all measured" in capsys.readouterr().out
    whole = total(out)["total_minutes"]
    monkeypatch.setattr(bench_decompose, "one", lambda *rest: pytest.fail("measured twice"))
    assert bench_decompose.main(argv) == 0
    assert total(out)["total_minutes"] == whole


def test_an_unfinished_run_is_extrapolated_and_says_so() -> None:
    named = bench_decompose.weights(llama.QUICK)
    shapes = len({shape for _, shape in named})
    assert len({shape for _, shape in named[:shapes]}) == shapes  # one of each comes first
    state = bench_decompose.State(None, {})
    state.seconds = {name: 60.0 for name, _ in named[:shapes]}
    state.errors = {str(shape): [0.0, 0.0, 0.0] for _, shape in named}
    last = bench_decompose.rows_of(state, named, "other")[-1]
    assert last["extrapolated_minutes"] == len(named) and "total_minutes" not in last


def test_inaccurate_factors_are_refused() -> None:
    named = bench_decompose.weights(llama.QUICK)
    state = bench_decompose.State(None, {})
    state.seconds = {name: 1.0 for name, _ in named}
    state.errors = {str(shape): [6e-6, 0.0, 0.0] for _, shape in named}
    assert "refused" in bench_decompose.rows_of(state, named, "other")[0]


def test_another_machine_may_not_go_on(tmp_path: Path, capsys) -> None:
    state = tmp_path / "state.json"
    state.write_text('{"identity": {"device": "another"}, "seconds": {}, "errors": {}}')
    with pytest.raises(SystemExit):
        bench_decompose.main([*QUICK, "--state", str(state)])
    assert "Name another --state" in capsys.readouterr().err
