"""The options of commands that have many: `t2 train`, `t2 adapt`, `t2 eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t2runtime.rewards import EXTRACTORS

TASK = "gsm8k, mbpp, add, story:animal, ..., a .jsonl file or a folder of them; category:a+b, " \
       "which of these tasks a question is of; NAME=TASK calls a task NAME"  # fmt: skip
#: Ways to search for a mixture.
SEARCHES = ("cem", "cma-es", "random", "gradient")


def training(parser: argparse.ArgumentParser) -> None:
    """Each field of the settings of `t2 train`. What is not given is not in the namespace, so that
    a recipe can fill it.
    """

    def option(name: str, text: str, **more: object) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **more)  # type: ignore[arg-type]

    def choice(name: str, text: str, *choices: str) -> None:
        option(name, text, choices=choices)

    choice("--objective", "by reward, or on the given answers", "reinforce", "next-token")
    option("--steps", "at most so many", type=int)
    option("--prompts", "prompts a step", type=int)
    option("--samples", "answers to each prompt", type=int)
    option("--max-new-tokens", "length of an answer (default: the task's)", type=int)
    option("--temperature", "of the samples", type=float)
    option("--wrong-reward", "of a wrong answer; a right one gets 1", type=float)
    choice("--baseline", "mean reward of a prompt's other samples", "leave-one-out", "none")
    option("--length-norm", "average over an answer's tokens", action="store_true")
    option("--kl", "weight of KL(expert || base)", type=float)
    choice("--kl-estimator", "over the vocabulary, or from the samples", "exact", "k3")
    choice("--optimiser", "AdamW or Adam", "adamw", "adam")
    option("--lr", "learning rate", type=float)
    choice("--schedule", "of the learning rate", "cosine", "constant")
    option("--warmup", "steps of linear warm-up", type=int)
    option("--weight-decay", "towards 0; the base is at z = 1", type=float)
    option("--clip", "largest norm of a gradient", type=float)
    choice("--rollout", "weights that answers are sampled from", "merged", "factorised")
    option("--recompute", "x·V once more in backward: less memory", action="store_true")
    option("--gradient-checkpointing", "blocks once more in backward", action="store_true")
    option("--rows-per-rollout", "answers generated at once", type=int)
    option("--rows-per-backward", "answers trained on at once", type=int)
    option("--validate-every", "steps", type=int)
    option("--validation-problems", "how many", type=int)
    option("--patience", "validations without a better one, or none", type=_count_or_none)
    option("--stop-at", "validation accuracy that is enough", type=float)
    option("--checkpoint-every", "steps", type=int)
    choice("--chat", "whether prompts go into the chat template", "auto", "on", "off")
    choice("--long-prompts", "problems that do not fit into the context", "skip", "error")
    option("--seed", "of prompts and samples", type=int)


def adapting(p: argparse.ArgumentParser) -> None:
    """Those of `t2 adapt` that say what is found and where it goes."""
    p.add_argument("--expert", action="append", default=[], metavar="FILE",
                   help="to mix, or a folder of them; may be given several times")  # fmt: skip
    p.add_argument("--out", required=True, help="folder of mixtures, or a file (.json); the file "
                   "of a router (.safetensors) or a record (.json)")  # fmt: skip
    p.add_argument("--name", help="of the mixture that a search finds (default: the task's)")
    p.add_argument("--method", choices=(*SEARCHES, "router", "record"), default="cem",
                   help="a search for a mixture (cem); a network from a question to weights, "
                   "trained on training splits; or a record of each expert's performance on "
                   "validation problems: these two take several --task")  # fmt: skip
    searching(p)
    p.add_argument("--steps", type=int, default=150, help="of router: steps of training (150)")
    p.add_argument("--problems", type=int, default=60, metavar="N",
                   help="of record: validation problems of each task (60)")  # fmt: skip
    p.add_argument("--limit", type=int, default=256, help="at most so many test problems (256)")
    p.add_argument("--rows", type=int, default=64, help="test problems generated at once (64)")
    p.add_argument("--max-new-tokens", type=int, help="default: what the task says")
    p.add_argument("--seed", type=int, default=0, help="of the search and of generated tasks")


def searching(p: argparse.ArgumentParser) -> None:
    """How a mixture is searched; `t2 eval --strategy few-shot` takes them, too."""
    p.add_argument("--per", choices=("expert", "layer"), default="expert",
                   help="one weight per expert, or per expert and matrix")  # fmt: skip
    p.add_argument("--shots", type=int, default=10, help="labelled problems to search with (10)")
    p.add_argument("--shots-from", choices=("validation", "train", "test"), default="validation",
                   help="their split; shots are never scored")  # fmt: skip
    p.add_argument("--budget", type=int, metavar="N", help="forwards at most of each "
                   "task's search: a shot under a member is 2 (default: what the generations "
                   "take)")  # fmt: skip
    p.add_argument("--population", type=int, default=32, help="members of a generation (32)")
    p.add_argument("--elites", type=int, default=6, help="of cem (6)")
    p.add_argument("--generations", type=int, default=10, help="without --budget (10)")
    p.add_argument("--rows-per-batch", type=int, metavar="N", help="default: all rows at once")
    p.add_argument("--low", type=float, default=0.0, help="smallest weight (0)")
    p.add_argument("--high", type=float, default=1.0, help="largest weight (1)")
    p.add_argument("--l1", type=float, default=0.0, help="of gradient: draws weights to 0")
    p.add_argument("--l2", type=float, default=0.0, help="of gradient: draws weights to 0")


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `searching` added, as `adapt.search` takes it; without the shots."""
    names = ("per", "budget", "population", "elites", "generations", "rows_per_batch", "low",
             "high", "l1", "l2")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def task_data(args: argparse.Namespace) -> dict[str, Any]:
    """What `tasks` added about data, as `source` and `sources` take it."""
    bad = "skip" if args.skip_bad_lines else "error"
    small = args.model == "small"
    return {"data": args.data, "extract": args.extract, "on_bad_lines": bad, "small": small}


def parse_expert(text: str) -> tuple[Path, float]:
    """FILE or FILE=WEIGHT.

    >>> parse_expert("math.safetensors=0.7")
    (PosixPath('math.safetensors'), 0.7)
    """
    path, sign, weight = text.rpartition("=")
    if not sign:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ValueError(
            f"--expert must be FILE or FILE=WEIGHT with a number, got {text!r}"
        ) from None


def expert_files(given: list[str], *, weighted: bool = True) -> dict[str, tuple[Path, float]]:
    """{name: (file, weight)}: experts are called like their files; a folder stands for all in it
    that are called *.safetensors. `weighted`: whether FILE=WEIGHT is read as such.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in given:
        path, weight = parse_expert(text) if weighted else (Path(text), 1.0)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"--expert: the folder {path} holds no *.safetensors")
        for file in files:
            if file.stem in found:
                raise ValueError(f"--expert: two files are called {file.stem}; rename one")
            found[file.stem] = (file, weight)
    return found


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """ValueError for a count below 1; None is one that was not given."""
    for name in names:
        given = getattr(args, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {given}")


def dispatching(p: argparse.ArgumentParser) -> None:
    """Of commands that answer in two passes."""
    p.add_argument("--classifier", metavar="FILE", help="expert under which pass 1 runs")
    p.add_argument("--base-answers", action="append", default=[], metavar="CATEGORY",
                   help="pass 1 may name it, and no expert is wanted; may be given several "
                   "times")  # fmt: skip


def describing(p: argparse.ArgumentParser) -> None:
    """Of commands that ask category questions."""
    p.add_argument("--expert", action="append", default=[], metavar="FILE", help="of category:a+b: "
                   "the experts that pass 1 will choose from, or a folder of them; the questions "
                   "show their descriptions")  # fmt: skip


def rows(p: argparse.ArgumentParser) -> None:
    """Of commands that answer a batch with a mixture for each request."""
    p.add_argument("--row-order", choices=("batch", "flat"), help="of models that flatten their "
                   "batch inside: what the rows are, one a request, or all tokens in order "
                   "(default: what is known of the model)")  # fmt: skip


def tasks(p: argparse.ArgumentParser) -> None:
    """Which tasks, with their data."""
    p.add_argument("--task", action="append", required=True, help=f"{TASK}; several may be given")
    p.add_argument("--data", action="append", default=[], metavar="PATH", help="file or folder "
                   "of the task's data; TASK=PATH for one of several")  # fmt: skip
    p.add_argument("--extract", choices=EXTRACTORS, help="read answers in another way")
    p.add_argument("--skip-bad-lines", action="store_true", help="leave out broken data lines")


def evaluating(p: argparse.ArgumentParser) -> None:
    """Those of `t2 eval`."""
    p.add_argument("--expert", action="append", default=[], metavar="FILE", help="or a folder of "
                   "PEFT's; with --strategy an expert, or a folder of them")  # fmt: skip
    p.add_argument("--strategy", nargs="+", default=[], metavar="S",
                   help="compare these in one table, through the engine: prompt, classifier, "
                   "mixture, few-shot, router, record, none (the base), or an expert's name; what "
                   "is not given as a file is found first and its cost reported")  # fmt: skip
    dispatching(p)
    p.add_argument("--mixtures", metavar="DIR", help="of few-shot: what `t2 adapt` found")
    p.add_argument("--router", metavar="FILE", help="what `t2 adapt --method router` wrote")
    p.add_argument("--record", metavar="FILE", help="what `t2 adapt --method record` wrote")
    p.add_argument("--method", nargs="+", choices=SEARCHES, default=["cem"], help="of few-shot "
                   "without --mixtures (cem); several make a row each")  # fmt: skip
    searching(p)
    p.add_argument("--split", choices=("test", "validation"), default="test")
    p.add_argument("--limit", type=int, default=256, help="at most so many problems of a task")
    p.add_argument("--rows", type=int, default=64, help="problems generated at once")
    p.add_argument("--max-new-tokens", type=int, help="default: what the task says")
    p.add_argument("--seed", type=int, default=0, help="of generated tasks, shots and searches")


def _count_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)
