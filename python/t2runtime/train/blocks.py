"""Gradient checkpointing: the blocks of a transformers model computed again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, with `wanted`, the model keeps the input of each block only.

    transformers checkpoints in training mode only, which would also switch dropout on and make
    the trained distribution another than the sampled one. So the mode is set on the modules that
    decide about checkpointing only, and set back while they compute, also again in backward.
    """
    if not wanted:
        yield
        return
    if not supports(model):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not support it; turn it off and "
            "lower rows_per_backward instead"
        )
    # transformers 5 renamed them; the old names warn.
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    # The model around its blocks bears the mark too; where blocks decide, it has nothing to.
    deciding = [m for m in marked if _is_block(m)] or marked
    modes = [module.training for module in deciding]
    functions = [module._gradient_checkpointing_func for module in deciding]

    def in_own_mode(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(run: Callable[..., Any], *args: Any, **more: Any) -> Any:
            def computed(*inputs: Any, **named: Any) -> Any:
                with _modes(deciding, modes):
                    return run(*inputs, **named)

            return checkpoint(computed, *args, **more)

        return call

    try:
        for module, function in zip(deciding, functions, strict=True):
            module._gradient_checkpointing_func = in_own_mode(function)
        with _modes(deciding, [True] * len(deciding)):
            yield
    finally:
        for module, function in zip(deciding, functions, strict=True):
            module._gradient_checkpointing_func = function
        getattr(model, f"{named}_checkpointing_disable")()


def supports(model: Any) -> bool:
    """Whether the model's blocks can be computed again in backward."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def _is_block(module: Any) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


@contextmanager
def _modes(modules: Sequence[Any], modes: Sequence[bool]) -> Iterator[None]:
    """Inside, the modules themselves, not what is in them, are in these modes."""
    before = [module.training for module in modules]
    try:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode
