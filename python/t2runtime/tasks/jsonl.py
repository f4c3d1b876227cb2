"""Questions from a JSON-lines file, one object with "prompt" and "answer" per line, as a source
for training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from t2runtime.tasks.base import EXACT, SPLITS, Grader, Problem, Split, split_of


class JsonLines:
    """Callable as (count, split, seed) -> problems. Lines are split 80 / 10 / 10 by the checksum
    of the prompt.
    """

    def __init__(self, path: Path, grader: Grader = EXACT, max_new_tokens: int = 8) -> None:
        self.name, self.max_new_tokens, self._grader = path.stem, max_new_tokens, grader
        self._splits: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                problem = self._read(line, f"{path}, line {number}")
                self._splits[split_of(problem.prompt)].append(problem)

    def _read(self, line: str, where: str) -> Problem:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: expected one JSON object, got {line[:40]!r} ({error})"
            ) from None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("prompt", "answer")
        ):
            raise ValueError(
                f'{where}: expected {{"prompt": text, "answer": text}}, got {line[:60]!r}'
            )
        return Problem(row["prompt"], row["answer"], self.name)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return self._grader.grade(problems, completions)

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` problems; for training drawn anew per seed, else the first distinct ones of the
        split.
        """
        pool = self._splits[split]
        if not pool:
            raise ValueError(
                f"task {self.name!r} has no {split} lines (by checksum of the prompt, a tenth of "
                "the lines is for validation, a tenth for testing); give the file more lines"
            )
        if split == "train":
            return random.Random(f"{self.name}/{seed}").choices(pool, k=count)
        distinct: dict[str, Problem] = {}
        for problem in pool:
            distinct.setdefault(problem.prompt, problem)
        return list(distinct.values())[:count]
