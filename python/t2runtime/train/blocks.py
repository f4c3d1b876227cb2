"""Gradient checkpointing: the blocks of a transformers model computed again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, with `wanted`, the model keeps the input of each block only.

    transformers checkpoints in training mode only, which would also switch dropout on and make
    the trained distribution another than the sampled one. So the mode is set on the modules that
    decide about checkpointing and on nothing inside them.
    """
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not support it; turn it off and "
            "lower rows_per_backward instead"
        )
    # transformers 5 renamed them; the old names warn.
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    deciding = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    modes = [module.training for module in deciding]
    for module in deciding:
        module.training = True
    try:
        yield
    finally:
        for module, mode in zip(deciding, modes, strict=True):
            module.training = mode
        getattr(model, f"{named}_checkpointing_disable")()
