"""The process of the tests: runs them with stand-ins for everything that the answer defines, and
alone says whether they passed.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from typing import Any

from t2runtime.isolate import wire


class Channel:
    """Asks the process of the answer."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests, self._replies = requests, replies

    def loaded(self) -> None:
        """Wait until the code was executed; raises what it raised."""
        self._reply()

    def named(self, name: str) -> tuple[bool, Any]:
        """Whether the answer defines the name, and its value."""
        wire.send(self._requests, {"do": "name", "name": name})
        reply = self._reply()
        return (False, None) if "absent" in reply else (True, self._value(reply["value"]))

    def ask(self, do: str, of: int, *arguments: Any, **named: Any) -> Any:
        """Have something done with object number `of`; arguments that it changes are changed."""
        sent = [wire.pack(value, _refer) for value in arguments]
        named = {key: wire.pack(value, _refer) for key, value in named.items()}
        wire.send(self._requests, {"do": do, "of": of, "with": sent, "named": named})
        reply = self._reply()
        for value, before, after in zip(arguments, sent, reply.get("with", ()), strict=False):
            if after is not None and after != before:
                _become(value, self._value(after))
        return self._value(reply["value"])

    def _value(self, message: Any) -> Any:
        try:
            return wire.unpack(message, self._referred)
        except (TypeError, ValueError, KeyError, IndexError, RecursionError) as error:
            raise wire.Closed(f"not a value: {error}") from None

    def _referred(self, message: list[Any]) -> Any:
        if message[0] == "builtin":
            kind = getattr(builtins, str(message[1]))
            if not isinstance(kind, type):
                raise ValueError(message[1])
            return kind
        if message[0] != "object" or not isinstance(message[1], int):
            raise ValueError(message[0])
        return Remote(self, message[1])

    def _reply(self) -> Any:
        reply = wire.receive(self._replies)
        if reply is None:
            return {}
        if not isinstance(reply, dict):
            raise wire.Closed("not a reply")
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            # Control flow of this process is not the answer's business.
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(
                kind, (StopIteration, StopAsyncIteration, UnicodeError)
            ):
                kind = RuntimeError
            raise kind(str(reply.get("text", "")))
        return reply


class Remote:
    """An object that stays with the answer: a function, a class, an instance, an iterator.

    What it is compared with does not go to it: `in` walks over it here.
    """

    def __init__(self, channel: Channel, number: int) -> None:
        self.__dict__.update(_channel=channel, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set item", key, value)

    def __iter__(self) -> Iterator[Any]:
        walk = self._ask("iterate")
        if not isinstance(walk, Remote):
            raise TypeError("iter() of the answer gives no iterator")
        while item := walk._ask("next"):
            yield item[0]

    def __next__(self) -> Any:
        if item := self._ask("next"):
            return item[0]
        raise StopIteration

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __bool__(self) -> bool:
        return self._ask("true") is True

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __eq__(self, other: object) -> bool:
        # Only between two objects of the answer may the answer say what is equal.
        return isinstance(other, Remote) and self._ask("equal", other) is True

    __hash__ = None  # type: ignore[assignment]

    def _ask(self, do: str, *arguments: Any, **named: Any) -> Any:
        fields = self.__dict__
        return fields["_channel"].ask(do, fields["_number"], *arguments, **named)


def _refer(value: Any) -> list[Any]:
    """Functions of modules travel by name; anything else of the tests' own cannot travel."""
    if isinstance(value, Remote):
        return ["object", value.__dict__["_number"]]
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module and name.isidentifier() and module not in ("tests", "__main__"):
        return ["function", [module, name]]
    raise TypeError(
        f"the tests pass a {type(value).__name__} to the answer, which runs in another process: "
        "only plain values, the answer's own objects and functions of modules can be passed"
    )


def _become(value: Any, new: Any) -> None:
    """Give a list, dictionary or set the content of another."""
    if isinstance(value, list) and isinstance(new, list):
        value[:] = new
    elif isinstance(value, (dict, set)) and isinstance(new, type(value)):
        value.clear()
        value.update(new)


def free_names(programs: Sequence[str]) -> list[str]:
    """The names that the tests read and neither set, import nor find among the builtins; if there
    is none, the builtins that they call (an answer may be called `sum`).

    >>> sorted(free_names(["import math", "assert set(f(math.pi)) == g"]))
    ['f', 'g']
    >>> free_names(["assert sum(10, 15) == 6"])
    ['sum']
    """
    read: dict[str, None] = {}
    own: set[str] = set()
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Load):
                    read[node.id] = None
                else:
                    own.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            elif isinstance(node, ast.alias):
                own.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                own.add(node.name)
    names = [name for name in read if name not in own]
    return [name for name in names if not hasattr(builtins, name)] or names


def run(channel: Channel, programs: Sequence[str]) -> str | None:
    """None if every program ran to its end without an exception, else what went wrong."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        names = free_names(programs)
    except SyntaxError as error:
        return f"the tests are no Python: {error}"
    try:
        channel.loaded()
        for name in names:
            defined, value = channel.named(name)
            if defined:
                namespace[name] = value
    except wire.Closed:
        return "the program ended before the tests"
    except Exception as error:
        return f"loading: {type(error).__name__}: {error}"[:300]
    for number, program in enumerate(programs, start=1):
        try:
            exec(compile(program, f"<test {number}>", "exec"), namespace)
        except wire.Closed as error:
            return f"test {number}: the program ended: {error}"
        except BaseException as error:
            return f"test {number}: {type(error).__name__}: {error}"[:300]
    return None
