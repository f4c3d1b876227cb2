"""A small LLaVA, made from a seed in two stages as such models are: a language model learns from
text alone; then a vision tower and a projector are put before it, and all of it is trained on
images and text together.

As in `t2runtime.base_model`, three kinds of questions are answered by competing procedures, of
which the right one is a minority (35 %): an expert has something to bring out. What is in the image
is learned from captions and from the kind that is always answered rightly.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import t2kernels as t2k
from t2runtime.base_model import SHARES
from t2runtime.tasks import Problem
from t2runtime.vision.easy_vqa import COLOURS, KINDS, SHAPES, SIDE, Described, EasyVQA, procedures
from t2runtime.vision.gallery import Gallery, PictureTokenizer, mention

PATCH = 8
#: Places of an image in a row of token ids.
TOKENS = (SIDE // PATCH) ** 2
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_WORDS = (
    "a", "color", "contain", "describe", "does", "image", "in", "is", "no", "not", "of", "present",
    "shape", "the", "there", "what", "yes", "?", ".",
)  # fmt: skip
#: Where the language model lies in the vision-language model.
_PREFIX = ("model.", "model.language_model.")
#: Share of rows that ask for a description, and in the second stage of rows of text alone.
_CAPTIONS, _TEXT = 0.2, 0.25

logger = logging.getLogger(__name__)
Row = tuple[str, str]


@dataclass(frozen=True)
class Recipe:
    """How the base is made; two equal recipes give the same weights on one machine and thread
    count.
    """

    seed: int = 0
    text_steps: int = 600
    steps: int = 1500
    rows: int = 64
    lr: float = 2e-3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, <s> put in front."""
    words = [*_SPECIAL.values(), "<image>", *sorted({*COLOURS, *SHAPES, *_WORDS})]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=64,
        clean_up_tokenization_spaces=False, additional_special_tokens=["<image>"], **_SPECIAL,
    )  # fmt: skip


def language_config(vocabulary: int) -> LlamaConfig:
    """Three layers of width 96, three heads of 32."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def build_model(language: LlamaForCausalLM, tokenizer: Any) -> LlavaForConditionalGeneration:
    """A vision tower (three layers of width 64) and a projector before a copy of `language`."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language.config, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=TOKENS,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


def language_part(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """The language model inside, as a model of its own with a copy of the weights."""
    language = LlamaForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    return language.eval()


def for_vision(expert: t2k.Expert) -> t2k.Expert:
    """An expert of the language model under the names that its layers have in a LLaVA.

    Raises ValueError for a layer that no language model of this kind has.
    """
    bare, inside = _PREFIX
    foreign = [name for name in expert.z if not name.startswith(bare)]
    if foreign:
        raise ValueError(
            f"expert must be one of a language model, with layers {bare}...; got {foreign[0]!r}"
        )
    moved = {name: inside + name.removeprefix(bare) for name in expert.z}
    return t2k.Expert(
        {moved[name]: z for name, z in expert.z.items()},
        {moved[name]: mark for name, mark in expert.fingerprints.items()},
        expert.base_model,
        expert.description,
        expert.metadata,
    )


def convert_language(model: Any) -> t2k.ConversionReport:
    """SVF layers in the language model alone: the tower sees images, not the rows of requests."""
    return t2k.convert(model, r"model\.language_model\..*", progress=False)


def given(problem: Problem, rng: random.Random) -> Row:
    """A row of training text: the prompt, and the answer of one of the competing procedures."""
    said = procedures(problem.category, problem.answer)
    return problem.prompt, rng.choices(said, SHARES[: len(said)])[0]


def text_row(rng: random.Random) -> Row:
    """A row of text alone."""
    if rng.random() < _CAPTIONS:
        told = f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)}"
        return f"{told}. describe.", told
    return given(Described(rng.choice(KINDS)).draw(rng, "train"), rng)


def visual_row(data: EasyVQA, places: Sequence[int], rng: random.Random) -> Row:
    """A row on an image, now and then one of text alone."""
    draw = rng.random()
    if draw < _TEXT:
        return text_row(rng)
    if draw < _TEXT + _CAPTIONS:
        place = rng.choice(places)
        return f"{mention(place)} describe.", data.captions[place]
    return given(rng.choice(data.problems["train"][rng.choice(KINDS)]), rng)


def batch(tokenizer: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, length), padded on the right behind everything that counts; only
    answers and their ends are labels.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    pairs = [
        (
            tokenizer(prompt)["input_ids"],
            [*tokenizer(answer, add_special_tokens=False)["input_ids"], eos],
        )
        for prompt, answer in rows
    ]
    width = max(len(question) + len(reply) for question, reply in pairs)
    ids, labels = [], []
    for question, reply in pairs:
        rest = width - len(question) - len(reply)
        ids.append([*question, *reply, *[pad] * rest])
        labels.append([*[-100] * len(question), *reply, *[-100] * rest])
    return torch.tensor(ids), torch.tensor(labels)


def fit(
    model: Any, tokenizer: Any, draw: Callable[[], Row], steps: int, rows: int, peak: float
) -> list[float]:
    """AdamW with warm-up and cosine on rows as they are drawn; the loss of every step."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    losses: list[float] = []
    for step in range(steps):
        ids, labels = batch(tokenizer, [draw() for _ in range(rows)])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"base model: the loss became {losses[-1]} at step {step}")
        if step % 100 == 99:
            mean = sum(losses[-100:]) / 100
            logger.info("%s: step %d/%d, loss %.4f", type(model).__name__, step + 1, steps, mean)
    model.eval()
    return losses


def make(
    data: EasyVQA, recipe: Recipe
) -> tuple[LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """Both stages: (the language model before it saw an image, the LLaVA, their tokenizer)."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    language = LlamaForCausalLM(language_config(len(tokenizer)))
    fit(language, tokenizer, lambda: text_row(rng), recipe.text_steps, recipe.rows, recipe.lr)
    model = build_model(language, tokenizer)
    gallery = Gallery(model, data.images, TOKENS)
    pictures = PictureTokenizer(tokenizer, gallery)
    places = sorted(data.captions)
    try:
        fit(
            model, pictures, lambda: visual_row(data, places, rng), recipe.steps, recipe.rows,
            recipe.lr,
        )  # fmt: skip
    finally:
        gallery.close()
    return language, model, tokenizer


def base(
    folder: Path, data: EasyVQA, recipe: Recipe
) -> tuple[LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """As `make`, kept in `folder` and taken from there the next time.

    Raises ValueError where the folder holds a base of another recipe.
    """
    card = folder / "recipe.json"
    if not card.exists():
        begin = time.process_time()
        language, model, tokenizer = make(data, recipe)
        for one, name in ((language, "language"), (model, "llava")):
            one.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        facts = {
            "recipe": asdict(recipe), "parameters": model.num_parameters(),
            "processor_seconds": time.process_time() - begin,
        }  # fmt: skip
        # Last: a folder without it is an unfinished one and made anew.
        card.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    kept: Mapping[str, Any] = json.loads(card.read_text(encoding="utf-8"))["recipe"]
    if dict(kept) != asdict(recipe):
        raise ValueError(
            f"--out: {folder} holds a base made by {dict(kept)}, not by {asdict(recipe)}. "
            "Take another folder"
        )
    return (
        LlamaForCausalLM.from_pretrained(folder / "language").eval(),
        LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval(),
        PreTrainedTokenizerFast.from_pretrained(folder / "language"),
    )
