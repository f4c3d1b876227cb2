"""REINFORCE with KL, on one page.

    maximise  E[ log π'(y|x)·r(y) ] − kl·KL(π' ‖ π),   r = +1 right, −1 wrong,

over the adapter's parameters only (the z of an SVF expert); π' is the model under them, π the base.
As in the paper, and the defaults of `Config`: the reward, the direction and weight of KL, AdamW at
2e-3 with cosine decay, gradient norm clipped at 1e-3, 256 answers a step, the best by validation,
early stop.
NOTE(paper): what is ours, each a field of `Config`:
  temperature    answers are sampled; the authors' code decodes greedily and so explores nothing;
  samples        several per prompt, where asked for; with them
  baseline       "leave-one-out": r minus the mean r of the prompt's other samples;
  wrong_reward   anything below 1 (the paper: −1, and −0.1 for images);
  length_norm    loss and KL averaged over an answer's tokens instead of summed;
  kl_estimator   "exact": the sum over the vocabulary at each visited state; "k3": from the sampled
                 ids alone. Both give the gradient of the KL at the visited states, not its part
                 through which states are visited. The authors' code has KL(π ‖ π'), off by default;
  optimiser, schedule, warmup, clip, and no weight decay: it pulls z to 0, the base is at 1;
  rollout        samples come from W' merged or from the factorised form; they differ by rounding.
Log-probs are those of the sampled ids, end token included; nothing is tokenised again. An empty
answer is its end token, graded as the empty text. The reference is the same model under its base
weights, not a second copy. z and the optimiser's state are fp32. The loop is in `loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from t2runtime.generation import Completions, answer_log_probs, complete, token_log_probs
from t2runtime.rewards import reward_of
from t2runtime.tasks import Problem, Source
from t2runtime.train.adapters import Adapter
from t2runtime.train.blocks import checkpointed
from t2runtime.train.config import Config
from t2runtime.verdicts import is_right, verdicts_of


def rewards(verdicts: Sequence[bool | float], wrong: float) -> Tensor:
    """(rows,): 1 for True, `wrong` for False; a plain number is a reward by itself.

    >>> rewards([True, False, 0.25], -1.0).tolist()
    [1.0, -1.0, 0.25]
    """
    return torch.tensor(
        [reward_of(v, wrong) if isinstance(v, bool) else v for v in verdicts], dtype=torch.float32
    )


def advantages(scores: Tensor, baseline: str) -> Tensor:
    """Rewards (prompts, samples) minus the mean of the prompt's other samples.

    >>> advantages(torch.tensor([[1.0, -1.0]]), "leave-one-out").tolist()
    [[2.0, -2.0]]
    """
    if baseline == "none":
        return scores
    samples = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * samples / (samples - 1)


def exact_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(π' ‖ π) per position (...,) from log-probabilities (..., vocabulary)."""
    return (log_probs.exp() * (log_probs - reference)).sum(-1)


def sampled_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(π' ‖ π) per position from the log-probabilities (...,) of tokens sampled from π'.

    Value: k3 = ρ − 1 − log ρ with ρ = π/π', never negative, its mean the KL. Gradient: that of the
    mean, ∇E[k3] = E[∇k3 + k3·∇log π'] = E[(log π' − log π)·∇log π']; ∇k3 alone, as often used,
    has the mean of ∇KL(π ‖ π').
    """
    gap = (reference - log_probs).detach()
    carrier = -gap * log_probs
    return gap.exp() - 1 - gap + carrier - carrier.detach()


def reinforce(
    model: Any, tokenizer: Any, adapter: Adapter, source: Source, cfg: Config, seed: int
) -> dict[str, float]:
    """One step's gradient, left in the adapter's parameters; what to report of it."""
    begin = time.perf_counter()
    asked = drawn(source, cfg, seed)
    with adapter.rollout(cfg.rollout):
        rolled = list(_rollouts(model, tokenizer, [problem.prompt for problem in asked], cfg))
    texts = [text for part in rolled for text in part.texts]
    after_rollout = time.perf_counter()
    repeated = [problem for problem in asked for _ in range(cfg.samples)]
    verdicts = verdicts_of(source, repeated, texts)
    scores = rewards(verdicts, cfg.wrong_reward)
    after_grading = time.perf_counter()
    gain = advantages(scores.view(-1, cfg.samples), cfg.baseline).flatten().to(model.device)
    loss = kl = 0.0
    for part, own in zip(rolled, gain.split([len(part.texts) for part in rolled]), strict=True):
        share = token_shares(part, cfg.length_norm) / len(texts)
        part_loss, part_kl = gradient(model, adapter, part, own[:, None] * share, share, cfg)
        loss, kl = loss + part_loss, kl + part_kl
    return {
        "loss": loss,
        "kl": kl,
        "reward": scores.mean().item(),
        "sampled_accuracy": sum(map(is_right, verdicts)) / len(verdicts),
        "new_tokens": sum(int(part.sampled.sum()) for part in rolled) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "rollout_seconds": after_rollout - begin,
        "grading_seconds": after_grading - after_rollout,
        "gradient_seconds": time.perf_counter() - after_grading,
    }


def _rollouts(model: Any, tokenizer: Any, prompts: list[str], cfg: Config) -> Iterator[Completions]:
    """Samples of all prompts, as many rows at a time as the settings say."""
    at_once = max(1, cfg.rows_per_rollout // cfg.samples)
    for first in range(0, len(prompts), at_once):
        yield complete(
            model, tokenizer, prompts[first : first + at_once], cfg.max_new_tokens or 1,
            samples=cfg.samples, temperature=cfg.temperature, chat=cfg.chat,
        )  # fmt: skip


def drawn(source: Source, cfg: Config, seed: int) -> list[Problem]:
    """The problems of one step."""
    problems = source(cfg.prompts, "train", seed)
    if not problems:
        raise ValueError(f"task {source.name!r} gave no training problems for seed {seed}")
    return problems


def token_shares(answers: Completions, length_norm: bool) -> Tensor:
    """(rows, new): 1 at every token of an answer, or one over its length; 0 behind its end."""
    mask = answers.sampled.float()
    return mask / mask.sum(1, keepdim=True) if length_norm else mask


def gradient(
    model: Any,
    adapter: Adapter,
    answers: Completions,
    weight: Tensor,
    kl_weight: Tensor,
    cfg: Config,
) -> tuple[float, float]:
    """Gradient of −Σ weight·log π' + cfg.kl·Σ kl_weight·KL over all tokens (rows, new), some rows
    at a time; returns the loss without KL, and the KL.
    """
    loss = kl = 0.0
    for first in range(0, len(answers.texts), cfg.rows_per_backward):
        part = slice(first, first + cfg.rows_per_backward)
        some = answers.rows(part)
        policy, divergence = _terms(model, adapter, some, cfg)
        new = some.sampled.shape[1]
        policy = -(weight[part, :new] * policy).sum()
        divergence = (kl_weight[part, :new] * divergence).sum()
        (policy + cfg.kl * divergence).backward()
        loss, kl = loss + policy.item(), kl + divergence.item()
    return loss, kl


def _terms(model: Any, adapter: Adapter, some: Completions, cfg: Config) -> tuple[Tensor, Tensor]:
    """log π' of the tokens and KL at each of them, (rows, new); 0 where no KL is wanted."""
    exact = cfg.kl_estimator == "exact"
    read = answer_log_probs if cfg.kl > 0 and exact else token_log_probs
    reference = None
    if cfg.kl > 0:
        with torch.no_grad(), adapter.base():
            reference = read(model, some, cfg.temperature)
    with checkpointed(model, cfg.gradient_checkpointing):
        log_probs = read(model, some, cfg.temperature)
    if reference is None:
        return log_probs, torch.zeros_like(log_probs)
    if not exact:
        return log_probs, sampled_kl(log_probs, reference)
    chosen = log_probs.gather(-1, some.new_ids[..., None])[..., 0]
    return chosen, exact_kl(log_probs, reference)
