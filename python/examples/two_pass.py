"""Train two experts, then answer a mixed batch: each request with the expert that pass 1 names.

python python/examples/two_pass.py [STEPS]
"""

from __future__ import annotations

import sys

import t2kernels as t2k
from t2runtime import Transformer2, tasks
from t2runtime.adapt.prompt import SMALL
from t2runtime.loading import load
from t2runtime.train import small_model, train


def main(steps: int) -> None:
    """Two short trainings and one batch."""
    model, tokenizer = load("small")
    print(t2k.convert(model, progress=False))
    bank = t2k.ExpertBank(model)
    for name in ("add", "reverse"):
        cfg = small_model(steps=steps, validate_every=10)
        bank.add(name, train(model, tokenizer, tasks.Generated(name), cfg))

    # Pass 1 on the base weights; categories without an expert are answered by the base.
    bare = {name: None for name in tasks.SKILLS if name not in bank}
    meant = bare | {"add": {"add": 0.9}}
    t2 = Transformer2(model, tokenizer, bank, categories=SMALL, mixtures=meant)
    questions = ["37+48=", "turn 48213=", "say wxyz="]
    for question, output in zip(questions, t2.generate(questions, max_new_tokens=8), strict=True):
        print(f"{question:14s}{output.text:8s}{output.category:9s}{output.mixture}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
