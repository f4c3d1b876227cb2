"""Shots: the labelled problems that a mixture is found from, how likely their answers are, and
which problems are left to be scored.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from t2runtime.generation import (
    Completions,
    chosen_log_probs,
    complete_ids,
    forced,
    forward_parameters,
    token_log_probs,
    too_wide,
)
from t2runtime.tasks import Problem, Source, Split

logger = logging.getLogger(__name__)
OnLeak = Literal["remove", "error"]


def check_shots(shots: Sequence[Problem]) -> None:
    """Raise unless there is a shot and each has an answer."""
    if not shots:
        raise ValueError("shots must hold at least one labelled problem, got none")
    for shot in shots:
        if not shot.answer:
            raise ValueError(f"shots must have right answers, got none for {shot.prompt!r:.60}")


def draw_shots(source: Source, count: int, split: Split, seed: int) -> list[Problem]:
    """`count` labelled problems of a split to search with, each prompt once; where there are fewer,
    all of them, and the log warns. Raises as `check_shots` does.
    """
    shots = list({problem.prompt: problem for problem in source(count, split, seed)}.values())
    check_shots(shots)
    if len(shots) < count:
        why = ""
        if split in getattr(source, "cut", ()):
            why = (
                "; its data were split by checksum of the prompt, a tenth for validation and, of "
                "one file, a tenth for test: give more lines, a file for each split, or take the "
                "shots from another split (shots_from, --shots-from)"
            )
        logger.warning(
            "task %r: %d shots asked for, %d found in the %s split%s", source.name, count,
            len(shots), split, why,
        )  # fmt: skip
    return shots


def same_question(problem: Problem) -> str:
    """What two problems share that count as one question: the prompt, but for runs of spaces, case,
    quotes around it, punctuation at its end and other forms of the same characters (wide ones,
    ligatures, curly quotes, the minus sign).

    Punctuation inside, signs of arithmetic, digits above or below the line, and "!" at the end,
    which may be a factorial, make another question.

    >>> same_question(Problem(" What is  2+2? ", "4", "add"))
    'what is 2+2'
    """
    text = " ".join(_one_form(problem.prompt).split()).casefold()
    bare, before = text, ""
    while bare != before:
        before = bare
        bare = bare.rstrip(_ENDS)
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in _QUOTES:
            bare = bare[1:-1].strip()
    return bare or text


#: What may end a question without making it another.
_ENDS = "?.,;:。؟ "
_QUOTES = "\"'`"
_ALIKE = str.maketrans({
    **dict.fromkeys("‘’‚‛", "'"), **dict.fromkeys("“”„‟«»", '"'), "−": "-",
})  # fmt: skip
#: Forms of a character that say something else than it: 2² is not 22, nor is 1½ 11/2.
_OTHER = ("<super>", "<sub>", "<fraction>")


def _one_form(text: str) -> str:
    """Unicode's NFKC, less the forms that mean something, and one kind of quotes and of minus."""
    composed = unicodedata.normalize("NFC", text)
    folded = (
        c if unicodedata.decomposition(c).startswith(_OTHER) else unicodedata.normalize("NFKC", c)
        for c in composed
    )
    return unicodedata.normalize("NFC", "".join(folded)).translate(_ALIKE)


def question_mark(problem: Problem) -> str:
    """A short hash of the question, by which a file remembers what it was made with.

    >>> question_mark(Problem("2+2?", "4", "add")) == question_mark(Problem(" 2+2", "", "x"))
    True
    """
    return _mark(same_question(problem))


def question_marks(problems: Iterable[Problem]) -> tuple[str, ...]:
    """The marks of problems, each once, in order."""
    return tuple(dict.fromkeys(map(question_mark, problems)))


def is_marked(problem: Problem, marks: Container[str]) -> bool:
    """Whether the question is among these marks, those of older files included: their rule left
    only case and runs of spaces aside.
    """
    older = _mark(" ".join(problem.prompt.split()).casefold())
    return question_mark(problem) in marks or older in marks


def marks_in(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The marks that a file holds as "questions"; None for one of before they were kept, ValueError
    for anything else than a list of texts. Of mixtures, routers and records alike.
    """
    marks = facts.get("questions")
    if marks is not None and (
        not isinstance(marks, (list, tuple)) or not all(isinstance(mark, str) for mark in marks)
    ):
        raise ValueError(f"questions must be a list of texts, got {marks!r:.80}")
    return None if marks is None else tuple(marks)


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def leaked(problems: Sequence[Problem], shots: Sequence[Problem]) -> list[int]:
    """Indices of the problems that are shots."""
    used = {same_question(shot) for shot in shots}
    return [index for index, problem in enumerate(problems) if same_question(problem) in used]


def held_out(
    problems: Sequence[Problem], shots: Sequence[Problem], on_leak: OnLeak = "remove"
) -> tuple[list[Problem], int]:
    """(the problems that are no shots, how many were): only these may be in a reported score.

    With on_leak="error" a shot among the problems is a ValueError instead; so is nothing left.
    """
    if on_leak not in ("remove", "error"):
        raise ValueError(f"on_leak must be 'remove' or 'error', got {on_leak!r}")
    found = set(leaked(problems, shots))
    if found and on_leak == "error":
        first = problems[min(found)].prompt
        raise ValueError(
            f"{len(found)} of {len(problems)} problems to be scored are shots, first {first!r:.60}."
            " Take shots of another split, or say on_leak='remove' to score the others only"
        )
    rest = [problem for index, problem in enumerate(problems) if index not in found]
    if not rest:
        raise ValueError(
            f"problems must hold at least one that is no shot, all of {len(problems)} are shots. "
            "Take fewer shots, or of another split (shots_from, --shots-from)"
        )
    return rest, len(found)


def without_shots(problems: Sequence[Problem], shots: Sequence[Problem]) -> list[Problem]:
    """The problems that were not used as shots."""
    return held_out(problems, shots)[0]


def encode_shots(
    model: Any, tokenizer: Any, shots: Sequence[Problem], chat: str = "auto"
) -> Completions:
    """The shots with their right answers as token ids, one row each: tokenised once for a whole
    search.
    """
    return forced(tokenizer, [s.prompt for s in shots], [s.answer for s in shots], model, chat)


def log_likelihood(
    model: Any, tokenizer: Any, problems: Sequence[Problem], chat: str = "auto"
) -> Tensor:
    """log p(right answer, end token included | prompt) of each row (rows,), fp32, under whatever
    is in force around the call; differentiable.
    """
    given = encode_shots(model, tokenizer, problems, chat)
    return (token_log_probs(model, given) * given.sampled).sum(1)


@torch.no_grad()
def answer_and_score(
    model: Any, tokenizer: Any, shots: Completions, max_new_tokens: int, members: int = 1
) -> tuple[list[str], Tensor]:
    """(greedy answers, log-likelihood of the right answers (rows,) fp32) of the shots, once for
    each of the members: row m * len(shots) + s. shots: from `encode_shots`.

    Equivalent to `complete` and `log_likelihood`; the prompts are computed once, where the model
    has a key/value cache that can be cut back to them and room for the longest prompt above the
    longest answer.
    """
    given = Completions(
        shots.ids.repeat(members, 1), shots.attention.repeat(members, 1),
        shots.sampled.repeat(members, 1), shots.texts * members,
    )  # fmt: skip
    width = given.prompt_length
    prompts, mask = given.ids[:, :width], given.attention[:, :width]
    cache = None if too_wide(model, given) else _croppable(model)
    made = complete_ids(model, tokenizer, prompts, mask, max_new_tokens, cache=cache)
    start = width - 1  # the last token of the prompt chooses the first of the answer
    if cache is None or start < 1 or cache.get_seq_length() <= start:
        return made.texts, (token_log_probs(model, given) * given.sampled).sum(1)
    cache.crop(start - cache.get_seq_length())  # a negative number: so many tokens less
    positions = (given.attention.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=given.ids[:, start:-1],
        attention_mask=given.attention[:, :-1],
        position_ids=positions[:, start:-1],
        past_key_values=cache,
    ).logits.float()
    return made.texts, (chosen_log_probs(logits, given.new_ids) * given.sampled).sum(1)


def _croppable(model: Any) -> Any:
    """An empty key/value cache that can be cut back to any length; None where the model's own
    cannot (sliding windows, states), or this release of transformers does not say.
    """
    from transformers import DynamicCache

    if "position_ids" not in forward_parameters(model):
        return None
    try:
        cache = DynamicCache(config=model.config)
    except TypeError:  # before transformers 4.56
        return None
    layers = getattr(cache, "layers", [])
    plain = layers and all(getattr(layer, "is_croppable", False) for layer in layers)
    return cache if plain and not any(layer.is_sliding for layer in layers) else None


class Batches:
    """How many rows are computed at once: the whole population, or `rows` (at least one member's
    share of one shot), halved for good whenever a GPU's memory does not hold them.
    """

    def __init__(self, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows_per_batch must be at least 1, got {rows}")
        self.rows = rows

    def parts(self, members: int, shots: int) -> Iterator[tuple[slice, slice]]:
        """(members, shots) that make up one batch, until all have been in one."""
        rows = members * shots if self.rows is None else self.rows
        some, few = max(1, rows // shots), min(rows, shots)
        for start in range(0, members, some):
            for shot in range(0, shots, few):
                yield slice(start, start + some), slice(shot, shot + few)

    def run(self, members: int, shots: int, work: Callable[[slice, slice], Tensor]) -> Tensor:
        """work(members, shots) -> (members, shots, keys) of every part, put together."""
        while True:
            found: Tensor | None = None
            try:
                for part, few in self.parts(members, shots):
                    made = work(part, few)
                    if found is None:
                        found = made.new_empty(members, shots, made.shape[-1])
                    found[part, few] = made
                if found is None:
                    raise ValueError("there must be at least one member and one shot, got none")
                return found
            except torch.OutOfMemoryError:
                rows = members * shots if self.rows is None else self.rows
                if rows == 1:
                    raise
                self.rows = rows // 2
                logger.warning(
                    "%d rows do not fit into memory; going on with %d a batch", rows, self.rows
                )
