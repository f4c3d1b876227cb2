"""Tiny random checkpoints on disk, of the architectures that the recipe names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

_SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    }),
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Make:
    """make(family, dtype, name=..., shard=...) -> the folder of a saved random model."""

    # Bars of saving and loading would stand among the errors that tests read.
    transformers.utils.logging.disable_progress_bar()

    def build(
        family: str = "llama", dtype: torch.dtype = torch.float32, *, name: str = "model",
        shard: str = "5GB", seed: int = 0,
    ) -> Path:  # fmt: skip
        model_class, config_class, extra = FAMILIES[family]
        size = {} if family == "gpt2" else _SIZE
        config = getattr(transformers, config_class)(
            vocab_size=len(tokenizer), **size, **extra, initializer_range=0.2
        )
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def load(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_expert(model: Any, seed: int, size: float = 0.3) -> t2k.Expert:
    """An expert for a converted model."""
    gen = torch.Generator().manual_seed(seed)
    layers = t2k.svf_layers(model)
    z = {n: 1 + size * torch.randn(m.rank, generator=gen) for n, m in layers.items()}
    return t2k.Expert(z, {n: m.fingerprint for n, m in layers.items()}, description=f"no {seed}")


class Tools:
    """Functions that the tests of this folder share."""

    load = staticmethod(load)
    random_expert = staticmethod(random_expert)

    @staticmethod
    def logits(model: Any) -> torch.Tensor:
        ids = torch.arange(3, 15).view(2, 6)
        with torch.no_grad():
            return model(input_ids=ids).logits

    @staticmethod
    def write_expert(folder: Path, path: Path, seed: int = 0, targets: str = "all-linear",
                     size: float = 0.3) -> t2k.Expert:  # fmt: skip
        model = load(folder)
        t2k.convert(model, targets=targets, progress=False)
        expert = random_expert(model, seed, size)
        expert.save(path)
        return expert


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
