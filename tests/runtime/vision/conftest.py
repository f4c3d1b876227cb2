"""A small folder of drawings like those of easy-VQA, and an untrained LLaVA over it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from transformers import LlamaForCausalLM  # noqa: E402

from t2runtime.vision.easy_vqa import EasyVQA  # noqa: E402
from t2runtime.vision.gallery import Gallery, PictureTokenizer  # noqa: E402
from t2runtime.vision.llava import (  # noqa: E402
    TOKENS,
    build_model,
    build_tokenizer,
    convert_language,
    language_config,
)

_PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255), "teal": (0, 128, 128), "gray": (128, 128, 128)}


def _draw(folder: Path, count: int, rng: random.Random) -> None:
    """`count` images with a rectangle each, and one question of every kind on each."""
    (folder / "images").mkdir(parents=True)
    rows: list[list[Any]] = []
    for number in range(count):
        colour = rng.choice(list(_PAINT))
        image = Image.new("RGB", (64, 64), (240, 240, 240))
        right, low = rng.randint(40, 60), rng.randint(45, 60)
        image.paste(_PAINT[colour], (10, 20, right, low))
        image.save(folder / "images" / f"{number}.png")
        rows += [
            ["what color is the shape?", colour, number],
            ["what shape is present?", "rectangle", number],
            ["is there not a circle?", "yes", number],
            [f"is there a {colour} shape?", "yes", number],
        ]
    (folder / "questions.json").write_text(json.dumps(rows))


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images to train on, of which three are for validation, and eight for the test."""
    folder = tmp_path_factory.mktemp("drawings")
    rng = random.Random(0)
    _draw(folder / "train", 30, rng)
    _draw(folder / "test", 8, rng)
    return folder


@pytest.fixture(scope="session")
def data(drawings: Path) -> EasyVQA:
    return EasyVQA.read(drawings)


@pytest.fixture
def seeing(data: EasyVQA) -> tuple[Any, Any]:
    """(LLaVA with a converted language model, its tokenizer for pictures), random weights large
    enough that image, question and expert each change the answer.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    language = LlamaForCausalLM(language_config(len(tokenizer)))
    model = build_model(language, tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(6)
    convert_language(model)
    return model, PictureTokenizer(tokenizer, Gallery(model, data.images, TOKENS))


@pytest.fixture
def bank(seeing: tuple[Any, Any]) -> t2k.ExpertBank:
    """Experts "one" and "two" on it, another z for every layer."""
    model = seeing[0]
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        layers = t2k.svf_layers(model).items()
        z = {key: 1 + torch.randn(layer.rank, generator=generator) for key, layer in layers}
        bank.add(name, t2k.Expert(z))
    return bank
