"""`t2 train MODEL --task T --out EXPERT`: one expert, or a LoRA, DoRA or IA3 beside it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k
from t2runtime.adapt.asking import classifies
from t2runtime.adapt.classifier import CategorySource
from t2runtime.card import write_card
from t2runtime.evaluate import Score, evaluate
from t2runtime.loading import load
from t2runtime.options import expert_files, task_data
from t2runtime.sources import source
from t2runtime.tasks import SPLITS
from t2runtime.train import RECIPES, SVF, Adapter, Config, Interrupted, Peft, Source, train
from t2runtime.train.folder import PICTURE
from t2runtime.train.lengths import fitting
from t2runtime.train.loop import one_process, resolved
from t2runtime.train.plots import draw_run

TEST_PROBLEMS = 256


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure base and expert on the test split, save the expert with its facts."""
    one_process()
    out, cfg = Path(args.out), settings(args)
    _check_out(out, args.method)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite loses it: give one of them")
    problems = source(args.task, **task_data(args), descriptions=descriptions(args))
    described = description_of(args, problems)
    # Asked for now, so that a file without such lines is refused before anything is trained.
    for split in SPLITS:
        problems(1, split, cfg.seed)
    from_data = data_facts(problems)
    model, tokenizer = load(args.model, args.dtype, args.device)
    cfg = resolved(cfg, problems, tokenizer)
    problems = fitting(problems, model, tokenizer, cfg)
    test = problems(TEST_PROBLEMS, "test", cfg.seed)
    adapter = make_adapter(model, args, cfg.seed)
    folder = Path(args.run) if args.run else _run_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    where = {"expert": str(out), "run": str(folder), "method": args.method}
    facts = {
        "task": args.task,
        "data": args.data,
        **from_data,
        "method": args.method,
        "reward": f"1 if right, {cfg.wrong_reward:g} if wrong",
        "options": options_of(args, model),
        "config": dataclasses.asdict(cfg),
        "torch": torch.__version__,
    }
    given = {**facts, "started_in": os.getcwd()}
    del given["config"]  # which is there already

    def save(trained: Any, **more: Any) -> None:
        trained.description = described
        trained.metadata |= {**facts, **more}
        trained.save(out)
        if isinstance(trained, t2k.Expert):
            write_card(trained, out)

    try:
        trained = train(
            model, tokenizer, problems, cfg, folder, _progress, adapter=adapter,
            resume=args.resume, overwrite=args.overwrite, facts=given,
        )  # fmt: skip
    except Interrupted as stop:
        save(stop.expert, interrupted_at_step=stop.step + 1)
        return {
            **where, "interrupted_at_step": stop.step + 1, "validated": stop.validated,
            "exit_code": 130,
        }  # fmt: skip
    # Before the test, so that nothing which happens there can lose it.
    save(trained)
    base, reached = _measure(model, tokenizer, problems, test, cfg, adapter, trained)
    results = {
        name: {"accuracy": score.accuracy, "interval": score.interval}
        for name, score in (("base", base), ("trained", reached))
    }
    save(trained, accuracy=reached.accuracy, test={**results, "problems": base.total})
    picture = folder / PICTURE
    drawn = draw_run(folder / "metrics.jsonl", picture)
    return {
        **where,
        **results,
        "validation": {k: trained.metadata[k] for k in ("validation", "base_validation")},
        "problems": base.total,
        "values": sum(p.numel() for p in adapter.parameters().values()),
        "plot": str(picture) if drawn else None,
    }


def settings(args: argparse.Namespace) -> Config:
    """The recipe asked for, with what was given in its place. The small model has its own."""
    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    recipe = args.recipe or ("small" if args.model == "small" else "paper")
    if given.get("objective") == "next-token":
        # Nothing is sampled: a recipe's samples must not ask for a baseline's sake.
        given = {"samples": 1, "baseline": "none", **given}
    return RECIPES[recipe](**given)


def options_of(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What was asked for besides the settings, by the options' names, with nothing left open."""
    asked = ["model", "task", "data", "extract", "skip_bad_lines", "method", "targets", "layers",
             "expert"]  # fmt: skip
    asked += ["rank", "parametrisation", "factors"] if args.method == "svf" else ["lora_rank"]
    dtype = str(model.dtype).removeprefix("torch.")
    given = {name: getattr(args, name) for name in asked}
    return {**given, "dtype": dtype, "device": model.device.type}


def descriptions(args: argparse.Namespace) -> dict[str, str] | None:
    """{expert: its description} of those that `--expert` names, None without the option.
    Classification experts are left out: they answer nothing.
    """
    if not args.expert:
        return None
    files = {name: path for name, (path, _) in expert_files(args.expert).items()}
    experts = {name: t2k.Expert.load(path) for name, path in files.items()}
    return {name: one.description for name, one in experts.items() if not classifies(one)}


def description_of(args: argparse.Namespace, problems: Source) -> str:
    """What `--description` says, else what the task is called; one line, never a path."""
    if args.description is not None:
        line = " ".join(args.description.split())
        if not line:
            raise ValueError("--description must say something, got an empty text")
        return line
    if isinstance(problems, CategorySource):
        return f"names the category of a question: {', '.join(problems.categories.all_names)}"
    return problems.name


def data_facts(problems: Source) -> dict[str, Any]:
    """Which data it was, whatever its file is called now, and how many lines of it are missing."""
    if not hasattr(problems, "skipped"):
        return {}
    own = getattr(problems, "identity", {})
    digests = {key: value for key, value in own.items() if key.split()[-1] == "data"}
    one = digests["data"] if set(digests) == {"data"} else digests
    return {"data_digest": one, "skipped_lines": problems.skipped}


def make_adapter(model: Any, args: argparse.Namespace, seed: int) -> Adapter:
    """What `--method` names, on the layers that `--targets` and `--layers` name."""
    wanted = targets(args.targets)
    if args.layers is not None:
        wanted = in_blocks(list(t2k.select(model, wanted)[0]), args.layers)
    if args.method == "svf":
        t2k.convert(
            model, targets=wanted, rank=args.rank, decomposition=args.factors,
            parametrisation=args.parametrisation,
        )  # fmt: skip
        return SVF(model)
    way = None if args.parametrisation == "direct" else args.parametrisation
    given = {"--rank": args.rank, "--factors": args.factors, "--parametrisation": way}
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option} belongs to --method svf, got --method {args.method}")
    return Peft(model, args.method, wanted, rank=args.lora_rank, seed=seed)


def in_blocks(names: Sequence[str], blocks: str) -> list[str]:
    """The layers that lie in the blocks, counted from 0, that `blocks` names.

    >>> in_blocks(["h.0.up", "h.1.up", "h.2.up", "h.3.up"], "0,2-3")
    ['h.0.up', 'h.2.up', 'h.3.up']
    """
    wanted: set[int] = set()
    for part in blocks.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not found:
            raise ValueError(f"--layers must be like 0-3,8, got {blocks!r}")
        wanted |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    chosen = [
        name for name in names if (n := re.search(r"(?:^|\.)(\d+)\.", name)) and int(n[1]) in wanted
    ]
    if not chosen:
        raise ValueError(f"--layers {blocks} names no block of this model")
    return chosen


def targets(text: str) -> str | list[str]:
    """`a,b` names several layers; anything else goes through as it is.

    >>> targets("q_proj,v_proj")
    ['q_proj', 'v_proj']
    """
    return text.split(",") if "," in text and not set(text) & set("([{|\\") else text


def _check_out(out: Path, method: str) -> None:
    if (out.suffix == ".safetensors") != (method == "svf"):
        kind = "end in .safetensors" if method == "svf" else "be a folder, which PEFT reads,"
        raise ValueError(f"--out must {kind} for --method {method}, got {str(out)!r}")


def _run_folder(out: Path) -> Path:
    return out.with_suffix("") if out.suffix == ".safetensors" else out.with_name(f"{out.name}.run")


def _measure(
    model: Any, tokenizer: Any, problems: Source, test: Sequence[Any], cfg: Config,
    adapter: Adapter, trained: Any,
) -> tuple[Score, Score]:  # fmt: skip
    """Base and trained weights on the test problems."""
    scores = []
    for name, weights in (("base", adapter.base()), ("trained", adapter.using(trained))):
        with weights:
            scores.append(
                evaluate(
                    model,
                    tokenizer,
                    problems,
                    test,
                    cfg.max_new_tokens or 1,
                    rows=cfg.rows_per_rollout,
                    chat=cfg.chat,
                    label=f"{name}, test",
                )
            )
    return scores[0], scores[1]


def show(result: dict[str, Any]) -> str:
    """Base against expert."""
    if "interrupted_at_step" in result:
        which = "the best by validation so far" if result["validated"] else "not validated yet"
        return (
            f"interrupted at step {result['interrupted_at_step']}; the expert in "
            f"{result['expert']} is {which}, metrics in {result['run']}; --resume goes on from "
            "the last checkpoint"
        )
    lines = [f"accuracy on {result['problems']} distinct held-out problems, with 95 % intervals:"]
    for name in ("base", "trained"):
        low, high = result[name]["interval"]
        lines.append(
            f"  {name:8s}{100 * result[name]['accuracy']:6.1f} %"
            f"  [{100 * low:.1f}, {100 * high:.1f}]"
        )
    lines.append(f"{result['values']:,} trained values ({result['method']})")
    return "\n".join([*lines, f"expert in {result['expert']}, metrics in {result['run']}"])


def _progress(line: dict[str, Any]) -> None:
    """A line per validation, where no progress bar is shown."""
    if "validation" in line and not sys.stderr.isatty():
        print(
            f"step {line['step']:4d}  loss {line['loss']:.3f}  "
            f"validation {line['validation']:.3f}  KL {line['kl']:.3f}",
            file=sys.stderr,
        )
