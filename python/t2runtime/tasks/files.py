"""Sources over local data: reading rows, splitting them, drawing problems.

Data is a folder with files called train, test and (where there is one) validation, or one file: a
file called train or test is that part, any other is split 80 / 10 / 10 by the checksum of the
prompt. Without a validation file, a tenth of the training rows, by the same checksum, are for
validation and never trained on. A training row whose prompt is also a test prompt is left out.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from t2runtime.tasks.base import EXACT, SPLITS, Grader, Problem, Split, split_of

Row = Mapping[str, Any]
#: A problem from a row; raises ValueError, KeyError or TypeError where the row is not as expected.
Read = Callable[[Row], Problem]
OnBadLines = Literal["error", "skip"]
Data = str | Path
HUB = "hf://"

logger = logging.getLogger(__name__)
#: So many broken lines are named one by one.
_NAMED = 20
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}


_FILES = (
    "Give a folder with the files train and test, or one file of at least a few dozen lines, of "
    "which a tenth each, by checksum of the prompt, is for validation and test"
)


class FileSource:
    """Problems that were read from files.

    skipped: broken lines that were left out. repeated: held-out rows left out because their prompt
    had come before, in whichever of the held-out splits; the first counts. shared: training rows
    left out because their prompt is held out. cut: splits that are a part of a file, by checksum.
    """

    def __init__(
        self,
        name: str,
        max_new_tokens: int,
        splits: Mapping[Split, Iterable[Problem]],
        grader: Grader = EXACT,
        skipped: int = 0,
        advice: str = _FILES,
        cut: Iterable[Split] = (),
    ) -> None:
        self.cut = frozenset(cut)
        self.name, self.max_new_tokens, self.skipped = name, max_new_tokens, skipped
        self._grader, self._advice = grader, advice
        given = {split: list(splits.get(split, ())) for split in SPLITS}
        out: set[str] = set()
        self._splits: dict[Split, list[Problem]] = {}
        held: tuple[Split, Split] = ("test", "validation")
        for split in held:
            first: dict[str, Problem] = {}
            for problem in given[split]:
                if problem.prompt not in out:
                    first.setdefault(problem.prompt, problem)
            out |= first.keys()
            self._splits[split] = sorted(first.values(), key=_order)
        self._splits["train"] = [p for p in given["train"] if p.prompt not in out]
        self.repeated = len(given["test"]) + len(given["validation"]) - len(out)
        self.shared = len(given["train"]) - len(self._splits["train"])

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides problems and rewards; see `Source`."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split}{self._splits[split]!r}".encode())
        return {"data": digest.hexdigest()[:16], "grader": self._grader}

    def size(self, split: Split) -> int:
        """Problems of a split; those held out are distinct."""
        return len(self._splits[split])

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return self._grader.grade(problems, completions)

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` problems. For training drawn by the seed, each at most once where there are
        enough; else the first of the split in a fixed order that mixes the file, or all.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        pool = self._splits[split]
        if not pool:
            raise ValueError(
                f"task {self.name!r} has no {split} problems in its data. {self._advice}"
            )
        if split != "train":
            return pool[:count]
        rng = random.Random(f"{self.name}/{seed}")
        return rng.sample(pool, count) if count <= len(pool) else rng.choices(pool, k=count)


def _order(problem: Problem) -> tuple[int, str]:
    return zlib.crc32(problem.prompt.encode()), problem.prompt


def load(
    name: str,
    data: Data,
    read: Read,
    *,
    max_new_tokens: int,
    grader: Grader = EXACT,
    on_bad_lines: OnBadLines = "error",
    split_by: Callable[[Row, Problem], Split | None] | None = None,
    advice: str = _FILES,
) -> FileSource:
    """The source of the problems that `read` makes of every row of `data`.

    `data` is a folder, a file (JSON lines, JSON, CSV; .gz too) or "hf://owner/name[:config]" for
    the `datasets` package. Lines that are no rows, or that `read` or the grader's `check` refuses,
    are an error that names the first and counts all; with `on_bad_lines="skip"` they are left out
    and counted, and the log warns. `split_by` gives the split of a row where the data say it
    themselves (None: the row is not used). `advice` is said where a split is empty.
    """
    if on_bad_lines not in ("error", "skip"):
        raise ValueError(f"on_bad_lines must be 'error' or 'skip', got {on_bad_lines!r}")
    splits: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    parts = list(_parts(data))
    own_validation = any(part == "validation" for part, _, _ in parts)
    check = getattr(grader, "check", None)
    cut: set[Split] = set()
    for part, place, rows in parts:
        for where, row in rows:
            try:
                if isinstance(row, Exception):
                    raise row
                problem = read(row)
                split = split_by(row, problem) if split_by else part
                if check is not None:
                    check(problem)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                said = f"no field {error}" if isinstance(error, KeyError) else str(error)
                bad.append(f"{place}, {where}: {said}")
                continue
            if split_by is None and (part is None or (part == "train" and not own_validation)):
                drawn = split_of(problem.prompt)
                cut |= set(SPLITS) if part is None else {"train", "validation"}
                split = drawn if part is None or drawn == "validation" else "train"
            if split is not None:
                splits[split].append(problem)
    _report(bad, on_bad_lines)
    if not any(splits.values()):
        raise ValueError(f"data must hold at least one problem, got none in {str(data)!r}")
    source = FileSource(name, max_new_tokens, splits, grader, len(bad), advice, cut)
    if source.repeated or source.shared:
        logger.warning(
            "%s: %d held-out rows left out because their prompt had come before, %d training rows "
            "because their prompt is held out", data, source.repeated, source.shared,
        )  # fmt: skip
    return source


def _report(bad: Sequence[str], on_bad_lines: OnBadLines) -> None:
    """Raise for the broken lines, or warn of them."""
    if bad and on_bad_lines == "error":
        more = f" Broken lines in all: {len(bad)}." if len(bad) > 1 else ""
        raise ValueError(
            f"{bad[0]}.{more} Correct the data, or leave such lines out with on_bad_lines='skip'"
        )
    if bad:
        rest = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        logger.warning("%d broken lines left out: %s%s", len(bad), "; ".join(bad[:_NAMED]), rest)


def _parts(data: Data) -> Iterator[tuple[Split | None, str, Iterable[tuple[str, Any]]]]:
    """(split or None, place, rows) of every file."""
    if isinstance(data, str) and data.startswith(HUB):
        yield from _from_hub(data[len(HUB) :])
        return
    path = Path(data).expanduser()
    if path.is_file():
        stem = path.name.split(".")[0].lower()
        named = [split for split, stems in _STEMS.items() if stem in stems]
        yield (named[0] if named else None), str(path), rows_of(path)
        return
    if not path.is_dir():
        raise ValueError(f"data {str(data)!r}: no such file or folder")
    files = {file.name.lower(): file for file in sorted(path.iterdir()) if file.is_file()}
    found: dict[Split | None, Path] = {}
    for split, stems in _STEMS.items():
        names = [stem + ending for stem in stems for ending in _ENDINGS if stem + ending in files]
        if names:
            found[split] = files[names[0]]
    if not found:
        lines = [file for name, file in files.items() if name.endswith(_ENDINGS[:2])]
        other = lines or [file for name, file in files.items() if name.endswith(_ENDINGS)]
        if len(other) != 1:
            raise ValueError(
                f"data {str(data)!r} must hold train and test ({', '.join(_ENDINGS)}) or one "
                f"such file of any name, got {', '.join(files) or 'no files'}"
            )
        found[None] = other[0]
    for part, file in found.items():
        yield part, str(file), rows_of(file)


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 3", row), or the exception in the place of a row that cannot be read."""
    raw = path.read_bytes()
    name = path.name.lower()
    if name.endswith(".gz"):
        try:
            raw, name = gzip.decompress(raw), name[: -len(".gz")]
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a gzip file: {error}") from None
    if name.endswith(".csv"):
        yield from _csv_rows(raw, path)
    elif name.endswith(".json"):
        yield from _json_rows(raw, path)
    else:
        lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"expected one JSON object, got {line[:40]!r} ({error})")
    return (
        row if isinstance(row, dict) else ValueError(f"expected one JSON object, got {line[:40]!r}")
    )


def _json_rows(raw: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected an array of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        good = isinstance(row, dict)
        yield f"entry {number}", row if good else ValueError(f"expected an object, got {row!r:.40}")


def _csv_rows(raw: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, None)
    if not header:
        raise ValueError(f"{path}, line 1: expected the names of the columns")
    first = reader.line_num + 1
    for fields in reader:
        if len(fields) == len(header):
            yield f"line {first}", dict(zip(header, fields, strict=True))
        elif fields:
            yield f"line {first}", ValueError(f"expected {len(header)} fields, got {len(fields)}")
        first = reader.line_num + 1


def _from_hub(name: str) -> Iterator[tuple[Split | None, str, Iterable[tuple[str, Any]]]]:
    """The parts of a data set that the `datasets` package finds, in its cache or on the network."""
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"data '{HUB}{name}' needs the datasets package: pip install datasets ({error}); or "
            "give a local file or folder"
        ) from error
    repository, _, config = name.partition(":")
    loaded = datasets.load_dataset(repository, *([config] if config else []))
    for split, stems in _STEMS.items():
        for stem in stems:
            if stem in loaded:
                rows = ((f"row {n}", row) for n, row in enumerate(loaded[stem], start=1))
                yield split, f"{HUB}{name} {stem}", rows
                break


def text_of(row: Row, *keys: str) -> str:
    """The text under the first of the keys that the row has; ValueError if it is none, or empty."""
    for key in keys:
        if key in row:
            value = row[key]
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"expected text in {key!r}, got {value!r:.60}")
            return value
    raise ValueError(
        f"expected a field {' or '.join(map(repr, keys))}, got {', '.join(row) or 'none'}"
    )
