import copy
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime.generation import answer_log_probs, complete, forced, token_log_probs
from t2runtime.prompts import encode


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


def test_without_a_pad_token_the_end_pads_and_is_masked(tiny: Any, tokenizer: Any) -> None:
    """The answers are those of a tokenizer that has one."""
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    ids, mask = encode(bare, ["1+1=", "flip 12345="], torch.device("cpu"))
    assert ids[0, :7].eq(bare.eos_token_id).all() and not mask[0, :7].any()
    prompts = ["1+1=", "flip 12345="]
    assert complete(tiny, bare, prompts, 6).texts == complete(tiny, tokenizer, prompts, 6).texts
    given = forced(bare, prompts, ["2", "54321"], tiny)
    assert given.sampled.sum(1).tolist() == [2, 6]


def test_prompts_must_fit_into_the_context(tiny: Any, tokenizer: Any) -> None:
    fits = ["1" * 57, "1+1="]
    complete(tiny, tokenizer, fits, 6)
    said = "1 of 2 prompts do not fit: prompt 0 has 58 tokens and 7 new .* context holds 64"
    with pytest.raises(ValueError, match=said):
        complete(tiny, tokenizer, fits, 7)
    said = "1 of 2 prompts do not fit: prompt 0 has 58 tokens and 7 new .* context holds 64"
    with pytest.raises(ValueError, match=said):
        forced(tokenizer, fits, ["1" * 6, "1"], tiny)


def at_the_edge(family: str, vocabulary: int) -> Any:
    """A random model with a context of 64 tokens: rotations, or a learnt table of positions."""
    torch.manual_seed(0)
    own = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        config: Any = transformers.LlamaConfig(
            **own, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
    elif family == "gpt2":
        config = transformers.GPT2Config(
            **own, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
        )
    elif family == "gpt_neo":  # which has a table of the causal mask as well
        config = transformers.GPTNeoConfig(
            **own, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]], initializer_range=0.3,
        )  # fmt: skip
    else:
        config = transformers.OPTConfig(
            **own, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "opt"])
def test_rows_that_fit_alone_fit_together(family: str, tokenizer: Any) -> None:
    """A long prompt above a long answer: each fills the context, the batch is wider than it."""
    model = at_the_edge(family, len(tokenizer))
    prompts, answers = ["1" * 57, "flip 12345=", "1+1="], ["12345", "54321", "2" * 58]
    given = forced(tokenizer, prompts, answers, model)
    assert given.ids.shape[1] == 58 + 59 and given.sampled.sum(1).tolist() == [6, 6, 59]
    with torch.no_grad():
        table, chosen = answer_log_probs(model, given), token_log_probs(model, given)
        assert bool(table.isfinite().all()), "what is behind an end is multiplied with 0"
        for row, kept in enumerate(given.sampled):
            alone = forced(tokenizer, [prompts[row]], [answers[row]], model)
            assert torch.allclose(table[row, kept], answer_log_probs(model, alone)[0], atol=1e-5)
            assert torch.allclose(chosen[row, kept], token_log_probs(model, alone)[0], atol=1e-5)
            part = given.rows(slice(row, row + 1))
            assert torch.equal(token_log_probs(model, part), token_log_probs(model, alone))


def test_an_answer_without_tokens(tiny: Any, tokenizer: Any) -> None:
    assert forced(tokenizer, ["1+1="], [""], tiny).new_ids.tolist() == [[2]], "its end alone"
    tiny.generation_config.eos_token_id = None
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="at least one token each"):
        forced(endless, ["1+1="], [""], tiny)


def test_samples_follow_the_softmax_whatever_the_model_prefers(tiny: Any, tokenizer: Any) -> None:
    """A model's own repetition penalty would bend the samples away from what is trained."""
    torch.manual_seed(0)
    plain = complete(tiny, tokenizer, ["1+1="], 8, samples=8, temperature=1.0).ids
    tiny.generation_config.repetition_penalty = 3.0
    tiny.generation_config.min_p = 0.4
    tiny.generation_config.top_k = 2
    torch.manual_seed(0)
    assert torch.equal(
        complete(tiny, tokenizer, ["1+1="], 8, samples=8, temperature=1.0).ids, plain
    )
