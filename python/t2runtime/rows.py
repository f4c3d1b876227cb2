"""Models whose linears see tokens without their batch: what `row_order` is theirs.

The kernels do not guess which row of a 2-D input belongs to which request. Of the models named here
the code of transformers was read: they flatten (batch, length) to tokens in this order, nothing
else of two dimensions reaches a linear, and rows of a mixed batch are tested to be those of each
request alone. Any other model needs the word of its user.
"""

from __future__ import annotations

from typing import Any

import t2kernels as t2k

#: Classes of `transformers.models`, and where they flatten.
FLAT = {
    "OPTForCausalLM": "every block, before fc1 and fc2",
    "Qwen2MoeForCausalLM": "before the shared expert and its gate",
    "Qwen3NextForCausalLM": "before the shared expert and its gate",
    "Llama4ForCausalLM": "before the router and the shared expert",
}


def row_order_of(model: Any) -> str | None:
    """The `row_order` of a converted model, "flat", where it is known; else None.

    None, too, where routed experts are layers of their own and were converted: each sees tokens
    that were chosen for it, in an order that no `row_order` describes.
    """
    kind = type(model)
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in FLAT:
        return None
    routed = any(".experts." in name for name in t2k.svf_layers(model))
    return None if routed else "flat"
