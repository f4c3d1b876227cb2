"""Training experts."""

from t2runtime.train.config import Config
from t2runtime.train.reinforce import Log, Source, train

__all__ = ["Config", "Log", "Source", "train"]
