"""LEGEND: federated LoRA whose depth and ranks fit unequal devices."""

from edgebolt.legend.capacity import CapacityEstimate
from edgebolt.legend.configuration import LCD, choose_depths
from edgebolt.legend.legend import Legend, LegendStrategy, TopLayers
from edgebolt.legend.lora_depth import LoraDepth
from edgebolt.legend.ranks import rank_distribution

__all__ = [
    "LCD",
    "CapacityEstimate",
    "Legend",
    "LegendStrategy",
    "LoraDepth",
    "TopLayers",
    "choose_depths",
    "rank_distribution",
]
