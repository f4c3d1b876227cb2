"""Which weights: the names "all-linear", "mlp", "attention", suffixes and regular expressions.

Pure functions of layer names, shared by what reads checkpoints (names from an index) and what
walks modules. A name is that of the layer, ``model.layers.0.mlp.up_proj``; a trailing ``.weight``
is ignored. Names alone cannot tell a linear from any other 2-D weight: the caller knows modules
or shapes, this module knows embeddings, norms, output heads and routers by what they are called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

__all__ = [
    "GROUPS",
    "Targets",
    "check_targets",
    "classify",
    "explain_no_match",
    "is_conv1d",
    "listed",
    "match",
    "normalise",
    "same_layer",
    "sharing",
    "unmatched",
]

Targets = str | Iterable[str]

#: words that stand for groups of layers
GROUPS = ("all-linear", "mlp", "attention")

_EMBEDDINGS = {
    "embed_tokens", "wte", "wpe", "shared", "embed_in", "embed_positions", "word_embeddings",
    "position_embeddings", "token_type_embeddings", "tok_embeddings", "token_embedding",
    "position_embedding", "relative_attention_bias", "embeddings", "patch_embedding",
    "patch_embeddings", "embed_tokens_per_layer", "rotary_emb",
}  # fmt: skip
_HEADS = {
    "lm_head", "embed_out", "classifier", "score", "qa_outputs", "seq_relationship", "v_head",
    "cls.predictions.decoder", "classification_head", "masked_bias",
}  # fmt: skip
_NORM = re.compile(r"norm|(^|_)ln(\d|_|$)|^bn\d*$")
_ROUTERS = {"router", "gate", "shared_expert_gate", "wg"}
_MLP_PARTS = {
    "mlp", "ffn", "ff", "feed_forward", "feedforward", "densereludense", "intermediate", "moe",
    "block_sparse_moe", "experts", "shared_expert", "shared_experts", "mlps",
}  # fmt: skip
_MLP_LEAVES = {
    "fc1", "fc2", "fc_in", "fc_out", "c_fc", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "dense_h_to_4h", "dense_4h_to_h", "w1", "w2", "w3", "wi", "wi_0", "wi_1", "wo", "lin1", "lin2",
    "linear1", "linear2",
}  # fmt: skip
_ATTENTION_LEAVES = {
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query", "key", "value",
    "query_key_value", "qkv", "wqkv", "wq", "wk", "wv", "q_lin", "k_lin", "v_lin", "out_lin",
}  # fmt: skip
# Layers of one parent that a model calls with one and the same x, by what they are called.
_SHARED_INPUT = (
    {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"},
    {"wq", "wk", "wv"}, {"q_lin", "k_lin", "v_lin"}, {"query_proj", "key_proj", "value_proj"},
    {"to_q", "to_k", "to_v"}, {"gate_proj", "up_proj"}, {"w1", "w3"}, {"wi_0", "wi_1"},
)  # fmt: skip
# The module types of transformers whose blocks use Conv1D, with the layers that are one.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def classify(name: str) -> str:
    """What a layer is by its name: attention, mlp, embedding, norm, head, router or other.

    The innermost part of the path that says "attention" or "mlp" decides; without one, the
    well-known last names do (OPT's ``layers.0.fc1``, BERT's ``layer.0.output.dense``).

    >>> classify("model.layers.3.self_attn.q_proj"), classify("h.0.mlp.c_proj.weight")
    ('attention', 'mlp')
    >>> classify("encoder.layer.0.attention.output.dense"), classify("encoder.layer.0.output.dense")
    ('attention', 'mlp')
    """
    parts = normalise(name).lower().split(".")
    leaf = parts[-1]
    if "lm_head" in parts or _HEADS & {leaf, ".".join(parts[-3:])} or parts == ["output"]:
        return "head"
    if _EMBEDDINGS & set(parts) or leaf.endswith(("_embeddings", "_embedding", "_embed")):
        return "embedding"
    if _NORM.search(leaf):
        return "norm"
    if leaf in _ROUTERS or parts[-2:] == ["router", "classifier"]:
        return "router"
    for part in reversed(parts):
        if part in _MLP_PARTS or part.startswith("mlp_"):
            return "mlp"
        if "attn" in part or "attention" in part:
            return "attention"
    if leaf in _MLP_LEAVES or (parts[-2:] == ["output", "dense"] and len(parts) > 2):
        return "mlp"
    return "attention" if leaf in _ATTENTION_LEAVES else "other"


def sharing(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Neighbours among ``names`` whose layers get the same x, as far as names tell.

    >>> sharing(["0.attn.q_proj", "0.attn.k_proj", "0.attn.o_proj", "0.mlp.wi_0", "1.mlp.wi_1"])
    [('0.attn.q_proj', '0.attn.k_proj')]
    """
    runs: list[list[str]] = []
    last: tuple[str, int] | None = None
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((i for i, f in enumerate(_SHARED_INPUT) if leaf in f), None)
        kin = None if family is None else (parent, family)
        if kin is not None and kin == last:
            runs[-1].append(name)
        elif kin is not None:
            runs.append([name])
        last = kin
    return [tuple(run) for run in runs if len(run) > 1]


def match(name: str, targets: Targets = "all-linear", exclude: Targets | None = None) -> bool:
    """Whether ``targets`` ask for the layer ``name`` and ``exclude`` does not.

    Each entry of either is one of:

    - "all-linear": everything but embeddings, norms, output heads and routers;
    - "mlp", "attention": by ``classify``;
    - a name or the end of one, whole parts: "q_proj", "mlp.up_proj", "model.layers.0.mlp.up_proj";
    - a regular expression that matches the whole name: r".*layers\\.[0-3]\\..*_proj".

    An output head or a router must be named by itself, no word and no expression reaches it;
    embeddings and norms are never matched.

    >>> match("h.0.attn.c_attn", "attention"), match("lm_head", ".*"), match("lm_head", ["lm_head"])
    (True, False, True)
    """
    name = normalise(name)
    kind = classify(name)
    if kind in ("embedding", "norm"):
        return False
    wanted = any(_entry_matches(name, kind, entry) for entry in _entries(targets, "targets"))
    if not wanted or exclude is None:
        return wanted
    return not any(_entry_matches(name, kind, entry) for entry in _entries(exclude, "exclude"))


def normalise(name: str) -> str:
    """The layer's name: without a trailing ".weight"."""
    return name.removesuffix(".weight")


def same_layer(
    name: str, stored: Iterable[str], has: Callable[[str], bool] | None = None
) -> str | None:
    """Under which of the names ``stored`` a checkpoint holds the layer that the model calls
    ``name``, or None.

    Loading drops, adds or rearranges leading parts: a checkpoint of Gemma 3 calls
    "language_model.model.layers.0.mlp.up_proj" what is "model.language_model.layers.0.mlp.up_proj"
    in memory. By names alone only these are taken: the name itself, the only one that differs by
    a leading part, the only one of the same parts with the same end from the first number on.
    ``has``, asked where they leave none or several, says whether a stored weight has the layer's
    values; it is asked of all names with that end. Raises ValueError where several have.

    >>> same_layer("h.0.mlp.c_fc", ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"])
    'transformer.h.0.mlp.c_fc'
    """
    stored = list(stored)
    if name in stored:
        return name
    near = [s for s in stored if s.endswith("." + name) or name.endswith("." + s)]
    alike = [s for s in stored if s.endswith("." + _end(name))]
    if not near:
        near = [s for s in alike if sorted(s.split(".")) == sorted(name.split("."))]
    if len(near) == 1:
        return near[0]
    if has is None:
        return None
    found = [s for s in dict.fromkeys([*near, *alike]) if has(s)]
    if len(found) > 1:
        raise ValueError(
            f"{name!r} may be any of several weights of the same values: {', '.join(found)}. "
            "Leave the layer out of the targets, or name it in the checkpoint as the model does."
        )
    return found[0] if found else None


def _end(name: str) -> str:
    """From the first number on, which counts blocks; without one the last part."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[first:])


def listed(what: str, value: object) -> str | list[str]:
    """One entry as it is, several as a list; raises TypeError, naming ``what``, for other things.

    >>> listed("targets", ("q_proj", "k_proj"))
    ['q_proj', 'k_proj']
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Iterable):
        raise TypeError(
            f"{what} must be a str or a list of str, got {type(value).__name__}. "
            f"Use {', '.join(map(repr, GROUPS))}, names of layers or a regular expression."
        )
    return list(value)


def unmatched(names: Iterable[str], targets: Targets) -> list[str]:
    """The entries of ``targets`` that ask for none of ``names``.

    >>> unmatched(["h.0.mlp.c_fc", "h.0.mlp.c_proj"], ["c_fc", "c_prj"])
    ['c_prj']
    """
    known = list(names)
    return [e for e in _entries(targets, "targets") if not any(match(n, e) for n in known)]


def check_targets(names: Iterable[str], targets: Targets) -> None:
    """Raises ValueError where an entry of ``targets`` asks for none of ``names``.

    The message names what comes near: a misspelt layer must not silently train nothing.
    """
    known = list(names)
    if unmatched(known, targets):
        raise ValueError(explain_no_match(targets, known))


def explain_no_match(targets: Targets, names: Iterable[str]) -> str:
    """What is wrong with the first entry of ``targets`` that asks for none of ``names``.

    >>> "Did you mean 'q_proj'?" in explain_no_match("qproj", ["h.0.q_proj"])
    True
    """
    known = [normalise(name) for name in names]
    if not known:
        return "targets: there is no layer to choose from."
    entry = (unmatched(known, targets) or _entries(targets, "targets"))[0]
    # Neighbours are looked for among the ends of names with as many parts as the entry has.
    parts = entry.count(".") + 1
    ends = sorted(
        {".".join(name.split(".")[-parts:]) for name in known if classify(name) != "norm"}
    )
    near = difflib.get_close_matches(entry, [*ends, *GROUPS], n=4, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"There are {ends[:8]}."
    if any(name == entry or name.endswith("." + entry) for name in known):
        hint = "It is an embedding or a norm, which have no SVF form."
    if entry in GROUPS:
        hint = f"There are {ends[:8]}."
    return (
        f"targets: {entry!r} matches none of {len(known)} layers. {hint} "
        f"Use one of {', '.join(map(repr, GROUPS))}, the end of a layer's name, "
        "or a regular expression that matches the whole name."
    )


def is_conv1d(name: str, model_types: Iterable[str]) -> bool:
    """Whether a checkpoint of these model types stores the layer as Conv1D: (in, out).

    >>> is_conv1d("h.0.attn.c_attn", ["gpt2"]), is_conv1d("h.0.attn.c_attn", ["gpt_bigcode"])
    (True, False)
    """
    leaf = normalise(name).rsplit(".", 1)[-1]
    return leaf in _CONV1D_LEAVES and not _CONV1D_MODELS.isdisjoint(model_types)


def _entries(targets: Targets, what: str) -> list[str]:
    if isinstance(targets, str):
        entries = [targets]
    elif isinstance(targets, (list, tuple, set, frozenset)):
        entries = list(targets)
    else:
        raise TypeError(f"{what} must be a str or a list of str, got {type(targets).__name__}.")
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{what} must hold str, got {entry!r}.")
        if not entry:
            raise ValueError(f"{what} must not hold an empty string.")
    if what == "targets" and not entries:
        raise ValueError(f"targets must not be empty. Use one of {', '.join(map(repr, GROUPS))}.")
    return entries


def _entry_matches(name: str, kind: str, entry: str) -> bool:
    if entry in ("mlp", "attention"):
        return kind == entry
    if entry == "all-linear":
        return kind not in ("head", "router")
    entry = normalise(entry)
    if name == entry or name.endswith("." + entry):
        return True
    try:
        found = re.fullmatch(entry, name) is not None
    except re.error as error:
        raise ValueError(
            f"targets: {entry!r} is neither the end of a layer's name nor a regular expression: "
            f"{error}."
        ) from error
    return found and kind not in ("head", "router")
