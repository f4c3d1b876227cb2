"""Groups of layers that share x inside real models: found, used, and the same text and bits."""

from __future__ import annotations

import copy

import pytest
import torch

import t2kernels as t2k
from t2kernels.ops import dispatch, native

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))

ROWS = ["math", None, "code"]


@pytest.fixture(autouse=True)
def groups_on_a_cpu(monkeypatch):
    """The policy has no use for them there; the CPU's kernels are as good a proof as any."""
    monkeypatch.setitem(dispatch.GROUP_TOKENS, "native", 16)


@pytest.fixture
def calls(monkeypatch):
    made = []
    real = native.forward_group

    def watched(x, Us, *args, **options):
        made.append(len(Us))
        return real(x, Us, *args, **options)

    monkeypatch.setattr(native, "forward_group", watched)
    return made


def twins(zoo, base):
    """The same model converted with and without groups, each with its bank."""
    out = []
    for groups in (True, False):
        model = copy.deepcopy(base)
        report = t2k.convert(model, progress=False, groups=groups)
        out += [model, zoo.bank(model, "math", "code"), report]
    return out


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", [3, 2]), ("qwen3", [3, 2]), ("gemma2", [3, 2]), ("bert", [3]), ("gpt2", [])],
)
def test_groups_by_family(zoo, calls, family, sizes):
    model, bank, report, plain, other, _ = twins(zoo, zoo.build(family))
    assert [len(names) for names in report.groups] == sizes * 2
    inputs = zoo.inputs(family, length=5)
    order = zoo.ROW_ORDER.get(family)
    with torch.no_grad():
        for routing in ("math", ROWS):
            with bank.use(routing, row_order=order), other.use(routing, row_order=order):
                for _ in range(2):
                    got, expected = zoo.outputs(model, inputs), zoo.outputs(plain, inputs)
                    assert torch.equal(got, expected)
    assert sorted(calls) == sorted(sizes * 4)


def test_generation_with_a_cache(zoo, calls):
    model, bank, _, plain, other, _ = twins(zoo, zoo.build("llama"))
    inputs = zoo.inputs("llama", length=4)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with bank.use(ROWS):
        grouped = model.generate(**inputs, **options)
    with other.use(ROWS):
        assert torch.equal(plain.generate(**inputs, **options), grouped)
    assert len(calls) >= 5 * 4  # q, k, v and gate, up of two layers at every step but the first


def test_checkpointed_training_beside_grouped_inference(zoo, calls):
    model, bank, _, plain, other, _ = twins(zoo, zoo.build("llama"))
    inputs = zoo.inputs("llama", length=4)
    grads = []
    for m, b in ((model, bank), (plain, other)):
        m.gradient_checkpointing_enable()
        m.train()
        alpha = torch.full((3, 2), 0.5, requires_grad=True)
        with torch.no_grad(), b.use(ROWS):
            m(**inputs, use_cache=False), m(**inputs, use_cache=False)
        with b.use(alpha):
            loss = m(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
        grads.append(alpha.grad)
    assert calls and torch.equal(*grads) and grads[0].abs().sum() > 0


def encoder_decoder(kind):
    sizes = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    if kind == "bart":
        config = transformers.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_position_embeddings=32, dropout=0.0, forced_eos_token_id=None, **sizes,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config).eval()
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", **sizes,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_cross_attention_gets_another_x(zoo, calls, kind):
    """Keys and values of the encoder's states: a group by name that shares nothing."""
    model, bank, report, plain, other, _ = twins(zoo, encoder_decoder(kind))
    cross = {"bart": "encoder_attn", "t5": "EncDecAttention"}[kind]
    assert any(cross in names[0] for names in report.groups)
    gen = torch.Generator().manual_seed(1)
    source = torch.randint(3, 61, (3, 5), generator=gen)
    target = torch.randint(3, 61, (3, 4), generator=gen)
    with torch.no_grad(), bank.use(ROWS), other.use(ROWS):
        for _ in range(5):
            got = model(input_ids=source, decoder_input_ids=target).logits
            assert torch.equal(got, plain(input_ids=source, decoder_input_ids=target).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            model.generate(input_ids=source, **options), plain.generate(input_ids=source, **options)
        )
    assert calls
    shares = {
        name: layer._group[0].shares
        for name, layer in t2k.svf_layers(model).items()
        if layer._group is not None
    }
    assert not any(shared for name, shared in shares.items() if cross in name)
    assert any(shared for name, shared in shares.items() if cross not in name)
