"""The options of `t2 train`: each field of its settings, left out where the recipe decides."""

from __future__ import annotations

import argparse


def training(parser: argparse.ArgumentParser) -> None:
    """Add them. What is not given is not in the namespace, so that a recipe can fill it."""

    def option(name: str, text: str, **more: object) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **more)  # type: ignore[arg-type]

    def choice(name: str, text: str, *choices: str) -> None:
        option(name, text, choices=choices)

    choice("--objective", "by reward, or on the given answers", "reinforce", "next-token")
    option("--steps", "at most so many", type=int)
    option("--prompts", "prompts a step", type=int)
    option("--samples", "answers to each prompt", type=int)
    option("--max-new-tokens", "length of an answer (default: the task's)", type=int)
    option("--temperature", "of the samples", type=float)
    option("--wrong-reward", "of a wrong answer; a right one gets 1", type=float)
    choice("--baseline", "mean reward of a prompt's other samples", "leave-one-out", "none")
    option("--length-norm", "average over an answer's tokens", action="store_true")
    option("--kl", "weight of KL(expert || base)", type=float)
    choice("--kl-estimator", "over the vocabulary, or from the samples", "exact", "k3")
    choice("--optimiser", "AdamW or Adam", "adamw", "adam")
    option("--lr", "learning rate", type=float)
    choice("--schedule", "of the learning rate", "cosine", "constant")
    option("--warmup", "steps of linear warm-up", type=int)
    option("--weight-decay", "towards 0; the base is at z = 1", type=float)
    option("--clip", "largest norm of a gradient", type=float)
    choice("--rollout", "weights that answers are sampled from", "merged", "factorised")
    option("--recompute", "x·V once more in backward: less memory", action="store_true")
    option("--gradient-checkpointing", "blocks once more in backward", action="store_true")
    option("--rows-per-rollout", "answers generated at once", type=int)
    option("--rows-per-backward", "answers trained on at once", type=int)
    option("--validate-every", "steps", type=int)
    option("--validation-problems", "how many", type=int)
    option("--patience", "validations without a better one, or none", type=_count_or_none)
    option("--stop-at", "validation accuracy that is enough", type=float)
    option("--checkpoint-every", "steps", type=int)
    choice("--chat", "whether prompts go into the chat template", "auto", "on", "off")
    choice("--long-prompts", "problems that do not fit into the context", "skip", "error")
    option("--seed", "of prompts and samples", type=int)


def _count_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)
