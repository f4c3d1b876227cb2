"""Transformer² for Hugging Face models: training experts, choosing them, answering in two passes.

    tasks, rewards, sources   questions, right answers, and the reward of a completion
    train                     REINFORCE with KL on one page
    adapt                     pass 1: by prompt, by classification expert, by few shots
    peft                      SVF as a method of the PEFT library, for its users and for TRL
    engine                    Transformer2: two passes over a batch with a mixture per request
    compare, harness          strategies in one table; the model for lm-eval
    invariant                 a whole model whose rows do not know each other
    cli, commands             `t2 env | decompose | train | generate | chat | ... | demo`

Uses the public names of t2kernels only. `import t2runtime` is free: `Transformer2` is imported
when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2runtime.engine import Output, Transformer2

__all__ = ["Output", "Transformer2"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from t2runtime import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
