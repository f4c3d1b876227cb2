"""A task by its name: generated, known with data of the user's, a JSON-lines file, the category of
other tasks' questions, or a property of stories. "NAME=TASK" calls it otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
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
logger = logging.getLogger(__name__)


def task_parts(text: str) -> tuple[str | None, str]:
    """(NAME, TASK) of "NAME=TASK"; (None, TASK) of a task that keeps its name. A path that holds
    "=" is one where it stands for itself: with a "/" before the sign, or where there is such a
    file. Raises ValueError where one side is empty.

    >>> task_parts("sums=./mine"), task_parts("./a=b"), task_parts("category:sums=./mine+add")
    (('sums', './mine'), (None, './a=b'), (None, 'category:sums=./mine+add'))
    """
    name, sign, task = text.partition("=")
    if not sign or "/" in name or ":" in name or Path(text).expanduser().exists():
        return None, text
    if not name or not task:
        raise ValueError(f"task must be TASK or NAME=TASK, got {text!r}")
    return name, task


def task_name(text: str) -> str:
    """What the task is called that `source(text)` gives, without reading any data: so that what was
    found for a task is found again by the same words.

    >>> task_name("data/mine/"), task_name("./mine.jsonl"), task_name("sums=./mine")
    ('mine', 'mine', 'sums')
    >>> task_name("story:animal"), task_name("category:add+max")
    ('story:animal', 'category')
    """
    said, task = task_parts(text)
    if said is not None:
        return said
    if task.startswith(OF_SEVERAL):
        return tasks.category.NAME
    if task.endswith(".jsonl"):
        return Path(task).stem
    if _is_folder(task) or "/" in task:
        return Path(task).expanduser().resolve().name
    return task


def _is_folder(task: str) -> bool:
    """A folder that happens to have a task's name is not meant: "./gsm8k" says that it is."""
    known = task in ("", *tasks.CATEGORIES, *KNOWN) or task.startswith(stories.PREFIX)
    return not known and Path(task).expanduser().is_dir()


def source(
    name: str,
    *,
    data: Data | None = None,
    extract: str | None = None,
    on_bad_lines: OnBadLines = "error",
    small: bool = False,
    descriptions: Mapping[str, str] | None = None,
) -> Source:
    """The source of problems called `name`, which may be "NAME=TASK": TASK, called NAME.

    A generated task ("add", ...); a known one ("gsm8k", "mbpp", ...) with `data`, a local file or
    folder or "hf://owner/name"; a path that ends in .jsonl, or that of a folder with train.jsonl
    and test.jsonl; "story:animal", a property of stories; or the category of several tasks'
    questions, "category:gsm8k+add+sums=./mine", with `data`, a folder that holds one of the same
    name for each known task. A category is called like its task, a path's last part, or as "NAME="
    says. "category" stands for all generated skills and "other", asked as the small model is.
    `extract` names the way completions are read where it is not to be the task's own. Of category
    tasks: `small`, whether the model that is asked is the small one, and `descriptions` of the
    experts that pass 1 will choose from, which must then hold one for each category.
    """
    if extract is not None and extract not in rewards.EXTRACTORS:
        known = ", ".join(rewards.EXTRACTORS)
        raise ValueError(f"extract must be one of {known}, got {extract!r}")
    said, name = task_parts(name)
    if said is not None:
        made = source(
            name, data=data, extract=extract, on_bad_lines=on_bad_lines, small=small,
            descriptions=descriptions,
        )  # fmt: skip
        return _called(made, said)
    reads = None if extract is None else rewards.EXTRACTORS[extract]
    if name == tasks.category.NAME or name.startswith(OF_SEVERAL):
        if extract is not None:
            raise ValueError(f"task {name!r} reads answers as pass 1 does; leave out extract")
        small = small or name == tasks.category.NAME
        named = name.removeprefix(OF_SEVERAL) if OF_SEVERAL in name else "+".join(tasks.CATEGORIES)
        return _categories(named.split("+"), data, on_bad_lines, small, descriptions)
    if descriptions is not None:
        raise ValueError(
            f"descriptions of experts (--expert) are for '{OF_SEVERAL}a+b', whose questions show "
            f"them, got task {name!r}"
        )
    generated = tasks.CATEGORIES
    told = name.startswith(stories.PREFIX)
    if name.endswith(".jsonl") or _is_folder(name):
        if data is not None:
            raise ValueError(f"task {name!r} is itself the data, got data={str(data)!r} besides")
        return jsonl.load(task_name(name), name, extract=reads, on_bad_lines=on_bad_lines)
    if name in KNOWN:
        if data is None:
            raise ValueError(
                f"task {name!r} needs its data: give the file or folder with data=PATH"
            )
        return _known(name, data, reads, on_bad_lines)
    if name not in generated and not told:
        told_of = (stories.PREFIX + of for of in stories.PROPERTIES)
        names = [*generated, tasks.category.NAME, *KNOWN, *told_of]
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
    small: bool = False,
) -> dict[str, Source]:
    """{task: source} of several tasks, by the names that the sources give themselves.

    data: "TASK=PATH" for each task that reads data (NAME=PATH of one that is given as NAME=TASK),
    or the PATH of a single task. extract: for a single task. small: see `source`.
    """
    if len(names) > 1 and extract is not None:
        raise ValueError("with several tasks each reads answers in its own way; leave out extract")
    places: dict[str, str] = {}
    called = [said or task for said, task in map(task_parts, names)]
    for text in data:
        found_name = next((name for name in called if text.startswith(f"{name}=")), None)
        if found_name is None and len(names) > 1:
            raise ValueError(
                "with several tasks give data='TASK=PATH' for each that reads some, TASK one "
                f"of {', '.join(called)}; got {text!r}"
            )
        name = called[0] if found_name is None else found_name
        path = text if found_name is None else text[len(name) + 1 :]
        if name in places:
            raise ValueError(f"task {name!r} has its data given twice")
        places[name] = path
    found: dict[str, Source] = {}
    for text, name in zip(names, called, strict=True):
        made = source(
            text, data=places.get(name), extract=extract, on_bad_lines=on_bad_lines, small=small
        )
        if made.name in found:
            raise ValueError(f"task {made.name!r} is given twice; say NAME=TASK for one of them")
        found[made.name] = made
    return found


def _called(made: Source, name: str) -> Source:
    """The same problems under another name."""
    if isinstance(made, tasks.Generated):
        return dataclasses.replace(made, name=name, of=made.of or made.name)
    renamed: Any = copy.copy(made)
    object.__setattr__(renamed, "name", name)  # some are frozen
    return renamed  # type: ignore[no-any-return]


def _known(
    name: str, data: Data, extract: rewards.Extract | None, on_bad_lines: OnBadLines
) -> Source:
    options: dict[str, Any] = {"on_bad_lines": on_bad_lines}
    if name in PROGRAMS:
        if extract is not None:
            raise ValueError(f"task {name!r} runs answers as programs; leave out extract")
        return KNOWN[name](data, **options)
    return KNOWN[name](data, extract=extract, **options)


def _categories(
    parts: Sequence[str], data: Data | None, on_bad_lines: OnBadLines, small: bool,
    descriptions: Mapping[str, str] | None,
) -> Source:  # fmt: skip
    """Category questions; see `CategorySource`."""
    # They import training, which asks this module for nothing.
    from t2runtime.adapt.classifier import CategorySource
    from t2runtime.adapt.prompt import Categories, categories_for

    found: dict[str, Source] = {}
    for part in parts:
        name, made = _category(part, data, on_bad_lines)
        clash = next((other for other in found if other.lower() == name.lower()), None)
        if clash is not None:
            raise ValueError(
                f"'{OF_SEVERAL}' must give every category once, got {clash!r} and {name!r}. Say "
                "what one of them is called: NAME=TASK"
            )
        found[name] = made
    if len(found) < 2:
        raise ValueError(
            f"'{OF_SEVERAL}' must be followed by two or more tasks joined by '+', got "
            f"{', '.join(parts)}"
        )
    if data is not None and not any(_part(part)[1] in KNOWN for part in parts):
        raise ValueError(f"none of {', '.join(parts)} reads data=, got {str(data)!r}")
    names = [name for name in found if name != Categories.other]
    if descriptions is not None:
        missing = [name for name in names if name not in descriptions]
        if missing:
            raise ValueError(
                f"every category must be called like one of the experts given, got "
                f"{', '.join(missing)}; the experts are {', '.join(descriptions) or 'none'}. Say "
                "what a category is called: NAME=TASK"
            )
        unknown = [name for name in descriptions if name not in found]
        if unknown:
            logger.warning("no category leads to the experts %s", ", ".join(unknown))
    if Categories.other not in found:
        logger.warning(
            "no questions of category %r: an expert trained on these learns never to give a "
            "request to the base; add some with +%s=TASK", Categories.other, Categories.other,
        )  # fmt: skip
    return CategorySource(found, categories_for(names, descriptions, small=small))


def _part(part: str) -> tuple[str | None, str]:
    try:
        return task_parts(part)
    except ValueError:
        raise ValueError(
            f"'{OF_SEVERAL}' must be followed by TASK or NAME=TASK, got {part!r}"
        ) from None


def _category(part: str, data: Data | None, on_bad_lines: OnBadLines) -> tuple[str, Source]:
    """The name of a category, and the source of its questions."""
    said, task = _part(part)
    if task == tasks.category.NAME or task.startswith((OF_SEVERAL, stories.PREFIX)):
        raise ValueError(f"'{OF_SEVERAL}' takes tasks whose questions differ, got {task!r}")
    if not task:
        raise ValueError(f"'{OF_SEVERAL}' must be followed by TASK or NAME=TASK, got {part!r}")
    place = None
    if task in KNOWN:
        if data is None:
            raise ValueError(
                f"task {task!r} needs its data: give the folder that holds its folder with "
                "data=PATH"
            )
        folder = Path(data).expanduser()
        spellings = [folder / task, folder / task.replace("-", "_")]
        place = next((path for path in spellings if path.is_dir()), None)
        if place is None:
            raise ValueError(f"data {str(data)!r} must hold a folder {task!r}, it does not")
    made = source(task, data=place, on_bad_lines=on_bad_lines)
    return said or made.name, made
