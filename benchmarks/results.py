"""Reading and writing result files: one JSON object, rows as a table, numbers rounded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
_DIGITS = 4


def _rounded(value: Any) -> Any:
    """Floats to four significant digits: more would be noise, and files are committed."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def write(path: Path, result: dict[str, Any]) -> None:
    """Write ``result``; an older file stays whole until the new one is complete."""
    rows = result["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [json.dumps([_rounded(row.get(c)) for c in columns]) for row in rows]
    head = {k: _rounded(v) for k, v in result.items() if k != "rows"} | {"columns": columns}
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    text += ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """The object that ``write`` was given, rounded."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {data['schema']!r}")
        columns = data.pop("columns")
        data["rows"] = [
            {c: v for c, v in zip(columns, row) if v is not None} for row in data["rows"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result of bench_svf.py ({error!r})") from error
    return data
