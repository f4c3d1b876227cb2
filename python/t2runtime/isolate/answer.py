"""The process of the answer: executes the candidate's code, then does what the tests ask of it.

Neither the tests nor the expected values ever come here, and no verdict leaves from here: a
program that ends early, patches its interpreter or prints what it likes gains nothing.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import operator
import os
import sys
import types
from typing import Any, NoReturn

from t2runtime.isolate import wire

_ACTIONS = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "attribute": getattr, "set": setattr, "item": operator.getitem, "set item": operator.setitem,
    "iterate": iter, "next": lambda iterator: list(itertools.islice(iterator, 1)), "length": len,
    "equal": operator.eq, "text": str, "repr": repr, "true": bool,
}  # fmt: skip


class Answer:
    """Objects by number, and the loop that serves requests."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests, self._replies = requests, replies
        self._objects: list[Any] = []
        self._module = types.ModuleType("answer")

    def run(self, code: str) -> NoReturn:
        """Execute the code, say how that went, serve until the tests hang up."""
        sys.modules["answer"] = self._module
        self._say(lambda: exec(compile(code, "<answer>", "exec"), self._module.__dict__))
        try:
            while True:
                request = wire.receive(self._requests)
                self._say(lambda r=request: self._do(r))  # type: ignore[misc]
        except wire.Closed:
            os._exit(0)

    def _say(self, work: Any) -> None:
        """Send the outcome of `work`, or the exception that it ended with."""
        try:
            outcome = work()
        except BaseException as error:  # also SystemExit: leaving is no answer
            kind = type(error)
            while not (kind.__module__ == "builtins" and hasattr(builtins, kind.__name__)):
                kind = kind.__mro__[1]
            outcome = {"raised": kind.__name__, "text": _text(error)}
        wire.send(self._replies, outcome)

    def _do(self, request: Any) -> Any:
        if request["do"] == "name":
            name = request["name"]
            if not hasattr(self._module, name):
                return {"absent": True}
            return {"value": self._pack(getattr(self._module, name))}
        target = self._objects[request["of"]]
        arguments = [self._unpack(value) for value in request["with"]]
        named = {key: self._unpack(value) for key, value in request["named"].items()}
        result = _ACTIONS[request["do"]](target, *arguments, **named)  # type: ignore[operator]
        return {
            "value": self._pack(result),
            # What the call did to its arguments shows in the tests as it would in one process.
            "with": [
                self._pack(value) if isinstance(value, (list, dict, set)) else None
                for value in arguments
            ],
        }

    def _pack(self, value: Any) -> Any:
        return wire.pack(value, self._refer)

    def _unpack(self, message: Any) -> Any:
        return wire.unpack(message, self._referred)

    def _refer(self, value: Any) -> list[Any]:
        self._objects.append(value)
        return ["object", len(self._objects) - 1]

    def _referred(self, message: list[Any]) -> Any:
        kind, content = message
        if kind == "object":
            return self._objects[content]
        if kind == "builtin":
            return getattr(builtins, content)
        if kind == "function":
            return getattr(importlib.import_module(content[0]), content[1])
        raise ValueError(f"no such kind of value: {kind}")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except Exception:
        return ""
