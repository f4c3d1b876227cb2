"""Three ways to decide z' in pass 1: ask the base model, ask a classification expert, or search
with a few shots.
"""

from t2runtime.adapt.cem import CEMResult, cross_entropy_method
from t2runtime.adapt.classifier import train_classifier
from t2runtime.adapt.fewshot import FewShot, search
from t2runtime.adapt.prompt import Categories, name_categories

__all__ = [
    "CEMResult",
    "Categories",
    "FewShot",
    "cross_entropy_method",
    "name_categories",
    "search",
    "train_classifier",
]
