"""lm-eval on local files: its own model under an expert, and the registered two-pass model."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what lm-eval imports
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed ([eval])")
    pytest.importorskip("datasets", reason="lm-eval reads tasks with datasets")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from t2runtime import harness, tasks
from t2runtime.engine import Transformer2

# lm-eval and datasets, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
CHOICES = ["12", "85", "edcba"]
SAID = """
task: said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
CHOSEN = """
task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its description of the machine, which calls pip and compilers for seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def t2(small: Any) -> Transformer2:
    """Experts near enough to the base for pass 1 to name several, and to change answers."""
    model, tokenizer = small
    generator = torch.Generator().manual_seed(0)
    here = t2k.Expert.from_model(model)
    bank = t2k.ExpertBank(model)
    for name in ("add", "reverse", "max"):
        z = {n: 1 + 0.4 * torch.randn(v.shape, generator=generator) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    return Transformer2(model, tokenizer, bank)


@pytest.fixture(scope="module")
def problems(t2: Transformer2, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(questions, manager of the two local tasks); a right answer is what two passes say."""
    folder = tmp_path_factory.mktemp("tasks")
    asked = [
        p.prompt for name in ("add", "reverse", "other") for p in tasks.problems(name, 3, "test")
    ]
    said = [output.text for output in t2.generate(asked, "prompt", max_new_tokens=8, stop="#")]
    lines = [json.dumps({"question": q, "answer": a}) for q, a in zip(asked, said, strict=True)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines))
    facts = {"data": data, "cache": folder / "cache", "choices": CHOICES, "stop": "#"}
    (folder / "said.yaml").write_text(SAID.format(**facts))
    (folder / "chosen.yaml").write_text(CHOSEN.format(**facts))
    return asked, TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model: Any, task: str, manager: TaskManager, **args: Any) -> dict[str, Any]:
    """The samples of a task by question, and its metrics under "metrics"."""
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0,
                                    **args)  # fmt: skip
    samples = {s["doc"]["question"]: s["resps"] for s in found["samples"][task]}
    return {"metrics": found["results"][task], **samples}


def test_every_request_is_dispatched(t2: Transformer2, problems: Any) -> None:
    asked, manager = problems
    outputs = t2.dispatch(asked, "prompt")
    assert len({output.category for output in outputs}) > 1, "or nothing is tested"
    args = {"model_args": {"engine": t2, "strategy": "prompt", "batch_size": 4}}
    said = evaluated(harness.NAME, "said", manager, **args)
    assert said["metrics"]["exact_match,none"] == 1.0
    given = t2.generate(asked, [o.mixture for o in outputs], max_new_tokens=8, stop="#")
    assert [said[question] for question in asked] == [[[o.text]] for o in given]
    base = evaluated(harness.NAME, "said", manager, model_args={"engine": t2, "strategy": None})
    assert base["metrics"]["exact_match,none"] < 1.0, "the experts matter"

    chosen = evaluated(harness.NAME, "chosen", manager, **args)
    alone = {
        name: evaluated(
            harness.NAME, "chosen", manager, model_args={"engine": t2, "strategy": name}
        )
        for name in {output.mixture for output in outputs}
    }
    for question, output in zip(asked, outputs, strict=True):
        want = alone[output.mixture][question]
        for (value, greedy), (other, same) in zip(flat(chosen[question]), flat(want), strict=True):
            assert value == pytest.approx(other, abs=1e-4) and greedy == same


def flat(responses: Any) -> list[tuple[float, bool]]:
    return [pair for (pair,) in responses]


def test_lm_evals_own_model_under_an_expert(t2: Transformer2, problems: Any) -> None:
    """HFLM over the converted model: the same answers and likelihoods as ours under one expert."""
    asked, manager = problems
    own = HFLM(pretrained=t2.model, tokenizer=t2.tokenizer, batch_size=4)
    for name in ("add", None):
        args = {"model_args": {"engine": t2, "strategy": name}}
        ours = {task: evaluated(harness.NAME, task, manager, **args) for task in ("said", "chosen")}
        with t2.bank.use(name):
            theirs = {task: evaluated(own, task, manager) for task in ("said", "chosen")}
        assert [ours["said"][q] for q in asked] == [theirs["said"][q] for q in asked]
        for question in asked:
            pairs = zip(flat(ours["chosen"][question]), flat(theirs["chosen"][question]))
            for (value, greedy), (other, same) in pairs:
                assert value == pytest.approx(other, abs=1e-4) and greedy == same
        keys = ("acc,none",)
        assert all(ours["chosen"]["metrics"][k] == theirs["chosen"]["metrics"][k] for k in keys)


class Asked:
    """What lm-eval hands over."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_texts_without_a_question(t2: Transformer2) -> None:
    """Whole texts, longer than the context too, as lm-eval's own model scores them; the base for
    a strategy that looks, else what it says.
    """
    texts = [Asked("37+48=85 "), Asked("say abc= " * 20)]
    model = harness.register()
    own = HFLM(pretrained=t2.model, tokenizer=t2.tokenizer, batch_size=2)
    for strategy, under in (("prompt", None), ("add", "add")):
        ours = model(engine=t2, strategy=strategy).loglikelihood_rolling(texts)
        with t2.bank.use(under):
            assert ours == pytest.approx(own.loglikelihood_rolling(texts), rel=1e-4)
            (want,) = own.loglikelihood([Asked("", "85")])
        ((value, greedy),) = model(engine=t2, strategy=strategy).loglikelihood([Asked("", "85")])
        assert value == pytest.approx(want[0], abs=1e-4) and greedy == want[1]


def test_contexts_that_do_not_fit_lose_their_beginning(
    t2: Transformer2, caplog: pytest.LogCaptureFixture
) -> None:
    """As with lm-eval's own model; pass 1 has seen the whole of them."""
    pairs = [Asked("1" * 20 + "37+48=" + "2" * 30, "123456789 12"), Asked("37+48=", "85")]
    own = HFLM(pretrained=t2.model, tokenizer=t2.tokenizer, batch_size=2)
    ours = harness.register()(engine=t2, strategy="add").loglikelihood(pairs)
    assert "longer than the model's 64 tokens, the beginning is cut off: 1 " in caplog.text
    with t2.bank.use("add"):
        theirs = own.loglikelihood(pairs)
    for (value, greedy), (other, same) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(other, abs=1e-4) and greedy == same


def test_from_arguments_and_from_the_shell(
    t2: Transformer2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    t2.bank.save(tmp_path / "experts")
    made = harness.register().create_from_arg_string(
        f"pretrained=small,experts={tmp_path / 'experts'},strategy=none,device=cpu",
        {"batch_size": 2, "device": None},
    )
    assert (
        made.strategy is None
        and made.batch_size == 2
        and set(made.t2.bank.names) == set(t2.bank.names)
    )
    monkeypatch.delitem(sys.modules, "t2runtime.harness")
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("t2runtime.harness", run_name="__main__")
    assert not stop.value.code and "--model_args" in capsys.readouterr().out


def test_what_cannot_be_answered(
    t2: Transformer2, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = harness.register()
    made = model(engine=t2, batch_size=2)
    greedy = {"until": ["#"], "max_gen_toks": 100}
    texts = made.generate_until([Asked("1" * 70, greedy), Asked("37+48=", greedy)])
    assert texts[0] == "" and texts[1] == t2.generate(["37+48="], stop="#")[0].text
    assert "1 of 2 requests have no answer" in caplog.text and "71 tokens" in caplog.text
    with pytest.raises(ValueError, match="cannot look at '111.*71 tokens"):
        made.loglikelihood([Asked("1" * 70, "2")])
    with pytest.raises(ValueError, match="leave out do_sample"):
        made.generate_until([Asked("1+1=", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(NotImplementedError, match="without a chat template"):
        made.apply_chat_template([{"role": "user", "content": "x"}])
    for args, said in (
        ({"strategy": "prmopt"}, "strategy must be one of"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"device": "cpu"}, "engine= is loaded already, got device"),
    ):
        with pytest.raises(ValueError, match=said):
            model(engine=t2, **args)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install 't2kernels\\[eval\\]'"):
        harness.register()
