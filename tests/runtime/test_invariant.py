"""Batch-invariant mode of a whole model: what a request gets depends on nothing else in the batch.

INVARIANT_BATCHES=1000 tries as many random batches of the small model, INVARIANT_SEED chooses
which; the default is a few.
"""

import os
import random
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.engine import Transformer2
from t2runtime.invariant import NAME, _attention, invariant_model

transformers = pytest.importorskip("transformers")
BATCHES = int(os.environ.get("INVARIANT_BATCHES", "5"))
SEED = int(os.environ.get("INVARIANT_SEED", "0"))


def random_experts(model: Any, names: tuple[str, ...], size: float) -> t2k.ExpertBank:
    generator = torch.Generator().manual_seed(0)
    bank = t2k.ExpertBank(model)
    for name in names:
        z = {
            n: 1 + size * torch.randn(v.shape, generator=generator)
            for n, v in t2k.Expert.from_model(model).z.items()
        }
        bank.add(name, t2k.Expert(z))
    return bank


def test_texts_alone_equal_texts_in_random_batches(small: Any) -> None:
    """Any company, any lengths, any mixtures; pass 1's probabilities to the last bit as well."""
    model, tokenizer = small
    names = ("add", "reverse", "max")
    t2 = Transformer2(model, tokenizer, random_experts(model, names, 0.3))
    rng = random.Random(SEED)
    pool = [p.prompt for name in tasks.CATEGORIES for p in tasks.problems(name, 10, "test")]
    pool += ["1" * n + "=" for n in range(1, 24, 3)]
    strategies: list[Any] = ["prompt", "mixture", None, *names, {"add": 0.5, "max": 0.5}]
    alone: dict[Any, Any] = {}
    with t2k.batch_invariant():
        for _ in range(BATCHES):
            given = rng.choice(strategies)
            prompts = [rng.choice(pool) for _ in range(rng.randint(1, 12))]
            each = [rng.choice(strategies[2:]) for _ in prompts]
            passes = given if given in ("prompt", "mixture") else each
            outputs = t2.generate(prompts, passes, max_new_tokens=10)
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
                own = passes if isinstance(passes, str) else each[index : index + 1]
                key = (prompt, repr(own))
                if key not in alone:
                    alone[key] = t2.generate([prompt], own, max_new_tokens=10)[0]
                assert output.text == alone[key].text
                assert output.probabilities == alone[key].probabilities
                assert output.mixture == alone[key].mixture


SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def odd_llama() -> Any:
    """Sizes that are multiples of nothing, grouped heads, an lm_head of its own."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=53, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def odd_gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=30, n_layer=2, n_head=3, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config)


def odd_gemma() -> Any:
    """Sliding windows, another norm and another activation."""
    config = transformers.Gemma3TextConfig(
        vocab_size=61, hidden_size=36, intermediate_size=53, num_hidden_layers=2, head_dim=10,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def odd_gemma2(cap: float | None = None) -> Any:
    """Logits capped at the end; scores of attention, if `cap` says so."""
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=10, attn_logit_softcapping=cap)
    )


@pytest.mark.parametrize("make", [odd_llama, odd_gpt2, odd_gemma, odd_gemma2])
def test_logits_of_other_models(make: Any) -> None:
    """A row's logits with a cache, left padding and mixtures, bit by bit, at odd sizes."""
    torch.manual_seed(0)
    model = make().eval()
    t2k.convert(model, targets="mlp", progress=False)
    bank = random_experts(model, ("a", "b"), 0.3)
    mixtures: list[Any] = ["a", None, {"a": 0.5, "b": 0.5}, "b", "a"]
    lengths = [3, 9, 1, 14, 6]
    rows = [torch.randint(3, 60, (n,)).tolist() for n in lengths]
    steps = torch.randint(3, 60, (5, 3))

    def logits(which: list[int]) -> torch.Tensor:
        width = max(lengths[i] for i in which)
        ids = torch.tensor([[0] * (width - lengths[i]) + rows[i] for i in which])
        mask = torch.tensor([[0] * (width - lengths[i]) + [1] * lengths[i] for i in which])
        found, cache = [], None
        with torch.no_grad(), bank.use([mixtures[i] for i in which]):
            for step in range(4):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                found.append(out.logits[:, -1])
                if step < 3:
                    cache, ids = out.past_key_values, steps[which, step : step + 1]
                    mask = torch.cat([mask, torch.ones(len(which), 1, dtype=mask.dtype)], 1)
        return torch.stack(found)

    usual = logits(list(range(5)))
    with t2k.batch_invariant(), invariant_model(model):
        together = logits(list(range(5)))
        torch.testing.assert_close(together, usual, atol=1e-3, rtol=1e-3)
        for which in ([0], [1], [2], [3], [4], [4, 1], [2, 0, 3]):
            assert torch.equal(logits(which), together[:, which]), which
    assert torch.equal(logits(list(range(5))), usual), "outside, everything is as before"


def test_the_model_is_as_before(tiny: Any, tokenizer: Any) -> None:
    before = {name: dict(module.__dict__) for name, module in tiny.named_modules()}
    attention = tiny.config._attn_implementation
    inside = pytest.raises(RuntimeError, match="inside")
    with inside, t2k.batch_invariant(), invariant_model(tiny):
        assert tiny.config._attn_implementation == NAME and "forward" in vars(tiny.lm_head)
        raise RuntimeError("inside")
    assert tiny.config._attn_implementation == attention
    assert all(
        ("forward" in vars(module)) == ("forward" in before[name])
        for name, module in tiny.named_modules()
    )


def test_what_cannot_be_invariant_is_refused(tiny: Any) -> None:
    with (
        pytest.raises(RuntimeError, match="enter t2kernels.batch_invariant"),
        invariant_model(tiny),
    ):
        pass
    invariant = t2k.batch_invariant
    tiny.deep = torch.nn.Parameter(torch.zeros(2, 2, 2))
    deep = pytest.raises(RuntimeError, match="more than two dimensions")
    with invariant(), deep, invariant_model(tiny):
        pass
    del tiny.deep
    tiny.model.rotary_emb.rope_type = "dynamic"
    longest = pytest.raises(RuntimeError, match="longest row")
    with invariant(), longest, invariant_model(tiny):
        pass
    assert "forward" not in vars(tiny.lm_head)


def longrope() -> Any:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 9,
        "long_factor": [2.0] * 9, "factor": 2.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SIZES, rope_parameters=rope, pad_token_id=0, eos_token_id=2)
    )


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope))


def llava() -> Any:
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=transformers.LlamaConfig(**SIZES), image_token_id=3,
        image_seq_length=16,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (mixtral, "more than two dimensions .*experts"),
        (mamba, "more than two dimensions .*conv1d"),
        (llava, "more than two dimensions .*patch_embedding"),
        (bloom, "attention of BloomForCausalLM cannot be replaced"),
        (lambda: odd_gemma2(50.0), "caps its scores .attn_logit_softcapping=50.0"),
        (dynamic, "type 'dynamic' depend on the longest row"),
        (longrope, "type 'longrope' depend on the longest row"),
    ],
    ids=["experts", "convolution", "tower", "attention", "cap", "dynamic", "longrope"],
)
def test_models_that_are_refused(make: Any, said: str) -> None:
    """When the block is entered, and they are left as they were."""
    model = make().eval()
    before = model.config._attn_implementation
    refused = pytest.raises(RuntimeError, match=said + ".*Generate outside batch_invariant")
    with t2k.batch_invariant(), refused, invariant_model(model):
        raise AssertionError("entered")
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_attention_of_other_kinds_is_refused_where_it_is_met() -> None:
    x = torch.zeros(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    module = torch.nn.Module()
    for more in ({"softcap": 50.0}, {"sinks": torch.zeros(2)}):
        with pytest.raises(RuntimeError, match="no soft cap and no sinks"):
            _attention(module, x, x, x, mask, **more)
    with pytest.raises(RuntimeError, match="the model gave no mask"):
        _attention(module, x, x, x, None)
