"""From rows to JSON, markdown and pictures, and the same again without running anything."""

import json
import re
from pathlib import Path

import pytest

from t2runtime.claims import report
from t2runtime.claims.__main__ import main
from t2runtime.claims.claim import Claim

ROOT = Path(__file__).parents[3]
EVIDENCE = {
    "answers": [
        {"question": "SVF against LoRA, by reinforcement", "difference": 0.2, "interval": [-1, 1]},
        {"question": "MLP against attention", "difference": -5.0, "interval": [-9, -1]},
        {"question": "All linears against MLP alone", "difference": 8.0, "interval": [4, 12]},
    ],
    "arms": [{"seeds": 5}, {"seeds": 4}],
}


def claims_module(**more):
    class Module:
        CLAIMS = (
            Claim("A beats B", "table 1", "points", "small;", "a", lambda row: row["x"], low=0),
            Claim("B is cheap", "table 2", "ratio", "small;", "a", lambda row: row["y"], high=0.5),
            Claim("C is flat", "text", "points", "small;", "a", lambda row: row["z"], -2, 2),
            Claim("D", "text", "points", "small;", "b", lambda row: row["z"], low=0),
        )

        @staticmethod
        def section(rows):
            return [
                f"## {len(rows.get('a', ()))} rows",
                "",
                "as found " * 20,
                "",
                "|as found " * 20,
            ]

    return Module


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(report, "modules", lambda: [report.training, claims_module()])
    values = ((-3.0, 0.2, 0.1), (-2.0, 0.3, 3.0), (-2.5, 0.123456, 2.0))
    rows = [{"unit": "a", "seed": s, "x": x, "y": y, "z": z} for s, (x, y, z) in enumerate(values)]
    return {
        "environment": {"cpu": "one"}, "seeds": 3, "settings": {"a": {}}, "evidence": {},
        "lacking": {"b": "stories"}, "rows": rows,
    }  # fmt: skip


def outcomes(text):
    """{claim: last column} of the table."""
    return {
        line.split(" | ")[0].removeprefix("| "): line.rstrip(" |").split(" | ")[-1]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| claim")
    }


def test_confirmed_refuted_undecided_and_not_measured(tmp_path, result):
    (tmp_path / "evidence.json").write_text(json.dumps(EVIDENCE))
    result["evidence"] = report.read_evidence(tmp_path / "evidence.json")
    report.write(tmp_path, result)
    text = (tmp_path / "claims.md").read_text()
    found = outcomes(text)
    assert found["A beats B"] == "not confirmed"
    assert found["B is cheap"] == "confirmed"
    assert found["C is flat"] == "undecided"
    assert found["D"] == "not measured"
    assert found["SVF by reinforcement beats LoRA"] == "undecided"
    assert found["SVF of MLPs beats SVF of attention"] == "not confirmed"
    assert found["SVF of both beats SVF of MLPs alone"] == "confirmed"
    assert found["Reinforcement beats next-token training for SVF"] == "not measured"
    assert "Not run: `b`, it needs stories" in text
    assert "## 3 rows" in text
    assert "|as found " * 20 in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert "2 are confirmed, 2 are not confirmed, 2 are undecided, 3 are not measured" in " ".join(
        text.split()
    )
    assert re.search(r"\| ratio \| below 0.5 \| \+0.208 \| -0.\d+ to \+0.\d+ \| 3 \| conf", text)
    assert re.search(
        r"\*A beats B; B is cheap; C is flat\*: small; `make claims UNITS=\"a\"`", text
    )
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert len(kept["rows"]) == 3
    assert kept["rows"][2]["y"] == 0.1235
    assert kept["evidence"]["MLP against attention"]["seeds"] == 4
    verdicts = {claim["claim"]: claim["verdict"] for claim in kept["claims"]}
    assert verdicts == found


def test_without_running_the_same_comes_out_again(tmp_path, result):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    report.write(first, result)
    assert main(["--out", str(again), "--report-only", str(first / "claims.json")]) == 0
    for name in ("claims.json", "claims.md"):
        assert (again / name).read_text() == (first / name).read_text()
    assert not (again / "runs.jsonl").exists()


def test_results_of_several_runs_are_put_together(tmp_path, result):
    other = {**result, "rows": [{"unit": "b", "seed": s, "z": 5.0 + s} for s in range(4)],
             "lacking": {"c": "data"}, "seeds": 4, "settings": {"b": {"n": 1}}}  # fmt: skip
    again = {**result, "rows": [{"unit": "a", "seed": 0, "x": 1.0, "y": 0.0, "z": 0.0}]}
    folders = [tmp_path / name for name in "xyz"]
    for folder, one in zip(folders, (result, other, again), strict=True):
        folder.mkdir()
        report.write(folder, one)
    files = [str(folder / "claims.json") for folder in folders[:2]]
    assert main(["--out", str(tmp_path / "both"), "--report-only", *files]) == 0
    found = outcomes((tmp_path / "both" / "claims.md").read_text())
    assert (found["A beats B"], found["D"]) == ("not confirmed", "confirmed")
    kept = report.read(tmp_path / "both" / "claims.json")
    assert (kept["seeds"], kept["settings"]) == (4, {"a": {}, "b": {"n": 1}})
    assert kept["lacking"] == {"c": "data"}
    last = report.merged([report.read(folder / "claims.json") for folder in folders])
    assert [row["unit"] for row in last["rows"]] == ["a", "b", "b", "b", "b"]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    for option in ("--report-only", "--evidence"):
        for name in ("x.json", "missing.json"):
            with pytest.raises(SystemExit, match=rf"{option} .*got .*{name}"):
                main(["--out", str(tmp_path), option, str(tmp_path / name)])


def test_the_page_is_what_the_committed_results_say(tmp_path):
    results = ROOT / "benchmarks" / "results" / "claims.json"
    assert main(["--out", str(tmp_path), "--report-only", str(results)]) == 0
    assert (tmp_path / "claims.json").read_text() == results.read_text()

    def words(path):  # the pictures are there where matplotlib is installed
        return [line for line in path.read_text().splitlines() if line and line[0] != "!"]

    assert words(tmp_path / "claims.md") == words(ROOT / "docs" / "claims.md")
