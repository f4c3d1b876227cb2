"""Names of layers: each family of models, each word, suffixes, expressions, near misses."""

from __future__ import annotations

import pytest

from t2kernels.targets import (
    check_targets,
    classify,
    is_conv1d,
    match,
    same_layer,
    unmatched,
)

ATTENTION = [
    "model.layers.0.self_attn.q_proj",  # Llama, Qwen, Mistral, Gemma
    "model.layers.11.self_attn.o_proj",
    "model.layers.0.self_attn.qkv_proj",  # Phi-3
    "model.layers.0.self_attn.dense",  # Phi
    "transformer.h.0.attn.c_attn",  # GPT-2
    "h.11.attn.c_proj",
    "bert.encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.output.dense",
    "vit.encoder.layer.0.attention.attention.value",
    "vit.encoder.layer.3.attention.output.dense",
    "model.decoder.layers.0.self_attn.out_proj",  # OPT
    "model.decoder.layers.0.encoder_attn.k_proj",  # BART
    "gpt_neox.layers.0.attention.query_key_value",
    "gpt_neox.layers.0.attention.dense",
    "transformer.h.0.self_attention.query_key_value",  # Falcon
    "transformer.h.0.self_attention.dense",
    "encoder.block.0.layer.0.SelfAttention.q",  # T5
    "decoder.block.0.layer.1.EncDecAttention.o",
    "transformer.layer.0.attention.q_lin",  # DistilBERT
]
MLP = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.gate_up_proj",
    "model.layers.0.mlp.fc1",  # Phi
    "transformer.h.0.mlp.c_fc",
    "h.11.mlp.c_proj",
    "bert.encoder.layer.0.intermediate.dense",
    "encoder.layer.0.output.dense",
    "vit.encoder.layer.0.output.dense",
    "model.decoder.layers.0.fc1",  # OPT
    "model.decoder.layers.0.fc2",
    "gpt_neox.layers.0.mlp.dense_h_to_4h",
    "transformer.h.0.mlp.dense_4h_to_h",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "decoder.block.0.layer.2.DenseReluDense.wo",
    "model.layers.0.block_sparse_moe.experts.3.w2",  # Mixtral
    "model.layers.0.mlp.experts.3.up_proj",
    "attention_model.layers.0.mlp.up_proj",
]
OTHERS = {
    "embedding": [
        "model.embed_tokens",
        "transformer.wte",
        "wpe",
        "bert.embeddings.word_embeddings",
        "vit.embeddings.patch_embeddings.projection",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "shared",
        "gpt_neox.embed_in",
        "model.decoder.embed_positions",
    ],
    "head": ["lm_head", "embed_out", "classifier", "score", "cls.predictions.decoder", "output"],
    "norm": [
        "model.layers.0.input_layernorm",
        "model.norm",
        "h.0.ln_1",
        "transformer.ln_f",
        "encoder.layer.0.attention.output.LayerNorm",
        "model.layers.0.self_attn.q_norm",
        "encoder.block.0.layer.0.layer_norm",
        "vit.layernorm",
    ],
    "router": ["model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate", "mlp.router"],
    "other": ["bert.pooler.dense", "model.decoder.project_in", "multi_modal_projector.linear_1"],
}
ALL = [(n, "attention") for n in ATTENTION] + [(n, "mlp") for n in MLP]
ALL += [(n, kind) for kind, names in OTHERS.items() for n in names]


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_classify(name: str, kind: str) -> None:
    assert classify(name) == classify(name + ".weight") == kind
    assert match(name, "mlp") == (kind == "mlp")
    assert match(name, "attention") == (kind == "attention")
    assert match(name, "all-linear") == (kind in ("mlp", "attention", "other"))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", True),
        (["q_proj"], True),
        (("v_proj", "q_proj"), True),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("proj", False),
        ("_proj", False),
        (r".*\.[qv]_proj", True),
        (r"layers\.0", False),
        (["mlp", "attention"], True),
        (["mlp"], False),
    ],
)
def test_suffixes_and_expressions(targets: str | list[str], expected: bool) -> None:
    assert match("model.layers.0.self_attn.q_proj.weight", targets) is expected


def test_exclude() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert not match(name, "all-linear", "attention")
    assert not match(name, "all-linear", ["q_proj"])
    assert not match(name, "all-linear", r"model\.layers\.0\..*")
    assert match(name, "all-linear", ["k_proj"])
    assert match(name, "all-linear", [])


def test_heads_and_routers_only_by_name() -> None:
    assert not match("lm_head", ".*") and match("lm_head", ["lm_head"])
    gate = "model.layers.0.mlp.gate"
    assert not match(gate, "mlp") and not match(gate, ".*gate") and match(gate, "mlp.gate")
    assert not match("model.embed_tokens", "embed_tokens")


def test_near_misses() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm"]
    check_targets(names, ["q_proj", "mlp", r".*up_proj"])
    assert unmatched(names, ["q_proj", "qproj"]) == ["qproj"]
    with pytest.raises(
        ValueError, match=r"'qproj' matches none of 3 layers. Did you mean 'q_proj'"
    ):
        check_targets(names, "qproj")
    with pytest.raises(ValueError, match="'all-linear'"):
        check_targets(names, "all_linear")
    with pytest.raises(ValueError, match="embedding or a norm"):
        check_targets(names, "norm")
    with pytest.raises(ValueError, match="There are"):
        check_targets(names, "zzzzzzzzzz")


@pytest.mark.parametrize("bad", [3, None, [1], {"a": 1}])
def test_wrong_types(bad: object) -> None:
    with pytest.raises(TypeError, match="targets must"):
        match("a.b", bad)  # type: ignore[arg-type]


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        match("a.b", [])
    with pytest.raises(ValueError, match="empty string"):
        match("a.b", [""])
    with pytest.raises(ValueError, match="regular expression"):
        match("a.b", "a(")


def test_conv1d() -> None:
    assert is_conv1d("h.0.mlp.c_fc.weight", {"gpt2"})
    assert not is_conv1d("h.0.mlp.c_fc", {"gpt_bigcode"})
    assert not is_conv1d("lm_head", {"gpt2"})


DISK = ["vision_tower.encoder.layers.0.self_attn.q_proj", "language_model.lm_head"] + [
    f"language_model.model.layers.{i}.self_attn.{leaf}" for i in (0, 1) for leaf in ("q_proj", "k")
]


@pytest.mark.parametrize(
    ("name", "stored", "found"),
    [
        ("a.b", ["a.b", "c.a.b"], "a.b"),
        ("transformer.h.0.c_fc", ["h.0.c_fc", "h.1.c_fc"], "h.0.c_fc"),
        ("h.0.c_fc", ["encoder.h.0.c_fc", "decoder.h.0.c_fc"], None),
        ("model.language_model.layers.0.self_attn.q_proj", DISK, DISK[2]),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", DISK, DISK[0]),
        ("lm_head", DISK, DISK[1]),
        # The same parts, but another layer.
        ("layers.1.blocks.0.fc", ["blocks.1.layers.0.fc", "layers.0.blocks.1.fc"], None),
        ("model.other.layers.0.self_attn.q_proj", DISK, None),
        ("a.b.layers.0.fc", ["b.a.layers.0.fc", "x.layers.0.fc"], "b.a.layers.0.fc"),
        ("a.b.c.layers.0.fc", ["b.a.c.layers.0.fc", "c.b.a.layers.0.fc"], None),
    ],
)
def test_the_stored_name_of_a_layer(name: str, stored: list[str], found: str | None) -> None:
    assert same_layer(name, stored) == found


def test_values_tell_what_names_do_not() -> None:
    stored = ["x.layers.0.fc", "y.layers.0.fc", "y.layers.1.fc", "z.layers.0.gc"]
    asked: list[str] = []

    def second(name: str) -> bool:
        asked.append(name)
        return name.startswith("y")

    assert same_layer("a.b.layers.0.fc", stored, second) == "y.layers.0.fc"
    assert asked == stored[:2]
    assert same_layer("a.b.layers.0.fc", stored, lambda name: False) is None
    with pytest.raises(ValueError, match=r"'a.b.layers.0.fc'.*x.layers.0.fc, y.layers.0.fc"):
        same_layer("a.b.layers.0.fc", stored, lambda name: True)
