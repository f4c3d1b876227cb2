"""The demo on the small model: train, dispatch, answer a mixed batch in two passes, measure,
judge.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.classifier import train_classifier
from t2runtime.adapt.fewshot import search, without_shots
from t2runtime.adapt.prompt import SMALL, classify
from t2runtime.adapt.weights import Mixture
from t2runtime.demo import cost
from t2runtime.engine import Transformer2
from t2runtime.evaluate import Score, evaluate
from t2runtime.generation import complete
from t2runtime.loading import load
from t2runtime.tasks import EXACT, Generated, Problem
from t2runtime.train import Config, small_model, train

#: The skills that the demo trains experts for. None is for counting: few shots have to find a
#: mixture of the others for it.
SKILLS = ("add", "reverse", "max", "order")
CLASSIFIER = "classifier"
NEW_TOKENS = 8
TEST_PROBLEMS, SHOTS, ROUNDS = 400, 16, 8
#: At most 60 steps of 256 answers; fewer where validation is answered almost without a fault.
TRAINING = small_model(steps=60, max_new_tokens=NEW_TOKENS, validate_every=10, stop_at=0.98)
DESCRIPTIONS = {
    "add": "adds two two-digit numbers",
    "reverse": "says five digits backwards",
    "max": "names the largest of five digits",
    "order": "names the first of three names in the alphabet",
    CLASSIFIER: "names the category of a question",
}
Say = Callable[[str], None]


def run(out: Path, seed: int, say: Say) -> dict[str, Any]:
    """Everything in order; returns results.json's content. Raises nothing when a skill gains too
    little.
    """
    start = time.perf_counter()
    model, tokenizer = load("small")
    report = t2k.convert(model, progress=False)
    say(
        f"small model: {len(report.converted)} layers converted, "
        f"{report.trainable:,} singular values"
    )
    bank = t2k.ExpertBank(model)
    tests = {name: tasks.problems(name, TEST_PROBLEMS, "test", seed) for name in tasks.CATEGORIES}
    score = partial(evaluate, model, tokenizer, EXACT, max_new_tokens=NEW_TOKENS)
    base = {name: score(problems=problems) for name, problems in tests.items()}

    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name in (*SKILLS, CLASSIFIER):
        began, curves[name] = time.perf_counter(), []
        expert = _train(model, tokenizer, name, seed, out, curves[name])
        seconds[name] = time.perf_counter() - began
        bank.add(name, expert)
        expert.description = DESCRIPTIONS[name]
        expert.save(out / "experts" / f"{name}.safetensors")
        say(
            f"trained {name:11s} in {seconds[name]:5.1f} s, sampled accuracy "
            f"{curves[name][0]:.2f} -> {curves[name][-1]:.2f}"
        )

    counts = ", ".join(f"{name} {len(problems)}" for name, problems in tests.items())
    say(f"\ngreedy accuracy on distinct held-out problems (n: {counts}; "
        "rows: weights, columns: skill)")  # fmt: skip
    table = {"base": base}
    for name in SKILLS:
        with cost.merged(bank, name):
            table[name] = {skill: score(problems=problems) for skill, problems in tests.items()}
    for row, scores in table.items():
        say(
            f"  {row:8s}"
            + "".join(f"  {skill} {100 * s.accuracy:5.1f}" for skill, s in scores.items())
        )
    skills = {name: _gain(base[name], table[name][name]) for name in SKILLS}
    for name, skill in skills.items():
        verdict = "ok" if skill["passed"] else "TOO LITTLE"
        say(
            f"  {name:8s} base {base[name]}   expert {table[name][name]}   "
            f"gain {skill['gain']:+.1f} points: {verdict}"
        )

    found = _few_shot(model, tokenizer, bank, seed, tests, table, score, say)
    mixtures: dict[str, Mixture] = {name: found[name]["mixture"] for name in tasks.SKILLS}
    engine = Transformer2(
        model, tokenizer, bank, categories=SMALL, classifier=CLASSIFIER, mixtures=mixtures
    )
    batch = [tests[name][0] for name in tasks.CATEGORIES]
    results: dict[str, Any] = {
        "skills": skills,
        "table": {
            row: {skill: s.accuracy for skill, s in scores.items()} for row, scores in table.items()
        },
        "dispatch": _dispatch(model, tokenizer, bank, tests, say) | {"few-shot": found},
        "mixed_batch": _answer(engine, batch, say),
        "cost": cost.tokens_per_second(
            model,
            tokenizer,
            bank,
            [p.prompt for t in tests.values() for p in t[:11]],
            rounds=ROUNDS,
        ),
        "training_seconds": seconds,
        "curves": curves,
        "stopped_early": [name for name in curves if len(curves[name]) < _settings(name).steps],
    }
    say(
        "\ncost, generated tokens per second with 66 requests, "
        f"median and range of {ROUNDS} rounds in which the forms take turns"
    )
    for line in cost.lines(results["cost"]):
        say(line)
    results["passed"] = all(skill["passed"] for skill in skills.values())
    results["seconds"] = time.perf_counter() - start
    return results


def _settings(name: str) -> Config:
    """The classifier needs fewer steps."""
    return dataclasses.replace(TRAINING, steps=30) if name == CLASSIFIER else TRAINING


def _train(model: Any, tokenizer: Any, name: str, seed: int, out: Path, curve: list[float]) -> Any:
    """One expert, or the classification expert; its sampled accuracy is appended to `curve`."""
    (out / "experts").mkdir(parents=True, exist_ok=True)
    log = lambda line: curve.append(line["sampled_accuracy"])  # noqa: E731
    folder = out / "experts" / name
    cfg = dataclasses.replace(_settings(name), seed=seed)
    if name == CLASSIFIER:
        sources = {skill: Generated(skill) for skill in tasks.CATEGORIES}
        return train_classifier(model, tokenizer, sources, SMALL, cfg, folder, log, overwrite=True)
    return train(model, tokenizer, Generated(name), cfg, folder, log, overwrite=True)


def _gain(base: Score, expert: Score) -> dict[str, Any]:
    """Base against expert as plain numbers, with the verdict."""
    both = {"base": base, "expert": expert}
    return {
        **{
            k: {"accuracy": s.accuracy, "interval": s.interval, "problems": s.total}
            for k, s in both.items()
        },
        "gain": 100 * (expert.accuracy - base.accuracy),
        "passed": expert.gains_over(base),
    }


def _dispatch(
    model: Any, tokenizer: Any, bank: Any, tests: dict[str, list[Problem]], say: Say
) -> dict[str, Any]:
    """Share of held-out questions whose category pass 1 names rightly: asked of the base, then of
    the expert.
    """
    say("\npass 1: share of held-out questions whose category is named rightly")
    result: dict[str, Any] = {}
    for way, under in (("prompt", None), (CLASSIFIER, CLASSIFIER)):
        right: dict[str, float] = {}
        for name, problems in tests.items():
            questions = [problem.prompt for problem in problems[:200]]
            verdicts = classify(model, tokenizer, bank, SMALL, questions, under)
            right[name] = sum(said.category == name for said in verdicts) / len(verdicts)
        result[way] = {"accuracy": sum(right.values()) / len(right), "by_category": right}
        each = "  ".join(f"{name} {100 * share:5.1f}" for name, share in right.items())
        say(f"  {way:11s}{100 * result[way]['accuracy']:5.1f} %   {each}")

    mixed = [problem for problems in tests.values() for problem in problems[:60]]
    questions = [problem.prompt for problem in mixed]
    say(f"\nboth passes: answers of one batch of {len(mixed)} mixed questions")
    plain = dict.fromkeys(tasks.SKILLS) | {name: name for name in SKILLS}
    engine = Transformer2(
        model, tokenizer, bank, categories=SMALL, classifier=CLASSIFIER, mixtures=plain
    )
    for way in ("prompt", CLASSIFIER):
        outputs = engine.generate(questions, way, max_new_tokens=NEW_TOKENS)
        texts = [output.text for output in outputs]
        result[way]["answers"] = _share(texts, mixed, say, way)
    texts = complete(model, tokenizer, questions, NEW_TOKENS).texts
    result["base weights"] = {"answers": _share(texts, mixed, say, "base")}
    return result


def _share(texts: list[str], problems: list[Problem], say: Say, way: str) -> dict[str, Any]:
    """Right answers with their interval."""
    right = sum(text == problem.answer for text, problem in zip(texts, problems, strict=True))
    reached = Score(right, len(problems))
    say(f"  {way:11s}{reached}")
    return {"accuracy": reached.accuracy, "interval": reached.interval}


def _few_shot(
    model: Any, tokenizer: Any, bank: Any, seed: int, tests: dict[str, list[Problem]],
    table: dict[str, dict[str, Score]], score: Callable[..., Score], say: Say,
) -> dict[str, Any]:  # fmt: skip
    """For each skill, trained or not, the mixture that is found from a few labelled prompts."""
    say(f"\nfew-shot: mixtures found from {SHOTS} labelled prompts, accuracy without them;")
    say("the best single expert is chosen on the test problems themselves, so it is hard to beat")
    say(f"  {'skill':8s}{'base':>7s}  {'best single':16s}mixture")
    result: dict[str, Any] = {}
    for name in tasks.SKILLS:
        shots = tasks.problems(name, SHOTS, "validation", seed)
        found = search(
            model, tokenizer, bank, SKILLS, shots, NEW_TOKENS,
            population=24, elites=5, generations=4, seed=seed,
        )  # fmt: skip
        mixture = {
            expert: round(weight, 2) for expert, weight in found.mixture.items() if weight >= 0.005
        }
        # No test problem is a shot (another split), so that `table` compares the same problems.
        best = max(SKILLS, key=lambda expert: table[expert][name].accuracy)
        single = table[best][name].accuracy
        with bank.use(mixture):
            reached = score(problems=without_shots(tests[name], shots))
        result[name] = {
            "mixture": mixture,
            "accuracy": reached.accuracy,
            "interval": reached.interval,
            "base": table["base"][name].accuracy,
            "best_single": {"expert": best, "accuracy": single},
            "worse_than_best_single": reached.accuracy < single,
        }
        verdict = "   worse than the best single expert" if reached.accuracy < single else ""
        if verdict and single <= reached.interval[1]:
            verdict += ", within the interval"
        beside = f"{100 * single:5.1f} {best}"
        say(f"  {name:8s}{100 * table['base'][name].accuracy:7.1f}  {beside:16s}{reached}   "
            f"{mixture}{verdict}")  # fmt: skip
    return result


def _answer(engine: Transformer2, batch: list[Problem], say: Say) -> list[dict[str, Any]]:
    """The mixed batch: one question of each category, each with its own mixture."""
    prompts = [problem.prompt for problem in batch]
    outputs = engine.generate(prompts, CLASSIFIER, max_new_tokens=NEW_TOKENS)
    say(
        f"\none mixed batch in two passes "
        f"({outputs[0].pass1_seconds:.2f} s + {outputs[0].pass2_seconds:.2f} s)"
    )
    rows = []
    for problem, output in zip(batch, outputs, strict=True):
        right = output.text == problem.answer
        say(
            f"  {problem.prompt:20s} -> {output.text:8s}{'right' if right else 'wrong'}   "
            f"{output.category:8s}{output.mixture or 'base'}"
        )
        rows.append({
            "prompt": problem.prompt, "answer": problem.answer, "text": output.text, "right": right,
            "category": output.category, "true_category": problem.category,
            "mixture": output.mixture,
            "pass1_seconds": output.pass1_seconds, "pass2_seconds": output.pass2_seconds,
        })  # fmt: skip
    return rows
