"""Tiny random models of every supported family, and the references that they are held against."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import t2kernels as t2k  # noqa: E402

STORIES = Path(os.environ.get("T2_MODELS", Path(__file__).parents[3] / "shared" / "models"))
VOCAB = 61
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BERT = {k: v for k, v in _TEXT.items() if k not in ("num_key_value_heads", "attention_dropout")}

# family: (model class, config class, what differs from _TEXT); None stands for "not these keys".
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT | {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _TEXT | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _TEXT | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _TEXT | {"sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _TEXT | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _TEXT | {"head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _TEXT | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
    }),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _TEXT | _MOE | {
        "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1,
    }),
    "bert": ("BertModel", "BertConfig", _BERT | {
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }),
    "vit": ("ViTModel", "ViTConfig", {
        "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    }),
}  # fmt: skip
DENSE_DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2")
# What the first axis of the 2-D inputs inside a family is: the pooler gets one row per request,
# a mixture-of-experts block all tokens in order.
ROW_ORDER = {"bert": "batch", "vit": "batch", "qwen2_moe": "flat"}


class Zoo:
    """What the tests of this folder share; see the functions."""

    ROW_ORDER = ROW_ORDER
    VOCAB = VOCAB

    @staticmethod
    def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A random model in eval mode; weights large enough for an expert to change the output."""
        model_class, config_class, settings = FAMILIES[family]
        config = getattr(transformers, config_class)(**settings)
        config._attn_implementation = config._experts_implementation = "eager"
        gen = torch.Generator().manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn(p.shape, generator=gen) * 1.5 / p.shape[-1] ** 0.5)
                elif "norm" not in name and "ln_" not in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=gen))
        return model.to(dtype).eval()

    @staticmethod
    def inputs(family: str, rows: int = 3, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
        gen = torch.Generator().manual_seed(seed)
        if family == "vit":
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=gen)}
        ids = torch.randint(3, VOCAB, (rows, length), generator=gen)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @staticmethod
    def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """All that the model says, side by side: logits, or hidden states and the pooler's."""
        out = model(**inputs)
        if hasattr(out, "logits"):
            return out.logits
        return torch.cat([out.last_hidden_state.flatten(1), out.pooler_output], 1)

    @staticmethod
    def expert(model: nn.Module, seed: int, size: float = 0.3) -> t2k.Expert:
        gen = torch.Generator().manual_seed(seed)
        layers = t2k.svf_layers(model)
        z = {n: 1 + size * torch.randn(m.rank, generator=gen) for n, m in layers.items()}
        return t2k.Expert(z, {n: m.fingerprint for n, m in layers.items()})

    @staticmethod
    def bank(model: nn.Module, *names: str) -> t2k.ExpertBank:
        bank = t2k.ExpertBank(model)
        for seed, name in enumerate(names):
            bank.add(name, Zoo.expert(model, seed))
        return bank

    @staticmethod
    def rebuilt(
        base: nn.Module, converted: nn.Module, z: dict[str, Tensor], dtype: torch.dtype
    ) -> nn.Module:
        """A copy of ``base`` in ``dtype`` whose weights are W + U·diag(σ(z − 1))·Vᵀ, by hand."""
        model = copy.deepcopy(base).to(dtype)
        for name, layer in t2k.svf_layers(converted).items():
            f, target = layer.factors, model.get_submodule(name)
            U, S, V = f.U.double(), f.S.double(), f.V.double()
            delta = (U * (S * (z[name].double() - 1))) @ V.t()
            w = base.get_submodule(name).weight.detach().double()
            delta = delta.t() if layer.transposed else delta
            target.weight.data = (w + delta).to(dtype)
        return model

    @staticmethod
    def assert_like_rebuilt(
        actual: Tensor, base: nn.Module, converted: nn.Module, z: dict[str, Tensor],
        run: Callable[[nn.Module], Tensor],
    ) -> None:  # fmt: skip
        """``actual`` may err three times what the model with rebuilt weights errs in the same
        dtype: it rounds twice per layer (h⊙d and y) where the dense product rounds once, and its
        factors are rounded too. The floor is twice what a decomposition may err (5e-6)."""
        with torch.no_grad():
            truth = run(Zoo.rebuilt(base, converted, z, torch.float64))
            plain = run(Zoo.rebuilt(base, converted, z, actual.dtype))
        error = float((actual.double() - truth).norm() / truth.norm())
        allowed = 3 * float((plain.double() - truth).norm() / truth.norm())
        limit = allowed + 1e-5
        if not error <= limit:
            raise AssertionError(f"relative error {error:.3e}, allowed {limit:.3e}")

    @staticmethod
    def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
        """Equal to fp32 rounding, by the largest element: a wrong row cannot hide in a norm."""
        scale = float(expected.detach().abs().max())
        return bool((actual - expected).abs().max() <= tolerance * scale)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo() -> type[Zoo]:
    return Zoo


@pytest.fixture
def stories() -> Path:
    """The one real pretrained model; it knows stories only."""
    path = STORIES / "stories260K"
    if not (path / "model.safetensors").exists():
        pytest.skip(f"no pretrained model at {path}; set T2_MODELS to the folder that has it")
    return path


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DENSE_DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param
