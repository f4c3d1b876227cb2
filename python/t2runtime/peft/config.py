"""SVFConfig, and what can be said only at the moment an adapter is loaded."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

_PARAMETRISATIONS = ("direct", "sigmoid-normalised")
_PRECISIONS = ("fp32", "fp64")
_NOTE = """
## SVF adapter

The method is registered by an import, before the adapter is loaded:

```python
import t2runtime.peft
```
"""


class SVFType(str, enum.Enum):
    """The key of SVF in PEFT's mappings; PEFT's own enumeration cannot be extended."""

    SVF = "SVF"


@dataclass
class SVFConfig(PeftConfig):
    """Configuration of an SVF adapter: y = x·V·diag(σ⊙z)·Uᵀ with one trainable z per layer.

    Args:
        target_modules: names or ends of names of nn.Linear and Conv1D layers, a regular expression
            for the whole name, or "all-linear" (also what None means: all but the output head).
        exclude_modules: ends of names, or a regular expression, of layers to leave alone.
        layers_to_transform, layers_pattern: only these layer numbers; with a list of targets.
        modules_to_save: other modules to train and save whole.
        rank: k leading components per layer on top of the stored weight; None means all
            r = min(in, out) components in place of it.
        parametrisation: "direct" (z multiplies σ) or "sigmoid-normalised" (the authors' code).
        decomposition: a folder written by `t2 decompose`, used instead of decomposing here. It is
            a path of this machine and not saved; see ``loading``.
        precision: of the decomposition, "fp32" or "fp64".
        recompute: compute xV again in backward instead of keeping it.
        init_weights: True starts at the base model; False adds 1 % of noise to z, for tests.
        fingerprints: {layer: hash of its base weight}; filled in when the adapter is made and
            compared when it is loaded.
        requires: what a program has to do before it loads the adapter, for people.

    z is fp32 whatever the model's dtype, in memory and in files: a step of 2e-3 vanishes in bf16.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    rank: int | None = field(default=None)
    parametrisation: str = field(default="direct")
    decomposition: str | None = field(default=None)
    precision: str = field(default="fp32")
    recompute: bool = field(default=False)
    init_weights: bool = field(default=True)
    fingerprints: dict[str, str] | None = field(default=None)
    requires: str = field(default="import t2runtime.peft")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SVFType.SVF
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "SVFConfig: layers_to_transform needs target_modules as a list of names, got "
                f"{self.target_modules!r}. Put the layer numbers into the expression instead."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("SVFConfig: layers_pattern says nothing without layers_to_transform.")
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise ValueError(
                f"SVFConfig: rank must be a positive integer or None, got {self.rank!r}."
            )
        for name, allowed in (("parametrisation", _PARAMETRISATIONS), ("precision", _PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"SVFConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all fields but the path of the decomposition, sets in order."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("decomposition", None)
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, and a line in the model card on the import that the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.exists():
            text = card.read_text(encoding="utf-8")
            if "import t2runtime.peft" not in text:
                card.write_text(text.rstrip() + "\n" + _NOTE, encoding="utf-8")


@dataclass(frozen=True)
class Loading:
    """What holds inside a ``loading`` block."""

    allow_mismatch: bool = False
    decomposition: str | None = None


_LOADING: ContextVar[Loading | None] = ContextVar("t2runtime_peft_loading", default=None)


def now() -> Loading:
    """What holds here."""
    return _LOADING.get() or Loading()


@contextmanager
def loading(
    *, allow_mismatch: bool = False, decomposition: str | Path | None = None
) -> Iterator[None]:
    """Inside, adapters are loaded (or made) with these choices, by whatever route.

    Args:
        allow_mismatch: accept an adapter that was trained on another base model; its layers must
            be there and have its sizes all the same.
        decomposition: a folder written by `t2 decompose` for the base model in use.

    >>> with loading(allow_mismatch=True):
    ...     now().allow_mismatch
    True
    """
    before = now()
    folder = before.decomposition if decomposition is None else str(decomposition)
    token = _LOADING.set(Loading(allow_mismatch or before.allow_mismatch, folder))
    try:
        yield
    finally:
        _LOADING.reset(token)
