"""A tiny random model with a character tokenizer, and the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import t2kernels as t2k

transformers = pytest.importorskip("transformers")

from t2runtime.base_model import build_tokenizer  # noqa: E402
from t2runtime.loading import SMALL_MODEL, load  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def tiny(tokenizer: Any) -> Any:
    """One converted layer of random Llama, width 32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    return model


@pytest.fixture(scope="session")
def small() -> Iterator[tuple[Any, Any]]:
    """The shipped model, converted; tests leave it as the base."""
    if not (SMALL_MODEL / "model.safetensors").exists():
        pytest.skip("the small model is not in this checkout")
    model, tokenizer = load("small")
    t2k.convert(model, progress=False)
    yield model, tokenizer
