"""Caesar: federated traffic compressed both ways, leaning on the device's own old model."""

from edgebolt.caesar.batch_sizes import LevelledBatches, level_batches
from edgebolt.caesar.caesar import Caesar, CaesarStrategy
from edgebolt.caesar.importance import UploadRatios, importance, label_divergence, ranked_ratios
from edgebolt.caesar.introduction import Introduction
from edgebolt.caesar.staleness import DownloadRatios, cluster, download_ratio

__all__ = [
    "Caesar",
    "CaesarStrategy",
    "DownloadRatios",
    "Introduction",
    "LevelledBatches",
    "UploadRatios",
    "cluster",
    "download_ratio",
    "importance",
    "label_divergence",
    "level_batches",
    "ranked_ratios",
]
