"""Several skills at once, reached by mixing experts that were trained apart.

Stories with two or three properties, on a model that tells stories: each property has its expert,
and what is counted is how often a story has all of them. Questions of two skills on the small
model, answered under one mixture for all of them, where nothing dispatches. And questions that
need one skill upon the other's result: the sum backwards, its largest digit.

Every form of mixing has weight 1 for each expert. "paper-normalised" divides by Σα; there the
paper's Σ α z with Σα = 1 is the same, and so is "deviation" with weights that sum to 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Any

import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.claims import experts
from t2runtime.claims.claim import Claim
from t2runtime.claims.units import Context
from t2runtime.demo.small import NEW_TOKENS, SKILLS
from t2runtime.evaluate import evaluate
from t2runtime.evidence.intervals import interval
from t2runtime.evidence.ledger import Row
from t2runtime.generation import complete
from t2runtime.loading import load
from t2runtime.tasks import Problem, Task
from t2runtime.tasks.stories import PREFIX, PROPERTIES, Stories

BASE = "base"
FORMS = ("deviation", "paper", "paper-normalised", "authors")
STORIES, QUESTIONS = "compose-stories", "compose"
PAIRS = tuple(combinations(PROPERTIES, 2))
STORY_SETS = (*PAIRS, tuple(PROPERTIES))
SKILL_SETS = (*combinations(SKILLS, 2), tuple(SKILLS))
_ROWS = 200
#: Sampled answers to each question that needs one skill after the other.
_SAMPLES = 4


def _after(then: str, first: str) -> Task:
    """Questions of `then`, asked about what `first` answers."""
    outer, inner = tasks.SKILLS[then], tasks.SKILLS[first]
    return Task(
        f"{then} of {first}", outer.phrasings, inner.draw,
        lambda data: outer.right(inner.right(data)),
    )  # fmt: skip


#: By the experts that they need.
CHAINED = {("add", then): _after(then, "add") for then in ("reverse", "max")}


def joined(names: Iterable[str]) -> str:
    """Skills wanted at once, in words.

    >>> joined(["dialogue", "animal"])
    'dialogue + animal'
    """
    return " + ".join(names)


def way(names: Iterable[str], form: str) -> str:
    """The name of a mixture in a row."""
    return f"{joined(names)}, {form}"


def mixtures(
    bank: t2k.ExpertBank, sets: Sequence[Sequence[str]]
) -> Mapping[str, AbstractContextManager[None]]:
    """{name: the `use` block}: the base, each expert alone, each set in each form of mixing."""
    made = {BASE: bank.use(None), **{name: bank.use(name) for name in bank.names}}
    for names in sets:
        for form in FORMS:
            made[way(names, form)] = bank.use(dict.fromkeys(names, 1.0), mixture=form)
    return made


def _bank(model: Any, files: Mapping[str, Any]) -> t2k.ExpertBank:
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, path in files.items():
        bank.add(name, t2k.Expert.load(path))
    return bank


def measure_stories(seed: int, context: Context) -> dict[str, Any]:
    """{"share": {mixture: {properties: % of the sampled stories that have all of them}}}."""
    folder = str(context.stories)
    files = {name: context.trained(PREFIX + name, seed, folder) for name in PROPERTIES}
    model, tokenizer = load(folder, "float32", "cpu")
    bank = _bank(model, files)
    count, new = context.settings["stories_told"], experts.recipe(PREFIX, seed).max_new_tokens or 1
    openings = [p.prompt for p in Stories(next(iter(PROPERTIES)))(count, "test", seed)]
    # Openings are few and can be continued in many ways: each is told again and again.
    prompts = [openings[i % len(openings)] for i in range(count)]
    share = {}
    for name, use in mixtures(bank, STORY_SETS).items():
        torch.manual_seed(seed)
        with use:
            texts = _told(model, tokenizer, prompts, new)
        share[name] = {
            joined(wanted): 100 * statistics.fmean(_has(text, wanted) for text in texts)
            for wanted in (*((name,) for name in PROPERTIES), *STORY_SETS)
        }
    return {"stories": count, "share": share}


def _has(text: str, wanted: Iterable[str]) -> bool:
    return all(PROPERTIES[name](text) for name in wanted)


def _told(model: Any, tokenizer: Any, prompts: Sequence[str], new: int) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(prompts), _ROWS):
        part = prompts[start : start + _ROWS]
        texts += complete(model, tokenizer, part, new, temperature=1.0).texts
    return texts


def measure(seed: int, context: Context) -> dict[str, Any]:
    """{"accuracy": {mixture: {task: greedy %}}, "sampled": {mixture: {task: % of samples}}}; a
    mixture answers the questions of its own skills, and those that need both of them.
    """
    files = {name: context.trained(name, seed) for name in SKILLS}
    model, tokenizer = load(context.model, "float32", "cpu")
    bank = _bank(model, files)
    count = context.settings["problems"]
    asked = {name: tasks.problems(name, count, "test", seed) for name in SKILLS}
    chained = {task.name: task.problems(count, "test", seed) for task in CHAINED.values()}
    accuracy: dict[str, dict[str, float]] = {}
    sampled: dict[str, dict[str, float]] = {}
    of_set = {way(names, form): names for names in SKILL_SETS for form in FORMS}
    for name, use in mixtures(bank, SKILL_SETS).items():
        own = of_set.get(name, SKILLS)
        needed = [task.name for skills, task in CHAINED.items() if set(skills) <= set(own)]
        again = {task: chained[task] * _SAMPLES for task in needed}
        with use:
            accuracy[name] = _accuracy(
                model, tokenizer, {t: asked[t] for t in own} | {t: chained[t] for t in needed}
            )
            torch.manual_seed(seed)
            sampled[name] = _accuracy(model, tokenizer, again, temperature=1.0)
    return {"problems": count, "accuracy": accuracy, "sampled": sampled}


def _accuracy(
    model: Any, tokenizer: Any, asked: Mapping[str, Sequence[Problem]], temperature: float = 0.0
) -> dict[str, float]:
    """{task: right answers in %} under the mixture in force."""
    found = {}
    for task, problems in asked.items():
        score = evaluate(
            model, tokenizer, tasks.EXACT, problems, NEW_TOKENS, rows=_ROWS, temperature=temperature
        )
        found[task] = 100 * score.accuracy
    return found


# -- what the rows say -----------------------------------------------------------------------------


def best_alone(row: Row, names: Sequence[str]) -> float:
    """% of the stories with all of `names` under the best of their experts alone."""
    return max(row["share"][name][joined(names)] for name in names)


def told(row: Row, names: Sequence[str], form: str) -> float:
    """% of the stories with all of `names` under their mixture."""
    return float(row["share"][way(names, form)][joined(names)])


def _over_pairs(number: Callable[[Row, Sequence[str]], float]) -> Callable[[Row], float]:
    return lambda row: statistics.fmean(number(row, names) for names in PAIRS)


def answered(row: Row, mixture: str, names: Sequence[str]) -> float:
    """Mean accuracy over the skills `names` under one mixture, in %."""
    return statistics.fmean(row["accuracy"][mixture][name] for name in names)


def _gain_of_one(row: Row, form: str) -> float:
    """Over pairs of skills: one mixture for both, less the better of the two experts."""
    pairs = [names for names in SKILL_SETS if len(names) == 2]
    return statistics.fmean(
        answered(row, way(names, form), names) - max(answered(row, n, names) for n in names)
        for names in pairs
    )


def _gain_of_chained(row: Row) -> float:
    """Over the chained tasks: the mixture's accuracy, less that of the best expert or the base."""
    return statistics.fmean(
        row["accuracy"][way(names, "deviation")][task.name]
        - max(row["accuracy"][name][task.name] for name in (BASE, *names))
        for names, task in CHAINED.items()
    )


_BOTH = "stories with both properties, mean of three pairs, points of 100"
_SMALLER = (
    "a story model of 260 K parameters and properties that a program checks; the paper mixes "
    "experts for one task at a time, by few shots."
)
_ONE = "mean accuracy over two skills, mean of six pairs, points"
_SKILLS = "generated skills on the small model, every form with weight 1 for each expert."

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Experts add up: deviations added reach two properties more often than the better expert",
        "section 3.1", f"{_BOTH}, ours less the better expert alone", _SMALLER, STORIES,
        _over_pairs(lambda row, names: told(row, names, "deviation") - best_alone(row, names)),
        low=0,
    ),
    Claim(
        "A weighted sum of z with Σα = 1 reaches two properties more often than the better expert",
        "section 3.1", f"{_BOTH}, Σαz with Σα = 1 less the better expert alone", _SMALLER, STORIES,
        _over_pairs(
            lambda row, names: told(row, names, "paper-normalised") - best_alone(row, names)
        ),
        low=0,
    ),
    Claim(
        "Deviations added beat the normalised sum", "not in the paper",
        f"{_BOTH}, ours less Σαz with Σα = 1", _SMALLER, STORIES,
        _over_pairs(
            lambda row, names: (
                told(row, names, "deviation") - told(row, names, "paper-normalised")
            )
        ),
        low=0,
    ),
    Claim(
        "Deviations added beat the authors' renormalised sum", "not in the paper",
        f"{_BOTH}, ours less the authors' form", _SMALLER, STORIES,
        _over_pairs(
            lambda row, names: told(row, names, "deviation") - told(row, names, "authors")
        ),
        low=0,
    ),
    Claim(
        "One mixture serves questions of two skills better than the better expert",
        "section 3.1", f"{_ONE}, ours less the better expert alone", _SKILLS, QUESTIONS,
        lambda row: _gain_of_one(row, "deviation"), low=0,
    ),
    Claim(
        "A weighted sum of z with Σα = 1 serves questions of two skills better than the better "
        "expert",
        "section 3.1", f"{_ONE}, Σαz with Σα = 1 less the better expert alone", _SKILLS, QUESTIONS,
        lambda row: _gain_of_one(row, "paper-normalised"), low=0,
    ),
    Claim(
        "Mixing chains skills: the sum backwards, the largest digit of a sum", "not in the paper",
        "accuracy of the mixture less the best of base and experts, points",
        "questions that the base model never saw; the mixture has both experts at weight 1.",
        QUESTIONS, _gain_of_chained, low=0,
    ),
)  # fmt: skip


def section(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Tables of both measurements, where they have two rows or more."""
    lines: list[str] = []
    if len(rows.get(STORIES, ())) > 1:
        lines += _stories_table(rows[STORIES])
    if len(rows.get(QUESTIONS, ())) > 1:
        lines += ["", *_questions_table(rows[QUESTIONS])] if lines else []
        lines = lines or _questions_table(rows[QUESTIONS])
    return lines


def shown(values: Sequence[float]) -> str:
    """Mean and 95 % interval as a table's cell.

    >>> shown([1.0, 2.0, 3.0])
    '2.0 (-0.5 to 4.5)'
    """
    mean, low, high = interval(values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def table(title: str, note: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"## {title}", "", note, "",
        "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]  # fmt: skip


def _stories_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for names in STORY_SETS:
        wanted = joined(names)

        def cell(mixture: str, wanted: str = wanted) -> str:
            return shown([row["share"][mixture][wanted] for row in rows])

        best = shown([best_alone(row, names) for row in rows])
        lines.append([wanted, cell(BASE), best, *(cell(way(names, form)) for form in FORMS)])
    own = [row["share"][name][name] for row in rows for name in PROPERTIES]
    return table(
        "Stories with several properties at once",
        f"Share of {rows[0]['stories']} sampled stories with all of them, in % with 95 % intervals "
        f"over {len(rows)} seeds. Every expert at weight 1 (1/K each is the normalised form). "
        f"Alone an expert reaches its own property in {min(own):.0f} to {max(own):.0f} %.",
        ["wanted", BASE, "best expert alone", *FORMS], lines,
    )  # fmt: skip


def _questions_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for names in SKILL_SETS:
        best = shown([max(answered(row, name, names) for name in names) for row in rows])
        cells = [shown([answered(r, way(names, form), names) for r in rows]) for form in FORMS]
        base = shown([answered(row, BASE, names) for row in rows])
        lines.append([joined(names), base, best, *cells])
    for names, task in CHAINED.items():

        def right(row: Row, mixture: str, name: str = task.name) -> float:
            return float(row["accuracy"][mixture][name])

        best = shown([max(right(row, name) for name in names) for row in rows])
        cells = [shown([right(row, way(names, form)) for row in rows]) for form in FORMS]
        lines.append([task.name, shown([right(row, BASE) for row in rows]), best, *cells])
    sampled = max(
        value for row in rows for shares in row["sampled"].values() for value in shares.values()
    )
    return table(
        "Questions of several skills under one mixture",
        f"Greedy accuracy in % on {rows[0]['problems']} questions a skill, mean over the skills, "
        f"with 95 % intervals over {len(rows)} seeds; nothing dispatches. Below: tasks that need "
        f"one skill upon the other's result (of sampled answers at most {sampled:.1f} % are right "
        "under any mixture and seed).",
        ["skills", BASE, "best expert alone", *FORMS], lines,
    )  # fmt: skip
