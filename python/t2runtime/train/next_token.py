"""Next-token training: the likelihood of given answers, under the same interface as REINFORCE.

    minimise  −mean over answer tokens of log π'(token) + kl·mean KL(π' ‖ π) at them.

The prompt is masked; the end token counts. The paper has it as an ablation, which loses.
"""

from __future__ import annotations

import time
from typing import Any

from t2runtime.generation import forced
from t2runtime.tasks import Source
from t2runtime.train.adapters import Adapter
from t2runtime.train.config import Config
from t2runtime.train.reinforce import drawn, gradient


def next_token(
    model: Any, tokenizer: Any, adapter: Adapter, source: Source, cfg: Config, seed: int
) -> dict[str, float]:
    """One step's gradient, left in the adapter's parameters; what to report of it."""
    begin = time.perf_counter()
    asked = drawn(source, cfg, seed)
    prompts, answers = [p.prompt for p in asked], [p.answer for p in asked]
    given = forced(tokenizer, prompts, answers, model, cfg.chat)
    share = given.sampled.float() / given.sampled.sum()
    loss, kl = gradient(model, adapter, given, share, share, cfg)
    return {
        "loss": loss,
        "kl": kl,
        "new_tokens": given.sampled.sum(1).float().mean().item(),
        "gradient_seconds": time.perf_counter() - begin,
    }
