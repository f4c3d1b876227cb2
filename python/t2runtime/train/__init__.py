"""Training experts."""

from t2runtime.tasks import Source
from t2runtime.train.adapters import METHODS, SVF, Adapter, Peft
from t2runtime.train.config import RECIPES, Config, paper, small_model
from t2runtime.train.loop import Interrupted, Log, train

__all__ = [
    "METHODS",
    "RECIPES",
    "SVF",
    "Adapter",
    "Config",
    "Interrupted",
    "Log",
    "Peft",
    "Source",
    "paper",
    "small_model",
    "train",
]
