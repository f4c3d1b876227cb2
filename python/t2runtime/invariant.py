"""A whole model whose rows do not know each other: what `t2kernels.batch_invariant` does for the
converted layers, for the rest of a transformers model.

    linears       every `nn.Linear` (lm_head too) and Conv1D through `t2kernels.dense`
    attention     each request by itself at its own length: padding is cut off, not masked
    activations   token by token: torch's vectorised loops round their last elements otherwise
    rotations     cosine and sine position by position, for the same reason

What remains works along one row at a time in an order that the batch does not change: norms,
embeddings, sums and products of elements. The price is Python: attention costs a call per request
and layer, activations one per token and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t2kernels as t2k

NAME = "t2_invariant"


@contextmanager
def invariant_model(model: Any) -> Iterator[None]:
    """Inside, a row's logits depend on nothing else in the batch; use with `t2k.batch_invariant()`.

    Raises RuntimeError where that cannot be had, before anything is computed: outside that mode;
    for parameters of more than two dimensions (mixtures of experts, convolutions, vision towers),
    attention that cannot be replaced or caps its scores, and rotations that depend on the longest
    row. Attention with sinks, or without a mask, is refused where it is met.
    """
    if not t2k.is_batch_invariant():
        raise RuntimeError("invariant_model: enter t2kernels.batch_invariant() first")
    _check(model)
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **more: sdpa_mask(
        *args, **{**more, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    ))  # fmt: skip
    before = model.config._attn_implementation
    with ExitStack() as stack:
        model.set_attn_implementation(NAME)
        stack.callback(model.set_attn_implementation, before)
        for module in model.modules():
            forward = _replacement(module)
            if forward is not None:
                stack.callback(_put_back, module, module.__dict__.get("forward"))
                module.forward = forward
        yield


def _put_back(module: nn.Module, forward: Any) -> None:
    """The forward of the module itself (None), or what it was replaced with before."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _check(model: Any) -> None:
    deep = [name for name, p in model.named_parameters() if p.dim() > 2]
    if deep:
        raise RuntimeError(
            f"batch-invariant mode: the model has parameters of more than two dimensions "
            f"({deep[0]}), whose products it does not control. Generate outside batch_invariant()"
        )
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None:
        raise RuntimeError(
            f"batch-invariant mode: the attention of {type(model).__name__} caps its scores "
            f"(attn_logit_softcapping={cap}), which it cannot. Generate outside batch_invariant()"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise RuntimeError(
            f"batch-invariant mode: the attention of {type(model).__name__} cannot be replaced "
            "(transformers' AttentionInterface). Generate outside batch_invariant()"
        )


def _replacement(module: nn.Module) -> Callable[..., Tensor] | None:
    """The invariant forward of a module that needs one."""
    if isinstance(module, t2k.SVFLinear):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return lambda x: t2k.dense(x, module.weight, module.bias)
    if kind == "Conv1D":  # GPT-2's, which keeps its weight transposed
        turned: Any = module
        return lambda x: t2k.dense(x, turned.weight.t(), turned.bias)
    if kind.endswith("RotaryEmbedding"):
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            raise RuntimeError(
                f"batch-invariant mode: rotations of type {module.rope_type!r} depend on the "
                "longest row of a batch. Generate outside batch_invariant()"
            )
        return _by_position(module.forward)
    if _is_activation(module):
        return _by_token(module.forward)
    return None


def _is_activation(module: nn.Module) -> bool:
    """One of transformers' activations: no children, no parameters."""
    from transformers.activations import ACT2CLS

    kinds = tuple(kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values())
    return isinstance(module, kinds) and not any(True for _ in module.parameters())


def _by_token(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function of every token by itself."""

    def each(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([forward(row) for row in rows]).view(x.shape)

    return each


def _by_position(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same (cos, sin) of every position by itself, remembered."""
    known: dict[Any, tuple[Tensor, Tensor]] = {}

    def each(x: Tensor, position_ids: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        wanted, place = position_ids.unique(return_inverse=True)
        rest = (x.dtype, args, tuple(sorted(more.items())))
        keys = [(position, rest) for position in wanted.tolist()]
        for key in keys:
            if key not in known:
                cos, sin = forward(x, position_ids.new_full((1, 1), key[0]), *args, **more)
                known[key] = (cos[0, 0], sin[0, 0])
        cos, sin = (torch.stack(part)[place] for part in zip(*map(known.get, keys), strict=True))
        return cos, sin

    return each


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, H, q, D) to key, value (B, H', k, D), each row at its own length.

    attention_mask: (B or 1, 1, q, k), bool or additive. Keys before the first that a row sees are
    its padding, and so are the queries beside them.
    """
    if attention_mask is None:
        raise RuntimeError("batch-invariant attention: the model gave no mask")
    if more.get("softcap") is not None or more.get("sinks") is not None:
        raise RuntimeError(
            "batch-invariant attention has no soft cap and no sinks. Generate outside "
            "batch_invariant()"
        )
    groups = query.shape[1] // key.shape[1]
    floor = torch.finfo(query.dtype).min
    mask = attention_mask.expand(query.shape[0], -1, -1, -1)
    seen = mask if mask.dtype == torch.bool else mask > floor
    starts = seen[:, 0].any(1).int().argmax(1).tolist()
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    # Copies: what a library makes of a matrix may depend on where its memory begins.
    dense = torch.contiguous_format
    for row, start in enumerate(starts):
        first = max(0, start - (key.shape[2] - query.shape[2]))
        q = query[row : row + 1, :, first:].clone(memory_format=dense)
        k = key[row : row + 1, :, start:].repeat_interleave(groups, 1).clone(memory_format=dense)
        v = value[row : row + 1, :, start:].repeat_interleave(groups, 1).clone(memory_format=dense)
        own = mask[row : row + 1, :, first:, start:].clone(memory_format=dense)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scaling)
        out[row, first:] = y[0].transpose(0, 1)
    return out, None
