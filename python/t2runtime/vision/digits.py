"""A small ViT trained on upright digits, then adapted to digits that look different: z alone (SVF),
LoRA, or all weights, with equal steps on equal images.

The folder holds digits.csv.gz: 64 grey values from 0 to 16 and the label in each row. Nothing is
downloaded. Everything follows from the seed.
"""

from __future__ import annotations

import copy
import csv
import gzip
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import t2kernels as t2k
from t2runtime.evaluate import Score, facts
from t2runtime.train.adapters import Peft

SIDE, CLASSES = 8, 10
FILE = "digits.csv.gz"
#: Images for the base, for adapting, for choosing a learning rate; all others are for the test.
SPLITS = {"base": 700, "adapt": 300, "validation": 200}
METHODS = ("svf", "lora", "full")
#: As many rates for each method, the best of them inside; and the best, by `tune` with a seed that
#: no comparison uses.
TUNING_SEED = 1000
TRIED = {"svf": (5e-2, 1.5e-1, 4e-1), "lora": (1e-3, 5e-3, 2e-2), "full": (2e-4, 1e-3, 5e-3)}
RATES = {"svf": 1.5e-1, "lora": 5e-3, "full": 1e-3}
_RANK = 4
_NOISE = 0.7


@dataclass(frozen=True)
class Settings:
    """Steps and rows of a step, of the base and of every adaptation."""

    seed: int = 0
    base_steps: int = 800
    steps: int = 100
    rows: int = 64
    lr: float = 2e-3


@dataclass(frozen=True)
class Images:
    """pixels (count, 1, 8, 8) in [-1, 1], labels (count,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, rows: int, generator: torch.Generator) -> Images:
        """Some of them at random."""
        chosen = torch.randint(len(self), (rows,), generator=generator)
        return Images(self.pixels[chosen], self.labels[chosen])


def _rotated(pixels: Tensor, seed: int) -> Tensor:
    return pixels.rot90(-1, (2, 3))


def _inverted(pixels: Tensor, seed: int) -> Tensor:
    return -pixels


def _noisy(pixels: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pixels + _NOISE * torch.randn(pixels.shape, generator=generator)


#: (pixels, seed) -> pixels of the same shape.
DOMAINS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rotated": _rotated, "inverted": _inverted, "noisy": _noisy,
}  # fmt: skip


def read(folder: str | Path) -> Images:
    """All digits of `folder`. Raises ValueError where the file is missing or not as expected."""
    path = Path(folder).expanduser() / FILE
    if not path.exists():
        raise ValueError(f"--data: {path} is missing; give the folder that holds {FILE}")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [[float(value) for value in row] for row in csv.reader(file)]
    table = torch.tensor([row for row in rows if len(row) == SIDE * SIDE + 1])
    if not rows or len(table) < len(rows) or len(rows) <= sum(SPLITS.values()):
        raise ValueError(
            f"{path} must hold more than {sum(SPLITS.values())} rows of {SIDE * SIDE} values and a "
            f"label, got {len(rows)} rows, {len(table)} of them whole"
        )
    return Images(table[:, :-1].view(-1, 1, SIDE, SIDE) / 8 - 1, table[:, -1].long())


def split(digits: Images, seed: int) -> dict[str, Images]:
    """The parts named in `SPLITS` and "test", drawn by the seed, without overlap."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    parts, start = {}, 0
    for name, count in (*SPLITS.items(), ("test", len(digits))):
        chosen = order[start : start + count]
        parts[name] = Images(digits.pixels[chosen], digits.labels[chosen])
        start += count
    return parts


def seen_as(domain: str, images: Images, seed: int) -> Images:
    """The images as they look in a domain."""
    return Images(DOMAINS[domain](images.pixels, seed), images.labels)


def build() -> ViTForImageClassification:
    """Three layers of width 48, patches of 2 x 2."""
    config = ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        image_size=SIDE, patch_size=2, num_channels=1, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def fit(
    model: Any, parameters: Sequence[Tensor], images: Images, steps: int, rows: int, lr: float,
    seed: int,
) -> None:  # fmt: skip
    """Adam on cross-entropy, the rate falling linearly to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(list(parameters), lr)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        some = images.draw(rows, generator)
        loss = F.cross_entropy(model(pixel_values=some.pixels).logits, some.labels)
        if not bool(loss.isfinite()):
            raise RuntimeError(f"training diverged at step {step}: loss {loss.item()}, lr {lr}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()


@torch.no_grad()
def score(model: Any, images: Images) -> Score:
    """Right classes of all images, in one batch."""
    said = model(pixel_values=images.pixels).logits.argmax(-1)
    return Score(int((said == images.labels).sum()), len(images))


def base(images: Images, settings: Settings) -> ViTForImageClassification:
    """The base, trained from the seed."""
    torch.manual_seed(settings.seed)
    model = build()
    fit(model, list(model.parameters()), images, settings.base_steps, settings.rows, settings.lr,
        settings.seed)  # fmt: skip
    return model.eval()


@dataclass(frozen=True)
class Adapted:
    """A trained adaptation: the model that holds it, trained values, the expert of SVF."""

    model: Any
    values: int
    expert: t2k.Expert | None = None


def adapt(model: Any, method: str, train: Images, settings: Settings, lr: float) -> Adapted:
    """A copy of `model` adapted by one of `METHODS`; the model itself stays as it is."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    own = copy.deepcopy(model)
    if method == "svf":
        t2k.convert(own, progress=False)
        parameters: list[Any] = t2k.trainable(own)
    elif method == "lora":
        adapter = Peft(own, "lora", rank=_RANK, seed=settings.seed)
        adapter.start(recompute=False)
        parameters = list(adapter.parameters().values())
    else:
        parameters = list(own.parameters())
    fit(own, parameters, train, settings.steps, settings.rows, lr, settings.seed + 1)
    expert = t2k.Expert.from_model(own) if method == "svf" else None
    return Adapted(own, sum(p.numel() for p in parameters), expert)


def tune(digits: Images, settings: Settings) -> dict[str, dict[str, int]]:
    """{method: {rate: right answers on validation, all domains together}} for `TRIED`."""
    parts = split(digits, settings.seed)
    model = base(parts["base"], settings)
    right = {method: dict.fromkeys(map(str, rates), 0) for method, rates in TRIED.items()}
    for number, domain in enumerate(DOMAINS):
        train, validation, _ = views(parts, domain, number, settings.seed)
        for method, rates in TRIED.items():
            for lr in rates:
                adapted = adapt(model, method, train, settings, lr)
                right[method][str(lr)] += score(adapted.model, validation).right
    return right


def views(parts: Mapping[str, Images], domain: str, number: int, seed: int) -> list[Images]:
    """The images to adapt on, to validate and to test on, as they look in a domain."""
    names = ("adapt", "validation", "test")
    return [
        seen_as(domain, parts[name], 10 * seed + 3 * number + place)
        for place, name in enumerate(names)
    ]


def measure(digits: Images, settings: Settings) -> dict[str, Any]:
    """One seed: the base, every domain by every method, and all domains in one batch."""
    begin = time.process_time()
    parts = split(digits, settings.seed)
    model = base(parts["base"], settings)
    row: dict[str, Any] = {"settings": asdict(settings)}
    row["upright"] = facts(score(model, parts["test"]))
    experts: dict[str, t2k.Expert] = {}
    tests: dict[str, Images] = {}
    for number, domain in enumerate(DOMAINS):
        train, _, tests[domain] = views(parts, domain, number, settings.seed)
        row[domain] = {"base": facts(score(model, tests[domain]))}
        for method in METHODS:
            found = adapt(model, method, train, settings, RATES[method])
            row[domain][method] = {
                **facts(score(found.model, tests[domain])),
                "values": found.values,
            }
            if found.expert is not None:
                experts[domain] = found.expert
    row["one batch"] = {
        domain: facts(reached) for domain, reached in together(model, experts, tests).items()
    }
    return {**row, "processor_seconds": time.process_time() - begin}


def together(
    model: Any, experts: Mapping[str, t2k.Expert], tests: Mapping[str, Images]
) -> dict[str, Score]:
    """Score of every domain where the images of all of them are one batch, each row under the
    expert of its own domain.
    """
    own = copy.deepcopy(model)
    t2k.convert(own, progress=False)
    bank = t2k.ExpertBank(own)
    for name, expert in experts.items():
        bank.add(name, expert)
    names = [name for name, images in tests.items() for _ in range(len(images))]
    with bank.use(names), torch.no_grad():
        said = own(pixel_values=torch.cat([images.pixels for images in tests.values()])).logits
    found = {}
    for part, (name, images) in zip(
        said.argmax(-1).split([len(images) for images in tests.values()]),
        tests.items(),
        strict=True,
    ):
        found[name] = Score(int((part == images.labels).sum()), len(images))
    return found


def table(row: Mapping[str, Any]) -> str:
    """A seed's row for people, in percent."""
    lines = [f"{'':10}" + "".join(f"{name:>12}" for name in ("base", *METHODS, "one batch"))]
    for domain in DOMAINS:
        reached = [row[domain][name] for name in ("base", *METHODS)] + [row["one batch"][domain]]
        lines.append(f"{domain:10}" + "".join(f"{100 * one['accuracy']:12.1f}" for one in reached))
    return "\n".join([f"upright digits, base: {100 * row['upright']['accuracy']:.1f}", *lines])
