"""Calls of the engine in several batches and from several threads; requests that fail in pass 2."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt import mixtures as mixtures_module
from t2runtime.adapt.mixtures import TaskMixture, hashes
from t2runtime.engine import Transformer2
from t2runtime.request import Output

QUESTIONS = [tasks.problems(name, 1, "test")[0].prompt for name in tasks.CATEGORIES]
#: As many as there are questions; that in the middle overflows.
HUGE: list[Any] = ["add", None, {"max": 3e38, "add": 3e38}, {"add": 0.5, "max": 0.5}, "max", None]


@pytest.fixture
def t2(small: Any) -> Transformer2:
    model, tokenizer = small
    bank = t2k.ExpertBank(model)
    here = t2k.Expert.from_model(model).z
    for seed, name in enumerate(tasks.SKILLS):
        generator = torch.Generator().manual_seed(seed)
        z = {n: 1 + 0.3 * torch.randn(v.shape, generator=generator) for n, v in here.items()}
        bank.add(name, t2k.Expert(z))
    return Transformer2(model, tokenizer, bank)


def without(row: int, given: list[Any]) -> list[Any]:
    return given[:row] + given[row + 1 :]


@pytest.mark.parametrize("invariant", [False, True])
def test_a_request_that_overflows_fails_alone(t2: Transformer2, invariant: bool) -> None:
    pieces: dict[int, str] = {}

    def stream(index: int, piece: str) -> None:
        pieces[index] = pieces.get(index, "") + piece

    with t2k.batch_invariant(invariant):
        outputs = t2.generate(QUESTIONS, HUGE, max_new_tokens=5, stream=stream)
        rest = t2.generate(without(2, QUESTIONS), without(2, HUGE), max_new_tokens=5)
    bad = outputs.pop(2)
    assert bad.text == "" and "not finite after 0 new tokens" in str(bad.error)
    assert "overflows in float32" in str(bad.error) and bad.mixture is None
    assert [(o.text, o.error) for o in outputs] == [(o.text, None) for o in rest]
    assert pieces == {index + (index > 1): o.text for index, o in enumerate(rest) if o.text}
    alone = t2.generate(QUESTIONS[:1], HUGE[2], max_new_tokens=5, stop=["\n"])
    assert alone[0].error == bad.error, "also where no other request goes on"


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    ("weight", "said"),
    [(1e9, "all equal, as a norm leaves them"), (1e20, "not finite"), (-3e38, "not finite")],
)
def test_an_overflow_that_a_norm_hides_is_seen(
    t2: Transformer2, weight: float, said: str, invariant: bool
) -> None:
    """Squares beyond fp32 in a norm leave 0 of everything: finite logits that choose nothing."""
    with t2k.batch_invariant(invariant):
        bad, good = t2.generate(QUESTIONS[:2], [{"add": weight}, "max"], max_new_tokens=3)
        (want,) = t2.generate(QUESTIONS[1:2], "max", max_new_tokens=3)
    assert bad.text == "" and f"logits that are {said} after 0 new tokens" in str(bad.error)
    assert (good.text, good.error) == (want.text, None)


def test_what_was_said_before_an_overflow(t2: Transformer2) -> None:
    """Logits that overflow in the third step: no text, but pieces were given."""
    said: list[str] = []
    calls = 0

    def spoil(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            logits[1, :, 5] = float("inf")
        return logits

    want = t2.generate(["37+48=", "37+49="], None, max_new_tokens=4)
    handle = t2.model.lm_head.register_forward_hook(spoil)
    try:
        good, bad = t2.generate(
            ["37+48=", "37+49="], None, max_new_tokens=4,
            stream=lambda row, piece: said.append(piece) if row else None,
        )  # fmt: skip
    finally:
        handle.remove()
    assert good.text == want[0].text and good.error is None
    assert bad.text == "" and "not finite after 2 new tokens" in str(bad.error)
    assert "".join(said) == want[1].text[:2] != ""


def test_a_weight_beyond_fp32_fails_alone(t2: Transformer2) -> None:
    deep = TaskMixture("deep", {t2.bank.layers[0]: {"max": 0.5}}, hashes(t2.bank))
    good, bad = t2.generate(QUESTIONS[:2], [deep, {"add": 1e39}], max_new_tokens=2)
    assert good.error is None and "a finite number, got 1e+39" in str(bad.error)


@pytest.mark.parametrize("entry", [0, -1, "3", 2.5, True])
def test_a_bad_limit_of_one_request_fails_alone(t2: Transformer2, entry: Any) -> None:
    """As a number for all of them it raises."""
    outputs = t2.generate(QUESTIONS[:3], None, max_new_tokens=[2, entry, None])
    assert "max_new_tokens must be" in str(outputs[1].error) and outputs[1].text == ""
    assert outputs[0].error is outputs[2].error is None
    assert outputs[0].text == t2.generate(QUESTIONS[:1], None, max_new_tokens=2)[0].text
    with pytest.raises((TypeError, ValueError), match=f"max_new_tokens must be .*got {entry!r}"):
        t2.generate(QUESTIONS[:3], None, max_new_tokens=entry)


def texts(outputs: list[Output]) -> list[Any]:
    return [(o.text, o.category, o.probabilities, repr(o.mixture), o.error) for o in outputs]


def test_batches_in_order(t2: Transformer2) -> None:
    """Each with its own seconds; streams name requests by their place in the call."""
    pieces: dict[int, str] = {}
    prompts = [*QUESTIONS, "1" * 80]

    def stream(index: int, piece: str) -> None:
        pieces[index] = pieces.get(index, "") + piece

    outputs = t2.generate(prompts, max_new_tokens=4, batch_size=3, stream=stream)
    assert pieces == {index: o.text for index, o in enumerate(outputs) if o.text}
    whole = t2.generate(prompts, max_new_tokens=4)
    assert [(o.text, o.category) for o in outputs] == [(o.text, o.category) for o in whole]
    seconds = [(o.pass1_seconds, o.pass2_seconds) for o in outputs]
    assert [len(set(seconds[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(seconds)) == 3 and outputs[-1].error and not whole[-1].text
    said = t2.dispatch(prompts, batch_size=2)
    assert [o.category for o in said] == [o.category for o in whole]
    assert t2.generate([], batch_size=2) == []
    given = [None, "add", {"max": 0.5}, "max", None, "add"]
    mixed = t2.generate(QUESTIONS, given, max_new_tokens=4, batch_size=4)
    assert [o.mixture for o in mixed] == given


def test_in_batch_invariant_mode_the_size_changes_nothing(t2: Transformer2) -> None:
    with t2k.batch_invariant():
        want = texts(t2.generate(QUESTIONS, "mixture", max_new_tokens=5))
        for size in (1, 4):
            assert (
                texts(t2.generate(QUESTIONS, "mixture", max_new_tokens=5, batch_size=size)) == want
            )


@pytest.mark.parametrize(
    ("size", "kind", "said"),
    [(0, ValueError, "at least 1, got 0"), (2.0, TypeError, "an int of at least 1, got 2.0"),
     (True, TypeError, "got True")],
)  # fmt: skip
def test_bad_batch_sizes(t2: Transformer2, size: Any, kind: type[Exception], said: str) -> None:
    for call in (t2.generate, t2.dispatch):
        with pytest.raises(kind, match=f"batch_size must be {said}|batch_size .*{said}"):
            call(QUESTIONS, batch_size=size)


def test_threads_take_turns(t2: Transformer2) -> None:
    """Two threads with one engine get what each gets alone."""
    given: list[Any] = ["add", None, {"max": 0.5, "add": 0.5}]
    want = [texts(t2.generate(QUESTIONS, mixture, max_new_tokens=4)) for mixture in given]
    found: dict[int, list[Any]] = {}
    failures: list[BaseException] = []
    begin = threading.Barrier(len(given))

    def work(number: int) -> None:
        try:
            begin.wait(60)
            for _ in range(3):
                found[number] = texts(
                    t2.generate(QUESTIONS, given[number], max_new_tokens=4, batch_size=3)
                )
                t2.dispatch(QUESTIONS[:2])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures and [found[number] for number in range(len(given))] == want


def test_a_stream_may_ask_again(t2: Transformer2) -> None:
    """On the thread that generates: no deadlock, and the outer answer is as ever."""
    want = t2.generate(QUESTIONS[:1], "add", max_new_tokens=3)[0].text
    inner: list[str] = []

    def stream(index: int, piece: str) -> None:
        inner.append(t2.generate(["1+1="], "max", max_new_tokens=1)[0].text)

    assert t2.generate(QUESTIONS[:1], "add", max_new_tokens=3, stream=stream)[0].text == want
    assert inner and len(set(inner)) == 1


@pytest.mark.parametrize("strategy", ["prompt", "few-shot", "record"])
def test_experts_are_hashed_once_a_call(
    t2: Transformer2, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests stand for a found mixture, in however many batches."""
    from t2runtime.adapt.record import Record

    t2.record = Record(hashes(t2.bank, ["add", "max"]))
    layer = t2.bank.layers[0]
    for name in (*tasks.SKILLS, "sums"):
        t2.mixtures[name] = TaskMixture(
            name, {layer: {"add": 0.5, "max": 1.0}}, hashes(t2.bank, ["add", "max"])
        )
    made: list[t2k.Expert] = []
    whole = mixtures_module.expert_hash
    monkeypatch.setattr(mixtures_module, "expert_hash", lambda e: made.append(e) or whole(e))
    outputs = t2.generate(QUESTIONS, strategy, task="sums", max_new_tokens=2, batch_size=4)
    assert all(output.error is None for output in outputs)
    assert made == [t2.bank["add"], t2.bank["max"]]
    t2.bank.add("add", t2.bank["add"] * 0.5, overwrite=True)
    if strategy == "prompt":
        outputs = t2.generate(QUESTIONS, strategy, max_new_tokens=2)
        named = [o for o in outputs if o.category != "other"]
        assert named and all("another expert 'add'" in str(o.error) for o in named)
    else:
        with pytest.raises(ValueError, match="another expert 'add'"):
            t2.generate(QUESTIONS, strategy, task="sums", max_new_tokens=2)
