"""From a completion to a reward: answer extraction as pure functions, and the paper's reward of
plus or minus one.

Each extractor gives one form for everything that means the same, or None where there is no answer.
"""

from __future__ import annotations

from collections.abc import Callable

from t2runtime.rewards.choices import choice
from t2runtime.rewards.code import code
from t2runtime.rewards.finals import final_number
from t2runtime.rewards.formulas import boxed
from t2runtime.rewards.numbers import number

Extract = Callable[[str], str | None]


def text(completion: str) -> str | None:
    """The completion without the spaces around it; None if nothing is left.

    >>> text(" 85 ")
    '85'
    """
    return completion.strip() or None


def label(completion: str) -> str | None:
    """The first line that is not empty, as a label: lower case, words joined by underscores.

    >>> label("Card arrival.")
    'card_arrival'
    """
    lines = [line for line in completion.splitlines() if line.strip()]
    words = lines[0].strip(" .,:;!*`'\"\t").lower().replace("-", "_").split() if lines else []
    return "_".join(words) or None


EXTRACTORS: dict[str, Extract] = {
    "text": text,
    "number": number,
    "final-number": final_number,
    "choice": choice,
    "boxed": boxed,
    "label": label,
}


def gold(answer: str, extract: Extract = text, own: Extract | None = None) -> str:
    """The form that a right completion must give. `own` reads the answer where the task has its own
    way; without it `extract` does, from the answer as it is or in a box.

    >>> gold("10", boxed), gold("B", text, choice)
    ('10', 'B')
    """
    forms = (answer, f"\\boxed{{{answer}}}")
    read = (own(answer),) if own else (extract(form) for form in forms)
    found = next((form for form in read if form is not None), None)
    if found is None:
        raise ValueError(f"answer must contain an answer to compare with, got {answer!r}")
    return found


def check_gold(answer: str, extract: Extract, own: Extract | None = None) -> None:
    """Raise ValueError where no completion can give the answer: letters are never numbers."""
    try:
        right = gold(answer, extract, own)
        forms = (answer, right, f"\\boxed{{{right}}}", f"#### {right}")
        if any(extract(form) == right for form in forms):
            return
    except ValueError:
        pass
    names = {known: name for name, known in EXTRACTORS.items()}
    raise ValueError(
        f"expected an answer that can be read with extract={names.get(extract, 'its own')}, "
        f"got {answer!r:.60}: leave out extract, or choose another"
    )


def is_correct(
    completion: str, answer: str, extract: Extract = text, own: Extract | None = None
) -> bool:
    """Whether what `extract` reads from the completion is the answer; see `gold`."""
    return extract(completion) == gold(answer, extract, own)


def reward_of(right: bool, wrong: float = -1.0) -> float:
    """+1 for a right answer, `wrong` for any other (the paper's r; -0.1 in its vision runs).

    >>> reward_of(True), reward_of(False), reward_of(False, wrong=-0.1)
    (1.0, -1.0, -0.1)
    """
    return 1.0 if right else wrong


__all__ = [
    "EXTRACTORS",
    "Extract",
    "boxed",
    "check_gold",
    "choice",
    "code",
    "final_number",
    "gold",
    "is_correct",
    "label",
    "number",
    "reward_of",
    "text",
]
