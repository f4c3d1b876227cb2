import copy
import logging
from typing import Any

import pytest
import torch

from t2runtime.generation import forced
from t2runtime.prompts import encode, prompt_ids, turn_end

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}?"


def test_left_padding_leaves_the_tokenizer_alone(tokenizer: Any) -> None:
    side = tokenizer.padding_side
    tokenizer.padding_side = "right"
    ids, mask = encode(tokenizer, ["1+1=", "flip 12345="], torch.device("cpu"))
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    assert mask[0].tolist() == [0] * 7 + [1] * 5
    assert ids[0, :7].eq(tokenizer.pad_token_id).all()


def test_no_prompt_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        encode(tokenizer, [], torch.device("cpu"))


def with_template(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


def test_a_chat_template_is_used_where_there_is_one(tokenizer: Any) -> None:
    templated = with_template(tokenizer)
    plain = tokenizer("1+1=")["input_ids"]
    question = tokenizer.convert_tokens_to_ids("?")
    assert prompt_ids(tokenizer, "1+1=") == plain == prompt_ids(templated, "1+1=", "off")
    assert prompt_ids(templated, "1+1=") == [*plain, question], "one <s>, from the template"
    assert prompt_ids(templated, "1+1=", "on") == [*plain, question]


@pytest.mark.parametrize("templated", [False, True])
def test_long_prompts_are_checked_here_only(tokenizer: Any, templated: bool) -> None:
    """Against the model's context; transformers would warn by the tokenizer's own number."""
    other = with_template(tokenizer) if templated else copy.deepcopy(tokenizer)
    other.model_max_length = 4
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("transformers")
    log.addHandler(handler)
    try:
        assert len(prompt_ids(other, "1+1=" * 5)) > 20 and not said
        other("1+1=" * 5)
        assert said, "it does warn where it is let"
    finally:
        log.removeHandler(handler)


def test_text_that_is_none(tokenizer: Any) -> None:
    for other in (tokenizer, with_template(tokenizer)):
        with pytest.raises(ValueError, match=r"UTF-8 can hold, got '\\udcff' at character 3"):
            prompt_ids(other, "1+1\udcff=")
    turns = [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "1+1="}]
    with pytest.raises(ValueError, match="UTF-8 can hold"):
        prompt_ids(with_template(tokenizer), turns)
    assert prompt_ids(tokenizer, "\U0001f600") == prompt_ids(tokenizer, "\ud83d\ude00".encode(
        "utf-16", "surrogatepass").decode("utf-16"))  # fmt: skip


def test_a_template_that_is_missing(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="chat='on' needs a tokenizer with a chat template"):
        prompt_ids(tokenizer, "1+1=", "on")
    with pytest.raises(ValueError, match="chat must be"):
        prompt_ids(tokenizer, "1+1=", "yes")


@pytest.mark.parametrize(
    ("template", "ends", "end"),
    [
        (None, [7, 9, 2], 2),  # the tokenizer's own
        (None, [7, 9], 7),  # none of them is the tokenizer's
        (None, 9, 9),
        ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}AB"
         "{% endif %}{% endfor %}", "B then 2", "B"),
        ("{% for m in messages %}{{ m['content'] }}?{% endfor %}", [7, 2], 2),
    ],
)  # fmt: skip
def test_an_answer_ends_as_the_models_own(
    tiny: Any, tokenizer: Any, template: Any, ends: Any, end: Any
) -> None:
    """Of several ids that end an answer, the one behind an assistant's turn of the template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    letter = tokenizer.convert_tokens_to_ids("b")
    if end == "B":
        other.chat_template, ends, end = template.replace("AB", "ab"), [2, letter], letter
    tiny.generation_config.eos_token_id = ends
    assert turn_end(tiny, other) == [end]
    assert forced(other, ["1+1="], ["2"], tiny).new_ids[0, -1] == end
    assert turn_end(tiny, other, "off")[0] in ([2] if 2 in turn_ids(ends) else turn_ids(ends))


def turn_ids(ends: Any) -> list[int]:
    return [ends] if isinstance(ends, int) else ends
