"""A classification expert is asked in training, in `t2 classify` and in the engine with the same
tokens: its file says how.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime import Transformer2, generation
from t2runtime.adapt import prompt
from t2runtime.adapt.asking import KEY, difference, trained_to_name
from t2runtime.adapt.classifier import CategorySource, train_classifier
from t2runtime.adapt.prompt import SMALL, Categories
from t2runtime.adapt.record import Record, hashes
from t2runtime.cli import main
from t2runtime.commands import train as train_command
from t2runtime.sources import source
from t2runtime.tasks import Generated
from t2runtime.train import Interrupted, next_token, small_model, train

WAY = Categories(("code", "math"), "{names}\n{question}?", "none", descriptions={"code": "writes"})
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
SHORT = ("--recipe", "small", "--steps", "1", "--prompts", "4", "--samples", "2",
         "--validation-problems", "2", "--rows-per-rollout", "64")  # fmt: skip


def folder(path: Path, word: str) -> Path:
    path.mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 4), ("test", 6)):
        rows = [{"prompt": f"{word} {split} {i}", "answer": "x"} for i in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def expert(model: Any, seed: int = 0, **more: Any) -> t2k.Expert:
    generator = torch.Generator().manual_seed(seed)
    here = t2k.Expert.from_model(model).z
    z = {n: 1 + 0.2 * torch.randn(v.shape, generator=generator) for n, v in here.items()}
    return t2k.Expert(z, **more)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """The prompts as the model gets them: "generated" behind in training, "judged" in pass 1."""
    seen: dict[str, list[tuple[int, ...]]] = {"generated": [], "judged": [], "replies": []}
    complete, score = generation.complete_ids, prompt.sequence_log_probs

    def completing(model: Any, tokenizer: Any, ids: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        seen["generated"] += [tuple(i[m == 1].tolist()) for i, m in zip(ids, mask, strict=True)]
        return complete(model, tokenizer, ids, mask, *rest, **more)

    def scoring(model: Any, rows: Any, replies: Any, *rest: Any, **more: Any) -> Any:
        seen["judged"] += map(tuple, rows)
        seen["replies"] += map(tuple, replies)
        return score(model, rows, replies, *rest, **more)

    monkeypatch.setattr(generation, "complete_ids", completing)
    monkeypatch.setattr(prompt, "sequence_log_probs", scoring)
    monkeypatch.setattr(train_command, "TEST_PROBLEMS", 8)
    return seen


@pytest.fixture
def roomy(tmp_path: Path, tokenizer: Any) -> str:
    """A folder with a random model that has room for pass 1's words, and a chat template."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path / "roomy"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    before = getattr(tokenizer, "chat_template", None)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    tokenizer.chat_template = before
    return str(path)


@pytest.mark.parametrize("chat", ["off", "auto", "small"])
def test_train_classify_and_engine_ask_the_same_tokens(
    chat: str, roomy: str, small: Any, tmp_path: Path, spied: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Own folders and a generated skill; the bank's order is another one than the task's."""
    model_name = "small" if chat == "small" else roomy
    model = small[0] if chat == "small" else _converted(roomy)
    (tmp_path / "experts").mkdir()
    for seed, name in enumerate(("add", "notes", "zeta")):
        made = expert(model, seed, description=f"does {name},\n  well")
        made.save(tmp_path / "experts" / f"{name}.safetensors")
    parts = [f"{name}={folder(tmp_path / 'data' / name, name[0])}" for name in ("zeta", "notes")]
    task = "category:" + "+".join([*parts, "add", "other"])
    file = tmp_path / "sorter.safetensors"
    way = () if chat == "small" else ("--chat", chat)
    words = ["train", model_name, "--task", task, "--expert", str(tmp_path / "experts"), *SHORT]
    assert main([*words, *way, "--out", str(file), "--json"]) == 0, capsys.readouterr().err
    trained = set(spied["generated"])
    own = trained_to_name(t2k.Expert.load(file), "sorter")
    assert own is not None and own.names == ("zeta", "notes", "add")
    assert own.chat == ("on" if chat == "auto" else "off")
    if chat == "small":
        assert difference(own, dataclasses.replace(SMALL, names=own.names)) is None
    else:
        assert own.descriptions == {n: f"does {n}, well" for n in ("zeta", "notes", "add")}

    spied["judged"].clear()
    words = ["classify", model_name, "--task", task, "--classifier", str(file), "--limit", "8"]
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    judged, replies = list(spied["judged"]), list(spied["replies"])
    assert len(judged) == 16 and judged[:8] == judged[8:], "the base is asked the same"
    assert set(judged) <= trained

    t2 = Transformer2.from_pretrained(
        model_name, tmp_path / "experts", classifier=file, device="cpu",
        record=Record(hashes(_bank(model, tmp_path), ["add"]), {}),
    )  # fmt: skip
    assert t2.bank.names == ["add", "notes", "zeta", "sorter"]
    problems = source(task, small=chat == "small")
    assert isinstance(problems, CategorySource)
    questions = [one.prompt for one in problems.questions(8, "test", 0)]
    for strategy in ("classifier", "record"):
        spied["judged"].clear()
        spied["replies"].clear()
        outputs = t2.dispatch(questions, strategy)
        assert spied["judged"] == judged[8:] and set(spied["replies"]) == set(replies)
        assert [*(outputs[0].probabilities or ())] == ["zeta", "notes", "add", "other"]
        assert all(one.error is None for one in outputs)
    spied["judged"].clear()
    t2.dispatch(questions, "prompt")
    assert spied["judged"] != judged[8:] or chat == "small", "the base is asked about the bank"


def _converted(path: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    t2k.convert(model, progress=False)
    return model


def _bank(model: Any, path: Path) -> t2k.ExpertBank:
    bank = t2k.ExpertBank(model)
    bank.load(path / "experts", allow_mismatch=True)
    return bank


def test_every_way_of_training_says_how_it_asked(tiny: Any, tokenizer: Any) -> None:
    sources = {name: Generated(name) for name in ("add", "max", "other")}
    ask = Categories(("add", "max"), "{question}", lead="")
    cfg = small_model(steps=1, prompts=2, samples=2, validation_problems=2)
    made = train_classifier(tiny, tokenizer, sources, ask, cfg)
    assert trained_to_name(made, "x") == dataclasses.replace(ask, chat="off")
    assert "validation" in made.metadata

    def stop(line: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as left:
        train_classifier(tiny, tokenizer, sources, ask, cfg, log=stop)
    assert trained_to_name(left.value.expert, "x") is not None


def test_next_token_training_learns_what_pass_one_scores(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind "Category:" a name begins with a space; the context is too short to leave one out."""
    ask = Categories(("add", "max"), "{question}:")
    problems = CategorySource({name: Generated(name) for name in ("add", "max", "other")}, ask)
    drawn = problems(9, "train", 0)
    replies = dict(zip(ask.all_names, ask.replies(tokenizer), strict=True))
    assert tokenizer.decode(replies["max"]) == " max"
    assert problems.target_ids(drawn, tokenizer, "off") == [replies[p.answer] for p in drawn]
    learnt: list[str] = []

    def seen(*given: Any) -> Any:
        done = generation.forced(*given)
        learnt.extend(done.texts)
        kept = [ids[row].tolist() for ids, row in zip(done.new_ids, done.sampled, strict=True)]
        assert all([*replies[text.strip()], 2] in kept for text in done.texts)
        return done

    monkeypatch.setattr(next_token, "forced", seen)
    cfg = small_model(objective="next-token", samples=1, baseline="none", steps=1, prompts=6,
                      validation_problems=2)  # fmt: skip
    train(tiny, tokenizer, problems, cfg)
    assert len(learnt) == 6 and set(learnt) == {" add", " max", " other"}


@pytest.fixture
def bank_of(tiny: Any) -> Callable[..., t2k.ExpertBank]:
    def made(*names: str, says: Any = WAY) -> t2k.ExpertBank:
        bank = t2k.ExpertBank(tiny)
        for seed, name in enumerate(names):
            bank.add(name, expert(tiny, seed))
        facts = says.facts() if isinstance(says, Categories) else says
        bank.add("sorter", expert(tiny, 9, metadata={KEY: facts}))
        return bank

    return made


def test_the_engine_asks_as_the_classifier_says(tokenizer: Any, bank_of: Any) -> None:
    t2 = Transformer2(bank_of().model, tokenizer, bank_of("math", "code"), classifier="sorter")
    assert t2.categories_of("classifier") == t2.categories_of("record") == WAY
    assert t2.categories_of("prompt").names == t2.categories.names == ("math", "code")
    (said,) = t2.dispatch(["1+1"], "classifier")
    assert list(said.probabilities or ()) == ["code", "math", "none"]
    assert t2.mixture_of("none", WAY) is None and t2.mixture_of("other") is None
    alone = Transformer2(t2.model, tokenizer, t2.bank)
    assert alone.categories.names == ("math", "code"), "no expert for answers, even unnamed"


def test_a_file_that_does_not_say_how(tiny: Any, tokenizer: Any) -> None:
    """An older one is asked about the bank, which may be filled later."""
    bank = t2k.ExpertBank(tiny)
    bank.add("sorter", expert(tiny))
    t2 = Transformer2(tiny, tokenizer, bank, classifier="sorter")
    bank.add("math", expert(tiny, 1))
    assert t2.categories_of("classifier") == t2.categories == Categories(("math",))


def test_other_names_than_the_banks(tokenizer: Any, bank_of: Any) -> None:
    bank = bank_of("math")
    with pytest.raises(ValueError, match="category 'code' of the classifier 'sorter' needs expert"):
        Transformer2(bank.model, tokenizer, bank, classifier="sorter")
    t2 = Transformer2(
        bank.model, tokenizer, bank, classifier="sorter", mixtures={"code": {"math": 0.5}}
    )
    assert t2.mixture_of("code") == {"math": 0.5}
    bank.remove("math")
    with pytest.raises(ValueError, match="needs expert 'math'.* or train the classifier for"):
        t2.dispatch(["1+1"], "classifier")


def test_experts_that_the_classifier_does_not_know(
    tokenizer: Any, bank_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; an expert inside a mixture is known."""
    bank = bank_of("math", "helper")
    means = {"code": {"helper": 1.0}}
    t2 = Transformer2(bank.model, tokenizer, bank, classifier="sorter", mixtures=means)
    assert not caplog.records
    bank.add("new", expert(bank.model, 5))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (said,) = t2.dispatch(["1+1"], "classifier")
    assert "new" not in (said.probabilities or {}) and "new" in t2.categories.names
    assert [record.getMessage() for record in caplog.records] == [
        "the classifier 'sorter' was not trained to name new: it gives no request to them until it "
        "is trained again"
    ]


def test_given_categories_must_be_the_classifiers(tokenizer: Any, bank_of: Any) -> None:
    bank = bank_of("math", "code")
    same = dataclasses.replace(WAY, max_new_tokens=3)
    Transformer2(bank.model, tokenizer, bank, classifier="sorter", categories=same)
    for other, said in (
        (dataclasses.replace(WAY, names=("math", "code")), "names ..code., .math.. against"),
        (dataclasses.replace(WAY, descriptions={}), "descriptions"),
    ):
        with pytest.raises(ValueError, match=f"categories must be what .* got {said}"):
            Transformer2(bank.model, tokenizer, bank, classifier="sorter", categories=other)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("none", "must hold chat, descriptions, .* got str"),
        ({"names": ["a"]}, r"must hold chat, .* got \['names'\]"),
        (WAY.facts() | {"names": []}, "at least one category"),
        (WAY.facts() | {"names": ["math", 1]}, "names must be a list of texts"),
        (WAY.facts() | {"names": ["math", "Math"]}, "'math' and 'Math'"),
        (WAY.facts() | {"names": ["math", "math"]}, "math more than once"),
        (WAY.facts() | {"template": "x"}, "{question}"),
        (WAY.facts() | {"lead": None}, "lead must be a text"),
        (WAY.facts() | {"descriptions": ["x"]}, "descriptions must be"),
        (WAY.facts() | {"max_new_tokens": True}, "max_new_tokens must be"),
        (WAY.facts() | {"chat": "auto"}, "chat must be 'on', 'off' or None"),
        (WAY.facts() | {"later": 1}, "later"),
    ],
)
def test_damaged_metadata(damage: Any, said: str, tokenizer: Any, bank_of: Any) -> None:
    bank = bank_of("math", "code", says=damage)
    with pytest.raises(ValueError, match=f"of expert 'sorter', .* are damaged: .*{said}.*Train"):
        Transformer2(bank.model, tokenizer, bank, classifier="sorter")


def test_the_base_may_answer_a_category(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pass 1 may still name it; without the word the missing expert is an error."""
    add, sorter = str(tmp_path / "add.safetensors"), str(tmp_path / "sorter.safetensors")
    expert(small[0], 1).save(add)
    expert(small[0], metadata={KEY: SMALL.facts()}).save(sorter)
    words = ("generate", "small", "--expert", add, "--prompt", "flip 48213=", "--json",
             "--max-new-tokens", "2", "--classifier", sorter, "--strategy")  # fmt: skip
    assert main([*words, "classifier"]) == 2
    assert "needs expert 'reverse'" in (said := capsys.readouterr().err)
    assert "(--base-answers CATEGORY)" in said
    rest = [word for name in SMALL.names[1:] for word in ("--base-answers", name)]
    assert main([*words, "classifier", *rest]) == 0, capsys.readouterr().err
    (row,) = json.loads(capsys.readouterr().out)["outputs"]
    assert set(row["probabilities"]) == {*SMALL.names, "other"}
    assert row["mixture"] == ("add" if row["category"] == "add" else None)
    assert main([*words[:-3], "--base-answers", "max"]) == 2
    assert "--base-answers is for categories of" in capsys.readouterr().err


def test_facts_come_back_from_a_file(tiny: Any, tmp_path: Path) -> None:
    expert(tiny, metadata={KEY: WAY.facts()}).save(tmp_path / "x.safetensors")
    assert trained_to_name(t2k.Expert.load(tmp_path / "x.safetensors"), "x") == WAY


def test_commands_refuse_another_question(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "sorter.safetensors")
    names = dataclasses.replace(SMALL, names=("add", "max"))
    expert(small[0], metadata={KEY: names.facts()}).save(file)
    words = ("classify", "small", "--limit", "6", "--classifier", file, "--json")
    assert main([*words, "--task", "category:max+other"]) == 0, "fewer than it can name"
    assert set(json.loads(capsys.readouterr().out)["reports"]) == {"base", "sorter"}
    assert main([*words, "--task", "category:add+order"]) == 2
    assert "'sorter' was trained to name, add, max, other; got order" in capsys.readouterr().err
    assert main([*words, "--task", "category:add+max", "--classifier", file]) == 2
    assert "two rows would be called 'sorter'" in capsys.readouterr().err
    words = ("eval", "small", "--limit", "6", "--expert", file, "--json")
    assert main([*words, "--task", "category:add+max+other"]) == 0
    capsys.readouterr()
    assert main([*words, "--task", "category:max+add+other"]) == 2
    assert "trained on another question: names ('add', 'max')" in capsys.readouterr().err
