"""Units: one measurement under one seed each, in a process of its own; a finished one is a line of
the ledger and is not run again.

To add a measurement, write a module with

    measure(seed, context) -> dict      the row, all that JSON can hold
    CLAIMS: tuple[Claim, ...]           what of the paper the rows answer; see `claim.py`
    section(rows) -> list[str]          optional: more lines for docs/claims.md
    draw(rows, folder) -> dict          optional: pictures made, {file: what it shows}

and name it in `KINDS`. `rows` are {kind: [row of each seed]}, of all kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from t2runtime.claims import experts

#: Settings of this prefix change the recipe of every expert that is trained: "train.steps".
TRAIN = "train."


@dataclass(frozen=True)
class Kind:
    """module.function measures; `needs` names what of the context it cannot do without ("stories",
    "data"); `settings` are its own, with what they are unless given.
    """

    module: str
    function: str = "measure"
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measure(self) -> Callable[[int, Context], dict[str, Any]]:
        """The function."""
        return getattr(import_module(self.module), self.function)  # type: ignore[no-any-return]


_SEARCH = {"population": 20, "generations": 4}

KINDS: dict[str, Kind] = {
    "dispatch": Kind(
        "t2runtime.claims.dispatch",
        settings={"problems": 100, "shots": 10, "router_steps": 100, **_SEARCH},
    ),
    "shots": Kind(
        "t2runtime.claims.dispatch", "measure_shots", settings={"problems": 100, **_SEARCH}
    ),
    "compose": Kind("t2runtime.claims.compose", settings={"problems": 200}),
    "compose-stories": Kind(
        "t2runtime.claims.compose",
        "measure_stories",
        ("stories",),
        {"stories_told": 400, "train.steps": 16, "train.prompts": 8},
    ),
    "transfer": Kind(
        "t2runtime.claims.transfer",
        settings={
            "problems": 200,
            "shots": 10,
            **_SEARCH,
            "second_seed": 1,
            "second_steps": 2000,
            "second_rows": 128,
        },
    ),
    "vision-digits": Kind(
        "t2runtime.claims.vision",
        "measure_digits",
        ("data",),
        {"base_steps": 800, "steps": 100, "rows": 64},
    ),
    "vision-vqa": Kind(
        "t2runtime.claims.vision",
        "measure_vqa",
        ("data",),
        {
            "steps": 30,
            "prompts": 16,
            "problems": 200,
            "shots": 10,
            "population": 16,
            "generations": 5,
        },
    ),
}


@dataclass(frozen=True)
class Context:
    """What a measurement may use.

    model: the small base model. stories, data: a model that tells stories and a folder of data
    sets, None where they were not given. out: the folder of the run; experts are kept in it.
    """

    out: Path
    model: str = "small"
    stories: str | None = None
    data: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def training(self) -> dict[str, Any]:
        """Changes to the recipe of every expert."""
        return {k.removeprefix(TRAIN): v for k, v in self.settings.items() if k.startswith(TRAIN)}

    def trained(self, task: str, seed: int, model: str | None = None, **changes: Any) -> Path:
        """The file of an expert, trained now unless it has been; see `experts.trained`.

        model: default the small one. changes: to the recipe, fields of `train.Config`.
        """
        return experts.trained(
            self.out / "experts", task, seed, model or self.model, {**changes, **self.training}
        )


@dataclass(frozen=True)
class Unit:
    """One measurement under one seed: a job of the ledger."""

    name: str
    seed: int
    settings: tuple[tuple[str, Any], ...]
    context: Context = field(compare=False)

    @property
    def key(self) -> str:
        """What decides the row; the folder of results does not."""
        given = {k: v for k, v in asdict(self.context).items() if k not in ("out", "settings")}
        return json.dumps(
            {"unit": self.name, "seed": self.seed, "settings": self.settings, **given}
        )

    @property
    def command(self) -> list[str]:
        """What makes the row."""
        return ["t2runtime.claims.work", self.key, str(self.context.out)]

    @property
    def named(self) -> dict[str, Any]:
        """What the row says of the unit."""
        return {"unit": self.name, "seed": self.seed}


def units(
    names: Sequence[str], seeds: Sequence[int], context: Context
) -> tuple[list[Unit], dict[str, str]]:
    """(the units, a kind at a time: two seeds at once do not wait for the same experts; {kind left
    out: what it lacks}).

    Raises ValueError for an unknown kind, and for a setting that none of them has.
    """
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"units must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
    given = context.settings
    known = {key for name in names for key in KINDS[name].settings}
    odd = [key for key in given if key not in known and not key.startswith(TRAIN)]
    if odd:
        raise ValueError(
            f"settings must be of {', '.join(sorted(known))} or begin with {TRAIN!r}, "
            f"got {', '.join(odd)}"
        )
    lacking = {name: [n for n in KINDS[name].needs if not getattr(context, n)] for name in names}
    made = [
        Unit(name, seed, _settings(KINDS[name], given), context)
        for name in names
        if not lacking[name]
        for seed in seeds
    ]
    return made, {name: ", ".join(what) for name, what in lacking.items() if what}


def _settings(kind: Kind, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    own = {k: v for k, v in given.items() if k in kind.settings or k.startswith(TRAIN)}
    return tuple(sorted({**kind.settings, **own}.items()))
