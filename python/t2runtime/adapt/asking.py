"""What a classification expert was trained to be asked, kept in its metadata.

Training writes the whole way of asking (`Categories`: names in order, descriptions, template,
chat template or none) into the expert; `t2 classify` and the engine ask from there, so that all
three give the model the same tokens. Files without it, older ones say, are asked like the base.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import t2kernels as t2k
from t2runtime.adapt.mixtures import Hashes, TaskMixture
from t2runtime.adapt.prompt import Categories, categories_for
from t2runtime.adapt.weights import Mixture, check_mixture, parts
from t2runtime.loading import SMALL_NAME

logger = logging.getLogger(__name__)
#: The key in the metadata of an expert.
KEY = "categories"


def classifies(expert: t2k.Expert) -> bool:
    """Whether the expert names categories, by its metadata: it answers no question itself."""
    return KEY in expert.metadata


def bank_categories(bank: t2k.ExpertBank, classifier: str | None = None) -> Categories:
    """The experts of a bank that answer questions, with their descriptions, asked in the way of its
    model. Raises ValueError where there is none.
    """
    names = [name for name in bank.names if name != classifier and not classifies(bank[name])]
    if not names:
        raise ValueError(
            "the bank is empty: pass 1 has no expert to choose from. Add one with "
            "bank.add(name, expert), or use strategy=None for the base weights"
        )
    config = getattr(bank.model, "config", None)
    small = getattr(config, "_name_or_path", None) == SMALL_NAME
    return categories_for(names, {n: bank[n].description for n in names}, small=small)


def trained_to_name(expert: t2k.Expert, name: str) -> Categories | None:
    """How the expert called `name` was asked in training; None where its metadata do not say it.

    Raises ValueError where they are damaged.
    """
    if KEY not in expert.metadata:
        return None
    try:
        return Categories.from_facts(expert.metadata[KEY])
    except ValueError as error:
        raise ValueError(
            f"the metadata {KEY!r} of expert {name!r}, how it was asked in training, are damaged: "
            f"{error}. Train it again"
        ) from None


def difference(one: Categories, other: Categories) -> str | None:
    """In what the questions of two differ, in words; None where they are the same.

    The chat template is left out: where one leaves it to the caller it cannot be told.

    >>> difference(Categories(("a", "b")), Categories(("b", "a")))
    "names ('a', 'b') against ('b', 'a')"
    """
    for key in ("names", "other", "template", "descriptions", "lead"):
        a, b = getattr(one, key), getattr(other, key)
        if a != b:
            return f"{key} {a!r} against {b!r}"
    return None


def servable(
    bank: t2k.ExpertBank,
    classifier: str,
    given: Categories | None,
    meaning: Callable[[str, Categories], Mixture],
    told: set[str],
    hashed: Hashes | None = None,
) -> Categories | None:
    """How the bank's classification expert was asked in training; None where it does not say it.

    given: categories that the user has set. meaning: (category, categories) -> what it stands for.
    told: experts that the log has warned of, those that no category of the classifier stands for;
    the new ones are added. hashed: of the bank's experts, where they are known.

    Raises ValueError where `given` asks something else, or a category needs an expert that the
    bank lacks.
    """
    own = trained_to_name(bank[classifier], classifier)
    if own is None:
        return None
    if given is not None and (differs := difference(own, given)):
        raise ValueError(
            f"categories must be what the classifier {classifier!r} was trained on, got {differs}. "
            "Leave categories out, or train the classifier again"
        )
    reached: set[str] = set()
    for name in own.names:
        meant = meaning(name, own)
        try:
            check_mixture(
                bank, meant, f"category {name!r} of the classifier {classifier!r}", hashed
            )
        except ValueError as error:
            raise ValueError(
                f"{error}; or train the classifier for the experts there are"
            ) from None
        reached |= _experts(meant)
    answering = {name for name in bank.names if not classifies(bank[name])}
    if new := sorted(answering - reached - told):
        told.update(new)
        logger.warning(
            "the classifier %r was not trained to name %s: it gives no request to them until it "
            "is trained again", classifier, ", ".join(new),
        )  # fmt: skip
    return own


def tell_unnamed(categories: Categories, tasks: Iterable[str]) -> list[str]:
    """The tasks that pass 1 cannot name, so that a record of them decides nothing; the log warns of
    them, with the remedy.
    """
    unnamed = [task for task in tasks if task not in categories.all_names]
    if unnamed:
        logger.warning(
            "pass 1 names %s, so never %s: what the record says of these decides nothing, and a "
            "category that it says nothing of gets the base. Call a task like the expert of its "
            "category: NAME=TASK", ", ".join(categories.all_names), ", ".join(unnamed),
        )  # fmt: skip
    return unnamed


def _experts(mixture: Mixture) -> set[str]:
    if isinstance(mixture, TaskMixture):
        return {name for weights in mixture.rows().values() for name in weights}
    return set(parts(mixture))
