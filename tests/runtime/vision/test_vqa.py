"""The small LLaVA and its experts on a few drawings: what is kept, moved and refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.generation import complete
from t2runtime.train import loop
from t2runtime.vision import __main__ as command
from t2runtime.vision import llava, vqa
from t2runtime.vision.easy_vqa import KINDS, SKILLS, EasyVQA
from t2runtime.vision.llava import Recipe

RECIPE = Recipe(text_steps=2, steps=2, rows=8)
QUICK = vqa.Settings(
    recipe=RECIPE, steps=2, prompts=2, problems=4, shots=4, population=6, generations=1
)


@pytest.fixture(scope="module")
def made(data: EasyVQA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole measurement with next to no training, and its folder."""
    folder = tmp_path_factory.mktemp("vqa")
    return folder, vqa.measure(data, folder, QUICK)


def test_a_measurement_has_every_number(made: tuple[Path, dict[str, Any]]) -> None:
    _, row = made
    assert set(row["base"]) == set(row["in words"]) == set(KINDS)
    assert all(one["of"] == 4 for one in row["base"].values())
    for way in vqa.WAYS:
        assert set(row["alone"][way]) == set(SKILLS)
        mixed = row["mixed"][way]
        assert mixed["base"]["of"] == 16 and set(mixed["few-shot"]["mixture"]) <= set(SKILLS)
        assert way in vqa.table(row)


def test_what_is_there_is_not_made_again(
    made: tuple[Path, dict[str, Any]], data: EasyVQA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base comes from its folder, experts from their finished runs; the same row comes out."""
    folder, row = made

    def refuse(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(llava, "fit", refuse)
    monkeypatch.setitem(loop._OBJECTIVES, "reinforce", refuse)
    again = vqa.measure(data, folder, QUICK)
    assert {k: again[k] for k in ("base", "alone", "mixed")} == {
        k: row[k] for k in ("base", "alone", "mixed")
    }
    with pytest.raises(ValueError, match="holds a base made by"):
        llava.base(folder / "base", data, Recipe(seed=1))


def test_an_expert_of_the_language_model_fits_the_model_that_sees(
    made: tuple[Path, dict[str, Any]], data: EasyVQA
) -> None:
    """By name, fingerprints included; inside, text gets the very logits that it got outside."""
    folder, _ = made
    setting = vqa.Setting(data, folder, RECIPE)
    bank = t2k.ExpertBank(setting.inside)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in t2k.svf_layers(setting.inside).values():
            layer.z.copy_(1 + 0.5 * torch.randn(layer.rank, generator=generator))
    expert = t2k.Expert.from_model(setting.inside, description="told")
    bank.add("told", expert)
    moved = llava.for_vision(expert)
    assert moved.description == "told" and moved.fingerprints.keys() == moved.z.keys()
    setting.bank.add("told", moved)  # checks the fingerprints
    assert all(name.startswith("model.language_model.") for name in setting.bank.layers)
    ids = torch.tensor(
        [setting.text_tokenizer("a red circle. what shape is present?")["input_ids"]]
    )
    with torch.no_grad():
        with bank.use("told"):
            outside = setting.inside(input_ids=ids).logits
        with setting.bank.use("told"):
            inside = setting.model(input_ids=ids).logits
    torch.testing.assert_close(inside, outside, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="must be one of a language model"):
        llava.for_vision(t2k.Expert({"vit.layers.0.mlp.fc1": torch.ones(3)}))


def test_experts_of_the_earlier_language_model_are_refused_unless_asked_for(
    made: tuple[Path, dict[str, Any]], data: EasyVQA
) -> None:
    setting = vqa.Setting(data, made[0], RECIPE)
    early = llava.for_vision(t2k.Expert.from_model(setting.before))
    with pytest.raises(ValueError, match="another base weight"):
        setting.bank.add("early", early)
    setting.bank.add("early", early, allow_mismatch=True)


def test_rows_of_text_hold_the_right_answer_in_the_minority() -> None:
    rng = random.Random(0)
    problem = llava.Described("negation").draw(rng, "train")
    said = [llava.given(problem, rng)[1] for _ in range(1000)]
    assert 0.25 < said.count(problem.answer) / 1000 < (0.45 if problem.answer == "yes" else 0.65)


def test_shots_are_of_all_kinds_and_of_no_test_image(data: EasyVQA) -> None:
    shots = vqa.shots(data, QUICK)
    assert [shot.category for shot in shots] == list(KINDS)
    tests = {p.prompt for kind in KINDS for p in data.problems["test"][kind]}
    assert not tests & {shot.prompt for shot in shots}


def test_a_converted_tower_refuses_rows_without_images(data: EasyVQA) -> None:
    """Images and texts in one batch: the tower's rows are not the batch's; none is guessed."""
    tokenizer = llava.build_tokenizer()
    torch.manual_seed(0)
    language = llava.LlamaForCausalLM(llava.language_config(len(tokenizer)))
    model = llava.build_model(language, tokenizer).eval()
    t2k.convert(model, progress=False)
    gallery = vqa.Gallery(model, data.images, llava.TOKENS)
    pictures = vqa.PictureTokenizer(tokenizer, gallery)
    bank = t2k.ExpertBank(model)
    bank.add("one", 0.5 * t2k.Expert.from_model(model))
    prompts = ["<image 0> describe.", "a red circle. describe."]
    with bank.use(["one", "one"]), pytest.raises(ValueError, match="first axis is not the batch"):
        complete(model, pictures, prompts, 2)


def test_the_command_keeps_finished_rows(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls: list[int] = []

    def measure(data: Any, folder: Path, settings: Any) -> dict[str, int]:
        calls.append(settings.seed)
        return {"seed": settings.seed}

    monkeypatch.setattr(command.vqa, "measure", measure)
    monkeypatch.setattr(command.vqa, "table", lambda row: f"row {row['seed']}")
    given = ["vqa", "--data", str(drawings), "--out", str(tmp_path / "o"), "--seeds", "0", "2"]
    assert command.main(given) == 0 and command.main(given) == 0
    assert calls == [0, 2] and capsys.readouterr().out.count("row 2") == 2
    with pytest.raises(ValueError, match="was measured with"):
        command.finished(tmp_path / "o" / "vqa0.json", "other", dict)
    assert command.main(["digits", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "error: --data" in capsys.readouterr().err
