"""One REINFORCE step of a whole model, part by part: time, and peak memory on a GPU.

    python benchmarks/bench_step.py --device cuda --json out.json       # Llama-3-8B's shape
    python benchmarks/bench_step.py --quick

The pieces are the trainer's own (`t2runtime.train`): answers are sampled, graded, read again under
the policy and under the base for KL, and the gradient reaches z; then the optimiser moves z.
Forward is what the trainer's gradient pass takes beside backward. Random weights from known factors
(`llama.py`), so rewards mean nothing. Before anything is timed the gradient of z with few layers is
compared with that of the same model in fp32: an error above twice that of plain torch operations
in the model's dtype is refused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import torch

    import t2kernels as t2k
    from t2runtime.base_model import build_tokenizer
    from t2runtime.generation import Completions, complete
    from t2runtime.tasks import Generated
    from t2runtime.train import SVF, Config
    from t2runtime.train import optimiser as optim
    from t2runtime.train.reinforce import advantages, drawn, gradient, rewards, token_shares
    from t2runtime.verdicts import verdicts_of
except ImportError as error:
    sys.exit(f"bench_step: {error}. Run it with the Python that t2kernels[hf] is installed in.")

import llama
from command import add_shared, begin
from harness import GATE_FLOOR, Refused
from results import SCHEMA, write
from torch import Tensor

from t2kernels.testing import relative_error

PARTS = ("generation", "reward", "forward", "backward", "optimiser")
_GATE_LAYERS = 2
_NOISE = 0.05  # of z in the gate, so that KL and its gradient are not 0
_PROBLEM = "37+48=85 "  # what prompts begin with, as often as they are to be long


@dataclass
class Meter:
    """Seconds and the highest memory of each part of one step."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    _part: str | None = None
    _since: float = 0.0

    def enter(self, part: str | None) -> None:
        """From here on, ``part``; None ends the step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] += now - self._since
            if cuda:
                highest = torch.cuda.max_memory_allocated()
                self.peak[self._part] = max(self.peak[self._part], highest)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self._part, self._since = part, time.perf_counter()

    @contextmanager
    def backward_apart(self) -> Iterator[None]:
        """Inside, every ``Tensor.backward`` counts as its own part, what follows as forward."""
        plain = Tensor.backward

        def timed(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.enter("backward")
            plain(tensor, *args, **kwargs)
            self.enter("forward")

        with mock.patch.object(Tensor, "backward", timed):
            yield


class Trainer:
    """A model, its adapter and its optimiser, as the training loop has them."""

    def __init__(self, model: Any, cfg: Config) -> None:
        self.model, self.cfg, self.adapter = model, cfg, SVF(model)
        self.tokenizer, self.source = build_tokenizer(), Generated("add")
        self.tokenizer.model_max_length = model.config.max_position_embeddings
        self.adapter.start(recompute=cfg.recompute)
        self.parameters = list(self.adapter.parameters().values())
        self.optimiser = optim.make(cfg, self.parameters)

    def prompts(self, seed: int, length: int) -> list[Any]:
        """Problems whose prompts are ``length`` characters long, or a little longer."""
        found = drawn(self.source, self.cfg, seed)
        times = max(0, length // len(_PROBLEM) - 1)
        return [dataclasses.replace(p, prompt=_PROBLEM * times + p.prompt) for p in found]

    def sample(self, problems: Sequence[Any]) -> list[Completions]:
        cfg, parts = self.cfg, []
        with self.adapter.rollout(cfg.rollout):
            for first in range(0, len(problems), cfg.rows_per_rollout):
                some = [p.prompt for p in problems[first : first + cfg.rows_per_rollout]]
                parts.append(
                    complete(self.model, self.tokenizer, some, cfg.max_new_tokens or 1,
                             temperature=cfg.temperature)
                )  # fmt: skip
        return parts

    def gain(self, problems: Sequence[Any], answers: Sequence[Completions]) -> Tensor:
        """(rows, 1): what each answer's tokens are weighted with."""
        texts = [text for part in answers for text in part.texts]
        scores = rewards(verdicts_of(self.source, list(problems), texts), self.cfg.wrong_reward)
        gain = advantages(scores.view(-1, 1), self.cfg.baseline)
        return gain.to(self.model.device)

    def gradients(self, answers: Sequence[Completions], gain: Tensor) -> None:
        rows = len(gain)
        for part, own in zip(answers, gain.split([len(a.texts) for a in answers]), strict=True):
            share = token_shares(part, self.cfg.length_norm) / rows
            gradient(self.model, self.adapter, part, own * share, share, self.cfg)

    def move(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip)
        optim.advance(self.optimiser, optim.learning_rate(self.cfg, 0))

    def step(self, seed: int, length: int) -> tuple[Meter, int]:
        """One whole step; its parts and the tokens that were read."""
        meter = Meter(self.model.device)
        problems = self.prompts(seed, length)
        meter.enter("generation")
        answers = self.sample(problems)
        meter.enter("reward")
        gain = self.gain(problems, answers)
        meter.enter("forward")
        with meter.backward_apart():
            self.gradients(answers, gain)
        meter.enter("optimiser")
        self.move()
        meter.enter(None)
        return meter, sum(int(part.attention.sum()) for part in answers)


def z_gradient(trainer: Trainer, answers: Sequence[Completions], gain: Tensor) -> Tensor:
    """The gradients of all z, one after another; they are freed."""
    trainer.gradients(answers, gain)
    found = [p.grad for p in trainer.parameters]
    if any(g is None for g in found):
        raise Refused("a layer's z got no gradient")
    for p in trainer.parameters:
        p.grad = None
    return torch.cat([g for g in found if g is not None])


def gate(trainer: Trainer, backend: str | None, length: int) -> float:
    """The error of the gradient of z; Refused beyond twice that of plain torch operations.

    The model of ``trainer`` is the small one; it is left with another z.
    """
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for z in trainer.parameters:
            z.copy_(1 + _NOISE * torch.randn(z.shape, generator=noise))
    problems = trainer.prompts(0, length)
    with t2k.backend("torch"):
        answers = trainer.sample(problems)
    # Answers of a random model are all wrong; both signs must be seen.
    gain = torch.ones(len(problems), 1, device=trainer.model.device)
    gain[::2] = -1
    with within(backend):
        own = z_gradient(trainer, answers, gain)
    with t2k.backend("torch"):
        plain = z_gradient(trainer, answers, gain)
        wide = Trainer(copy.deepcopy(trainer.model).float(), trainer.cfg)
        with torch.no_grad():
            for z, source in zip(wide.parameters, trainer.parameters, strict=True):
                z.copy_(source)
        want = z_gradient(wide, answers, gain)
    error, limit = relative_error(own, want), 2 * relative_error(plain, want) + GATE_FLOOR
    if not error <= limit:
        raise Refused(f"{backend or 'policy'}: error of dz {error:.2e}, allowed {limit:.2e}")
    return error


def within(backend: str | None) -> Any:
    return nullcontext() if backend is None else t2k.backend(backend)


def trainer_of(size: llama.Size, args: argparse.Namespace, targets: str, cfg: Config) -> Trainer:
    device = torch.device(args.device)
    positions = args.prompt + args.new_tokens + 2 * len(_PROBLEM)
    model, factors = llama.make_model(size, torch.bfloat16, device, positions)
    t2k.convert(model, targets, decomposition=factors, progress=False)
    del factors
    return Trainer(model, cfg)


def measure_step(
    trainer: Trainer, small: Trainer, args: argparse.Namespace, targets: str, backend: str | None
) -> list[dict[str, Any]]:
    """A row for each part and one for the whole step."""
    head: dict[str, Any] = {
        "targets": targets, "backend": backend or "policy", "rollout": args.rollout,
        "rows": args.rows, "new_tokens": args.new_tokens,
    }  # fmt: skip
    try:
        head["error"] = gate(small, backend, args.prompt)
    except Refused as refusal:
        return [{**head, "part": "step", "refused": str(refusal)}]
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        return [{**head, "part": "step", "absent": str(error)}]
    with within(backend):
        steps = [trainer.step(seed, args.prompt) for seed in range(args.steps + 1)][1:]
    rows = []
    for part in PARTS:
        seconds = statistics.median(meter.seconds[part] for meter, _ in steps)
        row = {**head, "part": part, "seconds": seconds}
        if args.device == "cuda":
            row["peak_mib"] = max(meter.peak[part] for meter, _ in steps) / 2**20
        rows.append(row)
    whole = {**head, "part": "step", "tokens": steps[-1][1]}
    whole["seconds"] = statistics.median(sum(meter.seconds.values()) for meter, _ in steps)
    if args.device == "cuda":
        whole["peak_mib"] = max(row["peak_mib"] for row in rows)
    return [*rows, whole]


def _format(row: dict[str, Any]) -> str:
    head = f"  {row['targets']:11}{row['backend']:8}{row['part']:11}"
    for word in ("refused", "absent"):
        if word in row:
            return f"{head}{word.upper()}: {row[word]}"
    memory = f"  peak {row['peak_mib']:8.0f} MiB" if "peak_mib" in row else ""
    return f"{head}{row['seconds']:9.3f} s{memory}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_step", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shared(parser, device=True)
    llama.add_size(parser)
    add = parser.add_argument
    add("--targets", choices=("all-linear", "mlp"), nargs="+", default=["mlp"])
    add("--rows", type=int, default=64, help="answers of a step (64)")
    add("--prompt", type=int, default=64, help="tokens of a prompt, or a few more (64)")
    add("--new-tokens", type=int, default=64, help="of each answer (64)")
    add("--rows-per-backward", type=int, default=8, help="at a time in the gradient pass (8)")
    add("--rollout", choices=("merged", "factorised"), default="merged")
    add("--steps", type=int, default=2, help="beside one that warms up (2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a gradient is wrong; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    size = llama.size_of(parser, args)
    counts = (args.rows, args.prompt, args.new_tokens, args.rows_per_backward, args.steps)
    if min(counts) < 1:
        parser.error("--rows, --prompt, --new-tokens, --rows-per-backward, --steps: at least 1")
    if size.vocabulary < len(build_tokenizer()):
        parser.error(f"--vocabulary must hold the tokenizer's {len(build_tokenizer())} letters")
    record = begin(parser, args)
    print(json.dumps(record, ensure_ascii=False, indent=1), flush=True)
    cfg = Config(
        steps=args.steps + 1, prompts=args.rows, max_new_tokens=args.new_tokens,
        rows_per_rollout=args.rows, rows_per_backward=args.rows_per_backward, rollout=args.rollout,
    )  # fmt: skip
    few = dataclasses.replace(cfg, prompts=4, rows_per_backward=3, max_new_tokens=8)
    rows: list[dict[str, Any]] = []
    backends = (None,) if args.device == "cpu" else ("triton", None)
    for targets in args.targets:
        trainer = trainer_of(size, args, targets, cfg)
        thin = dataclasses.replace(size, layers=min(size.layers, _GATE_LAYERS))
        small = trainer_of(thin, args, targets, few)
        for backend in backends:
            found = measure_step(trainer, small, args, targets, backend)
            print(*map(_format, found), sep="\n", flush=True)
            rows += found
        del trainer, small
        gc.collect()
    if args.json is not None:
        settings = {**vars(size), "rows_per_backward": args.rows_per_backward}
        write(args.json, {"schema": SCHEMA, "benchmark": "step", "environment": record,
                          "settings": settings, "rows": rows})  # fmt: skip
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
