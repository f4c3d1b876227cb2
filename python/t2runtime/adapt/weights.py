"""What a request may be answered with, and what `ExpertBank.use` is told for a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import t2kernels as t2k
from t2runtime.adapt.mixtures import Hashes, TaskMixture, alpha_row, is_weight

#: None is the base, a name is that expert at 1, a mapping gives weights, a found mixture its own.
Mixture = str | Mapping[str, float] | TaskMixture | None


def check_mixture(
    bank: t2k.ExpertBank, mixture: Mixture, what: str, hashed: Hashes | None = None
) -> None:
    """Raise unless the bank can mix it: experts that it has, weights that are finite numbers.

    `what` says in the message whose mixture it is. hashed: as for `TaskMixture.check`.
    """
    if isinstance(mixture, TaskMixture):
        mixture.check(bank, hashed)
        return
    if mixture is not None and not isinstance(mixture, (str, Mapping)):
        raise TypeError(
            f"{what} must be an expert's name, a {{name: weight}} or None, got "
            f"{type(mixture).__name__}"
        )
    for name, weight in parts(mixture).items():
        if name not in bank:
            raise ValueError(
                f"{what} needs expert {name!r}, the bank has {', '.join(bank.names) or 'none'}. "
                "Add it, or say mixtures={category: None} (--base-answers CATEGORY) for a category "
                "that the base answers"
            )
        if not is_weight(weight):
            raise ValueError(
                f"{what}: the weight of {name!r} must be a finite number, got {weight!r} "
                "(fp32 holds up to 3.4e+38)"
            )


def parts(mixture: Mixture) -> dict[str, float]:
    """{expert: weight} of a mixture that is the same in every layer; {} is the base.

    >>> parts("math"), parts(None), parts({"math": 0.5})
    ({'math': 1.0}, {}, {'math': 0.5})
    """
    if isinstance(mixture, TaskMixture):
        if mixture.per_layer:
            raise ValueError(
                f"the mixture of task {mixture.task!r} has weights per layer and cannot be "
                "weighted again. Use strategy 'prompt' or 'classifier'"
            )
        return dict(mixture.rows()[""])
    return {mixture: 1.0} if isinstance(mixture, str) else dict(mixture or {})


def combined(
    shares: Mapping[str, float], meaning: Callable[[str], Mixture]
) -> dict[str, float] | None:
    """The sum of what categories stand for, each weighted with its share; None is the base.

    >>> combined({"math": 0.75, "other": 0.25}, {"math": "math", "other": None}.get)
    {'math': 0.75}
    """
    total: dict[str, float] = {}
    for category, share in shares.items():
        for name, weight in parts(meaning(category)).items():
            total[name] = total.get(name, 0.0) + share * weight
    return total or None


def routing(
    bank: t2k.ExpertBank, mixtures: Sequence[Mixture]
) -> dict[str, float] | list[dict[str, float]] | Tensor:
    """What `bank.use` takes for these requests: a list, or alpha (B, L, K) fp32 where one of them
    has weights per layer. Where all are equal it is one mixture, or B = 1: no row need be told from
    another, whatever the model makes of its batch.

    mixtures: as `check_mixture` has passed them; experts are not hashed again.
    """
    if not any(isinstance(m, TaskMixture) and m.per_layer for m in mixtures):
        each = [parts(mixture) for mixture in mixtures]
        return each[0] if all(one == each[0] for one in each) else each
    rows = []
    for mixture in mixtures:
        if isinstance(mixture, TaskMixture):
            rows.append(mixture.checked_alpha(bank, per_layer=True))
        else:
            rows.append(alpha_row(parts(mixture), bank).repeat(len(bank.layers), 1))
    alpha = torch.stack(rows)
    return alpha[:1] if bool((alpha == alpha[:1]).all()) else alpha
