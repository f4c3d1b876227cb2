"""A router: a small network from what the base model makes of a question to alpha.

NOTE(paper): not in the paper, whose pass 1 names one category. Here pass 1 is one forward of the
base weights; the mean and the last of the question's hidden states go through two small layers to
one weight per expert. The network is trained end to end, through the differentiable mixture of
every request, on the likelihood of right answers; the model and the experts stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2kernels.files import load_tensors, save_tensors
from t2runtime.adapt.fewshot import Space
from t2runtime.adapt.mixtures import Hashes, check_experts, hashes
from t2runtime.adapt.shots import check_shots, log_likelihood, marks_in, question_marks
from t2runtime.generation import forward_parameters
from t2runtime.prompts import check_context, encode, prompt_ids
from t2runtime.tasks import Problem, Source

KIND, VERSION = "router", 1


@dataclass(frozen=True)
class RouterConfig:
    """How a router is trained: `steps` of Adam on `rows` questions each, drawn in equal parts from
    the sources; every question of a step has its own alpha.
    """

    hidden: int = 64
    high: float = 1.0
    steps: int = 150
    rows: int = 64
    lr: float = 3e-3
    l1: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "steps", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and self.l1 >= 0 and 1 <= self.high < float("inf")):
            raise ValueError(
                f"lr must be above 0, l1 at least 0 and high at least 1, "
                f"got {self.lr}, {self.l1} and {self.high}"
            )


class Router(nn.Module):
    """Features (B, 2 * width) -> alpha (B, K) in [0, high], over `names`.

    experts: {name: hash} of the experts that it was trained for, in the order of alpha. trained:
    {"questions", "forwards"}: distinct labelled questions and rows that training it took.
    questions: the marks of these questions (`shots.question_mark`); None where they are not known,
    as of files from before they were kept.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, experts: Mapping[str, str], width: int, hidden: int = 64, high: float = 1.0
    ) -> None:
        super().__init__()
        if not experts or width < 1 or hidden < 1:
            raise ValueError(
                f"a router needs at least one expert, a width and a hidden size of at least 1, got "
                f"{len(experts)}, {width} and {hidden}"
            )
        self.experts, self.width, self.hidden, self.high = dict(experts), width, hidden, high
        self.trained = {"questions": 0, "forwards": 0}
        self.questions: tuple[str, ...] | None = None
        self.first, self.second = nn.Linear(2 * width, hidden), nn.Linear(hidden, len(experts))
        # The scale of hidden states differs from model to model by orders of magnitude.
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("deviation", torch.ones(2 * width))

    @property
    def names(self) -> list[str]:
        """The experts, in the order of alpha's columns."""
        return list(self.experts)

    def forward(self, features: Tensor) -> Tensor:
        """alpha (B, K), fp32."""
        x = (features - self.mean) / self.deviation
        return self.high * torch.sigmoid(self.second(torch.nn.functional.gelu(self.first(x))))

    @torch.no_grad()
    def weights(self, features: Tensor) -> Tensor:
        """As `forward`, without gradients; row by row, so that a row's bits depend on no other."""
        device = self.mean.device
        return torch.cat([self(row[None].to(device)) for row in features])

    @torch.no_grad()
    def alpha(
        self, model: Any, tokenizer: Any, questions: Sequence[str], *, chat: str = "auto",
        bank: t2k.ExpertBank | None = None,
    ) -> Tensor:  # fmt: skip
        """alpha (B, K) of the questions, over `names`; with `bank` over all experts of the bank,
        as `bank.use` takes it, after a check that they are the same experts.

        Pass 1 runs on the base weights, whatever is in force around the call.
        """
        found = self.weights(features(model, tokenizer, questions, chat))
        if bank is None:
            return found
        self.check(bank)
        return Space(bank, tuple(self.names)).alpha(found)

    def check(self, bank: t2k.ExpertBank, hashed: Hashes | None = None) -> None:
        """ValueError unless the bank has the experts of the router, the same by hash."""
        check_experts(
            hashed or Hashes(bank), self.experts, "the router", made="trained",
            again="train the router again",
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """One safetensors file, its JSON header naming the experts and their hashes."""
        facts: dict[str, Any] = {"width": self.width, "hidden": self.hidden, "high": self.high,
                 "trained": self.trained}  # fmt: skip
        if self.questions is not None:
            facts["questions"] = list(self.questions)
        meta = {"kind": KIND, "version": VERSION, "experts": list(self.experts.items()), **facts}
        save_tensors(path, dict(self.state_dict()), meta)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Router:
        """What `save` wrote; CorruptFileError for a truncated, damaged or other file."""
        tensors, meta = load_tensors(path, kind=KIND, version=VERSION)
        try:
            made = cls(
                dict(meta["experts"]), int(meta["width"]), int(meta["hidden"]), float(meta["high"])
            )
            made.load_state_dict(tensors)
            made.trained = {name: int(meta["trained"][name]) for name in made.trained}
            made.questions = marks_in(meta)
            if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
                raise ValueError("values that are not finite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise t2k.CorruptFileError(f"{path} is not a whole router: {error}.") from error
        return made.to(device).eval()


def features(model: Any, tokenizer: Any, questions: Sequence[str], chat: str = "auto") -> Tensor:
    """`hidden_features` of questions."""
    return hidden_features(model, *encode(tokenizer, questions, model.device, chat))


@torch.no_grad()
def hidden_features(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, 2 * width) fp32: the mean of a row's last hidden states, and its last one, under the
    base weights of the converted model, whatever is in force around the call.

    ids, mask: (B, length), padded on the left.
    """
    wanted = {"logits_to_keep": 1, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    accepted = forward_parameters(model)
    extra = {name: value for name, value in wanted.items() if name in accepted}
    with t2k.ExpertBank(model).use(None):
        hidden = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **extra
        ).hidden_states[-1]
    # Each row alone, in memory of its own: its bits do not depend on how long the others are.
    rows = [row[-length:].float().clone() for row, length in zip(hidden, mask.sum(1).tolist())]
    return torch.stack([torch.cat([row.mean(0), row[-1]]) for row in rows])


def train_router(
    model: Any,
    tokenizer: Any,
    bank: t2k.ExpertBank,
    names: Sequence[str],
    sources: Sequence[Source],
    cfg: RouterConfig | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    chat: str = "auto",
    max_new_tokens: int | None = None,
) -> Router:
    """Maximise mean log p(answer | question; alpha(question)) − l1·Σalpha on the training splits of
    the sources; nothing else of them is read.

    `log` gets {"step", "log_likelihood"} of every step. max_new_tokens: of an answer, default what
    each source says. Raises ValueError as `Space` does, where there is no source, and before any
    training where a question and an answer of that length do not fit into the context, as searches
    and records do.
    """
    cfg = cfg or RouterConfig()
    space = Space(bank, tuple(names))
    if not sources:
        raise ValueError("sources must hold at least one task to train on, got none")
    pool: list[Problem] = []
    share = -(-cfg.rows * cfg.steps // len(sources))
    for source in sources:
        pool += (drawn := source(share, "train", cfg.seed))
        asked = {problem.prompt: None for problem in drawn}  # each once
        lengths = [len(prompt_ids(tokenizer, prompt, chat)) for prompt in asked]
        check_context(model, lengths, [max_new_tokens or source.max_new_tokens] * len(asked))
    check_shots(pool)
    random.Random(f"router/{cfg.seed}").shuffle(pool)
    looked = [
        features(model, tokenizer, [p.prompt for p in pool[start : start + 256]], chat)
        for start in range(0, len(pool), 256)
    ]
    seen = torch.cat(looked)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        router = Router(hashes(bank, list(names)), seen.shape[1] // 2, cfg.hidden, cfg.high)
    router = router.to(model.device)
    router.mean.copy_(seen.mean(0))
    router.deviation.copy_(seen.std(0, unbiased=False).clamp(min=1e-6))
    optimiser = torch.optim.Adam(router.parameters(), cfg.lr)
    for step in range(cfg.steps):
        rows = [(step * cfg.rows + row) % len(pool) for row in range(cfg.rows)]
        alpha = router(seen[rows])
        # alpha as a leaf: the model's graph ends there, and nothing else of it gets a gradient.
        leaf = space.alpha(alpha).detach().requires_grad_()
        with bank.use(leaf):
            value = log_likelihood(model, tokenizer, [pool[row] for row in rows], chat).mean()
            (slope,) = torch.autograd.grad(value, [leaf])
        optimiser.zero_grad()
        (cfg.l1 * alpha.sum(1).mean() - (space.alpha(alpha) * slope).sum()).backward()
        optimiser.step()
        if log is not None:
            log({"step": step + 1, "log_likelihood": float(value.detach())})
    used = cfg.steps * cfg.rows  # rows that go forward and back; each question is looked at once
    router.questions = question_marks(pool)
    router.trained = {"questions": len(router.questions), "forwards": 2 * used + len(pool)}
    return router.eval()
