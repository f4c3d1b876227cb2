"""The benchmark of a bank of many experts, at a size whose times mean nothing."""

from __future__ import annotations

import bench_bank
import pytest

from t2kernels.mixer import Mixer

TINY = ["--experts", "40", "--layers", "3", "--width", "16", "--rounds", "4"]


@pytest.mark.parametrize("more", [[], ["--dtype", "fp32"], ["--host", "--cache", "8"]], ids=str)
def test_what_it_reports(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_bank.main([*TINY, *more]) == 0
    text = capsys.readouterr().out
    assert text.count("admit one expert") == text.count("admit three") == 2
    assert "40 experts of R = 48" in text
    assert ("prefetch of 8" in text) == ("--host" in more)


def test_a_wrong_admission_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mixer.write

    def wrong(self: Mixer, out: object, *args: object, **more: object) -> None:
        right(self, out, *args, **more)  # type: ignore[arg-type]
        out.mul_(1.01)  # type: ignore[attr-defined]

    monkeypatch.setattr(Mixer, "write", wrong)
    with pytest.raises(SystemExit, match="an admission is wrong"):
        bench_bank.main(TINY)
