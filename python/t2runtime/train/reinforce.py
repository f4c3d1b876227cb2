"""REINFORCE with KL for an SVF expert, on one page.

    maximise  E[ log π'(y|x)·r(y) ] − kl·KL(π' ‖ π),   r = +1 right, −1 wrong,

over z only; π' is the model under z, π the model at z = 1.
NOTE(paper): departures, each a field of `Config`:
  samples      several per prompt (the authors' code: one greedy completion, exploring nothing);
  baseline     r minus the mean r of the prompt's other samples; "none" is the paper's;
  lr, clip     Adam, constant 2e-2, gradient norm clipped at 1, for the small model (paper: AdamW,
               2e-3 with cosine decay, 1e-3). No weight decay: it pulls z to 0, the base is at 1;
  length_norm  off: log-probs are summed over the answer, as in the paper; on: averaged.
As in the paper: the reward, KL in this direction (here an exact sum over the vocabulary at each
visited state), the best z by validation, early stopping (`stop_at`). The reference is the same
model at z = 1, not a second copy. Log-probs are those of the sampled ids, end token included; z
and Adam are fp32.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2runtime.evaluate import evaluate
from t2runtime.generation import Completions, answer_log_probs, complete
from t2runtime.rewards import reward_of
from t2runtime.tasks import Source
from t2runtime.train.config import Config, open_run

Log = Callable[[dict[str, Any]], None]
_ROLLOUT = "t2-rollout"
logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training. `expert` is the best by validation so far, before the first
    validation the present one.
    """

    def __init__(self, expert: Any, step: int, validated: bool) -> None:
        super().__init__(f"interrupted at step {step}")
        self.expert, self.step, self.validated = expert, step, validated


def advantages(scores: Tensor, baseline: str) -> Tensor:
    """Rewards (prompts, samples) minus the mean of the prompt's other samples.

    >>> advantages(torch.tensor([[1.0, -1.0]]), "leave-one-out").tolist()
    [[2.0, -2.0]]
    """
    if baseline == "none":
        return scores
    samples = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * samples / (samples - 1)


def losses(
    log_probs: Tensor,
    reference: Tensor | None,
    rolled: Completions,
    advantage: Tensor,
    length_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Policy loss and KL, summed over rows; log_probs and reference (rows, new, vocabulary)."""
    mask = rolled.sampled.float()
    chosen = log_probs.gather(-1, rolled.new_ids[..., None])[..., 0]
    weight = mask / mask.sum(1, keepdim=True) if length_norm else mask
    policy = -(advantage[:, None] * chosen * weight).sum()
    if reference is None:
        return policy, torch.zeros_like(policy)
    divergence = (log_probs.exp() * (log_probs - reference)).sum(-1)
    return policy, (divergence * mask).sum()


def train(
    model: Any,
    tokenizer: Any,
    source: Source,
    cfg: Config,
    out: Path | None = None,
    log: Log | None = None,
) -> Any:
    """Train an expert on a converted model and return it, the best by validation (`t2k.Expert`).

    The layers' own z start at 1 and are back at 1 and frozen afterwards. With `out`, config.json
    and metrics.jsonl (one line per step) are written there. Equal seeds give equal experts.
    Its metadata hold its validation accuracy and the base's; an expert that is not better than the
    base is returned all the same, with a warning in the log. Ctrl-C raises `Interrupted`.
    """
    parameters = list(t2k.trainable(model))
    bank = t2k.ExpertBank(model)
    optimizer = torch.optim.Adam(parameters, cfg.lr)
    held_out = source(cfg.validation_problems, "validation", cfg.seed)
    metrics = open_run(out, cfg)
    _reset(parameters)
    model.eval()
    best, best_key, step = t2k.Expert.from_model(model), (-1.0, 0.0), 0
    try:
        at_base = evaluate(model, tokenizer, source, held_out, cfg.max_new_tokens).accuracy
        for step in range(cfg.steps):
            start, seed = time.perf_counter(), cfg.seed * 1_000_003 + step
            torch.manual_seed(seed)
            asked = source(cfg.prompts, "train", seed)
            prompts = [problem.prompt for problem in asked]
            with _rollout_weights(model, bank, cfg.rollout):
                rolled = complete(
                    model, tokenizer, prompts, cfg.max_new_tokens,
                    samples=cfg.samples, temperature=cfg.temperature,
                )  # fmt: skip
            repeated = [problem for problem in asked for _ in range(cfg.samples)]
            verdicts = source.grade(repeated, rolled.texts)
            scores = torch.tensor([reward_of(right) for right in verdicts])
            gain = advantages(scores.view(-1, cfg.samples), cfg.baseline).flatten()
            loss, kl = _backward(model, bank, rolled, gain.to(model.device), cfg)
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip).item()
            if not math.isfinite(loss + kl + norm):
                raise RuntimeError(
                    f"training diverged at step {step}: loss {loss}, KL {kl}, gradient norm {norm}."
                    f" Lower lr (now {cfg.lr}) or raise kl (now {cfg.kl})."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            line: dict[str, Any] = {"step": step + 1, "loss": loss, "kl": kl, "grad_norm": norm}
            line["sampled_accuracy"] = (scores > 0).float().mean().item()
            if (step + 1) % cfg.validate_every == 0 or step + 1 == cfg.steps:
                with _rollout_weights(model, bank, cfg.rollout):
                    score = evaluate(
                        model, tokenizer, source, held_out, cfg.max_new_tokens
                    ).accuracy
                line |= {"validation": score, "base_validation": at_base}
                line["better_than_base"] = score > at_base
                # Ties on validation go to the better sampler: greedy answers say little at first.
                if (key := (score, line["sampled_accuracy"])) > best_key:
                    facts = {"validation": score, "base_validation": at_base}
                    best, best_key = t2k.Expert.from_model(model, metadata=facts), key
            line["seconds"] = time.perf_counter() - start
            if metrics is not None:
                with metrics.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if log is not None:
                log(line)
            if cfg.stop_at is not None and line.get("validation", 0.0) >= cfg.stop_at:
                break
    except KeyboardInterrupt as stop:
        validated = best_key[0] >= 0
        best = best if validated else t2k.Expert.from_model(model)
        raise Interrupted(best, step, validated) from stop
    finally:
        _reset(parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
    if best_key[0] <= at_base:
        logger.warning(
            "the expert is not better than the base: validation accuracy %.3f, the base has %.3f "
            "(%d problems). More steps, samples or another lr may help.",
            best_key[0], at_base, len(held_out),
        )  # fmt: skip
    return best


def _backward(
    model: Any, bank: Any, rolled: Completions, gain: Tensor, cfg: Config
) -> tuple[float, float]:
    """Gradients of the mean loss over all rows, a part of the rows at a time; (loss, KL)."""
    rows = len(rolled.texts)
    loss = kl = 0.0
    for first in range(0, rows, cfg.rows_per_backward):
        part = slice(first, first + cfg.rows_per_backward)
        some = rolled.rows(part)
        reference = None
        if cfg.kl > 0:
            with torch.no_grad(), bank.use(None):
                reference = answer_log_probs(model, some, cfg.temperature)
        log_probs = answer_log_probs(model, some, cfg.temperature)
        policy, divergence = losses(log_probs, reference, some, gain[part], cfg.length_norm)
        ((policy + cfg.kl * divergence) / rows).backward()
        loss, kl = loss + policy.item() / rows, kl + divergence.item() / rows
    return loss, kl


@contextmanager
def _rollout_weights(model: Any, bank: Any, form: str) -> Iterator[None]:
    """The present z: merged into W for the length of the block, or as the layers stand."""
    if form == "factorised":
        yield
        return
    bank.add(_ROLLOUT, t2k.Expert.from_model(model), overwrite=True)
    bank.merge(_ROLLOUT)
    try:
        yield
    finally:
        bank.unmerge()


@torch.no_grad()
def _reset(parameters: Sequence[Tensor]) -> None:
    """Back to the base."""
    for parameter in parameters:
        parameter.fill_(1.0)
