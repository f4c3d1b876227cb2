"""What bench_model.py expects to need, and what it does on a GPU that has less."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import bench_model
import llama
import torch
from memory import choose_factors, fitting, needed

ALL = (("bf16", "int8", "fp8"), ("all-linear", "mlp"), bench_model.STAGES, 64, 128)
GB = 10**9


def test_the_weights_and_factors_of_an_8b_model() -> None:
    # 8.03 G parameters; 9.7 G elements of factors: 16.1 + 19.5 GB, and 9.7 for each 8-bit kind.
    alone = needed(llama.EIGHT_B, ("bf16",), ("mlp",), ("admit",), 1, 1)
    assert 1.1 * 35 * GB < alone < 1.2 * 36 * GB
    two = needed(llama.EIGHT_B, ("bf16", "int8"), ("mlp",), ("admit",), 1, 1)
    assert 1.1 * 9.5 * GB < two - alone < 1.2 * 10 * GB
    assert 80 * GB < needed(llama.EIGHT_B, *ALL) < 140 * GB


def test_kinds_are_left_out_until_it_fits() -> None:
    kinds, *rest = ALL
    sizes = [needed(llama.EIGHT_B, kinds[:i], *rest) for i in (1, 2, 3)]
    assert sizes == sorted(sizes)
    for count, size in enumerate(sizes, 1):
        assert fitting(size, llama.EIGHT_B, *ALL) == list(kinds[:count])
    with pytest.raises(ValueError, match=r"takes about \d+ GB with factors in bf16 alone, and 24"):
        fitting(24 * GB, llama.EIGHT_B, *ALL)


def test_the_command_says_so_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = bench_model.build_parser()
    for free, kept in ((200 * GB, 3), (needed(llama.EIGHT_B, ("bf16", "int8"), *ALL[1:]), 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        args = parser.parse_args(["--device", "cuda"])
        left_out = choose_factors(parser, args, llama.EIGHT_B, bench_model.STAGES)
        assert (args.factors, left_out) == (list(ALL[0][:kept]), list(ALL[0][kept:]))
    assert "factors in fp8" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 * GB, 24 * GB))
    with pytest.raises(SystemExit):
        args = parser.parse_args(["--device", "cuda"])
        choose_factors(parser, args, llama.EIGHT_B, bench_model.STAGES)
    assert "24 GB are free. Ask for fewer --requests" in capsys.readouterr().err
