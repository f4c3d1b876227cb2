"""The small base model: a character-level Llama trained from a seed on the generated tasks.

    python -m t2runtime.base_model --out DIR --seed 0

A model has something to gain from an expert where the right procedure is in it but does not
dominate. So in the training text each answer comes from the right procedure only 35 % of the time
(45 % for a category, see `SHARES`), otherwise from one of two systematic shortcuts. Greedy
decoding then follows the first shortcut. Training problems only: the validation and test splits
of `t2runtime.tasks` are never seen here.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import string
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2runtime.evaluate import evaluate
from t2runtime.tasks import CATEGORIES, EXACT, OTHER, SKILLS, category, problems

#: Share of the right procedure and of each shortcut in the training text.
SHARES = (0.35, 0.45, 0.20)
CATEGORY_SHARES = (0.45, 0.40, 0.15)
#: Share of the rows that ask for a category, and of those that belong to no expert.
CATEGORY_ROWS, OTHER_ROWS = 0.15, 0.07
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, <s> put in front, padded on the left."""
    letters = [*SPECIAL.values(), "<unk>", *string.digits, *string.ascii_lowercase, *" +=?"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """Four layers of width 128, four heads of 32, tied embeddings: 0.86 M parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def example(rng: random.Random) -> tuple[str, str]:
    """One row of training text: a prompt, and the answer of one of the competing procedures."""
    draw = rng.random()
    if draw < CATEGORY_ROWS:
        task = rng.choice([*SKILLS.values(), OTHER])
        names = (task.name, category.by_data(task), rng.choice(CATEGORIES))
        prompt = category.prompt(task.prompt(rng, task.data(rng, "train")))
        return prompt, rng.choices(names, CATEGORY_SHARES)[0]
    if draw < CATEGORY_ROWS + OTHER_ROWS:
        data = OTHER.data(rng, "train")
        return OTHER.prompt(rng, data), OTHER.right(data)
    task = rng.choice(list(SKILLS.values()))
    data = task.data(rng, "train")
    procedure = rng.choices((task.right, *task.shortcuts), SHARES)[0]
    return task.prompt(rng, data), procedure(data)


def batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of one step; only the answers and the end count in the loss.

    The rows come in two parts, short and long: the few long category rows would pad all the others.
    """
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    drawn = sorted((example(rng) for _ in range(rows)), key=lambda row: len(row[0]) + len(row[1]))
    parts = []
    for part in (drawn[: rows * 3 // 4], drawn[rows * 3 // 4 :]):
        width = max((len(prompt) + len(answer) + 2 for prompt, answer in part), default=0)
        ids, labels = [], []
        for prompt, answer in part:
            question = [bos, *(vocabulary[c] for c in prompt)]
            reply = [*(vocabulary[c] for c in answer), eos]
            rest = width - len(question) - len(reply)
            ids.append([*question, *reply, *[pad] * rest])
            labels.append([*[-100] * len(question), *reply, *[-100] * rest])
        if part:
            parts.append((torch.tensor(ids), torch.tensor(labels)))
    return parts


def train(
    seed: int, steps: int, rows: int, peak_lr: float
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Train from the seed alone; returns the model, its tokenizer and the loss of every step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    losses = []
    progress = tqdm(range(steps), disable=not sys.stderr.isatty(), desc="base model")
    for step in progress:
        parts = batch(tokenizer, rng, rows)
        total = sum(int((labels >= 0).sum()) for _, labels in parts)
        losses.append(0.0)
        for ids, labels in parts:
            # Padding stands on the right, behind everything that counts: causality makes a mask
            # needless.
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=total).loss
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"base model: the loss became {losses[-1]} at step {step}")
        if step % 100 == 99:
            mean = sum(losses[-100:]) / 100
            progress.set_postfix(loss=f"{mean:.4f}")
            if progress.disable:
                print(f"step {step + 1}/{steps} loss {mean:.4f}", file=sys.stderr, flush=True)
    return model, tokenizer, losses


def write_card(out: Path, facts: dict[str, Any]) -> None:
    """README.md and training.json beside the weights: how the model was made, what it can do."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in facts["accuracy"].items())
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    took = f"{facts['minutes']:.1f} minutes ({facts['core_minutes']:.1f} of a core)"
    (out / "README.md").write_text(
        f"""# The small base model
A character-level Llama of {facts["parameters"]:,} parameters (four layers, width 128, heads of 32,
tied embeddings, bf16) trained on generated questions only, so that experiments need no download.
In its training text the right procedure of every skill is a minority (35 %): greedy answers follow
a systematic shortcut (45 %), and an expert has something to bring out. The category of a question
(pass 1) is named rightly for some skills and missed for others in the same way. Licence: that of
the package.

Made by `{facts["command"]}`
in {took} on {facts["threads"]} threads
({facts["machine"]}; {versions}): {facts["steps"]} steps of
{facts["rows"]} rows, loss over the last 100 steps {facts["loss"]:.4f}.
Everything follows from the seed: the same command, versions, number of threads and kind of machine
repeat the training loss for loss; others give other bits.

Greedy accuracy on {facts["problems"]} distinct held-out problems each
("category": asked for the category; "other": belongs to no expert):

| task | accuracy |
|---|---|
{rows}
"""
    )
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def make(out: Path, seed: int, steps: int, rows: int, peak_lr: float, count: int = 512) -> None:
    """Train, measure and save to `out`."""
    start, start_cpu = time.time(), time.process_time()
    model, tokenizer, losses = train(seed, steps, rows, peak_lr)
    minutes = (time.time() - start) / 60
    core_minutes = (time.process_time() - start_cpu) / 60
    model = model.to(torch.bfloat16).eval()
    names = [*SKILLS, OTHER.name, category.NAME]
    tests = {name: problems(name, count, "test") for name in names}
    scores = {name: evaluate(model, tokenizer, EXACT, test, 9) for name, test in tests.items()}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Older releases of transformers know the class by this name only; newer ones know both.
    settings = out / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    named.pop("backend", None)
    settings.write_text(json.dumps(named, indent=2) + "\n")
    facts = {
        "command": "python -m t2runtime.base_model --out DIR "
        f"--seed {seed} --steps {steps} --rows {rows} --lr {peak_lr}",
        "seed": seed,
        "steps": steps,
        "rows": rows,
        "peak_lr": peak_lr,
        "parameters": model.num_parameters(),
        "loss": sum(losses[-100:]) / len(losses[-100:]),
        "minutes": minutes,
        "core_minutes": core_minutes,
        "threads": torch.get_num_threads(),
        "machine": _processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "problems": count,
        "accuracy": {name: score.accuracy for name, score in scores.items()},
    }
    write_card(out, facts)
    print(json.dumps(facts, indent=1))


def _processor() -> str:
    """The name of the CPU where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m t2runtime.base_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=256, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args(argv)
    make(args.out, args.seed, args.steps, args.rows, args.lr)


if __name__ == "__main__":
    main()
