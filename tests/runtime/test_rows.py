"""Mixed batches of models that flatten their batch: known ones by themselves, others when told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime import rows
from t2runtime.adapt.fewshot import score_members
from t2runtime.adapt.mixtures import TaskMixture, hashes
from t2runtime.adapt.weights import routing
from t2runtime.cli import main
from t2runtime.engine import Transformer2
from t2runtime.prompts import encode
from t2runtime.tasks import Problem

PROMPTS = ["1+1=", "flip 12345=", "who ann bob cal=", "12+34="]
MIXTURES = ["a", None, {"a": 0.5, "b": 0.3}, "b"]
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 16,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
       "shared_expert_intermediate_size": 40}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPTForCausalLM": ("OPTConfig", {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", TEXT | MOE),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", TEXT | MOE | {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    }),
    "Llama4ForCausalLM": ("Llama4TextConfig", TEXT | {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
    }),
}  # fmt: skip


def built(name: str, vocabulary: int, kind: Any = None) -> Any:
    """A random model whose experts change what it says."""
    torch.manual_seed(0)
    config_class, settings = CONFIGS[name]
    config = getattr(transformers, config_class)(vocab_size=vocabulary, **settings)
    model = (kind or getattr(transformers, name))(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def banked(model: Any, row_order: str | None = None) -> t2k.ExpertBank:
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model, row_order)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        here = t2k.Expert.from_model(model).z.items()
        bank.add(
            name, t2k.Expert({n: 1 + torch.randn(z.shape, generator=generator) for n, z in here})
        )
    return bank


@pytest.fixture
def opt(tokenizer: Any) -> Any:
    return built("OPTForCausalLM", len(tokenizer))


class Strange(transformers.OPTForCausalLM):  # type: ignore[misc]
    """A model that nobody has read."""


@pytest.mark.parametrize("name", sorted(rows.FLAT))
def test_a_known_model_answers_a_mixed_batch(name: str, tokenizer: Any) -> None:
    """Each row is that request alone, in forwards, answers and beams."""
    model = built(name, len(tokenizer))
    bank = banked(model)
    ids, mask = encode(tokenizer, PROMPTS, model.device)
    options = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    with pytest.raises(ValueError, match="row_order='flat'"), bank.use(MIXTURES), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)

    t2 = Transformer2(model, tokenizer, bank)
    assert bank.row_order == rows.row_order_of(model) == "flat"
    texts = [output.text for output in t2.generate(PROMPTS, MIXTURES, max_new_tokens=5)]
    with bank.use(MIXTURES), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        beams = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, mixture in enumerate(MIXTURES):
        one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        with bank.use(mixture), torch.no_grad():
            assert torch.allclose(model(**one).logits[0, -1], logits[row, -1], atol=1e-4)
            alone = model.generate(**one, **options)
        assert torch.equal(beams[2 * row : 2 * row + 2, : alone.shape[1]], alone)
        assert texts[row] == t2.generate([PROMPTS[row]], mixture, max_new_tokens=5)[0].text
    base = [output.text for output in t2.generate(PROMPTS, None, max_new_tokens=5)]
    assert texts[1] == base[1] and texts[0] != base[0], "the experts matter"


def test_what_is_not_known_is_not_guessed(opt: Any, tiny: Any, tokenizer: Any) -> None:
    """Other models, models that only look like a known one, routed experts that are layers."""
    t2k.convert(opt, progress=False)
    strange = built("OPTForCausalLM", len(tokenizer), Strange)
    t2k.convert(strange, progress=False)
    assert [rows.row_order_of(m) for m in (opt, strange, tiny)] == ["flat", None, None]
    moe = built("Qwen2MoeForCausalLM", len(tokenizer))
    moe.model.layers[0].mlp.experts.up = torch.nn.Linear(8, 8)
    t2k.convert(moe, progress=False)
    assert rows.row_order_of(moe) is None


def test_an_unknown_model_is_told(tokenizer: Any) -> None:
    """One mixture for all requests needs no word of the user; different ones do."""
    bank = banked(built("OPTForCausalLM", len(tokenizer), Strange))
    t2 = Transformer2(bank.model, tokenizer, bank)
    assert bank.row_order is None
    same = [output.text for output in t2.generate(PROMPTS, "a", max_new_tokens=5)]
    assert len(set(same)) > 1
    assert [o.text for o in t2.generate(PROMPTS, ["a"] * 4, max_new_tokens=5)] == same
    with pytest.raises(ValueError, match="row_order='flat'"):
        t2.generate(PROMPTS, MIXTURES, max_new_tokens=5)
    told = Transformer2(bank.model, tokenizer, bank, row_order="flat")
    outputs = told.generate(PROMPTS, MIXTURES, max_new_tokens=5)
    for prompt, mixture, output in zip(PROMPTS, MIXTURES, outputs, strict=True):
        assert output.text == told.generate([prompt], mixture, max_new_tokens=5)[0].text


def test_a_search_on_flattened_batches(opt: Any, tokenizer: Any) -> None:
    """Members side by side score as each alone."""
    bank = banked(opt, "flat")
    shots = [Problem("12+34=", "46", "x"), Problem("flip 123=", "321", "x")]
    members = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.3, 0.9]])

    def scores(some: torch.Tensor) -> torch.Tensor:
        return score_members(opt, tokenizer, bank, ["a", "b"], shots, some, 3)

    together = scores(members)
    assert len(set(together[:, 1].tolist())) == 3
    for row, member in enumerate(members):
        assert torch.allclose(together[row], scores(member[None])[0], atol=1e-4)


def test_equal_mixtures_are_one(opt: Any) -> None:
    """Also where they are said differently, or have weights per layer."""
    bank = banked(opt)
    flat = TaskMixture("t", {"a": 1.0}, hashes(bank))
    deep = TaskMixture("t", {bank.layers[1]: {"a": 0.4, "b": 0.9}}, hashes(bank))
    assert routing(bank, ["a", {"a": 1}, flat]) == {"a": 1.0} and routing(bank, [None] * 2) == {}
    assert routing(bank, ["a", None]) == [{"a": 1.0}, {}]
    one, two = routing(bank, [deep, deep]), routing(bank, [deep, None])
    assert isinstance(one, torch.Tensor) and one.shape == (1, len(bank.layers), 2)
    assert isinstance(two, torch.Tensor) and two.shape == (2, len(bank.layers), 2)
    with bank.use(one), torch.no_grad():
        opt(input_ids=torch.ones(3, 4, dtype=torch.long))


def test_the_commands_say_it(
    opt: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A known model needs no flag; where the model is not known the error names it."""
    folder, out = str(tmp_path / "opt"), str(tmp_path / "out")
    opt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(["demo", "--model", folder, "--out", out]) == 0
    monkeypatch.setattr(rows, "FLAT", {})
    assert main(["demo", "--model", folder, "--out", out]) == 2
    said = capsys.readouterr().err
    assert "--row-order batch (" in said and "--row-order flat (" in said and "slot=" not in said
    assert main(["demo", "--model", folder, "--out", out, "--row-order", "flat"]) == 0
    assert main(["demo", "--row-order", "flat", "--out", out]) == 2
    assert "--row-order goes with --model" in capsys.readouterr().err

    bank, words = banked(opt), ["--prompt", "1+1=", "--prompt", "flip 12345="]
    bank.save(tmp_path / "experts")
    words += ["--expert", str(tmp_path / "experts"), "--max-new-tokens", "3", "--json"]
    assert main(["generate", folder, *words]) == 0, "one mixture for all"
    capsys.readouterr()
    assert main(["generate", folder, "--strategy", "mixture", *words]) == 2
    assert "--row-order flat (" in capsys.readouterr().err
    assert main(["generate", folder, "--strategy", "mixture", "--row-order", "flat", *words]) == 0
