"""A run's state in one file, written whole or not at all: a kill at any moment leaves the last one.

Tensors (the adapter's state, the best one, the optimiser's, torch's generators) travel as
safetensors, the rest as JSON in its header.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2kernels.files import load_tensors, save_tensors
from t2runtime.train.config import Config
from t2runtime.train.identity import differences

NAME = "checkpoint.safetensors"
_KIND, _VERSION = "training run", 2
_GROUPS = ("now", "best", "optimiser", "random")


@dataclass
class State:
    """Where a run stands after `step` steps.

    base: the base's validation accuracy, None before it is known. best: the adapter's state with
    the best validation so far, {} before the first one; best_key: its accuracy, then what breaks
    ties. waited: validations since. finished: why the run is over, "" while it goes on.
    """

    step: int = 0
    base: float | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    best_key: tuple[float, float] | None = None
    best_step: int = 0
    waited: int = 0
    finished: str = ""


def save(
    path: Path,
    state: State,
    now: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    identity: Mapping[str, Any],
) -> None:
    """Write everything that the next step depends on."""
    groups = (now, state.best, optimiser, _generators())
    tensors = {
        f"{group}/{name}": tensor
        for group, members in zip(_GROUPS, groups, strict=True)
        for name, tensor in members.items()
    }
    # Not asdict: it would copy the tensors.
    plain = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "best"}
    version, numbers, gauss = random.getstate()
    facts = {"kind": _KIND, "version": _VERSION, "identity": dict(identity), "state": plain,
             "python_random": [version, list(numbers), gauss]}  # fmt: skip
    save_tensors(path, tensors, facts)


def load(
    path: Path, identity: Mapping[str, Any]
) -> tuple[State, dict[str, Tensor], dict[str, Tensor]]:
    """(state, adapter's state, optimiser's state), and torch's and Python's generators are set.

    Raises ValueError naming what differs where the checkpoint is of another run. A run that came to
    its last step may go on for more, where the schedule of its learning rate is constant.
    """
    tensors, facts = load_tensors(path, kind=_KIND, version=_VERSION)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    state = _state(facts, groups["best"])
    found = _differences(facts["identity"], identity, state)
    if found:
        raise ValueError(
            f"cannot resume {path.parent}: it was trained with {'; '.join(found)}. Give the same "
            "settings, or start anew in another folder"
        )
    if identity["config"]["steps"] > facts["identity"]["config"]["steps"]:
        state.finished = ""
    version, numbers, gauss = facts["python_random"]
    random.setstate((version, tuple(numbers), gauss))
    _set_generators(groups["random"])
    return state, groups["now"], groups["optimiser"]


def standing(path: Path) -> State:
    """Where the run of a checkpoint stands, without its tensors."""
    _, facts = load_tensors(path, kind=_KIND, version=_VERSION)
    return _state(facts, {})


def _state(facts: Mapping[str, Any], best: dict[str, Tensor]) -> State:
    plain = dict(facts["state"])
    key = plain["best_key"]
    plain["best_key"] = None if key is None else (key[0], key[1])
    return State(**plain, best=best)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], state: State) -> list[str]:
    """What forbids to go on, in words; more steps at a constant rate do not."""
    known = {f.name for f in fields(Config)}
    if set(theirs["config"]) != known:
        return ["settings of another release of this package"]
    before, now = Config(**theirs["config"]), Config(**ours["config"])
    found = before.differences(now)
    if now.steps > before.steps:
        words = f"steps {before.steps}, not {now.steps}"
        found.remove(words)
        if now.schedule != "constant":
            found.append(
                f"{words} (its schedule {now.schedule!r} was laid out over {before.steps}: only "
                "'constant' can be extended)"
            )
        elif state.finished not in ("", "steps"):
            found.append(f"{words} (it ended by {state.finished} at step {state.step})")
    return found + differences(theirs, ours)


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(len(states) - 1):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)
