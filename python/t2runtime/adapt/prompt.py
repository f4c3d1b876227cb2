"""Pass 1 by prompt: which category a question belongs to, with the probability of each.

The model is asked in words; its reply is constrained to the categories' names. Every name is
scored as the whole reply, end token included, and the scores are normalised over the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from t2runtime import tasks
from t2runtime.adapt.scoring import Tree, sequence_log_probs
from t2runtime.generation import (
    Prompt,
    context_length,
    end_tokens,
    last_user_message,
    prompt_ids,
    uses_template,
)

# Little behind the question: what stands before it is computed once for a whole batch.
INSTRUCTION = (
    "Analyze the given question and classify it into one of these categories:\n{names}\n"
    "Answer with the name of the category only.\nQuestion: {question}\nCategory:"
)


@dataclass(frozen=True)
class Categories:
    """The names pass 1 may give, how it is asked, and the name that means "the base weights".

    names: one for each category, without `other`, which is always there. descriptions: {name: one
    line}, shown in the prompt. template: the prompt around {names} and {question}. lead: what
    stands before the name in a reply to the plain template (a chat template needs none).
    max_new_tokens: room for a reply, where one is generated (in training).
    """

    names: tuple[str, ...]
    template: str = INSTRUCTION
    other: str = "other"
    max_new_tokens: int = 8
    descriptions: Mapping[str, str] = field(default_factory=dict)
    lead: str = " "

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}}, got {self.template!r}")
        if not self.names:
            raise ValueError("names must hold at least one category, got none")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(
                f"names must name every category once, got {', '.join(twice)} more than once"
            )
        if self.other in self.names:
            raise ValueError(
                f"names must not hold {self.other!r}: it always means the base weights. Rename "
                "that expert, or choose another word with other=."
            )

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names, and `other` last."""
        return (*self.names, self.other)

    def prompt(self, question: str) -> str:
        """The pass-1 prompt of a question; nothing in the question or a description is filled in.

        >>> Categories(("math",), "{names}: {question}?").prompt("{names}")
        '- math\\n- other: none of these: {names}?'
        """
        said = {**self.descriptions, self.other: "none of these"}
        lines = [f"- {name}: {said[name]}" if said.get(name) else f"- {name}"
                 for name in self.all_names]  # fmt: skip
        parts = {"{names}": "\n".join(lines), "{question}": question}
        return re.sub(r"\{names\}|\{question\}", lambda found: parts[found[0]], self.template)

    def named(self, reply: str) -> str | None:
        """The first word of a reply that is a category, None if no word is one.

        >>> Categories(("math", "code")).named(" Math.")
        'math'
        """
        known = {name.lower(): name for name in self.all_names}
        for word in re.findall(r"[\w-]+", reply.lower()):
            if word in known:
                return known[word]
        return None

    def replies(self, tokenizer: Any, chat: str = "auto") -> list[list[int]]:
        """The token ids of each name as a reply, `other` last.

        Behind a plain template they are those that follow its last words, since some tokenizers
        write the first word of a text differently.
        """
        plain = not uses_template(tokenizer, chat)
        before = self.template.rpartition("{question}")[2] if plain else ""
        lead = self.lead if plain else ""

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        start = ids(before) if before else []
        replies = []
        for name in self.all_names:
            whole = ids(before + lead + name)
            fits = whole[: len(start)] == start
            replies.append(whole[len(start) :] if fits else ids(lead + name))
        try:
            Tree.of(replies)
        except ValueError as error:
            raise ValueError(
                "the tokenizer does not tell the categories' names "
                f"({', '.join(self.all_names)}) apart: {error}. Rename them."
            ) from error
        return replies


#: For the small model: its own way to ask, one name per generated skill.
SMALL = Categories(tuple(tasks.SKILLS), tasks.category.PREFIX + "{question}", lead="")


@dataclass(frozen=True)
class Verdict:
    """What pass 1 says of one question: the most probable category, and {category: probability}."""

    category: str
    probabilities: dict[str, float]


def question_ids(
    model: Any,
    tokenizer: Any,
    categories: Categories,
    prompt: Prompt,
    chat: str = "auto",
    *,
    reply: int = 1,
) -> list[int]:
    """The ids of the pass-1 prompt of a question, or of the last message of a chat.

    Raises ValueError where it does not fit into the context together with `reply` more tokens.
    """
    ids = prompt_ids(tokenizer, categories.prompt(last_user_message(prompt)), chat)
    context = context_length(model)
    if context is not None and len(ids) + reply > context:
        raise ValueError(
            f"the prompt of pass 1 has {len(ids)} tokens and a category's name up to {reply}, the "
            f"model's context holds {context}. Shorten the question, describe the experts in fewer "
            "words, or name an expert as the strategy"
        )
    return ids


def judge(
    model: Any,
    tokenizer: Any,
    categories: Categories,
    rows: Sequence[Sequence[int]],
    chat: str = "auto",
    *,
    share_prefix: bool = True,
) -> list[Verdict]:
    """The verdict on each pass-1 prompt, given as token ids, under the weights in force.

    Where the model's logits are not finite, so are the probabilities; the category is then
    `other`.
    """
    scores = sequence_log_probs(
        model, rows, categories.replies(tokenizer, chat), end_tokens(model, tokenizer),
        share_prefix=share_prefix,
    )  # fmt: skip
    verdicts = []
    for row in scores.softmax(1):
        sound = bool(torch.isfinite(row).all())
        name = categories.all_names[int(row.argmax())] if sound else categories.other
        verdicts.append(Verdict(name, dict(zip(categories.all_names, row.tolist(), strict=True))))
    return verdicts


def classify(
    model: Any,
    tokenizer: Any,
    bank: Any,
    categories: Categories,
    questions: Sequence[Prompt],
    under: Any = None,
    *,
    chat: str = "auto",
    rows: int = 256,
) -> list[Verdict]:
    """The verdict on each question, asked under stated weights: None is the base, else a mixture
    of `bank`.

    `rows` questions are asked at once.
    """
    reply = max(map(len, categories.replies(tokenizer, chat)))
    ids = [
        question_ids(model, tokenizer, categories, question, chat, reply=reply)
        for question in questions
    ]
    with bank.use(under):
        return [
            verdict
            for start in range(0, len(ids), rows)
            for verdict in judge(model, tokenizer, categories, ids[start : start + rows], chat)
        ]
