"""Both passes: dispatch per request, streaming, stop strings, and requests that fail alone."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.mixtures import TaskMixture, hashes, save_mixture
from t2runtime.adapt.prompt import SMALL, Categories, classify, question_ids
from t2runtime.engine import Transformer2
from t2runtime.generation import complete, forward_parameters
from t2runtime.loading import load
from t2runtime.prompts import messages_of

STORIES = Path(os.environ.get("T2_MODELS", Path(__file__).parents[3] / "shared" / "models"))
QUESTIONS = [tasks.problems(name, 1, "test")[0].prompt for name in tasks.CATEGORIES]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def random_expert(model: Any, seed: int, size: float = 0.3) -> t2k.Expert:
    generator = torch.Generator().manual_seed(seed)
    here = t2k.Expert.from_model(model).z
    return t2k.Expert(
        {n: 1 + size * torch.randn(v.shape, generator=generator) for n, v in here.items()},
        description=f"the expert of seed {seed}",
    )


def random_bank(model: Any, names: tuple[str, ...], size: float = 0.3) -> t2k.ExpertBank:
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(names):
        bank.add(name, random_expert(model, seed, size))
    return bank


@pytest.fixture
def t2(small: Any) -> Transformer2:
    model, tokenizer = small
    return Transformer2(model, tokenizer, random_bank(model, tuple(tasks.SKILLS)))


def test_each_request_gets_its_own_mixture(small: Any) -> None:
    """The answers of a mixed batch are those of each request alone under its mixture."""
    model, tokenizer = small
    bank = random_bank(model, tuple(tasks.SKILLS))
    mixtures = {"add": {"add": 0.5, "max": 0.2}, "count": None}
    t2 = Transformer2(model, tokenizer, bank, mixtures=mixtures)
    outputs = t2.generate(QUESTIONS, max_new_tokens=8)
    base = [said.category for said in classify(model, tokenizer, bank, SMALL, QUESTIONS)]
    assert [output.category for output in outputs] == base
    for question, output in zip(QUESTIONS, outputs, strict=True):
        assert output.mixture == t2.mixture_of(str(output.category)) and output.error is None
        with bank.use(output.mixture):
            assert complete(model, tokenizer, [question], 8).texts == [output.text]
        assert output.pass1_seconds > 0 and output.pass2_seconds > 0
        assert output.probabilities is not None
        assert max(output.probabilities, key=output.probabilities.__getitem__) == output.category


def test_pass_one_runs_on_stated_weights(small: Any) -> None:
    """Whatever is in force outside, pass 1 runs on the base, or on the classifier if one is
    named.
    """
    model, tokenizer = small
    bank = random_bank(model, ("add", "far"), size=3.0)
    t2 = Transformer2(model, tokenizer, bank, classifier="far")
    base = [o.probabilities for o in t2.generate(QUESTIONS, "prompt", max_new_tokens=1)]
    with bank.use("far"):
        again = [o.probabilities for o in t2.generate(QUESTIONS, "prompt", max_new_tokens=1)]
    under = [o.probabilities for o in t2.generate(QUESTIONS, "classifier", max_new_tokens=1)]
    assert base == again != under
    assert set(base[0] or ()) == {"add", "other"}, "the classifier is no category"


def test_other_means_the_base(t2: Transformer2) -> None:
    t2.mixtures["other"] = "add"
    assert t2.mixture_of("other") is None, "nothing can redirect the base"
    assert t2.mixture_of("max") == "max"


def test_given_mixtures_take_no_pass_one(t2: Transformer2) -> None:
    given = [None, "add", {"max": 0.5, "order": 0.2}, "max", None, {"add": 1.0}]
    outputs = t2.generate(QUESTIONS, given, max_new_tokens=6)
    assert [output.mixture for output in outputs] == given
    assert all(o.category is o.probabilities is None and o.pass1_seconds == 0 for o in outputs)
    for one in ("add", {"add": 0.5}, None):
        for question, output in zip(QUESTIONS, t2.generate(QUESTIONS, one, max_new_tokens=4),
                                    strict=True):  # fmt: skip
            with t2.bank.use(one):
                assert complete(t2.model, t2.tokenizer, [question], 4).texts == [output.text]


def test_probabilities_as_weights(t2: Transformer2) -> None:
    t2.mixtures["add"] = {"add": 0.5, "max": 0.5}
    (output,) = t2.generate(["37+48="], "mixture", max_new_tokens=2)
    said = output.probabilities or {}
    assert isinstance(output.mixture, dict) and "other" not in output.mixture
    assert output.mixture["add"] == pytest.approx(0.5 * said["add"])
    assert output.mixture["max"] == pytest.approx(said["max"] + 0.5 * said["add"])


def test_found_mixtures_by_task(t2: Transformer2, tmp_path: Path) -> None:
    marks = hashes(t2.bank)
    save_mixture(tmp_path, TaskMixture("sums", {"add": 0.7}, marks))
    layer = t2.bank.layers[0]
    save_mixture(tmp_path, TaskMixture("deep", {layer: {"max": 1.0}}, marks))
    found = Transformer2(t2.model, t2.tokenizer, t2.bank, mixtures=tmp_path)
    (output,) = found.generate(["37+48="], "few-shot", task="sums", max_new_tokens=3)
    assert output.text == t2.generate(["37+48="], {"add": 0.7}, max_new_tokens=3)[0].text
    deep = found.mixtures["deep"]
    mixed = found.generate(QUESTIONS[:3], ["add", deep, None], max_new_tokens=3)
    assert mixed[0].text == t2.generate(QUESTIONS[:1], "add", max_new_tokens=3)[0].text
    assert mixed[2].text == t2.generate(QUESTIONS[2:3], None, max_new_tokens=3)[0].text
    with pytest.raises(ValueError, match="needs task=, one of .*deep, sums"):
        found.generate(["1+1="], "few-shot")
    t2.bank.add("add", random_expert(t2.model, 99), overwrite=True)
    with pytest.raises(ValueError, match="another expert 'add'"):
        found.generate(["1+1="], "few-shot", task="sums")


def test_a_bad_request_fails_alone(t2: Transformer2) -> None:
    """Too long, of the wrong type, without a user's turn, not finite: the rest answer as ever."""
    good = t2.generate(QUESTIONS, max_new_tokens=6)
    chat = [{"role": "user", "content": "1+1="}]
    bad: list[Any] = ["1" * 80, 5, None, {"role": "user", "content": "x"}, chat, "1" * 56]
    mixed = [entry for pair in zip(bad, QUESTIONS, strict=True) for entry in pair]
    outputs = t2.generate(mixed, max_new_tokens=6)
    assert [o.text for o in outputs[1::2]] == [o.text for o in good]
    assert all(o.error is None for o in outputs[1::2])
    for output, said in zip(
        outputs[::2],
        ("81 tokens", "got int", "NoneType", "got dict", "chat template", "prompt of pass 1"),
        strict=True,
    ):
        assert output.error is not None and said in output.error, output
        assert output.text == "" and output.mixture is None
    given = t2.generate(["1+1="] * 4, ["add", {"add": float("nan")}, {"adr": 1.0}, 7],
                        max_new_tokens=2)  # fmt: skip
    assert [bool(output.error) for output in given] == [False, True, True, True]
    assert "finite" in str(given[1].error) and "'adr'" in str(given[2].error)


def test_what_is_too_long_is_said_with_what_helps(t2: Transformer2, small: Any) -> None:
    for most, said in (
        (None, "65 tokens and at least one new one is needed, the model's context holds 64. "
               "Shorten the prompt"),
        (3, "65 tokens and 3 new ones are asked for (max_new_tokens), the model's context holds "
            "64. Shorten the prompt"),
    ):  # fmt: skip
        (output,) = t2.generate(["1" * 64], None, max_new_tokens=most)
        assert output.error == f"the prompt has {said}"
    (output,) = t2.generate(["1" * 60], None, max_new_tokens=9)
    assert str(output.error).endswith("Shorten the prompt or lower max_new_tokens")
    (output,) = t2.generate(["1" * 57], max_new_tokens=2)
    assert "holds 64. Shorten the question, or name an expert" in str(output.error)

    model, tokenizer = small
    nine, short = tuple(f"skill{i}" for i in range(9)), "{names} {question}="
    for many, words in (
        (Categories(nine, short), "takes 3, the list of 9 categories 103: give them shorter"),
        (Categories(nine, short, descriptions={"skill1": "x"}), "in fewer words, give them"),
        (Categories(nine), "The instruction alone takes 137: name an expert as the strategy"),
    ):
        with pytest.raises(ValueError, match=words):
            question_ids(model, tokenizer, many, "1+1=")


def test_a_whole_batch_of_bad_requests(t2: Transformer2) -> None:
    assert all(output.error for output in t2.generate(["1" * 80, 5]))  # type: ignore[list-item]
    assert t2.generate([]) == []


def test_what_concerns_all_requests_is_raised(small: Any, t2: Transformer2) -> None:
    model, tokenizer = small
    empty = Transformer2(model, tokenizer, t2k.ExpertBank(model))
    with pytest.raises(ValueError, match="the bank is empty.*bank.add"):
        empty.generate(["1+1="])
    assert empty.generate(["1+1="], None, max_new_tokens=2)[0].error is None
    with pytest.raises(TypeError, match="Wrap a single prompt"):
        t2.generate("1+1=")
    with pytest.raises(ValueError, match="strategy must be one of .*got 'ad'"):
        t2.generate(["1+1="], "ad")
    with pytest.raises(ValueError, match="for each of 1 prompts; got 2 entries"):
        t2.generate(["1+1="], [None, None])
    with pytest.raises(ValueError, match="needs a classification expert"):
        t2.generate(["1+1="], "classifier")
    with pytest.raises(ValueError, match="max_new_tokens"):
        t2.generate(["1+1="], max_new_tokens=0)
    with pytest.raises(ValueError, match="stop must hold"):
        t2.generate(["1+1="], stop=[""])


def test_a_missing_expert_is_no_silent_base(small: Any) -> None:
    model, tokenizer = small
    bank = random_bank(model, ("math",))
    categories = Categories(("math", "code"))
    with pytest.raises(ValueError, match="category 'code' needs expert 'code'"):
        Transformer2(model, tokenizer, bank, categories=categories)
    with pytest.raises(ValueError, match="the classifier needs expert 'sorter'"):
        Transformer2(model, tokenizer, bank, classifier="sorter")


def test_streamed_pieces_add_up(t2: Transformer2) -> None:
    pieces: dict[int, str] = {}
    order: list[int] = []

    def stream(index: int, piece: str) -> None:
        assert piece
        order.append(index)
        pieces[index] = pieces.get(index, "") + piece

    prompts = ["1" * 80, *QUESTIONS]
    outputs = t2.generate(prompts, max_new_tokens=8, stream=stream)
    assert pieces == {i: o.text for i, o in enumerate(outputs) if o.text}
    assert order.index(2) < len(order) - 1 - order[::-1].index(1), "rows take turns"
    assert [o.text for o in outputs] == [o.text for o in t2.generate(prompts, max_new_tokens=8)]


def test_stop_strings_end_an_answer(t2: Transformer2) -> None:
    whole = [output.text for output in t2.generate(QUESTIONS, None, max_new_tokens=8)]
    word = whole[1][2:4]
    assert len(word) == 2
    said: list[str] = []
    outputs = t2.generate(
        QUESTIONS, None, max_new_tokens=8, stop=[word, "##"],
        stream=lambda index, piece: said.append(piece) if index == 1 else None,
    )  # fmt: skip
    assert [output.text for output in outputs] == [text.partition(word)[0] for text in whole]
    assert "".join(said) == outputs[1].text, "no part of a stop string was given away"


def test_requests_end_by_themselves(t2: Transformer2) -> None:
    """By default each has what the context leaves to it, whatever the others need."""
    long = "1" * 61
    outputs = t2.generate([long, "37+48="], None)
    assert len(outputs[0].text) <= 2 and outputs[1].text == t2.generate(["37+48="], None)[0].text


def test_a_chat_that_the_template_refuses_fails_alone(small: Any) -> None:
    model, tokenizer = small
    t2 = Transformer2(model, tokenizer, random_bank(model, ("add",)))
    before = tokenizer.chat_template
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = strict + TEMPLATE
    try:
        user = {"role": "user", "content": "37+48="}
        system = {"role": "system", "content": "x"}
        good, bad = t2.generate([[user], [system, user]], "add", max_new_tokens=3)
    finally:
        tokenizer.chat_template = before
    assert good.error is None and good.text
    assert bad.text == "" and "the chat template refuses this chat: no system" in str(bad.error)


def test_beams_and_dicts_of_the_models_own_settings_are_undone(small: Any) -> None:
    model, tokenizer = small
    t2 = Transformer2(model, tokenizer, random_bank(model, ("add",)))
    want = [out.text for out in t2.generate(QUESTIONS, "add", max_new_tokens=4, stop=None)]
    own = model.generation_config
    before = own.to_dict()
    own.update(num_beams=3, return_dict_in_generate=True)
    try:
        found = [out.text for out in t2.generate(QUESTIONS, "add", max_new_tokens=4)]
    finally:
        own.update(**{k: before[k] for k in ("num_beams", "return_dict_in_generate")})
    assert found == want


def test_lora_first_then_convert(small: Any) -> None:
    """Pass 1 and likelihoods of a model in PEFT's wrapper are those of the model inside."""
    peft = pytest.importorskip("peft")
    model, tokenizer = load("small", "float32", "cpu")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    t2k.convert(wrapped, ["mlp"], progress=False)
    t2 = Transformer2(wrapped, tokenizer, random_bank(wrapped, tuple(tasks.SKILLS)))
    plain_model, _ = small
    plain = Transformer2(plain_model, tokenizer, random_bank(plain_model, tuple(tasks.SKILLS)))
    found = t2.dispatch(QUESTIONS, "prompt")
    want = plain.dispatch(QUESTIONS, "prompt")  # both on the base; LoRA begins with nothing
    for a, b in zip(found, want, strict=True):
        assert a.error is None and a.probabilities is not None and b.probabilities is not None
        for name, share in a.probabilities.items():
            assert share == pytest.approx(b.probabilities[name], abs=1e-5)
    assert "position_ids" in forward_parameters(wrapped)


def test_a_chat_is_dispatched_by_its_last_turn(small: Any) -> None:
    model, tokenizer = small
    t2 = Transformer2(model, tokenizer, random_bank(model, tuple(tasks.SKILLS)))
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    try:
        turns = [
            {"role": "user", "content": "37+48="},
            {"role": "assistant", "content": "85 "},
            {"role": "user", "content": "turn 48213="},
        ]
        outputs = t2.generate([turns[:1], turns, "37+48="], max_new_tokens=6)
        assert [output.error for output in outputs] == [None] * 3
        assert outputs[0].text == outputs[2].text
        alone = t2.generate([turns[2]["content"]], max_new_tokens=6)[0]
        assert outputs[1].category == alone.category
        refused = t2.generate([turns[:2], []], max_new_tokens=6)
        assert all("must end with a message of role 'user'" in str(o.error) for o in refused)
    finally:
        tokenizer.chat_template = before


def test_messages() -> None:
    with pytest.raises(TypeError, match="message 1 of a chat"):
        messages_of([{"role": "user", "content": "a"}, {"role": "user"}])
    with pytest.raises(TypeError, match="got bytes"):
        messages_of(b"a")  # type: ignore[arg-type]


def test_a_growing_bank_forgets_nothing(small: Any) -> None:
    """With an expert more, every other request's logits and text keep their bits."""
    model, tokenizer = small
    bank = random_bank(model, ("add", "max"))
    t2 = Transformer2(model, tokenizer, bank, categories=Categories(("add", "max"), SMALL.template))
    layer = bank.layers[3]
    deep = TaskMixture("deep", {layer: {"add": 0.4, "max": 0.9}}, hashes(bank))
    given: list[Any] = ["add", {"add": 0.3, "max": 0.6}, None, "max", deep, None]
    ids = torch.randint(3, 40, (6, 7))

    def state() -> tuple[Any, ...]:
        from t2runtime.adapt.weights import routing

        with torch.no_grad(), bank.use(routing(bank, given)):
            deep_logits = model(input_ids=ids).logits
        with torch.no_grad(), bank.use(given[:4]):
            logits = model(input_ids=ids[:4]).logits
        outputs = t2.generate(QUESTIONS, max_new_tokens=8)
        texts = [o.text for o in t2.generate(QUESTIONS, given, max_new_tokens=8)]
        return logits, deep_logits, [(o.text, o.category, o.probabilities) for o in outputs], texts

    before = state()
    for seed, name in enumerate(("order", "count", "a-first-one"), 10):
        bank.add(name, random_expert(model, seed))
        after = state()
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert before[2:] == after[2:]
    (new,) = t2.generate(["37+48="], "order", max_new_tokens=4)
    assert new.error is None, "and the new one answers at once"


def test_categories_come_from_the_bank(tiny: Any, tokenizer: Any) -> None:
    """With their descriptions; an expert added later is one of them at once."""
    bank = random_bank(tiny, ("math",))
    t2 = Transformer2(tiny, tokenizer, bank)
    assert t2.categories.names == ("math",)
    assert "- math: the expert of seed 0\n- other: none of these" in t2.categories.prompt("q")
    bank.add("code", random_expert(tiny, 1))
    assert t2.categories.all_names == ("math", "code", "other")
    bank.add("other", random_expert(tiny, 2))
    with pytest.raises(ValueError, match="always means the base"):
        t2.generate(["1+1="])


def test_from_pretrained(small: Any, tmp_path: Path) -> None:
    model, _ = small
    random_bank(model, ("add", "max")).save(tmp_path / "experts")
    random_expert(model, 5).save(tmp_path / "sorter.safetensors")
    t2 = Transformer2.from_pretrained(
        "small", tmp_path / "experts", classifier=tmp_path / "sorter.safetensors", device="cpu"
    )
    assert t2.bank.names == ["add", "max", "sorter"] and t2.categories.names == ("add", "max")
    assert t2.generate(["37+48="], "classifier", max_new_tokens=2)[0].error is None
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        Transformer2.from_pretrained("small", tmp_path / "none", device="cpu")


def test_the_page_runs_as_printed(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "two-pass.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    random_bank(small[0], ("add", "reverse"), 0.05).save(tmp_path / "experts")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("None") for line in lines)


@pytest.mark.skipif(
    not (STORIES / "stories260K").exists(), reason="stories260K is not beside the checkout"
)
def test_any_local_model_in_two_passes() -> None:
    """A model of another kind: subword tokenizer, no chat template, never asked for categories."""
    t2 = Transformer2.from_pretrained(str(STORIES / "stories260K"), device="cpu")
    for seed, name in enumerate(("one", "two")):
        t2.bank.add(name, random_expert(t2.model, seed, 0.1))
    outputs = t2.generate(["Once upon a time", "The dog"], max_new_tokens=6)
    assert all(output.category in {"one", "two", "other"} for output in outputs)
    assert all(output.text for output in outputs)
