"""COMP: structured pruning after training that gives a smaller model which loads like any other."""

from edgebolt.comp import pruned_models as _registered  # noqa: F401
from edgebolt.comp.comp import Comp
from edgebolt.comp.report import Report
from edgebolt.comp.scores import SCORES
from edgebolt.comp.structured_pruning import StructuredPruning

__all__ = ["SCORES", "Comp", "Report", "StructuredPruning"]
