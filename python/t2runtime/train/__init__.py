"""Training experts."""

from t2runtime.train.config import Config
from t2runtime.train.reinforce import Interrupted, Log, Source, train

__all__ = ["Config", "Interrupted", "Log", "Source", "train"]
