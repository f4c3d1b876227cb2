"""Images inside prompts: the same answer as the model's own processor way, alone and in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime import base_model
from t2runtime.cli import main
from t2runtime.engine import Transformer2
from t2runtime.generation import complete, forced, token_log_probs
from t2runtime.vision.gallery import Gallery, PictureTokenizer, mention
from t2runtime.vision.llava import TOKENS, build_tokenizer, convert_language

PROMPTS = (
    f"{mention(0)} what color is the shape?",
    f"{mention(3)} is there not a red shape in the image?",
    "a red circle. what shape is present?",
    f"{mention(3)} what color is the shape?",
)
MIXTURES: tuple[Any, ...] = ("one", None, {"one": 0.5, "two": 0.7}, "two")


def test_pixels_reach_the_model_as_if_given_by_hand(seeing: tuple[Any, Any], data: Any) -> None:
    model, tokenizer = seeing
    ids = tokenizer(PROMPTS[0])["input_ids"]
    token = model.config.image_token_id
    by_hand = [token if i >= len(tokenizer) else i for i in ids]
    assert by_hand.count(token) == TOKENS
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([by_hand]), pixel_values=data.images[:1]).logits
        other = model(input_ids=torch.tensor([by_hand]), pixel_values=data.images[1:2]).logits
        assert torch.equal(model(input_ids=torch.tensor([ids])).logits, expected)
    assert not torch.equal(expected, other)


def test_a_row_says_the_same_alone_as_among_others(
    seeing: tuple[Any, Any], bank: t2k.ExpertBank
) -> None:
    """Images and texts of several lengths in one batch, each row with its own mixture."""
    model, tokenizer = seeing
    with bank.use(list(MIXTURES)):
        together = complete(model, tokenizer, PROMPTS, 6).texts
    alone = []
    for prompt, mixture in zip(PROMPTS, MIXTURES, strict=True):
        with bank.use(mixture):
            alone += complete(model, tokenizer, [prompt], 6).texts
    assert together == alone
    with bank.use(None):
        base = complete(model, tokenizer, PROMPTS, 6).texts
    assert [a == b for a, b in zip(base, together, strict=True)] == [False, True, False, False]
    assert base[0] != base[3]  # the image alone tells these two prompts apart


def test_the_engine_answers_prompts_with_images(
    seeing: tuple[Any, Any], bank: t2k.ExpertBank
) -> None:
    model, tokenizer = seeing
    engine = Transformer2(model, tokenizer, bank)
    said: dict[int, str] = {}
    out = engine.generate(
        PROMPTS, strategy=list(MIXTURES), max_new_tokens=6,
        stream=lambda row, piece: said.update({row: said.get(row, "") + piece}),
    )  # fmt: skip
    with bank.use(list(MIXTURES)):
        assert [one.text for one in out] == complete(model, tokenizer, PROMPTS, 6).texts
    assert [said.get(row, "") for row in range(len(PROMPTS))] == [one.text for one in out]
    missing = engine.generate([mention(999) + " describe.", PROMPTS[0]], None, max_new_tokens=6)
    assert "image 999" in str(missing[0].error) and missing[1].error is None


def test_a_folder_of_a_llava_is_refused_with_the_way_to_go(
    seeing: tuple[Any, Any], bank: t2k.ExpertBank, tmp_path: Path
) -> None:
    """And that way answers texts, too, without a gallery."""
    model, _ = seeing
    text = build_tokenizer()
    model.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads images \(llava\).*AutoModelForImageTextToText"):
        Transformer2.from_pretrained(str(tmp_path), device="cpu")
    assert main(["generate", str(tmp_path), "--prompt", "a red circle."]) == 2
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    convert_language(loaded)
    again = t2k.ExpertBank(loaded)
    again.add("one", bank["one"])
    (out,) = Transformer2(loaded, text, again).generate([PROMPTS[2]], "one", max_new_tokens=4)
    (want,) = Transformer2(model, text, bank).generate([PROMPTS[2]], "one", max_new_tokens=4)
    assert out.error is None and out.text == want.text


def test_gradients_under_mixtures_reach_alpha(
    seeing: tuple[Any, Any], bank: t2k.ExpertBank
) -> None:
    model, tokenizer = seeing
    alpha = torch.full((2, 2), 0.5, requires_grad=True)
    with bank.use(alpha):
        given = forced(tokenizer, PROMPTS[:2], ["red", "no"], model)
        token_log_probs(model, given).sum().backward()
    assert alpha.grad is not None and bool((alpha.grad != 0).all())


def test_a_part_of_an_image_is_refused(seeing: tuple[Any, Any]) -> None:
    model, tokenizer = seeing
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with pytest.raises(ValueError, match=f"all {TOKENS} places .*, got {TOKENS - 3} of image 0"):
        model(input_ids=torch.tensor([ids[4:]]))
    first = tokenizer._gallery.first
    half = TOKENS // 2
    with pytest.raises(ValueError, match=f"all {TOKENS} places .*, got {half} of image 3"):
        # Two rows that hold as many places as one image.
        model(input_ids=torch.tensor([[1] + [first + 3] * half, [1] + [first + 3] * half]))
    mixed = [first + 1] * (TOKENS - 1) + [first + 2] * (TOKENS + 1)
    with pytest.raises(ValueError, match=f"got {TOKENS - 1} of image 1"):
        model(input_ids=torch.tensor([[1, *mixed]]))
    with pytest.raises(ValueError, match="input_ids name image 999, the gallery holds"):
        model(input_ids=torch.tensor([[first + 999] * TOKENS]))


@pytest.mark.parametrize("tokens", [TOKENS - 1, TOKENS + 1, 2 * TOKENS])
def test_a_wrong_number_of_places_is_refused(
    seeing: tuple[Any, Any], data: Any, tokens: int
) -> None:
    said = f"places that the model makes of an image: {TOKENS}, got {tokens}"
    with pytest.raises(ValueError, match=said):
        Gallery(seeing[0], data.images, tokens)


def test_what_cannot_be_read_is_said(seeing: tuple[Any, Any], data: Any) -> None:
    model, tokenizer = seeing
    with pytest.raises(ValueError, match="names 0 and holds 1 image tokens"):
        tokenizer("<image> what color is the shape?")
    with pytest.raises(TypeError, match="text must be a str, got list"):
        tokenizer(["a", "b"])
    with pytest.raises(TypeError, match="image_token_id"):
        Gallery(torch.nn.Linear(2, 2), data.images, TOKENS)
    with pytest.raises(ValueError, match="images must be a float tensor"):
        Gallery(model, data.images.byte(), TOKENS)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        Gallery(model, data.images, 0)
    with pytest.raises(TypeError, match="tokens must be an int"):
        Gallery(model, data.images, float(TOKENS))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must know '<image>' as one token"):
        PictureTokenizer(base_model.build_tokenizer(), tokenizer._gallery)


def test_a_chat_template_may_name_images(seeing: tuple[Any, Any]) -> None:
    tokenizer = seeing[1]
    text = build_tokenizer()
    text.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    gallery = tokenizer._gallery
    chat = PictureTokenizer(text, gallery).apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], return_dict=True
    )
    assert chat["input_ids"].count(gallery.first) == TOKENS


def test_closed_the_model_is_left_alone(seeing: tuple[Any, Any]) -> None:
    model, tokenizer = seeing
    tokenizer._gallery.close()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([tokenizer(PROMPTS[0])["input_ids"]]))
