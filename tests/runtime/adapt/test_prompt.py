"""Pass 1: constrained scoring, its shared prefix, and the categories."""

import copy
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt import scoring
from t2runtime.adapt.prompt import SMALL, Categories, classify, judge, question_ids
from t2runtime.adapt.scoring import sequence_log_probs
from t2runtime.generation import answer_log_probs, forced

QUESTIONS = ["1+1=", "flip 12345=", "who ann bob cal=", "say wxyz="]


def rows_of(model: Any, tokenizer: Any, questions: list[str]) -> list[list[int]]:
    return [question_ids(model, tokenizer, SMALL, question) for question in questions]


def far(model: Any) -> t2k.ExpertBank:
    generator = torch.Generator().manual_seed(0)
    here = t2k.Expert.from_model(model).z
    bank = t2k.ExpertBank(model)
    z = {n: 1 + torch.randn(v.shape, generator=generator) for n, v in here.items()}
    bank.add("far", t2k.Expert(z))
    return bank


@pytest.mark.parametrize("under", [None, "far"])
def test_names_are_scored_as_if_each_were_forced(small: Any, under: str | None) -> None:
    """One forward over a tree of names equals a forward per name, and the softmax of those."""
    model, tokenizer = small
    bank = far(model)
    with bank.use(under), torch.no_grad():
        expected = []
        for name in SMALL.all_names:
            prompts = [SMALL.prompt(question) for question in QUESTIONS]
            given = forced(tokenizer, prompts, [name] * len(prompts), model)
            chosen = answer_log_probs(model, given).gather(-1, given.new_ids[..., None])[..., 0]
            expected.append((chosen * given.sampled).sum(1).double())
        found = sequence_log_probs(
            model, rows_of(model, tokenizer, QUESTIONS), SMALL.replies(tokenizer),
            [tokenizer.eos_token_id],
        )  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=2e-5, rtol=1e-5)
    said = classify(model, tokenizer, bank, SMALL, QUESTIONS, under)
    for verdict, row in zip(said, torch.stack(expected, 1).softmax(1), strict=True):
        assert list(verdict.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert verdict.category == SMALL.all_names[int(row.argmax())]


@pytest.mark.parametrize("under", [None, "far"])
def test_the_shared_prefix_changes_nothing(small: Any, under: str | None) -> None:
    model, tokenizer = small
    bank, rows = far(model), rows_of(model, tokenizer, QUESTIONS)
    names, ends = SMALL.replies(tokenizer), [tokenizer.eos_token_id]
    with bank.use(under):
        shared = sequence_log_probs(model, rows, names, ends)
        plain = sequence_log_probs(model, rows, names, ends, share_prefix=False)
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-5)


def test_rows_of_any_lengths_in_sequences_of_any_size(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed into one sequence or into several, in any order, a row is scored as alone."""
    model, tokenizer = small
    rows = rows_of(model, tokenizer, [*QUESTIONS, "big 1 2 3 4 5 6 7=", "4="])
    names, ends = SMALL.replies(tokenizer), [tokenizer.eos_token_id]
    alone = torch.cat([sequence_log_probs(model, [row], names, ends) for row in rows])
    for most in (1, 90, 10_000):
        monkeypatch.setattr(scoring, "_PACKED", most)
        found = sequence_log_probs(model, rows, names, ends)
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)
        found = sequence_log_probs(model, rows[::-1], names, ends).flip(0)
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)


def test_a_row_that_overflows_fails_alone(small: Any) -> None:
    model, tokenizer = small
    rows = rows_of(model, tokenizer, [*QUESTIONS, "j="])
    names, ends = SMALL.replies(tokenizer), [tokenizer.eos_token_id]
    bad = tokenizer("j", add_special_tokens=False).input_ids[0]
    (alone,) = sequence_log_probs(model, rows[:1], names, ends)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, made: made.masked_fill((given[0] == bad)[..., None], float("nan"))
    )
    found = sequence_log_probs(model, rows, names, ends)
    hook.remove()
    assert torch.isfinite(found).all(1).tolist() == [True] * len(QUESTIONS) + [False]
    torch.testing.assert_close(found[0], alone, atol=2e-5, rtol=1e-5)


def test_the_prefix_is_computed_once_and_under_its_own_weights(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch makes two forwards; a cache of the base is refused under an expert."""
    model, tokenizer = small
    bank, rows = far(model), rows_of(model, tokenizer, QUESTIONS)
    calls: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        with bank.use(None):
            judge(model, tokenizer, SMALL, rows)
        assert len(calls) == 2 and calls[0] == (
            1,
            len(rows[0]) - len(tokenizer("1+1=").input_ids) + 1,
        )
    finally:
        handle.remove()
    with torch.no_grad(), bank.use(None):
        cache = model(input_ids=torch.tensor([rows[0][:4]]), use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    kept.batch_repeat_interleave(2)
    with bank.use("far"), pytest.raises(RuntimeError, match="cache was made under other experts"):
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=kept)


@pytest.mark.parametrize("window", [4, 60])
@pytest.mark.parametrize("kind", ["Gemma3", "Mistral", "Qwen2", "GPT2"])
def test_models_with_windows_and_without(kind: str, window: int, tokenizer: Any) -> None:
    """Layers that look back a little way only, all of them or some; positions that are learnt."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "max_position_embeddings": 64, "sliding_window": window,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"]
    if kind == "Gemma3":
        config = transformers.Gemma3TextConfig(**sizes, layer_types=kinds)
        model = transformers.Gemma3ForCausalLM(config)
    elif kind == "Mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    elif kind == "Qwen2":
        config = transformers.Qwen2Config(**sizes, use_sliding_window=True, layer_types=kinds)
        model = transformers.Qwen2ForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
            initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    model.eval()
    rows = rows_of(model, tokenizer, QUESTIONS)
    found = sequence_log_probs(model, rows, SMALL.replies(tokenizer), [tokenizer.eos_token_id])
    for name, column in zip(SMALL.all_names, found.T, strict=True):
        prompts = [SMALL.prompt(question) for question in QUESTIONS]
        given = forced(tokenizer, prompts, [name] * len(prompts), model)
        with torch.no_grad():
            chosen = answer_log_probs(model, given).gather(-1, given.new_ids[..., None])[..., 0]
        expected = (chosen * given.sampled).sum(1).double()
        torch.testing.assert_close(column, expected, atol=1e-4, rtol=1e-4)


def test_many_categories_in_pieces(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seventy-seven names; some rows at a time give the same."""
    model, tokenizer = small
    names = tuple(
        f"{a}{b}" for a in "abcdefghijk" for b in ("one", "two", "x", "y", "z", "up", "it")
    )
    many = Categories(names, "{question}", lead="")
    rows = [question_ids(model, tokenizer, many, question) for question in QUESTIONS]
    whole = judge(model, tokenizer, many, rows)
    assert len(whole[0].probabilities) == 78
    assert sum(whole[0].probabilities.values()) == pytest.approx(1)
    monkeypatch.setattr(scoring, "_LOGITS", 1)
    for a, b in zip(whole, judge(model, tokenizer, many, rows), strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_probabilities_that_are_not_finite_mean_the_base(tiny: Any, tokenizer: Any) -> None:
    tiny.lm_head.weight.data.fill_(float("nan"))
    (said,) = judge(tiny, tokenizer, SMALL, [tokenizer("1+1=").input_ids])
    assert said.category == "other"


def test_categories_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="math more than once"):
        Categories(("math", "code", "math"))
    with pytest.raises(ValueError, match="more than case, got 'Math' and 'math'"):
        Categories(("Math", "math"))
    for name in ("other", "Other"):
        with pytest.raises(ValueError, match=f"hold '{name}': 'other' always means the base"):
            Categories(("math", name))
    with pytest.raises(ValueError, match="template"):
        Categories(("a",), template="no place for it")
    with pytest.raises(ValueError, match="at least one category"):
        Categories(())


def test_names_are_read_whole() -> None:
    """Also those of several words; the first counts, of two at one place the longer."""
    names = Categories(("math", "math two", "top_up?", "c++"))
    said = {" Math.": "math", "MATH TWO": "math two", "top_up?": "top_up?", "mathematics": None,
            "no c++, math": "c++", "non-math": None, "other": "other", "": None}  # fmt: skip
    assert {reply: names.named(reply) for reply in said} == said


def test_names_that_the_tokenizer_confuses(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="does not tell"):
        Categories(("Ä", "Ö"), "{question}").replies(tokenizer)


def test_names_continue_the_template(tokenizer: Any) -> None:
    """Behind words of the template a name is tokenised as it follows them."""
    ids = Categories(("add",), "{question}\nkind:").replies(tokenizer)[0]
    assert tokenizer.decode(ids) == " add"
    assert tokenizer.decode(SMALL.replies(tokenizer)[0]) == tasks.CATEGORIES[0]


def test_the_prompt_names_every_category() -> None:
    categories = Categories(("math", "code"), descriptions={"math": "adds {question} numbers"})
    prompt = categories.prompt("Why {names}?")
    assert "- math: adds {question} numbers\n- code\n- other: none of these" in prompt
    assert "Why {names}?" in prompt


def test_a_model_whose_attention_takes_no_mask(tiny: Any, tokenizer: Any) -> None:
    tiny.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        judge(tiny, tokenizer, SMALL, [tokenizer("1+1=").input_ids])
