"""The folder of a run: config.json, metrics.jsonl with one line a step, and the checkpoint."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.files import atomic_path, folder_lock
from t2runtime.train import checkpoint
from t2runtime.train.checkpoint import State
from t2runtime.train.config import Config

#: Drawn by whoever likes; a new run's folder shows no older one's.
PICTURE = "training.png"


class Folder:
    """Where a run writes. Without a path nothing is written and nothing can be resumed."""

    def __init__(
        self,
        path: Path | None,
        cfg: Config,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self._cfg, self._identity, self._facts = path, cfg, identity, facts

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; a second one gets a RuntimeError."""
        if self.path is None:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.path):
            yield

    def begin(self, overwrite: bool) -> None:
        """Write the settings and start anew: what an earlier run left here is gone. One that is not
        finished is refused, without `overwrite`.
        """
        if self.path is None:
            return
        left = self.path / checkpoint.NAME
        if left.exists() and not overwrite:
            state = checkpoint.standing(left)
            if not state.finished:
                raise ValueError(
                    f"{self.path} holds a run that stands at step {state.step} and is not finished."
                    " Go on with it (resume, --resume), start anew and lose it (overwrite, "
                    "--overwrite), or take another folder (out, --run)"
                )
        for name in (checkpoint.NAME, PICTURE):
            (self.path / name).unlink(missing_ok=True)
        self._settings()
        (self.path / "metrics.jsonl").write_text("")

    def resume(self) -> tuple[State, dict[str, Tensor], dict[str, Tensor]] | None:
        """Take up the checkpoint; None where there is none. Metrics behind it are cut off."""
        if self.path is None:
            raise ValueError("resume needs the folder of the run (out), got none")
        if not (self.path / checkpoint.NAME).exists():
            return None
        found = checkpoint.load(self.path / checkpoint.NAME, self._identity)
        self._settings()
        self._cut(found[0].step)
        return found

    def append(self, line: Mapping[str, Any]) -> None:
        """One line of metrics."""
        if self.path is not None:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, state: State, now: dict[str, Tensor], optimiser: dict[str, Tensor]) -> None:
        """A checkpoint, after the metrics that lead to it are on the disk."""
        if self.path is None:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            os.fsync(file.fileno())
        checkpoint.save(self.path / checkpoint.NAME, state, now, optimiser, self._identity)

    def _settings(self) -> None:
        if self.path is None:
            return
        import transformers

        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "t2kernels": t2k.__version__,
        }
        facts = {
            **asdict(self._cfg),
            "given": dict(self._facts or {}),
            "run": {k: v for k, v in self._identity.items() if k != "config"},
            "versions": versions,
        }
        (self.path / "config.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _cut(self, steps: int) -> None:
        """Keep the first `steps` lines: a step that is made again must not be there twice."""
        if self.path is None:
            return
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        if len(lines) < steps:
            raise ValueError(
                f"cannot resume {self.path}: its checkpoint is at step {steps}, but metrics.jsonl "
                f"holds {len(lines)} lines. Was the file changed? Start anew in another folder"
            )
        with atomic_path(metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines[:steps]), encoding="utf-8")
