"""JSON files of what an adaptation found: a checksum over the content, and values of the types that
they are said to have.

Such files are also written by hand, so one without a checksum is read, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2kernels import CorruptFileError
from t2kernels.files import read_json, write_json

logger = logging.getLogger(__name__)
#: The field that holds the checksum, as in the files of experts.
DIGEST = "digest"


def write_stored(path: str | Path, kind: str, version: int, facts: Mapping[str, Any]) -> None:
    """Write `facts` with their checksum, whole or not at all."""
    whole = {"kind": kind, "version": version, **facts}
    try:
        # There and back: what is hashed is what a reader will find.
        whole = json.loads(json.dumps(whole, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot write {path} as JSON: {error}") from error
    write_json(path, {**whole, DIGEST: digest(whole)})


def read_stored(
    path: str | Path, kind: str, version: int, *, required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """The facts that `write_stored` was given, {field: value}: all that are required, none that is
    unknown.

    Raises FileNotFoundError, and CorruptFileError for a file that is truncated, damaged (its
    checksum is another) or of another kind. One without a checksum is read, and the log warns.
    """
    whole = read_json(path, kind=kind, version=version)
    said = whole.pop(DIGEST, None)
    try:
        found = digest(whole)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path} is not a whole {kind}: it holds NaN or inf, or lists too deep ({error})."
        ) from error
    if said is None:
        logger.warning(
            "%s has no checksum (field %r), as files written by hand or by earlier releases: "
            "damage to it would not be noticed", path, DIGEST,
        )  # fmt: skip
    elif said != found:
        raise CorruptFileError(
            f"{path} is damaged: its checksum is not the one that was taken when it was written. "
            "Copy or make it again; to accept a change that was made by hand, remove its field "
            f"{DIGEST!r}."
        )
    facts = {name: value for name, value in whole.items() if name not in ("kind", "version")}
    missing = [name for name in required if name not in facts]
    unknown = [name for name in facts if name not in (*required, *optional)]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has an unknown {unknown[0]!r:.80}"
        known = ", ".join((*required, *optional))
        raise CorruptFileError(f"{path} is not a whole {kind}: it {what}. Its fields are {known}.")
    return facts


def digest(facts: Mapping[str, Any]) -> str:
    """Hex sha256 of the JSON of `facts`, keys in order; ValueError for NaN and inf.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    True
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def mapping(value: Any, what: str, holds: str) -> None:
    """TypeError unless it is a mapping with texts as keys; `holds` says of what."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{what} must be a mapping {holds}, got {value!r:.80}")


def text(value: Any, what: str) -> None:
    """TypeError unless it is a text."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a text, got {value!r:.80}")


def whole_number(value: Any, what: str) -> None:
    """TypeError unless it is an int, and no bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be a whole number, got {value!r:.80}")
