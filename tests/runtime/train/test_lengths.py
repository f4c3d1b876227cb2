"""Problems beyond the model's context: left out and counted, or refused, before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.prompt import Categories
from t2runtime.cli import main
from t2runtime.tasks import Generated, Problem
from t2runtime.train import Config, train
from t2runtime.train.lengths import Fitting, fitting


def changed(cfg: Config, **changes: Any) -> Config:
    return Config(**{**vars(cfg), **changes})


def write(folder: Path, long: dict[str, int], answer: str = "a") -> Path:
    """Twenty rows a split, of which some have prompts of 70 letters; the context holds 64."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = [
            {"prompt": f"{split[1]}{i}".ljust(70 if i < long.get(split, 0) else 4, "="),
             "answer": answer}
            for i in range(20)
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def data(folder: Path) -> Any:
    from t2runtime.tasks import jsonl

    return jsonl.load("letters", folder)


def test_nothing_changes_where_all_fits(
    tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    cfg = changed(quick, max_new_tokens=1)
    for plain in (data(write(tmp_path, {})), Generated("add")):
        fits = fitting(plain, tiny, tokenizer, cfg)
        for split in ("train", "validation", "test"):
            for count in (1, 7, 30):
                assert fits(count, split, 3) == plain(count, split, 3)
        assert isinstance(fits, Fitting) and fits.left_out == {}
        assert fitting(fits, tiny, tokenizer, cfg) is fits
    monkeypatch.setattr("t2runtime.train.lengths.context_length", lambda model: None)
    assert fitting(plain, tiny, tokenizer, cfg) is plain


def test_long_ones_are_left_out_and_counted(
    tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path, caplog: Any
) -> None:
    """A step has as many prompts as ever; what is missing is said where the run is kept."""
    cfg = changed(quick, steps=6, max_new_tokens=1, prompts=16)
    plain = data(write(tmp_path / "data", {"train": 3, "validation": 2}))
    lines: list[Any] = []
    expert = train(tiny, tokenizer, plain, cfg, tmp_path / "run", lines.append)
    assert len(lines) == 6 and expert.metadata["left_out"] == {"train": 3, "validation": 2}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["given"]["left_out"] == {"train": 3, "validation": 2}
    assert "3 different train prompts left out" in caplog.text
    fits = fitting(plain, tiny, tokenizer, cfg)
    for seed in range(5):
        drawn = fits(16, "train", seed)
        assert len({p.prompt for p in drawn}) == 16 and all(len(p.prompt) < 60 for p in drawn)
    assert len(fits(20, "validation", 0)) == 18 and len(fits(20, "train", 0)) == 20


def test_they_are_an_error_where_wanted(
    tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path
) -> None:
    """Also where the first step would not draw one."""
    cfg = changed(quick, max_new_tokens=1, long_prompts="error", prompts=1, checkpoint_every=1)
    for split, count in (("train", 1), ("validation", 2)):
        plain = data(write(tmp_path / split, {split: count}))
        with pytest.raises(ValueError, match=f"{count} of 20 {split} .*'letters' do not fit.*skip"):
            train(tiny, tokenizer, plain, cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_too_long_is_an_error_at_once(
    tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path
) -> None:
    plain = data(write(tmp_path, {"validation": 20}))
    with pytest.raises(ValueError, match="20 of 20 validation problems .* do not fit"):
        train(tiny, tokenizer, plain, changed(quick, max_new_tokens=1))


def test_what_is_learnt_must_fit_too(
    tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path
) -> None:
    """Prompts of 5 tokens, answers of 58 and the end: 64. One letter more is one too many."""
    for letters, left in ((58, {}), (59, {"train": 20})):
        plain = data(write(tmp_path, {}, "a" * letters))
        cfg = changed(quick, objective="next-token", max_new_tokens=1, steps=1)
        fits = Fitting(plain, tiny, tokenizer, cfg)
        if left:
            with pytest.raises(ValueError, match="20 of 20 train .* 60 new ones .*text to learn"):
                fits(20, "train", 0)
        else:
            assert len(fits(20, "train", 0)) == 20
        assert fits(20, "validation", 0), "which is generated"


def test_sources_without_end(tiny: Any, tokenizer: Any, quick: Config, tmp_path: Path) -> None:
    """Categories of two tasks cannot list their problems: each draw is looked at."""
    parts = {n: data(write(tmp_path / n, {"train": 10, "test": 5})) for n in ("one", "two")}
    plain = CategorySource(parts, Categories(("one", "two"), "{question}?"))
    cfg = changed(quick, max_new_tokens=1)
    fits = fitting(plain, tiny, tokenizer, cfg)
    for seed in range(8):
        assert len(fits(8, "train", seed)) == 8
    assert len(fits(40, "test", 0)) == 30, "twenty of each, five of them too long"


def test_the_command_tests_what_fits(
    tmp_path: Path, capsys: Any, small: Any, monkeypatch: Any
) -> None:
    """The test problems are looked at before the training, not after it."""
    monkeypatch.chdir(tmp_path)
    texts = [f"ab{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    rows = [{"prompt": f"say {text}=", "answer": text} for text in texts]
    rows += [{"prompt": f"say {'x' * 60}{a}=", "answer": "x"} for a in map(str, range(60))]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    few = ["--steps", "1", "--prompts", "4", "--samples", "2", "--validation-problems", "4"]
    words = ["train", "small", "--task", "own.jsonl", "--max-new-tokens", "6", *few]
    assert main([*words, "--out", "e.safetensors"]) == 0, capsys.readouterr()
    left = t2k.Expert.load("e.safetensors").metadata["left_out"]
    assert left["train"] > 5 and left["test"] > 0
    assert f"| left out test | {left['test']} |" in Path("e.md").read_text()
    capsys.readouterr()
    assert main([*words, "--out", "f.safetensors", "--long-prompts", "error"]) == 2
    err = capsys.readouterr().err
    assert "do not fit" in err and "--long-prompts" in err and not Path("f").exists()


def test_one_warning_and_none_of_the_tokenizers(
    tiny: Any, tokenizer: Any, capsys: Any, caplog: Any
) -> None:
    """transformers would announce indexing errors, which cannot come."""
    other = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, model_max_length=16)
    other.pad_token, other.eos_token = tokenizer.pad_token, tokenizer.eos_token
    plain = Generated("add")
    cfg = Config(max_new_tokens=1, objective="next-token")
    fits = Fitting(plain, tiny, other, cfg)
    problem = Problem("1" * 80, "2" * 80, "add")
    assert fits.length(problem, "train") > 160
    assert "indexing errors" not in caplog.text + capsys.readouterr().err
