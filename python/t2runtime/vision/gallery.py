"""Images inside prompts, so that everything made for text takes them: training, evaluation, the
search for mixtures, the two passes of the engine.

A gallery holds images by number. A prompt names one as "<image 7>"; the tokenizer of the gallery
writes it as the places that the image fills, all with the id `vocabulary + 7`; and before each call
of the model such ids are replaced by what its vision tower and projector make of the image. A row
of token ids so says all about a request, wherever it is copied, repeated, cut or sampled from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2runtime.request import count

_NAMED = re.compile(r"<image (\d+)>")
_PLAIN = "<image>"


def mention(number: int) -> str:
    """How a prompt names an image.

    >>> mention(7)
    '<image 7>'
    """
    return f"<image {number}>"


class Gallery:
    """The images that the prompts of one model may name.

    Args:
        model: a model of the LLaVA kind in transformers: `get_image_features(pixel_values=...)`,
            `image_token_id` in its config, equally many tokens for every image.
        images: (count, channels, height, width), as the model's vision tower takes them.
        tokens: places that an image fills in a row.

    The hook stays with the model until `close()`. Raises TypeError for another kind of model or of
    number, ValueError for images of another shape and where the model makes another number of
    places of the first image.
    """

    def __init__(self, model: Any, images: Tensor, tokens: int) -> None:
        self._token = getattr(getattr(model, "config", None), "image_token_id", None)
        if self._token is None:
            raise TypeError(
                "model must have image_token_id in its config (LLaVA in transformers), "
                f"got {type(model).__name__}"
            )
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                "images must be a float tensor (count, channels, height, width), "
                f"got {tuple(images.shape)} {images.dtype}"
            )
        self.images, self.tokens = images, count("tokens", tokens)
        if len(images):
            with torch.no_grad():
                self._features(model, images[:1])  # raises now, not in the midst of a batch
        self.first = int(model.get_input_embeddings().num_embeddings)
        self._handle = model.register_forward_pre_hook(self._show, with_kwargs=True)

    def __len__(self) -> int:
        return len(self.images)

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def ids(self, number: int) -> list[int]:
        """The ids of an image's places."""
        if number >= len(self):
            raise ValueError(f"the prompt names image {number}, the gallery holds {len(self)}")
        return [self.first + number] * self.tokens

    def _features(self, model: Any, images: Tensor) -> Tensor:
        """(images, tokens, width), what the model makes of images."""
        made = model.get_image_features(pixel_values=images.to(model.device, model.dtype))
        each = list(getattr(made, "pooler_output", made))
        wrong = [len(one) for one in each if len(one) != self.tokens]
        if wrong:
            raise ValueError(
                f"tokens must be the places that the model makes of an image: {wrong[0]}, got "
                f"{self.tokens}"
            )
        return torch.stack(each)

    def _check(self, ids: Tensor, seen: Tensor) -> None:
        """ValueError unless each row holds whole images that the gallery has."""
        for row, mine in zip(ids.tolist(), seen.tolist(), strict=True):
            places = [token - self.first for token, image in zip(row, mine, strict=True) if image]
            for start in range(0, len(places), self.tokens):
                one = places[start : start + self.tokens]
                if one[0] >= len(self):
                    raise ValueError(
                        f"input_ids name image {one[0]}, the gallery holds {len(self)}"
                    )
                if len(one) < self.tokens or len(set(one)) > 1:
                    raise ValueError(
                        f"input_ids must hold all {self.tokens} places of each image of a row, got "
                        f"{one.count(one[0])} of image {one[0]}: cut a row of ids before or behind "
                        "an image, never inside"
                    )

    def _show(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the model sees of an image, each image once, in the place of a gallery's ids."""
        ids = kwargs.get("input_ids")
        if ids is None or not bool((ids >= self.first).any()):
            return None
        seen = ids >= self.first
        self._check(ids, seen)
        numbers = (ids[seen] - self.first).view(-1, self.tokens)  # row by row
        distinct, which = numbers[:, 0].unique(return_inverse=True)
        features = self._features(model, self.images[distinct.to(self.images.device)])
        # A token of the model's own for images that was sampled stays a token: it names no image.
        embedded = model.get_input_embeddings()(ids.masked_fill(seen, self._token))
        embedded = embedded.masked_scatter(seen[..., None], features[which].to(embedded.dtype))
        # `generate` has encoded its images before the first call: none, since it was given none.
        left = ("input_ids", "mm_encoder_outputs")
        rest = {name: value for name, value in kwargs.items() if name not in left}
        return args, {**rest, "inputs_embeds": embedded}


class PictureTokenizer:
    """A text tokenizer that also reads "<image 7>"; all else is the text tokenizer's own.

    The text tokenizer must know "<image>" as one token, the model's image token.
    """

    def __init__(self, tokenizer: Any, gallery: Gallery) -> None:
        self._tokenizer, self._gallery = tokenizer, gallery
        self._token = tokenizer.convert_tokens_to_ids(_PLAIN)
        if self._token in (None, tokenizer.unk_token_id):
            raise ValueError(f"tokenizer must know {_PLAIN!r} as one token, it does not")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        """{"input_ids", "attention_mask"} of one text."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}: one prompt at a time")
        plain = self._tokenizer(_NAMED.sub(_PLAIN, text), **settings)["input_ids"]
        return self._filled(plain, _NAMED.findall(text))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], tokenize: bool = True, **settings: Any
    ) -> Any:
        """As the text tokenizer's; contents may name images."""
        plain = [{**m, "content": _NAMED.sub(_PLAIN, m["content"])} for m in messages]
        made = self._tokenizer.apply_chat_template(plain, tokenize=tokenize, **settings)
        if not tokenize:
            return made
        named = [number for m in messages for number in _NAMED.findall(m["content"])]
        return self._filled(made["input_ids"], named)

    def _filled(self, plain: Sequence[int], named: Sequence[str]) -> dict[str, list[int]]:
        """Ids with every image token replaced by the places of the image named there."""
        numbers = iter(named)
        ids: list[int] = []
        if list(plain).count(self._token) != len(named):
            raise ValueError(
                f"a prompt must name each image as {mention(0)!r}; it names {len(named)} and holds "
                f"{list(plain).count(self._token)} image tokens"
            )
        for token in plain:
            ids += self._gallery.ids(int(next(numbers))) if token == self._token else [token]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
