"""An ArgumentParser that answers typos with the nearest known word, in one line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn


class _Store(argparse.Action):
    """Stores a value, as argparse's own; refuses a second name or file, since two were meant and
    one would be lost. A number or a choice that is given again is corrected, as in any program.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        """Put the value where argparse looks for it."""
        seen = parser.seen if isinstance(parser, Parser) else {}
        text = option is not None and self.type is None and self.choices is None
        if text and self.dest in seen:
            parser.error(
                f"argument {option} takes one value, it was given {seen[self.dest]!r} and "
                f"{values!r}"
            )
        seen[self.dest] = values
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse with suggestions; exit code 2 and a single line for every mistake."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.seen: dict[str, Any] = {}  # what the options of this call were given
        for name in (None, "store"):
            self.register("action", name, _Store)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, keeping the words given for `error`."""
        self.seen.clear()
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and what was probably meant, and exit."""
        pairs = [*self._wrong_choices(message), *self._unknown_options()]
        hints = [
            near
            for word, known in pairs
            for near in difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        ]
        advice = f"Did you mean {hints[0]}?" if hints else f"Try '{self.prog} --help'."
        self.exit(2, f"{self.prog}: error: {message}. {advice}\n")

    def _wrong_choices(self, message: str) -> Iterator[tuple[str, list[str]]]:
        """The word that argparse refused, with the words it would have taken."""
        for action in self._actions:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            if message.startswith(f"argument {name}: invalid choice"):
                yield message.split("'")[1], [str(choice) for choice in action.choices or ()]

    def _unknown_options(self) -> Iterator[tuple[str, list[str]]]:
        """Options given that neither this parser nor the subcommand given knows."""
        parsers = [self]
        for action in self._actions:
            if isinstance(action.choices, dict):
                parsers += [action.choices[word] for word in self._given if word in action.choices]
        known = [name for parser in parsers for name in parser._option_string_actions]
        for word in self._given:
            option = word.split("=")[0]
            if option.startswith("--") and option not in known:
                yield option, known
