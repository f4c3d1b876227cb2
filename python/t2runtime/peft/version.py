"""Which versions of the PEFT library this package works with."""

from __future__ import annotations

import importlib.metadata

#: Versions that the tests have run with.
TESTED = ("0.21.0", "0.21.2")
_ACCEPTED = "0.21."


def check_version(found: str | None = None) -> None:
    """Raises ImportError where PEFT is missing or of a release series that was never tested.

    The tuner overrides methods that PEFT calls internal; another series may call others. (0.20 and
    older save the adapters of methods that they list themselves, and no others.)

    >>> check_version("0.21.2")
    """
    if found is None:
        try:
            found = importlib.metadata.version("peft")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                "t2runtime.peft needs the PEFT library: pip install 't2kernels[peft]'."
            ) from None
    if not found.startswith(_ACCEPTED):
        raise ImportError(
            f"t2runtime.peft works with peft {_ACCEPTED}x (tested: {', '.join(TESTED)}), found "
            f"peft {found}. Install peft=={TESTED[-1]}, or use t2kernels.convert and Expert, "
            "which need no PEFT."
        )
