"""FLUDE: federated training with undependable devices, and a cache for any Trainer that survives a kill."""

from edgebolt.flude.dependability import DependableSelection, dependability
from edgebolt.flude.flude import Flude, FludeStrategy
from edgebolt.flude.sessions import ResumeSessions, SessionCache
from edgebolt.flude.staleness import StaleMean
from edgebolt.flude.thresholds import AIMD, Fixed, Quantile, Threshold
from edgebolt.flude.training_cache import TrainingCache

__all__ = [
    "AIMD",
    "DependableSelection",
    "Fixed",
    "Flude",
    "FludeStrategy",
    "Quantile",
    "ResumeSessions",
    "SessionCache",
    "StaleMean",
    "Threshold",
    "TrainingCache",
    "dependability",
]
