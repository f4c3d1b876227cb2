"""Next-token training: the likelihood of given answers, under the same interface as REINFORCE.

    minimise  −mean over answer tokens of log π'(token) + kl·mean KL(π' ‖ π) at them.

What is learnt is `Problem.target`: the data's worked solution or reference program, where the data
are such, else the answer. The prompt is masked; the end token counts: the one that the chat
template puts behind an assistant's turn, else the tokenizer's. The paper has it as an ablation,
which loses.
"""

from __future__ import annotations

import time
from typing import Any

from t2runtime.generation import forced
from t2runtime.tasks import Problem, Source
from t2runtime.train.adapters import Adapter
from t2runtime.train.config import Config
from t2runtime.train.lengths import whole
from t2runtime.train.reinforce import drawn, gradient


def next_token(
    model: Any, tokenizer: Any, adapter: Adapter, source: Source, cfg: Config, seed: int
) -> dict[str, float]:
    """One step's gradient, left in the adapter's parameters; what to report of it."""
    begin = time.perf_counter()
    asked = drawn(source, cfg, seed)
    prompts, texts = [p.prompt for p in asked], [learnt(source, problem) for problem in asked]
    tokens = getattr(whole(source), "target_ids", None)
    targets = tokens(asked, tokenizer, cfg.chat) if tokens else texts
    given = forced(tokenizer, prompts, targets, model, cfg.chat)
    share = given.sampled.float() / given.sampled.sum()
    loss, kl = gradient(model, adapter, given, share, share, cfg)
    return {
        "loss": loss,
        "kl": kl,
        "new_tokens": given.sampled.sum(1).float().mean().item(),
        "gradient_seconds": time.perf_counter() - begin,
    }


def learnt(source: Source, problem: Problem) -> str:
    """The text that this problem teaches; ValueError where there is none."""
    if not problem.target.strip():
        raise ValueError(
            f"objective 'next-token' needs a text to learn for each problem, task {source.name!r} "
            f"has none for prompt {problem.prompt[:80]!r}. Use objective='reinforce', or data with "
            "worked solutions (the task's own file says under which key)"
        )
    return problem.target


def check(source: Source, cfg: Config) -> None:
    """Ask every training problem for its text, where the source can tell how many it has, so that
    one without is not found in the middle of a run.
    """
    size = getattr(source, "size", None)
    for problem in source(
        cfg.prompts if size is None else max(1, size("train")), "train", cfg.seed
    ):
        learnt(source, problem)
