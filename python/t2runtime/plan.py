"""What training an expert will need, from config.json alone: the step is run without weights.

The model is built on the meta device and its matrices are replaced as ``convert`` does. Then one
gradient step, a merge and a cache are run there: torch makes every tensor of them but allocates
nothing, and what it would have allocated is counted. So the numbers follow the code of any
architecture; they are those of a fused attention kernel, without the allocator's fragmentation
and what the CUDA context and libraries take (half a GiB or so).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2runtime.generation import Completions, answer_log_probs, token_log_probs
from t2runtime.meter import Meter
from t2runtime.skeleton import skeleton
from t2runtime.train.blocks import checkpointed, supports
from t2runtime.train.reinforce import exact_kl, sampled_kl

OBJECTIVES = ("reinforce", "next-token")
KL = ("exact", "k3", "none")
#: How a gradient step may hold its activations.
KEEP = ("keep", "recompute", "checkpointing")
_ATTENTION = "t2_plan_fused"


@dataclass(frozen=True)
class Settings:
    """What is planned; names are those of `t2runtime.train.Config`.

    rows: of a step, prompts × samples. rows_per_rollout, rows_per_backward: so many at once.
    tokens: of a row, prompt and answer. max_new_tokens: how many of them are the answer (None:
    half). kl: how it is had, or "none". dtype "auto" is the config's own.
    """

    targets: str | list[str] = "all-linear"
    rank: int | None = None
    dtype: str = "auto"
    rows: int = 256
    rows_per_rollout: int = 64
    rows_per_backward: int = 16
    tokens: int = 512
    max_new_tokens: int | None = None
    objective: str = "reinforce"
    kl: str = "exact"

    def __post_init__(self) -> None:
        for name in ("rows", "rows_per_rollout", "rows_per_backward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.tokens < 2:
            raise ValueError(
                f"tokens must be at least 2, one of prompt and one of answer, got {self.tokens}"
            )
        if not 1 <= self.new < self.tokens:
            raise ValueError(
                f"max_new_tokens must be 1 to {self.tokens - 1} of {self.tokens} tokens, got "
                f"{self.new}"
            )
        for name, allowed in (("objective", OBJECTIVES), ("kl", KL)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.objective == "next-token" and self.kl == "k3":
            raise ValueError("kl 'k3' needs sampled answers, objective 'next-token' has given ones")

    @property
    def new(self) -> int:
        """Tokens of a row that are trained on."""
        return self.tokens // 2 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def backward(self) -> int:
        """Rows in a gradient pass: a step may have fewer than are allowed at once."""
        return min(self.rows, self.rows_per_backward)


def plan(folder: Path, settings: Settings) -> dict[str, Any]:
    """Bytes and FLOPs of one step for the model whose config.json is in ``folder``.

    Of a model without gradient checkpointing there are no numbers for it, and "no_checkpointing"
    says why. Raises ValueError for targets that match nothing, RuntimeError where the model cannot
    be run without weights (blocks that route tokens by their values).
    """
    _register_attention()
    model = skeleton(folder, settings.dtype, _ATTENTION)
    dense = _dense_flops(model, settings)
    rollout = _rollout(model, settings) if settings.objective == "reinforce" else {}
    layers, skipped = install(model, settings.targets, settings.rank)
    ways, why = list(KEEP), None
    if not supports(model):
        ways, kind = list(KEEP[:-1]), type(model).__name__
        why = f"{kind} does not support gradient checkpointing: lower rows_per_backward instead"
    steps = {how: gradient_step(model, settings, how) for how in ways}
    ranks = sum(layer.rank for layer in layers.values())
    fixed = {
        "weights": _bytes([*model.parameters(), *model.buffers()]) - 4 * ranks,
        "factors": sum(_bytes(layer.factors) for layer in layers.values()),
        # z, its gradient and the two moments of Adam, all fp32
        "z and optimiser": 16 * ranks,
    }
    activations = {how: step["bytes"] for how, step in steps.items()}
    always = sum(fixed.values())
    peak = {f"gradient, {how}": always + size for how, size in activations.items()}
    if rollout:
        rollout = {"merged weights": _merge_bytes(layers), **rollout}
        decode = rollout["cache"] + rollout["sampling"]
        peak["rollout"] = always + rollout["merged weights"] + max(rollout["prefill"], decode)
    flops = {
        "rollout": dense if rollout else 0,
        "reference": dense if settings.kl != "none" else 0,
        **{f"gradient, {how}": step["flops"] for how, step in steps.items()},
    }
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - ranks,
        "layers": len(layers),
        "values": ranks,
        "skipped": skipped,
        "no_checkpointing": why,
        "bytes": {**fixed, "activations": activations, "rollout": rollout},
        "peak": peak,
        "flops": {k: v * settings.rows // settings.backward for k, v in flops.items()},
    }


def install(
    model: nn.Module, targets: str | Iterable[str], rank: int | None
) -> tuple[dict[str, t2k.SVFLinear], dict[str, str]]:
    """Replace the layers that ``convert`` would, by layers with factors on the meta device."""
    chosen, skipped = t2k.select(model, targets)
    if not chosen:
        raise ValueError(
            "no layer that the targets name can be converted:"
            + "".join(f"\n  {n}: {r}" for n, r in list(skipped.items())[:20])
        )
    layers: dict[str, t2k.SVFLinear] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in chosen.items():
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} has no weight tensor")
        transposed = not isinstance(module, nn.Linear)
        m, n = reversed(weight.shape) if transposed else weight.shape
        r = min(m, n) if rank is None else min(m, n, rank)
        factors = t2k.SVDFactors(
            torch.empty(m, r, dtype=weight.dtype, device="meta"),
            torch.empty(r, device="meta"),
            torch.empty(r, n, dtype=weight.dtype, device="meta").t(),
        )
        bias = module.bias if isinstance(module.bias, Tensor) else None
        layers[name] = t2k.SVFLinear(weight, bias, factors, transposed=transposed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return layers, skipped


def gradient_step(model: Any, settings: Settings, how: str) -> dict[str, int]:
    """{"bytes", "flops"} of forward, loss and backward to z; ``how`` is one of ``KEEP``.

    Bytes are the peak beyond weights, factors and z, whose gradients are counted elsewhere.
    """
    layers = [m for m in model.modules() if isinstance(m, t2k.SVFLinear)]
    for layer in layers:
        layer.recompute = how == "recompute"
        layer.z.grad = None
    known = [*model.parameters(), *model.buffers(), *(t for m in layers for t in m.factors)]
    with _runs(model), Meter(known) as meter:
        _loss(model, settings, how == "checkpointing").backward()
    return {"bytes": meter.peak - _bytes(m.z for m in layers), "flops": meter.flops}


def _loss(model: Any, settings: Settings, checkpointing: bool) -> Tensor:
    """The loss of a gradient pass by the trainer's own functions, on rows of nothing."""
    rows, new = settings.backward, settings.new
    some = Completions(
        _ids(rows, settings.tokens),
        _ids(rows, settings.tokens),
        torch.zeros(rows, new, dtype=torch.bool, device="meta"),
        [""] * rows,
    )
    read = answer_log_probs if settings.kl == "exact" else token_log_probs
    vocabulary = model.get_output_embeddings().weight.shape[0]
    width = (vocabulary,) if settings.kl == "exact" else ()
    # What the pass under the base's weights leaves, which is over when this one begins.
    reference = None if settings.kl == "none" else torch.empty(rows, new, *width, device="meta")
    with checkpointed(model, checkpointing):
        log_probs = read(model, some)
    if reference is None:
        return log_probs.sum()
    if settings.kl == "k3":
        return (log_probs + sampled_kl(log_probs, reference)).sum()
    chosen = log_probs.gather(-1, some.new_ids[..., None])[..., 0]
    return (chosen + exact_kl(log_probs, reference)).sum()


@contextmanager
def _runs(model: nn.Module) -> Iterator[None]:
    """Says of any error inside that the model needs values."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"{type(model).__name__} cannot be run without weights: {reason}"
        ) from error


def _run(model: Any, rows: int, tokens: int, logits: int, cache: bool) -> Any:
    ids = _ids(rows, tokens)
    return model(input_ids=ids, attention_mask=ids, use_cache=cache, logits_to_keep=logits)


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.long, device="meta")


@torch.no_grad()
def _dense_flops(model: Any, settings: Settings) -> int:
    """FLOPs of the dense model over all tokens of a gradient pass's rows.

    Generation with a cache does the products of one such pass, a token at a time.
    """
    with _runs(model), Meter() as meter:
        _run(model, settings.backward, settings.tokens, settings.new, False)
    return meter.flops


@torch.no_grad()
def _rollout(model: Any, settings: Settings) -> dict[str, int]:
    """Bytes of the key/value cache when the last token is sampled; of the pass over the prompts
    at its peak, cache included; and of the vocabulary's scores while one token is sampled.
    """
    rows = min(settings.rows, settings.rows_per_rollout)
    known = [*model.parameters(), *model.buffers()]
    with _runs(model), Meter(known) as meter:
        out = _run(model, rows, settings.tokens - settings.new, 1, True)
    prefill, vocabulary = meter.peak, out.logits.shape[-1]
    del out
    with _runs(model), Meter():
        out = _run(model, 1, settings.tokens, 1, True)
    if getattr(out, "past_key_values", None) is None:
        raise RuntimeError(
            f"{type(model).__name__} answers without a cache of keys and values, so the memory of "
            "its rollout cannot be planned. Plan objective 'next-token', which has no rollout"
        )
    cache = getattr(out.past_key_values, "layers", ())
    held = [t for layer in cache for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    # Scores in fp32, scaled, their softmax and a scratch copy.
    return {"cache": rows * _bytes(held), "prefill": prefill, "sampling": 16 * rows * vocabulary}


@torch.no_grad()
def _merge_bytes(layers: dict[str, t2k.SVFLinear]) -> int:
    """What merging allocates at its peak: a copy of every base weight, and one layer's buffers."""
    known = [t for m in layers.values() for t in (m.weight, m.z, *m.factors) if t is not None]
    with Meter(known) as meter:
        for layer in layers.values():
            layer.merge_diagonal(layer.factors.S)
    for layer in layers.values():
        layer.unmerge()
    return meter.peak


def _bytes(tensors: Iterable[Any]) -> int:
    """Of distinct storages; anything else than a tensor counts nothing."""
    sizes = {
        t.untyped_storage()._cdata: t.numel() * t.element_size()
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(sizes.values())


def _register_attention() -> None:
    """Teach transformers an attention with the footprint of a fused kernel, masks left out."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _fused_attention)


def _fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scaling
    )[0]
    return out.transpose(1, 2).contiguous(), None
