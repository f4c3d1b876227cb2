"""Layers that share x by the Triton kernels, interpreted; collected by
``test_triton_interpret.py`` only."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.ops.triton.common import config
from t2kernels.ops.triton.common.config import Tile
from t2kernels.testing import Group, assert_accurate, make_group, plain_forward, poisoned_empty

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpret.py"

TILES = {"shipped": None, "small": Tile(16, 32, 16, 4, 2, weights_first=True, chunk=16)}
# T, n, the members' m and r: degenerate; columns that begin anywhere; whole tiles.
SHAPES = [
    (1, 1, [1], [1]),
    (17, 33, [40, 1, 9], [17, 9, 33]),
    (3, 64, [64, 32], [64, 32]),
    (5, 40, [70], [40]),
]


@pytest.fixture(params=TILES, autouse=True)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TILES[request.param]
    if chosen is not None:
        monkeypatch.setattr(config, "choose", lambda *args, **kwargs: chosen)


def check(group: Group) -> None:
    """Every member against the truth; one alone bit for bit against ``forward``. (In company a
    column may lie elsewhere in its tile, which numpy's products notice.)"""
    assert backend.group_unavailable(*group.args()) is None
    with poisoned_empty():
        ys = backend.forward_group(*group.args())
    for y, member in zip(ys, group.members(), strict=True):
        truth, _ = reference.forward(*member.double().args())
        assert_accurate(y, truth, plain_forward(member), "y")
        if len(ys) == 1:
            assert torch.equal(y, backend.forward(*member.args())[0])


class TestGroup:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(
        ("dtype", "factors"),
        [(torch.float32, None), (torch.float16, None), (torch.float32, "int8"),
         (torch.float32, "fp8")],
    )  # fmt: skip
    def test_members(self, shape, dtype, factors) -> None:
        T, n, ms, ranks = shape
        check(make_group(T, n, ms, ranks, slots=2, bias=[False], dtype=dtype, factors=factors))

    def test_strided_x_and_arena(self) -> None:
        group = make_group(5, 20, [24, 8], [17, 16], slots=5)
        wide = torch.full((5, 31), float("nan"))
        arena = torch.full((5, 91), float("nan"))
        wide[:, 3:23], arena[:, 11:44] = group.x, group.d
        slot = torch.arange(-1, 4, dtype=torch.int32)
        check(replace(group, x=wide[:, 3:23], d=arena[:, 11:44], slot=slot))

    def test_no_tokens(self) -> None:
        ys = backend.forward_group(*make_group(0, 20, [30, 12], [10, 7]).args())
        assert [y.shape for y in ys] == [(0, 30), (0, 12)]

    def test_why_not(self) -> None:
        group = make_group(1, 4, [1] * 5, [1] * 5)
        assert "has 5 members" in str(backend.group_unavailable(*group.args()))
