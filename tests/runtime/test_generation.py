from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.generation import answer_log_probs, complete, encode, forced


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


def test_greedy_text_does_not_depend_on_the_batch(tiny: Any, tokenizer: Any) -> None:
    prompts = ["1+1=", "flip 12345=", "who ann bob cal="]
    together = complete(tiny, tokenizer, prompts, 6).texts
    alone = [complete(tiny, tokenizer, [prompt], 6).texts[0] for prompt in prompts]
    assert together == alone


def test_log_probs_are_those_of_the_sampling_distribution(tiny: Any, tokenizer: Any) -> None:
    """Row by row and without padding, the chosen tokens have the same log-probability."""
    torch.manual_seed(0)
    done = complete(tiny, tokenizer, ["1+1=", "flip 12345="], 5, samples=2, temperature=1.0)
    with torch.no_grad():
        batched = answer_log_probs(tiny, done)
        for row in range(4):
            real = done.attention[row].bool()
            logits = tiny(input_ids=done.ids[row][real][None]).logits[0, -6:-1]
            assert torch.allclose(batched[row], logits.log_softmax(-1), atol=1e-5)


def test_the_end_token_counts_and_nothing_behind_it(tiny: Any, tokenizer: Any) -> None:
    """A model that ends at once: one sampled token, its log-probability in the loss."""
    tiny.lm_head.weight.data.zero_()
    tiny.generation_config.forced_eos_token_id = None
    done = complete(tiny, tokenizer, ["1+1="], 4, samples=64, temperature=1.0)
    ends = done.new_ids == tokenizer.eos_token_id
    for row in range(64):
        if ends[row].any():
            first = int(ends[row].int().argmax())
            assert done.sampled[row].tolist() == [i <= first for i in range(4)]
        else:
            assert done.sampled[row].all()
    assert ends.any(), "with 64 uniform samples some row ends"


def test_forced_answers_line_up_with_sampled_ones(tiny: Any, tokenizer: Any) -> None:
    """Teacher-forced log-likelihood of the greedy answer equals the one at sampling time."""
    done = complete(tiny, tokenizer, ["1+1=", "flip 12345="], 4)
    with torch.no_grad():
        log_probs = answer_log_probs(tiny, done)
        given = forced(tokenizer, ["1+1=", "flip 12345="], done.texts, tiny)
        again = answer_log_probs(tiny, given)
    for row in range(2):
        words = tokenizer(done.texts[row], add_special_tokens=False)["input_ids"]
        if words == done.new_ids[row, : len(words)].tolist():
            assert torch.allclose(again[row, : len(words)], log_probs[row, : len(words)], atol=1e-5)
    assert given.sampled.sum(1).tolist() == [len(t) + 1 for t in done.texts]


def test_sampling_under_an_expert_differs_from_the_base(tiny: Any, tokenizer: Any) -> None:
    expert = t2k.Expert(
        {n: 1 + torch.randn(z.shape) for n, z in t2k.Expert.from_model(tiny).z.items()}
    )
    bank = t2k.ExpertBank(tiny)
    bank.add("far", expert)
    base = complete(tiny, tokenizer, ["flip 12345="], 8).texts
    with bank.use("far"):
        assert complete(tiny, tokenizer, ["flip 12345="], 8).texts != base
    assert complete(tiny, tokenizer, ["flip 12345="], 8).texts == base
