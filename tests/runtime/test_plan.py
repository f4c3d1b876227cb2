"""`t2 plan`: what it says without weights against what a converted model has and takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import t2kernels as t2k
from t2runtime import plan as planning
from t2runtime.cli import main
from t2runtime.generation import Completions
from t2runtime.meter import Meter
from t2runtime.plan import KEEP, Settings, plan
from t2runtime.skeleton import skeleton
from t2runtime.train import SVF, Config
from t2runtime.train.reinforce import gradient

transformers = pytest.importorskip("transformers")

_LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN3_06B = _QWEN3 | {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_8B = _QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152,
    "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
    "torch_dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny(family: str) -> Any:
    size: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma3"}[family]
    config = getattr(transformers, f"{name}{'Text' if family == 'gemma3' else ''}Config")(**size)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_weights_and_factors_are_those_of_the_converted_model(
    tmp_path: Path, family: str, rank: int | None
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    before = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    report = t2k.convert(model, targets="mlp", rank=rank, progress=False)
    factors = sum(
        t.numel() * t.element_size() for m in t2k.svf_layers(model).values() for t in m.factors
    )
    found = plan(tmp_path, Settings(targets="mlp", rank=rank, rows=2, tokens=8))
    assert found["bytes"]["weights"] == before
    assert found["bytes"]["factors"] == factors
    assert found["bytes"]["z and optimiser"] == 16 * report.trainable
    assert found["values"] == report.trainable and found["layers"] == len(report.converted)
    assert found["skipped"] == report.skipped


def peak_of(run: Any) -> int:
    """Bytes that a call holds at its peak, beyond what there was, by torch's profiler."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    events = record.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("kl", "how"), [*(("exact", how) for how in KEEP), ("k3", "keep"), ("none", "keep")]
)
def test_activations_are_near_those_of_a_real_step(tmp_path: Path, kl: str, how: str) -> None:
    """Within a factor of 1.2 of the trainer's own pass, by torch's record of allocations."""
    model = tiny("llama").eval()
    model.save_pretrained(tmp_path)
    t2k.convert(model, progress=False)
    adapter = SVF(model)
    adapter.start(how == "recompute")
    rows, new, tokens = 4, 32, 64
    cfg = Config(
        kl=0.0 if kl == "none" else 0.1, kl_estimator="exact" if kl == "none" else kl,
        gradient_checkpointing=how == "checkpointing",
    )  # fmt: skip
    ids = torch.randint(3, 90, (rows, tokens))
    ones = torch.ones(rows, new)
    answers = Completions(ids, torch.ones_like(ids), ones.bool(), [""] * rows)

    def step() -> None:
        gradient(model, adapter, answers, ones, ones, cfg)
        for parameter in adapter.parameters().values():
            parameter.grad = None

    real = peak_of(step)
    settings = Settings(rows=rows, tokens=tokens, max_new_tokens=new, kl=kl)
    said = plan(tmp_path, settings)["bytes"]["activations"][how]
    assert real / 1.2 <= said <= 1.2 * real, (said, real)


def test_ways_to_save_memory_order_as_they_must(tmp_path: Path) -> None:
    folder = written(tmp_path, _LLAMA_1B | {"num_hidden_layers": 4})
    found = plan(folder, Settings(rows=2, tokens=256))
    sizes, flops = found["bytes"]["activations"], found["flops"]
    assert sizes["keep"] > sizes["recompute"] > sizes["checkpointing"]
    kept, again, twice = (flops[f"gradient, {how}"] for how in KEEP)
    assert kept < again < twice
    more = plan(folder, Settings(rows=8, rows_per_backward=2, tokens=256))
    assert more["bytes"]["activations"] == sizes
    assert more["flops"]["gradient, keep"] == 4 * kept
    cache = [p["bytes"]["rollout"]["cache"] for p in (found, more)]
    assert cache[1] == 4 * cache[0] and more["peak"]["rollout"] > found["peak"]["rollout"]
    part = plan(folder, Settings(rows=8, rows_per_backward=2, rows_per_rollout=2, tokens=256))
    assert part["bytes"]["rollout"] == found["bytes"]["rollout"]
    k3 = plan(folder, Settings(rows=2, tokens=256, kl="k3"))
    none = plan(folder, Settings(rows=2, tokens=256, kl="none"))
    kept = [p["bytes"]["activations"]["keep"] for p in (found, k3, none)]
    assert kept[0] > kept[1] >= kept[2] and none["flops"]["reference"] == 0
    given = plan(folder, Settings(rows=2, tokens=256, objective="next-token"))
    assert given["flops"]["rollout"] == 0 and "rollout" not in given["peak"]


def test_arithmetic_by_hand(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    rows, tokens = 2, 16
    found = plan(tmp_path, Settings(targets="mlp", rows=rows, tokens=tokens, max_new_tokens=8))
    T, c, h = rows * tokens, model.config, 64
    head = 2 * rows * 9 * h * c.vocab_size
    attention = c.num_hidden_layers * 4 * rows * 4 * tokens * tokens * 16
    qkvo = c.num_hidden_layers * 2 * T * h * (64 + 32 + 32 + 64)
    mlp = c.num_hidden_layers * 2 * T * 3 * h * 160
    dense = qkvo + mlp + attention + head * 8 // 9
    assert found["flops"]["rollout"] == found["flops"]["reference"] == dense
    svf = c.num_hidden_layers * 2 * T * 64 * 3 * (h + 160)
    forward = qkvo + svf + attention + head
    # The first layer's attention is before every z: nothing flows back through it.
    backward = svf + head + (qkvo * 2 + attention * 5) // 3
    gradient = found["flops"]["gradient, keep"]
    assert abs(gradient - forward - backward) <= 0.02 * gradient


@pytest.mark.parametrize(
    ("config", "parameters", "values"),
    [
        (_LLAMA_1B, 1_235_814_400, 16 * (3 * 2048 + 2 * 2048 + 2 * 512)),
        (_QWEN3_06B, 596_049_920, 28 * (3 * 1024 + 4 * 1024)),
        (_QWEN3_8B, 8_190_735_360, 36 * (3 * 4096 + 2 * 4096 + 2 * 1024)),
        (_GEMMA3_1B, 999_885_952, 26 * (3 * 1152 + 2 * 1024 + 2 * 256)),
    ],
    ids=["llama-3.2-1b", "qwen3-0.6b", "qwen3-8b", "gemma3-1b"],
)
def test_real_sizes_from_a_config(
    tmp_path: Path, config: dict[str, Any], parameters: int, values: int, monkeypatch: Any
) -> None:
    """Published parameter counts; one row and one way, so that the test is quick."""
    monkeypatch.setattr(planning, "KEEP", ("checkpointing",))
    found = plan(written(tmp_path, config), Settings(rows=1, tokens=64))
    assert found["parameters"] == parameters and found["values"] == values
    of = found["bytes"]
    assert 2 * parameters <= of["weights"] < 2.01 * parameters
    layers = config["num_hidden_layers"]
    if config["model_type"] != "gemma3_text":
        heads = config["num_key_value_heads"] * config["head_dim"]
        assert of["rollout"]["cache"] == 2 * layers * 64 * heads * 2
    assert min(found["peak"].values()) > of["weights"] + of["factors"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "small", "--targets", "mlp", "--batch", "4", "--tokens", "16"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] is None and found["parameters"] == 858_752
    assert main([*words, "--tflops", "0.05"]) == 0
    assert "the rate you gave" in capsys.readouterr().out
    assert main(words) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "local folder"),
        (("small", "--tokens", "1"), "at least 2"),
        (("small", "--batch", "0"), "rows_per_backward must be"),
        (("small", "--samples", "0"), "--samples"),
        (("small", "--max-new-tokens", "512"), "1 to 511"),
        (("small", "--tflops", "0"), "--tflops"),
        (("small", "--rank", "0"), "rank must be"),
        (("small", "--objective", "next-token", "--kl-estimator", "k3"), "sampled answers"),
        (("small", "--targets", "nothing_proj"), "matches none"),
        (("small", "--dtype", "int4"), "dtype must be"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_a_model_that_needs_values_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    folder = written(tmp_path, _LLAMA_1B | {"num_hidden_layers": 1})
    model = skeleton(folder, "auto")
    model.forward = lambda **more: torch.ones(2, device="meta").nonzero()  # values decide the shape
    monkeypatch.setattr(planning, "skeleton", lambda *words: model)
    with pytest.raises(RuntimeError, match="cannot be run without weights"):
        plan(folder, Settings())


def test_blocks_that_drop_out_by_themselves(tmp_path: Path) -> None:
    config = {
        "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "dropout": 0.1, "num_attention_heads": 2, "vocab_size": 61, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    }  # fmt: skip
    found = plan(written(tmp_path, config), Settings(rows=2, tokens=16))
    assert found["layers"] == 12 and found["values"] == 12 * 32
    sizes = found["bytes"]["activations"]
    assert sizes["keep"] > sizes["checkpointing"] > 0


def test_a_state_that_is_no_cache_of_keys_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mamba: no rollout that could be counted, but a gradient."""
    config = {"model_type": "mamba", "hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61}
    words = ["plan", str(written(tmp_path, config)), "--tokens", "16", "--prompts", "2"]
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "MambaForCausalLM answers without a cache" in said and "'next-token'" in said
    assert main([*words, "--objective", "next-token"]) == 0
    assert "gradient, keep" in capsys.readouterr().out


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, IndexError])
def test_foreign_code_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: Any, error: type[Exception]
) -> None:
    model = skeleton(written(tmp_path, _LLAMA_1B | {"num_hidden_layers": 1}), "auto")

    def forward(**more: Any) -> None:
        raise error("odd")

    model.forward = forward
    monkeypatch.setattr(planning, "skeleton", lambda *words: model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot be run without weights.*odd"):
        plan(tmp_path, Settings())


@pytest.mark.parametrize(
    "config", [{"model_type": "vit"}, {"model_type": "nobody-knows"}, {"model_type": "llama",
    "hidden_size": "wide"}]
)  # fmt: skip
def test_a_config_of_no_causal_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any]
) -> None:
    assert main(["plan", str(written(tmp_path, config))]) == 2
    err = capsys.readouterr().err
    assert "makes no causal language model" in err and len(err) < 600


def test_conv1d_layers(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
    found = plan(written(tmp_path / "gpt2", config), Settings(rows=2, tokens=16))
    assert found["layers"] == 8 and found["values"] == 8 * 32


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_of_a_mixture_in_every_dtype(tmp_path: Path, kind: str) -> None:
    """Twice the bytes in fp32, half the size in fp16 and bf16, and the same arithmetic."""
    config = {
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder = written(tmp_path, config)
    single, half, low = (
        plan(folder, Settings(rows=2, tokens=16, dtype=dtype))
        for dtype in ("float32", "float16", "bfloat16")
    )
    assert half == low and single["flops"] == low["flops"]
    assert single["bytes"]["factors"] > 1.9 * low["bytes"]["factors"]
    for how, size in low["bytes"]["activations"].items():
        assert size < single["bytes"]["activations"][how] < 2 * size


def test_grouped_products_without_memory_have_the_real_shapes() -> None:
    a, b = torch.ones(6, 16), torch.ones(2, 16, 32)
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    real = torch.nn.functional.grouped_mm(a, b, offs=offsets)
    with Meter() as meter:
        made = torch.nn.functional.grouped_mm(a.to("meta"), b.to("meta"), offs=offsets.to("meta"))
    assert (made.shape, made.dtype, made.stride()) == (real.shape, real.dtype, real.stride())
    assert meter.flops == 2 * 6 * 16 * 32


def test_the_meter_knows_what_was_there() -> None:
    weight = torch.zeros(100)
    with Meter([weight]) as meter:
        view = weight.view(10, 10)
        product = view @ view
        del product
    assert meter.peak == 400 and meter.now == 0 and meter.flops == 2000


def test_a_model_without_gradient_checkpointing_is_planned_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.CTRLConfig(
        vocab_size=64, n_embd=32, dff=48, n_layer=2, n_head=2, n_positions=64
    )
    config.architectures = ["CTRLLMHeadModel"]
    config.save_pretrained(tmp_path)
    found = plan(tmp_path, Settings(rows=2, tokens=8, objective="next-token", kl="none"))
    assert list(found["bytes"]["activations"]) == list(KEEP[:-1]) == ["keep", "recompute"]
    assert "gradient, checkpointing" not in found["peak"] | found["flops"]
    words = ["plan", str(tmp_path), "--tokens", "8", "--max-new-tokens", "4"]
    assert main([*words, "--objective", "next-token"]) == 0
    shown = capsys.readouterr().out
    assert "CTRLLMHeadModel does not support gradient checkpointing" in shown
    assert plan(written(tmp_path / "llama", _LLAMA_1B), Settings(rows=1, rows_per_backward=1,
                tokens=4, targets="mlp"))["no_checkpointing"] is None  # fmt: skip
