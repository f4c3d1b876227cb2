"""Ways to decide z' in pass 1: ask the base model, ask a classification expert, or find a mixture
with a few shots; beyond the paper a router network and a record of past performance.
"""

from t2runtime.adapt.cem import SearchResult, cross_entropy_method
from t2runtime.adapt.classifier import train_classifier
from t2runtime.adapt.fewshot import FewShot, Space, search
from t2runtime.adapt.gradient import gradient_ascent
from t2runtime.adapt.mixtures import TaskMixture, load_mixture, load_mixtures, save_mixture
from t2runtime.adapt.prompt import Categories, Verdict, classify
from t2runtime.adapt.record import Record, measure_record, record_of_tasks
from t2runtime.adapt.router import Router, RouterConfig, train_router
from t2runtime.adapt.search import cma_es, random_search
from t2runtime.adapt.shots import held_out

__all__ = [
    "Categories",
    "FewShot",
    "Record",
    "Router",
    "RouterConfig",
    "SearchResult",
    "Space",
    "TaskMixture",
    "Verdict",
    "classify",
    "cma_es",
    "cross_entropy_method",
    "gradient_ascent",
    "held_out",
    "load_mixture",
    "load_mixtures",
    "measure_record",
    "random_search",
    "record_of_tasks",
    "save_mixture",
    "search",
    "train_classifier",
    "train_router",
]
