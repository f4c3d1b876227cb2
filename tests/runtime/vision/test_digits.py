"""A ViT and its experts; synthetic digits, the real ones where they are at hand."""

from __future__ import annotations

import copy
import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k

pytest.importorskip("transformers")

from t2runtime.vision import digits
from t2runtime.vision.digits import Images, Settings

DATA = Path(os.environ.get("T2_DATA", Path(__file__).parents[4] / "shared" / "data"))
REAL = DATA / "sklearn_digits"
QUICK = Settings(base_steps=60, steps=25, rows=32)


@pytest.fixture(scope="module")
def bars() -> Images:
    """Class k is a bright row or column k // 2 of faint noise: a rotation swaps the two."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1300,), generator=generator)
    pixels = 0.2 * torch.randn(1300, 1, 8, 8, generator=generator) - 0.8
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row = image[0] if label % 2 == 0 else image[0].T
        row[label // 2] = 1.0
    return Images(pixels, labels)


@pytest.fixture(scope="module")
def vit(bars: Images) -> Any:
    return digits.base(digits.split(bars, 0)["base"], QUICK)


def _expert(model: Any, seed: int) -> t2k.Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = t2k.svf_layers(model).items()
    return t2k.Expert({k: 1 + torch.randn(m.rank, generator=generator) for k, m in layers})


def test_parts_do_not_overlap(bars: Images) -> None:
    parts = digits.split(bars, 3)
    assert {k: len(v) for k, v in parts.items()} == {**digits.SPLITS, "test": 100}
    seen = [tuple(row) for part in parts.values() for row in part.pixels.flatten(1).tolist()]
    assert len(set(seen)) == 1300
    again = digits.split(bars, 3)
    assert torch.equal(again["test"].pixels, parts["test"].pixels)


def test_rows_of_one_batch_have_their_own_experts(vit: Any, bars: Images) -> None:
    """3-D inputs follow the batch; each row is what it is in a batch under its expert alone."""
    model = copy.deepcopy(vit)
    plain = vit(pixel_values=bars.pixels[:4]).logits
    report = t2k.convert(model, progress=False)
    assert len(report.converted) == 18 and "classifier" in report.skipped
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(("one", "two")):
        bank.add(name, _expert(model, seed))
    with torch.no_grad():
        with bank.use(["one", None, {"one": 0.5, "two": 0.5}, "two"]):
            mixed = model(pixel_values=bars.pixels[:4]).logits
        for row, mixture in enumerate(("one", None, {"one": 0.5, "two": 0.5}, "two")):
            with bank.use(mixture):
                alone = model(pixel_values=bars.pixels[row : row + 1]).logits
            torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)
            assert (mixture is None) == torch.allclose(plain[row], alone[0], atol=1e-5)
        with bank.use(None):
            assert torch.equal(model(pixel_values=bars.pixels[:4]).logits, plain)


def test_the_head_sees_two_axes_and_needs_a_declared_order(vit: Any, bars: Images) -> None:
    model = copy.deepcopy(vit)
    t2k.convert(model, ["classifier"], progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("one", _expert(model, 1))
    with torch.no_grad():
        with pytest.raises(ValueError, match="row_order"), bank.use(["one", None]):
            model(pixel_values=bars.pixels[:2])
        with bank.use(["one", None], row_order="batch"):
            mixed = model(pixel_values=bars.pixels[:2]).logits
        with bank.use("one"):
            alone = model(pixel_values=bars.pixels[:1]).logits
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-4, rtol=1e-4)
    plain = vit(pixel_values=bars.pixels[1:2]).logits
    torch.testing.assert_close(mixed[1], plain[0], atol=1e-5, rtol=1e-5)


def test_every_method_adapts_a_copy(vit: Any, bars: Images) -> None:
    before = {name: p.clone() for name, p in vit.state_dict().items()}
    rows = digits.seen_as("inverted", digits.split(bars, 0)["adapt"], 1)
    start = digits.score(vit, rows).right
    sizes = {}
    for method, rate in digits.RATES.items():
        found = digits.adapt(vit, method, rows, QUICK, rate)
        sizes[method] = found.values
        assert digits.score(found.model, rows).right > start
        assert (found.expert is not None) == (method == "svf")
    assert sizes["svf"] < sizes["lora"] < sizes["full"]
    assert all(torch.equal(p, before[name]) for name, p in vit.state_dict().items())
    with pytest.raises(ValueError, match="method must be one of"):
        digits.adapt(vit, "prefix", rows, QUICK, 1e-3)


def test_a_measured_seed_has_every_number_and_one_batch_agrees(bars: Images) -> None:
    row = digits.measure(bars, Settings(base_steps=20, steps=3, rows=16))
    shown = digits.table(row)
    for domain in digits.DOMAINS:
        alone = row[domain]["svf"]["accuracy"]
        # To rounding: an image on the border between two classes may fall to either side.
        assert abs(row["one batch"][domain]["accuracy"] - alone) <= 0.01
        assert domain in shown and f"{100 * alone:.1f}" in shown


def test_files_that_are_no_digits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        digits.read(tmp_path)
    with gzip.open(tmp_path / digits.FILE, "wt") as file:
        file.write("1,2,3\n" * 5)
    with pytest.raises(ValueError, match="got 5 rows, 0 of them whole"):
        digits.read(tmp_path)


def test_the_real_digits_are_read_whole() -> None:
    if not REAL.exists():
        pytest.skip("the digits are not beside this checkout (../shared/data/sklearn_digits)")
    images = digits.read(REAL)
    assert len(images) == 1797 and set(images.labels.tolist()) == set(range(10))
    assert images.pixels.min() == -1 and images.pixels.max() == 1
