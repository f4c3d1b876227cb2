"""What two runs must share besides their settings for one to go on where the other stopped: the
problems, the code that makes and grades them, the adapter, the weights' dtype, the machine's form.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from t2runtime.tasks import Problem, Source
from t2runtime.train.config import Config


def identity_of(
    cfg: Config,
    source: Source,
    training: Sequence[Problem],
    validation: Sequence[Problem],
    adapter: Mapping[str, Any],
    model: Any,
) -> dict[str, Any]:
    """Plain values for a checkpoint's header. `training` are the problems of the first step: the
    whole data are in the source's own `identity`, where it has one.
    """
    cpu = model.device.type == "cpu"
    return {
        "config": dataclasses.asdict(cfg),
        "task": source.name,
        "training": _problems(training),
        "validation": _problems(validation),
        "source": dict(_attributes(source)),
        "code": digest(*_class_code(type(source))),
        **adapter,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        # Sums are split by threads, and so are their bits.
        "threads": torch.get_num_threads() if cpu else None,
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, settings apart, in words."""
    unnamed = {
        "training": "other training problems",
        "validation": "other validation problems",
        "code": "another reward, or another way to make problems (the code of the source)",
        "layers": "other layers of the model",
        "weights": "another model",
    }
    found = []
    for key in ("task", "method", "rank", "parametrisation", "dtype", "device", "threads"):
        if theirs.get(key) != ours.get(key):
            found.append(f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}")
    found += [words for key, words in unnamed.items() if theirs.get(key) != ours.get(key)]
    before, now = theirs.get("source", {}), ours.get("source", {})
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            found.append(f"{key} {before.get(key)}, not {now.get(key)}")
    return found


def digest(*texts: str) -> str:
    """A short checksum."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _problems(problems: Sequence[Problem]) -> str:
    return digest(*(repr(problem) for problem in problems))


def _attributes(source: Source) -> Iterator[tuple[str, str]]:
    """The source's own `identity`, else its attributes that are plain values or functions. Lists,
    dictionaries and other objects may be caches and are left out.
    """
    own = getattr(source, "identity", None)
    given = own if isinstance(own, Mapping) else getattr(source, "__dict__", {})
    for name, value in given.items():
        said = None if name == "name" else _described(value)
        if said is not None:
            yield name.lstrip("_"), said


def _described(value: Any) -> str | None:
    """A text that is equal for equal values in every process; None for what has none."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:60]}...#{digest(text)}"
    if isinstance(value, re.Pattern):
        return repr(value)
    if isinstance(value, MethodType):
        return _described(value.__func__)
    if isinstance(value, FunctionType):
        place = f"{value.__module__}.{value.__qualname__}"
        return f"{place}#{digest(*_function_code(value, set()))[:6]}"
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.items()]
        return f"partial({', '.join(map(str, map(_described, parts)))})"
    if isinstance(value, (tuple, frozenset)):
        parts = [str(_described(item)) for item in value]
        return f"({', '.join(sorted(parts) if isinstance(value, frozenset) else parts)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, _described(getattr(value, f.name))) for f in dataclasses.fields(value)]
        return f"{type(value).__name__}({', '.join(f'{name}={said}' for name, said in pairs)})"
    return None


def _class_code(kind: type) -> Iterator[str]:
    """The code of all methods; a property's too."""
    seen: set[int] = set()
    for base in kind.__mro__:
        if base.__module__ in ("builtins", "typing"):
            continue
        for name, value in sorted(vars(base).items()):
            held = value.fget if isinstance(value, property) else value
            held = getattr(held, "__func__", held)
            # Those that dataclasses write differ from release to release of Python.
            if not isinstance(held, FunctionType):
                continue
            file = held.__code__.co_filename
            if file != "<string>" or not name.startswith("__") or name == "__call__":
                yield name
                yield from _function_code(held, seen)


def _function_code(function: FunctionType, seen: set[int]) -> Iterator[str]:
    """The code of a function and of those of its module that it names."""
    if id(function) in seen:
        return
    seen.add(id(function))
    yield from _code(function.__code__)
    yield str(_described(function.__defaults__))
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(held, FunctionType):
            yield from _function_code(held, seen)
        else:
            yield str(_described(held))
    for name in _names(function.__code__):
        named = function.__globals__.get(name)
        if isinstance(named, FunctionType) and named.__module__ == function.__module__:
            yield from _function_code(named, seen)


def _names(code: CodeType) -> Iterator[str]:
    """Global names, those in comprehensions and inner functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield " ".join(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield str(_described(constant))
