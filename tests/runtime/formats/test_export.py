"""Merged checkpoints, LoRA adapters, merged experts; read back by plain transformers and PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import t2kernels as t2k
from t2kernels.files import SaveError
from t2runtime.cli import main
from t2runtime.formats import folder as folders
from t2runtime.formats import merged
from t2runtime.formats.folder import new_folder
from t2runtime.formats.mixture import combine

Make = Callable[..., Path]


def export(folder: Path, out: Path, *words: str) -> int:
    return main(["export", str(folder), "--out", str(out), *words])


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_is_the_merged_model(
    make: Make, tools: Any, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder = make(family, dtype, shard="20KB" if family != "gpt2" else "5GB")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        tools.write_expert(folder, file, seed)
    out = tmp_path / "out"
    code = export(folder, out, "--experts", *map(str, files), "--mix", "0.7", "0.3")
    assert code == 0
    model = tools.load(folder)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for file in files:
        bank.add(file.stem, t2k.Expert.load(file))
    bank.merge({"a": 0.7, "b": 0.3})
    exported = tools.load(out)
    assert exported.dtype == dtype
    assert torch.equal(tools.logits(exported), tools.logits(model))
    assert not torch.equal(tools.logits(exported), tools.logits(tools.load(folder)))
    assert set(listing(folder)) <= set(listing(out))
    assert "0.7 × a" in (out / "README.md").read_text()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_names_without_the_leading_part(make: Make, tools: Any, tmp_path: Path) -> None:
    """GPT-2 on the hub: h.0.mlp.c_fc in the file, transformer.h.0.mlp.c_fc in the model."""
    folder = make("gpt2")
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    expert = tools.write_expert(folder, tmp_path / "a.safetensors")
    assert all(name.startswith("transformer.h.") for name in expert.z)
    words = ("--experts", str(tmp_path / "a.safetensors"))
    assert export(folder, tmp_path / "out", *words) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    model = tools.load(folder)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("a", expert)
    bank.merge("a")
    assert torch.equal(tools.logits(tools.load(tmp_path / "out")), tools.logits(model))


@pytest.mark.parametrize("form", ["paper", "paper-normalised", "authors"])
def test_every_form_of_mixing(make: Make, tools: Any, tmp_path: Path, form: str) -> None:
    folder = make("llama")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        tools.write_expert(folder, file, seed, "mlp")
    words = ["--experts", *map(str, files), "--mix", "0.5", "0.2", "--form", form]
    assert export(folder, tmp_path / "out", *words) == 0
    assert export(folder, tmp_path / "one.safetensors", *words, "--as-expert") == 0
    model = tools.load(folder)
    t2k.convert(model, targets="mlp", progress=False)
    bank = t2k.ExpertBank(model)
    for file in (*files, tmp_path / "one.safetensors"):
        bank.add(file.stem, t2k.Expert.load(file))
    bank.merge({"a": 0.5, "b": 0.2}, mixture=form)
    truth = tools.logits(model)
    assert torch.equal(tools.logits(tools.load(tmp_path / "out")), truth)
    bank.unmerge()
    bank.merge("one")
    torch.testing.assert_close(tools.logits(model), truth, atol=2e-5, rtol=2e-5)


def test_another_dtype(make: Make, tools: Any, tmp_path: Path) -> None:
    """bf16 to fp32 is the merge of the model loaded in fp32, bf16 to fp16 that merge rounded."""
    folder = make("llama", torch.bfloat16, shard="20KB")
    tools.write_expert(folder, tmp_path / "a.safetensors")
    words = ("--experts", str(tmp_path / "a.safetensors"), "--dtype", "float32")
    assert export(folder, tmp_path / "out", *words) == 0
    model = tools.load(folder, torch.float32)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert.load(tmp_path / "a.safetensors"))
    bank.merge("a")
    exported = tools.load(tmp_path / "out")
    assert exported.dtype == torch.float32
    assert torch.equal(tools.logits(exported), tools.logits(model))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = sum(p.numel() * 4 for p in exported.parameters())
    assert index["metadata"]["total_size"] == sizes
    assert export(folder, tmp_path / "half", *words[:-1], "float16") == 0
    half = tools.load(tmp_path / "half")
    for name, parameter in exported.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.half()), name


def test_an_expert_of_few_components_and_factors_from_a_folder(
    make: Make, tools: Any, tmp_path: Path
) -> None:
    folder = make("llama")
    model = tools.load(folder)
    t2k.convert(model, targets="attention", rank=5, progress=False)
    expert = tools.random_expert(model, 3)
    expert.save(tmp_path / "a.safetensors")
    t2k.decompose_checkpoint(folder, tmp_path / "store", progress=False)
    words = ("--experts", str(tmp_path / "a.safetensors"), "--factors", str(tmp_path / "store"))
    assert export(folder, tmp_path / "out", *words) == 0
    bank = t2k.ExpertBank(model)
    bank.add("a", expert)
    bank.merge("a")
    found = tools.logits(tools.load(tmp_path / "out"))
    torch.testing.assert_close(found, tools.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_is_the_best_of_its_rank(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    peft = pytest.importorskip("peft")
    folder = make(family)
    expert = tools.write_expert(folder, tmp_path / "a.safetensors")
    words = ("--experts", str(tmp_path / "a.safetensors"))
    for rank in (4, 32):
        out = tmp_path / f"lora{rank}"
        assert export(folder, out, *words, "--lora-rank", str(rank), "--json") == 0
        errors = json.loads(capsys.readouterr().out)["error"]
        base = tools.load(folder)
        weights = {n: m.weight.detach().clone() for n, m in base.named_modules() if n in expert.z}
        tuned = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
        t2k.convert(plain := tools.load(folder), progress=False)
        bank = t2k.ExpertBank(plain)
        bank.add("a", expert)
        bank.merge("a")
        for name, weight in weights.items():
            wanted = plain.get_submodule(name).weight.detach() - weight
            got = tuned.get_submodule(name).weight.detach() - weight
            s = torch.linalg.svdvals(wanted.double())
            best = float(s[rank:].norm() / s.norm())
            error = float((wanted - got).double().norm() / wanted.double().norm())
            assert abs(error - best) < 1e-4 and abs(errors[name] - best) < 1e-4
        if rank == 32:  # all there is
            torch.testing.assert_close(
                tools.logits(tuned), tools.logits(plain), atol=1e-4, rtol=1e-4
            )
    config = json.loads((tmp_path / "lora4" / "adapter_config.json").read_text())
    assert "mlp.c_proj" not in config["target_modules"] and config["r"] == 4
    assert all("." not in name for name in config["target_modules"])


def test_a_lora_of_some_layers_names_them_in_full(make: Make, tools: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = make("llama")
    whole = tools.write_expert(folder, tmp_path / "a.safetensors")
    name = "model.layers.1.mlp.up_proj"
    some = t2k.Expert({name: whole.z[name]}, {name: whole.fingerprints[name]})
    some.save(tmp_path / "b.safetensors")
    words = ("--experts", str(tmp_path / "b.safetensors"), "--lora-rank", "2")
    assert export(folder, tmp_path / "out", *words) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [name]
    tuned = peft.PeftModel.from_pretrained(tools.load(folder), tmp_path / "out")
    assert len([n for n, _ in tuned.named_parameters() if "lora_A" in n]) == 1


def test_a_lora_that_misses_too_much_is_refused(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("llama")
    tools.write_expert(folder, tmp_path / "a.safetensors")
    before = listing(tmp_path)
    words = ("--experts", str(tmp_path / "a.safetensors"), "--lora-rank", "2")
    assert export(folder, tmp_path / "out", *words, "--max-error", "0.1") == 2
    assert "--max-error" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert export(folder, tmp_path / "out", *words, "--max-error", "0.999") == 0
    assert "LoRA misses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora-rank", "0"), "at least 1"),
        (("--lora-rank", "2", "--as-expert"), "two forms"),
        (("--max-error", "0.1"), "--lora-rank as well"),
        (("--mix", "1", "2"), "one weight per expert"),
        (("--mix", "nan"), "finite"),
        (("--dtype", "int8"), "--dtype must be"),
        (("--as-expert",), "must end in .safetensors"),
        (("--form", "paper-normalised", "--mix", "0"), "which is 0"),
    ],
)
def test_mistakes(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    folder = make("llama")
    tools.write_expert(folder, tmp_path / "a.safetensors")
    before = listing(tmp_path)
    assert export(folder, tmp_path / "out", "--experts", str(tmp_path / "a.safetensors"), *words)
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and listing(tmp_path) == before


def test_the_wrong_model_and_a_full_folder(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = make("llama"), make("llama", name="other", seed=1)
    tools.write_expert(folder, tmp_path / "a.safetensors")
    before = listing(tmp_path)
    words = ("--experts", str(tmp_path / "a.safetensors"))
    for form in ((), ("--lora-rank", "2")):
        assert export(other, tmp_path / "out", *words, *form) == 2
        assert "another base weight" in capsys.readouterr().err
        assert listing(tmp_path) == before
    assert export(make("gpt2", name="third"), tmp_path / "out", *words) == 2
    assert "another model" in capsys.readouterr().err
    assert export(other, tmp_path / "out", *words, "--allow-mismatch") == 0
    held = (tmp_path / "out" / "config.json").read_bytes()
    assert export(folder, tmp_path / "out", *words) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").read_bytes() == held


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SaveError, match="No space left"), new_folder(out) as part:
        (part / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert not listing(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_folder(out) as part:
        raise KeyboardInterrupt
    assert not listing(tmp_path)
    # What a killed writer left is cleared away, another that is at work is left alone.
    left = tmp_path / f".out.dead{folders._TEMPORARY}"
    left.mkdir()
    (left / "half").write_text("x")
    with new_folder(out) as part:
        assert not left.exists()
        with new_folder(tmp_path / "second"):
            pass
        (part / "whole").write_text("x")
        with new_folder(out) as rival:
            assert part.exists() and rival != part
            (rival / "other").write_text("y")
        # The rival was first: its folder stays as it is.
        assert listing(out) == ["other"]
        out.joinpath("other").unlink()
    assert listing(tmp_path) == ["out", "second"] and listing(out) == ["whole"]


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
def test_a_killed_writer_leaves_nothing_in_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
import pathlib, time
from t2runtime.formats.folder import new_folder
with new_folder(pathlib.Path({str(out)!r})) as part:
    (part / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "writing\n"
        job.kill()
    assert not out.exists() and len(listing(tmp_path)) == 1
    with new_folder(out) as part:
        (part / "whole").write_text("x")
    assert listing(tmp_path) == ["out"] and listing(out) == ["whole"]


def test_a_full_disk_leaves_nothing(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder = make("llama", shard="20KB")
    tools.write_expert(folder, tmp_path / "a.safetensors")
    before, written = listing(tmp_path), []

    def full(tensors: Any, path: str, **more: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        Path(path).write_bytes(b"a shard")

    monkeypatch.setattr(merged, "save_file", full)
    assert export(folder, tmp_path / "out", "--experts", str(tmp_path / "a.safetensors")) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(written) == 2 and listing(tmp_path) == before


def test_combine_checks_what_it_mixes() -> None:
    a = t2k.Expert({"up": torch.tensor([3.0, 1.0])}, {"up": "x"})
    b = t2k.Expert({"down": torch.tensor([2.0])}, {"down": "y"})
    both = combine([a, b], [1.0, 0.5])
    assert both.z["up"].tolist() == [3.0, 1.0] and both.z["down"].tolist() == [1.5]
    assert both.fingerprints == {"up": "x", "down": "y"}
    short = t2k.Expert({"up": torch.tensor([2.0])}, {"up": "x"})
    assert combine([a, short], [1.0, 1.0]).z["up"].tolist() == [4.0, 1.0]
    other = t2k.Expert({"up": torch.ones(2)}, {"up": "z"})
    with pytest.raises(ValueError, match="different base weights"):
        combine([a, other], [1.0, 1.0])
    with pytest.raises(ValueError, match="different ranks"):
        combine([t2k.Expert({"up": torch.ones(2)}), t2k.Expert({"up": torch.ones(3)})], [1.0, 1.0])
    with pytest.raises(ValueError, match="needs sigma"):
        combine([a], [1.0], "authors")
    with pytest.raises(ValueError, match="as many weights"):
        combine([], [])


def test_a_lora_tuned_model_takes_svf_experts_on_top(
    make: Make, tools: Any, tmp_path: Path
) -> None:
    """LoRA merged, saved, decomposed; the expert belongs to the tuned weights and to no others."""
    peft = pytest.importorskip("peft")
    folder = make("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tools.load(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    tuned = model.merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    expert = tools.write_expert(tmp_path / "tuned", tmp_path / "a.safetensors")
    words = ("--experts", str(tmp_path / "a.safetensors"))
    assert export(tmp_path / "tuned", tmp_path / "out", *words) == 0
    assert export(folder, tmp_path / "no", *words) == 2
    t2k.convert(tuned, progress=False)
    bank = t2k.ExpertBank(tuned)
    bank.add("a", expert)
    bank.merge("a")
    assert torch.equal(tools.logits(tools.load(tmp_path / "out")), tools.logits(tuned))
