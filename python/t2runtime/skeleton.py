"""A causal model without weights: built from config.json on the meta device, in no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from t2runtime.loading import DTYPES, SMALL_MODEL


def local_folder(name: str, what: str = "MODEL") -> Path:
    """The folder of a local checkpoint; "small" is the packaged one.

    Raises ValueError where there is no such folder or no config.json in it.
    """
    path = SMALL_MODEL if name == "small" else Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"{what} must be 'small' or a local folder, got {name!r}. A model of the hub must be "
            "downloaded first: `hf download owner/name --local-dir FOLDER`."
        )
    if not (path / "config.json").exists():
        raise ValueError(
            f"{what} folder {name!r} holds no config.json; is it a Hugging Face checkpoint?"
        )
    return path


def skeleton(folder: Path, dtype: str = "auto", attention: str | None = None) -> Any:
    """The causal model of ``folder``/config.json with all tensors on the meta device, eval mode.

    dtype "auto" is the config's own, fp32 where it names none. attention: an implementation that
    transformers knows by name; None is the model's default.

    Raises ImportError without transformers, ValueError for a config that no causal model has.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            f"models need transformers: pip install 't2kernels[hf]' ({error})"
        ) from error
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    extra = {} if attention is None else {"attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(str(folder))
        own = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES.get(dtype, own), **extra)
    except Exception as error:  # a foreign file: what is wrong with it has errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{folder / 'config.json'} makes no causal language model of transformers: "
            f"{reason[:300]}"
        ) from error
    return model.eval()
