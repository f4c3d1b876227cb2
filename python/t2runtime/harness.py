"""The lm-evaluation-harness on two passes: importing this module registers the model "t2-two-pass".

    import lm_eval, t2runtime.harness

    lm_eval.simple_evaluate(
        model="t2-two-pass",
        model_args="pretrained=small,experts=experts/,strategy=prompt",
        tasks=["arc_easy"],
    )

or from a shell, `python -m t2runtime.harness run --model t2-two-pass --model_args ... --tasks T`,
which is lm-eval's own command line. Every request is dispatched on its own: pass 1 looks at its
context, and the answer is generated, or the continuation scored, under the mixture it calls for.

For one expert, lm-eval's own model does: `HFLM(pretrained=model)` of a converted model, evaluated
inside `bank.use("math")`. Needs lm-eval 0.4: pip install 't2kernels[eval]'.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2runtime.adapt.weights import Mixture, routing
from t2runtime.engine import STRATEGIES, Output, Transformer2
from t2runtime.generation import forward_parameters
from t2runtime.prompts import context_length, end_tokens, pad_left, pad_token, prompt_ids

logger = logging.getLogger(__name__)

NAME = "t2-two-pass"
#: ((context, continuation), ids of the context, ids of the continuation), as lm-eval has it.
_Pair = tuple[Any, list[int], list[int]]


class TwoPass:
    """What lm-eval asks of a model, answered by `Transformer2`; `register` makes the class of it.

    Args (model_args):
        pretrained, experts, classifier, mixtures, router, record, dtype, device, targets, factors,
            allow_mismatch: as `Transformer2.from_pretrained` takes them.
        strategy, task: as `Transformer2.generate` takes them; an expert's name, or None or "none"
            for the base.
        engine: a Transformer2 in place of all of these but the strategy.
        batch_size: requests at once. max_gen_toks: new tokens where a task does not say.

    An empty context gives pass 1 nothing to look at: the base answers. Prompts are given as lm-eval
    writes them; its chat templates are refused. Answers are greedy.
    """

    cache_hook: Any  # of lm-eval's base class; said here for the type checker

    def __init__(
        self,
        pretrained: str = "small",
        experts: str | None = None,
        strategy: str | Mapping[str, float] | None = "prompt",
        *,
        task: str | None = None,
        engine: Transformer2 | None = None,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        **more: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        if engine is None:
            engine = Transformer2.from_pretrained(pretrained, experts, chat="off", **more)
        elif more:
            raise ValueError(f"engine= is loaded already, got {', '.join(more)} besides")
        if strategy == "none" and "none" not in engine.bank:  # as a command line says it
            strategy = None
        self.t2, self.strategy, self.task = engine, strategy, task
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        self._device = engine.model.device
        # Raises, too, for what the engine cannot do.
        looks = isinstance(strategy, str) and strategy in STRATEGIES and strategy != "few-shot"
        (shown,) = engine.dispatch(["."], strategy, task=task)
        self._blank = Output("", None) if looks else shown

    # -- tokens ----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.t2.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end an answer; the padding where none does."""
        return next(iter(end_tokens(self.t2.model, self.tokenizer)), pad_token(self.tokenizer))

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **more: Any
    ) -> list[int]:
        """Ids of a text; by default as the engine reads prompts."""
        if add_special_tokens is None:
            return prompt_ids(self.tokenizer, string, "off")
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return list(ids["input_ids"])

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Refused: pass 1 would look at the template's words and not at the question."""
        raise NotImplementedError(
            f"{NAME} takes prompts without a chat template: leave out apply_chat_template"
        )

    # -- what lm-eval asks for -------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Both passes over the (context, settings) of each request, greedily. A request that cannot
        be answered gives "", and a warning says how many and why.
        """
        settings = [self._settings(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        errors: list[str] = []
        for until in dict.fromkeys(stop for stop, _ in settings):
            places = [place for place, (stop, _) in enumerate(settings) if stop == until]
            for some in _parts(places, self.batch_size):
                said = self._dispatch([requests[place].args[0] for place in some])
                sound = [(p, out.mixture) for p, out in zip(some, said) if out.error is None]
                asked = [requests[place].args[0] for place, _ in sound]
                most = [self._room(text, settings[p][1]) for text, (p, _) in zip(asked, sound)]
                outputs = self.t2.generate(
                    asked, [mixture for _, mixture in sound], max_new_tokens=most, stop=until
                )
                for (place, _), output in zip(sound, outputs, strict=True):
                    texts[place] = output.text
                errors += [out.error for out in (*said, *outputs) if out.error is not None]
        if errors:
            logger.warning("%d of %d requests have no answer and give '': %s",
                           len(errors), len(requests), errors[0])  # fmt: skip
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], **more: Any
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context; its mixture), whether it is the greedy one) of each pair;
        equal contexts are looked at once. ValueError where pass 1 cannot look at one.
        """
        mixtures: dict[str, Mixture] = {}
        for some in _parts(list(dict.fromkeys(pair[0][0] for pair in requests)), self.batch_size):
            for context, output in zip(some, self._dispatch(some), strict=True):
                if output.error is not None:
                    raise ValueError(f"{NAME} cannot look at {context!r:.60}: {output.error}")
                mixtures[context] = output.mixture
        found: dict[int, tuple[float, bool]] = {}
        by_length = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        for places in _parts(by_length, self.batch_size):
            pairs = [requests[place] for place in places]
            with self.t2.bank.use(routing(self.t2.bank, [mixtures[pair[0][0]] for pair in pairs])):
                found.update(zip(places, self._scores(pairs), strict=True))
        for place, pair in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", pair[0], found[place])
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of the model's context. There is no question, so a
        strategy that looks at one leaves this to the base.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        most = context_length(self.t2.model)
        if most is None:
            raise ValueError("rolling windows need a model whose config says how long they are")
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, most, 1
            )
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    # -- how -------------------------------------------------------------------------------------

    def _dispatch(self, contexts: Sequence[str]) -> list[Output]:
        """Pass 1 of each context; an empty one gives it nothing to look at."""
        shown = [context for context in contexts if context.strip()]
        said = iter(self.t2.dispatch(shown, self.strategy, task=self.task))
        return [next(said) if context.strip() else self._blank for context in contexts]

    def _settings(self, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """(stop strings, new tokens) of a task's generation settings."""
        from lm_eval.models.utils import normalize_gen_kwargs

        settings: Any = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        if settings.get("do_sample"):
            raise ValueError(f"{NAME} answers greedily: leave out do_sample and temperature")
        return tuple(word for word in settings["until"] if word), settings["max_gen_toks"]

    def _room(self, text: str, most: int) -> int:
        """New tokens that the context leaves."""
        context = context_length(self.t2.model)
        return most if context is None else min(most, context - len(self.tok_encode(text)))

    @torch.no_grad()
    def _scores(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        """Under whatever is in force; a context that does not fit loses its beginning."""
        model, most = self.t2.model, context_length(self.t2.model)
        rows = [before + after for _, before, after in pairs]
        cut = [row for row in rows if most is not None and len(row) > most + 1]
        if cut:
            logger.warning("longer than the model's %s tokens, the beginning is cut off: %d "
                           "contexts with their continuations", most, len(cut))  # fmt: skip
        fitting = [row[-(most + 1) :] if most is not None else row for row in rows]
        ids, mask = pad_left([row[:-1] for row in fitting], pad_token(self.tokenizer), self._device)
        keep = max(len(after) for _, _, after in pairs)
        wanted = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "logits_to_keep": keep}
        accepted = forward_parameters(model)
        extra = {name: value for name, value in wanted.items() if name in accepted}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
        return [_score(row, after) for row, (_, _, after) in zip(logits, pairs, strict=True)]


def _score(logits: Tensor, after: Sequence[int]) -> tuple[float, bool]:
    """Of a continuation, from the logits (at least its length, vocabulary) that end with it."""
    log_probs = logits[-len(after) :].float().log_softmax(-1)
    if len(log_probs) < len(after):
        raise ValueError(f"a continuation of {len(after)} tokens does not fit into the context")
    tokens = torch.tensor(after, device=logits.device)
    greedy = bool((log_probs.argmax(-1) == tokens).all())
    return float(log_probs.gather(-1, tokens[:, None]).sum()), greedy


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Runs of at most `size`.

    >>> _parts([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


def register() -> Any:
    """The class that lm-eval finds under `NAME`, put into its registry if it is not there.

    Raises ImportError without lm-eval.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import model_registry, register_model
    except ImportError as error:
        raise ImportError(
            f"evaluating with lm-eval needs it: pip install 't2kernels[eval]' ({error})"
        ) from error
    if NAME not in model_registry:
        register_model(NAME)(type("TwoPassLM", (TwoPass, TemplateLM), {"__module__": __name__}))
    return model_registry.get(NAME)


# Without lm-eval there is no registry that anybody could look into.
if importlib.util.find_spec("lm_eval") is not None:
    register()

if __name__ == "__main__":
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
