"""A table of tiles made on a real GPU, and used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2kernels import testing, tune
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.testing import make_inputs

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_table_is_made_and_used(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2kernels.ops.triton.common import config, tables

    out, device = tmp_path / "table.json", torch.device("cuda", 0)
    wanted = tune.cases(["512x768"], [dtype], [17, 300])
    lines = list(tune.tune(wanted, out, device, tune.graph_timer(0.01), 5))
    assert not any("wrong result" in line or "no candidate" in line for line in lines), lines
    monkeypatch.setenv("T2_TUNING", str(out))
    table = tables.in_force(device)
    assert table is not None and len(table.tiles) == len(wanted)
    for tokens in (17, 300):
        factors = None if dtype == "bf16" else dtype
        i = make_inputs(
            tokens, 768, 512, 512, slots=3, dtype=torch.bfloat16, device="cuda", factors=factors
        )
        U, V = backend._patterns(i.U), backend._patterns(i.V)
        tile = config.choose("project", tokens, 512, 768, i.x, V)
        assert tile in table.tiles.values()
        assert config.choose("expand", tokens, 512, 512, i.x, U) in table.tiles.values()
        with testing.poisoned_empty():
            y, _ = backend.forward(*i.args())
        truth, _ = reference.forward(*i.double().args())
        testing.assert_accurate(y, truth, testing.plain_forward(i))


def test_the_interpreters_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2kernels.ops.triton.common import tables

    out = tmp_path / "table.json"
    tables.write(out, tables.INTERPRETER, {})
    monkeypatch.setenv("T2_TUNING", str(out))
    with pytest.raises(ValueError, match="made for gpu 'interpreter'"):
        backend.forward(*make_inputs(3, 8, 8, 8, dtype=torch.bfloat16, device="cuda").args())
