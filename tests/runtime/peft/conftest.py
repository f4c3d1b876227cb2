"""Random Llamas of 2 layers, SVF adapters on them, and W′ rebuilt to hold them against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import t2runtime.peft as svf  # noqa: E402

VOCAB = 61


class Kit:
    """What the tests of this folder share."""

    VOCAB = VOCAB

    @staticmethod
    def base(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        settings = {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        }  # fmt: skip
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**(settings | changes))
        return transformers.LlamaForCausalLM(config).to(dtype).eval()

    @staticmethod
    def gpt2() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()

    @staticmethod
    def model(base: Any, *adapters: str, **settings: Any) -> Any:
        """A PeftModel with these adapters, their z away from 1, the first one active."""
        settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
        names = adapters or ("default",)
        model = peft.get_peft_model(base, svf.SVFConfig(**settings), names[0])
        for name in names[1:]:
            model.add_adapter(name, svf.SVFConfig(**settings))
        for seed, name in enumerate(names):
            Kit.move(model, name, seed)
        return model.eval()

    @staticmethod
    @torch.no_grad()
    def move(model: Any, adapter: str = "default", seed: int = 0, size: float = 0.4) -> None:
        gen = torch.Generator().manual_seed(seed)
        for layer in svf.tuner_layers(model).values():
            if adapter in layer.svf_z:
                z = layer.svf_z[adapter].weight
                z.add_(size * torch.randn(z.shape, generator=gen))

    @staticmethod
    @torch.no_grad()
    def rebuilt(base: Any, model: Any, adapter: str = "default") -> Any:
        """``base`` with W′ = W + ΔW of the adapter written into a copy of its weights."""
        dense = copy.deepcopy(base)
        for name, layer in svf.tuner_layers(model).items():
            if adapter in layer.svf_z:
                dense.get_submodule(name).weight.add_(layer.get_delta_weight(adapter))
        return dense

    @staticmethod
    def inputs(rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
        gen = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCAB, (rows, length), generator=gen)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @staticmethod
    @torch.no_grad()
    def logits(model: Any, **more: Any) -> torch.Tensor:
        return model(**Kit.inputs(), **more).logits

    @staticmethod
    def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
        return bool((a - b).norm() <= tolerance * b.norm())


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def base(kit: type[Kit]) -> Any:
    return kit.base()


@pytest.fixture
def stored(kit: type[Kit], tmp_path: Any) -> Callable[[], Any]:
    """A base model in a folder, as a user has it; the function loads it anew."""
    kit.base().save_pretrained(tmp_path / "base")
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
