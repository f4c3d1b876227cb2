"""The PEFT example of docs/training.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[3] / "docs" / "training.md"


def test_the_example_runs(kit, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    (example,) = [b for b in blocks if "get_peft_model" in b]
    monkeypatch.chdir(tmp_path)
    kit.base().save_pretrained("model")
    names: dict[str, Any] = {"path": "model", "batch_of_three": kit.inputs(3)}
    exec(example, names)
    assert names["logits"].shape[0] == 3 and len(names["expert"].z) == 14
