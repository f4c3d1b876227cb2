"""A task by its name: generated, known with data of the user's, a JSON-lines file, the category of
other tasks' questions, or a property of stories.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from t2runtime import rewards, tasks
from t2runtime.tasks import (
    ByAnswer,
    Source,
    arc,
    banking77,
    competition_math,
    gsm8k,
    humaneval,
    jsonl,
    mbpp,
    stories,
)
from t2runtime.tasks.files import Data, OnBadLines

#: Tasks that read data, by name: load(data, extract=..., on_bad_lines=...) -> source.
KNOWN: dict[str, Callable[..., Source]] = {
    gsm8k.NAME: gsm8k.load,
    mbpp.NAME: mbpp.load,
    **{name: partial(arc.load, name) for name in arc.NAMES},
    competition_math.NAME: competition_math.load,
    humaneval.NAME: humaneval.load,
    banking77.NAME: banking77.load,
}
#: Tasks whose answers are programs: they are run, and nothing is extracted.
PROGRAMS = (mbpp.NAME, humaneval.NAME)
#: "category:gsm8k+mbpp" asks for the category of questions of these tasks.
OF_SEVERAL = "category:"


def source(
    name: str,
    *,
    data: Data | None = None,
    extract: str | None = None,
    on_bad_lines: OnBadLines = "error",
) -> Source:
    """The source of problems called `name`.

    A generated task ("add", "category", ...); a known one ("gsm8k", "mbpp", ...) with `data`, a
    local file or folder or "hf://owner/name"; a path that ends in .jsonl, or that of a folder with
    train.jsonl and test.jsonl; or "category:gsm8k+mbpp" with `data`, a folder that holds one of
    the same name for each; or "story:animal", a property of stories. `extract` names the way
    completions are read where it is not to be the task's own.
    """
    if extract is not None and extract not in rewards.EXTRACTORS:
        known = ", ".join(rewards.EXTRACTORS)
        raise ValueError(f"extract must be one of {known}, got {extract!r}")
    reads = None if extract is None else rewards.EXTRACTORS[extract]
    generated = (*tasks.CATEGORIES, tasks.category.NAME)
    told = name.startswith(stories.PREFIX)
    own = Path(name).expanduser()
    # A folder that happens to have a task's name is not meant: "./gsm8k" says that it is.
    folder = name not in ("", *generated, *KNOWN) and not told and own.is_dir()
    if name.endswith(".jsonl") or folder:
        if data is not None:
            raise ValueError(f"task {name!r} is itself the data, got data={str(data)!r} besides")
        called = own.resolve().name if folder else own.stem
        return jsonl.load(called, name, extract=reads, on_bad_lines=on_bad_lines)
    if name in KNOWN or name.startswith(OF_SEVERAL):
        if data is None:
            raise ValueError(
                f"task {name!r} needs its data: give the file or folder with data=PATH"
            )
        if name in KNOWN:
            return _known(name, data, reads, on_bad_lines)
        if extract is not None:
            raise ValueError(f"task {name!r} reads answers as pass 1 does; leave out extract")
        return _categories(name[len(OF_SEVERAL) :].split("+"), data, on_bad_lines)
    if name not in generated and not told:
        names = [*generated, *KNOWN, *(stories.PREFIX + of for of in stories.PROPERTIES)]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"task must be one of {', '.join(names)}, or a path that ends in .jsonl or is a "
            f"folder with train.jsonl and test.jsonl, got {name!r}.{hint}"
        )
    if data is not None:
        raise ValueError(f"task {name!r} is generated and reads no data, got data={str(data)!r}")
    if told:
        if extract is not None:
            raise ValueError(f"task {name!r} looks at the whole story; leave out extract")
        return stories.Stories(name[len(stories.PREFIX) :])
    grader = tasks.EXACT if reads is None else ByAnswer(reads)
    for problem in tasks.problems(name, 16, "train"):
        grader.check(problem)
    return tasks.Generated(name, grader=grader)


def sources(
    names: Sequence[str],
    *,
    data: Sequence[str] = (),
    extract: str | None = None,
    on_bad_lines: OnBadLines = "error",
) -> dict[str, Source]:
    """{task: source} of several tasks, by the names that the sources give themselves.

    data: "TASK=PATH" for each task that reads data, or the PATH of a single task. extract: for a
    single task.
    """
    if len(names) > 1 and extract is not None:
        raise ValueError("with several tasks each reads answers in its own way; leave out extract")
    places: dict[str, str] = {}
    for text in data:
        name, sign, path = text.partition("=")
        if not (sign and name in names):
            if len(names) > 1:
                raise ValueError(
                    "with several tasks give data='TASK=PATH' for each that reads some, TASK one "
                    f"of {', '.join(names)}; got {text!r}"
                )
            name, path = names[0], text
        if name in places:
            raise ValueError(f"task {name!r} has its data given twice")
        places[name] = path
    found: dict[str, Source] = {}
    for name in names:
        made = source(name, data=places.get(name), extract=extract, on_bad_lines=on_bad_lines)
        if made.name in found:
            raise ValueError(f"task {made.name!r} is given twice")
        found[made.name] = made
    return found


def _known(
    name: str, data: Data, extract: rewards.Extract | None, on_bad_lines: OnBadLines
) -> Source:
    options: dict[str, Any] = {"on_bad_lines": on_bad_lines}
    if name in PROGRAMS:
        if extract is not None:
            raise ValueError(f"task {name!r} runs answers as programs; leave out extract")
        return KNOWN[name](data, **options)
    return KNOWN[name](data, extract=extract, **options)


def _categories(names: list[str], data: Data, on_bad_lines: OnBadLines) -> Source:
    """Category questions; see `CategorySource`."""
    # They import training, which asks this module for nothing.
    from t2runtime.adapt.classifier import CategorySource
    from t2runtime.adapt.prompt import Categories

    unknown = [name for name in names if name not in KNOWN]
    if unknown or len(set(names)) < 2:
        raise ValueError(
            f"'{OF_SEVERAL}' must be followed by two or more of {', '.join(KNOWN)}, joined by '+', "
            f"got {', '.join(unknown or names)}"
        )
    folder = Path(data).expanduser()
    parts: dict[str, Source] = {}
    for name in names:
        spellings = [folder / name, folder / name.replace("-", "_")]
        place = next((path for path in spellings if path.is_dir()), None)
        if place is None:
            raise ValueError(f"data {str(data)!r} must hold a folder {name!r}, it does not")
        parts[name] = _known(name, place, None, on_bad_lines)
    return CategorySource(parts, Categories(tuple(names)))
