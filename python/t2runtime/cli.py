"""The command line: parsing only. Each command lives in `t2runtime.commands` and returns a plain
dictionary.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from t2runtime import options
from t2runtime.parser import Parser
from t2runtime.rewards import EXTRACTORS

_CHAT = "whether prompts go into the chat template (default: where there is one)"
_TARGETS = "all-linear, mlp, attention, names with commas, or a regex"
#: The library speaks to programs; here the same thing is an option.
_SPOKEN = (
    (r"pass allow_mismatch=True", "give --allow-mismatch"),
    (r"overwrite=True", "--overwrite"),
    (r"on_bad_lines='skip'", "--skip-bad-lines"),
    (r"\bchat='(\w+)'", r"--chat \1"),
    (r"\bextract=(?=[\w'])", "--extract "),
    (r"(?<=leave out )extract\b", "--extract"),
    (r"\bdata=(?=[\w'])", "--data "),
    (r"needs task=,", "needs --task,"),
    (r"pass mixtures=folder", "give --mixtures FOLDER"),
    (r"(?<![-\w'])max_new_tokens\b", "--max-new-tokens"),
    (r"\brow_order='(\w+)'", r"--row-order \1"),
    (r",? or pass slot= with one entry per token", ""),
)
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)


def _add(commands: Any, name: str, text: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="'small' (comes with the package), a local folder, or a hub name"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--targets", default="all-linear", help=_TARGETS)
    parser.add_argument("--factors", metavar="DIR", help="use the folder that `t2 decompose` made")


def _conversions(commands: Any) -> None:
    text = "an expert of the paper authors' code to ours, or ours to another model of its shapes"
    p = _add(commands, "convert", text)
    p.add_argument("file", help="policy_params.pt or learnable_params.pt; or our .safetensors")
    p.add_argument(
        "--model", required=True,
        help="'small' or a local folder: the model of the authors' file, or the one to transfer to",
    )  # fmt: skip
    p.add_argument("--out", required=True, help="expert file to write (.safetensors)")
    p.add_argument(
        "--order", choices=("sigma", "shuffled"),
        help="of a transfer: k-th z to k-th singular value (default), or to a random one",
    )  # fmt: skip
    p.add_argument("--seed", type=int, help="of --order shuffled (default 0)")
    p.add_argument("--max-mult", type=float, help="max_mult of its training (default 1)")
    p.add_argument(
        "--mask",
        choices=("bf16-sigmoid", "sigmoid", "none"),
        help="how a parameter becomes a mask (default: as their code does for the layout)",
    )
    p.add_argument("--description", default="", help="one line for the card")
    p.add_argument("--factors", metavar="DIR", help="use the folder that `t2 decompose` made")
    p.add_argument("--device", default="auto", help="where to decompose: auto, cpu, cuda")

    p = _add(commands, "export", "a merged checkpoint, a LoRA adapter, or experts as one expert")
    p.add_argument("model", help="'small', or a local folder with safetensors weights")
    p.add_argument("--experts", nargs="+", required=True, metavar="FILE")
    p.add_argument("--mix", nargs="+", type=float, help="one weight per expert (default: 1)")
    p.add_argument(
        "--form",
        choices=("deviation", "paper", "paper-normalised", "authors"),
        default="deviation",
        help="how experts are mixed",
    )
    p.add_argument("--out", required=True, help="new folder; with --as-expert a file")
    p.add_argument("--lora-rank", type=int, metavar="K", help="write the best LoRA of this rank")
    p.add_argument("--max-error", type=float, help="refuse a LoRA that misses more of W' - W")
    p.add_argument("--as-expert", action="store_true", help="write one expert file")
    p.add_argument("--dtype", default="auto", help="of a merged checkpoint; auto: as it is")
    p.add_argument("--factors", metavar="DIR", help="use the folder that `t2 decompose` made")
    p.add_argument("--device", default="auto", help="where to decompose: auto, cpu, cuda")
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take experts made for another base weight"
    )


def _train(commands: Any) -> None:
    p = _add(commands, "train", "train an expert, or LoRA, DoRA, IA3 beside it")
    _model_options(p)
    p.add_argument("--task", required=True, help=options.TASK)
    p.add_argument("--data", metavar="PATH", help="file or folder of the task's data")
    p.add_argument("--extract", choices=EXTRACTORS, help="read answers in another way")
    p.add_argument("--skip-bad-lines", action="store_true", help="leave out broken data lines")
    p.add_argument("--out", required=True, help="expert to write (.safetensors; else a folder)")
    options.describing(p)
    p.add_argument("--description", metavar="TEXT", help="of the expert, in a few words: what pass "
                   "1 is told of it (default: the task's name)")  # fmt: skip
    p.add_argument("--method", choices=("svf", "lora", "dora", "ia3"), default="svf")
    p.add_argument("--lora-rank", type=int, default=16, help="of lora and dora")
    p.add_argument("--layers", metavar="0-3,8", help="train in these blocks only")
    p.add_argument("--rank", type=int, help="svf: train only this many components")
    p.add_argument(
        "--parametrisation", choices=("direct", "sigmoid-normalised"), default="direct",
        help="svf: what z is trained as",
    )  # fmt: skip
    p.add_argument("--recipe", choices=("paper", "small"), help="defaults of all that follows")
    options.training(p)
    p.add_argument("--run", help="folder for settings, metrics, checkpoint (default: beside --out)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run")
    p.add_argument(
        "--overwrite", action="store_true", help="start anew where --run holds an unfinished run"
    )


def _adapt(commands: Any) -> None:
    p = _add(
        commands,
        "adapt",
        "find a mixture of experts for a task from a few labelled problems, or a router",
    )
    _model_options(p)
    options.tasks(p)
    p.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help=_CHAT)
    options.adapting(p)
    options.rows(p)
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take experts made for another base weight"
    )


def _eval(commands: Any) -> None:
    p = _add(commands, "eval", "greedy accuracy of the base, of experts and of strategies on tasks")
    _model_options(p)
    options.tasks(p)
    p.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help=_CHAT)
    options.evaluating(p)
    options.rows(p)
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take experts made for another base weight"
    )


def _quality(commands: Any) -> None:
    text = "what 8-bit factors cost beside bfloat16: perplexity, KL, greedy drift"
    p = _add(commands, "quality", text)
    _model_options(p)
    p.add_argument("--kinds", nargs="+", metavar="KIND", help="int8, fp8 (default: both)")
    p.add_argument("--text", metavar="FILE", help="a text file; without it and --task, texts that "
                   "the model itself samples (small: answers of its tasks)")  # fmt: skip
    p.add_argument("--task", action="append", metavar="TASK", help="score answers of this task's "
                   "test problems; several may be given")  # fmt: skip
    p.add_argument("--data", action="append", default=[], metavar="PATH", help="file or folder "
                   "of the task's data; TASK=PATH for one of several")  # fmt: skip
    p.add_argument("--extract", choices=EXTRACTORS, help="read answers in another way")
    p.add_argument("--skip-bad-lines", action="store_true", help="leave out broken data lines")
    p.add_argument("--expert", metavar="FILE", help="compare under this expert")
    p.add_argument("--limit", type=int, default=128, help="at most so many texts")
    p.add_argument("--tokens", type=int, default=256, help="of a text, at most")
    p.add_argument("--max-new-tokens", type=int, default=64, help="of a greedy continuation")
    p.add_argument("--rows", type=int, default=16, help="texts at once")
    p.add_argument("--seed", type=int, default=0, help="of sampled texts")
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take an expert made for another base weight"
    )


def _classify(commands: Any) -> None:
    p = _add(commands, "classify", "what pass 1 confuses, and whether its probabilities hold")
    _model_options(p)
    p.add_argument("--task", required=True, help="category, category:a+b, or a file of labels")
    p.add_argument("--data", metavar="PATH", help="file or folder of the task's data")
    options.describing(p)
    p.add_argument("--classifier", action="append", default=[], metavar="FILE",
                   help="expert under which pass 1 runs, asked as it was trained to be; the base "
                   "is always reported")  # fmt: skip
    p.add_argument("--split", choices=("test", "validation"), default="test")
    p.add_argument("--limit", type=int, default=600, help="at most so many questions")
    p.add_argument("--rows", type=int, default=64, help="questions asked at once")
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take experts made for another base weight"
    )
    p.add_argument("--seed", type=int, default=0, help="of generated tasks")


def _answering(commands: Any) -> None:
    p = _add(commands, "generate", "answer prompts under a mixture of experts, or in two passes")
    _answer_options(p)
    p.add_argument("--prompt", action="append", default=[], help="may be given several times")
    p.add_argument("--rows", type=int, metavar="N", help="prompts at once (default: all)")

    p = _add(commands, "chat", "talk in the terminal; shows which experts answered each turn")
    _answer_options(p)


def _answer_options(p: argparse.ArgumentParser) -> None:
    _model_options(p)
    p.add_argument("--expert", action="append", default=[], metavar="FILE[=WEIGHT]",
                   help="or a folder of them; may be given several times")  # fmt: skip
    p.add_argument(
        "--strategy",
        choices=("fixed", "prompt", "classifier", "mixture", "few-shot", "router", "record"),
        default="fixed",
        help="fixed: the experts at their weights (default); else pass 1 names one expert per "
        "prompt, on the base or under --classifier, or its probabilities are the weights; or the "
        "mixture that was found for --task; or what --router or --record says of the prompt",
    )
    options.dispatching(p)
    p.add_argument("--mixtures", metavar="DIR", help="what `t2 adapt` found, one file a task")
    p.add_argument("--task", help="the task whose mixture is used, as `t2 adapt` was given it, or "
                   "as --name called it")  # fmt: skip
    p.add_argument("--router", metavar="FILE", help="what `t2 adapt --method router` wrote")
    p.add_argument("--record", metavar="FILE", help="what `t2 adapt --method record` wrote")
    p.add_argument("--max-new-tokens", type=int, help="default: 256, or what the context leaves")
    p.add_argument("--chat", choices=("auto", "on", "off"), default="auto", help=_CHAT)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer")
    options.rows(p)
    p.add_argument(
        "--allow-mismatch", action="store_true", help="take experts made for another base weight"
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="t2", description="Self-adaptive language models by singular-value fine-tuning."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    _add(commands, "env", "versions, processors, backends and why one is unavailable")

    p = _add(
        commands,
        "decompose",
        "decompose a safetensors checkpoint into a factor store; resumes after a kill",
    )
    p.add_argument("checkpoint", help="a safetensors file or a folder of them")
    p.add_argument("--out", required=True, help="folder of the factor store")
    p.add_argument("--targets", default="all-linear", help=_TARGETS)
    p.add_argument("--rank", type=int, help="keep this many components (delta form)")
    p.add_argument("--device", default="auto", help="where to decompose: auto, cpu, cuda")
    p.add_argument("--overwrite", action="store_true", help="start anew instead of going on")
    p.add_argument("--float64", action="store_true", help="accurate to 1e-7 instead of 5e-6")
    p.add_argument(
        "--method", choices=("auto", "gram", "svd"), default="auto",
        help="svd: the library's; gram: eigenvectors of WᵀW and a QR in fp64; auto: gram on a GPU",
    )  # fmt: skip
    p.add_argument(
        "--with-experts", action="store_true",
        help="also matrices of mixture-of-experts blocks that the model stacks into one tensor",
    )  # fmt: skip

    _train(commands)
    _adapt(commands)
    _eval(commands)
    _quality(commands)

    _classify(commands)
    _answering(commands)

    p = _add(commands, "inspect", "what expert files or a factor store hold")
    p.add_argument("file", nargs="+", help="expert files (several are compared), or a store")
    p.add_argument("--plot", metavar="FILE.png", help="draw z per layer and its distribution")

    _conversions(commands)

    p = _add(commands, "plan", "memory and arithmetic of training, from config.json alone")
    p.add_argument("model", help="'small', or a folder with at least a config.json")
    p.add_argument("--targets", default="all-linear", help=_TARGETS)
    p.add_argument("--rank", type=int, help="train only this many components")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--prompts", type=int, default=256, help="prompts a step")
    p.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    p.add_argument("--rows-per-rollout", type=int, default=64, help="answers generated at once")
    p.add_argument(
        "--rows-per-backward", "--batch", type=int, default=16, help="answers trained on at once"
    )
    p.add_argument("--tokens", type=int, default=512, help="of a row, prompt and answer")
    p.add_argument("--max-new-tokens", type=int, help="how many of them are the answer (half)")
    p.add_argument("--objective", choices=("reinforce", "next-token"), default="reinforce")
    p.add_argument("--kl-estimator", choices=("exact", "k3", "none"), default="exact")
    p.add_argument("--tflops", type=float, help="a measured rate, to turn arithmetic into time")

    p = _add(commands, "bench", "a quick benchmark of one layer against plain torch")
    p.add_argument("--device", default="auto")
    p.add_argument("--size", type=int, default=2048, help="in and out features")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))

    p = _add(commands, "demo", "train experts, answer in two passes, measure gains and costs")
    p.add_argument("--model", help="serve this causal model instead of the small one")
    p.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="FILE",
        help="with --model; default: random",
    )
    options.rows(p)
    p.add_argument("--out", default="out/demo", help="folder for the plot and the results")
    p.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if it failed, 2 for a mistake of the user."""
    args = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"t2runtime.commands.{args.command}")
        result: dict[str, Any] = command.run(args)
        print(json.dumps(result, indent=1) if args.json else command.show(result))
        return int(result.get("exit_code", 0))
    except KeyboardInterrupt:
        print("t2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (*USER_ERRORS, RuntimeError) as error:
        if os.environ.get("T2_DEBUG"):
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        for pattern, option in _SPOKEN:
            text = re.sub(pattern, option, text)
        print(f"t2 {args.command}: error: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, USER_ERRORS) else 1
