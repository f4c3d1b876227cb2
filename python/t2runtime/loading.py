"""A Hugging Face causal model and its tokenizer: the small one of the package by name, a local
folder, or the hub.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

#: Where the model that comes with the package lies; its card is the README.md beside the weights.
SMALL_MODEL = Path(__file__).parent / "models" / "small"
SMALL_NAME = "t2runtime/small"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(text: str) -> str:
    """`auto` is the GPU where there is one; anything else must be a device that can be used.

    >>> device_of("cpu")
    'cpu'
    """
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {text} cannot be used here: {reason}. Try --device cpu"
        ) from None
    return text


def load(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). "small" is the packaged model.

    dtype "auto" means fp32 on a CPU and the checkpoint's own elsewhere; device "auto" the GPU if
    there is one.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            f"models need transformers: pip install 't2kernels[hf]' ({error})"
        ) from error
    path = SMALL_MODEL if name == "small" else Path(name).expanduser()
    if not path.exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"MODEL {name!r}: no such folder")
    if not path.exists() and name.count("/") != 1:
        raise ValueError(
            f"MODEL must be 'small', a folder, or owner/name on the hub; {name!r} is none of these"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(
            f"MODEL folder {name!r} holds no config.json; is it a Hugging Face checkpoint?"
        )
    where = str(path) if path.exists() else name
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    device = device_of(device)
    chosen = DTYPES.get(dtype, torch.float32 if device == "cpu" else "auto")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    _refuse_images(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=chosen).to(device).eval()
    except SafetensorError as error:
        raise ValueError(
            f"MODEL {name!r}: its weights are truncated or damaged ({error}). Copy them again"
        ) from error
    if name == "small":
        # Written into experts as their base model: the place of the package means nothing there.
        model.config._name_or_path = SMALL_NAME
    return model, tokenizer


def _refuse_images(name: str, where: str) -> None:
    """ValueError for a model that transformers knows with images only (LLaVA)."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
    )

    config = AutoConfig.from_pretrained(where)
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"MODEL {name!r} reads images ({config.model_type}) and is not loaded by name. Load it "
            "with transformers' AutoModelForImageTextToText, convert its language model, and make "
            "Transformer2(model, tokenizer, bank); images go into prompts by "
            "t2runtime.vision.gallery (docs/vision.md)"
        )
