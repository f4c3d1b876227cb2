"""Several skills under one mixture: what is measured, and what the rows say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.claims import compose
from t2runtime.claims.claim import judge
from t2runtime.claims.units import KINDS, Context
from t2runtime.demo.small import SKILLS

STORIES = Path(os.environ.get("T2_MODELS", Path(__file__).parents[4] / "shared" / "models"))
TINY = {"train.steps": 1, "train.prompts": 2, "train.samples": 2, "train.validation_problems": 2}


def context(out: Path, kind: str, **more: Any) -> Context:
    stories = more.pop("stories", None)
    return Context(out, stories=stories, settings={**KINDS[kind].settings, **TINY, **more})


def story_row(**by_form: float) -> dict[str, Any]:
    """A row in which every expert alone reaches 20 % of every set."""
    alone = {compose.joined(names): 20.0 for names in compose.STORY_SETS}
    singles = dict.fromkeys(compose.PROPERTIES, 50.0)
    share = {name: {**singles, **alone} for name in (compose.BASE, *compose.PROPERTIES)}
    for names in compose.STORY_SETS:
        for form in compose.FORMS:
            reached = by_form.get(form.replace("-", "_"), 10.0)
            share[compose.way(names, form)] = {**singles, **dict.fromkeys(alone, reached)}
    return {"stories": 100, "share": share}


def question_row(pair: float, chained: float) -> dict[str, Any]:
    one = {**dict.fromkeys(SKILLS, 40.0), **{task.name: 1.0 for task in compose.CHAINED.values()}}
    accuracy = {name: dict(one) for name in (compose.BASE, *SKILLS)}
    for names in compose.SKILL_SETS:
        for form in compose.FORMS:
            own = {
                **dict.fromkeys(SKILLS, pair),
                **dict.fromkeys(list(one)[len(SKILLS) :], chained),
            }
            accuracy[compose.way(names, form)] = own
    return {"problems": 10, "accuracy": accuracy, "sampled": {"base": {"x": 0.5}}}


def test_chained_tasks_need_both_skills() -> None:
    reverse, largest = compose.CHAINED.values()
    (problem,) = reverse.problems(1, "test", 0)
    a, b = map(int, problem.prompt.split()[1].rstrip("=").split("+"))
    assert problem.prompt.split()[0] in ("turn", "flip")
    assert problem.answer == str(a + b)[::-1]
    (problem,) = largest.problems(1, "test", 0)
    a, b = map(int, problem.prompt.split()[1].rstrip("=").split("+"))
    assert problem.prompt.split()[0] in ("top", "peak")
    assert problem.answer == max(str(a + b))


def test_every_form_is_its_own_mixture(small: tuple[Any, Any]) -> None:
    """With weight 1 each; the normalised form is both the paper's and ours at weights 1/K."""
    model, _ = small
    here = t2k.Expert.from_model(model)
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(("a", "b")):
        gen = torch.Generator().manual_seed(seed)
        z = {n: 1 + 0.3 * torch.rand(v.shape, generator=gen) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    made = compose.mixtures(bank, [("a", "b")])
    assert list(made) == ["base", "a", "b", *(f"a + b, {form}" for form in compose.FORMS)]
    ids = torch.arange(4, 12)[None]
    out = {}
    with torch.no_grad():
        for name, use in made.items():
            with use:
                out[name] = model(ids).logits
        for half in ("deviation", "paper"):
            with bank.use({"a": 0.5, "b": 0.5}, mixture=half):
                torch.testing.assert_close(
                    model(ids).logits, out["a + b, paper-normalised"], atol=1e-4, rtol=1e-4
                )
    names = list(out)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.allclose(out[one], out[other], atol=1e-3), (one, other)


def test_questions_of_two_skills_under_one_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (("add", "reverse"), ("reverse", "max"), ("add", "max"))
    monkeypatch.setattr(compose, "SKILL_SETS", sets)
    row = compose.measure(0, context(tmp_path, "compose", problems=4))
    assert set(row["accuracy"]["add + reverse, paper"]) == {"add", "reverse", "reverse of add"}
    assert set(row["accuracy"]["reverse + max, paper"]) == {"reverse", "max"}
    assert set(row["accuracy"]["base"]) == {*SKILLS, "reverse of add", "max of add"}
    assert set(row["sampled"]["add + max, authors"]) == {"max of add"}
    shares = [v for way in row["accuracy"].values() for v in way.values()]
    assert all(0 <= v <= 100 and v % 25 == 0 for v in shares) and any(shares)
    experts = sorted((tmp_path / "experts").glob("*/expert.safetensors"))
    assert [path.parent.name.split("-")[0] for path in experts] == sorted(SKILLS)


@pytest.mark.skipif(
    not (STORIES / "stories260K" / "config.json").exists(), reason="no model that tells stories"
)
def test_stories_with_several_properties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(STORIES / "stories260K")
    given = context(
        tmp_path,
        "compose-stories",
        stories=folder,
        **{"stories_told": 6, "train.max_new_tokens": 8},
    )
    monkeypatch.setattr(compose, "FORMS", ("deviation", "authors"))
    row = compose.measure_stories(0, given)
    assert row["stories"] == 6
    assert len(row["share"]) == 1 + 3 + 4 * len(compose.FORMS)
    for share in row["share"].values():
        assert set(share) >= {"dialogue", "animal", "dialogue + animal"}
        assert share["dialogue + animal"] <= min(share["dialogue"], share["animal"])
        whole = "dialogue + animal + short-sentences"
        assert share[whole] <= share["dialogue + animal"]


def test_claims_compare_with_the_better_expert_alone() -> None:
    ours, normalised, beats, authors, both, one, chained = compose.CLAIMS
    rows = {
        "compose-stories": [
            story_row(deviation=60.0 + s, paper_normalised=15.0, authors=61.0) for s in range(3)
        ],
        "compose": [question_row(30.0 + s, 1.0) for s in range(3)],
    }
    found = [judge(claim, rows) for claim in compose.CLAIMS]
    assert [f["verdict"] for f in found] == [
        "confirmed", "not confirmed", "confirmed", "undecided", "not confirmed", "not confirmed",
        "not confirmed",
    ]  # fmt: skip
    assert found[0]["mean"] == pytest.approx(41.0)  # 60, 61, 62 less 20
    assert found[1]["mean"] == pytest.approx(-5.0)
    assert found[4]["mean"] == pytest.approx(-9.0)
    assert found[5]["mean"] == pytest.approx(-9.0)
    assert (ours.kind, both.kind, one.kind) == ("compose-stories", "compose", "compose")
    assert beats.paper == authors.paper == chained.paper == "not in the paper"
    assert normalised.low == 0


def test_the_section_has_a_line_for_every_set() -> None:
    assert compose.section({}) == []
    rows = {
        "compose-stories": [story_row(deviation=60.0 + s) for s in range(2)],
        "compose": [question_row(30.0 + s, 2.0) for s in range(2)],
    }
    text = "\n".join(compose.section(rows))
    assert "| dialogue + animal + short-sentences | 20.0 (20.0 to 20.0) |" in text
    assert "| add + reverse + max + order |" in text and "| reverse of add | 1.0 (1.0 to" in text
    assert "at most 0.5 % are right" in text
    assert "Alone an expert reaches its own property in 50 to 50 %" in text
    only = compose.section({"compose": rows["compose"]})
    assert only[0].startswith("## Questions")
    heads = [line for line in only if line.startswith("|")]
    assert len({line.count("|") for line in heads}) == 1
