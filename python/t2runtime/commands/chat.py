"""`t2 chat MODEL --expert FILE ... [--strategy S]`: talk in the terminal; every turn is dispatched
anew and shows which experts answered it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from t2runtime.commands.generate import engine, who
from t2runtime.engine import Output
from t2runtime.prompts import uses_template

HELP = "an empty line or /quit ends, /new forgets what was said, /experts lists the experts"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read turns from the standard input until it ends; the transcript."""
    t2, strategy = engine(args)
    remembers = uses_template(t2.tokenizer, t2.chat)
    quiet = args.json
    if not quiet:
        experts = ", ".join(t2.bank.names) or "none"
        print(f"experts: {experts}; strategy: {args.strategy}\n{HELP}")
        if not remembers:
            print("the tokenizer has no chat template: every line is a prompt of its own")
    said: list[dict[str, str]] = []
    turns: list[dict[str, Any]] = []
    while (line := _line(quiet)) not in ("", "/quit"):
        if line == "/new":
            said.clear()
        elif line == "/experts" and not quiet:
            print("\n".join(f"  {n}: {t2.bank[n].description or '-'}" for n in t2.bank.names))
        elif line.startswith("/"):
            if not quiet:
                print(HELP)
        else:
            message = {"role": "user", "content": line}
            output = t2.generate(
                [[*said, message] if remembers else line], strategy,
                max_new_tokens=args.max_new_tokens, stop=args.stop, task=args.task,
                stream=None if quiet else _say,
            )[0]  # fmt: skip
            turns.append({"prompt": line, **dataclasses.asdict(output)})
            if not quiet:
                print(f"\n  [{_facts(turns[-1], output)}]")
            if remembers and output.error is None:
                said += [message, {"role": "assistant", "content": output.text}]
    return {"turns": turns}


def _line(quiet: bool) -> str:
    """The next turn; "" at the end of the input."""
    try:
        return input("" if quiet or not sys.stdin.isatty() else "> ").strip()
    except EOFError:
        return ""


def _say(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _facts(row: dict[str, Any], output: Output) -> str:
    if output.error is not None:
        return f"error: {output.error}; /new forgets what was said"
    return f"{who(row)}; {output.pass1_seconds:.2f} s + {output.pass2_seconds:.2f} s"


def show(result: dict[str, Any]) -> str:
    """How many turns there were; they have been shown already."""
    count = len(result["turns"])
    return f"{count} turn" if count == 1 else f"{count} turns"
