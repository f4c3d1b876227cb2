import runpy
import sys
from pathlib import Path

import pytest

from t2runtime.loading import SMALL_MODEL

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


@pytest.mark.skipif(
    not (SMALL_MODEL / "model.safetensors").exists(),
    reason="the small model is not in this checkout",
)
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "2"])
    runpy.run_path(str(path), run_name="__main__")
    assert "37+48=" in capsys.readouterr().out
