"""Pass 1 by prompt: which category a question belongs to, with the probability of each.

The model is asked in words; its reply is constrained to the categories' names. Every name is
scored as the whole reply, end token included, and the scores are normalised over the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from t2runtime import tasks
from t2runtime.adapt.scoring import Tree, sequence_log_probs
from t2runtime.prompts import (
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
    max_new_tokens: room for a reply, where one is generated (in training). chat: "on" or "off",
    whether the prompt goes into the tokenizer's chat template, whatever the caller says; None: as
    the caller says.
    """

    names: tuple[str, ...]
    template: str = INSTRUCTION
    other: str = "other"
    max_new_tokens: int = 8
    descriptions: Mapping[str, str] = field(default_factory=dict)
    lead: str = " "
    chat: str | None = None

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
        spelt: dict[str, str] = {}
        for name in self.names:
            first = spelt.setdefault(name.lower(), name)
            if first != name:
                raise ValueError(
                    f"names must differ in more than case, got {first!r} and {name!r}: replies are "
                    "read without it. Rename one"
                )
        if self.other.lower() in spelt:
            raise ValueError(
                f"names must not hold {spelt[self.other.lower()]!r}: {self.other!r} always means "
                "the base weights. Rename that expert, or choose another word with other=."
            )
        if self.chat not in (None, "on", "off"):
            raise ValueError(f"chat must be 'on', 'off' or None, got {self.chat!r}")

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
        """The first category that a reply names in whole words, None if it names none.

        >>> Categories(("math", "code")).named(" Math.")
        'math'
        """
        known = {name.lower(): name for name in self.all_names}
        longest = sorted(known, key=len, reverse=True)
        any_of = "|".join(map(re.escape, longest))
        found = re.search(rf"(?<![\w-])(?:{any_of})(?![\w-])", reply.lower())
        return known[found[0]] if found else None

    def facts(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**given, "names": list(self.names), "descriptions": dict(self.descriptions)}

    @classmethod
    def from_facts(cls, facts: Any) -> Categories:
        """What `facts` gave; ValueError for anything else."""
        expected = sorted(one.name for one in fields(cls))
        if not isinstance(facts, Mapping) or sorted(map(str, facts)) != expected:
            got = sorted(map(str, facts)) if isinstance(facts, Mapping) else type(facts).__name__
            raise ValueError(f"categories must hold {', '.join(expected)}, got {got}")
        names, said = facts["names"], facts["descriptions"]
        if not (isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
            raise ValueError(f"names must be a list of texts, got {names!r}")
        if not (isinstance(said, Mapping) and all(isinstance(d, str) for d in said.values())):
            raise ValueError(f"descriptions must be {{name: text}}, got {said!r}")
        for key in ("template", "other", "lead"):
            if not isinstance(facts[key], str):
                raise ValueError(f"{key} must be a text, got {facts[key]!r}")
        room = facts["max_new_tokens"]
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise ValueError(f"max_new_tokens must be a number of at least 1, got {room!r}")
        return cls(**{**facts, "names": tuple(names), "descriptions": dict(said)})

    def replies(self, tokenizer: Any, chat: str = "auto") -> list[list[int]]:
        """The token ids of each name as a reply, `other` last.

        Behind a plain template they are those that follow its last words, since some tokenizers
        write the first word of a text differently.
        """
        plain = not uses_template(tokenizer, self.chat or chat)
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


def categories_for(
    names: Sequence[str], descriptions: Mapping[str, str] | None = None, *, small: bool = False
) -> Categories:
    """How a model is asked that nothing else is said of: with the experts' descriptions, each on
    one line; `small`, the model of the package, in its own way, which has no room for them.
    """
    if small:
        return replace(SMALL, names=tuple(names))
    said = {name: " ".join((descriptions or {}).get(name, "").split()) for name in names}
    return Categories(tuple(names), descriptions={k: v for k, v in said.items() if v})


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
    way = categories.chat or chat
    ids = prompt_ids(tokenizer, categories.prompt(last_user_message(prompt)), way)
    context = context_length(model)
    if context is not None and len(ids) + reply > context:
        advice = _advice(tokenizer, categories, way, context - reply)
        raise ValueError(
            f"the prompt of pass 1 has {len(ids)} tokens and a category's name up to {reply}, the "
            f"model's context holds {context}. {advice}name an expert as the strategy"
        )
    return ids


def _advice(tokenizer: Any, categories: Categories, chat: str, room: int) -> str:
    """What makes a prompt fit into so many tokens: whatever it is that takes them."""
    words = re.sub(r"\{names\}|\{question\}", "", categories.template)
    bare = len(prompt_ids(tokenizer, words, chat))
    around = len(prompt_ids(tokenizer, categories.prompt(""), chat))
    if bare >= room:
        return f"The instruction alone takes {bare}: "
    if around >= room:
        shorter = "describe the experts in fewer words, " if categories.descriptions else ""
        return (
            f"The instruction takes {bare}, the list of {len(categories.names)} categories "
            f"{around - bare}: {shorter}give them shorter names, ask for fewer, or "
        )
    return "Shorten the question, or "


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
