"""Constrained scoring: the log-probability of every one of a few given texts after every prompt,
in one forward.

The texts' tokens form a tree behind each prompt; every node sees the prompt and the nodes above
it, so one row scores all texts, and texts that begin alike share their beginning. What all prompts
of a batch have in common is computed once. The rest of the prompts is packed into one sequence
behind it, each seeing itself only: no token is padding, and no row needs a copy of the beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2runtime import invariant
from t2runtime.generation import forward_parameters

#: Attention that takes a mask.
MASKED = ("sdpa", "eager", invariant.NAME)
#: Logits held at once: half a GiB in fp32.
_LOGITS = 1 << 27
#: Tokens packed into one sequence. Attention computes what it then masks, so not too many.
_PACKED = 512


@dataclass(frozen=True)
class Tree:
    """Token sequences that share their beginnings.

    tokens, parents, depths: of each node; a parent of -1 is the prompt. paths: the nodes of each
    sequence, in order.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Tree:
        """The tree of the sequences, which must differ and hold a token each.

        >>> tree = Tree.of([[5, 7], [5, 8]])
        >>> tree.tokens, tree.parents, tree.paths
        ([5, 7, 8], [-1, 0, 0], [[0, 1], [0, 2]])
        """
        tree = cls([], [], [], [])
        known: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            node, path = -1, []
            for depth, token in enumerate(sequence):
                if (node, token) not in known:
                    known[node, token] = len(tree.tokens)
                    tree.tokens.append(token)
                    tree.parents.append(node)
                    tree.depths.append(depth)
                node = known[node, token]
                path.append(node)
            if not path or path in tree.paths:
                raise ValueError(
                    f"sequences must differ and hold at least one token each, got {list(sequence)}"
                )
            tree.paths.append(path)
        return tree

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.depths) + 1

    def sight(self) -> Tensor:
        """(nodes, nodes) bool: node i sees node j, itself and those above it."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:  # a parent comes before its children
                seen[node] |= seen[parent]
        return seen


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share; every row keeps at least one of its own.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]]), common_prefix([[1, 2]])
    (2, 1)
    """
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    for index in range(shortest):
        if any(row[index] != first[index] for row in rows):
            return index
    return shortest


@torch.no_grad()
def sequence_log_probs(
    model: Any,
    rows: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    share_prefix: bool = True,
) -> Tensor:
    """(rows, sequences) fp64: log p(sequence, then any of `ends` | row) under the weights in force,
    which must be the same for all rows.

    Without `ends` the sequences are scored as they are. `share_prefix=False` computes every row
    whole and by itself, so that its bits depend on no other; the results agree to rounding. Raises
    RuntimeError for a model whose attention takes no mask, or that takes no positions.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in MASKED:
        raise RuntimeError(
            f"pass 1 needs attention that takes a mask ({', '.join(MASKED)}), the model has "
            f"{attention!r}. Call model.set_attn_implementation('sdpa')."
        )
    accepted = forward_parameters(model)
    if "position_ids" not in accepted:
        raise RuntimeError(
            f"pass 1 needs a model that takes position_ids, {type(model).__name__} does not"
        )
    tree = Tree.of(sequences)
    window = _window(model)
    prefix = common_prefix(rows) if share_prefix and len(rows) > 1 else 0
    if window is not None and prefix >= window:  # such a cache has forgotten its beginning
        prefix = 0
    cache = None
    if prefix:
        first = torch.tensor([rows[0][:prefix]], device=model.device)
        few = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        cache = model(input_ids=first, use_cache=True, **few).past_key_values

    def scores(group: Sequence[Sequence[int]]) -> Tensor:
        own = copy.deepcopy(cache)
        ids, positions, sees = _packed(group, tree, prefix)
        kept = len(group) * (len(tree.tokens) + 1)
        few = {"logits_to_keep": kept} if "logits_to_keep" in accepted else {}
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=_masks(model, sees, positions, prefix, window),
            position_ids=positions.to(model.device),
            past_key_values=own,
            use_cache=own is not None,
            **few,
        )
        logits = torch.as_tensor(output.logits)[0, -kept:]
        return _path_log_probs(logits.unflatten(0, (len(group), -1)), tree, ends)

    parts = []
    for group in _groups([row[prefix:] for row in rows], tree, model, share_prefix):
        found = scores(group)
        if len(group) > 1 and not bool(torch.isfinite(found).all()):
            # A value that overflows passes the mask (0 times NaN): the row that has it fails alone.
            found = torch.cat([scores([row]) for row in group])
        parts.append(found)
    return torch.cat(parts)


def _groups(
    rows: Sequence[Sequence[int]], tree: Tree, model: Any, packed: bool
) -> Iterator[list[Sequence[int]]]:
    """Rows that are computed in one sequence, in order: as many as fit, or one."""
    nodes = len(tree.tokens) + 1
    most = max(1, _LOGITS // (model.config.get_text_config().vocab_size * nodes)) if packed else 1
    group: list[Sequence[int]] = []
    tokens = 0
    for row in rows:
        length = len(row) + nodes - 1
        if group and (len(group) == most or tokens + length > _PACKED):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    yield group


def _packed(
    rows: Sequence[Sequence[int]], tree: Tree, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions (1, L) of all rows in one sequence, a tree for each; and what sees what,
    (1, L, prefix + L) bool.

    The last token of each row and its tree stand at the end, since only their logits are wanted.
    """
    nodes = torch.tensor(tree.tokens)
    front = sum(len(row) - 1 for row in rows)
    behind = front + len(rows) * (len(nodes) + 1)
    ids, positions = torch.empty(2, behind, dtype=torch.long)
    sees = torch.zeros(behind, prefix + behind, dtype=torch.bool)
    sees[:, :prefix] = True
    start, tail = 0, front
    for row in rows:
        length, stop, end = len(row), start + len(row) - 1, tail + 1 + len(nodes)
        place = torch.cat([torch.arange(start, stop), torch.arange(tail, end)])
        ids[place] = torch.cat([torch.tensor(row), nodes])
        depths = torch.cat([torch.arange(length), length + torch.tensor(tree.depths)])
        positions[place] = prefix + depths
        own = torch.ones(len(place), len(place), dtype=torch.bool).tril()
        own[length:, length:] = tree.sight()
        sees[place[:, None], prefix + place] = own
        start, tail = stop, end
    return ids[None], positions[None], sees[None]


def _window(model: Any) -> int | None:
    """How far the model's sliding layers look back; None where it has none."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = kinds - {"full_attention", "sliding_attention"}
    if strange:
        raise RuntimeError(
            f"pass 1 needs layers of full or sliding attention, the model has {min(strange)!r}"
        )
    if kinds and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _masks(model: Any, sees: Tensor, positions: Tensor, prefix: int, window: int | None) -> Any:
    """The additive mask (1, 1, L, prefix + L) that the model takes; one for each kind of layer
    where there are two.
    """

    def additive(visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=model.dtype)
        mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
        return mask[:, None].to(model.device)

    if window is None:
        return additive(sees)
    keys = torch.cat([torch.arange(prefix).expand(len(positions), -1), positions], 1)
    near = additive(sees & (positions[:, :, None] - keys[:, None] < window))
    if not getattr(model.config.get_text_config(), "layer_types", None):
        return near
    return {"full_attention": additive(sees), "sliding_attention": near}


def _path_log_probs(logits: Tensor, tree: Tree, ends: Sequence[int]) -> Tensor:
    """(rows, sequences): the sum along each path, with the end behind it."""
    log_probs = logits.float().log_softmax(-1)
    parents = torch.tensor(tree.parents, device=logits.device) + 1
    tokens = torch.tensor(tree.tokens, device=logits.device)
    nodes = log_probs[:, parents, tokens].double()
    scores = []
    for path in tree.paths:
        score = nodes[:, path].sum(1)
        if ends:
            score = score + log_probs[:, path[-1] + 1, list(ends)].double().logsumexp(1)
        scores.append(score)
    return torch.stack(scores, 1).cpu()
