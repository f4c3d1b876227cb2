import dataclasses
import math
from typing import Any

import pytest

from t2runtime.cli import build_parser
from t2runtime.train import RECIPES, Config, paper, small_model

GIVEN = {"samples": 4, "baseline": "leave-one-out"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 1.5}, {"steps": True}, {"samples": 1}, {"temperature": 0.0},
        {"baseline": "mean"}, {"rollout": "rebuilt"}, {"objective": "dpo"}, {"kl": -0.1},
        {"kl": math.nan}, {"kl_estimator": "k1"}, {"temperature": math.inf}, {"lr": 0.0},
        {"lr": math.nan}, {"clip": 0.0}, {"seed": -1}, {"optimiser": "sgd"},
        {"schedule": "linear"}, {"weight_decay": -1.0}, {"warmup": 200}, {"warmup": -1},
        {"wrong_reward": 1.0}, {"wrong_reward": math.nan}, {"patience": 0}, {"stop_at": 0.0},
        {"stop_at": 1.5}, {"chat": "yes"}, {"max_new_tokens": 0}, {"checkpoint_every": 0},
        {"rows_per_backward": 0},
    ],
)  # fmt: skip
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**{**GIVEN, **wrong})


def test_k3_needs_samples() -> None:
    with pytest.raises(ValueError, match="kl_estimator 'k3'"):
        Config(objective="next-token", kl_estimator="k3")
    assert Config(objective="next-token", kl_estimator="k3", kl=0.0).kl == 0


def test_the_papers_recipe_is_the_default() -> None:
    assert paper() == Config()
    cfg = Config()
    assert (cfg.optimiser, cfg.lr, cfg.schedule, cfg.clip) == ("adamw", 2e-3, "cosine", 1e-3)
    assert (cfg.kl, cfg.kl_estimator, cfg.wrong_reward, cfg.baseline) == (0.1, "exact", -1, "none")
    assert cfg.prompts * cfg.samples == 256 and cfg.patience and cfg.weight_decay == 0


def test_the_small_models_recipe() -> None:
    cfg = small_model(seed=3)
    assert (cfg.lr, cfg.schedule, cfg.kl, cfg.clip) == (2e-2, "constant", 0.02, 1.0)
    assert (cfg.prompts, cfg.samples, cfg.baseline) == (32, 8, "leave-one-out")
    assert cfg.seed == 3


def test_differences_are_named() -> None:
    assert Config(lr=0.1).differences(Config(lr=0.2)) == ["lr 0.1, not 0.2"]
    assert Config().differences(Config()) == []


def test_every_setting_is_an_option() -> None:
    words = ["train", "small", "--task", "add", "--out", "x.safetensors"]
    plain = vars(build_parser().parse_args(words))
    fields = dataclasses.fields(Config)
    assert not plain.keys() & {f.name for f in fields}, "the recipe decides what is not given"
    for cfg in (recipe() for recipe in RECIPES.values()):
        given = []
        for f in fields:
            value, option = getattr(cfg, f.name), f"--{f.name.replace('_', '-')}"
            if isinstance(value, bool):
                given += [option] if value else []
            elif value is not None:
                given += [f"{option}={value}"]
        got = vars(build_parser().parse_args([*words, *given]))
        for f in fields:
            if f.name in got:
                assert got[f.name] == getattr(cfg, f.name), f.name
    assert build_parser().parse_args([*words, "--patience", "none"]).patience is None
