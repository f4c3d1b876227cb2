"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the example loads a model with it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=39,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(1, 39, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    names = {"path": str(tmp_path / "model"), "batch_of_three": batch}
    (example,) = [b for b in BLOCKS if "from_pretrained" in b]
    # The second expert of the example comes from somewhere else; here it is a copy of the first.
    first = 'save("math.safetensors")'
    assert first in example
    exec(example.replace(first, f"{first}; __import__('shutil').copy('math.safetensors', "
                                "'code.safetensors')"), names)  # fmt: skip
    assert names["out"].shape[0] == 3
    assert not t2k.svf_layers(names["model"])


def test_equivalent_to_is_equivalent():
    f = t2k.decompose(torch.randn(7, 5))
    x, bias, names = torch.randn(4, 5), torch.randn(7), {"torch": torch, "F": F}
    (block,) = [b for b in BLOCKS if "F.linear" in b]
    one, many = block.strip().splitlines()
    d = torch.rand(5)
    exec(one, names := {**names, "x": x, "f": f, "d": d, "bias": bias})
    torch.testing.assert_close(t2k.svf_linear(x, f, d, bias=bias), names["y"])
    names["d"], names["slot"] = torch.rand(2, 5), torch.tensor([0, -1, 1, 0], dtype=torch.int32)
    exec(many, names)
    y = t2k.svf_linear(x, f, names["d"], names["slot"], bias)
    torch.testing.assert_close(y, names["y"])


def test_the_tree_is_the_tree():
    tree = README.split("## The house", 1)[1]
    at: dict[int, Path] = {0: ROOT}
    seen = 0
    for line in tree.splitlines():
        found = re.match(r" {4}( *)((?:[\w./]+(?: |$))+)", line)
        if not found:
            continue
        depth = len(found[1]) // 2
        for name in found[2].split():
            path = at[depth] / name
            assert path.exists(), f"README names {path.relative_to(ROOT)}"
            at[depth + 1] = path
            seen += 1
    assert seen > 20


def test_it_is_short():
    assert len(README.splitlines()) <= 200
