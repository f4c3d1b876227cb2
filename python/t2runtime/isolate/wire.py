"""Values between the process of the tests and the process of the answer: JSON in length-prefixed
frames.

Plain values travel as copies. What is no plain value stays where it is and travels as a number.
Nothing that arrives is ever executed.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import os
import struct
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 24
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda pairs: collections.defaultdict(None, pairs),
    "dict": dict,
}
#: Types of the standard library: to the arguments that make the value again, and back.
_MADE: dict[type, tuple[Callable[[Any], list[Any]], Callable[..., Any]]] = {
    complex: (lambda v: [v.real.hex(), v.imag.hex()],
              lambda a, b: complex(float.fromhex(a), float.fromhex(b))),
    bytes: (lambda v: [v.hex()], bytes.fromhex),
    bytearray: (lambda v: [v.hex()], bytearray.fromhex),
    range: (lambda v: [v.start, v.stop, v.step], range),
    fractions.Fraction: (lambda v: [str(v)], fractions.Fraction),
    decimal.Decimal: (lambda v: [str(v)], decimal.Decimal),
    datetime.datetime: (lambda v: [v.isoformat()], datetime.datetime.fromisoformat),
    datetime.date: (lambda v: [v.isoformat()], datetime.date.fromisoformat),
    datetime.time: (lambda v: [v.isoformat()], datetime.time.fromisoformat),
    datetime.timedelta: (lambda v: [v.days, v.seconds, v.microseconds], datetime.timedelta),
}  # fmt: skip
_MAKERS = {kind.__name__: maker for kind, (_, maker) in _MADE.items()}


class Closed(Exception):
    """The other side is gone, or sends what is no frame."""


def send_bytes(descriptor: int, data: bytes) -> None:
    """One frame: eight bytes of length, then the data."""
    view = memoryview(struct.pack(">Q", len(data)) + data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise Closed(str(error)) from None


def receive_bytes(descriptor: int, largest: int = LARGEST) -> bytes:
    """One frame."""
    length = struct.unpack(">Q", _exactly(descriptor, 8))[0]
    if length > largest:
        raise Closed(f"a message of {length} bytes; the most is {largest}")
    return _exactly(descriptor, length)


def _exactly(descriptor: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise Closed("the stream ended")
        parts += part
    return bytes(parts)


def send(descriptor: int, message: Any) -> None:
    """One JSON message."""
    send_bytes(descriptor, json.dumps(message).encode())


def receive(descriptor: int) -> Any:
    """One JSON message."""
    try:
        return json.loads(receive_bytes(descriptor))
    except (ValueError, RecursionError) as error:
        raise Closed(f"not JSON: {error}") from None


def pack(value: Any, reference: Callable[[Any], Any]) -> Any:
    """JSON for a value; `reference` gives the JSON of what is no plain value.

    >>> pack([1, (None, 2.5)], repr)
    ['list', [['int', '0x1'], ['tuple', [None, ['float', '0x1.4000000000000p+1']]]]]
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if type(value) in _MADE:
        return [type(value).__name__, _MADE[type(value)][0](value)]
    if isinstance(value, dict):
        name = type(value).__name__ if type(value).__name__ in _MAPPINGS else "dict"
        pairs = [[pack(k, reference), pack(v, reference)] for k, v in dict.items(value)]
        return [name, pairs]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, collections.deque if name == "deque" else kind):  # type: ignore[arg-type]
            return [name, [pack(item, reference) for item in value]]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return pack(value.tolist(), reference)
    if isinstance(value, type) and value.__module__ == "builtins":
        return ["builtin", value.__name__]
    return reference(value)


def unpack(message: Any, referred: Callable[[list[Any]], Any]) -> Any:
    """The value again; `referred` makes something of what `reference` gave. Raises what malformed
    messages raise: TypeError, ValueError, KeyError, IndexError.

    >>> unpack(pack({"a": [1, {2}]}, repr), repr)
    {'a': [1, {2}]}
    """
    if not isinstance(message, list):
        return message
    name, content = message
    if name == "int":
        return int(content, 16)
    if name == "float":
        return float.fromhex(content)
    if name in _MAKERS:
        return _MAKERS[name](*content)
    if name in _MAPPINGS:
        return _MAPPINGS[name]({unpack(k, referred): unpack(v, referred) for k, v in content})
    if name in _SEQUENCES:
        return _SEQUENCES[name](unpack(item, referred) for item in content)
    return referred(message)
