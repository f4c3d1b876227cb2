"""Program text in a completion."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*\n", re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py", "py3", "pycon", "sage")
#: Where answers end that go on with something else.
_STOPS = ("[DONE]", "<|endoftext|>", "<|eot_id|>", "</s>")


def blocks(completion: str) -> list[str]:
    """Fenced blocks in Python or in no named language; one that is never closed ends with the text.

    >>> blocks("Sure:\\n```python\\nx = 1\\n```\\nand ~~~ no")
    ['x = 1\\n']
    """
    found, place = [], 0
    while opened := _FENCE.search(completion, place):
        mark = opened[1]
        closing = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE)
        closed = closing.search(completion, opened.end())
        end = closed.start() if closed else len(completion)
        if opened[2].lower() in _LANGUAGES:
            found.append(completion[opened.end() : end])
        place = closed.end() if closed else len(completion)
    return found


def code(completion: str, defines: str | None = None) -> str | None:
    """The first fenced block that defines `defines` (without it: that defines anything), else the
    first block, else the whole text up to a mark of its end. None if that is empty.

    >>> code("```py\\nprint(f(1))\\n```\\n```py\\ndef f(x): return x\\n```", "f")
    'def f(x): return x\\n'
    >>> code("[BEGIN]\\ndef f(): pass\\n[DONE] more")
    '\\ndef f(): pass\\n'
    """
    text = completion.replace("\r\n", "\n")
    for stop in _STOPS:
        text = text.split(stop)[0]
    text = text.split("[BEGIN]")[-1]
    found = blocks(text)
    name = r"\w+" if defines is None else re.escape(defines)
    definition = re.compile(rf"^\s*(?:async\s+def|def|class)\s+{name}\b|^{name}\s*=", re.MULTILINE)
    before = text.split("```")[0]
    if text.count("```") == 1 and definition.search(before):
        found = [before]  # the prompt had opened the fence
    fitting = [block for block in found if definition.search(block)] or found or [text]
    return fitting[0] if fitting[0].strip() else None
