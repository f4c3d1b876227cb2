"""The phases of a run on a GPU: what they would call, and what comes out of it."""

from __future__ import annotations

import importlib
import os
import tarfile
from pathlib import Path

import gpu
import gpu_goals
import outputs
import pytest
import sanitize

SCRIPTS = {path.name for path in Path(gpu.__file__).parent.glob("*.py")}


@pytest.mark.parametrize("dry", [True, False], ids=["rehearsal", "gpu"])
@pytest.mark.parametrize("phase", gpu.PHASES)
def test_every_phase_calls_its_scripts_with_options_that_they_know(phase, dry, tmp_path):
    commands = gpu.PHASES[phase](gpu.Run(tmp_path, dry)) if phase != "build" else []
    for command in commands:
        path = Path(command[1])
        if path.name not in SCRIPTS:
            continue
        module = importlib.import_module(path.stem)
        if hasattr(module, "build_parser"):
            args = module.build_parser().parse_args(command[2:])
            assert not hasattr(args, "device") or args.device == ("cpu" if dry else "cuda")
            assert not hasattr(args, "json") or args.json.parent == tmp_path


def test_phases_of_the_goals_exist():
    named = {phase for goal in gpu_goals.GOALS for phase in goal.phase.split(",")}
    assert named <= set(gpu.PHASES)


@pytest.mark.parametrize(("text", "expected"), [("decode, build", ["decode", "build"])])
def test_chosen(text, expected):
    assert gpu.chosen(text) == expected
    assert gpu.chosen("all") == list(gpu.PHASES)
    with pytest.raises(SystemExit, match="--phase must be"):
        gpu.chosen("bulid")


def filled(folder: Path, first: int) -> None:
    for index in range(first, first + outputs.MAX_FILES):
        (folder / f"{index}.log").write_text(str(index))


def packed(folder: Path) -> dict[str, str]:
    with tarfile.open(folder / outputs.ARCHIVE) as archive:
        return {m.name: archive.extractfile(m).read().decode() for m in archive}


def test_more_files_than_may_travel_are_packed(tmp_path):
    filled(tmp_path, 0)
    outputs.pack(tmp_path)
    assert len(list(tmp_path.iterdir())) == outputs.MAX_FILES
    (tmp_path / "summary.json").write_text("{}")
    outputs.pack(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.tar.gz", "summary.json"]
    assert len(packed(tmp_path)) == outputs.MAX_FILES


def test_what_was_packed_stays_and_a_newer_file_replaces_its_namesake(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    filled(tmp_path, 0)
    outputs.pack(tmp_path)
    filled(tmp_path, 4)
    (tmp_path / "4.log").write_text("newer")
    outputs.pack(tmp_path)
    expected = {f"{i}.log": str(i) for i in range(outputs.MAX_FILES + 4)} | {"4.log": "newer"}
    assert packed(tmp_path) == expected


def test_packed_results_are_judged(tmp_path):
    for name, text in (("decode", "old"), ("prefill", "packed")):
        (tmp_path / f"{name}.json").write_text(text)
    filled(tmp_path, 0)
    outputs.pack(tmp_path)
    (tmp_path / "decode.json").write_text("new")
    with outputs.result_files(tmp_path) as paths:
        found = {path.name: path.read_text() for path in paths}
    assert found == {"decode.json": "new", "prefill.json": "packed"}


def test_a_call_ends_with_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    source = Path(gpu.__file__).parent / "results" / "cpu-decode.json"
    (tmp_path / "decode.json").write_bytes(source.read_bytes())
    (tmp_path / "tuning.json").write_text('{"kind": "t2kernels tuning table"}')
    outputs.draw(tmp_path, {**os.environ, "PYTHONSAFEPATH": "1"})
    printed = capsys.readouterr().out
    assert "picture: decode.png" in printed and "picture: tuning.json: plot: " in printed
    assert (tmp_path / "decode.png").stat().st_size > 1000
    assert not (tmp_path / "tuning.png").exists()
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    outputs.draw(tmp_path, {})
    assert capsys.readouterr().out.count("\n") == 1


def test_a_phase_that_fails_says_so(tmp_path, monkeypatch, capsys):
    fails = [["sh", "-c", "echo why; exit 3"], ["sh", "-c", "echo never"]]
    monkeypatch.setitem(gpu.PHASES, "decode", lambda run: fails)
    found = gpu.execute("decode", gpu.Run(tmp_path, True), {})
    assert found["status"] == 3
    assert "FAILED (3)" in capsys.readouterr().out
    assert "never" not in (tmp_path / "decode.log").read_text().replace("echo never", "")


def test_the_sanitizer_says_why_it_does_nothing(capsys):
    assert sanitize.main(["--dry-run"]) == 0
    assert "int8 T=33" in capsys.readouterr().out
    if not sanitize.torch.cuda.is_available():
        assert sanitize.main([]) == 0
        assert "skipped, no CUDA kernels can run here" in capsys.readouterr().out


def test_what_is_measured_after_tuning_uses_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.delenv("T2_TUNING", raising=False)
    assert "T2_TUNING" not in gpu.environment(False, "prefill")
    (tmp_path / "tuning.json").write_text("{}")
    assert gpu.environment(False, "prefill")["T2_TUNING"] == str(tmp_path / "tuning.json")
    for dry, phase in ((True, "prefill"), (False, "test-all"), (False, "test-gpu"), (False, "")):
        assert "T2_TUNING" not in gpu.environment(dry, phase)
    monkeypatch.setenv("T2_TUNING", "mine.json")
    assert gpu.environment(False, "prefill")["T2_TUNING"] == "mine.json"
    assert "T2_TUNING" not in gpu.environment(False, "test-all")
    make, copy = gpu.tune(gpu.Run(tmp_path / "out", False))
    assert make[make.index("--out") + 1] == copy[-2] and copy[-1] == str(
        tmp_path / "out/tuning.json"
    )


def test_tuning_comes_before_what_it_serves():
    order = list(gpu.PHASES)
    assert set(gpu.TUNED) <= set(order)
    assert order[:5] == ["build", "test-gpu", "test-bench", "forms", "tune"]
