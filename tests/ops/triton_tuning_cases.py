"""Tables of tiles and the command that makes them, rehearsed in the interpreter with a timer that
says what it is told; collected by ``test_triton_interpret.py`` only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from t2kernels import CorruptFileError, testing, tune
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.ops.triton import _forward
from t2kernels.ops.triton.common import config, tables
from t2kernels.ops.triton.common.tables import Tile
from t2kernels.testing import make_inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpret.py"

CPU, FP16 = torch.device("cpu"), torch.float16
CASE = tune.Case("project", "fp16", 24, 40, 20)
TILES = tune.candidates(CASE, shared=232448, descriptors=True)
ODD = Tile(16, 32, 16, 4, 2, chunk=32)


def fastest(number: int) -> tune.Timer:
    """The rules are asked first, then the candidates in their order."""
    asked = iter(range(-1, 1000))
    return lambda calls: 1.0 if next(asked) == number else 2.0


def choose(tokens: int = 20, outputs: int = 24, kernel: str = "project", **options: bool) -> Tile:
    x = torch.empty(1, 1, dtype=FP16)
    return config.choose(kernel, tokens, outputs, 40, x, x, **options)


def run(out: Path, timer: tune.Timer, *cases: tune.Case, minutes: float = 9) -> list[str]:
    return list(tune.tune(cases or (CASE,), out, CPU, timer, minutes))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole table, in force."""
    path = tmp_path / "table.json"
    x = torch.empty(1, 1, dtype=FP16)
    name = tables.key("project", 20, 24, 40, x, x)
    tables.write(path, tables.INTERPRETER, {name: ODD})
    monkeypatch.setenv("T2_TUNING", str(path))
    return path


class TestTuning:
    @pytest.mark.parametrize("number", [0, len(TILES) - 1])
    def test_the_fastest_tile_is_used(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rules, out = choose(), tmp_path / "t.json"
        (line,) = run(out, fastest(number))
        assert "project float16 float16 32x64 T32" in line and str(TILES[number]) in line
        assert choose() == rules, "a table that nobody asked for"
        monkeypatch.setenv("T2_TUNING", str(out))
        assert choose() == choose(tokens=32) == choose(outputs=17) == TILES[number]
        for other in ({"tokens": 33}, {"outputs": 33}, {"kernel": "expand"}):
            with monkeypatch.context() as without:
                without.delenv("T2_TUNING")
                expected = choose(**other)
            assert choose(**other) == expected
        assert choose(batch_invariant=True) == config.INVARIANT

    def test_products_by_a_table(self, table: Path) -> None:
        i = make_inputs(20, 40, 30, 24, slots=3, dtype=FP16)
        assert choose() == ODD
        y, _ = backend.forward(*i.args())
        truth, _ = reference.forward(*i.double().args())
        testing.assert_accurate(y, truth, testing.plain_forward(i))

    def test_a_wrong_candidate_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first leaves its output as it was, the second does not even run."""
        project, calls = _forward.project, iter(range(1000))

        def faulty(*args, **kwargs):  # type: ignore[no-untyped-def]
            number = next(calls)
            if number == 3:
                raise RuntimeError("out of shared memory")
            if number != 2:
                project(*args, **kwargs)

        # The rules' tile is checked and timed (calls 0 and 1), then each candidate.
        monkeypatch.setattr(_forward, "project", faulty)
        asked = fastest(0)

        def timer(calls: list[tune.Call]) -> float:
            calls[0]()
            return asked(calls)

        monkeypatch.setattr(tune, "candidates", lambda *args: TILES[:3])
        lines = run(tmp_path / "t.json", timer)
        assert lines[1:] == [
            f"  refused: wrong result with {TILES[0]}",
            f"  refused: RuntimeError with {TILES[1]}",
        ]
        assert str(TILES[2]) in lines[0]

        calls = iter((2,))
        monkeypatch.setattr(tune, "candidates", lambda *args: TILES[:1])
        with pytest.raises(RuntimeError, match="wrong with the tile of the rules"):
            run(tmp_path / "u.json", timer)
        calls = iter((0, 1, 3))
        assert run(tmp_path / "v.json", timer) == [
            "project float16 float16 32x64 T32: no candidate was right; the rules decide",
            f"  refused: RuntimeError with {TILES[0]}",
        ]
        assert not (tmp_path / "v.json").exists()

    def test_it_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        out, other = tmp_path / "t.json", CASE._replace(tokens=17, kernel="expand")
        assert "stopped after 0 minutes, 1 cases to go" in run(out, fastest(0), minutes=0)[0]
        run(out, fastest(0))
        before = json.loads(out.read_text())["tiles"]
        assert len(run(out, fastest(1), CASE, other)) == 1
        after = json.loads(out.read_text())["tiles"]
        assert after.items() > before.items() and len(after) == 2

    def test_every_kernel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune, "RANK", 8)
        monkeypatch.setattr(tune, "candidates", lambda *args: [ODD])
        wanted = tune.cases(["24x40"], ["fp16", "int8", "fp8", "fp32"], [17])
        lines = run(tmp_path / "t.json", lambda calls: 1.0, *wanted)
        assert len(lines) == len(wanted) == 20 and not any("refused" in line for line in lines)

    @pytest.mark.parametrize("size", [4 << 20, 32 << 20, 1 << 30])
    def test_weights_are_cold(self, size: int) -> None:
        assert tune.copies(size) * size >= tune.COLD_BYTES

    def test_cases(self) -> None:
        found = tune.cases(["96x64", "64x96"], ["bf16"], [8192, 1])
        sizes = {(c.kernel, c.outputs, c.inner) for c in found if c.tokens == 8192}
        assert sizes == {
            ("project", 64, 64), ("project", 64, 96), ("expand", 96, 64), ("expand", 64, 64),
            ("delta", 96, 64), ("delta", 64, 96), ("gradient", 64, 96), ("gradient", 64, 64),
            ("expand_t", 64, 64), ("expand_t", 96, 64),
        }  # fmt: skip
        assert {c.kernel for c in found if c.tokens == 1} == {"project", "expand", "delta"}
        assert [c.tokens for c in found] == sorted(c.tokens for c in found)

    def test_candidates_suit_the_gpu(self) -> None:
        for dtype in tune.DTYPES:
            for tokens in tune.TOKENS:
                case = tune.Case("project", dtype, 4096, 4096, tokens)
                small = tune.candidates(case, shared=101376, descriptors=False)
                large = tune.candidates(case, shared=232448, descriptors=True)
                assert 0 < len(small) <= len(large) < 24
                assert all(config.tile_bytes(t) <= 101376 and not t.descriptors for t in small)
                assert (config.LARGE_SM90 in large) == (tokens >= 128 and dtype in ("bf16", "fp16"))

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--out", str(tmp_path / "t.json"), "--shapes", "16x16", "--tokens", "1"]
        assert tune.main([*arguments, "--dtypes", "fp16", "--rehearse"]) == 0
        assert capsys.readouterr().out.count(" us, by the rules ") == 3
        if not torch.cuda.is_available():
            assert tune.main(arguments) == 2
            assert "no CUDA GPU" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shapes", "64"], "argument --shapes: expected OUTxIN, like 4096x14336, got '64'"),
            (["--shapes", "64x0"], "argument --shapes: expected OUTxIN"),
            (["--shapes", "64x64", "ax3"], "argument --shapes: expected OUTxIN"),
            (["--shapes", "2x3x4"], "argument --shapes: expected OUTxIN"),
            (["--tokens", "-3"], "argument --tokens: expected a whole number from 1 on, got '-3'"),
            (["--tokens", "0"], "argument --tokens: expected a whole number from 1 on, got '0'"),
            (["--tokens", "1.5"], "argument --tokens: expected a whole number"),
            (["--seconds", "0"], "argument --seconds: expected a number above 0, got '0'"),
            (["--minutes", "nan"], "argument --minutes: expected a number above 0, got 'nan'"),
            (["--out", "missing/t.json"], "--out: the folder missing does not exist; make it"),
            (["--out", "."], "--out: . is a folder; name the table in it"),
        ],
    )
    def test_arguments_are_refused_before_anything_is_timed(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        out = [] if "--out" in arguments else ["--out", "t.json"]
        with pytest.raises(SystemExit) as caught:
            tune.main([*out, *arguments, "--rehearse"])
        assert caught.value.code == 2 and message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestTuningFiles:
    def refused(self, path: Path) -> str:
        with pytest.raises((CorruptFileError, ValueError, FileNotFoundError)) as caught:
            backend.forward(*make_inputs(20, 40, 30, 24).args())
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_missing(self, table: Path) -> None:
        table.unlink()
        self.refused(table)

    @pytest.mark.parametrize("text", ["", "[]", '{"kind": "other"}', "{"])
    def test_damaged(self, text: str, table: Path) -> None:
        table.write_text(text)
        self.refused(table)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("gpu", "NVIDIA H200", "made for gpu 'NVIDIA H200'"),
            ("triton", [3, 1], "made for triton"),
            ("version", 2, "version"),
            ("tiles", [], "must be an object"),
            ("gpu", None, "has no 'gpu'"),
        ],
    )
    def test_foreign(self, name: str, value: object, message: str, table: Path) -> None:
        content = json.loads(table.read_text())
        content[name] = value
        if value is None:
            del content[name]
        table.write_text(json.dumps(content))
        assert message in self.refused(table)

    @pytest.mark.parametrize(
        "change",
        [
            {"tokens": 24}, {"outputs": 8}, {"inner": "16"}, {"warps": 0}, {"stages": 9},
            {"chunk": True}, {"descriptors": 1}, {"weights_first": True, "persistent": True},
            {"more": 1},
        ],
        ids=str,
    )  # fmt: skip
    def test_impossible_tiles(self, change: dict[str, object], table: Path) -> None:
        content = json.loads(table.read_text())
        for entry in content["tiles"].values():
            entry.update(change)
        table.write_text(json.dumps(content))
        assert "project float16 float16 32x64 T32" in self.refused(table)

    def test_unknown_products(self, table: Path) -> None:
        content = json.loads(table.read_text())
        content["tiles"] = {"conquer float16": ODD._asdict()}
        table.write_text(json.dumps(content))
        assert "names no product" in self.refused(table)

    def test_a_table_of_the_package(
        self, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("T2_TUNING")
        monkeypatch.setattr(tables, "SHIPPED", tmp_path)
        tables._in_force.cache_clear()
        try:
            assert choose() != ODD
            table.rename(tmp_path / tables.file_name(tables.INTERPRETER))
            tables._in_force.cache_clear()
            assert choose() == ODD
        finally:
            tables._in_force.cache_clear()
