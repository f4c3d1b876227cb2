"""The loop around an objective: steps, validation, the best kept, checkpoints, early stop."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from t2runtime.evaluate import evaluate
from t2runtime.prompts import uses_template
from t2runtime.tasks import Problem, Source
from t2runtime.train import optimiser as optim
from t2runtime.train.adapters import SVF, Adapter, restore, snapshot
from t2runtime.train.checkpoint import State
from t2runtime.train.config import Config
from t2runtime.train.folder import Folder
from t2runtime.train.identity import identity_of
from t2runtime.train.lengths import Fitting, fitting, whole
from t2runtime.train.next_token import check, next_token
from t2runtime.train.reinforce import drawn, reinforce

Log = Callable[[dict[str, Any]], None]
logger = logging.getLogger(__name__)
_OBJECTIVES = {"reinforce": reinforce, "next-token": next_token}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training. `expert` is the best by validation so far, before the first
    validation the present one.
    """

    def __init__(self, expert: Any, step: int, validated: bool) -> None:
        super().__init__(f"interrupted at step {step}")
        self.expert, self.step, self.validated = expert, step, validated


def resolved(cfg: Config, source: Source, tokenizer: Any) -> Config:
    """The settings with nothing left open: the task's answer length, the template or none."""
    return dataclasses.replace(
        cfg,
        max_new_tokens=cfg.max_new_tokens or source.max_new_tokens,
        chat="on" if uses_template(tokenizer, cfg.chat) else "off",
    )


def train(
    model: Any,
    tokenizer: Any,
    source: Source,
    cfg: Config,
    out: Path | None = None,
    log: Log | None = None,
    *,
    adapter: Adapter | None = None,
    resume: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Any:
    """Train an expert on a converted model and return it, the best by validation (`t2k.Expert`).

    Args:
        source: of training and validation problems, and their grading.
        out: folder for config.json, metrics.jsonl (one line a step) and the checkpoint.
        log: called with each line of metrics.
        adapter: another one than the model's own z (`adapters.Peft`); its weights are returned.
        resume: go on from the checkpoint in `out`, to the bits that the run would have reached
            unstopped; without a checkpoint, start. Other settings, problems, rewards, weights,
            dtypes or threads are refused by name. More steps are taken where the schedule is
            constant; where the shorter run ended on a step of validation, they lead to the bits of
            a run of that length.
        overwrite: start anew where `out` holds a run that is not finished, which else is refused.
        facts: about the run, for config.json.

    The adapter starts at the base and is back there, frozen, afterwards. The result's metadata hold
    its validation accuracy and the base's; one that is not better than the base is returned all the
    same, with a warning in the log. Ctrl-C raises `Interrupted`. What is not finite, and a reward
    that raises, is a RuntimeError or ValueError that names it.
    """
    one_process()
    cfg = resolved(cfg, source, tokenizer)
    adapter = SVF(model) if adapter is None else adapter
    if cfg.objective == "next-token":
        check(whole(source), cfg)
    source = fitting(source, model, tokenizer, cfg)
    held_out = source(cfg.validation_problems, "validation", cfg.seed)
    if not held_out:
        raise ValueError(f"task {source.name!r} gave no validation problems")
    first = drawn(source, cfg, _seed(cfg, 0))
    identity = identity_of(cfg, whole(source), first, held_out, adapter.identity(), model)
    model.eval()
    folder = Folder(out, cfg, identity, {**(facts or {}), "left_out": _left_out(source)})
    run = _Run(model, tokenizer, source, cfg, adapter, held_out, folder, log)
    with folder.locked():
        return _steps(run, resume, overwrite)


def one_process() -> None:
    """Refuse to be one of several: each would run the whole job and write the same files."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise ValueError(
            f"training must be started as one process, got WORLD_SIZE={world} (torchrun, "
            "accelerate): each would run the whole job and write the same files. Start it without "
            'the launcher; "Several processes" in docs/training.md says what can be spread'
        )


def _left_out(source: Source) -> dict[str, int]:
    return source.left_out if isinstance(source, Fitting) else {}


def _seed(cfg: Config, step: int) -> int:
    return cfg.seed * 1_000_003 + step


def _steps(run: _Run, resume: bool, overwrite: bool) -> Any:
    """All steps from where the run stands, and its result."""
    step, cfg, adapter = 0, run.cfg, run.adapter
    adapter.start(cfg.recompute)
    try:
        run.open(resume, overwrite)
        bar = tqdm(total=cfg.steps, initial=run.state.step, desc=run.source.name, unit="step",
                   disable=None, leave=False)  # fmt: skip
        with bar:
            for step in range(run.state.step, cfg.steps):
                if run.state.finished:
                    break
                bar.set_postfix(run.step(step), refresh=False)
                bar.update()
        return run.result()
    except KeyboardInterrupt as stop:
        raise Interrupted(run.result(warn=False), step, bool(run.state.best)) from stop
    finally:
        adapter.stop()


@dataclasses.dataclass
class _Run:
    """One run: what `train` was given, and where it stands."""

    model: Any
    tokenizer: Any
    source: Source
    cfg: Config
    adapter: Adapter
    held_out: list[Problem]
    folder: Folder
    log: Log | None
    state: State = dataclasses.field(default_factory=State)

    def __post_init__(self) -> None:
        self._parameters = self.adapter.parameters()
        self._optimiser = optim.make(self.cfg, list(self._parameters.values()))

    def open(self, resume: bool, overwrite: bool) -> None:
        """Start anew, or where the checkpoint stands."""
        found = self.folder.resume() if resume else None
        if found is None:
            self.folder.begin(overwrite)
        else:
            self.state, now, moments = found
            restore(self.adapter, now)
            optim.load_state(self._optimiser, moments)
        if self.state.base is None:
            with self.adapter.base():
                self.state.base = self._accuracy("base, validation")

    def step(self, step: int) -> dict[str, Any]:
        """One step with all that follows from it; what a progress bar shows."""
        cfg, state = self.cfg, self.state
        begin, seed = time.perf_counter(), _seed(cfg, step)
        torch.manual_seed(seed)
        facts = _OBJECTIVES[cfg.objective](
            self.model, self.tokenizer, self.adapter, self.source, cfg, seed
        )
        after = time.perf_counter()
        norm = _clipped(self._parameters, facts, step, cfg)
        rate = optim.learning_rate(cfg, step)
        optim.advance(self._optimiser, rate)
        line: dict[str, Any] = {"step": step + 1, "grad_norm": norm, "lr": rate, **facts}
        line["optimiser_seconds"] = time.perf_counter() - after
        state.step = step + 1
        if state.step == cfg.steps:
            state.finished = "steps"
        if state.step % cfg.validate_every == 0 or state.finished:
            self._validate(line)
        line["seconds"] = time.perf_counter() - begin
        self.folder.append(line)
        if self.log is not None:
            self.log(line)
        if state.step % cfg.checkpoint_every == 0 or state.finished:
            moments = optim.state_tensors(self._optimiser)
            self.folder.save(state, snapshot(self.adapter), moments)
        shown = ("reward", "loss", "kl", "validation")
        return {name: f"{line[name]:.3f}" for name in shown if name in line}

    def _validate(self, line: dict[str, Any]) -> None:
        cfg, state = self.cfg, self.state
        begin = time.perf_counter()
        with self.adapter.rollout(cfg.rollout):
            score = self._accuracy("validation")
        base = state.base or 0.0
        line |= {"validation": score, "base_validation": base, "better_than_base": score > base}
        line["moved"] = self.adapter.moved()
        # Ties on validation go to the better sampler: greedy answers say little at first.
        key = (score, line.get("sampled_accuracy", -line["loss"]))
        before = state.best_key or (-1.0, 0.0)
        state.waited = 0 if score > before[0] else state.waited + 1
        if key > before:
            state.best, state.best_key, state.best_step = snapshot(self.adapter), key, state.step
        if cfg.stop_at is not None and score >= cfg.stop_at:
            state.finished = "stop_at"
        elif cfg.patience is not None and state.waited >= cfg.patience:
            state.finished = "patience"
        line["validation_seconds"] = time.perf_counter() - begin

    def _accuracy(self, label: str) -> float:
        cfg = self.cfg
        return evaluate(
            self.model, self.tokenizer, self.source, self.held_out, cfg.max_new_tokens or 1,
            rows=cfg.rows_per_rollout, chat=cfg.chat, label=label,
        ).accuracy  # fmt: skip

    def result(self, warn: bool = True) -> Any:
        """The best, or what there is before the first validation, with its facts."""
        state, base = self.state, self.state.base or 0.0
        of_source = getattr(whole(self.source), "expert_metadata", None)
        asked = of_source(self.cfg.chat) if of_source else {}
        if state.best_key is None:
            return self.adapter.trained(asked)
        score = state.best_key[0]
        if warn and score <= base:
            logger.warning(
                "the expert is not better than the base: validation accuracy %.3f, the base has "
                "%.3f (%d problems). More steps, samples or another lr may help.",
                score, base, len(self.held_out),
            )  # fmt: skip
        restore(self.adapter, state.best)
        left_out = _left_out(self.source)
        said = {"left_out": left_out} if left_out else {}
        return self.adapter.trained({"validation": score, "base_validation": base, **said, **asked})


def _clipped(
    parameters: Mapping[str, nn.Parameter], facts: Mapping[str, float], step: int, cfg: Config
) -> float:
    """Clip the gradient to cfg.clip and return its norm; raise, by name, on what is not finite."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if math.isfinite(facts["loss"] + facts["kl"] + norm.item()):
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), cfg.clip, norm)
        return norm.item()
    if not math.isfinite(facts["loss"]):
        what = f"the loss is {facts['loss']}, so the logits of its answers are not finite"
    elif not math.isfinite(facts["kl"]):
        what = f"the KL to the base is {facts['kl']}"
    else:
        bad = [n for n, p in parameters.items() if p.grad is not None and not _finite(p.grad)]
        named = f"first {bad[0]}" if bad else "none by itself"
        what = f"{len(bad)} of {len(parameters)} gradients are not finite, {named}"
    raise RuntimeError(
        f"training diverged at step {step}: {what}. Lower lr (now {cfg.lr}) or raise kl (now "
        f"{cfg.kl})."
    )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())
